//! What holds for every input, whatever it is: asked by random tests and by the fuzz targets.
#![allow(dead_code, reason = "a fuzz target asks for one of them")]

mod frames;

use palisade_proxy::{
    http::{
        body::{Framing, Piece, Reader},
        request::Request,
        response::Response,
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
    assert!(text.bytes().all(|byte| matches!(byte, b'!'..=b'~')), "{text:?}");
    let query = |target: &[u8]| {
        target.iter().position(|byte| *byte == b'?').map(|at| target[at..].to_vec())
    };
    assert_eq!(query(raw), query(text.as_bytes()), "of {raw:?}");

    let raw_path = raw.split(|byte| *byte == b'?').next().unwrap_or_default();
    assert_eq!(seen_by_server(raw_path), seen_by_server(path.as_bytes()), "of {raw:?}");
    let separates = |byte: &u8| matches!(byte, b'/' | b'\\' | b';') || byte.is_ascii_control();
    for part in seen_by_server(path.as_bytes()) {
        assert!(!part.iter().any(separates) && std::str::from_utf8(&part).is_ok(), "{text:?}");
    }
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
    response(&bytes[..length]);

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
    for (name, value) in request.fields.iter() {
        let upgrades = request.websocket && (name, value) == ("upgrade", b"websocket");
        assert!(upgrades || !is_hop(name) && !name.contains('_') && name != "host", "{name}");
        assert!(!value.iter().any(|byte| b"\r\n\0".contains(byte)), "{name}");
    }
    body(request.body, &bytes[length..]);
}

fn other_reader(request: &Request, written: &[u8]) {
    let mut headers = [httparse::EMPTY_HEADER; 256];
    let mut other = httparse::Request::new(&mut headers);
    assert_eq!(other.parse(written), Ok(httparse::Status::Complete(written.len())));
    assert_eq!(other.method, Some(&*request.method));
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

fn is_hop(name: &str) -> bool {
    [
        "connection",
        "content-length",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ]
    .contains(&name)
}

/// What is forwarded of an answer reads as the same answer, by our reader and by another.
fn response(head: &[u8]) {
    const ASKED: [&[u8]; 3] = [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    ];
    for asked in ASKED {
        let request = Request::read(asked).expect("it is one");
        let Ok(response) = Response::read(head, &request) else { continue };
        let mut written = Vec::new();
        response.write(&mut written, response.body, response.close);
        let again = Response::read(&written, &request).expect("what is forwarded is an answer");
        let text = |response: &Response| {
            let fields: Vec<_> = response
                .fields
                .iter()
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect();
            (response.status, fields, response.body, response.status == 101 || response.close)
        };
        assert_eq!(text(&response), text(&again), "of {:?}", String::from_utf8_lossy(head));
        assert!(response.status != 101 || request.websocket);
        let mut headers = [httparse::EMPTY_HEADER; 256];
        let mut other = httparse::Response::new(&mut headers);
        assert_eq!(other.parse(&written), Ok(httparse::Status::Complete(written.len())));
        assert_eq!(other.code, Some(response.status));
    }
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

/// Lines: method, scheme, authority, path, then `name: value`. As the parts of a request, and as
/// the fields of a frame, where the names of the first four may be others too.
pub(crate) fn http2(bytes: &[u8]) {
    let lines: Vec<_> = bytes.split(|byte| *byte == b'\n').collect();
    frames::check(&lines);
    parts(&lines);
}

fn parts(lines: &[&[u8]]) {
    let line = |at: usize| lines.get(at).copied().unwrap_or_default();
    let uri = http::Uri::builder().scheme(line(1)).authority(line(2)).path_and_query(line(3));
    let Ok(uri) = uri.build() else { return };
    let mut request = http::Request::builder().method(line(0)).uri(uri);
    for line in lines.iter().skip(4) {
        let (name, value) = halves(line);
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

/// Frames of a client, behind the preface.
pub(crate) fn connection(bytes: &[u8]) {
    frames::check_connection(bytes);
}

/// Blocks of fields, each of its own stream.
pub(crate) fn blocks(blocks: &[Vec<u8>]) {
    frames::check_blocks(blocks);
}

/// Values of fields, of one request after the other.
pub(crate) fn lengths(requests: &[Vec<Vec<u8>>]) {
    frames::check_lengths(requests);
}

/// Name and value of a line. The colon that a name begins with is its own.
fn halves(line: &[u8]) -> (&[u8], &[u8]) {
    match line.iter().skip(1).position(|byte| *byte == b':') {
        Some(at) => (&line[..=at], &line[at + 2..]),
        None => (line, &[]),
    }
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
