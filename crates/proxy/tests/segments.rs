//! Segments as no kernel would send them: overlapping, out of order, before the connection stands.
//! What is judged is the stream that the proxy's own kernel makes of them, and the server gets a
//! request made of that stream, whatever the segments would have said to its own kernel.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod world;

use std::{
    io::Read,
    net::{IpAddr, SocketAddr},
    process::Command,
};

use palisade_abi::protocol;
use socket2::{Domain, Protocol, Socket, Type};
use world::{
    CLIENT4, CLIENT6, PORT, SERVER4, SERVER6, WAIT, World,
    agent::{http, rules},
    origin::Origin,
    status,
};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const PUSH: u8 = 8;
const ACK: u8 = 16;

// As long as each other: a segment of the one fits into the other.
const ALLOWED: &[u8] = b"GET /public HTTP/1.1\r\nHost: a\r\n\r\n";
const DENIED: &[u8] = b"GET /secret HTTP/1.1\r\nHost: a\r\n\r\n";

/// A client's end of a connection of which each segment is written by hand.
struct Connection {
    socket: Socket,
    client: SocketAddr,
    server: SocketAddr,
    /// The next byte of the server's.
    next: u32,
    heard: Vec<u8>,
}

/// Number of the first byte of the client's stream.
const FIRST: u32 = 0xffff_fff0;

impl Connection {
    /// Connects; the first segment may carry what no first segment does.
    fn open(world: &World, client: SocketAddr, early: &[u8]) -> Self {
        let server = if client.is_ipv4() { SERVER4 } else { SERVER6 };
        let socket = world.client.run(move || {
            let domain = Domain::for_address(client);
            let socket = Socket::new(domain, Type::RAW, Some(Protocol::TCP)).unwrap();
            socket.bind(&SocketAddr::new(client.ip(), 0).into()).unwrap();
            socket
        });
        socket.set_read_timeout(Some(WAIT)).unwrap();
        let server = SocketAddr::new(server, PORT);
        let mut connection = Self { socket, client, server, next: 0, heard: Vec::new() };
        connection.send(SYN, FIRST.wrapping_sub(1), early);
        let (flags, number, _) = connection.receive();
        assert_eq!(flags & (SYN | ACK | RST), SYN | ACK, "no connection");
        connection.next = number.wrapping_add(1);
        connection.send(ACK, FIRST, &[]);
        connection
    }

    /// Sends bytes as those that the stream has from a place on.
    fn say(&self, place: i32, bytes: &[u8]) {
        self.send(ACK | PUSH, FIRST.wrapping_add_signed(place), bytes);
    }

    fn send(&self, flags: u8, number: u32, data: &[u8]) {
        let mut segment =
            [self.client.port().to_be_bytes(), self.server.port().to_be_bytes()].concat();
        segment.extend(number.to_be_bytes());
        segment.extend(if flags & ACK != 0 { self.next } else { 0 }.to_be_bytes());
        // Length of the header, window; no checksum yet, nothing urgent.
        segment.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
        segment.extend(data);
        let length = u32::try_from(segment.len()).unwrap().to_be_bytes();
        let pseudo = [octets(self.client.ip()), octets(self.server.ip()), length.to_vec()].concat();
        let pseudo = [&pseudo[..], &[0, 0, 0, protocol::TCP]].concat();
        let sum = checksum(&[pseudo, segment.clone()].concat()).to_be_bytes();
        segment[16..18].copy_from_slice(&sum);
        let server = SocketAddr::new(self.server.ip(), 0);
        self.socket.send_to(&segment, &server.into()).unwrap();
    }

    /// The next segment from the server: flags, number, data.
    fn receive(&self) -> (u8, u32, Vec<u8>) {
        let mut buffer = [0; 4096];
        loop {
            let length = (&self.socket).read(&mut buffer).expect("the server says something");
            // Of IPv4 the packet's header comes, too.
            let header = if self.client.is_ipv4() { usize::from(buffer[0] & 15) * 4 } else { 0 };
            let segment = &buffer[header..length];
            let ports = [self.server.port(), self.client.port()].map(u16::to_be_bytes).concat();
            if segment[..4] != ports {
                continue;
            }
            let data = usize::from(segment[12] >> 4) * 4;
            let number = u32::from_be_bytes(segment[4..8].try_into().unwrap());
            return (segment[13], number, segment[data..].to_vec());
        }
    }

    /// All that the server says until it has answered, or ends the connection.
    fn answer(&mut self) -> Vec<u8> {
        loop {
            let (flags, number, data) = self.receive();
            if number == self.next {
                self.next = number.wrapping_add(u32::try_from(data.len()).unwrap());
                self.heard.extend(data);
            }
            let whole = self.heard.ends_with(b"\r\n\r\nok") || self.heard.ends_with(b"denied\r\n");
            if flags & (FIN | RST) != 0 || whole {
                self.send(RST | ACK, FIRST.wrapping_add(ALLOWED.len() as u32), &[]);
                return std::mem::take(&mut self.heard);
            }
        }
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().into(),
        IpAddr::V6(address) => address.octets().into(),
    }
}

/// The Internet checksum.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|word| [word[0], word.get(1).copied().unwrap_or(0)]);
    let sum: u32 = words.map(|word| u32::from(u16::from_be_bytes(word))).sum();
    let folded = (sum >> 16) + (sum & 0xffff);
    !((folded >> 16) + folded) as u16
}

#[test]
fn one_stream_is_judged_whatever_the_segments_say() {
    let world = World::new(rules(1, &[http(&["GET /public"])]));
    let origin = Origin::ok(&world.server);
    // The kernel knows nothing of these connections and would end them.
    let quiet = "add table inet quiet; add chain inet quiet out { type filter hook output priority 0; }; \
                 add rule inet quiet out tcp flags & (rst | ack) == rst drop";
    world.client.run(move || {
        assert!(Command::new("nft").arg(quiet).status().unwrap().success());
    });
    type Segments = Vec<(i32, Vec<u8>)>;
    let cut = |bytes: &[u8], from: usize, to: usize| (from as i32, bytes[from..to].to_vec());
    let end = ALLOWED.len();
    let scripts = |one: &'static [u8], other: &'static [u8]| -> Vec<(&'static str, Segments)> {
        let bytewise = (0..end).rev().flat_map(|n| [cut(one, n, n + 1), cut(other, n, n + 1)]);
        vec![
            ("whole, and again otherwise", vec![cut(one, 0, end), cut(other, 0, end)]),
            (
                "its end twice, then its beginning",
                vec![cut(one, 4, end), cut(other, 4, end), cut(one, 0, 4)],
            ),
            (
                "its end, then a beginning that reaches into it",
                vec![cut(one, 8, end), cut(other, 0, 12)],
            ),
            (
                "a piece, one around it, and the beginning",
                vec![cut(one, 6, 20), cut(other, 4, end), cut(one, 0, 5)],
            ),
            (
                "pieces of both in turn",
                vec![cut(one, 20, end), cut(other, 8, 22), cut(one, 4, 10), cut(other, 0, 6)],
            ),
            ("byte by byte from behind, each twice", bytewise.collect()),
            ("from before the stream began", vec![(-5, [&[b'x'; 5], one].concat())]),
            ("and more of it than before", vec![cut(one, 0, 9), cut(other, 5, end)]),
        ]
    };
    let (mut port, mut verdicts) = (50_000, [0, 0]);
    for client in [CLIENT4, CLIENT6] {
        for (one, other) in [(ALLOWED, DENIED), (DENIED, ALLOWED)] {
            for (name, segments) in scripts(one, other) {
                for early in [&[][..], other] {
                    port += 1;
                    origin.forget();
                    let mut connection =
                        Connection::open(&world, SocketAddr::new(client, port), early);
                    for (place, bytes) in &segments {
                        connection.say(*place, bytes);
                    }
                    let answer = String::from_utf8(connection.answer()).unwrap();
                    let seen = match status(answer.as_bytes()) {
                        200 => "GET /public HTTP/1.1\r\nhost: a\r\n\r\n",
                        _ => "",
                    };
                    assert_eq!(origin.text(), seen, "{client} {name}: {answer}");
                    assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{client} {name}: {answer}");
                    verdicts[usize::from(seen.is_empty())] += 1;
                    if name == "whole, and again otherwise" {
                        assert_eq!(seen.is_empty(), one == DENIED, "the first one counts");
                    }
                }
            }
        }
    }
    assert!(verdicts.iter().all(|count| *count > 10), "{verdicts:?}");
}
