//! Networks of the cluster and the routes between its nodes.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use palisade_abi::identity as number;

use super::{Dirty, Resolver, both};
use crate::tables::{
    Tables,
    identities::PrefixEntry,
    nodes::{Node, NodeSource, Route, Way},
};

impl Resolver {
    /// This node, as nobody but the cluster's administrators can write it.
    pub fn own_node(&self, tables: &Tables) -> Option<Node> {
        tables.nodes.get(&self.scope.node).map(|node| (**node).clone())
    }

    /// Takes over the addresses of nodes.
    pub(super) fn note_nodes(&mut self, tables: &mut Tables, dirty: &mut Dirty) {
        let mut deltas = tables.nodes.take_changes();
        deltas.extend(tables.cilium_nodes.take_changes());
        if deltas.is_empty() {
            return;
        }
        dirty.nodes = true;
        for node in deltas.iter().flat_map(both) {
            dirty.addresses.extend(node.own_addresses());
            let claims = tables.cilium_nodes.get(&node.name);
            dirty.addresses.extend(claims.into_iter().flat_map(|claims| claims.own_addresses()));
        }
        self.node_addresses.clear();
        let (own, others): (Vec<_>, Vec<_>) =
            tables.all_nodes().partition(|node| node.name == self.scope.node);
        // What this node itself is may do more than any other: its own `CiliumNode` is this
        // agent's writing, and whoever can edit that must not be able to name a pod the host.
        let own = own.into_iter().filter(|node| node.source == NodeSource::Node);
        for node in own.chain(others) {
            for address in node.own_addresses().filter(|address| may_claim(tables, node, address)) {
                self.node_addresses.entry(address).or_insert_with(|| node.name.clone());
            }
        }
    }
}

/// A `CiliumNode` is its agent's writing, and comes late where the node got other addresses: it adds
/// nothing to what the node's own object says but addresses in the node's pod networks.
fn may_claim(tables: &Tables, node: &Node, address: &IpAddr) -> bool {
    if node.source == NodeSource::Node {
        return true;
    }
    tables.nodes.get(&node.name).is_none_or(|told| {
        told.addresses.contains(address) || told.pod_cidrs.iter().any(|net| net.contains(address))
    })
}

/// One route for each network of another node's pods, over the node's address of that family.
pub(super) fn routes(tables: &Tables, own: &str) -> Vec<Route> {
    let mine: Vec<IpNet> =
        tables.node_rows(own).flat_map(|node| node.pod_cidrs.iter().copied()).collect();
    let mut routes: BTreeMap<IpNet, Route> = BTreeMap::new();
    for node in tables.all_nodes().filter(|node| node.name != own) {
        for cidr in &node.pod_cidrs {
            let overlaps = mine.iter().any(|net| net.contains(cidr) || cidr.contains(net));
            if overlaps || cidr.prefix_len() == 0 {
                continue;
            }
            if let Some(via) = via(tables, node, cidr) {
                let route = Route {
                    destination: cidr.trunc(),
                    via,
                    node: node.name.clone(),
                    way: Way::NextHop,
                };
                routes.entry(route.destination).or_insert(route);
            }
        }
    }
    routes.into_values().collect()
}

/// The ways through the overlay, to other nodes' pods and, for pods, to those nodes. As these say
/// too who may come out of it, only the nodes' own objects count, which nobody else may write.
pub(super) fn overlay_routes(tables: &Tables, own: &str) -> Vec<Route> {
    let (mine, others): (Vec<_>, Vec<_>) = tables.nodes.rows().partition(|node| node.name == own);
    let is_mine = |network: &IpNet| {
        let pods = mine.iter().flat_map(|node| node.pod_cidrs.iter().copied());
        let addresses = mine.iter().flat_map(|node| node.addresses.iter().copied());
        let mut own = pods.chain(addresses.map(IpNet::from));
        network.prefix_len() == 0 || own.any(|own| own.contains(network) || network.contains(&own))
    };
    let mut routes: BTreeMap<IpNet, Route> = BTreeMap::new();
    for node in others {
        let Some(via) = node.tunnel_end() else { continue };
        let pods = node.pod_cidrs.iter().map(|cidr| (cidr.trunc(), Way::Overlay));
        let addresses = node.addresses.iter().map(|ip| (IpNet::from(*ip), Way::OverlayOfPods));
        for (destination, way) in pods.chain(addresses).filter(|(network, _)| !is_mine(network)) {
            let route = Route { destination, via, node: node.name.clone(), way };
            routes.entry(destination).or_insert(route);
        }
    }
    routes.into_values().collect()
}

fn via(tables: &Tables, node: &Node, cidr: &IpNet) -> Option<IpAddr> {
    tables.node_rows(&node.name).find_map(|row| row.address_of_family(cidr))
}

/// The whole address space: the world, but for the cluster's own pod networks, cut where
/// policies name networks.
pub(super) fn prefixes(
    tables: &Tables,
    policy: impl Iterator<Item = (IpNet, u32)>,
) -> Vec<PrefixEntry> {
    let policy: BTreeMap<IpNet, u32> = policy.map(|(net, id)| (net.trunc(), id)).collect();
    let pods: Vec<IpNet> = tables
        .all_nodes()
        .flat_map(|node| node.pod_cidrs.iter().map(IpNet::trunc))
        .filter(|cidr| cidr.prefix_len() > 0)
        .collect();
    let world = [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())];
    let mut entries: BTreeMap<IpNet, PrefixEntry> = BTreeMap::new();
    for network in world.into_iter().chain(pods.iter().copied()).chain(policy.keys().copied()) {
        let identity = if pods.iter().any(|cidr| cidr.contains(&network)) {
            number::UNKNOWN
        } else if matches!(network, IpNet::V4(_)) {
            number::WORLD_IPV4
        } else {
            number::WORLD_IPV6
        };
        let prefix = longest_covering(&policy, network);
        entries.insert(network, PrefixEntry { network, identity, prefix });
    }
    entries.into_values().collect()
}

fn longest_covering(policy: &BTreeMap<IpNet, u32>, network: IpNet) -> u32 {
    let mut candidate = Some(network);
    while let Some(net) = candidate {
        if let Some(id) = policy.get(&net) {
            return *id;
        }
        candidate = net.supernet();
    }
    0
}
