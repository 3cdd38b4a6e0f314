//! What comes to nothing is told of as well: what was wanted, what policy said, and why it ended.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/client_hello.rs"]
mod client_hello;
#[path = "support/dns_message.rs"]
mod message;
mod world;

use std::{
    io::Write,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use client_hello::hello;
use palisade_api::{
    flow::L7,
    proxy::{AccessRecord, Endpoint, Rules},
};
use palisade_policy::{l7::NamePattern, model::Application};
use world::{
    CLIENT4, CLIENT6, HOLD, PORT, SERVER4, SERVER6, Then, WAIT, World,
    agent::{http, rules},
    origin::Origin,
    rest, say,
};

const UNREACHABLE: &str = "the server cannot be reached";

fn tls() -> Application {
    Application::Tls(vec![NamePattern::name("a.example").unwrap()])
}

/// Rules under which the client's policy asks for one thing, and the server's for another.
fn at_odds(client: Application, server: Application) -> Rules {
    const EGRESS: u32 = 3;
    let mut all = rules(1, &[server]);
    let mut other = rules(1, &[client]);
    all.tables.extend(other.tables.pop_first().map(|(_, table)| (EGRESS, table)));
    let pod = Endpoint { id: 8, identity: 301, ingress: None, egress: Some(EGRESS) };
    all.endpoints.extend([(CLIENT4, pod), (CLIENT6, pod)]);
    all
}

fn denied_by_both(record: &AccessRecord) -> bool {
    let denies = |end: &Option<_>| {
        end.as_ref().is_some_and(|end: &palisade_api::proxy::EndRecord| !end.allowed)
    };
    !record.allowed && denies(&record.egress) && denies(&record.ingress)
}

#[test]
fn ends_that_want_different_things() {
    let world = World::new(at_odds(tls(), http(&["GET /public"])));
    let origin = Origin::ok(&world.server);
    for server in [SERVER4, SERVER6] {
        let request = b"GET /public HTTP/1.1\r\nhost: a\r\n\r\n";
        let to = SocketAddr::new(server, PORT);
        assert_eq!(say(&world.client, to, request, Then::Wait), b"");
        let record = world.agent.record(|record| record.server.ip() == server);
        let why = "the client's policy asks for TLS, the server's for HTTP";
        assert_eq!(record.l7, L7::Stream { error: why.into() });
        assert!(denied_by_both(&record), "{record:?}");
    }
    assert_eq!(origin.seen().connections, 0);
}

#[test]
fn ends_that_want_different_things_of_a_datagram() {
    let names = vec![NamePattern::name("a.example").unwrap()];
    let world = World::new(at_odds(http(&["GET /public"]), Application::Dns(names)));
    for (client, server) in [(CLIENT4, SERVER4), (CLIENT6, SERVER6)] {
        let socket = world.client.run(move || UdpSocket::bind((client, 0)).unwrap());
        let question = message::Message::query(1, "a.example", message::A).bytes();
        socket.send_to(&question, (server, 53)).unwrap();
        let record = world.agent.record(|record| record.server.ip() == server);
        let L7::Dns(dns) = &record.l7 else { panic!("{record:?}") };
        assert_eq!((&*dns.query, &*dns.qtype, &dns.rcode), ("a.example", "A", &None));
        let why = "the client's policy asks for HTTP, the server's for DNS";
        assert_eq!(dns.error.as_deref(), Some(why));
        assert!(denied_by_both(&record), "{record:?}");
    }
}

/// The record of a connection to a server that was not reached.
fn unreached(world: &World, server: SocketAddr) -> AccessRecord {
    world.agent.record(|record| {
        let error = match &record.l7 {
            L7::Tls { error, .. } => error.as_deref(),
            L7::Stream { error } => Some(error.as_str()),
            other => panic!("{other:?}"),
        };
        record.server == server && error == Some(UNREACHABLE)
    })
}

/// A server that says nothing, and one that refuses.
#[test]
fn servers_that_cannot_be_reached() {
    const HELD: u16 = 443;
    const REFUSED: u16 = 444;
    for (application, said) in [(tls(), hello("a.example")), (Application::Any, Vec::new())] {
        let world = World::new(rules(1, &[application]));
        let all =
            |port: u16| [SERVER4, SERVER6].map(|server: IpAddr| SocketAddr::new(server, port));
        for server in all(REFUSED) {
            assert_eq!(say(&world.client, server, &said, Then::Wait), b"");
            assert!(unreached(&world, server).allowed, "policy allows it");
        }
        world.server.nft(HOLD);
        let begun = Instant::now();
        let held = all(HELD).map(|server| {
            let mut stream = world.connect_to(server);
            stream.write_all(&said).unwrap();
            (server, stream)
        });
        for (server, mut stream) in held {
            assert_eq!(rest(&mut stream), b"");
            let record = unreached(&world, server);
            assert!(record.allowed && record.ingress.is_some_and(|end| end.rule.is_some()));
        }
        let took = begun.elapsed();
        assert!(took >= Duration::from_secs(5) && took < WAIT, "{took:?}");
    }
}

/// Whoever wants nobody to see what it asks for could else hang up once the server has it.
#[test]
fn clients_that_hear_no_answer() {
    let world = World::new(rules(1, &[http(&["GET /public/.*", "POST /public/.*"])]));
    let origin = Origin::new(&world.server, |_, _| true);
    for (path, request) in [
        ("/public/get", "GET /public/get HTTP/1.1\r\nhost: a\r\n\r\n"),
        ("/public/whole", "POST /public/whole HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nx"),
        ("/public/part", "POST /public/part HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nx"),
    ] {
        let mut stream = world.connect(SERVER4);
        stream.write_all(request.as_bytes()).unwrap();
        origin.wait(|seen| seen.text().contains(path));
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        drop(stream);
        let record = world.agent.record(|record| match &record.l7 {
            L7::Http(http) => http.url.ends_with(path),
            _ => false,
        });
        let L7::Http(http) = &record.l7 else { panic!("{record:?}") };
        assert!(record.allowed, "{record:?}");
        assert_eq!((http.status, http.error.is_some()), (None, true), "{record:?}");
    }
}
