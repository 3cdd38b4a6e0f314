//! Numbers of the networks that rules name.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use palisade_abi::PREFIX_ID_BIT;

/// Networks and their numbers.
type Numbered = Vec<(IpNet, u32)>;

/// A network that has a number.
#[derive(Clone, Copy, Debug)]
struct Prefix {
    number: u32,
    /// How many places name it; 0: addresses may still refer to it.
    uses: usize,
}

/// Networks and their numbers, which are stable while a network is in use.
#[derive(Debug, Default)]
pub(crate) struct Prefixes {
    by_net: BTreeMap<IpNet, Prefix>,
    by_number: BTreeMap<u32, IpNet>,
    next: u32,
    /// Networks whose use began or ended since the last [`Prefixes::take_changes`], and whether
    /// they were in use then.
    touched: BTreeMap<IpNet, bool>,
}

impl Prefixes {
    pub(crate) fn adopt(&mut self, net: IpNet, number: u32) {
        let index = number & (PREFIX_ID_BIT - 1);
        let known = self.by_net.contains_key(&net) || self.by_number.contains_key(&number);
        if number & !(PREFIX_ID_BIT - 1) != PREFIX_ID_BIT || known {
            return;
        }
        self.next = self.next.max(index + 1);
        self.by_net.insert(net.trunc(), Prefix { number, uses: 0 });
        self.by_number.insert(number, net.trunc());
    }

    pub(crate) fn acquire(&mut self, net: IpNet) {
        let net = net.trunc();
        if let Some(prefix) = self.by_net.get_mut(&net) {
            if prefix.uses == 0 {
                self.touched.entry(net).or_insert(false);
            }
            prefix.uses += 1;
            return;
        }
        // Numbers come round after 2^24 networks; those still in use then keep theirs.
        let mut number = PREFIX_ID_BIT | (self.next & (PREFIX_ID_BIT - 1));
        while self.by_number.contains_key(&number) {
            number = PREFIX_ID_BIT | (number.wrapping_add(1) & (PREFIX_ID_BIT - 1));
        }
        self.next = (number & (PREFIX_ID_BIT - 1)) + 1;
        self.by_net.insert(net, Prefix { number, uses: 1 });
        self.by_number.insert(number, net);
        self.touched.entry(net).or_insert(false);
    }

    pub(crate) fn release(&mut self, net: IpNet) {
        let net = net.trunc();
        let Some(prefix) = self.by_net.get_mut(&net) else { return };
        prefix.uses -= 1;
        if prefix.uses == 0 {
            self.touched.entry(net).or_insert(true);
        }
    }

    /// Networks that came into use, and those that went out of use.
    pub(crate) fn take_changes(&mut self) -> (Numbered, Numbered) {
        let (mut added, mut removed) = (Vec::new(), Vec::new());
        for (net, was_used) in std::mem::take(&mut self.touched) {
            let Some(prefix) = self.by_net.get(&net) else { continue };
            match (was_used, prefix.uses > 0) {
                (false, true) => added.push((net, prefix.number)),
                (true, false) => removed.push((net, prefix.number)),
                _ => {}
            }
        }
        (added, removed)
    }

    /// Forgets the networks that are not in use; returns them.
    pub(crate) fn forget_unused(&mut self) -> Vec<(IpNet, u32)> {
        let unused: Vec<(IpNet, u32)> = self
            .by_net
            .iter()
            .filter(|(net, prefix)| prefix.uses == 0 && !self.touched.contains_key(net))
            .map(|(net, prefix)| (*net, prefix.number))
            .collect();
        for (net, number) in &unused {
            self.by_net.remove(net);
            self.by_number.remove(number);
        }
        unused
    }

    /// Networks in use.
    pub(crate) fn used(&self) -> impl Iterator<Item = (IpNet, u32)> + '_ {
        self.by_net.iter().filter(|(_, p)| p.uses > 0).map(|(net, p)| (*net, p.number))
    }

    /// Networks inside another one (itself included) that addresses may refer to.
    pub(crate) fn inside(&self, outer: IpNet) -> impl Iterator<Item = (IpNet, u32)> + '_ {
        let first = match outer.network() {
            IpAddr::V4(address) => IpNet::V4(Ipv4Net::new_assert(address, 0)),
            IpAddr::V6(address) => IpNet::V6(Ipv6Net::new_assert(address, 0)),
        };
        let last = match outer.broadcast() {
            IpAddr::V4(address) => IpNet::V4(Ipv4Net::from(address)),
            IpAddr::V6(address) => IpNet::V6(Ipv6Net::from(address)),
        };
        self.by_net
            .range(first..=last)
            .filter(move |(net, _)| outer.contains(*net))
            .map(|(net, prefix)| (*net, prefix.number))
    }

    /// Number of a network that addresses may refer to.
    pub(crate) fn number(&self, net: IpNet) -> Option<u32> {
        self.by_net.get(&net.trunc()).map(|prefix| prefix.number)
    }

    /// The network with a number.
    pub(crate) fn net(&self, number: u32) -> Option<IpNet> {
        self.by_number.get(&number).copied()
    }

    /// Number of the longest network in use around an address, or 0.
    pub(crate) fn longest(&self, address: IpAddr) -> u32 {
        let host = IpNet::from(address);
        (0..=host.prefix_len())
            .rev()
            .find_map(|len| {
                let net = with_len(address, len)?;
                self.by_net.get(&net).filter(|prefix| prefix.uses > 0)
            })
            .map_or(0, |prefix| prefix.number)
    }
}

fn with_len(address: IpAddr, len: u8) -> Option<IpNet> {
    IpNet::new(address, len).ok().map(|net| net.trunc())
}

/// Whether a network lies among the IPv6 addresses that stand for IPv4 ones
/// (`::ffff:0:0/96`). No packet has such an address, and the kernel's tables write IPv4 so.
#[must_use]
pub fn is_ipv4_mapped(net: IpNet) -> bool {
    let mapped = Ipv4Addr::UNSPECIFIED.to_ipv6_mapped();
    match net {
        IpNet::V4(_) => false,
        IpNet::V6(net) => net.prefix_len() >= 96 && high(net.network()) == high(mapped),
    }
}

fn high(address: Ipv6Addr) -> u128 {
    u128::from(address) >> 32
}
