//! Which pod addresses of this node are free. Pure: no I/O, no clock.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::cni::Addresses;

/// So many released addresses per range are remembered in order of release. Larger ranges are
/// so large that the cursor is far away before one of the forgotten comes up again.
const REMEMBERED_RELEASES: usize = 1 << 16;

/// Why there is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IpamError {
    /// Every address is taken.
    #[error(
        "all {capacity} pod addresses of {range} are in use; delete pods from this node or give \
         it a larger pod CIDR in Node.spec.podCIDRs"
    )]
    Exhausted {
        /// The range.
        range: IpNet,
        /// How many addresses for pods it has.
        capacity: u128,
    },
    /// The node has no pod CIDR of any family.
    #[error("the node has no pod CIDR: Node.spec.podCIDRs is empty")]
    NoRange,
    /// Two ranges of one family.
    #[error("the node has two pod CIDRs of one family, {first} and {second}: one is the limit")]
    TwoRanges {
        /// The one.
        first: IpNet,
        /// The other.
        second: IpNet,
    },
    /// A range without room for a router and one pod.
    #[error("pod CIDR {0} is too small: it has no room for a router and a pod")]
    TooSmall(IpNet),
    /// An address to restore belongs to another pod already.
    #[error("address {0} is in use by two pods")]
    Duplicate(IpAddr),
}

/// The pod addresses of one node: one of each family that the node has, handed out in turn, so
/// that a released address comes back as late as possible.
#[derive(Debug, Clone)]
pub struct Ipam {
    v4: Option<Pool<Ipv4Addr>>,
    v6: Option<Pool<Ipv6Addr>>,
}

impl Ipam {
    /// All addresses of the node's pod CIDRs are free.
    pub fn new(ranges: &[IpNet]) -> Result<Self, IpamError> {
        let mut ipam = Self { v4: None, v6: None };
        for &range in ranges {
            let taken = match range {
                IpNet::V4(net) => ipam.v4.replace(Pool::new(net)?).map(|pool| pool.range),
                IpNet::V6(net) => ipam.v6.replace(Pool::new(net)?).map(|pool| pool.range),
            };
            if let Some(first) = taken {
                return Err(IpamError::TwoRanges { first, second: range });
            }
        }
        if ipam.v4.is_none() && ipam.v6.is_none() {
            return Err(IpamError::NoRange);
        }
        Ok(ipam)
    }

    /// The node's router addresses: the first of each range.
    pub fn routers(&self) -> Vec<IpAddr> {
        let v4 = self.v4.as_ref().map(|pool| IpAddr::V4(pool.router));
        let v6 = self.v6.as_ref().map(|pool| IpAddr::V6(pool.router));
        v4.into_iter().chain(v6).collect()
    }

    /// One free address of each family.
    pub fn allocate(&mut self) -> Result<Addresses, IpamError> {
        let ipv4 = self.v4.as_mut().map(Pool::allocate).transpose()?;
        let ipv6 = match self.v6.as_mut().map(Pool::allocate).transpose() {
            Ok(ipv6) => ipv6,
            Err(error) => {
                self.release(&Addresses { ipv4, ipv6: None });
                return Err(error);
            }
        };
        Ok(Addresses { ipv4, ipv6 })
    }

    /// Marks addresses as used that a pod has already. Addresses outside the ranges stay with
    /// their pod and cannot collide with new ones.
    pub fn restore(&mut self, addresses: &Addresses) -> Result<(), IpamError> {
        if let (Some(pool), Some(v4)) = (&mut self.v4, addresses.ipv4) {
            pool.restore(v4).map_err(|()| IpamError::Duplicate(v4.into()))?;
        }
        if let (Some(pool), Some(v6)) = (&mut self.v6, addresses.ipv6)
            && pool.restore(v6).is_err()
        {
            self.release(&Addresses { ipv4: addresses.ipv4, ipv6: None });
            return Err(IpamError::Duplicate(v6.into()));
        }
        Ok(())
    }

    /// So many addresses further than where the search goes on.
    pub fn ahead(&self, count: u32) -> Addresses {
        Addresses {
            ipv4: self.v4.as_ref().map(|pool| pool.ahead(count)),
            ipv6: self.v6.as_ref().map(|pool| pool.ahead(count)),
        }
    }

    /// Goes on at a mark that an earlier allocator set ahead, once all that are in use are restored.
    pub fn go_on_at(&mut self, mark: &Addresses) {
        if let (Some(pool), Some(v4)) = (&mut self.v4, mark.ipv4) {
            pool.go_on_at(v4);
        }
        if let (Some(pool), Some(v6)) = (&mut self.v6, mark.ipv6) {
            pool.go_on_at(v6);
        }
    }

    /// Gives addresses back.
    pub fn release(&mut self, addresses: &Addresses) {
        if let (Some(pool), Some(v4)) = (&mut self.v4, addresses.ipv4) {
            pool.release(v4);
        }
        if let (Some(pool), Some(v6)) = (&mut self.v6, addresses.ipv6) {
            pool.release(v6);
        }
    }

    /// Would [`allocate`](Self::allocate) find addresses?
    pub fn check_free(&self) -> Result<(), IpamError> {
        self.v4.as_ref().map(Pool::check_free).transpose()?;
        self.v6.as_ref().map(Pool::check_free).transpose()?;
        Ok(())
    }

    /// Addresses in use and addresses for pods, of each family.
    pub fn usage(&self) -> Vec<(usize, u128)> {
        let v4 = self.v4.as_ref().map(|pool| (pool.used.len(), pool.capacity()));
        let v6 = self.v6.as_ref().map(|pool| (pool.used.len(), pool.capacity()));
        v4.into_iter().chain(v6).collect()
    }

    /// How many pods have addresses.
    pub fn used(&self) -> usize {
        let v4 = self.v4.as_ref().map_or(0, |pool| pool.used.len());
        let v6 = self.v6.as_ref().map_or(0, |pool| pool.used.len());
        v4.max(v6)
    }
}

/// The addresses of one range between the router and the end.
#[derive(Debug, Clone)]
struct Pool<A> {
    range: IpNet,
    router: A,
    /// First and last address for pods.
    first: u128,
    last: u128,
    /// Where the search for an address goes on.
    next: u128,
    used: HashSet<A>,
    /// When each released address was released, and the addresses in that order. An entry of
    /// the queue whose number is not the map's is out of date.
    released: HashMap<A, u64>,
    oldest: VecDeque<(A, u64)>,
    releases: u64,
}

trait Family: Copy + Eq + Hash {
    type Net: Into<IpNet> + Copy;
    fn bounds(net: Self::Net) -> (u128, u128);
    fn number(self) -> u128;
    fn from_number(number: u128) -> Self;
}

impl Family for Ipv4Addr {
    type Net = Ipv4Net;

    /// Without the network's own address and its broadcast address.
    fn bounds(net: Ipv4Net) -> (u128, u128) {
        let (first, last) = (net.network().number(), net.broadcast().number());
        (first + 1, last.saturating_sub(1))
    }

    fn number(self) -> u128 {
        u128::from(self.to_bits())
    }

    fn from_number(number: u128) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "numbers come from IPv4 ranges")]
        Self::from_bits(number as u32)
    }
}

impl Family for Ipv6Addr {
    type Net = Ipv6Net;

    /// Without the anycast address of all routers. IPv6 has no broadcast.
    fn bounds(net: Ipv6Net) -> (u128, u128) {
        (net.network().to_bits().saturating_add(1), net.broadcast().to_bits())
    }

    fn number(self) -> u128 {
        self.to_bits()
    }

    fn from_number(number: u128) -> Self {
        Self::from_bits(number)
    }
}

impl<A: Family> Pool<A> {
    fn new(net: A::Net) -> Result<Self, IpamError> {
        let range = net.into();
        let (router, last) = A::bounds(net);
        if last <= router {
            return Err(IpamError::TooSmall(range));
        }
        let first = router + 1;
        Ok(Self {
            range,
            router: A::from_number(router),
            first,
            last,
            next: first,
            used: HashSet::new(),
            released: HashMap::new(),
            oldest: VecDeque::new(),
            releases: 0,
        })
    }

    fn capacity(&self) -> u128 {
        self.last - self.first + 1
    }

    fn check_free(&self) -> Result<(), IpamError> {
        if (self.used.len() as u128) < self.capacity() {
            return Ok(());
        }
        Err(IpamError::Exhausted { range: self.range, capacity: self.capacity() })
    }

    fn allocate(&mut self) -> Result<A, IpamError> {
        self.check_free()?;
        let address = match self.never_used() {
            Some(address) => address,
            None => self.oldest_released()?,
        };
        self.used.insert(address);
        self.released.remove(&address);
        self.next = self.after(address);
        Ok(address)
    }

    /// The next address after the cursor that is neither used nor remembered as released.
    fn never_used(&self) -> Option<A> {
        let known = (self.used.len() + self.released.len()) as u128;
        if known >= self.capacity() {
            return None;
        }
        let mut address = A::from_number(self.next);
        while self.used.contains(&address) || self.released.contains_key(&address) {
            address = A::from_number(self.after(address));
        }
        Some(address)
    }

    /// Number of the address that follows one of the pool's.
    fn after(&self, address: A) -> u128 {
        if address.number() == self.last { self.first } else { address.number() + 1 }
    }

    fn has(&self, address: A) -> bool {
        (self.first..=self.last).contains(&address.number())
    }

    fn oldest_released(&mut self) -> Result<A, IpamError> {
        while let Some((address, number)) = self.oldest.pop_front() {
            if self.released.get(&address) == Some(&number) {
                return Ok(address);
            }
        }
        Err(IpamError::Exhausted { range: self.range, capacity: self.capacity() })
    }

    fn restore(&mut self, address: A) -> Result<(), ()> {
        if !self.has(address) {
            return Ok(());
        }
        if !self.used.insert(address) {
            return Err(());
        }
        self.released.remove(&address);
        // The history of releases is lost: what follows the used addresses was most likely released,
        // or never used, the longest ago.
        if address.number() >= self.next {
            self.next = self.after(address);
        }
        Ok(())
    }

    fn ahead(&self, count: u32) -> A {
        A::from_number(self.first + (self.next - self.first + u128::from(count)) % self.capacity())
    }

    fn go_on_at(&mut self, mark: A) {
        if self.has(mark) {
            self.next = mark.number();
        }
    }

    fn release(&mut self, address: A) {
        if !self.used.remove(&address) {
            return;
        }
        self.releases += 1;
        self.released.insert(address, self.releases);
        self.oldest.push_back((address, self.releases));
        while self.released.len() > REMEMBERED_RELEASES
            || self.oldest.len() > 2 * REMEMBERED_RELEASES
        {
            let Some((address, number)) = self.oldest.pop_front() else { return };
            if self.released.get(&address) == Some(&number) {
                self.released.remove(&address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ipam(ranges: &[&str]) -> Ipam {
        let ranges: Vec<IpNet> = ranges.iter().map(|r| r.parse().expect("range")).collect();
        Ipam::new(&ranges).expect("ipam")
    }

    fn v4(text: &str) -> Addresses {
        Addresses { ipv4: Some(text.parse().expect("address")), ipv6: None }
    }

    #[test]
    fn pairs_start_after_the_router() {
        let mut ipam = ipam(&["10.244.3.0/24", "fd44:0:0:3::/64"]);
        let routers: Vec<IpAddr> =
            ["10.244.3.1", "fd44:0:0:3::1"].iter().map(|a| a.parse().expect("address")).collect();
        assert_eq!(ipam.routers(), routers);
        let pair = ipam.allocate().expect("free");
        assert_eq!(pair.ipv4, Some(Ipv4Addr::new(10, 244, 3, 2)));
        assert_eq!(pair.ipv6, Some("fd44:0:0:3::2".parse().expect("address")));
        assert_eq!(ipam.used(), 1);
    }

    #[test]
    fn special_addresses_are_never_given_and_exhaustion_says_what_to_do() {
        let mut ipam = ipam(&["10.0.0.0/29"]);
        let all: Vec<_> = (0..5).map(|_| ipam.allocate().expect("free")).collect();
        let expected: Vec<_> = (2..=6).map(|n| v4(&format!("10.0.0.{n}"))).collect();
        assert_eq!(all, expected);
        let error = ipam.allocate().expect_err("full");
        assert_eq!(ipam.check_free(), Err(error.clone()));
        assert!(error.to_string().contains("all 5 pod addresses of 10.0.0.0/29"), "{error}");
    }

    #[test]
    fn a_released_address_comes_back_last() {
        let mut ipam = ipam(&["10.0.0.0/29"]);
        let [a, b] = [(); 2].map(|()| ipam.allocate().expect("free"));
        ipam.release(&b);
        ipam.release(&a);
        let next: Vec<_> = (0..5).map(|_| ipam.allocate().expect("free")).collect();
        assert_eq!(&next[3..], &[b, a], "never used addresses first, then the oldest release");
    }

    #[test]
    fn releasing_twice_does_not_free_twice() {
        let mut ipam = ipam(&["10.0.0.0/29"]);
        let a = ipam.allocate().expect("free");
        ipam.release(&a);
        ipam.release(&a);
        let mut all: Vec<_> = (0..5).map(|_| ipam.allocate().expect("free")).collect();
        assert!(ipam.allocate().is_err());
        all.dedup();
        assert_eq!(all.len(), 5);
    }

    #[test]
    fn restored_addresses_are_not_given_again() {
        let mut ipam = ipam(&["10.0.0.0/29"]);
        ipam.restore(&v4("10.0.0.4")).expect("free");
        ipam.restore(&v4("192.0.2.1")).expect("foreign addresses are left alone");
        assert_eq!(
            ipam.restore(&v4("10.0.0.4")),
            Err(IpamError::Duplicate(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 4))))
        );
        let given: Vec<_> = (0..4).map(|_| ipam.allocate().expect("free")).collect();
        assert_eq!(given[0], v4("10.0.0.5"));
        assert!(!given.contains(&v4("10.0.0.4")) && ipam.allocate().is_err());
    }

    #[test]
    fn a_full_family_does_not_leak_the_other() {
        let mut ipam = ipam(&["10.0.0.0/24", "fd00::/126"]);
        assert!(ipam.allocate().is_ok() && ipam.allocate().is_ok());
        assert!(ipam.allocate().is_err());
        assert_eq!(ipam.used(), 2);
    }

    #[test]
    fn wrong_ranges_are_refused() {
        let net = |text: &str| text.parse::<IpNet>().expect("range");
        assert_eq!(Ipam::new(&[]).err(), Some(IpamError::NoRange));
        for small in ["10.0.0.0/31", "10.0.0.0/32", "10.0.0.0/30", "fd00::/127"] {
            let result = Ipam::new(&[net(small)]);
            assert_eq!(result.is_err(), small != "10.0.0.0/30", "{small}");
        }
        assert!(Ipam::new(&[net("10.0.0.0/24"), net("10.0.1.0/24")]).is_err());
    }

    #[test]
    fn churn_over_a_small_range_never_duplicates() {
        let mut ipam = ipam(&["10.0.0.0/26", "fd00::/64"]);
        let mut held: VecDeque<Addresses> = VecDeque::new();
        let mut seed = 7u32;
        for _ in 0..20_000 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if seed >> 31 == 0 && held.len() < 61 {
                let new = ipam.allocate().expect("free");
                assert!(!held.contains(&new));
                held.push_back(new);
            } else if let Some(old) = held.pop_front() {
                ipam.release(&old);
            }
        }
        assert_eq!(ipam.used(), held.len());
    }
}
