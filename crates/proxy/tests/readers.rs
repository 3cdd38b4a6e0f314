//! The readers' invariants on random input, and on what the fuzzers found worth keeping.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod invariants;

use std::{fs, path::Path};

use proptest::{collection::vec, prelude::*, sample::select};

/// Inputs of pieces that mean something.
fn of(pieces: &'static [&'static str], most: usize) -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        20 => select(pieces).prop_map(|piece| piece.as_bytes().to_vec()),
        1 => any::<u8>().prop_map(|byte| vec![byte]),
    ];
    vec(piece, 0..most).prop_map(|pieces| pieces.concat())
}

const TARGET: &[&str] = &[
    "/",
    "//",
    ".",
    "..",
    "a",
    "public",
    "admin",
    "%2e",
    "%2E",
    "%2f",
    "%5c",
    "%25",
    "%61",
    "%00",
    "%e2%82%ac",
    "%c0%ae",
    "%ff",
    ";",
    "\\",
    "#",
    "?",
    "=",
    "&",
    "%",
    "%2",
    "~",
    ":",
    "@",
    "[",
    " ",
];
const HEAD: &[&str] = &[
    "Host: a\r\n",
    "Host: b:80\r\n",
    "Content-Length: 5\r\n",
    "Content-Length: 0\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Connection: x-a, close\r\n",
    "Connection: upgrade\r\n",
    "Upgrade: websocket\r\n",
    "X-A: 1\r\n",
    "X_A: 1\r\n",
    "Expect: 100-continue\r\n",
    "X:\t y \r\n",
    " z\r\n",
    "\r\n",
    "\n",
    "\r",
    ": ",
    "x",
];
const BODY: &[&str] = &[
    "5\r\n",
    "hello",
    "\r\n",
    "0\r\n",
    "0\r\n\r\n",
    ";x=1",
    "a",
    "F",
    "X: y\r\n",
    "\n",
    "\r",
    " ",
    "ffffffffffffffff",
];
const PARTS: &[&str] = &[
    "\n",
    "GET",
    "POST",
    "http",
    "https",
    "a",
    ":80",
    "/public",
    "/../",
    "?",
    "%2e",
    "host:a",
    "content-length:1",
    "x_y:1",
    "te:trailers",
    "connection:x",
    "*",
    "u@",
    "[::1]",
];
const HELLO: &[&str] = &[
    "\x16\x03\x01",
    "\x01",
    "\0",
    "\0\0",
    "\0\x01",
    "\0\x05",
    "\x03\x03",
    "a.b",
    "\0\x0b",
    "\x02",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn targets(path in of(TARGET, 12)) {
        invariants::target(&[b"/", path.as_slice()].concat());
        invariants::target(&path);
    }

    #[test]
    fn http1(target in of(TARGET, 5), head in of(HEAD, 8), body in of(BODY, 12)) {
        let first = [b"POST /", target.as_slice(), b" HTTP/1.1\r\nHost: a\r\n"].concat();
        invariants::http1(&[&first, head.as_slice(), b"\r\n", &body].concat());
        let chunked = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        invariants::http1(&[&chunked[..], &body].concat());
        invariants::http1(&head);
    }

    #[test]
    fn tls(rest in of(HELLO, 24)) {
        invariants::tls(&rest);
        invariants::tls(&[b"\x16\x03\x01", rest.as_slice()].concat());
    }
}

proptest! {
    // Each makes connections.
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn http2(rest in of(PARTS, 10)) {
        invariants::http2(&[b"GET\nhttp\na\n/", rest.as_slice()].concat());
        invariants::http2(&rest);
    }
}

/// Frames that mean something, or nearly.
fn frames() -> impl Strategy<Value = Vec<u8>> {
    let kind = prop_oneof![4 => Just(1), 2 => Just(9), 2 => Just(0), 2 => 0..=10_u8];
    let flags = prop_oneof![
        6 => select(&[0, 1, 4, 5][..]),
        1 => select(&[8, 0xc, 0x20, 0x25, 0x2d][..]),
        1 => any::<u8>(),
    ];
    let stream = select(&[0_u8, 1, 1, 1, 2, 3, 3, 5, 7][..]);
    let settings: Vec<&[u8]> = vec![b"\0\x04\x80\0\0\0", b"\0\x04\0\0\0\x09", b"\0\x01\0\0\0\0"];
    let payload = prop_oneof![
        6 => block(),
        2 => select(&[4_usize, 5, 6, 8][..]).prop_map(|length| vec![0; length]),
        1 => vec(select(settings), 0..4).prop_map(|settings| settings.concat()),
        1 => vec(any::<u8>(), 0..10),
    ];
    let frame = (kind, flags, stream, payload).prop_map(|(kind, flags, stream, payload)| {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, stream], &payload].concat()
    });
    let all = vec(frame, 0..8).prop_map(|frames| frames.concat());
    let change = (any::<prop::sample::Index>(), any::<u8>());
    (all, prop::option::weighted(0.3, change)).prop_map(|(mut all, change)| {
        if let Some((at, byte)) = change.filter(|_| !all.is_empty()) {
            let at = at.index(all.len());
            all[at] = byte;
        }
        all
    })
}

/// What may stand in the value of a field.
fn value_byte() -> impl Strategy<Value = u8> {
    prop_oneof![Just(b'\t'), 0x20..=0x7e_u8, 0x80..=0xff_u8]
}

/// Fields that are packed, or nearly. Where they are whole, names and values are fit.
fn field() -> impl Strategy<Value = Vec<u8>> {
    const NAMES: &[&[u8]] = &[b"\x01x", b"\x05:path", b"\x84\xb9\x58\xd3\x3f", b"\x02te"];
    // As text and in Huffman's code.
    const VALUES: &[&[u8]] = &[b"\x03200", b"\x82\x10\x01"];
    // Padding of a byte, of zeros, with the end of the string; what is not there; no length.
    const BAD: &[&[u8]] =
        &[b"\x83\x10\x01\xff", b"\x82\x10\0", b"\x84\xff\xff\xff\xff", b"\x7f\x80\x80\x80\x80\0"];
    let value = prop_oneof![12 => select(VALUES), 1 => select(BAD)].prop_map(<[u8]>::to_vec);
    let long = (0..4_usize).prop_map(|n| {
        let length = n * 900;
        let rest = [(length & 127) as u8 | 128, (length >> 7) as u8];
        [b"\x40\x01y\x7f", &rest[..], &vec![b'y'; length + 127]].concat()
    });
    let how = select(&[0x40_u8, 0, 0x10][..]);
    let named = (how.clone(), select(NAMES), value.clone())
        .prop_map(|(how, name, value)| [&[how], name, &value].concat());
    let by_index = (how, 1..90_u8, value).prop_map(|(how, index, value)| {
        let most = if how == 0x40 { 0x3f } else { 0xf };
        let index = if index < most { vec![how | index] } else { vec![how | most, index - most] };
        [index, value].concat()
    });
    prop_oneof![
        4 => (0xbd..=0xc0_u8).prop_map(|index| vec![index]),
        2 => (0x80..=0xd0_u8).prop_map(|index| vec![index]),
        4 => named,
        4 => by_index,
        2 => long,
        1 => size(),
    ]
}

/// Sizes of the table: none, all, more, and such that one or two short fields have just room or not.
fn size() -> impl Strategy<Value = Vec<u8>> {
    const SIZES: &[&[u8]] = &[
        b"\x20",
        b"\x3f\xe1\x1f",
        b"\x3f\xe2\x1f",
        b"\x3f\x05",
        b"\x3f\x04",
        b"\x3f\x29",
        b"\x3f\x28",
    ];
    select(SIZES).prop_map(<[u8]>::to_vec)
}

fn block() -> impl Strategy<Value = Vec<u8>> {
    let fields = vec(field(), 0..8).prop_map(|fields| fields.concat());
    let size = prop::option::weighted(0.3, size());
    (size, fields).prop_map(|(size, fields)| [size.unwrap_or_default(), fields].concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4_000, ..ProptestConfig::default() })]

    #[test]
    fn connections(frames in frames()) {
        invariants::connection(&frames);
        let begun = [&[0, 0, 0, 4, 0, 0, 0, 0, 0][..], &frames].concat();
        invariants::connection(&begun);
    }

    #[test]
    fn blocks(mut blocks in vec(block(), 1..6), cut in 0..8_usize) {
        // Now and then a field does not end.
        if let (1, Some(last)) = (cut, blocks.last_mut()) {
            last.pop();
        }
        invariants::blocks(&blocks);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn lengths(requests in vec(vec(vec(value_byte(), 0..80), 0..5), 1..4)) {
        invariants::lengths(&requests);
    }
}

#[test]
fn what_the_fuzzers_kept() {
    type Target = (&'static str, fn(&[u8]));
    let targets: [Target; 5] = [
        ("http1", invariants::http1),
        ("target", invariants::target),
        ("http2", invariants::http2),
        ("frames", invariants::connection),
        ("tls", invariants::tls),
    ];
    for (name, target) in targets {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        let mut count = 0;
        for entry in fs::read_dir(corpus).unwrap() {
            target(&fs::read(entry.unwrap().path()).unwrap());
            count += 1;
        }
        assert!(count > 0, "{name}");
    }
}
