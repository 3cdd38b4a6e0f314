//! Records of what was judged, on their way to the agent.

use std::{
    borrow::Cow,
    collections::VecDeque,
    io,
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use palisade_api::{
    flow::{escaped, escaped_text, word},
    proxy::{AccessRecord, MOST_NAMES, Records},
};
use percent_encoding::percent_decode_str;
use tokio::{
    sync::Notify,
    time::{Duration, Instant},
};

use crate::http::syntax::{MOST_METHOD, is_token};

/// Records that wait; more are counted only.
const MOST: usize = 4096;
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
    /// All but the last one full.
    messages: VecDeque<Records>,
    /// Records in them.
    count: usize,
    lost: u64,
    /// When the records have been collected long enough, if there are any.
    due: Option<Instant>,
}

impl Log {
    /// Adds a record, or counts it where too many wait: the proxy never waits for its log.
    pub fn add(&self, record: AccessRecord) {
        let mut waiting = self.waiting();
        if waiting.count >= MOST || waiting.push(record).is_err() {
            waiting.lost += 1;
            return;
        }
        if waiting.due.is_none() {
            waiting.due = Some(Instant::now() + COLLECT);
            self.some.notify_one();
        }
    }

    /// Counts records that were taken, and that nobody got; that is told with the next ones.
    pub fn lose(&self, count: u64) {
        self.waiting().lost += count;
    }

    /// The next records. May be dropped at any time: whoever asks again does not wait anew.
    pub async fn next(&self) -> Records {
        loop {
            if let Some(due) = self.due() {
                tokio::time::sleep_until(due).await;
                return self.waiting().take();
            }
            self.some.notified().await;
        }
    }

    fn due(&self) -> Option<Instant> {
        self.waiting().due
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    /// Written at once: what a record is made of is still at hand.
    fn push(&mut self, record: AccessRecord) -> io::Result<()> {
        if self.messages.back().is_none_or(Records::is_full) {
            self.messages.push_back(Records::default());
        }
        if let Some(last) = self.messages.back_mut() {
            last.push(record)?;
            self.count += 1;
        }
        Ok(())
    }

    fn take(&mut self) -> Records {
        let mut records = self.messages.pop_front().unwrap_or_default();
        records.lost = std::mem::take(&mut self.lost);
        self.count -= records.len();
        self.due = self.due.filter(|_| !self.messages.is_empty());
        records
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

/// Parameters inside the values of others are looked into this deep; a value with more is not told.
const MOST_NESTED: usize = 4;

/// A URL without the values of parameters whose names sound like secrets, or in which there are
/// credentials, as in a URL to go on to.
#[must_use]
pub fn without_credentials(url: &str) -> Cow<'_, str> {
    let Some((path, query)) = url.split_once('?') else { return url.into() };
    let parts = query.split_inclusive(['&', ';']).map(|part| match part.split_once('=') {
        Some((name, _)) if has_credentials(name, MOST_NESTED) => "[redacted]".into(),
        Some((name, value)) if is_secret(name) || has_credentials(value, MOST_NESTED) => {
            let end = value.strip_suffix(['&', ';']).map_or("", |kept| &value[kept.len()..]);
            Cow::from(format!("{name}=[redacted]{end}"))
        }
        None if has_credentials(part, MOST_NESTED) => "[redacted]".into(),
        _ => part.into(),
    });
    format!("{path}?{}", parts.collect::<String>()).into()
}

/// By the name as the server reads it.
fn is_secret(name: &str) -> bool {
    let name = decoded(name).to_ascii_lowercase();
    SECRET.iter().any(|word| name.contains(word)) || SECRET_NAMES.contains(&&*name)
}

/// Whether a value is, or has inside, a URL with a user or with parameters that are secrets.
fn has_credentials(text: &str, depth: usize) -> bool {
    let value = decoded(text);
    let has_user = |rest: &str| {
        let mut parts = rest.split(['/', '?', '#']);
        parts.next().is_some_and(|authority| authority.contains('@'))
    };
    if value.split("//").skip(1).any(has_user) {
        return true;
    }
    let mut parameters = value.split(['?', '#', '&', ';']).filter_map(|part| part.split_once('='));
    if parameters
        .any(|(name, value)| depth == 0 || is_secret(name) || has_credentials(value, depth - 1))
    {
        return true;
    }
    // It may be encoded more than once.
    value != text && (depth == 0 || has_credentials(&value, depth - 1))
}

fn decoded(text: &str) -> Cow<'_, str> {
    percent_decode_str(text).decode_utf8_lossy()
}

/// Longest text that a record holds of one: many records wait for the agent at times.
const MOST_TEXT: usize = 4096;

/// A URL as a record holds it.
pub fn told(url: String) -> String {
    let url = match without_credentials(&url) {
        Cow::Owned(url) => url,
        Cow::Borrowed(_) => url,
    };
    shortened(escaped_text(url))
}

/// A method as a record holds it: a token, which needs no escaping.
pub fn told_method(method: &str) -> Cow<'static, str> {
    if method.len() > MOST_TEXT { shortened(method.to_owned()).into() } else { word(method) }
}

/// As many names of headers as a record holds.
pub fn told_names<'n>(names: impl Iterator<Item = &'n str>) -> Vec<String> {
    let (mut told, mut length) = (Vec::new(), 0);
    for name in names {
        length += name.len();
        if length > MOST_TEXT || told.len() == MOST_NAMES - 1 {
            told.push("[cut]".to_owned());
            break;
        }
        told.push(name.to_owned());
    }
    told
}

/// As much of an escaped text as a record holds.
pub fn shortened(mut text: String) -> String {
    if text.len() > MOST_TEXT {
        text.truncate(text.floor_char_boundary(MOST_TEXT));
        text.push_str("[cut]");
    }
    text
}

/// Longest URL that is told of a request that is refused unread.
const MOST_GIST: usize = 1024;

/// What can be told of a request that is refused unread. Nothing is judged by it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gist {
    /// Method.
    pub method: String,
    /// URL; without the host where that is not certain.
    pub url: String,
}

impl Gist {
    /// Of a method, a target and a host as they came; empty where there is none.
    #[must_use]
    pub fn new(method: &[u8], target: &[u8], host: &[u8]) -> Self {
        let url = match (target, host) {
            ([b'/', ..], [_, ..]) => [b"http://", host, target].concat(),
            _ => target.to_owned(),
        };
        let url = escaped(&url[..url.len().min(MOST_GIST)]);
        let url = without_parameters(&without_user(&url));
        let url = without_credentials(&url).into_owned();
        Self { method: escaped(&method[..method.len().min(MOST_METHOD)]), url }
    }

    /// Of the beginning of a request over HTTP/1.
    #[must_use]
    pub fn of_head(head: &[u8]) -> Self {
        let mut lines = head.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
        let mut words = lines.next().unwrap_or_default().split(|byte| *byte == b' ');
        let method = words.next().unwrap_or_default();
        let is_method = method.len() <= MOST_METHOD && method.iter().all(|byte| is_token(*byte));
        let (true, Some(target)) = (is_method && !method.is_empty(), words.next()) else {
            return Self::default();
        };
        let host = lines.take_while(|line| !line.is_empty()).find_map(|line| {
            let (name, value) = line.split_at_checked(b"host:".len())?;
            name.eq_ignore_ascii_case(b"host:").then(|| value.trim_ascii())
        });
        Self::new(method, target, host.unwrap_or_default())
    }
}

/// A URL without what is neither path nor query: it may be credentials, as session numbers are.
fn without_parameters(url: &str) -> String {
    let (url, fragment) = url.split_once('#').map_or((url, ""), |(url, _)| (url, "#[redacted]"));
    let (path, query) = url.split_at(url.find('?').unwrap_or(url.len()));
    let (path, hidden) = path.split_once(';').map_or((path, ""), |(path, _)| (path, ";[redacted]"));
    [path, hidden, query, fragment].concat()
}

/// A URL without what stands before the host.
fn without_user(url: &str) -> Cow<'_, str> {
    let begin = url.find("://").map_or(0, |at| at + 3);
    let end = url[begin..].find(['/', '?', '#']).map_or(url.len(), |at| begin + at);
    match url[begin..end].rfind('@') {
        Some(at) => format!("{}[redacted]{}", &url[..begin], &url[begin + at..]).into(),
        None => url.into(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use palisade_api::{flow::L7, proxy::MOST_RECORDS};

    use super::*;

    pub(crate) fn record() -> AccessRecord {
        let address = ([10, 0, 0, 1], 80).into();
        AccessRecord {
            time: 0,
            protocol: 6,
            client: address,
            server: address,
            allowed: false,
            egress: None,
            ingress: None,
            l7: L7::Stream { error: String::new() },
        }
    }

    #[test]
    fn of_names_a_record_holds_some() {
        let told = |names: &[String]| told_names(names.iter().map(String::as_str));
        let (short, long) = ("x".to_owned(), "x".repeat(MOST_TEXT));
        assert_eq!(told(&[]), [""; 0]);
        assert_eq!(told(std::slice::from_ref(&long)), [&*long]);
        assert_eq!(told(&[short.clone(), long]), ["x", "[cut]"]);
        let many = told(&vec![short; 2 * MOST_NAMES]);
        assert_eq!((many.len(), many.last().map(String::as_str)), (MOST_NAMES, Some("[cut]")));
    }

    /// Whoever asks has other things to do more often than records are collected.
    #[tokio::test]
    async fn records_go_out_whatever_else_happens() {
        let log = Log::default();
        let (mut sent, begun) = (Vec::new(), Instant::now());
        for _ in 0..=MOST_RECORDS {
            log.add(record());
        }
        while sent.len() < 2 {
            assert!(begun.elapsed() < COLLECT * 500, "{sent:?}");
            tokio::select! {
                () = tokio::time::sleep(COLLECT / 5) => {}
                records = log.next() => sent.push(records.len()),
            }
            assert!(sent.is_empty() || begun.elapsed() >= COLLECT);
        }
        assert_eq!(sent, [MOST_RECORDS, 1]);
        log.add(record());
        assert_eq!(log.next().await.len(), 1);
    }

    #[test]
    fn what_is_refused_unread_is_told_of() {
        for (head, method, url) in [
            (
                "GET /a;b?token=s3 HTTP/1.1\r\nX: y\r\nhOst: a\r\n\r\n",
                "GET",
                "http://a/a;[redacted]?token=[redacted]",
            ),
            ("GET /a#token=s3 HTTP/1.1\r\n\r\n", "GET", "/a#[redacted]"),
            ("GET /a HTTP/1.1\r\n\r\nHost: body\r\n", "GET", "/a"),
            ("PUT http://u:s3@a/x HTTP/1.1\r\nHost: b\r\n\r\n", "PUT", "http://[redacted]@a/x"),
            ("GET /x HTTP/1.1\r\nHost: u:s3@a\r\n\r\n", "GET", "http://[redacted]@a/x"),
            ("GET /\u{1b}[1m HTTP/1.1", "GET", "/\\x1b[1m"),
            ("CONNECT a:80 HTTP/1.1\r\n\r\n", "CONNECT", "a:80"),
            ("GET", "", ""),
            ("G@T / HTTP/1.1\r\n\r\n", "", ""),
            ("\u{16}\u{3}\u{1}", "", ""),
            ("", "", ""),
        ] {
            let gist = Gist::of_head(head.as_bytes());
            assert_eq!((&*gist.method, &*gist.url), (method, url), "{head:?}");
        }
        let long = format!("GET /{} HTTP/1.1", "a".repeat(9999));
        assert_eq!(Gist::of_head(long.as_bytes()).url.len(), MOST_GIST);
    }

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
            // Names as servers read them.
            ("http://a/b?%74oken=s3&x=%31", "http://a/b?%74oken=[redacted]&x=%31"),
            ("http://a/b?acc%65ss%5Ft%6Fken=s3", "http://a/b?acc%65ss%5Ft%6Fken=[redacted]"),
            ("http://a/b?%2574oken=s3&%=1&%zz=2&%é=3", "http://a/b?%2574oken=s3&%=1&%zz=2&%é=3"),
            // URLs inside.
            ("http://a/b?next=https%3A%2F%2Fu:s3@h%2Fc&x=1", "http://a/b?next=[redacted]&x=1"),
            ("http://a/b?next=https://h/c&x=1", "http://a/b?next=https://h/c&x=1"),
            (
                "http://a/b?next=https%3A%2F%2Fh%2F%3Fx%3D1",
                "http://a/b?next=https%3A%2F%2Fh%2F%3Fx%3D1",
            ),
            ("http://a/b?next=//u:s3@h", "http://a/b?next=[redacted]"),
            ("http://a/b?mail=u@h&x=http://h/u@h", "http://a/b?mail=u@h&x=http://h/u@h"),
            ("http://a/b?u=http://h/?token=s3", "http://a/b?u=[redacted]"),
            ("http://a/b?u=http%3A%2F%2Fh%2F%3Fx%3D1%26%74oken%3Ds3", "http://a/b?u=[redacted]"),
            ("http://a/b?u=http://h/%23access_token=s3", "http://a/b?u=[redacted]"),
            ("http://a/b?u=%2F%3Fu%3D%252F%253Fjwt%253Ds3", "http://a/b?u=[redacted]"),
            ("http://a/fetch?https://u:s3@h&x=1", "http://a/fetch?[redacted]x=1"),
            ("http://a/b?https://u:s3@h/=1", "http://a/b?[redacted]"),
            ("http://a/b?u=https%253A%252F%252Fu:s3@h", "http://a/b?u=[redacted]"),
            ("http://a/b?u=http%253A%252F%252Fh%252F%253Ftoken%253Ds3", "http://a/b?u=[redacted]"),
            ("http://a/b?u=100%2525&y=%20", "http://a/b?u=100%2525&y=%20"),
            ("http://a/b?x=a=b=c&y=?z==", "http://a/b?x=a=b=c&y=?z=="),
        ] {
            assert_eq!(without_credentials(url), told);
        }
        // However deep, it takes no time and no stack.
        let deep = format!("http://a/?{}", "u=".repeat(20_000));
        assert_eq!(without_credentials(&deep), "http://a/?u=[redacted]");
    }
}
