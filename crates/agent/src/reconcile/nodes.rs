//! The ways to other nodes.

use std::collections::BTreeMap;

use ipnet::IpNet;
use palisade_datapath::netlink::{Netlink, NetlinkError, Route as KernelRoute};

use crate::{
    overlay::Overlay,
    tables::nodes::{Route, Surroundings, Way},
};

/// Keeps the ways to other nodes as they are wanted.
pub struct Ways {
    netlink: Netlink,
    overlay: Option<Overlay>,
}

impl Ways {
    /// Without an overlay, in the namespace of `netlink`.
    pub fn native(netlink: Netlink) -> Self {
        Self { netlink, overlay: None }
    }

    /// With one.
    pub fn overlay(netlink: Netlink, overlay: Overlay) -> Self {
        Self { netlink, overlay: Some(overlay) }
    }

    /// Adds the ways that are wanted, and removes those of ours that are not.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn apply(&self, wanted: &Surroundings) -> anyhow::Result<()> {
        if let Some(overlay) = &self.overlay {
            overlay.apply(wanted).await?;
        }
        let next_hops = wanted.routes.iter().filter(|route| route.way == Way::NextHop);
        Ok(self.set_next_hops(next_hops).await?)
    }

    async fn set_next_hops(
        &self,
        wanted: impl Iterator<Item = &Route>,
    ) -> Result<(), NetlinkError> {
        let wanted: BTreeMap<IpNet, KernelRoute> = wanted
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
