//! What there is so many of, and how many of them one client may have.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

/// A client may have no more than this share of those that are left: a few greedy ones do not leave
/// the others without.
const CLIENT_SHARE: usize = 4;

/// How many there are, and who has them.
pub(crate) struct Shares {
    most: usize,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    total: usize,
    clients: HashMap<IpAddr, usize>,
}

impl Shares {
    pub(crate) fn new(most: usize) -> Self {
        Self { most, taken: Mutex::default() }
    }

    /// One more for a client, if it may have one more.
    pub(crate) fn admit(self: &Arc<Self>, client: IpAddr) -> Option<Share> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let of_client = taken.clients.get(&client).copied().unwrap_or(0);
        let free = self.most.saturating_sub(taken.total);
        if of_client * CLIENT_SHARE >= free {
            return None;
        }
        taken.total += 1;
        taken.clients.insert(client, of_client + 1);
        Some(Share { shares: Arc::clone(self), client })
    }
}

/// One that is taken, until it is dropped.
pub(crate) struct Share {
    shares: Arc<Shares>,
    client: IpAddr,
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut taken = self.shares.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.total -= 1;
        let left = taken.clients.get_mut(&self.client).map(|count| {
            *count -= 1;
            *count
        });
        if left == Some(0) {
            taken.clients.remove(&self.client);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_gets_its_share_and_gives_it_back() {
        let shares = Arc::new(Shares::new(8));
        let (one, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let held: Vec<_> = (0..2).map(|_| shares.admit(one).unwrap()).collect();
        assert!(shares.admit(one).is_none());
        assert!(shares.admit(other).is_some());
        drop(held);
        assert!(shares.admit(one).is_some());
        assert!(shares.taken.lock().unwrap().clients.is_empty());
    }

    #[test]
    fn greedy_clients_leave_something() {
        let shares = Arc::new(Shares::new(1000));
        let client = |n| IpAddr::from([10, 0, 1, n]);
        let take = |n| std::iter::from_fn(|| shares.admit(client(n))).collect::<Vec<_>>();
        let held: Vec<_> = (0..10).map(take).collect();
        assert!(held[0].len() > 100);
        assert!(shares.admit(client(101)).is_some());
    }

    #[test]
    fn all_together_get_no_more_than_there_is() {
        let shares = Arc::new(Shares::new(3));
        let client = |n| IpAddr::from([10, 0, 0, n]);
        let _held: Vec<_> = (0..3).map(|n| shares.admit(client(n)).unwrap()).collect();
        assert!(shares.admit(client(9)).is_none());
    }
}
