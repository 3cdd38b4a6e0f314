//! HTTP/2 through the readers and the writer that the proxy uses: fields as frames carry them, and
//! frames of any kind.

use std::{
    io,
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
};

use h2::{Reason, client, server};
use http::request::Parts;
use palisade_proxy::http::{
    PREFACE,
    frames::{Fault, Reader},
    two::Asking,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::halves;

type Field<'a> = (&'a [u8], &'a [u8]);

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const WITH_PRIORITY: u8 = 0x20;

/// What the rules of RFC 9113 section 8 forbid is no request, be it in one frame or in two, and what
/// is forwarded of the others is read from its frames as what was judged.
pub(super) fn check(lines: &[&[u8]]) {
    let fields = fields(lines);
    let block = write_block(&fields);
    let cut = block.iter().map(|byte| usize::from(*byte)).sum::<usize>() % (block.len() + 1);
    let (first, second) = block.split_at(cut);
    for parts in [&[&*block][..], &[first, second]] {
        check_request(&fields, request(parts));
    }
}

fn check_request(fields: &[Field<'_>], bytes: Vec<u8>) {
    let Some(parts) = read(bytes) else { return };
    let Ok(asking) = Asking::read(&parts) else { return };
    assert!(is_well_formed(fields), "{fields:?}");

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
        && pseudo.iter().all(|(_, value)| is_clean(value))
        && !pseudo.iter().any(|(name, value)| *name == b":path" && value.contains(&b'#'))
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

fn is_of_connection(name: &str) -> bool {
    ["connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"].contains(&name)
}

/// Each field as it is.
fn write_block(fields: &[Field<'_>]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0x10);
        for text in [name, value] {
            write_length(&mut block, text.len());
            block.extend_from_slice(text);
        }
    }
    block
}

/// What a client sends: a preface, settings, and the fields in some parts.
fn request(parts: &[&[u8]]) -> Vec<u8> {
    let mut out = PREFACE.to_vec();
    write_frame(&mut out, SETTINGS, 0, 0, &[]);
    for (at, part) in parts.iter().enumerate() {
        let kind = if at == 0 { HEADERS } else { CONTINUATION };
        let end = if at + 1 == parts.len() { END_HEADERS } else { 0 };
        write_frame(&mut out, kind, END_STREAM | end, 1, part);
    }
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
    let mut reader = Reader::default();
    reader.read(&bytes).ok()?;
    if !reader.take_malformed().is_empty() {
        return None;
    }
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

/// The reader before the crate finds the same however the bytes come, and no fault where the crate
/// finds none, but for what the protocol calls one all the same.
pub(super) fn check_connection(frames: &[u8]) {
    let bytes = [PREFACE, frames].concat();
    let found = fault(&bytes, bytes.len());
    for step in [1, 5, 13] {
        assert_eq!(fault(&bytes, step), found, "in steps of {step}");
    }
    let Some(fault) = found else { return };
    let alone = match fault.reason {
        Reason::COMPRESSION_ERROR => end(in_one_part(&bytes, fault)),
        _ => end(ended(&bytes, fault)),
    };
    assert!(alone.is_some() || is_stricter(&bytes, fault), "{fault:?}");
}

/// As far as the frame with a fault, which is whole, as the crate looks at no others.
fn ended(bytes: &[u8], fault: Fault) -> Vec<u8> {
    let mut ended = bytes.to_vec();
    ended.resize(fault.before + length(&bytes[fault.before..]), 0);
    ended
}

/// The same, with the last block in one frame. Of several the crate reads each anew: in the next it
/// lets the table change.
fn in_one_part(bytes: &[u8], fault: Fault) -> Vec<u8> {
    let ended = ended(bytes, fault);
    let frames: Vec<_> = split(&ended).collect();
    let first = frames.iter().rposition(|(_, frame)| frame[3] == HEADERS).expect("it begins");
    let (start, frame) = frames[first];
    let prefix = if frame[4] & WITH_PRIORITY != 0 { 5 } else { 0 };
    let mut block = match frame[4] & PADDED != 0 {
        true => frame[10 + prefix..frame.len() - usize::from(frame[9])].to_vec(),
        false => frame[9 + prefix..].to_vec(),
    };
    for (_, part) in &frames[first + 1..] {
        block.extend_from_slice(&part[9..]);
    }
    let mut all = ended[..start].to_vec();
    write_frame(&mut all, HEADERS, END_STREAM | END_HEADERS, id(frame), &block);
    all
}

/// Blocks in which every name and every value is fit: what faults they have are in their coding, and
/// both readers find them.
pub(super) fn check_blocks(blocks: &[Vec<u8>]) {
    let mut bytes = PREFACE.to_vec();
    write_frame(&mut bytes, SETTINGS, 0, 0, &[]);
    for (stream, block) in (1..).step_by(2).zip(blocks) {
        write_frame(&mut bytes, HEADERS, END_STREAM | END_HEADERS, stream, block);
    }
    let found = fault(&bytes, bytes.len()).map(|fault| fault.reason);
    let name = |code| if code == Reason::PROTOCOL_ERROR { Reason::COMPRESSION_ERROR } else { code };
    assert_eq!(found, end(bytes).map(name));
}

/// What a client packs is as long as it was before.
pub(super) fn check_lengths(requests: &[Vec<Vec<u8>>]) {
    let mut memory = Memory { input: io::Cursor::default(), output: Vec::new() };
    let (mut send, mut connection) =
        now(client::handshake(&mut memory)).expect("nothing is to wait for").expect("it begins");
    let mut lengths = Vec::new();
    for values in requests {
        let mut request = http::Request::get("http://a/").body(()).expect("it is one");
        for (number, value) in values.iter().enumerate() {
            let name = http::HeaderName::try_from(format!("x{number}")).expect("it is one");
            let Ok(value) = http::HeaderValue::from_bytes(value) else { return };
            request.headers_mut().insert(name, value);
        }
        let fields = request.headers().iter();
        let fields = fields.map(|(name, value)| name.as_str().len() + value.len());
        lengths.push(":methodGET:schemehttp:authoritya:path/".len() + fields.sum::<usize>());
        _ = send.send_request(request, true).expect("it is sent");
        assert!(now(&mut connection).is_none(), "it waits for the answer");
    }
    drop(connection);
    let mut reader = Reader::default();
    reader.read(PREFACE).expect("it is one");
    let mut lengths = lengths.into_iter();
    for (_, frame) in split(&memory.output) {
        let mut frame = frame.to_vec();
        let ends = matches!(frame[3], HEADERS | CONTINUATION) && frame[4] & END_HEADERS != 0;
        if ends {
            frame[4] &= !END_HEADERS;
        }
        reader.read(&frame).expect("it has no fault");
        if ends {
            assert_eq!(Some(reader.under_way()), lengths.next());
            let mut last = Vec::new();
            write_frame(&mut last, CONTINUATION, END_HEADERS, frame[8].into(), &[]);
            reader.read(&last).expect("it has no fault");
            assert_eq!(reader.under_way(), 0);
        }
    }
    assert_eq!(lengths.next(), None);
}

/// The first fault of some bytes that come in steps, and where its frame begins.
fn fault(bytes: &[u8], step: usize) -> Option<Fault> {
    let mut reader = Reader::default();
    let (at, fault) = bytes
        .chunks(step.max(1))
        .enumerate()
        .find_map(|(at, part)| Some((at * step, reader.read(part).err()?)))?;
    let starts = split(bytes).map(|(start, _)| start);
    let before = starts.take_while(|start| *start <= at + fault.before).last()?;
    Some(Fault { before, ..fault })
}

/// The frames behind a preface, and where each begins.
fn split(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut start = PREFACE.len();
    std::iter::from_fn(move || {
        let rest = bytes.get(start..).filter(|rest| rest.len() >= 9)?;
        let frame = (start, &rest[..length(rest).min(rest.len())]);
        start += length(rest);
        Some(frame)
    })
}

fn id(frame: &[u8]) -> u32 {
    u32::from_be_bytes([frame[5] & 0x7f, frame[6], frame[7], frame[8]])
}

fn length(frame: &[u8]) -> usize {
    9 + u32::from_be_bytes([0, frame[0], frame[1], frame[2]]) as usize
}

/// The error with which the crate alone ends a connection.
fn end(bytes: Vec<u8>) -> Option<Reason> {
    let mut memory = Memory { input: io::Cursor::new(bytes), output: Vec::new() };
    let mut connection = now(server::handshake(&mut memory))?.ok()?;
    let mut kept = Vec::new();
    while let Some(Some(Ok(stream))) = now(connection.accept()) {
        kept.push(stream);
    }
    drop((kept, connection));
    let output = [PREFACE, &memory.output].concat();
    let codes = split(&output).filter(|(_, frame)| frame[3] == GOAWAY);
    let codes =
        codes.map(|(_, frame)| u32::from_be_bytes([frame[13], frame[14], frame[15], frame[16]]));
    codes.map(Reason::from).find(|code| *code != Reason::NO_ERROR)
}

/// Faults that the crate bears: frames of streams that the client ended, which it takes for late, a
/// frame between two parts of a block of which the first is malformed, a field without a name where
/// more of the block comes, a stream that depends on itself, whose fields it leaves packed, and
/// promises of clients.
fn is_stricter(bytes: &[u8], fault: Fault) -> bool {
    let (_, frame) =
        split(bytes).find(|(start, _)| *start == fault.before).expect("it has a frame");
    let (kind, flags, stream) = (frame[3], frame[4], id(frame));
    let ends = |frame: &[u8]| match frame[3] {
        DATA | HEADERS => frame[4] & END_STREAM != 0,
        kind => kind == RST_STREAM,
    };
    let earlier: Vec<_> = split(bytes).take_while(|(start, _)| *start < fault.before).collect();
    let in_block = earlier.last().is_some_and(|(_, frame)| {
        matches!(frame[3], HEADERS | CONTINUATION) && frame[4] & END_HEADERS == 0
    });
    let at = 9 + usize::from(flags & PADDED != 0);
    let depends = kind == HEADERS && flags & WITH_PRIORITY != 0;
    let on = frame.get(at..at + 4).filter(|_| depends);
    let on_itself =
        on.is_some_and(|on| [&[on[0] & 0x7f], &on[1..]].concat() == stream.to_be_bytes());
    match fault.reason {
        Reason::STREAM_CLOSED => {
            let over = earlier.iter().any(|(_, frame)| id(frame) == stream && ends(frame));
            over && matches!(kind, DATA | HEADERS)
        }
        Reason::PROTOCOL_ERROR => {
            let in_one_part = || end(in_one_part(bytes, fault)).is_some();
            let nameless = || matches!(kind, HEADERS | CONTINUATION) && in_one_part();
            in_block && kind != CONTINUATION || kind == PUSH_PROMISE || on_itself || nameless()
        }
        _ => false,
    }
}
