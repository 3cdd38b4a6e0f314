//! The overlay's interface and the routes into it. The envelope's addresses are the route's: the
//! interface itself knows no other node, and neither do its neighbour tables.

use std::collections::HashSet;
use std::net::IpAddr;

use ipnet::IpNet;
use palisade_abi::OVERLAY;
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;

use super::pod::HOST_SETTINGS;
use super::{Link, Netlink, NetlinkError, find_link, message, sysctl};

/// Routing table of what only pods send through the overlay: packets to the addresses of other
/// nodes, which are those of the envelopes too.
pub(super) const TABLE: u32 = 14_241;
/// After the proxy's rule, before the main table.
const PRIORITY: u32 = 110;

/// Who takes a way through the overlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Traveller {
    /// Pods and the node.
    Anybody,
    /// Only pods.
    Pods,
}

/// A route through the overlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tunnel {
    /// Where it leads.
    pub dst: IpNet,
    /// The other end.
    pub remote: IpAddr,
    /// This end, of the same family.
    pub local: IpAddr,
    /// What the node itself sends from.
    pub source: Option<IpAddr>,
    /// Who takes it.
    pub traveller: Traveller,
}

impl Tunnel {
    pub(super) fn table(&self) -> u32 {
        match self.traveller {
            Traveller::Anybody => message::TABLE_MAIN,
            Traveller::Pods => TABLE,
        }
    }
}

impl Netlink {
    /// Makes the overlay's interface, down, unless there is one as it must be, up or down.
    pub async fn make_overlay(&self, mtu: u32) -> Result<Link, NetlinkError> {
        self.run(move |socket| {
            let what = format!("find interface {OVERLAY}");
            let found = socket.get(&what, message::get_link(OVERLAY))?;
            if found.as_ref().is_some_and(|found| !message::is_overlay(found)) {
                socket.batch(vec![message::delete_link(OVERLAY)])?;
            }
            if !found.as_ref().is_some_and(message::is_overlay) {
                socket.batch(vec![message::create_overlay(OVERLAY, mtu)])?;
            }
            for (setting, value) in HOST_SETTINGS {
                sysctl::set(&setting.replace("{}", OVERLAY), value)?;
            }
            let missing = || NetlinkError::NoSuchLink(OVERLAY.into());
            let link = find_link(socket, OVERLAY)?.ok_or_else(missing)?;
            if !link.up {
                socket.batch(vec![message::link_quiet(link.ifindex)])?;
            }
            if link.mtu != mtu {
                socket.batch(vec![message::link_mtu(link.ifindex, mtu)])?;
            }
            Ok(link)
        })
        .await
    }

    /// Makes the routes into the overlay exactly these, and `pods` the networks whose packets take
    /// the ways of pods.
    pub async fn set_tunnels(
        &self,
        ifindex: u32,
        tunnels: Vec<Tunnel>,
        pods: Vec<IpNet>,
    ) -> Result<(), NetlinkError> {
        self.run(move |socket| {
            let mut found = HashSet::new();
            for family in [AddressFamily::Inet, AddressFamily::Inet6] {
                let list = socket.dump("list routes", &message::all_routes(family))?;
                found.extend(list.iter().filter_map(|route| message::to_tunnel(route, ifindex)));
            }
            let wanted: HashSet<Tunnel> = tunnels.into_iter().collect();
            let stale = found.iter().filter(|tunnel| {
                !wanted.iter().any(|new| (new.dst, new.table()) == (tunnel.dst, tunnel.table()))
            });
            let mut calls: Vec<_> =
                stale.map(|tunnel| message::delete_tunnel(tunnel, ifindex)).collect();
            let missing = wanted.difference(&found);
            calls.extend(missing.map(|tunnel| message::replace_tunnel(tunnel, ifindex)));
            calls.extend(pods.iter().map(|net| message::source_rule(*net, TABLE, PRIORITY)));
            // So many acknowledgements surely fit into the receive buffer.
            let mut calls = calls.into_iter().peekable();
            while calls.peek().is_some() {
                socket.batch(calls.by_ref().take(128).collect())?;
            }
            Ok(())
        })
        .await
    }

    /// Removes the overlay's interface, its routes and its rules.
    pub async fn remove_overlay(&self) -> Result<(), NetlinkError> {
        self.run(|socket| {
            let mut call = message::delete_link(OVERLAY);
            call.ignore = &[Errno::NODEV];
            let mut calls = vec![call];
            for family in [AddressFamily::Inet, AddressFamily::Inet6] {
                let rules = socket.dump("list rules", &message::all_rules(family))?;
                let ours = rules.into_iter().filter_map(|rule| match rule {
                    RouteNetlinkMessage::NewRule(rule) => message::delete_rule_of(rule, TABLE),
                    _ => None,
                });
                calls.extend(ours);
            }
            socket.batch(calls)
        })
        .await
    }
}
