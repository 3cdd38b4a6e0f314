//! What clients were told, and may therefore reach.

use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

/// Most addresses that are known of one client; a client with more learns anew.
const MOST_OF_CLIENT: usize = 4096;
/// Longer than this nothing is taken for known.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// A time that grows by less is the same: answers of caches come a second sooner or later.
const SAME: Duration = Duration::from_secs(2);

/// What is known of the addresses in an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Knowledge {
    /// All of them are in force, for as long as the answer holds.
    Whole,
    /// All of them are in force, but the answer holds longer.
    Shorter,
    /// All of them were in force, and are unless the agent took them back.
    Expired,
    /// Some of them are new.
    New,
}

/// The addresses in force, by who asked for which name.
#[derive(Default)]
pub(super) struct Known(HashMap<IpAddr, Client>);

/// What one pod knows. An address may be another pod's later.
struct Client {
    endpoint: u32,
    names: HashMap<String, HashMap<IpAddr, Instant>>,
    count: usize,
}

/// A client as it is now.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pod {
    pub address: IpAddr,
    pub endpoint: u32,
}

impl Known {
    pub(super) fn of(
        &self,
        pod: Pod,
        name: &str,
        addresses: &[IpAddr],
        ttl: u32,
        now: Instant,
    ) -> Knowledge {
        let client = self.0.get(&pod.address).filter(|client| client.endpoint == pod.endpoint);
        let Some(known) = client.and_then(|client| client.names.get(name)) else {
            return Knowledge::New;
        };
        let until = addresses.iter().map(|address| known.get(address).copied());
        match until.min().flatten() {
            None => Knowledge::New,
            Some(until) if until <= now => Knowledge::Expired,
            Some(until) if until + SAME < end(now, ttl) => Knowledge::Shorter,
            Some(_) => Knowledge::Whole,
        }
    }

    pub(super) fn put(
        &mut self,
        pod: Pod,
        name: &str,
        addresses: &[IpAddr],
        ttl: u32,
        now: Instant,
    ) {
        let fresh = || Client { endpoint: pod.endpoint, names: HashMap::new(), count: 0 };
        let client = self.0.entry(pod.address).or_insert_with(fresh);
        if client.endpoint != pod.endpoint || client.count + addresses.len() > MOST_OF_CLIENT {
            *client = fresh();
        }
        let known = client.names.entry(name.to_owned()).or_default();
        let before = known.len();
        for address in addresses {
            let until = known.entry(*address).or_insert(now);
            *until = (*until).max(end(now, ttl));
        }
        client.count += known.len() - before;
    }

    /// Forgets the pods that are gone: the next one may have the same address and number, and was
    /// told nothing.
    pub(super) fn retain(&mut self, is_there: impl Fn(Pod) -> bool) {
        self.0.retain(|address, client| {
            is_there(Pod { address: *address, endpoint: client.endpoint })
        });
    }
}

fn end(now: Instant, ttl: u32) -> Instant {
    now + Duration::from_secs(ttl.into()).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: Pod = Pod { address: IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1)), endpoint: 7 };

    fn address(n: u32) -> IpAddr {
        std::net::Ipv4Addr::from(0x5db8_0000 + n).into()
    }

    #[test]
    fn times() {
        let (mut known, now) = (Known::default(), Instant::now());
        let later = |seconds| now + Duration::from_secs(seconds);
        let both = [address(1), address(2)];
        known.put(POD, "x.org", &both[..1], 30, now);
        assert_eq!(known.of(POD, "x.org", &both[..1], 30, now), Knowledge::Whole);
        assert_eq!(known.of(POD, "x.org", &both, 30, now), Knowledge::New);
        assert_eq!(known.of(POD, "y.org", &both[..1], 30, now), Knowledge::New);
        assert_eq!(known.of(POD, "x.org", &both[..1], 20, later(10)), Knowledge::Whole);
        assert_eq!(known.of(POD, "x.org", &both[..1], 30, later(10)), Knowledge::Shorter);
        assert_eq!(known.of(POD, "x.org", &both[..1], 30, later(30)), Knowledge::Expired);
        known.put(POD, "x.org", &both, 60, now);
        assert_eq!(known.of(POD, "x.org", &both, 30, later(29)), Knowledge::Whole);
    }

    #[test]
    fn another_pod_of_the_same_address_knows_nothing() {
        let (mut known, now) = (Known::default(), Instant::now());
        known.put(POD, "x.org", &[address(1)], 30, now);
        let other = Pod { endpoint: 8, ..POD };
        assert_eq!(known.of(other, "x.org", &[address(1)], 30, now), Knowledge::New);
        known.put(other, "y.org", &[address(1)], 30, now);
        assert_eq!(known.of(POD, "x.org", &[address(1)], 30, now), Knowledge::New);
    }

    #[test]
    fn pods_that_are_gone_are_forgotten() {
        let (mut known, now) = (Known::default(), Instant::now());
        let other = Pod { address: IpAddr::from([10, 0, 0, 2]), endpoint: 8 };
        for pod in [POD, other] {
            known.put(pod, "x.org", &[address(1)], 30, now);
        }
        known.retain(|pod| pod.endpoint == POD.endpoint);
        assert_eq!(known.of(POD, "x.org", &[address(1)], 30, now), Knowledge::Whole);
        assert_eq!(known.of(other, "x.org", &[address(1)], 30, now), Knowledge::New);
        assert_eq!(known.0.len(), 1);
    }

    #[test]
    fn bounded() {
        let (mut known, now) = (Known::default(), Instant::now());
        for n in 0..100_000 {
            known.put(POD, &format!("n{n}.org"), &[address(n)], 30, now);
            assert!(known.0[&POD.address].count <= MOST_OF_CLIENT);
        }
        assert_eq!(known.of(POD, "n99999.org", &[address(99_999)], 30, now), Knowledge::Whole);
    }
}
