//! Cutting networks for nodes from larger ones. Pure.

use std::net::IpAddr;

use anyhow::ensure;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Networks of one family, and how large a part each node gets.
#[derive(Clone, Debug)]
pub(crate) struct Pool {
    ranges: Vec<IpNet>,
    mask: u8,
}

impl Pool {
    /// Checks that every range has room for at least one node.
    pub(crate) fn new(ranges: Vec<IpNet>, mask: u8) -> anyhow::Result<Self> {
        for range in &ranges {
            ensure!(
                range.trunc() == *range,
                "{range} has bits behind its prefix; write {}",
                range.trunc()
            );
            ensure!(
                (range.prefix_len()..=range.max_prefix_len()).contains(&mask),
                "a network of /{mask} does not fit into {range}; give the mask a length from {} to \
                 {}",
                range.prefix_len(),
                range.max_prefix_len()
            );
        }
        for (index, range) in ranges.iter().enumerate() {
            if let Some(other) = ranges[..index].iter().find(|other| overlap(other, range)) {
                anyhow::bail!("{other} and {range} overlap; give each network once");
            }
        }
        Ok(Self { ranges, mask })
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The range that an address lies in.
    pub(crate) fn range_of(&self, address: IpAddr) -> Option<&IpNet> {
        self.ranges.iter().find(|range| range.contains(&address))
    }

    /// The first network that overlaps with none of `taken`.
    pub(crate) fn allocate(&self, taken: &[IpNet]) -> Option<IpNet> {
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
            |ranges: &[&str], mask| Pool::new(nets(ranges), mask).unwrap_err().to_string();
        assert!(refused(&["10.0.0.1/16"], 24).contains("write 10.0.0.0/16"));
        assert!(refused(&["10.0.0.0/24"], 16).contains("from 24 to 32"));
        assert!(refused(&["10.0.0.0/16", "10.0.1.0/24"], 24).contains("overlap"));
    }
}
