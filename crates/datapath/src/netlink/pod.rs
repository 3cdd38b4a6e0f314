//! A pod's interface: a veth pair, created silent and configured once its policy is in force.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv6Net};

use super::socket::{News, Socket};
use super::{Link, NetNs, Netlink, NetlinkError, Route, find_link, message, sysctl};

/// The router as pods see it in IPv6; every host side of a veth pair has it.
pub const LINK_LOCAL_ROUTER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// A veth pair to create: both ends down, without addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VethPair {
    /// Name of the node's end.
    pub host: String,
    /// MAC address of the node's end.
    pub host_mac: [u8; 6],
    /// Name of the pod's end.
    pub pod: String,
    /// MAC address of the pod's end.
    pub pod_mac: [u8; 6],
    /// Largest packet of both ends.
    pub mtu: u32,
}

/// One address of a pod and the router it uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodAddress {
    /// The pod's address.
    pub address: IpAddr,
    /// The next hop of its default route.
    pub router: IpAddr,
}

/// The configuration of a pair that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodLink {
    /// The node's end.
    pub host: Link,
    /// MAC address of the node's end.
    pub host_mac: [u8; 6],
    /// Name of the pod's end.
    pub pod: String,
    /// MAC address of the pod's end.
    pub pod_mac: [u8; 6],
    /// The pod's addresses.
    pub addresses: Vec<PodAddress>,
    /// Free text on the node's end, to recognise it by.
    pub alias: String,
}

/// The node's end of a pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostSide {
    /// Its number.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// MAC address of the pod's end.
    pub pod_mac: [u8; 6],
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// Free text on it, to recognise it by.
    pub alias: String,
}

impl PodLink {
    pub(super) fn host_side(&self) -> HostSide {
        HostSide {
            ifindex: self.host.ifindex,
            name: self.host.name.clone(),
            pod_mac: self.pod_mac,
            addresses: self.addresses.iter().map(|pod| pod.address).collect(),
            alias: self.alias.clone(),
        }
    }
}

impl Netlink {
    /// Creates the pair, its far end directly in the pod's namespace.
    pub async fn create_veth(
        &self,
        pair: VethPair,
        pod: &Arc<NetNs>,
    ) -> Result<Link, NetlinkError> {
        let pod = Arc::clone(pod);
        self.run(move |socket| {
            socket.batch(vec![message::create_veth(&pair, &pod)])?;
            find_link(socket, &pair.host)?.ok_or(NetlinkError::NoSuchLink(pair.host))
        })
        .await
    }

    /// Configures both ends, brings them up and waits until packets pass both ways. `self` is the
    /// node's namespace.
    pub async fn configure_pod(&self, link: &PodLink, pod: &Netlink) -> Result<(), NetlinkError> {
        // The node's end first: the moment the pod's end is up, the way back exists.
        self.configure_host_side(link.host_side()).await?;
        pod.configure_pod_side(link.clone()).await?;
        let host = link.host.name.clone();
        self.run(move |_| await_running(&host)).await
    }

    /// Configures the node's end and brings it up; one that was up stays as it is.
    pub async fn configure_host_side(&self, link: HostSide) -> Result<(), NetlinkError> {
        self.run(move |socket| {
            let ifindex = link.ifindex;
            let name = &link.name;
            for (setting, value) in HOST_SETTINGS.into_iter().chain([ACCEPT_LOCAL]) {
                sysctl::set(&setting.replace("{}", name), value)?;
            }
            let mut calls = vec![
                message::link_quiet(ifindex),
                message::link_alias(ifindex, &link.alias),
                message::link_up(ifindex),
            ];
            if link.addresses.iter().any(IpAddr::is_ipv6) {
                calls.push(message::add_address(ifindex, link_local_router_net()));
            }
            for address in &link.addresses {
                calls.push(message::permanent_neighbour(ifindex, *address, link.pod_mac));
                let route = Route::direct(IpNet::from(*address), ifindex);
                calls.push(message::replace_route(&route));
            }
            socket.batch(calls)
        })
        .await
    }

    async fn configure_pod_side(&self, link: PodLink) -> Result<(), NetlinkError> {
        self.run(move |socket| {
            for (setting, value) in POD_SETTINGS {
                sysctl::set(&setting.replace("{}", &link.pod), value)?;
            }
            let lo = find_link(socket, "lo")?.ok_or(NetlinkError::NoSuchLink("lo".into()))?;
            let Some(eth) = find_link(socket, &link.pod)? else {
                return Err(NetlinkError::NoSuchLink(link.pod));
            };
            let mut calls = vec![message::link_quiet(eth.ifindex)];
            if !lo.up {
                calls.push(message::link_up(lo.ifindex));
            }
            for pod in &link.addresses {
                calls.push(message::add_address(eth.ifindex, IpNet::from(pod.address)));
            }
            calls.push(message::link_up(eth.ifindex));
            for pod in &link.addresses {
                calls.push(message::permanent_neighbour(eth.ifindex, pod.router, link.host_mac));
                calls.push(message::replace_route(&default_route(pod, eth.ifindex)));
            }
            socket.batch(calls)?;
            link.addresses.iter().try_for_each(|pod| await_address(pod.address))
        })
        .await
    }
}

pub(super) const HOST_SETTINGS: [(&str, &str); 5] = [
    ("ipv4/conf/{}/rp_filter", "0"),
    ("ipv4/conf/{}/forwarding", "1"),
    ("ipv6/conf/{}/disable_ipv6", "0"),
    ("ipv6/conf/{}/accept_ra", "0"),
    ("ipv6/conf/{}/forwarding", "1"),
];

/// What a pod sends has its own source, or its program drops it: for what goes to the proxy the kernel
/// need not look for a route back as well (`fib_validate_source`, Linux 6.18).
const ACCEPT_LOCAL: (&str, &str) = ("ipv4/conf/{}/accept_local", "1");

const POD_SETTINGS: [(&str, &str); 2] =
    [("ipv6/conf/{}/disable_ipv6", "0"), ("ipv6/conf/{}/accept_ra", "0")];

/// An IPv6 address is reached only once the kernel gets round to adding the local route to it, even
/// without duplicate detection. An IPv4 address is at once.
fn await_address(address: IpAddr) -> Result<(), NetlinkError> {
    if address.is_ipv4() {
        return Ok(());
    }
    let what = format!("wait until {address} can be reached");
    Socket::wait_until(News::Ipv6Routes, &what, |socket| {
        let route = socket.get(&what, message::get_route(address))?;
        Ok(route.as_ref().is_some_and(message::is_local_route))
    })
}

/// The end of a pair that came up first carries packets only once the kernel has noticed the other
/// end, and drops what is sent over it before.
fn await_running(name: &str) -> Result<(), NetlinkError> {
    let what = format!("wait until interface {name} carries packets");
    Socket::wait_until(News::Links, &what, |socket| {
        let link = find_link(socket, name)?.ok_or_else(|| NetlinkError::NoSuchLink(name.into()))?;
        Ok(link.running)
    })
}

fn link_local_router_net() -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(LINK_LOCAL_ROUTER, 64))
}

/// The router is no neighbour by any address of the pod, which has only host prefixes.
fn default_route(pod: &PodAddress, ifindex: u32) -> Route {
    let everywhere = match pod.address {
        IpAddr::V4(_) => IpNet::V4(ipnet::Ipv4Net::default()),
        IpAddr::V6(_) => IpNet::V6(Ipv6Net::default()),
    };
    Route {
        ifindex: Some(ifindex),
        onlink: true,
        source: pod.address.is_ipv4().then_some(pod.address),
        ..Route::via(everywhere, pod.router)
    }
}
