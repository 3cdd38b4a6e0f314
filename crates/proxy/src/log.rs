//! Records of what was judged, on their way to the agent.

use std::{
    borrow::Cow,
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

use palisade_api::proxy::AccessRecord;
use tokio::{sync::Notify, time::Duration};

/// Records that wait; more are counted only.
const MOST: usize = 4096;
/// Records in one message.
const BATCH: usize = 1024;
/// Records are collected this long, so that the agent is not woken for each.
const COLLECT: Duration = Duration::from_millis(10);

/// Records of what was judged.
#[derive(Default)]
pub struct Log {
    waiting: Mutex<Waiting>,
    some: Notify,
}

#[derive(Default)]
struct Waiting {
    records: Vec<AccessRecord>,
    lost: u64,
}

impl Log {
    /// Adds a record, or counts it where too many wait: the proxy never waits for its log.
    pub fn add(&self, record: AccessRecord) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.records.len() >= MOST {
            waiting.lost += 1;
            return;
        }
        waiting.records.push(record);
        if waiting.records.len() == 1 {
            self.some.notify_one();
        }
    }

    /// The next records, and how many were lost before them. May be dropped at any time.
    pub async fn next(&self) -> (Vec<AccessRecord>, u64) {
        loop {
            if !self.is_empty() {
                tokio::time::sleep(COLLECT).await;
                return self.take();
            }
            self.some.notified().await;
        }
    }

    fn is_empty(&self) -> bool {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).records.is_empty()
    }

    fn take(&self) -> (Vec<AccessRecord>, u64) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let lost = std::mem::take(&mut waiting.lost);
        let count = waiting.records.len().min(BATCH);
        (waiting.records.drain(..count).collect(), lost)
    }
}

/// Nanoseconds since 1970.
#[must_use]
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Words in the names of parameters that carry secrets.
const SECRET: [&str; 11] = [
    "auth",
    "bearer",
    "credential",
    "jwt",
    "key",
    "pass",
    "pwd",
    "secret",
    "session",
    "sig",
    "token",
];
/// Names of such parameters that are common words besides: an authorisation code, a one-time
/// password.
const SECRET_NAMES: [&str; 2] = ["code", "otp"];

/// A URL without the values of parameters whose names sound like secrets.
#[must_use]
pub fn without_credentials(url: &str) -> Cow<'_, str> {
    let Some((path, query)) = url.split_once('?') else { return url.into() };
    let is_secret = |name: &str| {
        let name = name.to_ascii_lowercase();
        SECRET.iter().any(|word| name.contains(word)) || SECRET_NAMES.contains(&&*name)
    };
    let parts = query.split_inclusive(['&', ';']).map(|part| match part.split_once('=') {
        Some((name, value)) if is_secret(name) => {
            let end = value.strip_suffix(['&', ';']).map_or("", |kept| &value[kept.len()..]);
            Cow::from(format!("{name}=[redacted]{end}"))
        }
        _ => part.into(),
    });
    format!("{path}?{}", parts.collect::<String>()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_in_urls_are_not_told() {
        for (url, told) in [
            ("http://a/b", "http://a/b"),
            ("http://a/b?x=1&y", "http://a/b?x=1&y"),
            ("http://a/b?access_token=s3&x=1", "http://a/b?access_token=[redacted]&x=1"),
            ("http://a/b?x=1;API-Key=s3=s4", "http://a/b?x=1;API-Key=[redacted]"),
            ("http://a/b?token", "http://a/b?token"),
            (
                "http://a/b?code=4&jwt=5&pass=6",
                "http://a/b?code=[redacted]&jwt=[redacted]&pass=[redacted]",
            ),
            ("http://a/b?zipcode=4&Bearer=5", "http://a/b?zipcode=4&Bearer=[redacted]"),
        ] {
            assert_eq!(without_credentials(url), told);
        }
    }
}
