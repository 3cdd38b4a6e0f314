//! `v1 Pod`.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, Pod as Object};
use palisade_policy::model::NamedPort;

use super::{Parse, object_name};
use crate::{
    names,
    tables::{Change, Intent, ObjectName, pods::Pod},
};

/// On the object that mirrors a static pod: the uid that the kubelet runs it under.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// Pods to rows.
pub(super) struct Reflect;

impl Parse for Reflect {
    type Object = Object;
    type Row = Pod;

    fn key(&self, object: &Object) -> ObjectName {
        object_name(object)
    }

    fn parse(&self, object: Object) -> Option<Pod> {
        let name = object_name(&object);
        let spec = object.spec?;
        let status = object.status.unwrap_or_default();
        let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
        let addresses = match ended {
            true => Vec::new(),
            false => addresses(&status),
        };
        let init = spec.init_containers.iter().flatten();
        let uid = object.metadata.uid.unwrap_or_default();
        let mirrored = object.metadata.annotations.and_then(|mut all| all.remove(MIRROR));
        Some(Pod {
            name,
            runtime_uid: mirrored.unwrap_or_else(|| uid.clone()),
            uid,
            node: spec.node_name.unwrap_or_default(),
            addresses,
            host_network: spec.host_network.unwrap_or_default(),
            terminating: object.metadata.deletion_timestamp.is_some(),
            labels: object.metadata.labels.unwrap_or_default(),
            service_account: spec
                .service_account_name
                .filter(|name| !name.is_empty())
                .unwrap_or_else(|| "default".into()),
            ports: spec.containers.iter().chain(init).flat_map(named_ports).collect(),
        })
    }

    fn intent(&self, change: Change<Pod>) -> Intent {
        Intent::Pod(change)
    }
}

fn addresses(status: &k8s_openapi::api::core::v1::PodStatus) -> Vec<IpAddr> {
    let all = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str());
    let mut addresses: Vec<IpAddr> =
        all.chain(status.pod_ip.as_deref()).filter_map(|ip| ip.parse().ok()).collect();
    addresses.sort();
    addresses.dedup();
    addresses
}

fn named_ports(container: &Container) -> Vec<NamedPort> {
    let ports = container.ports.iter().flatten();
    ports
        .filter_map(|port| {
            Some(NamedPort {
                name: port.name.clone()?,
                protocol: names::protocol_number(port.protocol.as_deref())?,
                port: u16::try_from(port.container_port).ok()?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uids(annotations: serde_json::Value) -> (String, String) {
        let object = serde_json::from_value(serde_json::json!({
            "metadata": { "name": "a", "uid": "api", "annotations": annotations },
            "spec": { "containers": [] },
        }));
        let pod = Reflect.parse(object.expect("a pod")).expect("a row");
        (pod.uid, pod.runtime_uid)
    }

    #[test]
    fn a_static_pod_runs_under_the_uid_that_its_mirror_tells() {
        let same = ("api".to_owned(), "api".to_owned());
        assert_eq!(uids(serde_json::json!({ "app": "a" })), same);
        let mirror = serde_json::json!({ "kubernetes.io/config.mirror": "hash" });
        assert_eq!(uids(mirror), ("api".to_owned(), "hash".to_owned()));
    }
}
