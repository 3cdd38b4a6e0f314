//! How many questions may be under way at a time.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Of all clients.
const MOST: usize = 4096;
/// Of one client.
const MOST_OF_CLIENT: usize = 256;
/// For clients that have none yet.
const RESERVED: usize = 512;

/// For the log.
pub(super) const TOO_MANY: &str = "dropped: too many questions are under way";

/// Questions under way.
#[derive(Default)]
pub(super) struct Limits(Mutex<UnderWay>);

#[derive(Default)]
struct UnderWay {
    total: usize,
    clients: HashMap<IpAddr, usize>,
}

impl Limits {
    /// One more question of a client, if it may have one more. The fewer are left, the fewer one
    /// client may have: some are always left for those who come later.
    pub(super) fn admit(self: &Arc<Self>, client: IpAddr) -> Option<UnderWayOne> {
        let mut under_way = self.lock();
        let of_client = under_way.clients.get(&client).copied().unwrap_or(0);
        let free = MOST - under_way.total;
        let may = match of_client {
            0 => free > 0,
            some => some < MOST_OF_CLIENT.min(free.saturating_sub(RESERVED) / 2),
        };
        if !may {
            return None;
        }
        under_way.total += 1;
        under_way.clients.insert(client, of_client + 1);
        Some(UnderWayOne { limits: Arc::clone(self), client })
    }

    fn lock(&self) -> MutexGuard<'_, UnderWay> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A question that counts until it is dropped.
pub(super) struct UnderWayOne {
    limits: Arc<Limits>,
    client: IpAddr,
}

impl Drop for UnderWayOne {
    fn drop(&mut self) {
        let mut under_way = self.limits.lock();
        under_way.total -= 1;
        let Some(of_client) = under_way.clients.get_mut(&self.client) else { return };
        *of_client -= 1;
        if *of_client == 0 {
            under_way.clients.remove(&self.client);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(n: u16) -> IpAddr {
        let [high, low] = n.to_be_bytes();
        IpAddr::from([10, 0, high, low])
    }

    #[test]
    fn a_client_gets_its_share_and_gives_it_back() {
        let limits = Arc::new(Limits::default());
        let held: Vec<_> = std::iter::from_fn(|| limits.admit(client(1))).collect();
        assert_eq!(held.len(), MOST_OF_CLIENT);
        assert!(limits.admit(client(2)).is_some());
        drop(held);
        assert!(limits.lock().clients.is_empty());
        assert!(limits.admit(client(1)).is_some());
    }

    #[test]
    fn many_greedy_clients_leave_something() {
        let limits = Arc::new(Limits::default());
        let mut held = Vec::new();
        for n in 0..100 {
            held.extend(std::iter::from_fn(|| limits.admit(client(n))));
        }
        assert!(held.len() <= MOST);
        assert!(limits.admit(client(1000)).is_some());
    }
}
