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

#[test]
fn what_the_fuzzers_kept() {
    type Target = (&'static str, fn(&[u8]));
    let targets: [Target; 4] = [
        ("http1", invariants::http1),
        ("target", invariants::target),
        ("http2", invariants::http2),
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
