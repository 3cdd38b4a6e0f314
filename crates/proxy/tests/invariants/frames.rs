//! Fields of HTTP/2 as frames carry them, through the reader and the writer that the proxy uses.

use std::{
    io,
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
};

use h2::{client, server};
use http::request::Parts;
use palisade_proxy::http::{PREFACE, two::Asking};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::halves;

type Field<'a> = (&'a [u8], &'a [u8]);

/// What the rules of RFC 9113 section 8 forbid is no request, and what is forwarded of the others
/// is read from its frames as what was judged.
pub(super) fn check(lines: &[&[u8]]) {
    let fields = fields(lines);
    let Some(parts) = read(request(&fields)) else { return };
    let Ok(asking) = Asking::read(&parts) else { return };
    assert!(is_well_formed(&fields), "{fields:?}");

    let forwarded = asking.request(&parts).expect("what is judged can be forwarded");
    let (wanted, ()) = forwarded.clone().into_parts();
    let Some(written) = write(forwarded) else { return };
    let parts = read(written).expect("what is forwarded is a request");
    assert_eq!(parts.method, wanted.method);
    assert_eq!(parts.headers, wanted.headers);
    let again = Asking::read(&parts).ok().expect("what is forwarded is a request");
    assert_eq!((again.target, again.authority), (asking.target, asking.authority));
    for name in parts.headers.keys().map(http::HeaderName::as_str) {
        assert!(!name.contains('_') && name != "host" && !is_of_connection(name), "{name}");
    }
}

/// The first four lines are pseudo-headers, unless they are whole fields themselves.
fn fields<'a>(lines: &[&'a [u8]]) -> Vec<Field<'a>> {
    const PSEUDO: [&[u8]; 4] = [b":method", b":scheme", b":authority", b":path"];
    let mut fields = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        match PSEUDO.get(at) {
            Some(name) if !line.starts_with(b":") => fields.push((*name, *line)),
            _ => fields.push(halves(line)),
        }
    }
    fields
}

fn is_well_formed(fields: &[Field<'_>]) -> bool {
    let is_pseudo = |name: &[u8]| name.starts_with(b":");
    let regular = fields.iter().position(|(name, _)| !is_pseudo(name)).unwrap_or(fields.len());
    let (pseudo, regular) = fields.split_at(regular);
    let count = |name: &[u8]| pseudo.iter().filter(|(other, _)| *other == name).count();
    let (method, scheme, path) = (count(b":method"), count(b":scheme"), count(b":path"));
    let known = method + scheme + path + count(b":authority") == pseudo.len();
    known
        && (method, scheme, path) == (1, 1, 1)
        && count(b":authority") <= 1
        && pseudo.iter().all(|(_, value)| is_clean(before_fragment(value)))
        && regular.iter().all(|(name, value)| is_regular(name, value))
}

fn is_regular(name: &[u8], value: &[u8]) -> bool {
    let token = |byte: &u8| {
        byte.is_ascii_digit() || byte.is_ascii_lowercase() || b"!#$%&'*+-.^_`|~".contains(byte)
    };
    let named = !name.is_empty() && name.iter().all(token);
    let named = named && std::str::from_utf8(name).is_ok_and(|name| !is_of_connection(name));
    let blank = |byte: Option<&u8>| byte.is_some_and(|byte| b" \t".contains(byte));
    let valued = is_clean(value) && !blank(value.first()) && !blank(value.last());
    let no_body = || std::str::from_utf8(value).is_ok_and(|length| length.parse() == Ok(0_u64));
    named
        && valued
        && (name != b"te" || value == b"trailers")
        && (name != b"content-length" || no_body())
}

fn is_clean(value: &[u8]) -> bool {
    !value.iter().any(|byte| b"\r\n\0".contains(byte))
}

/// A fragment is neither judged nor forwarded.
fn before_fragment(value: &[u8]) -> &[u8] {
    value.split(|byte| *byte == b'#').next().unwrap_or_default()
}

fn is_of_connection(name: &str) -> bool {
    ["connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"].contains(&name)
}

/// What a client sends: a preface, settings, and the fields, each as it is.
fn request(fields: &[Field<'_>]) -> Vec<u8> {
    const SETTINGS: u8 = 4;
    const HEADERS: u8 = 1;
    const END_STREAM_AND_HEADERS: u8 = 5;
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0x10);
        for text in [name, value] {
            write_length(&mut block, text.len());
            block.extend_from_slice(text);
        }
    }
    let mut out = PREFACE.to_vec();
    write_frame(&mut out, SETTINGS, 0, 0, &[]);
    write_frame(&mut out, HEADERS, END_STREAM_AND_HEADERS, 1, &block);
    out
}

fn write_frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

/// An integer with a prefix of seven bits (RFC 7541 section 5.1).
fn write_length(out: &mut Vec<u8>, length: usize) {
    const MOST: usize = 0x7f;
    if length < MOST {
        return out.push(length as u8);
    }
    out.push(MOST as u8);
    let mut rest = length - MOST;
    while rest > MOST {
        out.push(0x80 | (rest & MOST) as u8);
        rest >>= 7;
    }
    out.push(rest as u8);
}

/// The request in what a client sent; `None` if it is refused.
fn read(bytes: Vec<u8>) -> Option<Parts> {
    let memory = Memory { input: io::Cursor::new(bytes), output: Vec::new() };
    let mut connection = now(server::handshake(memory))?.ok()?;
    let (request, _) = now(connection.accept())??.ok()?;
    Some(request.into_parts().0)
}

/// What a client sends for a request.
fn write(request: http::Request<()>) -> Option<Vec<u8>> {
    let mut memory = Memory { input: io::Cursor::default(), output: Vec::new() };
    let (mut send, mut connection) = now(client::handshake(&mut memory))?.ok()?;
    let _response = send.send_request(request, true).ok()?;
    assert!(now(&mut connection).is_none(), "it waits for the answer");
    drop(connection);
    Some(memory.output)
}

/// The outcome, if there is one without anything else to come.
fn now<T>(future: impl Future<Output = T>) -> Option<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(outcome) => Some(outcome),
        Poll::Pending => None,
    }
}

/// One end of a connection on which all that is ever read has come.
struct Memory {
    input: io::Cursor<Vec<u8>>,
    output: Vec<u8>,
}

impl AsyncRead for Memory {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.input.position() == self.input.get_ref().len() as u64 {
            return Poll::Pending;
        }
        Pin::new(&mut self.input).poll_read(cx, into)
    }
}

impl AsyncWrite for Memory {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.output.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
