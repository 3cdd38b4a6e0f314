//! The timer of a connection.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use tokio::time::{Instant, Sleep, sleep_until};

/// A timer that is set again and again and hardly ever rings: that it is due later costs nothing
/// until the earlier time has come.
pub(super) struct Alarm {
    due: Instant,
    sleep: Pin<Box<Sleep>>,
}

impl Alarm {
    /// Rings at this time.
    pub(super) fn new(due: Instant) -> Self {
        Self { due, sleep: Box::pin(sleep_until(due)) }
    }

    /// Rings at this time instead.
    pub(super) fn set(&mut self, due: Instant) {
        self.due = due;
        if due < self.sleep.deadline() {
            self.sleep.as_mut().reset(due);
        }
    }

    /// Whether it rings.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.sleep.as_mut().poll(cx).is_ready() {
            if self.due <= self.sleep.deadline() {
                return Poll::Ready(());
            }
            self.sleep.as_mut().reset(self.due);
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, time::Duration};

    use super::*;

    #[tokio::test]
    async fn it_rings_when_it_was_last_set_to() {
        let begun = Instant::now();
        let after = |n| begun + Duration::from_millis(20) * n;
        let mut alarm = Alarm::new(after(1));
        for (set, rings) in [(vec![], 1), (vec![3], 3), (vec![9, 5], 5), (vec![12, 6, 7], 7)] {
            for due in set {
                alarm.set(after(due));
                assert!(poll_fn(|cx| Poll::Ready(alarm.poll(cx))).await.is_pending());
            }
            poll_fn(|cx| alarm.poll(cx)).await;
            assert!(Instant::now() >= after(rings), "{rings}");
        }
    }
}
