//! Frames in the wrong place, of the wrong size, in the wrong state: what RFC 9113 and RFC 7541 call
//! errors, section by section, and what they want borne. Nothing of it reaches the origin.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod world;

use std::{io::Write, net::TcpStream};

use world::{
    World,
    agent::{http, rules},
    frames::{
        CONTINUATION, DATA, END_HEADERS, END_STREAM, GET, GOAWAY, HEADERS, PING, PRIORITY,
        RST_STREAM, SETTINGS, WINDOW_UPDATE, block, frame, next, raw,
    },
    origin::Origin,
    rest,
};

const PUSH_PROMISE: u8 = 5;
const UNKNOWN: u8 = 0xfa;
const ACK: u8 = 1;
const PADDED: u8 = 8;
const WITH_PRIORITY: u8 = 0x20;

// Codes of errors.
const PROTOCOL: u32 = 1;
const FLOW_CONTROL: u32 = 3;
const STREAM_CLOSED: u32 = 5;
const FRAME_SIZE: u32 = 6;
const REFUSED_STREAM: u32 = 7;
const COMPRESSION: u32 = 9;

/// A request that policy denies: its answer comes without an origin.
fn denied(method: &'static str) -> Vec<u8> {
    let mut fields = GET;
    fields[0].1 = method;
    fields[3].1 = "/admin";
    block(&fields)
}

/// A stream on which the request has ended.
fn ended(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, &denied("GET"))
}

/// A stream on which a body is still to come.
fn open(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, &denied("POST"))
}

/// A stream whose headers have not ended.
fn begun(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_STREAM, stream, &denied("GET"))
}

fn setting(name: u16, value: u32) -> Vec<u8> {
    frame(SETTINGS, 0, 0, &[&name.to_be_bytes()[..], &value.to_be_bytes()].concat())
}

fn reset(stream: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])
}

fn window(stream: u32, increment: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, stream, &increment.to_be_bytes())
}

/// A whole request whose block begins or ends with some bytes.
fn around(before: &[u8], after: &[u8]) -> Vec<u8> {
    let block = [before, &denied("GET"), after].concat();
    frame(HEADERS, END_HEADERS | END_STREAM, 1, &block)
}

/// The same on another stream.
fn around_on(stream: u32, before: &[u8]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, &[before, &denied("GET")].concat())
}

/// A field of which the value is coded by Huffman's method.
fn huffman(value: &[u8]) -> Vec<u8> {
    [&[0, 1, b'x', 0x80 | value.len() as u8], value].concat()
}

/// The code of the first error. One of the connection ends it.
fn error(stream: &mut TcpStream) -> Option<u32> {
    loop {
        let (kind, _, payload) = next(stream)?;
        let code = match kind {
            RST_STREAM => &payload[..4],
            GOAWAY => &payload[4..8],
            _ => continue,
        };
        let code = u32::from_be_bytes(code.try_into().unwrap());
        if code == 0 {
            continue;
        }
        if kind == GOAWAY {
            rest(stream);
        }
        return Some(code);
    }
}

#[test]
fn errors_are_answered_with_their_codes() {
    let world = World::new(rules(1, &[http(&["GET /public"])]));
    let origin = Origin::ok(&world.server);
    type Case = (&'static str, Vec<Vec<u8>>, &'static [u32]);
    let long = vec![0; (1 << 14) + 1];
    let cases: Vec<Case> = vec![
        // 4.2: no frame is longer than the receiver allows.
        ("long DATA", vec![open(1), frame(DATA, END_STREAM, 1, &long)], &[FRAME_SIZE]),
        ("long HEADERS", vec![frame(HEADERS, END_STREAM | END_HEADERS, 1, &long)], &[FRAME_SIZE]),
        ("long unknown frame", vec![frame(UNKNOWN, 0, 0, &long)], &[FRAME_SIZE]),
        // 4.3: blocks of fields are whole, and nothing comes between their parts.
        ("block that is none", vec![around(&[], &[0])], &[COMPRESSION]),
        ("PRIORITY in a block", vec![begun(1), frame(PRIORITY, 0, 1, &[0; 5])], &[PROTOCOL]),
        ("HEADERS of another in a block", vec![begun(1), ended(3)], &[PROTOCOL]),
        ("DATA in a block", vec![begun(1), frame(DATA, 0, 1, b"x")], &[PROTOCOL]),
        ("PING in a block", vec![begun(1), frame(PING, 0, 0, &[0; 8])], &[PROTOCOL]),
        ("SETTINGS in a block", vec![begun(1), frame(SETTINGS, 0, 0, &[])], &[PROTOCOL]),
        ("unknown frame in a block", vec![begun(1), frame(UNKNOWN, 0, 0, b"x")], &[PROTOCOL]),
        // 5.1: streams that are idle, half closed, closed.
        ("DATA of an idle stream", vec![frame(DATA, END_STREAM, 1, b"x")], &[PROTOCOL]),
        ("RST_STREAM of an idle stream", vec![reset(1)], &[PROTOCOL]),
        ("WINDOW_UPDATE of an idle stream", vec![window(1, 100)], &[PROTOCOL]),
        (
            "CONTINUATION of an idle stream",
            vec![frame(CONTINUATION, END_HEADERS, 1, &denied("GET"))],
            &[PROTOCOL],
        ),
        ("DATA after the end", vec![ended(1), frame(DATA, END_STREAM, 1, b"x")], &[STREAM_CLOSED]),
        ("HEADERS after the end", vec![ended(1), ended(1)], &[STREAM_CLOSED]),
        ("HEADERS after a reset", vec![open(1), reset(1), ended(1)], &[STREAM_CLOSED]),
        (
            "DATA after the end, and others between",
            [&[ended(1)][..], &[ended(3), ended(5)], &[frame(DATA, 0, 1, b"x")]].concat(),
            &[STREAM_CLOSED],
        ),
        (
            "CONTINUATION after the end",
            vec![ended(1), frame(CONTINUATION, END_HEADERS, 1, &denied("GET"))],
            &[PROTOCOL],
        ),
        (
            "CONTINUATION after a reset",
            vec![open(1), reset(1), frame(CONTINUATION, END_HEADERS, 1, &denied("GET"))],
            &[PROTOCOL],
        ),
        // 5.1.1, 5.1.2: numbers of streams.
        ("even stream", vec![ended(2)], &[PROTOCOL]),
        ("stream below another", vec![ended(5), ended(3)], &[PROTOCOL]),
        ("too many streams", (0..200).map(|n| open(n * 2 + 1)).collect(), &[REFUSED_STREAM, 11]),
        // 5.3.1: a stream does not depend on itself.
        (
            "HEADERS that depend on themselves",
            vec![frame(
                HEADERS,
                END_HEADERS | END_STREAM | WITH_PRIORITY,
                1,
                &[&[0, 0, 0, 1, 16][..], &denied("GET")].concat(),
            )],
            &[PROTOCOL],
        ),
        // 6.1: DATA.
        ("DATA of no stream", vec![open(1), frame(DATA, END_STREAM, 0, b"x")], &[PROTOCOL]),
        (
            "DATA padded beyond its end",
            vec![open(1), frame(DATA, END_STREAM | PADDED, 1, b"\x06Test")],
            &[PROTOCOL],
        ),
        (
            "DATA padded without a length",
            vec![open(1), frame(DATA, END_STREAM | PADDED, 1, b"")],
            &[FRAME_SIZE],
        ),
        // 6.2: HEADERS.
        ("HEADERS of no stream", vec![ended(0)], &[PROTOCOL]),
        (
            "HEADERS padded beyond their end",
            vec![frame(
                HEADERS,
                END_HEADERS | END_STREAM | PADDED,
                1,
                &[&[0xff][..], &denied("GET")].concat(),
            )],
            &[PROTOCOL],
        ),
        (
            "HEADERS too short for their priority",
            vec![frame(HEADERS, END_HEADERS | END_STREAM | WITH_PRIORITY, 1, b"\0\0")],
            &[FRAME_SIZE],
        ),
        (
            "HEADERS padded without a length",
            vec![frame(HEADERS, END_HEADERS | END_STREAM | PADDED, 1, b"")],
            &[FRAME_SIZE],
        ),
        // 6.3: PRIORITY.
        ("PRIORITY of no stream", vec![frame(PRIORITY, 0, 0, &[0, 0, 0, 3, 16])], &[PROTOCOL]),
        ("short PRIORITY", vec![open(1), frame(PRIORITY, 0, 1, &[0; 4])], &[FRAME_SIZE]),
        ("long PRIORITY", vec![open(1), frame(PRIORITY, 0, 1, &[0; 6])], &[FRAME_SIZE]),
        // 6.4: RST_STREAM.
        ("RST_STREAM of no stream", vec![reset(0)], &[PROTOCOL]),
        ("short RST_STREAM", vec![open(1), frame(RST_STREAM, 0, 1, &[0; 3])], &[FRAME_SIZE]),
        ("long RST_STREAM", vec![open(1), frame(RST_STREAM, 0, 1, &[0; 5])], &[FRAME_SIZE]),
        // 6.5: SETTINGS.
        ("acknowledged settings", vec![frame(SETTINGS, ACK, 0, &[0; 6])], &[FRAME_SIZE]),
        ("SETTINGS of a stream", vec![frame(SETTINGS, 0, 1, &[])], &[PROTOCOL]),
        ("SETTINGS that break off", vec![frame(SETTINGS, 0, 0, &[0; 3])], &[FRAME_SIZE]),
        ("push neither on nor off", vec![setting(2, 2)], &[PROTOCOL]),
        ("window over its limit", vec![setting(4, 1 << 31)], &[FLOW_CONTROL]),
        (
            "window over its limit after others",
            vec![frame(SETTINGS, 0, 0, b"\0\x01\0\0\0\0\0\x04\0\0\0\x01\0\x04\x80\0\0\0")],
            &[FLOW_CONTROL],
        ),
        ("frames under the least size", vec![setting(5, (1 << 14) - 1)], &[PROTOCOL]),
        ("frames over the greatest size", vec![setting(5, 1 << 24)], &[PROTOCOL]),
        ("extended CONNECT neither on nor off", vec![setting(8, 2)], &[PROTOCOL]),
        // 6.6: only servers promise.
        (
            "PUSH_PROMISE of a client",
            vec![
                open(1),
                frame(PUSH_PROMISE, END_HEADERS, 1, &[&[0, 0, 0, 2][..], &block(&GET)].concat()),
            ],
            &[PROTOCOL],
        ),
        // 6.7: PING.
        ("PING of a stream", vec![frame(PING, 0, 1, &[0; 8])], &[PROTOCOL]),
        ("short PING", vec![frame(PING, 0, 0, &[0; 6])], &[FRAME_SIZE]),
        ("long PING", vec![frame(PING, 0, 0, &[0; 9])], &[FRAME_SIZE]),
        // 6.8: GOAWAY.
        ("GOAWAY of a stream", vec![frame(GOAWAY, 0, 1, &[0; 8])], &[PROTOCOL]),
        ("short GOAWAY", vec![frame(GOAWAY, 0, 0, &[0; 7])], &[FRAME_SIZE]),
        // 6.9: WINDOW_UPDATE.
        ("WINDOW_UPDATE of nothing", vec![window(0, 0)], &[PROTOCOL]),
        ("WINDOW_UPDATE of nothing for a stream", vec![open(1), window(1, 0)], &[PROTOCOL]),
        ("short WINDOW_UPDATE", vec![frame(WINDOW_UPDATE, 0, 0, &[0; 3])], &[FRAME_SIZE]),
        ("long WINDOW_UPDATE", vec![frame(WINDOW_UPDATE, 0, 0, &[0; 5])], &[FRAME_SIZE]),
        (
            "window of the connection that overflows",
            vec![window(0, (1 << 31) - 1), window(0, (1 << 31) - 1)],
            &[FLOW_CONTROL],
        ),
        (
            "window of a stream that overflows",
            vec![open(1), window(1, (1 << 31) - 1), window(1, (1 << 31) - 1)],
            &[FLOW_CONTROL],
        ),
        (
            "window that a setting makes overflow",
            vec![open(1), window(1, (1 << 31) - 1 - 65_535), setting(4, (1 << 31) - 1)],
            &[FLOW_CONTROL],
        ),
        (
            "more DATA than the window",
            [&[open(1)][..], &vec![frame(DATA, 0, 1, &[0; 1 << 14]); 5]].concat(),
            &[FLOW_CONTROL, STREAM_CLOSED, PROTOCOL, 8],
        ),
        // 6.10: CONTINUATION.
        (
            "CONTINUATION of no stream",
            vec![begun(1), frame(CONTINUATION, END_HEADERS, 0, &[])],
            &[PROTOCOL],
        ),
        (
            "CONTINUATION of another stream",
            vec![begun(1), frame(CONTINUATION, END_HEADERS, 3, &[])],
            &[PROTOCOL],
        ),
        (
            "CONTINUATION of what has ended",
            vec![open(1), frame(CONTINUATION, END_HEADERS, 1, &block(&[("x", "y")]))],
            &[PROTOCOL],
        ),
        (
            "CONTINUATION after the last",
            vec![
                begun(1),
                frame(CONTINUATION, END_HEADERS, 1, &block(&[("x", "y")])),
                frame(CONTINUATION, END_HEADERS, 1, &block(&[("x", "y")])),
            ],
            &[PROTOCOL],
        ),
        (
            "CONTINUATION after DATA",
            vec![
                open(1),
                frame(DATA, 0, 1, b"x"),
                frame(CONTINUATION, END_HEADERS, 1, &block(&[("x", "y")])),
            ],
            &[PROTOCOL],
        ),
        // 8.1: trailers end a message.
        (
            "trailers that end nothing",
            vec![open(1), frame(HEADERS, END_HEADERS, 1, &block(&[("x", "y")]))],
            &[PROTOCOL],
        ),
        // 8.2.1: a name has a character.
        ("field without a name", vec![around(&[], &[0x40, 0, 1, b'x'])], &[PROTOCOL]),
        (
            "field without a name in the first of two parts",
            vec![
                frame(HEADERS, END_STREAM, 1, &[&denied("GET"), &b"\x40\0\x01x"[..]].concat()),
                frame(CONTINUATION, END_HEADERS, 1, &[]),
            ],
            &[PROTOCOL],
        ),
        // RFC 7541, 2.3.3 and 6.1: indices.
        ("index 0", vec![around(&[], &[0x80])], &[COMPRESSION]),
        ("index beyond the tables", vec![around(&[], &[0xff, 0])], &[COMPRESSION]),
        ("name beyond the tables", vec![around(&[], &[0x7f, 0x20, 1, b'x'])], &[COMPRESSION]),
        // 4.2 and 6.3: sizes of the table.
        ("table that changes in the middle", vec![around(&[], &[0x20])], &[COMPRESSION]),
        (
            "table that changes between two parts",
            vec![begun(1), frame(CONTINUATION, END_HEADERS, 1, &[0x20])],
            &[COMPRESSION],
        ),
        (
            "index of what the table gave up",
            vec![around(b"\x40\x01x\x01y", &[]), around_on(3, &[0x20, 0xbe])],
            &[COMPRESSION],
        ),
        ("table over its limit", vec![around(&[0x3f, 0xe2, 0x1f], &[])], &[COMPRESSION]),
        // 5.1: integers.
        (
            "integer without an end",
            vec![around(&[], &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f])],
            &[COMPRESSION],
        ),
        // 5.2: strings.
        ("string that breaks off", vec![around(&[], &[0, 1, b'x', 9, b'y'])], &[COMPRESSION]),
        ("padding of a whole byte", vec![around(&[], &huffman(b"\x1f\xff"))], &[COMPRESSION]),
        ("padding of zeros", vec![around(&[], &huffman(b"\x18"))], &[COMPRESSION]),
        ("end of string in a string", vec![around(&[], &huffman(&[0xff; 4]))], &[COMPRESSION]),
    ];
    for (name, frames, codes) in &cases {
        let mut stream = raw(&world);
        // The proxy may end the connection before it has all of them.
        _ = stream.write_all(&frames.concat());
        let code = error(&mut stream).unwrap_or_else(|| panic!("{name}: no error"));
        assert!(codes.contains(&code), "{name}: {code}");
        assert_eq!(origin.seen().connections, 0, "{name}");
    }
}

/// A stream that depends on itself is an error that the crate answers with a reset, and it leaves the
/// fields packed: what comes after them on the connection would be read by another table.
#[test]
fn fields_that_are_left_packed_end_the_connection() {
    let world = World::new(rules(1, &[http(&["GET /public"])]));
    let mut stream = raw(&world);
    let on_itself = [&[0, 0, 0, 1, 16][..], &denied("GET")].concat();
    let flags = END_HEADERS | END_STREAM | WITH_PRIORITY;
    stream.write_all(&frame(HEADERS, flags, 1, &on_itself)).unwrap();
    let end = std::iter::from_fn(|| next(&mut stream)).find(|(kind, ..)| *kind == GOAWAY);
    assert_eq!(end.unwrap().2[4..8], PROTOCOL.to_be_bytes());
}

/// Frames after which a request is answered as if they were not there.
#[test]
fn what_is_no_error_is_borne() {
    let world = World::new(rules(1, &[http(&["GET /public"])]));
    let origin = Origin::ok(&world.server);
    let with_flags = |mut frame: Vec<u8>, flags: u8| {
        frame[4] |= flags;
        frame
    };
    let reserved = |mut frame: Vec<u8>| {
        frame[5] |= 0x80;
        frame
    };
    let padded = |kind, flags, payload: &[u8]| {
        frame(kind, flags | PADDED, 1, &[&[4], payload, &[0; 4]].concat())
    };
    let fields = denied("GET");
    let (head, tail) = fields.split_at(9);
    let cases: Vec<(&str, Vec<Vec<u8>>)> = vec![
        ("nothing", vec![]),
        ("unknown frame", vec![frame(UNKNOWN, 0xff, 0, b"x"), frame(UNKNOWN, 0, 7, b"x")]),
        ("unknown setting", vec![setting(0xff, 1)]),
        ("unknown flags of PING", vec![with_flags(frame(PING, 0, 0, &[0; 8]), 0xf6)]),
        ("unknown flags of SETTINGS", vec![with_flags(setting(4, 100), 0xfe)]),
        ("reserved bit of a frame", vec![reserved(frame(PING, 0, 0, &[0; 8]))]),
        ("reserved bit of a window", vec![frame(WINDOW_UPDATE, 0, 0, &[0x80, 0, 0, 1])]),
        ("one setting twice", vec![setting(4, 1), setting(4, 100)]),
        ("an acknowledged PING", vec![frame(PING, ACK, 0, b"answered")]),
        ("PRIORITY of an idle stream", vec![frame(PRIORITY, 0, 9, &[0, 0, 0, 1, 16])]),
        ("PRIORITY of a closed stream", vec![ended(1), frame(PRIORITY, 0, 1, &[0, 0, 0, 3, 1])]),
        ("WINDOW_UPDATE of a closed stream", vec![ended(1), window(1, 1)]),
        ("RST_STREAM of a closed stream", vec![ended(1), reset(1)]),
        ("DATA after a reset", vec![open(1), reset(1), frame(DATA, END_STREAM, 1, b"x")]),
        ("the longest DATA", vec![open(1), frame(DATA, END_STREAM, 1, &[0; 1 << 14])]),
        ("no DATA", vec![open(1), frame(DATA, 0, 1, &[]), frame(DATA, END_STREAM, 1, &[])]),
        ("padded DATA", vec![open(1), padded(DATA, END_STREAM, b"x")]),
        ("padded HEADERS", vec![padded(HEADERS, END_STREAM | END_HEADERS, &fields)]),
        (
            "HEADERS with a priority",
            vec![frame(
                HEADERS,
                END_STREAM | END_HEADERS | WITH_PRIORITY,
                1,
                &[&[0x80, 0, 0, 3, 255][..], &fields].concat(),
            )],
        ),
        (
            "a block in three parts",
            vec![
                frame(HEADERS, END_STREAM, 1, head),
                frame(CONTINUATION, 0, 1, &[]),
                frame(CONTINUATION, END_HEADERS, 1, tail),
            ],
        ),
        ("a smaller table", vec![around(&[0x20], &[]), around_on(3, &[0x3f, 0xe1, 0x1f])]),
        ("a field for the table", vec![around(&[], b"\x40\x01x\x01y"), around_on(3, &[])]),
        ("numbers that leave some out", vec![ended(7), ended(91)]),
    ];
    for (name, frames) in &cases {
        let mut stream = raw(&world);
        stream.write_all(&[frames.concat(), ended(101)].concat()).unwrap();
        loop {
            let heard = next(&mut stream).unwrap_or_else(|| panic!("{name}: the end"));
            match heard.0 {
                HEADERS if heard.1 == 101 => break,
                GOAWAY => panic!("{name}: {heard:?}"),
                PING => assert_ne!(heard.2, b"answered"),
                _ => {}
            }
        }
    }
    // Pings come back as they were.
    let mut stream = raw(&world);
    stream.write_all(&frame(PING, 0, 0, b"pingpong")).unwrap();
    let heard = std::iter::from_fn(|| next(&mut stream)).find(|(kind, ..)| *kind == PING);
    assert_eq!(heard.unwrap().2, b"pingpong");
    assert_eq!(origin.seen().connections, 0);
}

/// No more of an answer is sent than there is room for, and the rest once there is.
#[test]
fn windows_are_kept() {
    let world = World::new(rules(1, &[http(&["GET /public"])]));
    let mut stream = raw(&world);
    // The body that denies has 15 bytes.
    stream.write_all(&[setting(4, 3), ended(1), frame(PING, 0, 0, &[0; 8])].concat()).unwrap();
    let mut got = 0;
    let mut data = |stream: &mut TcpStream, most: usize| {
        while got < most {
            let (kind, _, payload) = next(stream).unwrap();
            got += if kind == DATA { payload.len() } else { 0 };
        }
        assert_eq!(got, most);
    };
    data(&mut stream, 3);
    stream.write_all(&window(1, 5)).unwrap();
    data(&mut stream, 8);
    // The window shrinks under what was used of it.
    stream.write_all(&[setting(4, 0), window(1, 4)].concat()).unwrap();
    data(&mut stream, 9);
    stream.write_all(&window(1, 100)).unwrap();
    data(&mut stream, 15);
}
