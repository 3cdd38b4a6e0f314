//! What the endpoints of a group learned from DNS.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use crate::l7::{NamePattern, may_learn};

/// Names and the addresses that DNS gave for them.
pub(crate) type Names = BTreeMap<String, BTreeSet<IpAddr>>;

/// The addresses learned for names that the group's rules speak of.
#[derive(Clone, Debug, Default)]
pub(crate) struct Learned {
    patterns: Vec<NamePattern>,
    /// By address: its names, and how many endpoints learned each.
    addresses: BTreeMap<IpAddr, BTreeMap<String, usize>>,
}

impl Learned {
    pub(crate) fn new(patterns: impl IntoIterator<Item = NamePattern>) -> Self {
        let patterns: BTreeSet<NamePattern> = patterns.into_iter().collect();
        Self { patterns: patterns.into_iter().collect(), addresses: BTreeMap::new() }
    }

    pub(crate) fn patterns(&self) -> &[NamePattern] {
        &self.patterns
    }

    /// An endpoint learned a name's address. Whether tables may differ now.
    pub(crate) fn add(&mut self, name: &str, address: IpAddr) -> bool {
        if !may_learn(address) || !self.patterns.iter().any(|pattern| pattern.matches(name)) {
            return false;
        }
        let count = self.addresses.entry(address).or_default().entry(name.to_owned()).or_default();
        *count += 1;
        *count == 1
    }

    /// An endpoint forgets a name's address. Whether tables may differ now.
    pub(crate) fn remove(&mut self, name: &str, address: IpAddr) -> bool {
        let Some(names) = self.addresses.get_mut(&address) else { return false };
        let Some(count) = names.get_mut(name) else { return false };
        *count -= 1;
        if *count > 0 {
            return false;
        }
        names.remove(name);
        if names.is_empty() {
            self.addresses.remove(&address);
        }
        true
    }

    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.keys().copied()
    }

    /// Whether the address belongs to a name that one of the patterns matches.
    pub(crate) fn matches(&self, patterns: &[NamePattern], address: IpAddr) -> bool {
        !patterns.is_empty()
            && self.addresses.get(&address).is_some_and(|names| {
                names.keys().any(|name| patterns.iter().any(|pattern| pattern.matches(name)))
            })
    }
}
