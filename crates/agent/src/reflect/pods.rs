//! `v1 Pod`.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, Pod as Object};
use palisade_policy::model::NamedPort;

use super::{Parse, object_name};
use crate::{
    names,
    tables::{Change, Intent, ObjectName, pods::Pod},
};

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
        Some(Pod {
            name,
            uid: object.metadata.uid.unwrap_or_default(),
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
