//! Nodes of the cluster.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Row, join};

/// A node. Two sources tell of nodes: `Node` and `CiliumNode`; each has a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Name.
    pub name: String,
    /// Which object told it.
    pub source: NodeSource,
    /// The object's uid, for owner references.
    pub uid: String,
    /// Addresses that other nodes reach it at.
    pub addresses: Vec<IpAddr>,
    /// Addresses inside its pod networks that are the node's own.
    pub router_addresses: Vec<IpAddr>,
    /// Networks of its pods.
    pub pod_cidrs: Vec<IpNet>,
}

/// Which kind of object told of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NodeSource {
    /// `v1 Node`.
    Node,
    /// `cilium.io/v2 CiliumNode`.
    CiliumNode,
}

impl Node {
    /// All addresses that are the node's own.
    pub fn own_addresses(&self) -> impl Iterator<Item = IpAddr> {
        let routers = self.pod_cidrs.iter().filter_map(router_address);
        self.addresses.iter().chain(&self.router_addresses).copied().chain(routers)
    }

    /// Its end of the overlay: every node finds the same one.
    pub fn tunnel_end(&self) -> Option<IpAddr> {
        let ipv4 = self.addresses.iter().find(|address| address.is_ipv4());
        ipv4.or(self.addresses.first()).copied()
    }

    /// The address of `family` that other nodes reach it at.
    pub fn address_of_family(&self, cidr: &IpNet) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|ip| ip.is_ipv4() == matches!(cidr, IpNet::V4(_)))
    }
}

/// The node's own address in a pod network: the first one after the network's.
pub fn router_address(cidr: &IpNet) -> Option<IpAddr> {
    match cidr {
        IpNet::V4(net) if net.prefix_len() < 31 => {
            Some(IpAddr::V4((u32::from(net.network()) + 1).into()))
        }
        IpNet::V6(net) if net.prefix_len() < 127 => {
            Some(IpAddr::V6((u128::from(net.network()) + 1).into()))
        }
        _ => None,
    }
}

impl Row for Node {
    type Key = String;
    const TABLE: &'static str = "nodes";
    const COLUMNS: &'static [&'static str] = &["NAME", "ADDRESSES", "POD-CIDRS"];

    fn key(&self) -> String {
        self.name.clone()
    }

    fn columns(&self) -> Vec<String> {
        vec![self.name.clone(), join(&self.addresses), join(&self.pod_cidrs)]
    }
}

/// How a packet gets to another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The node is the next hop.
    NextHop,
    /// In an envelope.
    Overlay,
    /// In an envelope where a pod sent it; the node's own packets go as they are.
    OverlayOfPods,
}

/// A route to another node's pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Network of the pods.
    pub destination: IpNet,
    /// Address of their node.
    pub via: IpAddr,
    /// Their node.
    pub node: String,
    /// How.
    pub way: Way,
}

impl Row for Route {
    type Key = IpNet;
    const TABLE: &'static str = "routes";
    const COLUMNS: &'static [&'static str] = &["DESTINATION", "VIA", "NODE"];

    fn key(&self) -> IpNet {
        self.destination
    }

    fn columns(&self) -> Vec<String> {
        vec![self.destination.to_string(), self.via.to_string(), self.node.clone()]
    }
}

/// What the ways to other nodes follow from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// This node, as its own object says; its addresses may change.
    pub own: Option<Node>,
    /// The ways that are wanted.
    pub routes: Vec<Route>,
}
