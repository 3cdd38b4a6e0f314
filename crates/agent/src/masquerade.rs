//! Pods reach what is outside the cluster with their node's address: which one that is.

use std::{net::IpAddr, sync::Arc, time::Duration};

use anyhow::Context;
use palisade_abi::MasqueradeSettings;
use palisade_datapath::{
    Datapath,
    netlink::{Address, Link, Netlink},
};
use tracing::warn;

use crate::{
    reconcile::mirror::address_bytes,
    tables::{TablesReader, nodes::Node},
};

/// How often the addresses are looked at.
const LOOK: Duration = Duration::from_secs(5);

/// An address of the node's may be here too; nothing leaves here.
const LOOPBACK: &str = "lo";

/// This node's part.
pub struct Masquerade {
    datapath: Arc<Datapath>,
    netlink: Netlink,
    tables: TablesReader,
    node: String,
    uplink: String,
}

impl Masquerade {
    /// With the addresses of `uplink`, where the programs are.
    pub fn new(
        datapath: Arc<Datapath>,
        netlink: Netlink,
        tables: TablesReader,
        node: String,
        uplink: String,
    ) -> Self {
        Self { datapath, netlink, tables, node, uplink }
    }

    /// Begins, or goes on with the addresses of now.
    ///
    /// # Errors
    /// What the kernel says, or there is no such interface.
    pub async fn apply(&self) -> anyhow::Result<()> {
        let missing = || format!("there is no interface {}", self.uplink);
        let uplink = self.netlink.link(&self.uplink).await?.with_context(missing)?;
        let mut addresses = self.netlink.addresses().await?;
        addresses.retain(|found| found.ifindex == uplink.ifindex);
        let [ipv4, ipv6] = [false, true].map(|ipv6| self.choose(&addresses, ipv6));
        Ok(self.datapath.set_masquerade(&MasqueradeSettings { ipv4, ipv6, enabled: 1 })?)
    }

    /// The address that other nodes know, if the uplink has it, or else its first one. Without one
    /// nothing leaves.
    fn choose(&self, present: &[Address], ipv6: bool) -> palisade_abi::Address {
        let mut usable = present
            .iter()
            .map(|found| found.address.addr())
            .filter(|ip| ip.is_ipv6() == ipv6 && !is_link_local(ip));
        let node = self.tables.read().node(&self.node).cloned();
        let known = node.and_then(|node| usable.clone().find(|ip| node.addresses.contains(ip)));
        known.or_else(|| usable.next()).map(address_bytes).unwrap_or_default()
    }

    /// Follows the addresses for ever.
    pub async fn keep(self) {
        loop {
            tokio::time::sleep(LOOK).await;
            if let Err(error) = self.apply().await {
                warn!("cannot follow the addresses of {}: {error:#}", self.uplink);
            }
        }
    }
}

fn is_link_local(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// Ends it: pods have their own addresses everywhere.
///
/// # Errors
/// What the kernel says.
pub fn end(datapath: &Datapath) -> anyhow::Result<()> {
    Ok(datapath.set_masquerade(&MasqueradeSettings::default())?)
}

/// The interface that has an address of the node, waited for where there is none yet: until a node
/// that got another address says so, nothing leaves. `tell` is told what it waits for.
pub async fn await_uplink(
    netlink: &Netlink,
    tables: &TablesReader,
    node: &str,
    tell: impl Fn(String),
) -> String {
    loop {
        let known = tables.read().node(node).cloned();
        let found = match known {
            Some(known) => find_uplink(netlink, &known).await,
            None => Ok(None),
        };
        match found {
            Ok(Some(uplink)) => return uplink,
            Ok(None) => tell(format!(
                "node {node}: no interface has one of its addresses; name the one to other nodes \
                 and to the outside with --uplink, or go without: --routing overlay \
                 --masquerade never"
            )),
            Err(error) => tell(format!("cannot look for the uplink: {error:#}")),
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn find_uplink(netlink: &Netlink, node: &Node) -> anyhow::Result<Option<String>> {
    let addresses = netlink.addresses().await?;
    let links = netlink.links().await?;
    let has = |link: &Link| {
        let mut own = addresses.iter().filter(|found| found.ifindex == link.ifindex);
        own.any(|found| node.addresses.contains(&found.address.addr()))
    };
    Ok(links.into_iter().find(|link| link.name != LOOPBACK && has(link)).map(|link| link.name))
}

#[cfg(test)]
mod tests {
    use tokio::{sync::mpsc, time::timeout};

    use super::*;
    use crate::tables::{TablesWriter, nodes::NodeSource};

    #[tokio::test]
    async fn who_waits_for_the_uplink_is_told_what_for() {
        let mut tables = TablesWriter::default();
        let node = Node {
            name: "node1".into(),
            source: NodeSource::Node,
            uid: String::new(),
            addresses: vec!["192.0.2.1".parse().unwrap()],
            router_addresses: Vec::new(),
            pod_cidrs: Vec::new(),
        };
        tables.write().nodes.put(node);
        let (netlink, reader) = (Netlink::current().unwrap(), tables.reader());
        let (sender, mut told) = mpsc::unbounded_channel();
        let tell = move |missing| _ = sender.send(missing);
        let waiting = std::pin::pin!(await_uplink(&netlink, &reader, "node1", tell));
        let told = tokio::select! {
            uplink = waiting => panic!("{uplink} has the address of an example"),
            told = timeout(LOOK, told.recv()) => told.expect("told").unwrap(),
        };
        assert!(told.contains("node1: no interface has one of its addresses"), "{told}");
    }
}
