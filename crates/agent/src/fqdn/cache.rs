//! The names that pods asked for, with the addresses that they were given. Pure: time is an
//! argument, in seconds.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use crate::tables::fqdns::LearnedNames;

/// An address is kept this long at least, whatever the server said: there has to be time to
/// connect.
pub const MIN_TTL: u64 = 30;
/// An address is kept this much longer than the server said: an answer is used a little after it
/// was heard, and a first packet may have to be sent again.
pub const GRACE: u64 = 10;
/// An address is kept this long at most.
pub const MAX_TTL: u64 = 7 * 24 * 3600;
/// Most addresses of one name; beyond, those go whose time ends first, and that the pod was not told
/// just now.
pub const MOST_OF_NAME: usize = 1000;
/// Most addresses of one pod; beyond, the names that it asked for longest ago are forgotten.
pub const MOST_OF_POD: usize = 4096;
/// Most addresses of all pods. The fewer are left, the fewer one pod may have.
pub const MOST: usize = 65_536;

/// A pod's interface. The number may be another pod's later; with the container it may not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Number of the endpoint.
    pub endpoint: u32,
    /// Container id.
    pub container: String,
}

/// What all pods learned.
#[derive(Debug, Default)]
pub struct Cache {
    pods: BTreeMap<u32, Pod>,
    /// Addresses over all pods.
    total: usize,
    /// Goes up with each use of a name, and with each change.
    clock: u64,
}

#[derive(Debug)]
struct Pod {
    container: String,
    names: HashMap<String, Name>,
    /// The names by [`Name::used`].
    order: BTreeMap<u64, String>,
    count: usize,
    /// When its names or their addresses changed last, by [`Cache::clock`].
    generation: u64,
}

#[derive(Debug, Default)]
struct Name {
    /// When it was asked for last, by [`Cache::clock`].
    used: u64,
    /// When each address expires.
    addresses: BTreeMap<IpAddr, u64>,
}

impl Name {
    /// Takes in what was told; whether anything of it is new.
    fn learn(&mut self, told: &BTreeSet<IpAddr>, expiry: u64) -> bool {
        let mut new = false;
        for address in told {
            let until = self.addresses.entry(*address).or_insert_with(|| {
                new = true;
                expiry
            });
            *until = (*until).max(expiry);
        }
        self.shrink(told);
        new
    }

    /// Forgets what is too much.
    fn shrink(&mut self, told: &BTreeSet<IpAddr>) {
        let excess = self.addresses.len().saturating_sub(MOST_OF_NAME);
        if excess == 0 {
            return;
        }
        let all = self.addresses.iter();
        let mut going: Vec<_> = all.map(|(ip, until)| (told.contains(ip), *until, *ip)).collect();
        going.sort_unstable();
        for (_, _, address) in going.into_iter().take(excess) {
            self.addresses.remove(&address);
        }
    }
}

impl Pod {
    fn remove(&mut self, name: &str) -> usize {
        let Some(name) = self.names.remove(name) else { return 0 };
        self.order.remove(&name.used);
        self.count -= name.addresses.len();
        name.addresses.len()
    }

    fn longest_unused(&self, but: &str) -> Option<String> {
        self.order.values().find(|name| *name != but).cloned()
    }
}

/// When an address with this TTL expires.
#[must_use]
pub fn expiry(now: u64, ttl: u32) -> u64 {
    now + u64::from(ttl).clamp(MIN_TTL, MAX_TTL) + GRACE
}

impl Cache {
    /// Takes in what a pod was told, with the time at which that expires. Returns whether the
    /// pod's addresses changed.
    pub fn learn(
        &mut self,
        owner: &Owner,
        name: &str,
        addresses: impl IntoIterator<Item = IpAddr>,
        expiry: u64,
    ) -> bool {
        if self.pods.get(&owner.endpoint).is_some_and(|pod| pod.container != owner.container) {
            self.forget(owner.endpoint);
        }
        self.clock += 1;
        let pod = self.pods.entry(owner.endpoint).or_insert_with(|| Pod {
            container: owner.container.clone(),
            names: HashMap::new(),
            order: BTreeMap::new(),
            count: 0,
            generation: self.clock,
        });
        let entry = pod.names.entry(name.to_owned()).or_default();
        pod.order.remove(&entry.used);
        pod.order.insert(self.clock, name.to_owned());
        entry.used = self.clock;
        let before = entry.addresses.len();
        let mut changed = entry.learn(&addresses.into_iter().collect(), expiry);
        // What is told takes the place of others: it never gets less.
        let added = entry.addresses.len() - before;
        pod.count += added;
        self.total += added;
        changed |= self.shrink(owner.endpoint, name);
        if changed && let Some(pod) = self.pods.get_mut(&owner.endpoint) {
            pod.generation = self.clock;
        }
        changed
    }

    /// Forgets names of a pod that has too many addresses; whether it had. The name that it asks
    /// for now stays.
    fn shrink(&mut self, endpoint: u32, current: &str) -> bool {
        let Some(pod) = self.pods.get_mut(&endpoint) else { return false };
        let mut shrunk = false;
        loop {
            let others = self.total - pod.count;
            let most = MOST_OF_POD.min(MOST.saturating_sub(others) / 2);
            if pod.count <= most {
                return shrunk;
            }
            let Some(oldest) = pod.longest_unused(current) else { break };
            self.total -= pod.remove(&oldest);
            shrunk = true;
        }
        // Nothing but the name itself is left, and even that is too much.
        let others = self.total - pod.count;
        if others + pod.count > MOST {
            self.total -= pod.remove(current);
        }
        true
    }

    /// Whether a pod's addresses of a name are known, all of them: there may be no room.
    #[must_use]
    pub fn holds(&self, endpoint: u32, name: &str, addresses: &[IpAddr]) -> bool {
        let name = self.pods.get(&endpoint).and_then(|pod| pod.names.get(name));
        name.is_some_and(|name| addresses.iter().all(|one| name.addresses.contains_key(one)))
    }

    /// Forgets a pod.
    pub fn forget(&mut self, endpoint: u32) {
        if let Some(pod) = self.pods.remove(&endpoint) {
            self.total -= pod.count;
        }
    }

    /// The pods that have names.
    pub fn endpoints(&self) -> impl Iterator<Item = u32> {
        self.pods.keys().copied()
    }

    /// The container that learned an endpoint's names.
    #[must_use]
    pub fn container(&self, endpoint: u32) -> Option<&String> {
        self.pods.get(&endpoint).map(|pod| &pod.container)
    }

    /// What expired: endpoints and addresses.
    #[must_use]
    pub fn expired(&self, now: u64) -> BTreeSet<(u32, IpAddr)> {
        let of = |pod: &'_ Pod| {
            let all = pod.names.values().flat_map(|name| &name.addresses);
            all.filter(|(_, expiry)| **expiry <= now).map(|(ip, _)| *ip).collect::<Vec<_>>()
        };
        self.pods.iter().flat_map(|(id, pod)| of(pod).into_iter().map(|ip| (*id, ip))).collect()
    }

    /// Forgets what expired, but for what is in use. Returns the endpoints that changed.
    pub fn expire(&mut self, now: u64, in_use: &BTreeSet<(u32, IpAddr)>) -> BTreeSet<u32> {
        let mut changed = BTreeSet::new();
        self.clock += 1;
        for (id, pod) in &mut self.pods {
            let mut removed = 0;
            for name in pod.names.values_mut() {
                let before = name.addresses.len();
                name.addresses.retain(|ip, expiry| *expiry > now || in_use.contains(&(*id, *ip)));
                removed += before - name.addresses.len();
            }
            if removed > 0 {
                pod.names.retain(|_, name| !name.addresses.is_empty());
                pod.order.retain(|_, name| pod.names.contains_key(name));
                pod.count -= removed;
                self.total -= removed;
                pod.generation = self.clock;
                changed.insert(*id);
            }
        }
        changed
    }

    /// What a pod learned, as the row that the policies are resolved with.
    #[must_use]
    pub fn row(&self, endpoint: u32) -> Option<LearnedNames> {
        let pod = self.pods.get(&endpoint)?;
        let names = pod.names.iter();
        let names =
            names.map(|(name, known)| (name.clone(), known.addresses.keys().copied().collect()));
        Some(LearnedNames {
            endpoint,
            container: pod.container.clone(),
            generation: pod.generation,
            names: names.collect(),
        })
    }

    /// Everything: whose, which name, which address, and when it expires.
    pub fn entries(&self) -> impl Iterator<Item = (Owner, &str, IpAddr, u64)> {
        self.pods.iter().flat_map(|(id, pod)| {
            let owner = Owner { endpoint: *id, container: pod.container.clone() };
            pod.names.iter().flat_map(move |(name, known)| {
                let owner = owner.clone();
                let addresses = known.addresses.iter();
                addresses.map(move |(ip, expiry)| (owner.clone(), name.as_str(), *ip, *expiry))
            })
        })
    }

    /// Addresses over all pods.
    #[must_use]
    pub fn len(&self) -> usize {
        self.total
    }

    /// Whether nothing was learned.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.total == 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn owner(endpoint: u32) -> Owner {
        Owner { endpoint, container: format!("c{endpoint}") }
    }

    fn ip(n: u32) -> IpAddr {
        std::net::Ipv4Addr::from(0x5db8_0000 + n).into()
    }

    fn addresses(cache: &Cache, endpoint: u32, name: &str) -> usize {
        cache.row(endpoint).map_or(0, |row| row.names.get(name).map_or(0, BTreeSet::len))
    }

    #[test]
    fn times_have_a_floor_a_grace_and_a_ceiling() {
        assert_eq!(expiry(100, 0), 100 + MIN_TTL + GRACE);
        assert_eq!(expiry(100, 1), 100 + MIN_TTL + GRACE);
        assert_eq!(expiry(100, 300), 100 + 300 + GRACE);
        assert_eq!(expiry(100, u32::MAX), 100 + MAX_TTL + GRACE);
    }

    #[test]
    fn what_is_known_is_no_change() {
        let mut cache = Cache::default();
        assert!(cache.learn(&owner(2), "x.org", [ip(1), ip(2)], 50));
        let generation = cache.row(2).unwrap().generation;
        assert!(!cache.learn(&owner(2), "x.org", [ip(2)], 90));
        assert_eq!(cache.row(2).unwrap().generation, generation);
        assert!(cache.learn(&owner(2), "y.org", [ip(2)], 90));
        assert!(cache.row(2).unwrap().generation > generation);
    }

    #[test]
    fn a_shorter_answer_takes_nothing_back() {
        let mut cache = Cache::default();
        cache.learn(&owner(2), "x.org", [ip(1)], 90);
        cache.learn(&owner(2), "x.org", [ip(1)], 50);
        assert!(cache.expired(60).is_empty());
    }

    #[test]
    fn what_expired_goes_unless_it_is_in_use() {
        let mut cache = Cache::default();
        cache.learn(&owner(2), "x.org", [ip(1), ip(2)], 50);
        cache.learn(&owner(3), "x.org", [ip(1)], 50);
        assert!(cache.expired(49).is_empty());
        assert_eq!(cache.expire(49, &BTreeSet::new()), BTreeSet::new());
        assert_eq!(cache.expired(50), BTreeSet::from([(2, ip(1)), (2, ip(2)), (3, ip(1))]));
        // A connection of another pod keeps nothing alive here.
        let changed = cache.expire(50, &BTreeSet::from([(2, ip(1))]));
        assert_eq!(changed, BTreeSet::from([2, 3]));
        assert_eq!((addresses(&cache, 2, "x.org"), addresses(&cache, 3, "x.org")), (1, 0));
        assert_eq!(cache.expire(60, &BTreeSet::new()), BTreeSet::from([2]));
        assert!(cache.is_empty());
    }

    #[test]
    fn another_container_begins_with_nothing() {
        let mut cache = Cache::default();
        cache.learn(&owner(2), "x.org", [ip(1)], 50);
        let other = Owner { container: "other".into(), ..owner(2) };
        assert!(cache.learn(&other, "y.org", [ip(2)], 50));
        let row = cache.row(2).unwrap();
        assert_eq!((row.container.as_str(), row.names.len()), ("other", 1));
        assert_eq!(cache.len(), 1);
    }

    #[test]
    fn five_thousand_addresses_of_a_name() {
        let mut cache = Cache::default();
        cache.learn(&owner(2), "x.org", (0..5000).map(ip), 50);
        assert_eq!(addresses(&cache, 2, "x.org"), MOST_OF_NAME);
    }

    #[test]
    fn what_is_told_makes_room_for_itself() {
        let mut cache = Cache::default();
        cache.learn(&owner(2), "x.org", (0..1000).map(ip), 50);
        cache.learn(&owner(2), "x.org", (1..1000).map(ip), 60);
        // Though its own time ends first.
        assert!(cache.learn(&owner(2), "x.org", [ip(1000), ip(1)], 40));
        assert!(cache.holds(2, "x.org", &[ip(1000), ip(1)]) && !cache.holds(2, "x.org", &[ip(0)]));
        assert_eq!((addresses(&cache, 2, "x.org"), cache.len()), (MOST_OF_NAME, MOST_OF_NAME));
    }

    #[test]
    fn what_has_no_room_is_not_held() {
        let mut cache = Cache::default();
        let mut endpoint = 0;
        while cache.len() + 1 < MOST {
            cache.learn(
                &owner(endpoint),
                "x.org",
                (0..1000.min((MOST - cache.len()) as u32 - 1)).map(ip),
                50,
            );
            endpoint += 1;
        }
        cache.learn(&owner(endpoint), "x.org", [ip(1), ip(2)], 50);
        assert!(!cache.holds(endpoint, "x.org", &[ip(1), ip(2)]));
        cache.learn(&owner(endpoint), "x.org", [ip(1)], 50);
        assert!(cache.holds(endpoint, "x.org", &[ip(1)]));
    }

    #[test]
    fn a_pod_that_asks_for_everything_forgets_its_own_oldest() {
        let mut cache = Cache::default();
        cache.learn(&owner(3), "other.org", [ip(1)], 50);
        for n in 0..100_000 {
            cache.learn(&owner(2), &format!("n{n}.org"), [ip(n)], 50);
            cache.learn(&owner(2), "often.org", [ip(7)], 50);
        }
        assert_eq!(cache.len(), MOST_OF_POD + 1);
        assert_eq!(addresses(&cache, 2, "n99999.org"), 1);
        assert_eq!(addresses(&cache, 2, "often.org"), 1);
        assert_eq!(addresses(&cache, 2, "n50000.org"), 0);
        assert_eq!(addresses(&cache, 3, "other.org"), 1);
    }

    #[test]
    fn many_greedy_pods_leave_something_for_others() {
        let mut cache = Cache::default();
        cache.learn(&owner(1000), "first.org", [ip(1)], 50);
        for endpoint in 0..100 {
            for n in 0..8 {
                cache.learn(&owner(endpoint), &format!("n{n}.org"), (0..1000).map(ip), 50);
            }
        }
        assert!(cache.len() <= MOST);
        assert!(cache.learn(&owner(1001), "late.org", [ip(1)], 50));
        assert_eq!(addresses(&cache, 1001, "late.org"), 1);
        assert_eq!(addresses(&cache, 1000, "first.org"), 1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Whatever happens, the counts are those of what is there, and the bounds hold.
        #[test]
        fn counts(
            steps in prop::collection::vec((0u8..4, 0u32..3, 0u32..4, 0u32..1200, 1u64..20), 1..30)
        ) {
            let mut cache = Cache::default();
            for (now, (what, endpoint, name, count, lifetime)) in (0u64..).zip(steps) {
                match what {
                    0 => cache.forget(endpoint),
                    1 => _ = cache.expire(now, &BTreeSet::from([(endpoint, ip(count))])),
                    _ => _ = cache.learn(
                        &owner(endpoint), &format!("n{name}"), (0..count).map(ip), now + lifetime,
                    ),
                }
                prop_assert_eq!(cache.len(), cache.entries().count());
                for endpoint in cache.endpoints() {
                    let row = cache.row(endpoint).unwrap();
                    let count: usize = row.names.values().map(BTreeSet::len).sum();
                    prop_assert!(count <= MOST_OF_POD);
                    let pod = &cache.pods[&endpoint];
                    prop_assert_eq!(pod.order.len(), pod.names.len());
                    prop_assert!(row.names.values().all(|of| of.len() <= MOST_OF_NAME));
                }
            }
        }
    }
}
