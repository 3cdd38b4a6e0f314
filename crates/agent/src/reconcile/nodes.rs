//! Routes to other nodes' pods, and what the node itself needs.

use std::collections::BTreeMap;

use ipnet::IpNet;
use palisade_datapath::netlink::{Netlink, NetlinkError, Route as KernelRoute};

use crate::tables::nodes::Route;

/// Keeps the node's routes as they are wanted.
pub struct RouteKeeper {
    netlink: Netlink,
}

impl RouteKeeper {
    /// Works in the namespace of `netlink`.
    pub fn new(netlink: Netlink) -> Self {
        Self { netlink }
    }

    /// Adds the routes that are wanted, and removes the gateway routes of ours that are not.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn apply(&self, wanted: &[Route]) -> Result<(), NetlinkError> {
        let wanted: BTreeMap<IpNet, KernelRoute> = wanted
            .iter()
            .map(|route| (route.destination, KernelRoute::via(route.destination, route.via)))
            .collect();
        let found = self.netlink.routes().await?;
        let ours = found.iter().filter(|route| route.ours && route.gateway.is_some());
        let stale: Vec<KernelRoute> =
            ours.clone().filter(|route| !wanted.contains_key(&route.dst)).copied().collect();
        let missing: Vec<KernelRoute> = wanted
            .values()
            .filter(|route| {
                !ours.clone().any(|known| known.dst == route.dst && known.gateway == route.gateway)
            })
            .copied()
            .collect();
        self.netlink.replace_routes(&missing).await?;
        self.netlink.delete_routes(&stale).await
    }
}
