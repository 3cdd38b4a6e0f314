//! Security identities, and the addresses that have them.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use palisade_policy::label::Labels;

use super::Row;

/// A number for a set of labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Number.
    pub id: u32,
    /// Labels.
    pub labels: Arc<Labels>,
}

impl Row for Identity {
    type Key = u32;
    const TABLE: &'static str = "identities";
    const COLUMNS: &'static [&'static str] = &["IDENTITY", "LABELS"];

    fn key(&self) -> u32 {
        self.id
    }

    fn columns(&self) -> Vec<String> {
        vec![self.id.to_string(), self.labels.to_string()]
    }
}

/// What the kernel is to hold of a pod's or node's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressEntry {
    /// The address.
    pub address: IpAddr,
    /// Identity.
    pub identity: u32,
    /// Longest policy prefix that covers the address, or 0.
    pub prefix: u32,
    /// Row of a local endpoint or of the node itself.
    pub row: u32,
    /// Number of the node that it lies on; 0 for this one.
    pub node: u32,
}

impl Row for AddressEntry {
    type Key = IpAddr;
    const TABLE: &'static str = "addresses";
    const COLUMNS: &'static [&'static str] = &["ADDRESS", "IDENTITY", "PREFIX", "ROW", "NODE"];

    fn key(&self) -> IpAddr {
        self.address
    }

    fn columns(&self) -> Vec<String> {
        vec![
            self.address.to_string(),
            self.identity.to_string(),
            self.prefix.to_string(),
            self.row.to_string(),
            self.node.to_string(),
        ]
    }
}

/// What the kernel is to hold of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefixEntry {
    /// The network.
    pub network: IpNet,
    /// Identity of addresses in it that have no entry of their own.
    pub identity: u32,
    /// Longest policy prefix that covers the network, or 0.
    pub prefix: u32,
}

impl Row for PrefixEntry {
    type Key = IpNet;
    const TABLE: &'static str = "ipcache";
    const COLUMNS: &'static [&'static str] = &["NETWORK", "IDENTITY", "PREFIX"];

    fn key(&self) -> IpNet {
        self.network
    }

    fn columns(&self) -> Vec<String> {
        vec![self.network.to_string(), self.identity.to_string(), self.prefix.to_string()]
    }
}
