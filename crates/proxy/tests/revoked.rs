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
    net::{SocketAddr, TcpStream, UdpSocket},
    sync::{Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

use client_hello::hello;
use nix::{
    sys::{
        ptrace,
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};
use palisade_api::{flow::L7, proxy::ToProxy};
use palisade_policy::{l7::NamePattern, model::Application};
use world::{
    CLIENT4, CLIENT6, HOLD, Namespace, RELEASE, SERVER4, SERVER6, WAIT, World,
    agent::{http, rules},
    origin::Origin,
    rest, until,
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
    message::Message::query(1, "a.example", message::A).bytes()
}

/// As it is asked in a connection.
fn framed_question() -> Vec<u8> {
    let message = question();
    [&u16::try_from(message.len()).unwrap().to_be_bytes()[..], &message].concat()
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
            framed_question(),
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
            world.server.nft(HOLD);
            put(before.clone());
            let mut stream = world.connect(server);
            stream.write_all(&bytes).unwrap();
            await_begun(&world, 1);
            put(after.clone());
            world.server.nft(RELEASE);
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
    let cut = world.agent.record(|record| matches!(record.l7, L7::Stream { .. }));
    let L7::Stream { error } = cut.l7 else { unreachable!() };
    assert!(!cut.allowed && error.contains("change of policy"), "{error}");
}

/// A thread that is stopped just before it makes a system call.
struct Stopped(Pid);

impl Stopped {
    /// Stops it at its next call of a kind, for which `cause` gives it a reason.
    fn at(thread: u32, call: libc::c_long, cause: impl FnOnce()) -> Self {
        let path = format!("/proc/{thread}/task/{thread}/syscall");
        let thread = Pid::from_raw(thread.cast_signed());
        let wait = || waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
        ptrace::seize(thread, ptrace::Options::empty()).unwrap();
        ptrace::interrupt(thread).unwrap();
        wait();
        cause();
        let number = format!("{call} ");
        while !fs::read_to_string(&path).unwrap().starts_with(&number) {
            ptrace::syscall(thread, None).unwrap();
            wait();
        }
        Self(thread)
    }

    fn go_on(self) {
        ptrace::detach(self.0, None).unwrap();
    }
}

/// A question in a datagram is judged, and about to be asked, when the rules that deny it come: they
/// are acknowledged once it was.
#[test]
fn no_question_is_asked_after_the_acknowledgement_that_was_judged_before() {
    const REFUSED: u8 = 5;
    for server in [SERVER4, SERVER6] {
        let world = World::new(rules(1, &[Application::Dns(name("a.example"))]));
        let socket = |namespace: &Namespace, at: SocketAddr| {
            let socket = namespace.run(move || UdpSocket::bind(at).unwrap());
            socket.set_read_timeout(Some(WAIT)).unwrap();
            socket
        };
        let at = SocketAddr::new(server, 53);
        let asked = socket(&world.server, at);
        let client = if server.is_ipv4() { CLIENT4 } else { CLIENT6 };
        let asking = socket(&world.client, SocketAddr::new(client, 0));
        asking.connect(at).unwrap();
        // A connection is a worker's, and goes on.
        let mut stream = world.connect_to(at);
        let main = Stopped::at(world.proxy.0.id(), libc::SYS_sendto, || {
            asking.send(&question()).unwrap();
        });
        let other = rules(2, &[Application::Dns(name("b.example"))]);
        world.agent.send(&ToProxy::Snapshot(other));
        let mut heard = [0; 2 + 512];
        while heard[2 + 3] & 0xf != REFUSED {
            stream.write_all(&framed_question()).unwrap();
            stream.read_exact(&mut heard[..2]).unwrap();
            let length = usize::from(u16::from_be_bytes([heard[0], heard[1]]));
            stream.read_exact(&mut heard[2..2 + length]).unwrap();
        }
        thread::sleep(Duration::from_millis(300));
        assert!(!world.agent.is_acknowledged(2), "acknowledged before the question went out");
        main.go_on();
        world.agent.acknowledged(2);
        asked.recv(&mut heard).unwrap();
        asking.recv(&mut heard).unwrap();
        assert_eq!(heard[3] & 0xf, REFUSED);
        // The next one is not asked.
        asking.send(&question()).unwrap();
        asking.recv(&mut heard).unwrap();
        assert_eq!(heard[3] & 0xf, REFUSED);
        asked.set_nonblocking(true).unwrap();
        assert!(asked.recv(&mut heard).is_err());
    }
}

/// The request has arrived, and the server takes its time.
#[test]
fn no_answer_outlives_the_rules_that_allowed_its_request() {
    let before = || http(&["GET /public"]);
    let world = World::new(rules(1, &[before()]));
    let (release, held) = mpsc::channel::<()>();
    let held = Mutex::new(held);
    let origin = Origin::on(&world.server, world::PORT, move |_, stream| {
        // Whoever holds it back is gone when the test failed.
        _ = held.lock().unwrap().recv();
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").is_ok()
    });
    let stays = http(&["GET /public", "GET /more"]);
    let mut version = 1;
    for (after, answered) in [(stays, true), (http(&["GET /other"]), false)] {
        for (server, begun) in [(SERVER4, ""), (SERVER6, ""), (SERVER4, "GET /public HTTP/1.1\r\n")]
        {
            version += 2;
            world.agent.put(rules(version, &[before()]));
            let mut stream = world.connect(server);
            // Perhaps with the beginning of the next one.
            write!(stream, "GET /public HTTP/1.1\r\nhost: a\r\n\r\n{begun}").unwrap();
            origin.wait(|seen| !seen.bytes.is_empty());
            world.agent.put(rules(version + 1, std::slice::from_ref(&after)));
            if !answered {
                // It ends before the server says anything.
                assert_eq!(rest(&mut stream), b"", "{server}");
            }
            release.send(()).unwrap();
            if answered {
                assert!(until(&mut stream, "ok").starts_with("HTTP/1.1 200"), "{server}");
            }
            drop(stream);
            origin.wait(|seen| seen.connections == seen.ended);
            origin.forget();
        }
    }
}
