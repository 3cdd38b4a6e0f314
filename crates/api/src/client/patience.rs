//! How long to wait for a server that fails.

use std::{
    error::Error,
    time::{Duration, Instant},
};

use futures::{Stream, StreamExt, stream::unfold};
use tokio::time::sleep;
use tower::util::rng::{HasherRng, Rng};

use super::refusal::{Refusal, is_denial, retry_after};

/// So long without a failure, and all is well again: longer than an attempt to connect and the
/// pause before it.
pub const CALM: Duration = Duration::from_secs(15);

/// Pauses double from the first to the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pauses {
    first: Duration,
    last: Duration,
}

impl Pauses {
    fn of(error: &(dyn Error + 'static)) -> Self {
        match Refusal::of(error) {
            Some(Refusal::Busy { .. }) => BUSY,
            Some(Refusal::Unauthorized { .. }) => UNKNOWN,
            None if is_denial(error) => DENIED,
            Some(Refusal::Unreachable { .. }) | None => AWAY,
        }
    }
}

/// Nobody is burdened by who asks a server that is away, and who hears of nothing new should not for
/// longer than it takes.
const AWAY: Pauses = Pauses { first: Duration::from_millis(50), last: Duration::from_secs(3) };
/// A new token is taken within this time, and a thousand nodes whose tokens are old do no harm.
const UNKNOWN: Pauses = Pauses { last: Duration::from_secs(10), ..AWAY };
/// The same is denied until a person mends it, and a server and its webhooks have work with each time
/// that they are asked. The first pauses are short, as some of it lasts a moment only.
const DENIED: Pauses = Pauses { last: Duration::from_secs(30), ..AWAY };
/// The requests that are too many come from all nodes at once: from the beginning they are spread
/// over more time than the server asked for.
const BUSY: Pauses = Pauses { first: Duration::from_secs(1), last: Duration::from_secs(30) };

/// How long to wait after the API server failed and before it is asked again: longer and longer, never
/// less than it asked for, and by chance, so that nodes which failed at the same moment do not come
/// back at the same moment.
#[derive(Clone, Debug)]
pub struct Patience {
    pause: Duration,
    /// When the last pause ends.
    until: Option<Instant>,
    chance: HasherRng,
}

impl Default for Patience {
    fn default() -> Self {
        Self { pause: Duration::ZERO, until: None, chance: HasherRng::new() }
    }
}

impl Patience {
    /// How long to wait after this error. What begins anew after a failure is no success yet: that is
    /// time without a failure.
    pub fn after(&mut self, error: &(dyn Error + 'static)) -> Duration {
        self.draw(Pauses::of(error), retry_after(error), Instant::now())
    }

    /// Some time between the half and the whole of the next pause, after `least`.
    fn draw(&mut self, pauses: Pauses, least: Duration, now: Instant) -> Duration {
        if self.until.is_none_or(|until| now.saturating_duration_since(until) > CALM) {
            self.pause = pauses.first;
        }
        let pause = self.pause.clamp(pauses.first, pauses.last);
        self.pause = pause * 2;
        let wait = least + pause.mul_f64(f64::midpoint(1.0, self.chance.next_f64()));
        self.until = Some(now + wait);
        wait
    }
}

/// The stream, which rests after each error as [`Patience`] says.
pub fn patient<T, E: Error + 'static>(
    stream: impl Stream<Item = Result<T, E>>,
) -> impl Stream<Item = Result<T, E>> {
    let begun = (Box::pin(stream), Patience::default(), None);
    unfold(begun, async |(mut stream, mut patience, pause)| {
        if let Some(pause) = pause {
            sleep(pause).await;
        }
        let item = stream.next().await?;
        let pause = item.as_ref().err().map(|error| patience.after(error));
        Some((item, (stream, patience, pause)))
    })
}

#[cfg(test)]
mod tests {
    use std::io;

    use http::StatusCode;
    use kube::{core::Status, runtime::watcher};

    use super::*;

    fn busy(seconds: u64) -> Refusal {
        let (address, words) = Default::default();
        let after = Duration::from_secs(seconds);
        Refusal::Busy { address, status: StatusCode::TOO_MANY_REQUESTS, words, after }
    }

    /// The longest that each of some pauses may be, in milliseconds; each is checked to be at least
    /// half of that.
    fn pauses(pauses: Pauses, least: Duration) -> Vec<u128> {
        let (mut patience, mut now) = (Patience::default(), Instant::now());
        let mut expected = pauses.first;
        let mut longest = Vec::new();
        for _ in 0..9 {
            let wait = patience.draw(pauses, least, now);
            assert!(wait >= least + expected / 2 && wait <= least + expected, "{wait:?}");
            longest.push(expected.as_millis());
            expected = (expected * 2).min(pauses.last);
            now += wait;
        }
        longest
    }

    #[test]
    fn pauses_grow_up_to_a_bound_of_their_kind() {
        let none = Duration::ZERO;
        assert_eq!(pauses(AWAY, none), [50, 100, 200, 400, 800, 1600, 3000, 3000, 3000]);
        assert_eq!(pauses(UNKNOWN, none), [50, 100, 200, 400, 800, 1600, 3200, 6400, 10000]);
        let busy = [1000, 2000, 4000, 8000, 16000, 30000, 30000, 30000, 30000];
        assert_eq!(pauses(BUSY, Duration::from_secs(7)), busy);
    }

    #[test]
    fn who_is_denied_asks_less_often_than_who_is_not_heard() {
        let status = |code| {
            // A webhook that failed.
            let reason = if code == 500 { "InternalError" } else { "" }.to_owned();
            Box::new(Status { code, reason, ..Status::default() })
        };
        let api = |code| kube::Error::Api(status(code));
        for code in [400, 403, 422, 500] {
            assert_eq!(Pauses::of(&api(code)), DENIED, "{code}");
            assert_eq!(Pauses::of(&watcher::Error::InitialListFailed(api(code))), DENIED);
            assert_eq!(Pauses::of(&watcher::Error::WatchError(status(code))), DENIED);
            assert_eq!(Pauses::of(&*anyhow::Error::new(api(code)).context("round")), DENIED);
        }
        for code in [404, 408, 409, 410, 502, 503, 504] {
            assert_eq!(Pauses::of(&api(code)), AWAY, "{code}");
            assert_eq!(Pauses::of(&watcher::Error::WatchError(status(code))), AWAY);
        }
        let message = "etcdserver: request timed out".to_owned();
        let store = Box::new(Status { code: 500, message, ..Status::default() });
        assert_eq!(Pauses::of(&kube::Error::Api(store)), AWAY);
        assert_eq!(Pauses::of(&io::Error::from(io::ErrorKind::ConnectionRefused)), AWAY);
        assert_eq!(Pauses::of(&busy(1)), BUSY);
    }

    #[test]
    fn what_the_server_asks_for_is_the_least() {
        let mut patience = Patience::default();
        for seconds in [1, 32, 1] {
            assert!(patience.after(&busy(seconds)) > Duration::from_secs(seconds));
        }
    }

    #[test]
    fn patience_lasts_until_all_is_calm_and_pauses_are_not() {
        let (mut patience, mut now) = (Patience::default(), Instant::now());
        let none = Duration::ZERO;
        for _ in 0..9 {
            now += patience.draw(BUSY, none, now);
        }
        // A pause that is longer than the calm is none.
        assert!(patience.draw(BUSY, none, now) >= BUSY.last / 2);
        // The server is away by now: that is nobody's burden.
        now += BUSY.last;
        assert!(patience.draw(AWAY, none, now) <= AWAY.last);
        now += AWAY.last + CALM * 2;
        assert!(patience.draw(AWAY, none, now) <= AWAY.first);
    }

    #[test]
    fn who_failed_together_does_not_come_back_together() {
        let waits = || Patience::default().after(&busy(1)).as_millis();
        let mut waits: Vec<u128> = std::iter::repeat_with(waits).take(1000).collect();
        waits.sort_unstable();
        // A tenth of the time has about a tenth of them.
        assert!(waits.windows(200).all(|some| some[199] - some[0] > 50), "{waits:?}");
    }

    #[tokio::test]
    async fn a_stream_rests_after_each_error_and_only_then() {
        let error = || Err(io::Error::from(io::ErrorKind::ConnectionRefused));
        let items = [error(), error()].into_iter().chain((0..1000).map(Ok));
        let begun = Instant::now();
        let stream = patient(futures::stream::iter(items));
        let times: Vec<Duration> = stream.map(|_| begun.elapsed()).collect().await;
        assert!(times[1] - times[0] >= AWAY.first / 2, "{times:?}");
        assert!(times[2] - times[1] >= AWAY.first, "{times:?}");
        assert!(times[1001] - times[2] < 1000 * AWAY.first / 2, "{times:?}");
    }
}
