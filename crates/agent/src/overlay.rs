//! The overlay between nodes: its interface with its programs, the routes into it, and the table of
//! who may come out of it.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use anyhow::Context;
use palisade_abi::{OVERLAY, TunnelValue, tunnel_kind};
use palisade_datapath::{
    Datapath, Side,
    netlink::{Netlink, Traveller, Tunnel},
};

use crate::{
    reconcile::mirror::{address_bytes, ipcache_key},
    tables::nodes::{Node, Route, Surroundings, Way},
};

/// What an envelope adds: Ethernet, UDP and VXLAN headers, and an IP header of its family.
pub fn overhead(end: IpAddr) -> u32 {
    let ip = if end.is_ipv4() { 20 } else { 40 };
    14 + 8 + 8 + ip
}

/// This node's end.
pub struct Overlay {
    datapath: Arc<Datapath>,
    netlink: Netlink,
    mtu: u32,
}

impl Overlay {
    /// For packets of up to `mtu` bytes.
    pub fn new(datapath: Arc<Datapath>, netlink: Netlink, mtu: u32) -> Self {
        Self { datapath, netlink, mtu }
    }

    /// Makes everything as it must be, whatever somebody did to it.
    ///
    /// # Errors
    /// This node has no address, or what the kernel says. Nothing comes out of the overlay unjudged
    /// then.
    pub async fn apply(&self, wanted: &Surroundings) -> anyhow::Result<()> {
        let own = wanted.own.as_ref().context("this node has no Node object")?;
        let missing = || format!("node {}: no InternalIP among its addresses", own.name);
        let end = own.tunnel_end().with_context(missing)?;
        let link = self.netlink.make_overlay(self.mtu).await?;
        // A node that cannot be reached from this end cannot come from there either.
        let reachable: Vec<&Route> =
            wanted.routes.iter().filter(|route| route.via.is_ipv4() == end.is_ipv4()).collect();
        let entries: BTreeMap<_, _> = reachable.iter().filter_map(|route| entry(route)).collect();
        self.datapath.set_tunnels(&entries)?;
        if !self.datapath.is_side_attached(OVERLAY, Side::Overlay)
            && let Err(error) = self.datapath.attach(OVERLAY, Side::Overlay)
        {
            self.netlink.set_down(link.ifindex, "palisade: no program judges here").await?;
            return Err(error.into());
        }
        if !link.up {
            self.netlink.set_up(link.ifindex).await.with_context(|| {
                format!("{OVERLAY}: another VXLAN network may hold its UDP port")
            })?;
        }
        let present: HashSet<IpAddr> =
            self.netlink.addresses().await?.iter().map(|found| found.address.addr()).collect();
        let tunnels = reachable.iter().filter_map(|route| tunnel(own, end, route, &present));
        let pods = own.pod_cidrs.clone();
        Ok(self.netlink.set_tunnels(link.ifindex, tunnels.collect(), pods).await?)
    }
}

fn tunnel(own: &Node, end: IpAddr, route: &Route, present: &HashSet<IpAddr>) -> Option<Tunnel> {
    let traveller = match route.way {
        Way::NextHop => return None,
        Way::Overlay => Traveller::Anybody,
        Way::OverlayOfPods => Traveller::Pods,
    };
    let source = own
        .address_of_family(&route.destination)
        .filter(|own| traveller == Traveller::Anybody && present.contains(own));
    let (dst, remote) = (route.destination, route.via);
    Some(Tunnel { dst, remote, local: end, source, traveller })
}

fn entry(route: &Route) -> Option<(palisade_abi::IpcacheKey, TunnelValue)> {
    let kind = match route.way {
        Way::NextHop => return None,
        Way::Overlay => tunnel_kind::PODS,
        Way::OverlayOfPods => tunnel_kind::NODE,
    };
    Some((ipcache_key(route.destination), TunnelValue { node: address_bytes(route.via), kind }))
}

/// Takes away what an agent with an overlay left.
///
/// # Errors
/// What the kernel says.
pub async fn remove(datapath: &Datapath, netlink: &Netlink) -> anyhow::Result<()> {
    netlink.remove_overlay().await?;
    // `from_underlay` may still be at an uplink that nobody named.
    datapath.set_tunnels(&BTreeMap::new())?;
    Ok(datapath.detach(OVERLAY, Side::Overlay)?)
}
