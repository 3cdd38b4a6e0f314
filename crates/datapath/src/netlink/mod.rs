//! Interfaces, addresses, routes and neighbours of the node and of pods.
//!
//! Every operation opens a socket in its namespace, sends all its requests in one system call
//! and reads the acknowledgements: the kernel does the work in tens of microseconds, and no
//! state survives that could go stale.

mod message;
mod namespace;
mod node;
mod overlay;
mod pod;
mod socket;
mod steer;
mod sysctl;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::thread;

use ipnet::IpNet;
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;
use tokio::sync::oneshot;

pub use namespace::{NamespaceError, NetNs, NetNsId};
pub use node::SettingChange;
pub use overlay::{Traveller, Tunnel};
pub use pod::{HostSide, LINK_LOCAL_ROUTER, PodAddress, PodLink, VethPair};
use socket::Socket;

/// What went wrong in the kernel or on the way to it.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The kernel refused.
    #[error("cannot {what}: {errno}")]
    Kernel {
        /// What was asked for.
        what: String,
        /// The kernel's answer.
        errno: Errno,
    },
    /// The kernel's tables kept changing while they were listed.
    #[error("cannot {what}: the list changed in each of {attempts} attempts")]
    Unsettled {
        /// What was asked for.
        what: String,
        /// How often.
        attempts: usize,
    },
    /// The kernel's answer could not be read.
    #[error("cannot {what}: malformed answer: {reason}")]
    Malformed {
        /// What was asked for.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The interface does not exist.
    #[error("interface {0} does not exist")]
    NoSuchLink(String),
    /// No thread could be started or the namespace could not be entered.
    #[error("cannot enter the network namespace: {0}")]
    Enter(#[source] io::Error),
    /// A kernel setting could not be written.
    #[error("cannot set {path}: {source}")]
    Sysctl {
        /// The setting's file.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The namespace is no namespace, or gone.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
}

impl NetlinkError {
    fn kernel(what: impl Into<String>, errno: Errno) -> Self {
        Self::Kernel { what: what.into(), errno }
    }

    /// The thing that was to be created exists already.
    pub fn is_exists(&self) -> bool {
        matches!(self, Self::Kernel { errno: Errno::EXIST, .. })
    }
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// Its Ethernet address, if it has one.
    pub mac: Option<[u8; 6]>,
    /// Its largest packet.
    pub mtu: u32,
    /// Free text on it.
    pub alias: Option<String>,
    /// Brought up by the administrator.
    pub up: bool,
    /// Its other end or cable is up as well, and the kernel sends over it. Until that follows, a
    /// moment later, it drops what is sent.
    pub running: bool,
}

/// An address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Address {
    /// The interface.
    pub ifindex: u32,
    /// The address with its prefix.
    pub address: IpNet,
}

/// A unicast route of the main table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Route {
    /// Where it leads.
    pub dst: IpNet,
    /// The next hop.
    pub gateway: Option<IpAddr>,
    /// The interface.
    pub ifindex: Option<u32>,
    /// The preferred source address.
    pub source: Option<IpAddr>,
    /// The next hop is reachable though no route says so.
    pub onlink: bool,
    /// Palisade made it: set in lists; every route that is added gets it.
    pub ours: bool,
}

impl Route {
    /// A route to `dst` through `gateway`.
    pub fn via(dst: IpNet, gateway: IpAddr) -> Self {
        Self { gateway: Some(gateway), ..Self::new(dst) }
    }

    /// A route to `dst`, directly on an interface.
    pub fn direct(dst: IpNet, ifindex: u32) -> Self {
        Self { ifindex: Some(ifindex), ..Self::new(dst) }
    }

    fn new(dst: IpNet) -> Self {
        Self { dst, gateway: None, ifindex: None, source: None, onlink: false, ours: true }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.dst)?;
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        if let Some(ifindex) = self.ifindex {
            write!(f, " on interface {ifindex}")?;
        }
        Ok(())
    }
}

/// The kernel's network configuration in one network namespace.
#[derive(Debug, Clone)]
pub struct Netlink {
    netns: Arc<NetNs>,
    id: NetNsId,
}

impl Netlink {
    /// The namespace of the calling thread: the node's, for the agent.
    pub fn current() -> Result<Self, NetlinkError> {
        Self::of(Arc::new(NetNs::current()?))
    }

    /// The namespace of a pod.
    pub fn of(netns: Arc<NetNs>) -> Result<Self, NetlinkError> {
        let id = netns.id().map_err(NetlinkError::Enter)?;
        Ok(Self { netns, id })
    }

    /// The namespace.
    pub fn netns(&self) -> &Arc<NetNs> {
        &self.netns
    }

    /// Which namespace it is.
    pub fn id(&self) -> NetNsId {
        self.id
    }

    /// All interfaces.
    pub async fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        self.run(|socket| {
            let list = socket.dump("list interfaces", &message::all_links())?;
            Ok(list.iter().filter_map(new_link).collect())
        })
        .await
    }

    /// The interface of that name.
    pub async fn link(&self, name: &str) -> Result<Option<Link>, NetlinkError> {
        let name = name.to_owned();
        self.run(move |socket| find_link(socket, &name)).await
    }

    /// Deletes an interface; false if there was none.
    pub async fn delete_link(&self, name: &str) -> Result<bool, NetlinkError> {
        let name = name.to_owned();
        let deleted = self.run(move |socket| socket.batch(vec![message::delete_link(&name)])).await;
        match deleted {
            Ok(()) => Ok(true),
            Err(NetlinkError::Kernel { errno: Errno::NODEV, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Brings an interface up.
    pub async fn set_up(&self, ifindex: u32) -> Result<(), NetlinkError> {
        self.run(move |socket| socket.batch(vec![message::link_up(ifindex)])).await
    }

    /// Takes an interface down and says on it why: nothing passes any more. Its addresses and
    /// routes go with that.
    pub async fn set_down(&self, ifindex: u32, alias: &str) -> Result<(), NetlinkError> {
        let calls = vec![message::link_down(ifindex), message::link_alias(ifindex, alias)];
        self.run(move |socket| socket.batch(calls)).await
    }

    /// All addresses of all interfaces.
    pub async fn addresses(&self) -> Result<Vec<Address>, NetlinkError> {
        self.run(|socket| {
            let list = socket.dump("list addresses", &message::all_addresses())?;
            Ok(list.iter().filter_map(new_address).collect())
        })
        .await
    }

    /// Adds an address without duplicate detection; one that is there stays.
    pub async fn add_address(&self, ifindex: u32, address: IpNet) -> Result<(), NetlinkError> {
        self.run(move |socket| socket.batch(vec![message::add_address(ifindex, address)])).await
    }

    /// Gives the loopback interface the node's router addresses and brings it up.
    pub async fn add_router_addresses(&self, routers: &[IpAddr]) -> Result<(), NetlinkError> {
        let routers: Vec<IpNet> = routers.iter().copied().map(IpNet::from).collect();
        self.run(move |socket| {
            let lo = find_link(socket, "lo")?.ok_or(NetlinkError::NoSuchLink("lo".into()))?;
            let mut calls = vec![message::link_up(lo.ifindex)];
            calls.extend(routers.iter().map(|router| message::add_address(lo.ifindex, *router)));
            socket.batch(calls)
        })
        .await
    }

    /// The unicast routes of the main table, both families.
    pub async fn routes(&self) -> Result<Vec<Route>, NetlinkError> {
        self.run(|socket| {
            let mut routes = Vec::new();
            for family in [AddressFamily::Inet, AddressFamily::Inet6] {
                let list = socket.dump("list routes", &message::all_routes(family))?;
                routes.extend(list.iter().filter_map(new_route));
            }
            Ok(routes)
        })
        .await
    }

    /// Adds routes or replaces those to the same destinations.
    pub async fn replace_routes(&self, routes: &[Route]) -> Result<(), NetlinkError> {
        self.batch(routes.iter().map(message::replace_route).collect()).await
    }

    /// Removes routes; missing ones are fine.
    pub async fn delete_routes(&self, routes: &[Route]) -> Result<(), NetlinkError> {
        self.batch(routes.iter().map(message::delete_route).collect()).await
    }

    async fn batch(&self, calls: Vec<socket::Call>) -> Result<(), NetlinkError> {
        /// So many acknowledgements surely fit into the receive buffer.
        const BATCH: usize = 128;

        if calls.is_empty() {
            return Ok(());
        }
        self.run(move |socket| {
            let mut calls = calls.into_iter().peekable();
            while calls.peek().is_some() {
                socket.batch(calls.by_ref().take(BATCH).collect())?;
            }
            Ok(())
        })
        .await
    }

    /// Runs `work` with a fresh socket on a thread inside the namespace.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Socket) -> Result<T, NetlinkError> + Send + 'static,
    ) -> Result<T, NetlinkError> {
        let netns = Arc::clone(&self.netns);
        let (sender, receiver) = oneshot::channel();
        thread::Builder::new()
            .name("netlink".into())
            .spawn(move || {
                let result = netns
                    .enter()
                    .map_err(NetlinkError::Enter)
                    .and_then(|()| work(&mut Socket::open()?));
                // Nobody waits any more if the caller gave up.
                let _ = sender.send(result);
            })
            .map_err(NetlinkError::Enter)?;
        receiver.await.unwrap_or_else(|_| {
            Err(NetlinkError::Enter(io::Error::other("the thread in the namespace died")))
        })
    }
}

fn find_link(socket: &mut Socket, name: &str) -> Result<Option<Link>, NetlinkError> {
    let found = socket.get(&format!("find interface {name}"), message::get_link(name))?;
    Ok(found.as_ref().and_then(new_link))
}

fn new_link(message: &RouteNetlinkMessage) -> Option<Link> {
    match message {
        RouteNetlinkMessage::NewLink(link) => message::to_link(link),
        _ => None,
    }
}

fn new_address(message: &RouteNetlinkMessage) -> Option<Address> {
    match message {
        RouteNetlinkMessage::NewAddress(address) => message::to_address(address),
        _ => None,
    }
}

fn new_route(message: &RouteNetlinkMessage) -> Option<Route> {
    match message {
        RouteNetlinkMessage::NewRoute(route) => message::to_route(route),
        _ => None,
    }
}
