//! How long nothing goes either way.

use std::sync::{Mutex, PoisonError};

use tokio::time::{Instant, sleep_until};

use super::IDLE_TIME;

/// When something last went in an exchange. Both directions note it: a long upload is no silence of
/// the server's, nor a long answer one of the client's.
pub(super) struct Activity(Mutex<Instant>);

impl Activity {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Instant::now()))
    }

    /// Something goes.
    pub(super) fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Returns once nothing went for long.
    pub(super) async fn stopped(&self) {
        loop {
            let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if last.elapsed() >= IDLE_TIME {
                return;
            }
            sleep_until(last + IDLE_TIME).await;
        }
    }

    /// Waits for something to go; `None` once nothing went for long.
    pub(super) async fn within<T>(&self, step: impl Future<Output = T>) -> Option<T> {
        let done = tokio::select! {
            biased;
            done = step => done,
            () = self.stopped() => return None,
        };
        self.note();
        Some(done)
    }
}
