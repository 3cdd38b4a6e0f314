//! Whose questions are refused unjudged, because there are too many.

use std::{
    collections::HashSet,
    net::IpAddr,
    time::{Duration, Instant},
};

/// Of each client one record in this time: whoever asks too much must not fill the log with it.
const EVERY: Duration = Duration::from_secs(1);
/// Clients that are told of in this time.
const MOST: usize = 1024;

/// The clients that were told of lately.
#[derive(Default)]
pub(super) struct Told {
    since: Option<Instant>,
    clients: HashSet<IpAddr>,
}

impl Told {
    /// Whether a client is to be told of now.
    pub(super) fn is_due(&mut self, client: IpAddr, now: Instant) -> bool {
        if self.since.is_none_or(|since| now - since >= EVERY) {
            self.since = Some(now);
            self.clients.clear();
        }
        self.clients.len() < MOST && self.clients.insert(client)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(n: u32) -> IpAddr {
        IpAddr::from(n.to_be_bytes())
    }

    #[test]
    fn each_client_is_told_of_once_in_a_while() {
        let (mut told, now) = (Told::default(), Instant::now());
        let due = |told: &mut Told, n| told.is_due(client(n), now);
        assert!(due(&mut told, 1) && due(&mut told, 2));
        assert!(!due(&mut told, 1) && !due(&mut told, 2));
        assert!(told.is_due(client(1), now + EVERY));
    }

    #[test]
    fn bounded() {
        let (mut told, now) = (Told::default(), Instant::now());
        assert_eq!((0..100_000).filter(|n| told.is_due(client(*n), now)).count(), MOST);
    }
}
