//! `v1 Node` and `cilium.io/v2 CiliumNode`.

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node as NodeObject;
use kube::{ResourceExt, api::DynamicObject};
use serde_json::Value;

use super::Parse;
use crate::tables::{
    Change, Intent,
    nodes::{Node, NodeSource},
};

/// Nodes to rows.
pub(super) struct Nodes;

impl Parse for Nodes {
    type Object = NodeObject;
    type Row = Node;

    fn key(&self, object: &NodeObject) -> String {
        object.name_any()
    }

    fn parse(&self, object: NodeObject) -> Option<Node> {
        let name = object.name_any();
        let spec = object.spec.unwrap_or_default();
        let status = object.status.unwrap_or_default();
        let addresses = status.addresses.iter().flatten();
        let mut pod_cidrs: Vec<IpNet> = spec
            .pod_cidrs
            .iter()
            .flatten()
            .chain(&spec.pod_cidr)
            .filter_map(|cidr| cidr.parse().ok())
            .collect();
        pod_cidrs.sort();
        pod_cidrs.dedup();
        Some(Node {
            name,
            source: NodeSource::Node,
            uid: object.metadata.uid.unwrap_or_default(),
            addresses: addresses
                .filter(|address| address.type_ == "InternalIP")
                .filter_map(|address| address.address.parse().ok())
                .collect(),
            router_addresses: Vec::new(),
            pod_cidrs,
        })
    }

    fn intent(&self, change: Change<Node>) -> Intent {
        Intent::Node(NodeSource::Node, change)
    }
}

/// `CiliumNode`s to rows.
pub(super) struct CiliumNodes;

impl Parse for CiliumNodes {
    type Object = DynamicObject;
    type Row = Node;

    fn key(&self, object: &DynamicObject) -> String {
        object.name_any()
    }

    fn parse(&self, object: DynamicObject) -> Option<Node> {
        let of_type = |wanted: &str| -> Vec<IpAddr> {
            let addresses = list(&object.data, "/spec/addresses").iter();
            addresses
                .filter(|address| address["type"] == wanted)
                .filter_map(|address| address["ip"].as_str()?.parse().ok())
                .collect()
        };
        let cidrs = list(&object.data, "/spec/ipam/podCIDRs").iter();
        Some(Node {
            source: NodeSource::CiliumNode,
            addresses: of_type("InternalIP"),
            router_addresses: of_type("CiliumInternalIP"),
            pod_cidrs: cidrs.filter_map(|cidr| cidr.as_str()?.parse().ok()).collect(),
            name: object.name_any(),
            uid: object.metadata.uid.unwrap_or_default(),
        })
    }

    fn intent(&self, change: Change<Node>) -> Intent {
        Intent::Node(NodeSource::CiliumNode, change)
    }
}

fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}
