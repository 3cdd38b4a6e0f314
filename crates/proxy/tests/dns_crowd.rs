//! Many questions, long answers, and those who do not wait for them: what one pod does to the
//! proxy's DNS, others do not notice.

#![allow(clippy::panic, clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/dns_message.rs"]
mod message;
#[path = "support/name_server.rs"]
mod name_server;
#[path = "support/dns_pods.rs"]
mod pods;
mod world;

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use message::{A, Message, address, cname, raw};
use name_server::{Asked, NameServer, Say, frame, framed};
use palisade_abi::limits;
use palisade_api::proxy::ToProxy;
use pods::{
    OTHER4, QUIET, REFUSED, SERVFAIL, connect, ip, plain, query, rcode, receive, rules, socket,
    usual, with_address, world,
};
use socket2::{Domain, SockRef, Socket, Type};
use world::{CLIENT4, CLIENT6, SERVER4, SERVER6, WAIT, World};

/// Another pod of the node, by IPv6.
const OTHER6: IpAddr = IpAddr::V6(std::net::Ipv6Addr::new(0xfd77, 1, 0, 0, 0, 0, 0, 3));

/// A pod's socket at a port that another one may have had.
fn socket_at(world: &World, client: SocketAddr, server: IpAddr) -> UdpSocket {
    let socket = world.client.run(move || UdpSocket::bind(client).unwrap());
    socket.connect((server, 53)).unwrap();
    socket.set_read_timeout(Some(WAIT)).unwrap();
    socket
}

fn id(message: &[u8]) -> u16 {
    u16::from_be_bytes([message[0], message[1]])
}

/// The address at the end of an answer with one.
fn address_in(answer: &[u8]) -> Ipv4Addr {
    Ipv4Addr::from(*answer.last_chunk::<4>().unwrap())
}

/// An address that tells who asked for what: `n5.cdn.example.com`.
fn of_asker(asked: &Asked) -> Vec<u8> {
    let client = match asked.peer.ip() {
        IpAddr::V4(address) => address.octets()[3],
        IpAddr::V6(address) => address.octets()[15],
    };
    let name = asked.name();
    let number: u8 = name.split('.').next().unwrap()[1..].parse().unwrap();
    with_address(asked, Ipv4Addr::new(93, 184, client, number).into())
}

fn numbered(id: u16, number: u16) -> Vec<u8> {
    Message::query(id, &format!("n{number}.cdn.example.com"), A).bytes()
}

/// Two pods ask from the same port, under the same ids, and all are answered at once.
#[test]
fn every_answer_finds_who_asked() {
    const EACH: u16 = 100;
    let mut all = usual();
    let other = all.endpoints[&OTHER4];
    all.endpoints.insert(OTHER6, other);
    let world = world(all);
    world.client.ip("addr add fd77:1::3/64 dev eth0 nodad");
    let server = NameServer::new(&world.server, |asked| {
        let round = if asked.peer.is_ipv4() { 1 } else { 2 };
        vec![Say::After(round * 2 * usize::from(EACH), of_asker(asked))]
    });
    for (clients, server_address) in [([CLIENT4, OTHER4], SERVER4), ([CLIENT6, OTHER6], SERVER6)] {
        let sockets = clients
            .map(|client| socket_at(&world, SocketAddr::new(client, 40_000), server_address));
        for n in 0..EACH {
            for socket in &sockets {
                socket.send(&numbered(n, n)).unwrap();
            }
        }
        for (socket, last) in sockets.iter().zip([2, 3]) {
            let heard: BTreeSet<_> = (0..EACH)
                .map(|_| receive(socket))
                .map(|answer| (id(&answer), address_in(&answer)))
                .collect();
            let own = (0..EACH).map(|n| (n, Ipv4Addr::new(93, 184, last, n as u8)));
            assert!(heard.iter().copied().eq(own), "{heard:?}");
        }
    }
    let ports: BTreeSet<_> = server.asked().iter().map(|asked| asked.peer).collect();
    assert_eq!(ports.len(), 4 * usize::from(EACH), "each question has a port of its own");
}

/// The port of a client that did not wait is the next one's.
#[test]
fn whoever_has_the_port_next_gets_its_own_answer() {
    let world = world(usual());
    let server = NameServer::new(&world.server, |asked| {
        let count = match asked.tcp {
            false => 3,
            true => 6,
        };
        vec![Say::After(count, of_asker(asked))]
    });
    let from = SocketAddr::new(CLIENT4, 40_001);
    let early = socket_at(&world, from, SERVER4);
    early.send(&numbered(7, 1)).unwrap();
    server.wait(1);
    drop(early);
    let next = socket_at(&world, from, SERVER4);
    next.send(&numbered(7, 2)).unwrap();
    let other = socket_at(&world, SocketAddr::new(OTHER4, 40_001), SERVER4);
    other.send(&numbered(7, 3)).unwrap();
    let mut heard = BTreeSet::new();
    // As from a server without a proxy, an answer to the one before may still come; it is whole.
    while !heard.contains(&2) {
        let answer = receive(&next);
        let number = address_in(&answer).octets()[3];
        assert_eq!(
            answer[12..16],
            numbered(7, number.into())[12..16],
            "its question and its answer"
        );
        assert_eq!(address_in(&answer).octets()[2], 2);
        heard.insert(number);
    }
    assert_eq!(address_in(&receive(&other)), Ipv4Addr::new(93, 184, 3, 3));

    let stream_at = |client: IpAddr| {
        let socket = world.client.run(move || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.bind(&SocketAddr::new(client, 40_002).into()).unwrap();
            socket.connect(&SocketAddr::new(SERVER4, 53).into()).unwrap();
            socket
        });
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(WAIT)).unwrap();
        stream
    };
    let mut early = stream_at(CLIENT4);
    early.write_all(&frame(&numbered(7, 1))).unwrap();
    server.wait(4);
    SockRef::from(&early).set_linger(Some(Duration::ZERO)).unwrap();
    drop(early);
    let (mut next, mut other) = (stream_at(CLIENT4), stream_at(OTHER4));
    next.write_all(&frame(&numbered(7, 2))).unwrap();
    other.write_all(&frame(&numbered(7, 3))).unwrap();
    assert_eq!(address_in(&framed(&mut next).unwrap()), Ipv4Addr::new(93, 184, 2, 2));
    assert_eq!(address_in(&framed(&mut other).unwrap()), Ipv4Addr::new(93, 184, 3, 3));
}

/// Somebody who guesses gets so many guesses; then there is no answer at all.
#[test]
fn a_flood_of_wrong_answers_is_no_answer() {
    let world = world(rules(1, &["*"], &["*"]));
    let _server = NameServer::new(&world.server, |asked| {
        let right = with_address(asked, ip("93.184.216.34"));
        let wrong = |n: u16| {
            let mut wrong = with_address(asked, ip("198.51.100.66"));
            wrong[..2].copy_from_slice(&id(&right).wrapping_add(n).to_be_bytes());
            Say::Answer(wrong)
        };
        let guesses = if asked.name() == "few.org" { 60 } else { 500 };
        (1..=guesses).map(wrong).chain([Say::Answer(right.clone())]).collect()
    });
    for (client, server) in [(CLIENT4, SERVER4), (CLIENT6, SERVER6)] {
        let socket = socket(&world, client, server);
        socket.send(&query("many.org")).unwrap();
        assert_eq!(rcode(&receive(&socket)), SERVFAIL);
        socket.send(&query("few.org")).unwrap();
        let learn = world.agent.learn();
        assert_eq!(learn.addresses, [ip("93.184.216.34")]);
        world.agent.send(&ToProxy::Learned { id: learn.id });
        assert_eq!(rcode(&receive(&socket)), 0);
    }
    assert!(world.agent.unheard().is_empty());
}

/// Hints, services, texts: what they say passes as it is, and opens nothing.
#[test]
fn only_records_of_addresses_are_learned_from() {
    const KINDS: [u16; 7] = [64, 65, 35, 16, 33, 15, 12];
    let world = world(rules(1, &["*"], &["*"]));
    let hint =
        [&[0, 1, 0][..], &[0, 4, 0, 4, 93, 184, 216, 34], &[0, 6, 0, 16], &[0x26; 16]].concat();
    let server = NameServer::new(&world.server, move |asked| {
        let own = asked.name();
        let kind = u16::from_be_bytes(*asked.message[12 + own.len() + 2..].first_chunk().unwrap());
        let answer = Message::answer_to(&asked.message);
        let answer = match own.as_str() {
            "missing.org" => answer.flags(0x8183),
            "failing.org" => answer.flags(0x8182),
            "empty.org" => answer,
            _ => answer.answer(raw(&[0xc0, 12], kind, 1, 60, &hint)).additional(address(
                "target.org",
                60,
                ip("93.184.216.34"),
            )),
        };
        vec![Say::Answer(answer.bytes())]
    });
    for (client, address) in [(CLIENT4, SERVER4), (CLIENT6, SERVER6)] {
        let socket = socket(&world, client, address);
        let kinds = KINDS.map(|kind| ("x.org", kind)).into_iter();
        let codes = ["missing.org", "failing.org", "empty.org"].map(|name| (name, A));
        for (name, kind) in kinds.chain(codes) {
            let before = server.asked().len();
            socket.send(&Message::query(7, name, kind).bytes()).unwrap();
            let answer = receive(&socket);
            assert_eq!(
                rcode(&answer),
                match name {
                    "missing.org" => 3,
                    "failing.org" => 2,
                    _ => 0,
                }
            );
            let count = usize::from(answer[7]) + usize::from(answer[11]);
            assert_eq!(count, if name == "x.org" { 2 } else { 0 }, "{name} {kind}");
            assert_eq!(server.asked().len(), before + 1);
        }
    }
    assert!(world.agent.unheard().is_empty());
}

/// An alias is the server's business: what was asked for counts, not what stands behind it.
#[test]
fn an_alias_of_a_name_that_is_denied_opens_the_name_that_was_asked_for() {
    let world = world(rules(1, &["api.example.com"], &["api.example.com"]));
    let _server = NameServer::new(&world.server, |asked| {
        let answer = Message::answer_to(&asked.message)
            .answer(cname("api.example.com", 60, "evil.org"))
            .answer(address("evil.org", 30, ip("93.184.216.34")));
        vec![Say::Answer(answer.bytes())]
    });
    let socket = socket(&world, CLIENT4, SERVER4);
    socket.send(&query("evil.org")).unwrap();
    assert_eq!(rcode(&receive(&socket)), REFUSED);
    socket.send(&query("api.example.com")).unwrap();
    let learn = world.agent.learn();
    assert_eq!((&*learn.name, learn.ttl), ("api.example.com", 30));
    assert_eq!(learn.addresses, [ip("93.184.216.34")]);
    world.agent.send(&ToProxy::Learned { id: learn.id });
    assert_eq!(rcode(&receive(&socket)), 0);
}

/// Milliseconds of CPU that the proxy has used.
fn cpu(world: &World) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", world.proxy.0.id())).unwrap();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    let ticks = |n: usize| fields[n].parse::<u64>().unwrap();
    (ticks(11) + ticks(12)) * 10
}

/// Answers as long as there can be, of as many names as fit, and aliases of aliases.
#[test]
fn the_longest_answers_take_little() {
    const COUNT: u64 = 50;
    let world = world(rules(1, &["*"], &["*"]));
    let _server = NameServer::new(&world.server, |asked| {
        let mut answer = Message::answer_to(&asked.message);
        let mut length = answer.bytes().len();
        for n in 0.. {
            let (one, next) = (format!("n{n}.org"), format!("n{}.org", n + 1));
            let record = match (asked.name().as_str(), n % 2) {
                ("aliases.org", _) => cname(&one, 60, &next),
                ("names.org", _) | (_, 0) => address(&one, 60, ip("93.184.216.34")),
                _ => address(&asked.name(), 60, ip("93.184.216.35")),
            };
            length += record.len();
            if length > 65_535 {
                return vec![Say::Answer(answer.bytes())];
            }
            answer = answer.answer(record);
        }
        unreachable!("an answer has an end");
    });
    let most = if cfg!(debug_assertions) { 100 } else { 10 };
    for (name, learns) in [("names.org", false), ("aliases.org", false), ("both.org", true)] {
        let mut stream = connect(&world, SERVER4);
        let before = cpu(&world);
        for n in 0..COUNT {
            stream.write_all(&frame(&query(name))).unwrap();
            // What is known need not be learned again.
            if learns && n == 0 {
                let learn = world.agent.learn();
                assert_eq!(learn.addresses, [ip("93.184.216.35")]);
                world.agent.send(&ToProxy::Learned { id: learn.id });
            }
            assert!(framed(&mut stream).unwrap().len() > 65_000);
        }
        let each = (cpu(&world) - before) / COUNT;
        assert!(each < most, "{name}: {each} ms of CPU each");
    }
    // Where it takes seconds, the one that is known holds longer with each answer.
    assert!(world.agent.unheard().iter().all(|learn| learn.name == "both.org"));
}

/// A client that asks and asks and hears nothing.
#[test]
fn a_stream_that_is_not_read_holds_little() {
    let world = world(usual());
    let server = NameServer::new(&world.server, plain);
    let before = world.proxy.memory();
    let mut stream = connect(&world, SERVER4);
    stream.set_write_timeout(Some(QUIET)).unwrap();
    SockRef::from(&stream).set_recv_buffer_size(4096).unwrap();
    let questions = frame(&query("api.example.com")).repeat(100);
    while stream.write_all(&questions).is_ok() {}
    let (asked, after) = (server.asked().len(), world.proxy.memory());
    assert!(after < before + (8 << 10), "{before} KiB, then {after} KiB");
    assert!(asked > 16, "{asked}");
    drop(stream);
    let mut stream = connect(&world, SERVER4);
    stream.write_all(&frame(&query("api.example.com"))).unwrap();
    assert_eq!(rcode(&framed(&mut stream).unwrap()), 0);
}

/// A pod asks in connections, as fast as they are read: all is answered, at the pace of datagrams.
#[test]
fn questions_in_streams_have_the_pace_of_those_in_datagrams() {
    const STREAMS: usize = 4;
    const EACH: usize = 2500;
    const PACED: u64 = (STREAMS * EACH) as u64 - limits::QUESTIONS_AT_ONCE;
    const TIME: Duration = Duration::from_nanos(PACED * limits::QUESTION_NANOS);
    let world = world(usual());
    let _server = NameServer::new(&world.server, plain);
    let questions = frame(&query("evil.org")).repeat(EACH);
    for server in [SERVER4, SERVER6] {
        let begun = Instant::now();
        thread::scope(|scope| {
            for _ in 0..STREAMS {
                let mut read = connect(&world, server);
                let mut write = read.try_clone().unwrap();
                let questions = &questions;
                scope.spawn(move || write.write_all(questions).unwrap());
                scope.spawn(move || {
                    for _ in 0..EACH {
                        assert_eq!(rcode(&framed(&mut read).unwrap()), REFUSED);
                    }
                });
            }
        });
        let took = begun.elapsed();
        println!("{server}: {} questions in {took:?}", STREAMS * EACH);
        assert!(took >= TIME, "{took:?} are less than {TIME:?}");
    }
}

/// One pod asks 50,000 times a second; the questions of another are answered, none is lost, and soon.
#[test]
fn a_flood_of_one_pod_is_that_pods() {
    const A_MILLISECOND: usize = 50;
    const ENOUGH: usize = 50_000;
    let world = world(usual());
    let _server = NameServer::new(&world.server, |asked| {
        if asked.name() == "api.example.com" { plain(asked) } else { Vec::new() }
    });
    let other = socket(&world, OTHER4, SERVER4);
    // One lost is one too many: resolvers wait five seconds before they ask again.
    other.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    let before = world.proxy.memory();
    let most = Duration::from_millis(if cfg!(debug_assertions) { 1000 } else { 50 });
    for name in ["evil.org", "mute.cdn.example.com"] {
        let (over, sent) = (AtomicBool::new(false), AtomicUsize::new(0));
        let greedy = socket(&world, CLIENT4, SERVER4);
        let mut times = Vec::new();
        thread::scope(|scope| {
            scope.spawn(|| {
                let begun = Instant::now();
                while !over.load(Relaxed) && begun.elapsed() < WAIT {
                    let due = begun.elapsed().as_millis() as usize * A_MILLISECOND;
                    if sent.load(Relaxed) > due {
                        thread::sleep(Duration::from_millis(1));
                        continue;
                    }
                    let id = sent.fetch_add(1, Relaxed) as u16;
                    greedy.send(&Message::query(id, name, A).bytes()).unwrap();
                }
            });
            let begun = Instant::now();
            let goes_on =
                || begun.elapsed() < Duration::from_secs(2) || sent.load(Relaxed) < ENOUGH;
            for n in (0..=u16::MAX).take_while(|_| goes_on() && begun.elapsed() < WAIT) {
                let begun = Instant::now();
                other.send(&Message::query(n, "api.example.com", A).bytes()).unwrap();
                let answer = receive(&other);
                assert_eq!((id(&answer), rcode(&answer)), (n, 0));
                times.push(begun.elapsed());
            }
            over.store(true, Relaxed);
        });
        times.sort_unstable();
        let (count, slow) = (times.len(), times[times.len() * 99 / 100]);
        println!(
            "{name}: {sent:?} against {count}, half within {:?}, slow {slow:?}",
            times[count / 2]
        );
        assert!(sent.load(Relaxed) >= ENOUGH && slow < most, "{name}: {times:?}");
    }
    let after = world.proxy.memory();
    assert!(after < before + (16 << 10), "{before} KiB, then {after} KiB");
}
