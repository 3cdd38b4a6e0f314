//! Names that pods learned the addresses of.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::Row;

/// What a pod of this node was told by DNS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LearnedNames {
    /// Endpoint.
    pub endpoint: u32,
    /// The container that it was when it learned: numbers of endpoints are used again.
    pub container: String,
    /// Goes up with each change.
    pub generation: u64,
    /// Addresses of each name: lower case, without the trailing dot.
    pub names: BTreeMap<String, BTreeSet<IpAddr>>,
}

impl Row for LearnedNames {
    type Key = u32;
    const TABLE: &'static str = "fqdns";
    const COLUMNS: &'static [&'static str] = &["ENDPOINT", "NAMES"];

    fn key(&self) -> u32 {
        self.endpoint
    }

    fn columns(&self) -> Vec<String> {
        let names = self.names.iter().map(|(name, addresses)| {
            let addresses: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
            format!("{name}={}", addresses.join(","))
        });
        vec![self.endpoint.to_string(), names.collect::<Vec<_>>().join(" ")]
    }
}
