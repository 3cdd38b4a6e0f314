//! What DNS messages can be made to mean: the real proxy between a client and a name server that
//! says what it is told to.

#![expect(clippy::panic, clippy::unwrap_used, reason = "a test that cannot be set up fails")]

#[path = "support/dns_message.rs"]
mod message;
#[path = "support/name_server.rs"]
mod name_server;
#[path = "support/dns_pods.rs"]
mod pods;
mod world;

use std::{
    io::Write,
    net::{Ipv6Addr, Shutdown, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use message::{A, AAAA, Message, RESPONSE, TRUNCATED, address, cname, opt, option, question, raw};
use name_server::{Asked, NameServer, Say, frame, framed};
use palisade_abi::protocol;
use palisade_api::{
    flow::{Dns, L7},
    proxy::{AccessRecord, Rules, ToProxy},
};
use pods::{
    FORMERR, ID, NOTIMP, OTHER4, QUIET, REFUSED, SERVFAIL, ask, connect, ip, plain, query, rcode,
    receive, rules, silent, socket, usual, with_address, world,
};
use world::{CLIENT4, CLIENT6, SERVER4, SERVER6, WAIT, World, agent::source};

fn dns_of(record: &AccessRecord) -> &Dns {
    let L7::Dns(dns) = &record.l7 else { panic!("{record:?}") };
    dns
}

fn recorded(world: &World, name: &str, code: Option<&str>) -> AccessRecord {
    world.agent.record(|record| {
        let dns = dns_of(record);
        dns.query == name && dns.rcode.as_deref() == code
    })
}

#[test]
fn questions_and_answers_pass_as_they_are() {
    let world = world(usual());
    let server = NameServer::new(&world.server, plain);
    let options = [
        option(10, &[7; 8]),
        option(8, &[0, 1, 24, 0, 10, 0, 0]),
        option(12, &[0; 64]),
        option(65001, b"x"),
    ];
    let questions = [
        query("aPi.ExAmPlE.cOm"),
        Message::query(ID, "x.CDN.example.com", AAAA).bytes(),
        Message::query(ID, "api.example.com", A).additional(opt(0, 0, &[])).bytes(),
        Message::query(ID, "api.example.com", A).additional(opt(u16::MAX, 0, &[])).bytes(),
        Message::query(ID, "api.example.com", A)
            .additional(opt(1232, 0, &options.concat()))
            .bytes(),
    ];
    for (address, client) in [(SERVER4, CLIENT4), (SERVER6, CLIENT6)] {
        for question in &questions {
            let before = server.asked().len();
            let over_udp = ask(&world, address, question);
            let mut stream = connect(&world, address);
            stream.write_all(&frame(question)).unwrap();
            let over_tcp = framed(&mut stream).unwrap();
            let asked = server.wait(before + 2);
            for (asked, answer) in asked[before..].iter().zip([over_udp, over_tcp]) {
                // The same bytes but for the id, from the client's own address.
                assert_eq!(asked.message[2..], question[2..]);
                assert_eq!(asked.peer.ip(), client);
                let expected = with_address(asked, ip("93.184.216.34"));
                assert_eq!((&answer[..2], &answer[2..]), (&question[..2], &expected[2..]));
            }
        }
    }
    let record = recorded(&world, "api.example.com", Some("NOERROR"));
    assert!(record.allowed && record.server.port() == 53);
    assert_eq!(record.egress.unwrap().rule.as_deref(), Some(&source(0)));
    recorded(&world, "x.cdn.example.com", Some("NOERROR"));
}

/// A name server of the node itself has the port at every address.
#[test]
fn answers_pass_where_the_node_has_taken_the_port() {
    let world = world(usual());
    let _server = NameServer::new(&world.server, plain);
    let taken = world.node.run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 53)).unwrap());
    for server in [SERVER4, SERVER6] {
        for (name, code) in [("api.example.com", 0), ("evil.example.com", REFUSED)] {
            assert_eq!(rcode(&ask(&world, server, &query(name))), code, "{name} {server}");
        }
    }
    drop(taken);
    assert_eq!(rcode(&ask(&world, SERVER4, &query("api.example.com"))), 0);
}

#[test]
fn ids_and_ports_are_random() {
    let world = world(usual());
    let server = NameServer::new(&world.server, plain);
    let socket = socket(&world, CLIENT4, SERVER4);
    for _ in 0..20 {
        socket.send(&query("api.example.com")).unwrap();
        receive(&socket);
    }
    let asked = server.wait(20);
    let distinct =
        |values: Vec<u16>| values.into_iter().collect::<std::collections::BTreeSet<_>>().len();
    let id = |asked: &Asked| u16::from_be_bytes([asked.message[0], asked.message[1]]);
    assert!(distinct(asked.iter().map(id).collect()) > 15);
    assert!(distinct(asked.iter().map(|asked| asked.peer.port()).collect()) > 15);
}

#[test]
fn only_names_that_match_are_asked_for() {
    let world = world(usual());
    let server = NameServer::new(&world.server, plain);
    let odd = |name: &[u8]| {
        let question = [name, &[0, 1, 0, 1]].concat();
        Message { questions: vec![question], ..Message::query(ID, "x", A) }.bytes()
    };
    let cases: &[(&str, Vec<u8>, bool)] = &[
        ("the name", query("api.example.com"), true),
        ("in capitals", query("API.EXAMPLE.COM"), true),
        ("one label", query("a.cdn.example.com"), true),
        ("behind it", query("api.example.com.evil.com"), false),
        ("search list", query("api.example.com.default.svc.cluster.local"), false),
        ("before it", query("evilapi.example.com"), false),
        ("two labels", query("a.b.cdn.example.com"), false),
        ("no label", query("cdn.example.com"), false),
        ("the parent", query("example.com"), false),
        ("the root", query(""), false),
        ("a dot in a label", odd(b"\x0bapi.example\x03com\0"), false),
        ("a dot in a label that * stands for", odd(b"\x03a.b\x03cdn\x07example\x03com\0"), false),
        ("NUL", odd(b"\x04api\0\x07example\x03com\0"), false),
        ("homograph", odd("\u{4}\u{430}pi\u{7}example\u{3}com\0".as_bytes()), false),
    ];
    for address in [SERVER4, SERVER6] {
        for (what, message, allowed) in cases {
            let before = server.asked().len();
            let answer = ask(&world, address, message);
            assert_eq!(rcode(&answer), if *allowed { 0 } else { REFUSED }, "{what}");
            assert_eq!(server.asked().len() - before, usize::from(*allowed), "{what}");
            assert_eq!(answer[..2], message[..2], "{what}");
            assert_eq!(answer[12..message.len()], message[12..], "{what}");
            let mut stream = connect(&world, address);
            stream.write_all(&frame(message)).unwrap();
            assert_eq!(framed(&mut stream).unwrap(), answer, "{what}");
            assert_eq!(server.asked().len() - before, 2 * usize::from(*allowed), "{what}");
        }
    }
    let record = recorded(&world, "api.example.com.evil.com", Some("REFUSED"));
    let egress = record.egress.unwrap();
    assert!(!record.allowed && !egress.allowed && egress.rule.is_none());
    recorded(&world, "api\\046example.com", Some("REFUSED"));
}

#[test]
fn what_is_no_question_is_not_passed_on() {
    let world = world(usual());
    let server = NameServer::new(&world.server, plain);
    let good = || Message::query(ID, "api.example.com", A);
    let of = |questions: Vec<Vec<u8>>| Message { questions, ..good() }.bytes();
    let kind = |kind| Message::query(ID, "api.example.com", kind).bytes();
    let cases: &[(&str, Vec<u8>, Option<u8>)] = &[
        ("no question", of(vec![]), Some(FORMERR)),
        (
            "one that is allowed, and one that is not",
            of(vec![question("api.example.com", A), question("evil.org", A)]),
            Some(FORMERR),
        ),
        ("an answer", good().flags(RESPONSE).bytes(), None),
        ("NOTIFY", good().flags(4 << 11).bytes(), Some(NOTIMP)),
        ("UPDATE", good().flags(5 << 11).bytes(), Some(NOTIMP)),
        ("AXFR", kind(252), Some(REFUSED)),
        ("IXFR", kind(251), Some(REFUSED)),
        ("ANY", kind(255), Some(REFUSED)),
        ("pointer to itself", of(vec![vec![0xc0, 12, 0, 1, 0, 1]]), Some(FORMERR)),
        ("pointer forward", of(vec![vec![0xc0, 18, 0, 1, 0, 1]]), Some(FORMERR)),
        (
            "label of 64 bytes",
            of(vec![[&[64][..], &[b'a'; 64], &[0, 0, 1, 0, 1]].concat()]),
            Some(FORMERR),
        ),
        (
            "two OPT records",
            good().additional(opt(1232, 0, &[])).additional(opt(1232, 0, &[])).bytes(),
            Some(FORMERR),
        ),
        ("EDNS version 1", good().additional(opt(1232, 1, &[])).bytes(), Some(0)),
        ("bytes behind it", [good().bytes(), vec![0]].concat(), Some(FORMERR)),
        ("half a header", vec![0; 11], None),
        ("5000 bytes", [good().bytes(), vec![0; 5000]].concat(), None),
    ];
    for address in [SERVER4, SERVER6] {
        let socket = socket(&world, if address.is_ipv4() { CLIENT4 } else { CLIENT6 }, address);
        for (what, message, expected) in cases {
            socket.send(message).unwrap();
            let Some(expected) = expected else {
                silent(&socket);
                continue;
            };
            let answer = receive(&socket);
            assert_eq!(rcode(&answer), *expected, "{what}");
            assert_eq!(answer[6..10], [0; 4], "{what}");
            let mut stream = connect(&world, address);
            stream.write_all(&frame(message)).unwrap();
            assert_eq!(framed(&mut stream).unwrap(), answer, "{what}");
        }
    }
    assert_eq!(server.asked().len(), 0);
}

#[test]
fn streams() {
    let world = world(usual());
    // The first question is answered when the third one came.
    let server = NameServer::new(&world.server, |asked| {
        let answer = with_address(asked, ip("93.184.216.34"));
        if asked.name() == "slow.cdn.example.com" {
            return vec![Say::After(3, answer)];
        }
        vec![Say::Answer(answer)]
    });
    let named = |id, name| Message::query(id, name, A).bytes();

    let mut stream = connect(&world, SERVER4);
    let first = [
        frame(&named(1, "slow.cdn.example.com")),
        frame(&named(2, "fast.cdn.example.com")),
        frame(&named(3, "denied.org")),
    ];
    stream.write_all(&first.concat()).unwrap();
    let mut answers = |count| {
        let answers = (0..count).map(|_| framed(&mut stream).unwrap());
        let mut answers: Vec<_> = answers.map(|answer| (answer[1], rcode(&answer))).collect();
        answers.sort_unstable();
        answers
    };
    assert_eq!(answers(2), [(2, 0), (3, REFUSED)]);
    let mut asking = connect(&world, SERVER4);
    asking.write_all(&frame(&named(9, "api.example.com"))).unwrap();
    assert_eq!(answers(1), [(1, 0)]);
    assert_eq!(framed(&mut asking).unwrap()[1], 9);
    let peers: std::collections::BTreeSet<_> =
        server.asked().iter().map(|asked| asked.peer).collect();
    assert_eq!(peers.len(), 3, "one connection for each question");

    let mut stream = connect(&world, SERVER6);
    for byte in frame(&named(4, "api.example.com")) {
        stream.write_all(&[byte]).unwrap();
    }
    assert_eq!(rcode(&framed(&mut stream).unwrap()), 0);

    // A client that ends its side hears what it asked before.
    stream.write_all(&frame(&named(5, "api.example.com"))).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(framed(&mut stream).unwrap()[1], 5);
    assert!(framed(&mut stream).is_none());

    let mut stream = connect(&world, SERVER4);
    stream.write_all(&[0, 0]).unwrap();
    assert!(framed(&mut stream).is_none(), "a message of no bytes ends the stream");

    let mut stream = connect(&world, SERVER4);
    let long = [named(6, "api.example.com"), vec![0; 65535]].concat();
    stream.write_all(&frame(&long[..65535])).unwrap();
    assert_eq!(rcode(&framed(&mut stream).unwrap()), FORMERR);
    // Half a message, and then nothing.
    stream.write_all(&[0, 40, 1]).unwrap();
    let begun = Instant::now();
    assert!(framed(&mut stream).is_none());
    assert!(begun.elapsed() < WAIT);
    assert_eq!(server.asked().len(), 5);
}

#[test]
fn only_the_answer_is_taken_for_it() {
    let world = world(usual());
    let good = ip("93.184.216.34");
    let server = NameServer::new(&world.server, move |asked| {
        let evil = with_address(asked, ip("198.51.100.66"));
        let mut other_id = evil.clone();
        other_id[0] ^= 1;
        let other_name = Message {
            questions: vec![question("api.example.org", A)],
            ..Message::answer_to(&asked.message)
        };
        let other_type = Message {
            questions: vec![question("api.example.com", AAAA)],
            ..Message::answer_to(&asked.message)
        };
        let mut looping = Message::answer_to(&asked.message).bytes();
        looping[7] = 1;
        let at = looping.len() as u16;
        looping.extend(raw(&(0xc000 | at).to_be_bytes(), A, 1, 1, &[1; 4]));
        let mut many = evil.clone();
        many[6..8].copy_from_slice(&[0xff; 2]);
        let mut said = vec![
            Say::Answer(other_id),
            Say::Answer(asked.message.clone()),
            Say::Answer(other_name.bytes()),
            Say::Answer(other_type.bytes()),
            Say::Answer(looping),
            Say::Answer(many),
            Say::Answer(evil[..20].to_vec()),
        ];
        let [own, another] = match asked.peer.is_ipv4() {
            true => [SERVER4, ip("10.77.2.3")],
            false => [SERVER6, ip("fd77:2::3")],
        };
        said.push(Say::From((own, 5353).into(), evil.clone()));
        said.push(Say::From((another, 53).into(), evil.clone()));
        said.push(Say::Answer(with_address(asked, good)));
        // One that comes too late.
        said.push(Say::Answer(evil));
        said
    });
    for (client, address) in [(CLIENT4, SERVER4), (CLIENT6, SERVER6)] {
        let socket = socket(&world, client, address);
        socket.send(&query("api.example.com")).unwrap();
        assert_eq!(receive(&socket)[2..], with_address(&server.asked()[0], good)[2..]);
        silent(&socket);
    }
}

/// In a stream there is nobody else to wait for.
#[test]
fn an_answer_to_something_else_is_none_in_a_stream() {
    let world = world(rules(1, &["*"], &["*"]));
    let _server = NameServer::new(&world.server, |asked| {
        let evil = with_address(asked, ip("198.51.100.66"));
        let of = |question| {
            let answer = Message::answer_to(&asked.message);
            let answer = answer.answer(address(&asked.name(), 60, ip("198.51.100.66")));
            Message { questions: vec![question], ..answer }.bytes()
        };
        let stray = match asked.name().as_str() {
            "id.org" => [&[!evil[0]], &evil[1..]].concat(),
            "echo.org" => asked.message.clone(),
            "name.org" => of(question("other.org", A)),
            "type.org" => of(question("type.org", AAAA)),
            "short.org" => evil[..20].to_vec(),
            "empty.org" => Vec::new(),
            _ => return plain(asked),
        };
        vec![Say::Answer(stray), Say::Answer(evil)]
    });
    for (client, address) in [(CLIENT4, SERVER4), (CLIENT6, SERVER6)] {
        let ask = |name: &str| {
            let mut stream = connect(&world, address);
            stream.write_all(&frame(&query(name))).unwrap();
            stream
        };
        for name in ["id", "echo", "name", "type", "short", "empty"] {
            let answer = framed(&mut ask(&format!("{name}.org"))).unwrap();
            assert_eq!(rcode(&answer), SERVFAIL, "{name} {address}");
        }
        assert!(world.agent.unheard().is_empty());
        let mut stream = ask("good.org");
        let learn = world.agent.learn();
        assert_eq!((learn.client, &*learn.name), (client, "good.org"));
        world.agent.send(&ToProxy::Learned { id: learn.id });
        assert_eq!(rcode(&framed(&mut stream).unwrap()), 0);
    }
}

#[test]
fn servers_that_fail() {
    let world = world(usual());
    // Nobody listens: the client hears at once.
    assert_eq!(rcode(&ask(&world, SERVER4, &query("api.example.com"))), SERVFAIL);
    let mut stream = connect(&world, SERVER6);
    stream.write_all(&frame(&query("api.example.com"))).unwrap();
    assert_eq!(rcode(&framed(&mut stream).unwrap()), SERVFAIL);
    recorded(&world, "api.example.com", Some("SERVFAIL"));

    // Somebody listens and says nothing: neither does the proxy, and that is recorded.
    let _server = NameServer::new(&world.server, |_| Vec::new());
    let socket = socket(&world, CLIENT4, SERVER4);
    socket.send(&query("mute.cdn.example.com")).unwrap();
    let record = recorded(&world, "mute.cdn.example.com", None);
    assert!(record.allowed && dns_of(&record).latency_ns > 5_000_000_000);
    silent(&socket);
}

#[test]
fn one_pod_cannot_use_up_what_others_need() {
    let world = world(usual());
    let server = NameServer::new(&world.server, |asked| {
        if asked.name() == "api.example.com" { plain(asked) } else { Vec::new() }
    });
    let greedy = socket(&world, CLIENT4, SERVER4);
    for n in 0..300u16 {
        greedy.send(&Message::query(n, "mute.cdn.example.com", A).bytes()).unwrap();
    }
    let other = socket(&world, OTHER4, SERVER4);
    other.send(&query("api.example.com")).unwrap();
    assert_eq!(rcode(&receive(&other)), 0);
    server.wait(256 + 1);
    silent(&greedy);
    assert_eq!(server.asked().len(), 256 + 1);
    let excess = |is_tcp: bool| {
        world.agent.record(|record| {
            let error = dns_of(record).error.as_deref();
            let protocol = if is_tcp { protocol::TCP } else { protocol::UDP };
            record.protocol == protocol && error.is_some_and(|why| why.contains("too many"))
        })
    };
    let record = excess(false);
    assert!(!record.allowed && record.client.ip() == CLIENT4);
    assert_eq!(dns_of(&record).query, "mute.cdn.example.com");
    // Nor can it by streams. Of what is too much one client is told of once a second.
    thread::sleep(Duration::from_secs(1));
    let mut stream = connect(&world, SERVER4);
    stream.write_all(&frame(&query("api.example.com"))).unwrap();
    assert!(framed(&mut stream).is_none());
    assert!(!excess(true).allowed);
}

#[test]
fn an_answer_waits_until_its_addresses_are_in_force() {
    let world = world(rules(1, &["*"], &["*.example.com"]));
    let server = NameServer::new(&world.server, plain);
    for (client, address) in [(CLIENT4, SERVER4), (CLIENT6, SERVER6)] {
        let socket = socket(&world, client, address);
        socket.send(&query("aPi.example.com")).unwrap();
        let learn = world.agent.learn();
        assert_eq!((learn.client, &*learn.name, learn.ttl), (client, "api.example.com", 60));
        assert_eq!(learn.addresses, [ip("93.184.216.34")]);
        silent(&socket);
        world.agent.send(&ToProxy::Learned { id: learn.id });
        assert_eq!(rcode(&receive(&socket)), 0);
        // What is known need not be learned again.
        socket.send(&query("api.example.com")).unwrap();
        assert_eq!(rcode(&receive(&socket)), 0);
        // No rule opens this name.
        socket.send(&query("api.example.org")).unwrap();
        assert_eq!(rcode(&receive(&socket)), 0);

        let mut stream = connect(&world, address);
        stream.write_all(&frame(&query("tcp.example.com"))).unwrap();
        let learn = world.agent.learn();
        world.agent.send(&ToProxy::LearnRefused { id: learn.id });
        assert_eq!(rcode(&framed(&mut stream).unwrap()), SERVFAIL);

        // An agent that says nothing.
        socket.send(&query("never.example.com")).unwrap();
        world.agent.learn();
        assert_eq!(rcode(&receive(&socket)), SERVFAIL);
    }
    assert!(world.agent.unheard().is_empty());
    let record = recorded(&world, "api.example.com", Some("NOERROR"));
    let dns = dns_of(&record);
    assert_eq!((dns.addresses.clone(), dns.ttl), (vec![ip("93.184.216.34")], Some(60)));
    drop(server);
}

/// A pod goes, and the next one has its address and its number: the agent learned nothing for it.
#[test]
fn what_one_pod_was_told_the_next_one_learns_anew() {
    let world = world(rules(1, &["*"], &["*"]));
    let _server = NameServer::new(&world.server, plain);
    let mut without = rules(2, &["*"], &["*"]);
    without.endpoints.retain(|address, _| *address == OTHER4);
    let there = [rules(3, &["*"], &["*"]), rules(5, &["*"], &["*"])];
    for (after, (client, server)) in there.into_iter().zip([(CLIENT4, SERVER4), (CLIENT6, SERVER6)])
    {
        let socket = socket(&world, client, server);
        let learned = || {
            socket.send(&query("api.example.com")).unwrap();
            let learn = world.agent.learn();
            world.agent.send(&ToProxy::Learned { id: learn.id });
            assert_eq!((rcode(&receive(&socket)), learn.client), (0, client));
        };
        learned();
        world.agent.put(Rules { version: after.version - 1, ..without.clone() });
        world.agent.put(after);
        learned();
    }
}

/// The rules change while the agent is asked, and are in force before it answers.
#[test]
fn an_answer_that_waited_is_judged_by_the_newest_rules() {
    let world = world(rules(1, &["*"], &["*"]));
    let _server = NameServer::new(&world.server, plain);
    let mut version = 1;
    let mut change = |names: &[&str]| {
        version += 1;
        world.agent.put(rules(version, names, &["*"]));
    };
    for (number, address) in [SERVER4, SERVER6].into_iter().enumerate() {
        let (udp, tcp) = (format!("udp{number}.org"), format!("tcp{number}.org"));
        let client = if address.is_ipv4() { CLIENT4 } else { CLIENT6 };
        let socket = socket(&world, client, address);
        socket.send(&query(&udp)).unwrap();
        let of_udp = world.agent.learn();
        let mut stream = connect(&world, address);
        stream.write_all(&frame(&query(&tcp))).unwrap();
        let of_tcp = world.agent.learn();
        change(&["other.org"]);
        for learn in [of_udp, of_tcp] {
            world.agent.send(&ToProxy::Learned { id: learn.id });
        }
        assert_eq!(rcode(&receive(&socket)), REFUSED);
        assert_eq!(rcode(&framed(&mut stream).unwrap()), REFUSED);
        change(&["*"]);
    }
}

#[test]
fn no_answer_overtakes_its_addresses() {
    let world = world(rules(1, &["*"], &["*"]));
    let _server = NameServer::new(&world.server, |asked| {
        let n: u32 = asked.name().strip_prefix('n').unwrap().parse().unwrap();
        vec![Say::Answer(with_address(asked, std::net::Ipv4Addr::from(0x5db8_0000 + n).into()))]
    });
    let (socket, agent) = (socket(&world, CLIENT4, SERVER4), &world.agent);
    let count = 10_000;
    thread::scope(|scope| {
        let learning = scope.spawn(|| {
            for n in 0..count {
                let learn = agent.learn();
                assert_eq!(learn.name, format!("n{n}"), "the answer before was not held");
                agent.send(&ToProxy::Learned { id: learn.id });
            }
        });
        for n in 0..count {
            socket.send(&query(&format!("n{n}"))).unwrap();
            assert_eq!(rcode(&receive(&socket)), 0);
            assert!(agent.unheard().is_empty());
        }
        learning.join().unwrap();
    });
}

#[test]
fn only_addresses_of_the_name_outside_the_cluster_are_learned() {
    let world = world(rules(1, &["*"], &["*"]));
    let many = |answer: Message, count: u32| {
        (0..count).fold(answer, |answer, n| {
            answer.answer(raw(&[0xc0, 12], A, 1, 60, &(0x5db8_0000 + n).to_be_bytes()))
        })
    };
    let _server = NameServer::new(&world.server, move |asked| {
        let own = asked.name();
        let answer = Message::answer_to(&asked.message);
        let answer = match own.as_str() {
            "strangers.org" => answer
                .answer(address("other.org", 60, ip("198.51.100.1")))
                .answer(address("sub.strangers.org", 60, ip("198.51.100.2")))
                .answer(address(&own, 60, ip("93.184.216.34")))
                .authority(address(&own, 60, ip("198.51.100.3")))
                .additional(address(&own, 60, ip("198.51.100.4"))),
            "alias.org" => answer
                .answer(address("end.net", 50, ip("93.184.216.35")))
                .answer(cname("middle.net", 7, "end.net"))
                .answer(cname(&own, 90, "middle.net")),
            "loop.org" => {
                answer.answer(cname(&own, 60, "other.org")).answer(cname("other.org", 60, &own))
            }
            "inside.org" => [
                "10.244.3.4",
                "203.0.113.9",
                "10.77.2.2",
                "127.0.0.1",
                "169.254.169.254",
                "0.0.0.0",
                "255.255.255.255",
                "224.0.0.1",
            ]
            .into_iter()
            .fold(answer, |answer, inside| answer.answer(address(&own, 60, ip(inside)))),
            "inside6.org" => ["::1", "::", "fe80::1", "ff02::1", "::ffff:10.0.0.1", "fd77:2::2"]
                .into_iter()
                .fold(answer, |answer, inside| answer.answer(address(&own, 60, ip(inside)))),
            "mixed.org" => answer.answer(address(&own, 0, ip("10.244.3.4"))).answer(address(
                &own,
                0,
                ip("2606:2800::1"),
            )),
            "full.org" => many(answer, 1000),
            "over.org" => many(answer, 1001),
            "part.org" if asked.tcp => answer.answer(address(&own, 60, ip("93.184.216.36"))),
            "part.org" => {
                answer.flags(RESPONSE | TRUNCATED).answer(address(&own, 60, ip("93.184.216.37")))
            }
            "missing.org" => {
                answer.flags(RESPONSE | 3).answer(address(&own, 60, ip("93.184.216.38")))
            }
            other => panic!("{other}"),
        };
        vec![Say::Answer(answer.bytes())]
    });
    let learned = |name: &str| {
        let learn = world.agent.learn();
        assert_eq!(learn.name, name);
        world.agent.send(&ToProxy::Learned { id: learn.id });
        (learn.addresses, learn.ttl)
    };
    let over_tcp = |name: &str| {
        let mut stream = connect(&world, SERVER4);
        stream.write_all(&frame(&query(name))).unwrap();
        stream
    };
    let socket = socket(&world, CLIENT4, SERVER4);
    let cases = [
        ("strangers.org", vec![ip("93.184.216.34")], 60),
        ("alias.org", vec![ip("93.184.216.35")], 7),
        ("mixed.org", vec![ip("2606:2800::1")], 0),
    ];
    for (name, addresses, ttl) in cases {
        socket.send(&query(name)).unwrap();
        assert_eq!(learned(name), (addresses, ttl));
        assert_eq!(rcode(&receive(&socket)), 0);
    }
    for (name, code) in [("loop.org", 0), ("inside.org", 0), ("inside6.org", 0), ("missing.org", 3)]
    {
        socket.send(&query(name)).unwrap();
        assert_eq!(rcode(&receive(&socket)), code, "{name}");
    }
    socket.send(&query("part.org")).unwrap();
    assert_eq!(receive(&socket)[2] & 2, 2, "the mark of a part stays");
    assert!(world.agent.unheard().is_empty());
    let mut stream = over_tcp("part.org");
    assert_eq!(learned("part.org"), (vec![ip("93.184.216.36")], 60));
    assert_eq!(rcode(&framed(&mut stream).unwrap()), 0);
    let mut stream = over_tcp("full.org");
    assert_eq!(learned("full.org").0.len(), 1000);
    assert_eq!(framed(&mut stream).unwrap()[6..8], 1000u16.to_be_bytes());
    // What has no room would be closed, so nobody is told of it; of a name that opens nothing, all.
    let mut stream = over_tcp("over.org");
    assert_eq!(rcode(&framed(&mut stream).unwrap()), SERVFAIL);
    let record = recorded(&world, "over.org", Some("SERVFAIL"));
    assert!(dns_of(&record).error.as_deref().unwrap().contains("more addresses"));
    assert!(world.agent.unheard().is_empty());
    world.agent.put(rules(2, &["*"], &["other.org"]));
    let mut stream = over_tcp("over.org");
    assert_eq!(framed(&mut stream).unwrap()[6..8], 1001u16.to_be_bytes());
}

#[test]
fn without_the_agent() {
    let mut world = world(rules(1, &["*"], &["*.example.com"]));
    let _server = NameServer::new(&world.server, plain);
    let socket = socket(&world, CLIENT4, SERVER4);
    let answers = |name: &str, code| {
        socket.send(&query(name)).unwrap();
        assert_eq!(rcode(&receive(&socket)), code, "{name}");
    };
    socket.send(&query("known.example.com")).unwrap();
    let learn = world.agent.learn();
    world.agent.send(&ToProxy::Learned { id: learn.id });
    assert_eq!(rcode(&receive(&socket)), 0);

    world.agent.hang_up();
    answers("known.example.com", 0);
    answers("new.example.com", SERVFAIL);
    answers("other.org", 0);

    world.restart();
    // The new process is there as soon as it answers.
    socket.set_read_timeout(Some(QUIET)).unwrap();
    let mut buffer = [0; 512];
    let begun = Instant::now();
    while socket.send(&query("other.org")).is_err() || socket.recv(&mut buffer).is_err() {
        assert!(begun.elapsed() < WAIT, "the proxy does not come back");
    }
    socket.set_read_timeout(Some(WAIT)).unwrap();
    answers("new.example.com", SERVFAIL);

    world.agent.come_back();
    world.agent.put(rules(2, &["*"], &["*.example.com"]));
    socket.send(&query("new.example.com")).unwrap();
    let learn = world.agent.learn();
    world.agent.send(&ToProxy::Learned { id: learn.id });
    assert_eq!(rcode(&receive(&socket)), 0);
}

#[test]
fn rules_that_change_hold_at_once() {
    let world = world(rules(1, &["*"], &[]));
    let server = NameServer::new(&world.server, |asked| {
        let answer = with_address(asked, ip("93.184.216.34"));
        vec![if asked.name() == "held.org" { Say::After(3, answer) } else { Say::Answer(answer) }]
    });
    let socket = socket(&world, CLIENT4, SERVER4);
    let mut stream = connect(&world, SERVER4);
    stream.write_all(&frame(&query("x.org"))).unwrap();
    assert_eq!(rcode(&framed(&mut stream).unwrap()), 0);
    let other = self::socket(&world, OTHER4, SERVER4);
    socket.send(&query("held.org")).unwrap();
    server.wait(2);

    world.agent.put(rules(2, &["y.org"], &[]));
    // The question was asked under rules that allowed it; the answer comes under others.
    other.send(&query("y.org")).unwrap();
    assert_eq!(rcode(&receive(&other)), 0);
    assert_eq!(rcode(&receive(&socket)), REFUSED);
    stream.write_all(&frame(&query("x.org"))).unwrap();
    assert_eq!(rcode(&framed(&mut stream).unwrap()), REFUSED);

    // What the ends deny as a whole is not even answered.
    world.agent.put(Rules { version: 3, ..Rules::default() });
    socket.send(&query("y.org")).unwrap();
    silent(&socket);
}

/// What a program of the client's side says, and whether it was content.
fn run(world: &World, program: &str, arguments: &[&str]) -> (bool, String) {
    let mut command = std::process::Command::new(program);
    command.args(arguments);
    let output = world.client.run(move || command.output().unwrap());
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

/// Both kinds of addresses for every name.
fn both(asked: &Asked) -> Vec<Say> {
    let kind = &asked.message[12 + asked.name().len() + 2..][..2];
    let found = if kind == AAAA.to_be_bytes() { "2606:2800::1" } else { "93.184.216.34" };
    vec![Say::Answer(with_address(asked, ip(found)))]
}

#[test]
fn dig() {
    let world = world(usual());
    let server = NameServer::new(&world.server, plain);
    for address in [SERVER4, SERVER6] {
        for transport in ["+notcp", "+tcp"] {
            let dig = |arguments: &[&str]| {
                let at = format!("@{address}");
                let options = ["-r", &at, transport, "+tries=1", "+timeout=10"];
                let (content, text) = run(&world, "dig", &[&options, arguments].concat());
                assert!(content, "{text}");
                text
            };
            let before = server.asked().len();
            // EDNS, a cookie, a client's network, padding.
            for options in [
                &["+noedns"][..],
                &["+edns=0", "+bufsize=4096", "+cookie", "+dnssec"],
                &["+subnet=192.0.2.0/24", "+padding=128", "+nsid"],
            ] {
                let text = dig(&[&["api.example.com", "A"], options].concat());
                assert!(text.contains("status: NOERROR"), "{text}");
                assert!(text.contains("93.184.216.34") && !text.contains("WARNING"), "{text}");
            }
            assert_eq!(server.asked().len(), before + 3);
            for (name, kind, status) in [
                ("evil.org", "A", "REFUSED"),
                ("api.example.com", "AXFR", ""),
                ("api.example.com", "ANY", "REFUSED"),
            ] {
                let text = dig(&[name, kind]);
                assert!(
                    text.contains(status) && !text.contains("93.184."),
                    "{name} {kind}: {text}"
                );
            }
            let text = dig(&["api.example.com", "+edns=1", "+noednsnegotiation"]);
            assert!(text.contains("status: BADVERS"), "{text}");
            assert_eq!(server.asked().len(), before + 3);
        }
    }
}

/// The resolver of the C library asks for both kinds of addresses at once, through one socket, and
/// first for names that it makes of the search list.
#[test]
fn the_resolver_of_the_c_library() {
    let world = world(rules(1, &["api.example.com"], &["api.example.com"]));
    let server = NameServer::new(&world.server, both);
    let file = |name: &str, text: &str| {
        let path = world.directory.join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let switch = file("nsswitch.conf", "hosts: dns\n");
    for (client, address, over_tcp) in
        [(CLIENT4, SERVER4, ""), (CLIENT6, SERVER6, ""), (CLIENT4, SERVER4, "use-vc")]
    {
        let before = server.asked().len();
        let resolver = file(
            "resolv.conf",
            &format!(
                "nameserver {address}\nsearch cluster.local\noptions ndots:5 attempts:1 {over_tcp}\n"
            ),
        );
        let getent = |name: &str| {
            let script = format!(
                "mount --bind {resolver} /etc/resolv.conf && \
                 mount --bind {switch} /etc/nsswitch.conf && exec getent ahosts {name}"
            );
            run(&world, "unshare", &["--mount", "sh", "-c", &script])
        };
        let (content, text) = thread::scope(|scope| {
            let asking = scope.spawn(|| getent("api.example.com"));
            // What is known need not be learned again.
            if over_tcp.is_empty() {
                for _ in 0..2 {
                    let learn = world.agent.learn();
                    assert_eq!((learn.client, &*learn.name), (client, "api.example.com"));
                    world.agent.send(&ToProxy::Learned { id: learn.id });
                }
            }
            asking.join().unwrap()
        });
        assert!(content, "{address} {over_tcp}: {text}");
        assert!(text.contains("93.184.216.34") && text.contains("2606:2800::1"), "{text}");
        let (content, text) = getent("evil.org");
        assert!(!content, "{text}");
        // Neither for that one, nor for those of the search list.
        let asked = server.asked().split_off(before);
        assert!(asked.len() == 2 && asked.iter().all(|asked| asked.name() == "api.example.com"));
    }
}
