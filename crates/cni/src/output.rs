//! Answers in the form of the runtime's CNI version.

use std::path::Path;

use palisade_api::cni::{Attached, Failure};
use serde_json::{Map, Value, json};

use crate::input::{Config, Version};

pub(crate) fn error(version: &str, failure: &Failure) -> Value {
    json!({
        "cniVersion": version,
        "code": u32::from(failure.code),
        "msg": failure.message,
        "details": failure.details,
    })
}

pub(crate) fn versions(version: &str) -> Value {
    json!({ "cniVersion": version, "supportedVersions": Version::ALL })
}

/// Our interfaces, addresses and routes behind those of the plugins before us.
pub(crate) fn result(config: &Config, attached: &Attached, netns: &Path) -> Value {
    let mut result: Map<String, Value> = config.prev_result.clone().unwrap_or_default();
    result.insert("cniVersion".to_owned(), json!(config.version_text));
    let interfaces = list(&mut result, "interfaces");
    let pod_index = interfaces.len() + 1;
    let mut host = json!({ "name": attached.host.name, "mac": attached.host.mac });
    let mut pod = json!({ "name": attached.pod.name, "mac": attached.pod.mac, "sandbox": netns });
    if config.version >= Version::V1_1_0 {
        host["mtu"] = json!(attached.host.mtu);
        pod["mtu"] = json!(attached.pod.mtu);
    }
    interfaces.extend([host, pod]);
    for address in &attached.addresses {
        let mut ip = json!({
            "address": address.address,
            "gateway": address.gateway,
            "interface": pod_index,
        });
        if config.version < Version::V1_0_0 {
            ip["version"] = json!(if address.address.addr().is_ipv4() { "4" } else { "6" });
        }
        list(&mut result, "ips").push(ip);
    }
    for route in &attached.routes {
        list(&mut result, "routes").push(json!({ "dst": route.dst, "gw": route.gw }));
    }
    result.entry("dns").or_insert_with(|| json!({}));
    Value::Object(result)
}

/// A list of the result; anything else in its place is replaced.
fn list<'a>(result: &'a mut Map<String, Value>, key: &str) -> &'a mut Vec<Value> {
    let entry = result.entry(key).or_insert(Value::Null);
    if !entry.is_array() {
        *entry = Value::Array(Vec::new());
    }
    match entry {
        Value::Array(list) => list,
        _ => unreachable!("an array was put there"),
    }
}
