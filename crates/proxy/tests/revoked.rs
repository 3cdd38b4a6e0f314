//! What was allowed when the connection to the server began, and no longer is once it stands: none
//! of it arrives after the rules that deny it were acknowledged.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/client_hello.rs"]
mod client_hello;
#[path = "support/dns_message.rs"]
mod message;
mod world;

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use client_hello::hello;
use palisade_policy::{l7::NamePattern, model::Application};
use world::{
    Namespace, SERVER4, SERVER6, WAIT, World,
    agent::{http, rules},
    origin::Origin,
};

/// A request over HTTP/2: the preface, empty settings, and `GET /public` on the first stream.
const HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\
    \0\0\0\x04\0\0\0\0\0\
    \0\0\x0e\x01\x05\0\0\0\x01\x82\x86\x04\x07/public\x01\x01a";
/// The stream is taken back.
const HTTP2_CANCEL: &[u8] = b"\0\0\x04\x03\0\0\0\0\x01\0\0\0\x08";

fn name(name: &str) -> Vec<NamePattern> {
    vec![NamePattern::name(name).unwrap()]
}

fn question() -> Vec<u8> {
    let message = message::Message::query(1, "a.example", message::A).bytes();
    [&u16::try_from(message.len()).unwrap().to_be_bytes()[..], &message].concat()
}

fn nft(namespace: &Namespace, rules: &'static str) {
    namespace.run(move || assert!(Command::new("nft").arg(rules).status().unwrap().success()));
}

/// Waits until the proxy asks for so many connections and has none of them.
fn await_begun(world: &World, count: usize) {
    const SYN_SENT: &str = "02";
    let deadline = Instant::now() + WAIT;
    let begun = || {
        world.node.run(|| {
            let tables = ["tcp", "tcp6"].map(|table| format!("/proc/thread-self/net/{table}"));
            let lines = tables.map(|table| fs::read_to_string(table).unwrap()).concat();
            lines.lines().filter(|line| line.split_whitespace().nth(3) == Some(SYN_SENT)).count()
        })
    };
    while begun() != count {
        assert!(Instant::now() < deadline, "the proxy does not connect");
        thread::sleep(Duration::from_millis(5));
    }
}

fn read_until(stream: &mut TcpStream, end: &[u8]) {
    let mut bytes = Vec::new();
    let mut part = [0; 4096];
    while end.is_empty() || !bytes.windows(end.len()).any(|window| window == end) {
        match stream.read(&mut part) {
            Ok(0) => return,
            Ok(count) => bytes.extend_from_slice(&part[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                panic!("no end within {WAIT:?} after {}", String::from_utf8_lossy(&bytes))
            }
            Err(_) => return,
        }
    }
}

#[test]
fn nothing_that_waits_for_its_connection_outlives_the_rules() {
    let http1 = b"GET /public HTTP/1.1\r\nhost: a\r\n\r\n".to_vec();
    let other = http(&["GET /other"]);
    let cases = [
        ("HTTP/1", http(&["GET /public"]), other.clone(), http1.clone(), &b"Access denied\r\n"[..]),
        ("HTTP/2", http(&["GET /public"]), other.clone(), HTTP2.into(), HTTP2_CANCEL),
        (
            "TLS",
            Application::Tls(name("a.example")),
            Application::Tls(name("b")),
            hello("a.example"),
            b"",
        ),
        ("anything", Application::Any, other, http1, b""),
        (
            "DNS",
            Application::Dns(name("a.example")),
            Application::Dns(name("b.example")),
            question(),
            // Response, recursion desired; refused.
            b"\0\x01\x81\x05",
        ),
    ];
    let world = World::new(rules(1, &[http(&["GET /public"])]));
    let origin = Origin::on(&world.server, world::PORT, |_, stream| {
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").is_ok()
    });
    let mut version = 1;
    let mut put = |application| {
        version += 1;
        world.agent.put(rules(version, &[application]));
    };
    for (kind, before, after, bytes, end) in cases {
        for server in [SERVER4, SERVER6] {
            let hold = "add table inet hold; add chain inet hold in { type filter hook input priority 0; }; \
                        add rule inet hold in tcp flags & (syn|ack) == syn drop";
            nft(&world.server, hold);
            put(before.clone());
            let mut stream = world.connect(server);
            stream.write_all(&bytes).unwrap();
            await_begun(&world, 1);
            put(after.clone());
            nft(&world.server, "delete table inet hold");
            read_until(&mut stream, end);
            drop(stream);
            await_begun(&world, 0);
            let seen = origin.wait(|seen| seen.connections == seen.ended);
            assert!(
                seen.bytes.is_empty()
                    || seen.bytes.starts_with(b"PRI") && !seen.text().contains("public"),
                "{kind} {server}: {:?} arrived",
                seen.text(),
            );
            // The same arrives where the rules stay.
            put(before.clone());
            let mut stream = world.connect(server);
            stream.write_all(&bytes).unwrap();
            origin.wait(|seen| seen.connections > 0 && !seen.bytes.is_empty());
            drop(stream);
            origin.wait(|seen| seen.connections == seen.ended);
            origin.forget();
        }
    }
}
