//! What can be done underneath HTTP: with segments, ports, windows, and many connections.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod world;

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use rustix::net::SendFlags;
use socket2::{Domain, SockRef, Socket, Type};
use world::{
    CLIENT4, PORT, SERVER4, SERVER6, WAIT, World,
    agent::{http, rules},
    origin::Origin,
    rest, status, until,
};

fn public() -> World {
    World::new(rules(1, &[http(&["GET|POST /public(/.*)?"])]))
}

/// Answers each request with its own target.
fn echo(world: &World) -> Origin {
    Origin::new(&world.server, |head, stream| {
        let target = head.split(' ').nth(1).unwrap();
        let length = target.len();
        write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{target}").is_ok()
    })
}

fn get(target: &str) -> Vec<u8> {
    format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n").into_bytes()
}

/// A reset ends the stream, in place of an orderly end.
fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
}

/// A connection from a port of the client's that may have been used just before.
fn from_port(world: &World, client: IpAddr, port: u16) -> TcpStream {
    let server = SocketAddr::new(if client.is_ipv4() { SERVER4 } else { SERVER6 }, PORT);
    let begun = Instant::now();
    let socket = loop {
        let connected = world.client.run(move || {
            let socket = Socket::new(Domain::for_address(server), Type::STREAM, None).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.bind(&SocketAddr::new(client, port).into()).unwrap();
            socket.connect_timeout(&server.into(), WAIT).map(|()| socket)
        });
        match connected {
            Ok(socket) => break socket,
            // A process that another test is just starting still holds the old one.
            Err(error) if error.kind() == std::io::ErrorKind::AddrNotAvailable => {
                assert!(begun.elapsed() < WAIT, "{error}");
            }
            Err(error) => panic!("{error}"),
        }
    };
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(WAIT)).unwrap();
    stream
}

#[test]
fn a_reset_in_a_body_ends_it() {
    let world = public();
    let origin = echo(&world);
    let head = "POST /public HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n";
    for (n, server) in [SERVER4, SERVER6].into_iter().enumerate() {
        let mut stream = world.connect(server);
        stream.write_all(format!("{head}half").as_bytes()).unwrap();
        origin.wait(|seen| seen.bytes.ends_with(b"half") && seen.connections == n + 1);
        reset(stream);
        origin.wait(|seen| seen.ended == n + 1);
    }
    let mut stream = world.connect(SERVER4);
    stream.write_all(&get("/public/next")).unwrap();
    assert!(until(&mut stream, "/public/next").starts_with("HTTP/1.1 200"));
    assert_eq!(origin.text().matches("/public HTTP").count(), 2);
}

/// One client after the other has the same address and port.
#[test]
fn a_port_that_is_used_again_gets_its_own_answers() {
    let world = public();
    let origin = echo(&world);
    for (client, port) in [(CLIENT4, 40_001), (world::CLIENT6, 40_002)] {
        for n in 0..30 {
            let mut stream = from_port(&world, client, port);
            let target = format!("/public/{n}");
            stream.write_all(&get(&target)).unwrap();
            if n % 3 == 0 {
                // Gone before the answer.
                reset(stream);
                continue;
            }
            let answer = until(&mut stream, &target);
            assert!(answer.starts_with("HTTP/1.1 200") && answer.matches("HTTP").count() == 1);
            stream.write_all(&get("/admin")).unwrap();
            assert!(until(&mut stream, "Access denied\r\n").starts_with("HTTP/1.1 403"));
            reset(stream);
        }
    }
    assert!(!origin.text().contains("admin"));
}

/// A client that has said all that it will say still hears the answer; one that has not said all of
/// a request asked for nothing.
#[test]
fn the_end_of_what_a_client_says_is_not_the_end_of_what_it_hears() {
    let world = public();
    let origin = echo(&world);
    let post = "POST /public/a HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n";
    for server in [SERVER4, SERVER6] {
        for (said, heard, arrives) in [
            ("GET /public/a HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), 200, true),
            (format!("{post}body"), 200, true),
            (format!("{post}bo"), 0, false),
            ("GET /public/a HTTP/1.1\r\nHost: a\r\n".to_owned(), 0, false),
            ("GET /admin HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), 403, false),
        ] {
            origin.forget();
            let mut stream = world.connect(server);
            stream.write_all(said.as_bytes()).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            assert_eq!(status(&rest(&mut stream)), heard, "{said}");
            let whole = "\r\n\r\n".to_owned() + if said.ends_with("body") { "body" } else { "" };
            assert_eq!(origin.text().ends_with(&whole), arrives, "{said}: {}", origin.text());
        }
    }
}

/// A byte that is urgent is no part of the stream, here as at the server.
#[test]
fn urgent_bytes_change_nothing_that_was_judged() {
    let world = public();
    let origin = echo(&world);
    for server in [SERVER4, SERVER6] {
        origin.forget();
        for (before, after) in [
            ("GET /public/", "../admin HTTP/1.1\r\nHost: a\r\n\r\n"),
            ("GET /adm", "in HTTP/1.1\r\nHost: a\r\n\r\n"),
            ("GET /public/x HTTP/1.1\r\nHost: a\r\n", "\r\n"),
        ] {
            let mut stream = world.connect(server);
            stream.write_all(before.as_bytes()).unwrap();
            rustix::net::send(&stream, b"!", SendFlags::OOB).unwrap();
            stream.write_all(after.as_bytes()).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let answer = rest(&mut stream);
            let wanted = if before.contains("HTTP") { 200 } else { 403 };
            assert_eq!(status(&answer), wanted, "{server} {before}");
        }
        assert_eq!(origin.text(), "GET /public/x HTTP/1.1\r\nhost: a\r\n\r\n", "{server}");
    }
}

/// Data that comes with the first segment.
#[test]
fn data_in_the_first_segment_is_judged() {
    const FAST_OPEN: SendFlags = SendFlags::from_bits_retain(0x2000_0000);
    let world = public();
    let origin = echo(&world);
    for server in [SERVER4, SERVER6] {
        origin.forget();
        for (target, wanted) in [("/public/fast", 200), ("/admin", 403)] {
            let bytes = get(target);
            let socket = world.client.run(move || {
                // The client may send what it has no cookie for; of both families.
                fs::write("/proc/sys/net/ipv4/tcp_fastopen", "5").unwrap();
                let server = SocketAddr::new(server, PORT);
                let socket = Socket::new(Domain::for_address(server), Type::STREAM, None).unwrap();
                rustix::net::sendto(&socket, &bytes, FAST_OPEN, &server).unwrap();
                socket
            });
            let mut stream = TcpStream::from(socket);
            stream.set_read_timeout(Some(WAIT)).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            assert_eq!(status(&rest(&mut stream)), wanted, "{server} {target}");
        }
        assert_eq!(origin.text(), "GET /public/fast HTTP/1.1\r\nhost: a\r\n\r\n", "{server}");
    }
}

fn descriptors(world: &World) -> usize {
    fs::read_dir(format!("/proc/{}/fd", world.proxy.0.id())).unwrap().count()
}

/// Connections that begin a head and never end it, as many as one client can make.
#[test]
fn ten_thousand_idle_connections_cost_others_nothing() {
    const OTHER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 1, 3));
    let mut all = rules(1, &[http(&["GET /public(/.*)?"])]);
    let peer = all.addresses[&CLIENT4];
    all.addresses.insert(OTHER, peer);
    let world = World::new(all);
    world.client.ip("addr add 10.77.1.3/24 dev eth0");
    let _origin = echo(&world);
    let (files, kibibytes) = (descriptors(&world), world.proxy.memory());
    let many = world.client.run(|| {
        let count = 10_000.min(
            rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap() / 2,
        );
        let connect = |_| {
            let mut stream = TcpStream::connect((SERVER4, PORT)).ok()?;
            stream.write_all(b"GET /pub").ok()?;
            Some(stream)
        };
        (0..count).map(connect).collect::<Vec<_>>()
    });
    // Once those that wait to be accepted are, the next are as quick as ever.
    let mut times: Vec<_> = (0..200)
        .map(|n| {
            let begun = Instant::now();
            let mut stream = from_port(&world, OTHER, 20_000 + n);
            stream.write_all(&get("/public/other")).unwrap();
            assert!(until(&mut stream, "/public/other").starts_with("HTTP/1.1 200"));
            begun.elapsed()
        })
        .collect();
    times.sort_unstable();
    let slow = times[195];
    assert!(slow < Duration::from_millis(500), "{times:?}");
    let (more, grown) = (descriptors(&world) - files, world.proxy.memory() - kibibytes);
    assert!(grown < 64 << 10, "{grown} KiB for {more} descriptors");
    // Each ends, most of them at once, the others when their time for a head is over.
    for mut stream in many.into_iter().flatten() {
        stream.set_read_timeout(Some(WAIT)).unwrap();
        assert!([0, 408].contains(&status(&rest(&mut stream))));
    }
    let begun = Instant::now();
    while descriptors(&world) > files + 4 {
        assert!(begun.elapsed() < WAIT, "{} descriptors are still open", descriptors(&world));
        std::thread::yield_now();
    }
}

/// Bodies that come as slowly as can be, on as many connections as there may be of one client: they
/// are borne, take two descriptors and little memory each, and cost others nothing.
#[test]
fn a_thousand_bodies_that_come_byte_by_byte() {
    const OTHER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 1, 3));
    const COUNT: usize = 1000;
    const LENGTH: usize = 4;
    let mut all = rules(1, &[http(&["GET|POST /public(/.*)?"])]);
    let peer = all.addresses[&CLIENT4];
    all.addresses.insert(OTHER, peer);
    let world = World::new(all);
    world.client.ip("addr add 10.77.1.3/24 dev eth0");
    let origin = echo(&world);
    let (files, kibibytes) = (descriptors(&world), world.proxy.memory());
    let head = format!("POST /public HTTP/1.1\r\nHost: a\r\nContent-Length: {LENGTH}\r\n\r\n");
    let mut slow: Vec<_> = (0..COUNT).map(|_| world.connect(SERVER4)).collect();
    for stream in &mut slow {
        stream.write_all(head.as_bytes()).unwrap();
    }
    origin.wait(|seen| seen.connections == COUNT);
    let mut times = Vec::new();
    for round in 0..LENGTH {
        let begun = Instant::now();
        for stream in &mut slow {
            stream.write_all(b"x").unwrap();
        }
        // A second between two bytes, which others use.
        while begun.elapsed() < Duration::from_secs(1) {
            let asked = Instant::now();
            let mut stream = from_port(&world, OTHER, 20_000 + (times.len() % 10_000) as u16);
            stream.write_all(&get("/public/other")).unwrap();
            assert!(until(&mut stream, "/public/other").starts_with("HTTP/1.1 200"));
            reset(stream);
            times.push(asked.elapsed());
        }
        let (more, grown) = (descriptors(&world) - files, world.proxy.memory() - kibibytes);
        assert!(more <= 2 * COUNT + 8, "{more} descriptors");
        assert!(grown < 32 << 10, "{grown} KiB, round {round}");
    }
    times.sort_unstable();
    let slowest = times[times.len() * 99 / 100];
    assert!(slowest < Duration::from_millis(500), "{slowest:?} of {}", times.len());
    for stream in &mut slow {
        assert!(until(stream, "/public").starts_with("HTTP/1.1 200"));
    }
}

/// Clients that ask for much and read nothing.
#[test]
fn answers_that_nobody_reads_stay_with_the_server() {
    let world = public();
    let _origin = Origin::new(&world.server, |_, stream| {
        let head = "HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n";
        stream.write_all(head.as_bytes()).is_ok()
            && std::iter::repeat_with(|| stream.write_all(&[b'x'; 1 << 16]))
                .all(|sent| sent.is_ok())
    });
    let before = world.proxy.memory();
    let streams: Vec<_> = (0..50)
        .map(|_| {
            let mut stream = world.connect(SERVER4);
            stream.write_all(&get("/public")).unwrap();
            stream.read_exact(&mut [0; 15]).unwrap();
            stream
        })
        .collect();
    let after = world.proxy.memory();
    assert!(after < before + (16 << 10), "{before} KiB, then {after} KiB");
    drop(streams);
}
