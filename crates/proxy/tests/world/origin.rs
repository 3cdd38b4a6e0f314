//! An origin that keeps the raw bytes that it gets.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex},
    thread,
};

use super::{Namespace, PORT, WAIT};

/// What the origin does once it has a request: writes, and returns whether to go on.
pub(crate) type Answer = Arc<dyn Fn(&str, &mut TcpStream) -> bool + Send + Sync>;

pub(crate) struct Origin {
    seen: Arc<(Mutex<Seen>, Condvar)>,
}

#[derive(Clone, Default)]
pub(crate) struct Seen {
    pub(crate) connections: usize,
    pub(crate) peers: Vec<SocketAddr>,
    pub(crate) bytes: Vec<u8>,
    pub(crate) ended: usize,
}

impl Seen {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

impl Origin {
    /// Answers every request with `200` and `ok`.
    pub(crate) fn ok(namespace: &Namespace) -> Self {
        Self::new(namespace, |_, stream| {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").is_ok()
        })
    }

    /// Answers every request, given as its head, with some bytes, and ends the connection.
    pub(crate) fn saying(namespace: &Namespace, port: u16, answer: &'static [u8]) -> Self {
        Self::on(namespace, port, move |_, stream| {
            _ = stream.write_all(answer);
            false
        })
    }

    pub(crate) fn new(
        namespace: &Namespace,
        answer: impl Fn(&str, &mut TcpStream) -> bool + Send + Sync + 'static,
    ) -> Self {
        Self::on(namespace, PORT, answer)
    }

    pub(crate) fn on(
        namespace: &Namespace,
        port: u16,
        answer: impl Fn(&str, &mut TcpStream) -> bool + Send + Sync + 'static,
    ) -> Self {
        let seen: Arc<(Mutex<Seen>, Condvar)> = Arc::default();
        let answer: Answer = Arc::new(answer);
        let shared = Arc::clone(&seen);
        namespace.run(move || {
            let listener = TcpListener::bind((IpAddr::from(Ipv6Addr::UNSPECIFIED), port)).unwrap();
            thread::spawn(move || {
                for stream in listener.incoming() {
                    let (answer, seen) = (Arc::clone(&answer), Arc::clone(&shared));
                    thread::spawn(move || serve(stream.unwrap(), &answer, &seen));
                }
            });
        });
        Self { seen }
    }

    pub(crate) fn seen(&self) -> Seen {
        self.seen.0.lock().unwrap().clone()
    }

    pub(crate) fn text(&self) -> String {
        self.seen().text()
    }

    pub(crate) fn forget(&self) {
        *self.seen.0.lock().unwrap() = Seen::default();
    }

    pub(crate) fn wait(&self, until: impl Fn(&Seen) -> bool) -> Seen {
        let seen = self.seen.0.lock().unwrap();
        let (seen, late) = self.seen.1.wait_timeout_while(seen, WAIT, |seen| !until(seen)).unwrap();
        assert!(!late.timed_out(), "the origin saw {:?}", String::from_utf8_lossy(&seen.bytes));
        seen.clone()
    }
}

fn serve(mut stream: TcpStream, answer: &Answer, seen: &(Mutex<Seen>, Condvar)) {
    let note = |change: &dyn Fn(&mut Seen)| {
        change(&mut seen.0.lock().unwrap());
        seen.1.notify_all();
    };
    let peer = stream.peer_addr();
    note(&|seen| {
        seen.connections += 1;
        let peer = peer.iter().map(|peer| SocketAddr::new(peer.ip().to_canonical(), peer.port()));
        seen.peers.extend(peer);
    });
    let mut bytes = Vec::new();
    let mut part = [0; 65536];
    'read: while let Ok(count @ 1..) = stream.read(&mut part) {
        note(&|seen| seen.bytes.extend_from_slice(&part[..count]));
        bytes.extend_from_slice(&part[..count]);
        while let Some(head) = take_request(&mut bytes) {
            if !answer(&head, &mut stream) {
                break 'read;
            }
        }
    }
    note(&|seen| seen.ended += 1);
}

/// Takes one whole request from the bytes; what the proxy sends is in order.
fn take_request(bytes: &mut Vec<u8>) -> Option<String> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let body = match field(&head, "content-length") {
        Some(length) => length.parse().unwrap(),
        None if field(&head, "transfer-encoding").is_some() => {
            let last = b"0\r\n\r\n";
            bytes[end..].windows(5).position(|window| window == last)? + 5
        }
        None => 0,
    };
    if bytes.len() < end + body {
        return None;
    }
    bytes.drain(..end + body);
    Some(head)
}

/// The value of a field in a head.
pub(crate) fn field<'h>(head: &'h str, name: &str) -> Option<&'h str> {
    head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}
