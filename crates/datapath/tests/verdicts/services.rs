//! Which backend a packet to a Service goes to, told by what policy says: the pod may call one of
//! them, and none of the others.

use std::{
    thread,
    time::{Duration, Instant},
};

use aya::maps::{Array, Map, MapData};
use palisade_abi::{BackendKey, BackendValue, ServiceKey, ServiceValue};
use zerocopy::FromZeros;

use super::*;

const FIN: u8 = 1;
const RST: u8 = 4;
/// So many times the same of two happens by chance once in four thousand million.
const OFTEN: u16 = 32;

/// The Service, as the pod calls it.
fn call(ipv6: bool, protocol: u8, source_port: u16) -> Packet {
    let destination = mapped(if ipv6 { "fd96::1" } else { "10.96.0.1" });
    Packet { destination, source_port, ..Packet::out(ipv6, protocol, 80) }
}

/// What its allowed backend says to it.
fn answer(ipv6: bool, protocol: u8, source_port: u16) -> Packet {
    Packet { source_port, ..Packet::out(ipv6, protocol, 80) }.reversed()
}

fn denied(ipv6: bool, number: u8) -> Address {
    // Before the allowed one in the order of addresses, and after it.
    let mut address = other(ipv6);
    address[15] = number;
    address
}

/// A node of whose pods one may call one backend.
fn node() -> Node {
    let node = Node::new();
    node.row(TABLE_ALLOW_ALL, 2);
    node.allow_80(2);
    for ipv6 in [false, true] {
        node.peer(other(ipv6), PEER, 0);
    }
    node
}

impl Node {
    /// Gives the Service other backends.
    fn back(&self, version: u32, ipv6: bool, mut backends: Vec<Address>) {
        backends.sort();
        // The families' Services are two.
        let version = if ipv6 { 100 + version } else { version };
        for (index, address) in (0..).zip(&backends) {
            let port = 80_u16.to_be();
            let backend = BackendValue { address: *address, port, ..FromZeros::new_zeroed() };
            self.put(Entry::Backend(BackendKey { version, index }, backend));
        }
        for protocol in [protocol::TCP, protocol::UDP] {
            let Packet { destination: address, .. } = call(ipv6, protocol, 0);
            let key = ServiceKey { address, port: 80_u16.to_be(), protocol, reserved: 0 };
            let backends = backends.len() as u32;
            let value = ServiceValue { version, backends, ..FromZeros::new_zeroed() };
            self.put(Entry::Service(key, value));
        }
    }

    /// An allowed backend took the connection.
    fn establish(&self, ipv6: bool, port: u16) {
        assert_eq!(self.enters(&answer(ipv6, protocol::TCP, port).flags(SYN | ACK)), OK);
        assert_eq!(self.leaves(&call(ipv6, protocol::TCP, port).flags(ACK)), OK);
    }

    /// Has lifetimes pass faster.
    fn hasten(&self, times: u32) {
        let clock = MapData::from_pin(self.directories[0].join("maps/SETTINGS")).unwrap();
        let mut clock = Array::<_, u32>::try_from(Map::Array(clock)).unwrap();
        clock.set(0, clock.get(&0, 0).unwrap() / times, 0).unwrap();
    }
}

#[test]
fn what_is_open_stays_with_its_backend_and_what_opens_goes_to_one_that_is_there() {
    let node = node();
    for ipv6 in [false, true] {
        let [tcp, udp] = [protocol::TCP, protocol::UDP].map(|of| call(ipv6, of, 40_000));
        node.back(1, ipv6, vec![other(ipv6)]);
        assert_eq!([node.leaves(&tcp), node.leaves(&udp)], [OK, OK]);
        node.establish(ipv6, 40_000);
        // Others come, before and behind it.
        for (version, others) in (2..).zip([&[1][..], &[9], &[1, 9], &[1, 3, 4, 5, 6, 7]]) {
            let others = others.iter().map(|number| denied(ipv6, *number));
            node.back(version, ipv6, others.chain([other(ipv6)]).collect());
            for _ in 0..OFTEN {
                let sent = [&tcp.clone().flags(ACK), &tcp, &udp].map(|packet| node.leaves(packet));
                assert_eq!(sent, [OK; 3], "version {version}");
            }
        }
        // It goes without a word.
        node.back(9, ipv6, vec![denied(ipv6, 1), denied(ipv6, 9)]);
        assert_eq!(node.leaves(&tcp.clone().flags(ACK)), OK);
        assert_eq!([node.leaves(&tcp), node.leaves(&udp)], [SHOT, SHOT]);
        // It comes back.
        node.back(10, ipv6, vec![other(ipv6)]);
        assert_eq!([node.leaves(&tcp), node.leaves(&udp)], [OK, OK]);
    }
}

#[test]
fn what_ended_leaves_the_port_to_any_backend() {
    type End = fn(&Node, bool, u16);
    let ends: [(u16, bool, End); 4] = [
        // Not at all.
        (40_000, false, |_, _, _| {}),
        (41_000, true, |node, ipv6, port| {
            assert_eq!(node.leaves(&call(ipv6, protocol::TCP, port).flags(FIN | ACK)), OK);
            assert_eq!(node.enters(&answer(ipv6, protocol::TCP, port).flags(FIN | ACK)), OK);
        }),
        (42_000, true, |node, ipv6, port| {
            assert_eq!(node.leaves(&call(ipv6, protocol::TCP, port).flags(RST)), OK);
        }),
        (43_000, true, |node, ipv6, port| {
            assert_eq!(node.enters(&answer(ipv6, protocol::TCP, port).flags(RST)), OK);
        }),
    ];
    let node = node();
    let mut live = 0;
    for ipv6 in [false, true] {
        node.back(1, ipv6, vec![other(ipv6)]);
        for (first, ended, end) in ends {
            for port in first..first + OFTEN {
                assert_eq!(node.leaves(&call(ipv6, protocol::TCP, port)), OK);
                node.establish(ipv6, port);
                end(&node, ipv6, port);
                live += if ended { 0 } else { 2 };
            }
        }
        node.back(2, ipv6, vec![other(ipv6), denied(ipv6, 9)]);
    }
    let begun = Instant::now();
    while node.datapath.collect_flows().unwrap().live != live {
        assert!(begun.elapsed() < Duration::from_secs(30), "what ended stays");
        thread::sleep(Duration::from_millis(100));
    }
    for ipv6 in [false, true] {
        for (first, ended, _) in ends {
            let again = |port: &u16| node.leaves(&call(ipv6, protocol::TCP, *port)) == OK;
            let again = (first..first + OFTEN).filter(again).count();
            assert_eq!(again < usize::from(OFTEN), ended, "from {first}: {again} of {OFTEN}");
        }
    }
}

#[test]
fn a_client_that_listens_keeps_its_backend() {
    let node = node();
    node.hasten(10);
    let (ports, moved) = (40_000..40_000 + OFTEN, 41_000..41_000 + OFTEN);
    let says = |ipv6, port| node.leaves(&call(ipv6, protocol::UDP, port));
    for ipv6 in [false, true] {
        node.back(1, ipv6, vec![other(ipv6)]);
        assert!(ports.clone().chain(moved.clone()).all(|port| says(ipv6, port) == OK));
        // Some ask again while there is another one only.
        node.back(2, ipv6, vec![denied(ipv6, 9)]);
        assert!(moved.clone().all(|port| says(ipv6, port) == SHOT));
        node.back(3, ipv6, vec![other(ipv6), denied(ipv6, 9)]);
    }
    // More than two minutes.
    for _ in 0..22 {
        for ipv6 in [false, true] {
            let heard = |port| node.enters(&answer(ipv6, protocol::UDP, port)) == OK;
            assert!(ports.clone().chain(moved.clone()).all(heard));
        }
        thread::sleep(Duration::from_millis(600));
    }
    for ipv6 in [false, true] {
        for port in ports.clone() {
            assert_eq!(says(ipv6, port), OK, "from {port}");
        }
        assert!(moved.clone().any(|port| says(ipv6, port) == OK), "not the one that speaks");
    }
}

#[test]
fn the_address_of_a_service_says_nothing() {
    let node = node();
    // Whom it would be allowed to call, and who may not call it.
    node.allow_80(3);
    node.row(3, 2);
    for ipv6 in [false, true] {
        node.peer(call(ipv6, 0, 0).destination, PEER, 0);
        node.back(1, ipv6, vec![other(ipv6)]);
        for protocol in [protocol::TCP, protocol::UDP] {
            let call = call(ipv6, protocol, 40_000);
            assert_eq!(node.leaves(&call), OK);
            assert_eq!(node.enters(&answer(ipv6, protocol, 40_000).flags(SYN | ACK)), OK);
            for flags in [SYN | ACK, ACK, RST] {
                assert_eq!(node.enters(&call.reversed().flags(flags)), SHOT);
            }
        }
    }
}
