//! How many questions a second a client may ask.
//!
//! Pods of this node are held to it by the data path (`ebpf/src/pace.rs`), before they cost the
//! proxy anything. But clients of other nodes, which come here by the policy of a server, have no
//! row by which the data path could tell them apart; and of what is in a connection the data path
//! knows nothing. Those who ask in connections may ask as much as in datagrams: their connections
//! are read no faster.

use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use palisade_abi::limits;

/// What one question takes at the pace; of one client, by each family.
const QUESTION: Duration = Duration::from_nanos(limits::QUESTION_NANOS);
/// What a client may ask at once after it asked nothing.
const BURST: Duration = Duration::from_nanos(limits::QUESTION_NANOS * limits::QUESTIONS_AT_ONCE);
/// So many clients are remembered before those are forgotten that are within their pace.
const MANY: usize = 1024;
/// How often it is told that somebody is too fast.
const TELL: Duration = Duration::from_secs(10);

/// For the log.
pub(super) const TOO_FAST: &str = "dropped: more questions a second than one client may ask";

/// When each client has asked as much as it may (the generic cell rate algorithm, ITU-T I.371).
#[derive(Default)]
pub(super) struct Pace {
    clients: HashMap<IpAddr, Instant>,
    told: Option<Instant>,
}

impl Pace {
    /// Whether a client may ask one more now.
    pub(super) fn admit(&mut self, client: IpAddr, now: Instant) -> bool {
        let due = self.due(client, now);
        if *due - now > BURST {
            self.tell(client, now);
            return false;
        }
        *due += QUESTION;
        true
    }

    /// How long a client has to wait that asks one more.
    pub(super) fn delay(&mut self, client: IpAddr, now: Instant) -> Duration {
        let due = self.due(client, now);
        let delay = (*due - now).saturating_sub(BURST);
        *due += QUESTION;
        delay
    }

    fn due(&mut self, client: IpAddr, now: Instant) -> &mut Instant {
        if self.clients.len() >= MANY {
            self.clients.retain(|_, due| *due > now);
        }
        let due = self.clients.entry(client).or_insert(now);
        *due = now.max(*due);
        due
    }

    fn tell(&mut self, client: IpAddr, now: Instant) {
        if self.told.is_some_and(|told| now - told < TELL) {
            return;
        }
        self.told = Some(now);
        tracing::warn!(
            %client,
            "asks more questions of DNS a second than one may; those beyond are dropped"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREEDY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

    #[test]
    fn a_client_asks_at_its_pace_and_hinders_no_other() {
        let (mut pace, begin) = (Pace::default(), Instant::now());
        // Five times the pace.
        let at = |n| begin + QUESTION / 5 * n;
        let admitted = (0..100_000).filter(|n| pace.admit(GREEDY, at(*n))).count();
        assert!((20_000..=22_000).contains(&admitted), "{admitted}");
        assert!(pace.admit(OTHER, at(100_000)));
        assert!(!(0..2).all(|_| pace.admit(GREEDY, at(100_000))));
        assert!(pace.admit(GREEDY, at(150_000)), "it waited");
    }

    #[test]
    fn a_client_that_waits_asks_at_its_pace() {
        let (mut pace, begin) = (Pace::default(), Instant::now());
        let mut now = begin;
        let delays = (0..20_000).map(|_| {
            let delay = pace.delay(GREEDY, now);
            now += delay;
            delay
        });
        assert_eq!(delays.take_while(Duration::is_zero).count(), 1001);
        // The last of 20,000 in connections that all wait.
        let last = (1002..20_000).map(|_| pace.delay(GREEDY, begin)).last().unwrap();
        assert_eq!(last, QUESTION * 18_999);
        assert!(pace.delay(OTHER, begin).is_zero());
        assert!(pace.delay(GREEDY, begin + QUESTION * 20_000).is_zero(), "it waited");
    }

    #[test]
    fn whoever_keeps_the_pace_is_always_admitted_and_forgotten() {
        let (mut pace, begin) = (Pace::default(), Instant::now());
        assert!((0..50_000).all(|n| pace.admit(GREEDY, begin + QUESTION * n)));
        let later = begin + QUESTION * 50_000;
        for n in 0..10_000u32 {
            assert!(
                pace.admit(IpAddr::from(n.to_be_bytes()), later + Duration::from_millis(n.into()))
            );
        }
        assert!(pace.clients.len() <= MANY);
    }
}
