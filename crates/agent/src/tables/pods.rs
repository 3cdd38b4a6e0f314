//! Pods of the whole cluster; this node's endpoints.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use palisade_policy::{label::Labels, model::NamedPort};

use super::{ObjectName, Row, join, join_map};

/// A pod, as the API server tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Namespace and name.
    pub name: ObjectName,
    /// Tells a pod from a later one of the same name.
    pub uid: String,
    /// What its node's runtime knows it by. A static pod is run under a uid of its own, which is
    /// not that of the object that mirrors it.
    pub runtime_uid: String,
    /// Node that it was bound to.
    pub node: String,
    /// Addresses. Empty for a pod that ended: its addresses may be another's by now.
    pub addresses: Vec<IpAddr>,
    /// It shares its node's network: it has no identity of its own.
    pub host_network: bool,
    /// It is being deleted: a newer pod's claim to its addresses wins.
    pub terminating: bool,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Service account.
    pub service_account: String,
    /// Named container ports.
    pub ports: Vec<NamedPort>,
}

impl Row for Pod {
    type Key = ObjectName;
    const TABLE: &'static str = "pods";
    const COLUMNS: &'static [&'static str] =
        &["NAMESPACE", "NAME", "NODE", "ADDRESSES", "SERVICEACCOUNT", "LABELS"];

    fn key(&self) -> ObjectName {
        self.name.clone()
    }

    fn columns(&self) -> Vec<String> {
        vec![
            self.name.namespace.clone(),
            self.name.name.clone(),
            self.node.clone(),
            join(&self.addresses),
            self.service_account.clone(),
            join_map(&self.labels),
        ]
    }
}

/// What a pod's labels come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodIdentity {
    /// The pod.
    pub pod: ObjectName,
    /// Its security labels.
    pub labels: Arc<Labels>,
    /// The number for them, once the cluster has one.
    pub identity: Option<u32>,
}

impl Row for PodIdentity {
    type Key = ObjectName;
    const TABLE: &'static str = "pod-identities";
    const COLUMNS: &'static [&'static str] = &["POD", "IDENTITY", "LABELS"];

    fn key(&self) -> ObjectName {
        self.pod.clone()
    }

    fn columns(&self) -> Vec<String> {
        vec![
            self.pod.to_string(),
            self.identity.map_or_else(|| "-".into(), |id| id.to_string()),
            self.labels.to_string(),
        ]
    }
}

/// A pod's interface on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Row in the kernel's table, and the number that people see.
    pub id: u32,
    /// The pod.
    pub pod: ObjectName,
    /// The pod's uid; empty where the runtime did not say.
    pub uid: String,
    /// Container id.
    pub container_id: String,
    /// Host-side interface.
    pub interface: String,
    /// Its index.
    pub ifindex: u32,
    /// MAC address inside the pod.
    pub mac: [u8; 6],
    /// MAC address of the host-side interface.
    pub host_mac: [u8; 6],
    /// IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
}

impl Endpoint {
    /// Its addresses.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.ipv4.map(IpAddr::V4).into_iter().chain(self.ipv6.map(IpAddr::V6))
    }
}

impl Row for Endpoint {
    type Key = u32;
    const TABLE: &'static str = "endpoints";
    const COLUMNS: &'static [&'static str] =
        &["ENDPOINT", "POD", "INTERFACE", "IFINDEX", "IPV4", "IPV6", "CONTAINER"];

    fn key(&self) -> u32 {
        self.id
    }

    fn columns(&self) -> Vec<String> {
        vec![
            self.id.to_string(),
            self.pod.to_string(),
            self.interface.clone(),
            self.ifindex.to_string(),
            self.ipv4.map_or_else(|| "-".into(), |ip| ip.to_string()),
            self.ipv6.map_or_else(|| "-".into(), |ip| ip.to_string()),
            self.container_id.clone(),
        ]
    }
}
