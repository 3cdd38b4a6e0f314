//! The networks that nodes get theirs from (`ipam: cluster-pool`): who installs checks them as the
//! operator does that cuts them.

#[cfg(all(feature = "client", feature = "crd"))]
mod taken;

use std::{fmt, net::IpAddr, str::FromStr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
#[cfg(all(feature = "client", feature = "crd"))]
pub use taken::taken;

/// What is wrong with which setting, and what to write.
#[derive(Debug, thiserror::Error)]
#[error("{setting}: {problem}")]
pub struct Fault {
    /// Its name, such as `pool-ipv4`.
    pub setting: &'static str,
    problem: String,
}

/// A network that is in use for something else than pods.
#[derive(Clone, Debug)]
pub struct Taken {
    /// What for, such as `the network of Services`.
    pub by: String,
    /// Which.
    pub network: IpNet,
}

/// The networks of both families.
#[derive(Clone, Debug)]
pub struct Pools([Pool; 2]);

impl Pools {
    /// Reads networks separated by commas, and the prefix length of a node's part, IPv4 first.
    ///
    /// # Errors
    /// Something is no network, has no room for a node, overlaps another one, or there is none.
    pub fn parse(ipv4: &str, ipv4_mask: u8, ipv6: &str, ipv6_mask: u8) -> Result<Self, Fault> {
        let fault = |setting| move |problem| Fault { setting, problem };
        let pools = Self([
            Pool::parse::<Ipv4Net>(ipv4, ipv4_mask, "10.244.0.0/16").map_err(fault("pool-ipv4"))?,
            Pool::parse::<Ipv6Net>(ipv6, ipv6_mask, "fd00:10:244::/104")
                .map_err(fault("pool-ipv6"))?,
        ]);
        if pools.0.iter().all(|pool| pool.ranges.is_empty()) {
            let problem = "is empty, and so is pool-ipv6: cluster-pool needs one of them, such as \
                           10.244.0.0/16";
            return Err(fault("pool-ipv4")(problem.to_owned()));
        }
        Ok(pools)
    }

    /// One network of each family that there is a pool of, none of which overlaps with `taken`.
    #[must_use]
    pub fn allocate(&self, taken: &[IpNet]) -> Option<Vec<IpNet>> {
        let pools = self.0.iter().filter(|pool| !pool.ranges.is_empty());
        pools.map(|pool| pool.allocate(taken)).collect()
    }

    /// Whether pods could not be told from what has its network already.
    ///
    /// # Errors
    /// They could not: which network, and whose.
    pub fn check(&self, taken: &[Taken]) -> Result<(), Fault> {
        for (pool, setting) in self.0.iter().zip(["pool-ipv4", "pool-ipv6"]) {
            for range in &pool.ranges {
                let Some(found) = taken.iter().find(|it| overlap(&it.network, range)) else {
                    continue;
                };
                let problem = format!("{range} overlaps {found}; choose another network");
                return Err(Fault { setting, problem });
            }
        }
        Ok(())
    }
}

impl fmt::Display for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let network = self.network;
        match network.prefix_len() == network.max_prefix_len() {
            true => write!(f, "{}, {}", network.addr(), self.by),
            false => write!(f, "{network}, {}", self.by),
        }
    }
}

/// Networks of one family, and how large a part each node gets.
#[derive(Clone, Debug)]
struct Pool {
    ranges: Vec<IpNet>,
    mask: u8,
}

impl Pool {
    fn parse<N: FromStr + Into<IpNet>>(
        text: &str,
        mask: u8,
        example: &str,
    ) -> Result<Self, String> {
        let network = |text: &str| {
            let network: Result<N, _> = text.parse();
            network.map(Into::into).map_err(|_| {
                format!("{text:?} is no network of this family; write one like {example}")
            })
        };
        let texts = text.split(',').map(str::trim).filter(|_| !text.trim().is_empty());
        Self::new(texts.map(network).collect::<Result<_, _>>()?, mask)
    }

    /// Checks that every range has room for at least one node.
    fn new(ranges: Vec<IpNet>, mask: u8) -> Result<Self, String> {
        for range in &ranges {
            let (shortest, longest) = (range.prefix_len(), range.max_prefix_len());
            if range.trunc() != *range {
                return Err(format!("{range} has bits behind its prefix; write {}", range.trunc()));
            }
            if !(shortest..=longest).contains(&mask) {
                return Err(format!(
                    "a node's part, /{mask}, does not fit into {range}; give a larger network, or \
                     the mask a length from {shortest} to {longest}"
                ));
            }
        }
        for (index, range) in ranges.iter().enumerate() {
            if let Some(other) = ranges[..index].iter().find(|other| overlap(other, range)) {
                return Err(format!("{other} and {range} overlap; give each network once"));
            }
        }
        Ok(Self { ranges, mask })
    }

    /// The first network that overlaps with none of `taken`.
    fn allocate(&self, taken: &[IpNet]) -> Option<IpNet> {
        // Disjoint and sorted: what lies in a range can be stepped over one by one.
        let taken = IpNet::aggregate(&taken.to_vec());
        self.ranges.iter().find_map(|range| first_free(range, self.mask, &taken))
    }
}

fn overlap(one: &IpNet, other: &IpNet) -> bool {
    one.contains(other) || other.contains(one)
}

fn first_free(range: &IpNet, mask: u8, taken: &[IpNet]) -> Option<IpNet> {
    let max = range.max_prefix_len();
    let last = number(range.broadcast());
    let mut start = number(range.network());
    loop {
        let candidate = network(start, mask, range)?;
        let Some(obstacle) = taken.iter().find(|net| overlap(net, &candidate)) else {
            return Some(candidate);
        };
        // The next multiple of the size behind what is in the way.
        let end = number(obstacle.broadcast()).max(number(candidate.broadcast()));
        let host_bits = u32::from(max - mask);
        let next = (end >> host_bits).checked_add(1)?.checked_shl(host_bits)?;
        if next > last || next <= start {
            return None;
        }
        start = next;
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

fn network(start: u128, mask: u8, family: &IpNet) -> Option<IpNet> {
    match family {
        IpNet::V4(_) => Ipv4Net::new(u32::try_from(start).ok()?.into(), mask).ok().map(IpNet::V4),
        IpNet::V6(_) => Ipv6Net::new(start.into(), mask).ok().map(IpNet::V6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn pool(ranges: &[&str], mask: u8) -> Pool {
        Pool::new(nets(ranges), mask).unwrap()
    }

    fn allocate(pool: &Pool, taken: &[&str]) -> Option<String> {
        pool.allocate(&nets(taken)).map(|net| net.to_string())
    }

    #[test]
    fn the_first_free_network_is_taken() {
        let v4 = pool(&["10.0.0.0/16"], 24);
        assert_eq!(allocate(&v4, &[]).unwrap(), "10.0.0.0/24");
        assert_eq!(allocate(&v4, &["10.0.0.0/24", "10.0.2.0/24"]).unwrap(), "10.0.1.0/24");
        let v6 = pool(&["fd00::/104"], 120);
        assert_eq!(allocate(&v6, &["fd00::/120"]).unwrap(), "fd00::100/120");
    }

    #[test]
    fn larger_smaller_and_foreign_networks_are_stepped_over() {
        let v4 = pool(&["10.0.0.0/16"], 24);
        assert_eq!(allocate(&v4, &["10.0.0.0/20", "10.0.16.7/32"]).unwrap(), "10.0.17.0/24");
        assert_eq!(allocate(&v4, &["192.168.0.0/16", "fd00::/8"]).unwrap(), "10.0.0.0/24");
        assert_eq!(allocate(&v4, &["10.0.0.0/8"]), None);
    }

    #[test]
    fn every_network_is_given_once_until_there_is_none() {
        for (range, mask, count) in
            [("10.0.0.0/22", 24, 4), ("fd00::/118", 120, 4), ("255.255.255.0/24", 26, 4)]
        {
            let pool = pool(&[range], mask);
            let mut taken = Vec::new();
            while let Some(net) = pool.allocate(&taken) {
                assert!(taken.iter().all(|other| !overlap(other, &net)), "{net} in {taken:?}");
                taken.push(net);
            }
            assert_eq!(taken.len(), count, "{range}");
        }
    }

    #[test]
    fn the_second_range_follows_the_first() {
        let v4 = pool(&["10.0.0.0/24", "10.9.0.0/16"], 24);
        assert_eq!(allocate(&v4, &["10.0.0.0/24"]).unwrap(), "10.9.0.0/24");
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_the_remedy() {
        let refused =
            |v4: &str, v6: &str, mask| Pools::parse(v4, mask, v6, mask).unwrap_err().to_string();
        assert!(refused("10.0.0.1/16", "", 24).contains("write 10.0.0.0/16"));
        assert!(refused("10.0.0.0/28", "", 24).contains("/24, does not fit into 10.0.0.0/28"));
        assert!(refused("10.0.0.0/24", "", 16).contains("from 24 to 32"));
        assert!(refused("10.0.0.0/16,10.0.1.0/24", "", 24).contains("overlap"));
        assert!(refused("999.0.0.0/16", "", 24).starts_with("pool-ipv4: \"999.0.0.0/16\" is no"));
        assert!(refused("10.0.0.0/16,", "", 24).contains("\"\" is no network"));
        assert!(refused("fd00::/64", "", 96).contains("like 10.244.0.0/16"));
        assert!(refused("", "fd00::/120", 64).starts_with("pool-ipv6: "));
        assert!(refused("", "", 24).contains("is empty"));
    }

    #[test]
    fn networks_in_use_are_refused_and_their_neighbours_are_not() {
        let pools = Pools::parse("10.0.0.0/16, 10.8.0.0/16", 24, "fd00::/104", 120).unwrap();
        let check = |network: &str| {
            let network = network.parse().unwrap();
            pools.check(&[Taken { by: "an example".into(), network }])
        };
        for free in ["10.1.0.0/16", "10.9.0.0/24", "192.0.2.1/32", "fd01::/64"] {
            check(free).unwrap();
        }
        for (used, says) in [
            ("10.0.0.0/8", "pool-ipv4: 10.0.0.0/16 overlaps 10.0.0.0/8, an example"),
            ("10.8.7.1/32", "pool-ipv4: 10.8.0.0/16 overlaps 10.8.7.1, an example"),
            ("fd00::1:0/112", "pool-ipv6: fd00::/104 overlaps fd00::1:0/112, an example"),
        ] {
            let error = check(used).unwrap_err().to_string();
            assert_eq!(error, format!("{says}; choose another network"));
        }
    }
}
