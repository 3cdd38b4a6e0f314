//! The host side of pods' interfaces, and the programs on it.

use std::{collections::HashSet, sync::Arc};

use palisade_api::client::chain;
use palisade_datapath::{
    Datapath,
    netlink::{HostSide, Netlink},
};
use tokio::task::block_in_place;

use crate::tables::pods::Endpoint;

/// Begins the alias of an interface that was taken down because nothing judges its packets. It
/// tells people why, and a later agent that it may bring the interface up again.
const CLOSED: &str = "palisade closed: ";

/// How an interface is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// There is none of that name and number.
    Gone,
    /// It was taken down by [`Attach::close`].
    Closed,
    /// Any other.
    Left,
}

/// What programs are attached to: the node's interfaces, or in tests nothing.
pub trait Attach: Send + Sync + 'static {
    /// Attaches the pod programs to an interface; repeating it is harmless.
    ///
    /// # Errors
    /// What the kernel says.
    fn attach(&self, interface: &str) -> Result<(), String>;
    /// Removes them.
    ///
    /// # Errors
    /// What the kernel says.
    fn detach(&self, interface: &str) -> Result<(), String>;
    /// Removes what is left of programs whose interfaces are gone.
    ///
    /// # Errors
    /// What the kernel says.
    fn sweep(&self) -> impl Future<Output = Result<(), String>> + Send;
    /// Whether they are there.
    fn is_attached(&self, interface: &str) -> bool;
    /// Whether programs, be they of an agent before, judge what passes the interface.
    fn is_judged(&self, interface: &str) -> bool;
    /// How the interface is.
    ///
    /// # Errors
    /// What the kernel says.
    fn link(&self, endpoint: &Endpoint) -> impl Future<Output = Result<LinkState, String>> + Send;
    /// Takes the interface down: no packet passes it, judged or not.
    ///
    /// # Errors
    /// What the kernel says.
    fn close(&self, endpoint: &Endpoint) -> impl Future<Output = Result<(), String>> + Send;
    /// Brings an interface that was closed into use again.
    ///
    /// # Errors
    /// What the kernel says.
    fn reopen(
        &self,
        endpoint: &Endpoint,
        alias: String,
    ) -> impl Future<Output = Result<(), String>> + Send;
}

/// The node's interfaces.
///
/// Programs are attached one after the other, under a lock and after grace periods of the kernel;
/// the threads that serve others meanwhile are not to wait for that.
pub struct NodeLinks {
    datapath: Arc<Datapath>,
    netlink: Netlink,
}

impl NodeLinks {
    /// The interfaces in the namespace of `netlink`.
    pub fn new(datapath: Arc<Datapath>, netlink: Netlink) -> Self {
        Self { datapath, netlink }
    }
}

impl Attach for NodeLinks {
    fn attach(&self, interface: &str) -> Result<(), String> {
        block_in_place(|| self.datapath.attach_endpoint(interface)).map_err(|error| chain(&error))
    }

    fn detach(&self, interface: &str) -> Result<(), String> {
        block_in_place(|| self.datapath.detach_endpoint(interface)).map_err(|error| chain(&error))
    }

    async fn sweep(&self) -> Result<(), String> {
        let interfaces = self.datapath.pinned_interfaces().map_err(|error| chain(&error))?;
        let links = self.netlink.links().await.map_err(|error| chain(&error))?;
        let present: HashSet<String> = links.into_iter().map(|link| link.name).collect();
        interfaces.difference(&present).try_for_each(|interface| self.detach(interface))
    }

    fn is_attached(&self, interface: &str) -> bool {
        block_in_place(|| self.datapath.is_attached(interface))
    }

    fn is_judged(&self, interface: &str) -> bool {
        block_in_place(|| self.datapath.is_judged(interface))
    }

    async fn link(&self, endpoint: &Endpoint) -> Result<LinkState, String> {
        let link = self.netlink.link(&endpoint.interface).await.map_err(|error| chain(&error))?;
        let Some(link) = link.filter(|link| link.ifindex == endpoint.ifindex) else {
            return Ok(LinkState::Gone);
        };
        let closed = link.alias.is_some_and(|alias| alias.starts_with(CLOSED));
        Ok(if closed { LinkState::Closed } else { LinkState::Left })
    }

    async fn close(&self, endpoint: &Endpoint) -> Result<(), String> {
        let alias = format!("{CLOSED}the programs cannot be attached");
        self.netlink.set_down(endpoint.ifindex, &alias).await.map_err(|error| chain(&error))
    }

    async fn reopen(&self, endpoint: &Endpoint, alias: String) -> Result<(), String> {
        let side = HostSide {
            ifindex: endpoint.ifindex,
            name: endpoint.interface.clone(),
            pod_mac: endpoint.mac,
            addresses: endpoint.addresses().collect(),
            alias,
        };
        self.netlink.configure_host_side(side).await.map_err(|error| chain(&error))
    }
}
