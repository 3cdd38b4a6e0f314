//! Addresses of services.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::{Value, json};

use super::error::{ApiError, Cause};
use super::meta::text;
use super::registry::Resource;
use super::store::Transaction;

/// The first addresses are for the cluster's own services.
const RESERVED: u16 = 16;

/// What a service asks for and does not get here.
pub(super) fn beyond_the_lab(resource: &Resource, service: &Value) -> Option<String> {
    if resource.builtin_key() != "/services" {
        return None;
    }
    let kind = service["spec"]["type"]
        .as_str()
        .filter(|kind| ["NodePort", "LoadBalancer"].contains(kind))?;
    Some(format!(
        "the lab has no ports of nodes and no load balancers: this {kind} service is reached at its \
         cluster IP, or from outside with kubectl port-forward"
    ))
}

/// Gives a service its cluster addresses, or keeps those that it has.
pub(super) fn allocate(
    resource: &Resource,
    transaction: &Transaction<'_>,
    old: Option<&Value>,
    service: &mut Value,
) -> Result<(), ApiError> {
    if resource.builtin_key() != "/services" {
        return Ok(());
    }
    let name = text(service, "name").to_owned();
    let refuse = |cause| ApiError::invalid("", "Service", &name, vec![cause]);
    let spec = &mut service["spec"];
    if spec["type"] == "ExternalName" {
        if let Some(fields) = spec.as_object_mut() {
            fields.remove("clusterIP");
            fields.remove("clusterIPs");
        }
        return Ok(());
    }
    if let Some(old) = old
        && old["spec"]["type"] != "ExternalName"
    {
        for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
            if spec[field].is_null() || spec[field] == "" {
                spec[field] = old["spec"][field].clone();
            }
        }
        if spec["clusterIP"] != old["spec"]["clusterIP"] {
            let hint = "may not change once set";
            return Err(refuse(Cause::invalid("spec.clusterIPs[0]", &spec["clusterIP"], hint)));
        }
        if spec["ipFamilies"] == old["spec"]["ipFamilies"]
            && spec["ipFamilyPolicy"] == old["spec"]["ipFamilyPolicy"]
        {
            return Ok(());
        }
        if spec["ipFamilies"] == old["spec"]["ipFamilies"] {
            spec["ipFamilies"] = json!([old["spec"]["ipFamilies"][0]]);
        }
    }
    let families = families(spec).map_err(refuse)?;
    spec["ipFamilies"] = json!(families);
    if spec["ipFamilyPolicy"].is_null() {
        spec["ipFamilyPolicy"] = "SingleStack".into();
    }
    if spec["clusterIP"] == "None" {
        spec["clusterIPs"] = json!(["None"]);
        return Ok(());
    }
    let used = used(transaction, &name, text(service, "namespace"));
    let spec = &mut service["spec"];
    let mut asked: Vec<String> = spec["clusterIPs"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|address| address.as_str().map(str::to_owned))
        .collect();
    if asked.is_empty()
        && let Some(first) = spec["clusterIP"].as_str().filter(|address| !address.is_empty())
    {
        asked.push(first.to_owned());
    }
    let mut addresses = Vec::new();
    for (index, family) in families.iter().enumerate() {
        let path = format!("spec.clusterIPs[{index}]");
        let address = match asked.get(index) {
            None => free(family, &used).ok_or_else(|| {
                ApiError::internal(format!("no {family} service address is free"))
            })?,
            Some(text) => {
                let value = json!(text);
                let parsed: IpAddr = text.parse().map_err(|_| {
                    refuse(Cause::invalid(&path, &value, "must be a valid IP address"))
                })?;
                if !in_range(parsed, family) {
                    let hint = format!(
                        "failed to allocate IP {text}: the provided IP is not in the valid range \
                         for {family}: {}",
                        range(family)
                    );
                    return Err(refuse(Cause::invalid(&path, &value, &hint)));
                }
                if used.contains(&parsed) {
                    let hint =
                        format!("failed to allocate IP {text}: provided IP is already allocated");
                    return Err(refuse(Cause::invalid(&path, &value, &hint)));
                }
                parsed
            }
        };
        addresses.push(address.to_string());
    }
    spec["clusterIP"] = addresses.first().cloned().into();
    spec["clusterIPs"] = json!(addresses);
    Ok(())
}

/// The families that a service asks for.
fn families(spec: &Value) -> Result<Vec<&'static str>, Cause> {
    let mut families = Vec::new();
    for (index, family) in spec["ipFamilies"].as_array().into_iter().flatten().enumerate() {
        match family.as_str() {
            Some("IPv4") => families.push("IPv4"),
            Some("IPv6") => families.push("IPv6"),
            _ => {
                let path = format!("spec.ipFamilies[{index}]");
                return Err(Cause::not_supported(path, family, &["IPv4", "IPv6"]));
            }
        }
    }
    if families.is_empty() {
        let first = spec["clusterIPs"][0].as_str().or_else(|| spec["clusterIP"].as_str());
        let six = first.is_some_and(|address| address.contains(':'));
        families.push(if six { "IPv6" } else { "IPv4" });
    }
    let dual =
        matches!(spec["ipFamilyPolicy"].as_str(), Some("PreferDualStack" | "RequireDualStack"));
    if dual && families.len() == 1 {
        families.push(if families[0] == "IPv4" { "IPv6" } else { "IPv4" });
    }
    if !dual && families.len() > 1 {
        let hint = "may only hold multiple values when spec.ipFamilyPolicy is PreferDualStack or \
                    RequireDualStack";
        return Err(Cause::invalid("spec.ipFamilies", &spec["ipFamilies"], hint));
    }
    Ok(families)
}

fn range(family: &str) -> &'static str {
    if family == "IPv4" { "10.96.0.0/16" } else { "fd96::/112" }
}

fn in_range(address: IpAddr, family: &str) -> bool {
    match address {
        IpAddr::V4(address) => family == "IPv4" && address.octets()[..2] == [10, 96],
        IpAddr::V6(address) => {
            family == "IPv6" && address.segments()[..7] == [0xfd96, 0, 0, 0, 0, 0, 0]
        }
    }
}

/// Addresses that other services have.
fn used(transaction: &Transaction<'_>, name: &str, namespace: &str) -> HashSet<IpAddr> {
    let services = transaction.list("/services", None);
    let others = services
        .iter()
        .filter(|service| text(service, "name") != name || text(service, "namespace") != namespace);
    others
        .flat_map(|service| service["spec"]["clusterIPs"].as_array().into_iter().flatten())
        .filter_map(|address| address.as_str()?.parse().ok())
        .collect()
}

fn free(family: &str, used: &HashSet<IpAddr>) -> Option<IpAddr> {
    let address = |host: u16| -> IpAddr {
        let [high, low] = host.to_be_bytes();
        if family == "IPv4" {
            Ipv4Addr::new(10, 96, high, low).into()
        } else {
            Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, host).into()
        }
    };
    (RESERVED..u16::MAX).map(address).find(|address| !used.contains(address))
}
