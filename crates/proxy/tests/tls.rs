//! Server names of TLS connections that are not terminated.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/client_hello.rs"]
mod client_hello;
mod world;

use std::io::{Read, Write};

use client_hello::hello;
use palisade_api::flow::L7;
use palisade_policy::{l7::NamePattern, model::Application};
use palisade_proxy::tls::{Incomplete, server_name};
use world::{SERVER4, World, agent::rules, origin::Origin, rest};

/// A hello with these bytes as the list of names.
fn hello_with(list: &[u8]) -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([0; 32]);
    body.extend([0, 0, 2, 0x13, 1, 1, 0]);
    let length = |n: usize| u16::try_from(n).unwrap().to_be_bytes();
    body.extend(length(list.len() + 6));
    body.extend([0, 0]);
    body.extend(length(list.len() + 2));
    body.extend(length(list.len()));
    body.extend(list);
    let mut message = vec![1, 0];
    message.extend(length(body.len()));
    message.extend(body);
    record(&message)
}

fn record(bytes: &[u8]) -> Vec<u8> {
    let mut record = vec![22, 3, 1];
    record.extend(u16::try_from(bytes.len()).unwrap().to_be_bytes());
    record.extend(bytes);
    record
}

fn entry(name: &[u8]) -> Vec<u8> {
    let mut entry = vec![0];
    entry.extend(u16::try_from(name.len()).unwrap().to_be_bytes());
    entry.extend(name);
    entry
}

#[test]
fn names_are_read_strictly() {
    let whole = hello("Api.Example.com");
    assert_eq!(server_name(&whole), Ok(Some("api.example.com".into())));
    for length in 0..whole.len() {
        assert_eq!(server_name(&whole[..length]), Err(Incomplete), "{length}");
    }
    // In as many records as there are bytes.
    let split: Vec<u8> = whole[5..].iter().flat_map(|byte| record(&[*byte])).collect();
    assert_eq!(server_name(&split), Ok(Some("api.example.com".into())));
    assert_eq!(server_name(&hello_with(&entry(b"a.b"))), Ok(Some("a.b".into())));
    for bad in [
        hello_with(&entry(b"a.b\0.evil")),
        hello_with(&entry(b"a.b.")),
        hello_with(&entry(b"")),
        hello_with(&entry(b"a..b")),
        hello_with(&entry("\u{e4}".as_bytes())),
        hello_with(&entry(b"*.b")),
        hello_with(&[entry(b"a.b"), entry(b"c.d")].concat()),
        hello_with(&[1, 0, 1, b'a']),
        hello_with(&[0, 0, 9, b'a']),
        hello_with(&entry(b"a b")),
        hello_with(&entry(b"a\x1b[0m")),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        record(&[2, 0, 0, 0]),
        b"\x16\x03\x01\0\0".to_vec(),
        b"\x16\x03\x01\xff\xff".to_vec(),
        record(b"\x01\xff\xff\xff"),
        b"SSH-2.0".to_vec(),
    ] {
        assert_eq!(server_name(&bad), Ok(None), "{bad:x?}");
    }
}

#[test]
fn only_allowed_names_get_through() {
    let names = vec![
        NamePattern::name("api.example.com").unwrap(),
        NamePattern::pattern("*.cdn.io").unwrap(),
    ];
    let world = World::new(rules(1, &[Application::Tls(names)]));
    let origin = Origin::on(&world.server, 443, |_, _| true);
    let ask = |bytes: &[u8]| {
        let mut stream = world.connect_to((SERVER4, 443).into());
        stream.write_all(bytes).unwrap();
        stream
    };
    for name in ["API.example.com", "a.cdn.io"] {
        origin.forget();
        let bytes = hello(name);
        let mut stream = ask(&bytes[..7]);
        stream.write_all(&bytes[7..]).unwrap();
        let seen = origin.wait(|seen| seen.bytes.len() == bytes.len());
        assert_eq!(seen.bytes, bytes, "the server gets what the client said");
    }
    origin.forget();
    for bytes in [
        hello("evil.com"),
        hello("api.example.com.evil.com"),
        hello("a.b.cdn.io"),
        hello("127.0.0.1"),
        b"GET / HTTP/1.1\r\nHost: api.example.com\r\n\r\n".to_vec(),
    ] {
        assert_eq!(rest(&mut ask(&bytes)), b"");
    }
    assert_eq!(origin.seen().connections, 0);
    let record = world.agent.record(|record| !record.allowed);
    assert_eq!(record.l7, L7::Tls { server_name: Some("evil.com".into()), error: None });
    // A name that is no longer allowed ends the connection.
    let mut stream = ask(&hello("a.cdn.io"));
    origin.wait(|seen| seen.connections == 1);
    world.agent.put(rules(2, &[Application::Tls(Vec::new())]));
    assert!(!matches!(stream.read(&mut [0]), Ok(1..)));
    origin.wait(|seen| seen.ended > 0);
    let cut = world.agent.record(|record| matches!(&record.l7, L7::Tls { error: Some(_), .. }));
    let L7::Tls { server_name, error } = cut.l7 else { unreachable!() };
    assert_eq!(server_name.as_deref(), Some("a.cdn.io"));
    assert!(!cut.allowed && error.unwrap().contains("change of policy"));
}
