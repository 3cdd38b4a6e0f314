//! The ends and the policies from files: pods, workloads that would make pods, namespaces, Services,
//! Secrets.

mod services;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
};

use anyhow::{Context, Result, anyhow, bail};
use k8s_openapi::api::core::v1::Secret;
use palisade_api::{
    admin::{Explain, Explanation, Translated},
    convert::convert,
    explain::{self, NamedEnd},
    secrets,
    service::address,
};
use palisade_policy::{
    evaluate::End,
    identity::{PodLabels, endpoint_labels, reserved},
    model::{NamedPort, Policy, PolicyKind},
};
use serde_json::Value;

use self::services::{Services, full_name};
use crate::{
    check::{documents, objects, read},
    exit::Failure,
};

/// The cluster's name where nobody gave it one.
const CLUSTER: &str = "default";
/// Any identity that a pod can have: the labels are what counts.
const POD: u32 = 256;

/// Identities of addresses that are no pod's: in the world.
const WORLD_IPV4: u32 = 9;
const WORLD_IPV6: u32 = 10;

#[derive(Default)]
struct Objects {
    policies: Vec<Policy>,
    /// Labels by namespace.
    namespaces: BTreeMap<String, BTreeMap<String, String>>,
    pods: Vec<Pod>,
    services: Services,
    /// What policies may use of Secrets: values by name and key.
    secrets: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
}

struct Pod {
    /// It stands for those that a workload makes.
    is_made: bool,
    namespace: String,
    name: String,
    labels: BTreeMap<String, String>,
    service_account: String,
    addresses: Vec<IpAddr>,
    ports: Vec<NamedPort>,
}

pub(super) fn explain(files: &[PathBuf], asked: &Explain) -> Result<Explanation> {
    let mut objects = Objects::default();
    for file in files {
        let text = read(file)?;
        for (line, document) in documents(&text) {
            let document: Value = serde_saphyr::from_str(document)
                .with_context(|| format!("{}:{line}", file.display()))?;
            for (path, object) in self::objects(&document) {
                let place = || format!("{}:{line}: {path}", file.display());
                objects.add(object).with_context(place)?;
            }
        }
    }
    let policies: Vec<&Policy> = objects.policies.iter().collect();
    let services = &objects.services;
    let secrets = secrets::values(objects.secrets.iter().map(|(name, data)| (&**name, data)));
    if let Some(service) = services.meant(&objects, &asked.from)? {
        let name = full_name(service);
        bail!("--from {}: Service {name} opens no connections; name a pod", asked.from);
    }
    let from = objects.find(&asked.from)?;
    let Some(target) = services.target(&objects, asked)? else {
        return Ok(explain::explain(&policies, &secrets, &from, &objects.find(&asked.to)?, asked));
    };
    let backends = target.backends.iter().map(|(to, port)| {
        let asked = Explain { port: *port, ..asked.clone() };
        explain::explain(&policies, &secrets, &from, to, &asked)
    });
    let backends = backends.collect();
    let service = Translated { name: target.name, frontend: target.frontend, backends };
    Ok(explain::explain_service(&from, service))
}

impl Objects {
    fn has_namespace(&self, name: &str) -> bool {
        self.namespaces.contains_key(name) || self.pods.iter().any(|pod| pod.namespace == name)
    }

    fn add(&mut self, object: &Value) -> Result<()> {
        if self.services.add(object)? {
            return Ok(());
        }
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
        let kind = match text("/kind").unwrap_or_default() {
            "NetworkPolicy" => PolicyKind::NetworkPolicy,
            "CiliumNetworkPolicy" => PolicyKind::CiliumNetworkPolicy,
            "CiliumClusterwideNetworkPolicy" => PolicyKind::CiliumClusterwideNetworkPolicy,
            "Namespace" => {
                let name = text("/metadata/name").unwrap_or_default().to_owned();
                self.namespaces.insert(name, strings(object.pointer("/metadata/labels")));
                return Ok(());
            }
            "Secret" => {
                if text("/metadata/namespace") == Some(secrets::NAMESPACE) {
                    self.secrets.extend([values(object)?]);
                }
                return Ok(());
            }
            "Pod" => {
                self.pods.push(Pod::read(object, &object["metadata"], object));
                return Ok(());
            }
            _ => {
                if let Some(template) = object.pointer("/spec/template") {
                    let made = Pod::read(object, &template["metadata"], template);
                    self.pods.push(Pod { is_made: true, ..made });
                }
                return Ok(());
            }
        };
        let mut object = object.clone();
        // The API server would put it there.
        if kind != PolicyKind::CiliumClusterwideNetworkPolicy
            && object.pointer("/metadata/namespace").is_none()
        {
            object["metadata"]["namespace"] = "default".into();
        }
        self.policies.push(match convert(kind, &object, CLUSTER) {
            Ok(policy) => policy,
            Err(refusal) => {
                eprintln!("warning: refused, its subject is locked down: {refusal}");
                refusal.lockdown()
            }
        });
        Ok(())
    }

    fn find(&self, text: &str) -> Result<NamedEnd> {
        let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
        if let Some(address) = address(text) {
            let owner = self.pods.iter().find(|pod| pod.addresses.contains(&address));
            return Ok(owner.map_or_else(|| outside(address), |pod| self.end(pod)));
        }
        let inside = || self.pods.iter().filter(|pod| pod.namespace == namespace);
        let found = inside()
            .find(|pod| pod.name == name)
            .or_else(|| inside().find(|pod| pod.name.starts_with(name)))
            .ok_or_else(|| {
                anyhow!(Failure::not_found(format!(
                    "the files have no pod and no Service {namespace}/{name}, and nothing that \
                     makes pods of that name"
                )))
            })?;
        Ok(self.end(found))
    }

    fn end(&self, pod: &Pod) -> NamedEnd {
        let mut team = self.namespaces.get(&pod.namespace).cloned().unwrap_or_default();
        team.insert("kubernetes.io/metadata.name".into(), pod.namespace.clone());
        let labels = endpoint_labels(&PodLabels {
            namespace: &pod.namespace,
            namespace_labels: Some(&team),
            pod_labels: Some(&pod.labels),
            service_account: &pod.service_account,
            cluster: CLUSTER,
        });
        let end = End {
            identity: POD,
            labels,
            address: pod.addresses.first().copied().unwrap_or([0, 0, 0, 0].into()),
            named_ports: pod.ports.clone(),
            names: BTreeSet::new(),
        };
        NamedEnd { name: format!("{}/{}", pod.namespace, pod.name), end }
    }
}

fn outside(address: IpAddr) -> NamedEnd {
    let identity = if address.is_ipv4() { WORLD_IPV4 } else { WORLD_IPV6 };
    let labels = reserved(identity).unwrap_or_default();
    let end = End { identity, labels, address, named_ports: Vec::new(), names: BTreeSet::new() };
    NamedEnd { name: address.to_string(), end }
}

impl Pod {
    /// `object` has the name; `metadata` and `pod` may be those of its template.
    fn read(object: &Value, metadata: &Value, pod: &Value) -> Self {
        let text = |value: &Value, pointer: &str| {
            value.pointer(pointer).and_then(Value::as_str).map(str::to_owned)
        };
        let addresses = pod.pointer("/status/podIPs").and_then(Value::as_array);
        let containers = pod.pointer("/spec/containers").and_then(Value::as_array);
        Self {
            is_made: false,
            namespace: text(object, "/metadata/namespace").unwrap_or_else(|| "default".into()),
            name: text(object, "/metadata/name").unwrap_or_default(),
            labels: strings(metadata.get("labels")),
            service_account: text(pod, "/spec/serviceAccountName")
                .unwrap_or_else(|| "default".into()),
            addresses: addresses
                .into_iter()
                .flatten()
                .filter_map(|one| one["ip"].as_str()?.parse().ok())
                .collect(),
            ports: containers
                .into_iter()
                .flatten()
                .flat_map(|container| container["ports"].as_array().into_iter().flatten())
                .filter_map(named_port)
                .collect(),
        }
    }
}

/// The name and the values of a Secret.
fn values(object: &Value) -> Result<(String, BTreeMap<String, Vec<u8>>)> {
    let name = object.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
    // What the reader says of it may contain values.
    let Ok(secret) = serde_json::from_value::<Secret>(object.clone()) else {
        bail!(
            "Secret {}/{name}: its `data` must be text in base64, its `stringData` text",
            secrets::NAMESPACE
        );
    };
    let Secret { data, string_data, .. } = secret;
    let data = data.into_iter().flatten().map(|(key, value)| (key, value.0));
    // As the API server has it, the plain text counts.
    let plain = string_data.into_iter().flatten().map(|(key, text)| (key, text.into_bytes()));
    Ok((name.to_owned(), data.chain(plain).collect()))
}

fn named_port(port: &Value) -> Option<NamedPort> {
    Some(NamedPort {
        name: port["name"].as_str()?.to_owned(),
        protocol: match port["protocol"].as_str().unwrap_or("TCP") {
            "UDP" => 17,
            "SCTP" => 132,
            _ => 6,
        },
        port: u16::try_from(port["containerPort"].as_u64()?).ok()?,
    })
}

fn strings(map: Option<&Value>) -> BTreeMap<String, String> {
    map.and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
        .collect()
}

#[cfg(test)]
mod tests;
