//! What holds for every input, whatever it is: asked by random tests and by the fuzz targets.
#![allow(dead_code, reason = "a fuzz target asks for one of them")]

use palisade_proxy::{
    http::{
        body::{Framing, Piece, Reader},
        request::Request,
        syntax::{MOST_HEAD, Scanner},
        target::Target,
        two::Asking,
    },
    tls::{Incomplete, server_name},
};

/// A target is canonical after one step, and means what a server that decodes once makes of it.
pub(crate) fn target(raw: &[u8]) {
    let Ok(target) = Target::read(raw) else { return };
    let text = target.as_str();
    let again = Target::read(text.as_bytes()).expect("a canonical target is one");
    assert_eq!(again.as_str(), text, "of {raw:?}");

    let path = text.split('?').next().unwrap_or_default();
    assert!(path.starts_with('/') && !path.contains("//"), "{text:?}");
    assert!(!path.split('/').any(|part| part == "." || part == ".."), "{text:?}");
    assert!(!path.contains([';', '\\', '#']), "{text:?}");

    let raw_path = raw.split(|byte| *byte == b'?').next().unwrap_or_default();
    assert_eq!(seen_by_server(raw_path), seen_by_server(path.as_bytes()), "of {raw:?}");
    assert!(!seen_by_server(path.as_bytes()).iter().any(|part| part.contains(&b'/')), "{text:?}");
}

/// The segments that a plain server sees: split, decoded, empty ones and dots taken away.
fn seen_by_server(path: &[u8]) -> Vec<Vec<u8>> {
    let mut segments: Vec<Vec<u8>> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match decode(part).as_slice() {
            b"" | b"." => {}
            b".." => _ = segments.pop(),
            decoded => segments.push(decoded.to_vec()),
        }
    }
    segments
}

fn decode(part: &[u8]) -> Vec<u8> {
    let hex = |at: usize| {
        let digits = std::str::from_utf8(part.get(at + 1..at + 3)?).ok()?;
        u8::from_str_radix(digits, 16).ok()
    };
    let mut out = Vec::new();
    let mut at = 0;
    while at < part.len() {
        match hex(at).filter(|_| part[at] == b'%') {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(part[at]);
                at += 1;
            }
        }
    }
    out
}

/// What is forwarded of a head reads as the same request, by our reader and by another.
pub(crate) fn http1(bytes: &[u8]) {
    let mut scanner = Scanner::default();
    let Ok(Some(length)) = scanner.find(bytes) else { return };
    // Bytes that come one by one end in the same place.
    let mut slow = Scanner::default();
    let found = (0..=length).find_map(|length| slow.find(&bytes[..length]).transpose());
    assert_eq!(found, Some(Ok(length)));

    let Ok(request) = Request::read(&bytes[..length]) else { return };
    let mut written = Vec::new();
    request.write(&mut written);
    // Written anew, a head may grow over the limit of our own reader.
    if length < MOST_HEAD / 2 {
        assert_eq!(Scanner::default().find(&written), Ok(Some(written.len())));
    }
    let again = Request::read(&written).expect("what is forwarded is a request");
    let text = |request: &Request| {
        let fields: Vec<_> = request
            .fields
            .iter()
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        (
            request.method.clone(),
            request.target.as_str().to_owned(),
            request.authority.as_str().to_owned(),
            fields,
            request.body,
            request.websocket,
        )
    };
    assert_eq!(text(&request), text(&again), "of {:?}", String::from_utf8_lossy(bytes));
    other_reader(&request, &written);
    body(request.body, &bytes[length..]);
}

fn other_reader(request: &Request, written: &[u8]) {
    let mut headers = [httparse::EMPTY_HEADER; 256];
    let mut other = httparse::Request::new(&mut headers);
    assert_eq!(other.parse(written), Ok(httparse::Status::Complete(written.len())));
    assert_eq!(other.method, Some(request.method.as_str()));
    assert_eq!(other.path, Some(request.target.as_str()));
    let hosts = other.headers.iter().filter(|header| header.name.eq_ignore_ascii_case("host"));
    assert_eq!(hosts.count(), 1);
    let framing = other.headers.iter().filter(|header| {
        ["content-length", "transfer-encoding"]
            .iter()
            .any(|name| header.name.eq_ignore_ascii_case(name))
    });
    assert_eq!(framing.count(), usize::from(request.body != Framing::None));
}

/// A body is the same however its bytes come.
pub(crate) fn body(framing: Framing, bytes: &[u8]) {
    let whole = read(framing, bytes, bytes.len().max(1));
    let slow = read(framing, bytes, 1);
    // Where it breaks, as much as there was came before.
    match (&whole, &slow) {
        (Some(whole), Some(slow)) => assert_eq!(whole, slow),
        (whole, slow) => assert_eq!(whole.is_some(), slow.is_some()),
    }
}

/// The body, and how many bytes it took; `None` if it is none.
fn read(framing: Framing, bytes: &[u8], step: usize) -> Option<(Vec<u8>, Option<usize>)> {
    let mut reader = Reader::new(framing);
    let (mut out, mut done, mut given) = (Vec::new(), 0, 0);
    loop {
        let (used, piece) = reader.next(&bytes[done..given]).ok()?;
        done += used;
        match piece {
            Piece::Data(data) => out.extend_from_slice(data),
            Piece::End => return Some((out, Some(done))),
            Piece::More if given == bytes.len() => return Some((out, None)),
            Piece::More => given = (given + step).min(bytes.len()),
        }
    }
}

/// Lines: method, scheme, authority, path, then `name: value`.
pub(crate) fn http2(bytes: &[u8]) {
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let mut next = || lines.next().unwrap_or_default();
    let (method, scheme, authority, path) = (next(), next(), next(), next());
    let uri = http::Uri::builder().scheme(scheme).authority(authority).path_and_query(path);
    let Ok(uri) = uri.build() else { return };
    let mut request = http::Request::builder().method(method).uri(uri);
    for line in lines {
        let mut halves = line.splitn(2, |byte| *byte == b':');
        let (name, value) = (halves.next().unwrap_or_default(), halves.next().unwrap_or_default());
        request = request.header(name, value);
    }
    let Ok(request) = request.body(()) else { return };
    let (parts, ()) = request.into_parts();
    let Ok(asking) = Asking::read(&parts) else { return };
    let forwarded = asking.request(&parts).expect("what is judged can be forwarded");
    assert_eq!(forwarded.method(), parts.method);
    let (parts, ()) = forwarded.into_parts();
    let again = Asking::read(&parts).ok().expect("what is forwarded is a request");
    assert_eq!(again.target, asking.target);
    assert_eq!(again.authority, asking.authority);
    assert!(!parts.headers.keys().any(|name| name.as_str().contains('_')));
    assert!(!parts.headers.contains_key("host") && !parts.headers.contains_key("connection"));
}

/// A name is found in a message that is complete, and then more bytes change nothing.
pub(crate) fn tls(bytes: &[u8]) {
    let found = server_name(bytes);
    if let Ok(Some(name)) = &found {
        assert!(name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)));
        assert_eq!(
            server_name(&[bytes, b"\x17\x03\x03\0\x01x"].concat()).as_ref(),
            Ok(&found.clone().ok().flatten())
        );
    }
    let first = (0..=bytes.len()).find(|length| server_name(&bytes[..*length]) != Err(Incomplete));
    assert_eq!(first.map_or(Err(Incomplete), |length| server_name(&bytes[..length])), found);
}
