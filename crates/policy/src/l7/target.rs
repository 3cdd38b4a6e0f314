//! The target of a request in its one canonical form.
//!
//! A server may decode, merge and resolve a path in its own way, and the judge must not see
//! another path than the server does. So the path is brought into the form on which all agree (RFC
//! 3986 section 6.2.2, and no empty segments), that form is judged *and* forwarded, and a path is
//! refused where readers are known to differ: encoded slashes, backslashes, path parameters,
//! control characters, what is no UTF-8.

use std::{
    borrow::Cow,
    net::{Ipv4Addr, Ipv6Addr},
};

/// Why a message is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// Status for a request that has this fault.
    pub status: u16,
    /// The fault, for the log.
    pub why: &'static str,
}

impl Malformed {
    /// The fault of a message that is none.
    #[must_use]
    pub const fn bad(why: &'static str) -> Self {
        Self { status: 400, why }
    }
}

/// A whole URL is asked for, and of another host than the header names.
pub const ANOTHER_HOST: Malformed = Malformed::bad("the target names another host than the header");

/// A target in canonical form: a path that begins with a slash and, behind a question mark, the
/// query; or the asterisk of `OPTIONS`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target(String);

impl Target {
    /// Reads what the first line of a request over HTTP/1 asks for: a path, a whole URL of the
    /// host, or the asterisk. `host` is the one that the header names; `None`: not known.
    ///
    /// # Errors
    ///
    /// It is not certain what is asked for, or it is for no server behind this proxy.
    pub fn of_request(
        method: &str,
        text: &[u8],
        host: Option<&Authority>,
    ) -> Result<Self, Malformed> {
        if method == "CONNECT" {
            return Err(Malformed { status: 405, why: "CONNECT is not for this proxy" });
        }
        if text == b"*" && method == "OPTIONS" {
            return Ok(Self::asterisk());
        }
        if text.starts_with(b"/") {
            return Self::read(text);
        }
        let (named, path) = split_url(text).ok_or(Malformed::bad("the target is no path"))?;
        let named = Authority::read(named)?;
        if host.is_some_and(|host| *host != named) {
            return Err(ANOTHER_HOST);
        }
        Self::read(&path)
    }

    /// Reads a path and query.
    ///
    /// # Errors
    ///
    /// It is not certain what the path is.
    pub fn read(text: &[u8]) -> Result<Self, Malformed> {
        let (path, query) = match memchr::memchr(b'?', text) {
            Some(at) => (&text[..at], Some(&text[at..])),
            None => (text, None),
        };
        let mut canonical = canonical_path(path)?;
        if let Some(query) = query {
            if !query.iter().all(|byte| is_visible(*byte)) {
                return Err(Malformed::bad("a character in the query that must be encoded"));
            }
            canonical.extend_from_slice(query);
        }
        Ok(Self(String::from_utf8(canonical).unwrap_or_default()))
    }

    /// The target of an `OPTIONS` request for the server itself.
    #[must_use]
    pub fn asterisk() -> Self {
        Self("*".into())
    }

    /// As it is judged and forwarded.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Splits the URL of plain HTTP before its path, which is `/` where it is left out. `None`: it is
/// no such URL.
#[must_use]
pub fn split_url(text: &[u8]) -> Option<(&[u8], Cow<'_, [u8]>)> {
    let (scheme, rest) = text.split_at_checked(7)?;
    if !scheme.eq_ignore_ascii_case(b"http://") {
        return None;
    }
    let end = rest.iter().position(|byte| matches!(byte, b'/' | b'?' | b'#')).unwrap_or(rest.len());
    let (host, path) = rest.split_at(end);
    let path = match path {
        [] => Cow::Borrowed(&b"/"[..]),
        query @ [b'?', ..] => Cow::Owned([b"/", query].concat()),
        path => Cow::Borrowed(path),
    };
    Some((host, path))
}

/// What may stand in a target as it is. The rest has a meaning of its own or none.
fn is_visible(byte: u8) -> bool {
    matches!(byte, 0x21..=0x7e) && !matches!(byte, b'#' | b'\\' | b'"' | b'<' | b'>' | b'`')
}

fn canonical_path(path: &[u8]) -> Result<Vec<u8>, Malformed> {
    if !path.starts_with(b"/") {
        return Err(Malformed::bad("the target is no path"));
    }
    if is_canonical(path) {
        return Ok(path.to_vec());
    }
    let decoded = decode(path)?;
    Ok(resolve(&decoded))
}

/// The common case, in one walk: nothing encoded, no empty segment, none that begins with a dot.
fn is_canonical(path: &[u8]) -> bool {
    let plain =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'~' | b'.');
    let mut before = 0;
    path.iter().all(|&byte| {
        let fine = match byte {
            b'/' | b'.' => before != b'/',
            _ => plain(byte),
        };
        before = byte;
        fine
    })
}

/// Decodes what need not be encoded, once; upper-case digits for the rest.
fn decode(path: &[u8]) -> Result<Vec<u8>, Malformed> {
    let mut out = Vec::with_capacity(path.len());
    // Characters beyond ASCII, to see whether they are any.
    let mut octets = Vec::new();
    let mut rest = path;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            if !is_visible(byte) || byte == b';' {
                return Err(Malformed::bad("a character in the path that is read in several ways"));
            }
            octets.push(byte);
            out.push(byte);
            continue;
        }
        let (value, after) = hex_pair(rest)?;
        rest = after;
        octets.push(value);
        match value {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(value),
            0..0x20 | 0x7f => return Err(Malformed::bad("a control character in the path")),
            b'/' | b'\\' | b';' => {
                return Err(Malformed::bad("an encoded separator in the path"));
            }
            _ => {
                const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
                let digit = |nibble: u8| DIGITS[usize::from(nibble & 15)];
                out.extend_from_slice(&[b'%', digit(value >> 4), digit(value)]);
            }
        }
    }
    match std::str::from_utf8(&octets) {
        Ok(_) => Ok(out),
        Err(_) => Err(Malformed::bad("the path is no UTF-8")),
    }
}

fn hex_pair(text: &[u8]) -> Result<(u8, &[u8]), Malformed> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let pair = text.split_first_chunk::<2>();
    let value =
        pair.and_then(|([high, low], rest)| Some((digit(*high)? << 4 | digit(*low)?, rest)));
    value.ok_or(Malformed::bad("a percent sign without two digits"))
}

/// Merges slashes and takes `.` and `..` away.
fn resolve(path: &[u8]) -> Vec<u8> {
    let mut segments: Vec<&[u8]> = Vec::new();
    let mut parts = path.split(|byte| *byte == b'/').skip(1).peekable();
    while let Some(part) = parts.next() {
        let last = parts.peek().is_none();
        match part {
            b"" | b"." => {}
            b".." => _ = segments.pop(),
            _ => {
                segments.push(part);
                continue;
            }
        }
        if last {
            segments.push(b"");
        }
    }
    let mut out = Vec::with_capacity(path.len());
    for segment in segments {
        out.push(b'/');
        out.extend_from_slice(segment);
    }
    out
}

/// A host, with a port where the client gave one, in canonical form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authority {
    text: String,
    host: usize,
}

impl Authority {
    /// Reads `host[:port]`.
    ///
    /// # Errors
    ///
    /// It is none.
    pub fn read(text: &[u8]) -> Result<Self, Malformed> {
        let bad = Malformed::bad("the host is not valid");
        let text = std::str::from_utf8(text).map_err(|_| bad)?.to_ascii_lowercase();
        let end = if text.starts_with('[') {
            text.find(']').map(|at| at + 1)
        } else {
            Some(text.find(':').unwrap_or(text.len()))
        };
        let (host, port) = end.and_then(|end| text.split_at_checked(end)).ok_or(bad)?;
        if !port.is_empty() {
            let digits = port.strip_prefix(':').filter(|port| is_number(port)).ok_or(bad)?;
            digits.parse::<u16>().map_err(|_| bad)?;
        }
        let canonical = canonical_host(host).ok_or(bad)?;
        let length = canonical.len();
        let changed = (canonical != host).then(|| canonical.into_owned() + port);
        Ok(Self { text: changed.unwrap_or(text), host: length })
    }

    /// With the port, where there is one.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Without the port.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.text[..self.host]
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn canonical_host(host: &str) -> Option<Cow<'_, str>> {
    if let Some(address) = host.strip_prefix('[') {
        let address: Ipv6Addr = address.strip_suffix(']')?.parse().ok()?;
        return Some(format!("[{address}]").into());
    }
    let name = host.strip_suffix('.').unwrap_or(host);
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    let label = |label: &str| !label.is_empty() && label.bytes().all(letter);
    if !name.split('.').all(label) || name.len() > 253 {
        return None;
    }
    // `0x7f.1` and the like are addresses to some and names to others.
    let numeric = name.split('.').next_back().is_some_and(is_number);
    if numeric && name.parse::<Ipv4Addr>().is_err() {
        return None;
    }
    Some(name.into())
}
