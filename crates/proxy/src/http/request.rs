//! Requests over HTTP/1.

use std::borrow::Cow;

use palisade_api::flow::word;
use palisade_policy::l7::field::WEBSOCKET;
pub(super) use palisade_policy::l7::field::{Hops, is_hop, is_own, only};

use super::{
    body::Framing,
    syntax::{Fields, MOST_METHOD, Malformed, ascii, is_token, write_field},
    target::{Authority, Target},
};

/// A request as it is judged and forwarded.
#[derive(Clone, Debug)]
pub struct Request {
    /// Method.
    pub method: Cow<'static, str>,
    /// Path and query.
    pub target: Target,
    /// Host.
    pub authority: Authority,
    /// End-to-end fields, without `host` and those that frame the body, and `upgrade` where a
    /// websocket is asked for: rules may ask about that.
    pub fields: Fields,
    /// How the body is told from what follows.
    pub body: Framing,
    /// Spoke HTTP/1.0.
    pub old: bool,
    /// The connection ends with this exchange.
    pub close: bool,
    /// Waits to be told before it sends the body.
    pub expects: bool,
    /// Asks for a websocket.
    pub websocket: bool,
}

impl Request {
    /// Reads a head, with the empty line that ends it.
    ///
    /// # Errors
    ///
    /// It is not certain what the request is.
    pub fn read(head: &[u8]) -> Result<Self, Malformed> {
        let (line, rest) = split_line(head)?;
        let (method, target, old) = read_line(line)?;
        let mut fields = Fields::default();
        fields.read(rest.strip_suffix(b"\r\n").unwrap_or(rest))?;

        let body = framing(&fields, old)?;
        let expects = expectation(&fields)?;
        let authority = Authority::read(only(fields.all("host"))?.ok_or(NO_HOST)?)?;
        let target = Target::of_request(&method, target, Some(&authority))?;
        let hops = Hops::read(fields.all("connection"))?;
        let websocket =
            !old && body == Framing::None && hops.ask_for_websocket(&method, fields.all("upgrade"));
        let close = old || hops.names("close");
        fields.retain(|name, _| hops.passes(name));
        if websocket {
            fields.push(WEBSOCKET.0, WEBSOCKET.1);
        }
        Ok(Self { method, target, authority, fields, body, old, close, expects, websocket })
    }

    /// Writes the head.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.method.as_bytes());
        out.push(b' ');
        out.extend_from_slice(self.target.as_str().as_bytes());
        out.extend_from_slice(b" HTTP/1.1\r\n");
        write_field(out, "host", self.authority.as_str().as_bytes());
        self.fields.write(out);
        self.body.write(out);
        if self.expects {
            write_field(out, "expect", b"100-continue");
        }
        if self.websocket {
            write_field(out, "connection", b"upgrade");
        }
        out.extend_from_slice(b"\r\n");
    }
}

const NO_HOST: Malformed = Malformed::bad("there is no host");

/// The first line, and what follows it.
pub(super) fn split_line(head: &[u8]) -> Result<(&[u8], &[u8]), Malformed> {
    let end = memchr::memchr(b'\r', head).ok_or(Malformed::bad("there is no first line"))?;
    match &head[end..] {
        [b'\r', b'\n', rest @ ..] => Ok((&head[..end], rest)),
        _ => Err(Malformed::bad("a bare CR in the first line")),
    }
}

fn read_line(line: &[u8]) -> Result<(Cow<'static, str>, &[u8], bool), Malformed> {
    let method = read_method(line)?.ok_or(NO_METHOD)?;
    let rest = &line[method.len() + 1..];
    let end = memchr::memchr(b' ', rest).ok_or(Malformed::bad("the first line has no version"))?;
    let old = match &rest[end + 1..] {
        b"HTTP/1.1" => false,
        b"HTTP/1.0" => true,
        [b'H', b'T', b'T', b'P', b'/', major, b'.', minor]
            if major.is_ascii_digit() && minor.is_ascii_digit() =>
        {
            return Err(Malformed { status: 505, why: "another version than HTTP/1" });
        }
        _ => return Err(Malformed::bad("the first line is not three words")),
    };
    Ok((word(ascii(method)), &rest[..end], old))
}

const NO_METHOD: Malformed = Malformed::bad("what begins with no method is no HTTP");

/// The method at the beginning of a request, `None` while it is not complete. Tells early what is
/// not HTTP at all.
///
/// # Errors
///
/// The bytes do not begin with a method and a space.
pub fn read_method(bytes: &[u8]) -> Result<Option<&[u8]>, Malformed> {
    let end = bytes.iter().position(|byte| !is_token(*byte));
    match end.map(|end| (end, bytes[end])) {
        Some((1..=MOST_METHOD, b' ')) => Ok(end.map(|end| &bytes[..end])),
        None if bytes.len() <= MOST_METHOD => Ok(None),
        _ => Err(NO_METHOD),
    }
}

fn framing(fields: &Fields, old: bool) -> Result<Framing, Malformed> {
    let length = only(fields.all("content-length"))?;
    let coding = only(fields.all("transfer-encoding"))?;
    match (length, coding) {
        (None, None) => Ok(Framing::None),
        (Some(length), None) => Ok(Framing::Length(read_length(length)?)),
        (None, Some(coding)) if !old => is_chunked(coding),
        _ => Err(Malformed::bad("two ways to tell where the body ends")),
    }
}

/// Nothing but `chunked` is understood.
pub(super) fn is_chunked(coding: &[u8]) -> Result<Framing, Malformed> {
    if coding.eq_ignore_ascii_case(b"chunked") {
        return Ok(Framing::Chunked);
    }
    Err(Malformed::bad("a transfer coding other than chunked"))
}

/// Digits, no more of them than any body needs.
pub(super) fn read_length(text: &[u8]) -> Result<u64, Malformed> {
    let bad = Malformed::bad("the content length is no number");
    if text.is_empty() || text.len() > 18 || !text.iter().all(u8::is_ascii_digit) {
        return Err(bad);
    }
    ascii(text).parse().map_err(|_| bad)
}

fn expectation(fields: &Fields) -> Result<bool, Malformed> {
    match only(fields.all("expect"))? {
        None => Ok(false),
        Some(value) if value.eq_ignore_ascii_case(b"100-continue") => Ok(true),
        Some(_) => Err(Malformed { status: 417, why: "an expectation that nobody knows" }),
    }
}
