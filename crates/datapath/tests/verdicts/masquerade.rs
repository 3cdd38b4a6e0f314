//! Pods under their node's address, and what one of them can take from the others.

use std::{
    net::{Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    thread,
};

use aya::maps::{Array, HashMap, Map, MapData};
use palisade_abi::{
    DropReason, EndpointKey, EndpointRow, EndpointValue, IpcacheKey, IpcacheValue,
    MASQUERADE_FIRST_PORT, MasqueradeSettings, NODE_NONE, TABLE_ALLOW_ALL, VXLAN_PORT, identity,
    limits, map, protocol,
};
use palisade_datapath::{Entry, Key, Step};
use rustix::{
    process::{Resource, Rlimit, setrlimit},
    thread::{UnshareFlags, unshare_unsafe},
};

use super::{
    ACK, IFINDEX, Node, OK, OWN, PEER, Packet, ROW, SHOT, SYN, endpoint, mapped, other, own,
};

const WITHOUT_ADDRESS: MasqueradeSettings =
    MasqueradeSettings { ipv4: [0; 16], ipv6: [0; 16], enabled: 1 };

/// Addresses of both families at the uplink.
fn settings() -> MasqueradeSettings {
    MasqueradeSettings { ipv4: uplink(false), ipv6: uplink(true), enabled: 1 }
}

fn uplink(ipv6: bool) -> palisade_abi::Address {
    mapped(if ipv6 { "fd31::1" } else { "192.0.2.1" })
}

/// A node whose pod may say everything to everybody, and with the node's address to the world.
fn masquerading() -> Node {
    let node = Node::new();
    node.row(TABLE_ALLOW_ALL, TABLE_ALLOW_ALL);
    for (network, prefix_len, world) in
        [("0.0.0.0", 96, identity::WORLD_IPV4), ("::", 0, identity::WORLD_IPV6)]
    {
        let key = IpcacheKey { prefix_len, address: mapped(network) };
        node.put(Entry::Ipcache(key, IpcacheValue { identity: world, prefix: 0 }));
    }
    for ipv6 in [false, true] {
        let value = EndpointValue { identity: OWN, prefix: 0, row: ROW, node: NODE_NONE };
        node.put(Entry::Endpoint(EndpointKey { address: own(ipv6) }, value));
    }
    node.datapath.set_masquerade(&settings()).unwrap();
    node
}

/// The pod sends to the world: whether that leaves the node.
fn leaves(node: &Node, packet: &Packet) -> bool {
    assert_eq!(node.leaves(packet), OK);
    node.run("to_net", packet) == OK
}

#[test]
fn nothing_leaves_with_a_pods_address_where_the_nodes_must_stand_for_it() {
    let node = masquerading();
    let refused = || node.drops(DropReason::NotMasqueraded);
    for ipv6 in [false, true] {
        let packet = Packet::out(ipv6, protocol::UDP, 80);
        node.datapath.set_masquerade(&MasqueradeSettings::default()).unwrap();
        assert_eq!(node.run("to_net", &packet), OK, "nobody asks for it");
        node.datapath.set_masquerade(&settings()).unwrap();
        let before = refused();
        assert_eq!(node.run("to_net", &packet), SHOT, "of no flow");
        assert!(leaves(&node, &packet));
        let of_node = Packet { source: uplink(ipv6), ..packet.clone() };
        assert_eq!(node.run("to_net", &of_node), OK, "the node's");
        node.datapath.set_masquerade(&WITHOUT_ADDRESS).unwrap();
        assert_eq!(node.run("to_net", &packet), SHOT, "no address");
        node.datapath.set_masquerade(&settings()).unwrap();
        let sctp = Packet::out(ipv6, protocol::SCTP, 80);
        assert!(!leaves(&node, &sctp), "a protocol of another checksum");
        let envelope = Packet::out(ipv6, protocol::UDP, VXLAN_PORT);
        assert!(!leaves(&node, &envelope), "the node would be taken for its sender");
        assert_eq!(refused(), before + 4);

        // Who asks at the pod's own address is answered from it, and so is the cluster.
        let asked = Packet { source_port: 1, ..packet.reversed() };
        assert_eq!(node.enters(&asked), OK);
        assert_eq!(node.run("to_net", &asked.reversed()), OK, "an answer");
        node.peer(other(ipv6), PEER, 0);
        let to_pod = Packet { source_port: 2, ..packet.clone() };
        assert_eq!(node.run("to_net", &to_pod), OK, "a pod");
        node.kernel
            .apply(&Step::Delete(Key::Endpoint(EndpointKey { address: other(ipv6) })))
            .unwrap();

        // More flows to one place than there are ports: the rest stays.
        let before = refused();
        let left = (10_000..30_000)
            .filter(|source_port| {
                let flow =
                    Packet { source_port: *source_port, destination_port: 81, ..packet.clone() };
                leaves(&node, &flow)
            })
            .count() as u64;
        println!("{left} flows have a port");
        // A quarter of them is for other pods.
        assert!((11_900..=12_700).contains(&left), "{left}");
        assert_eq!(refused(), before + 20_000 - left);
        let neighbour = neighbour(&node, ipv6);
        let flow = |source_port| Packet {
            source: neighbour,
            source_port,
            destination_port: 81,
            ..packet.clone()
        };
        assert!((1..=100).filter(|port| leaves(&node, &flow(*port))).count() > 95);
        node.put(Entry::Interface(IFINDEX, ROW));
    }
}

/// Another pod, which the interface belongs to from now on; its address.
fn neighbour(node: &Node, ipv6: bool) -> palisade_abi::Address {
    let address = mapped(if ipv6 { "fd77::2" } else { "172.20.7.2" });
    let value = EndpointValue { identity: OWN, prefix: 0, row: ROW + 1, node: NODE_NONE };
    node.put(Entry::Endpoint(EndpointKey { address }, value));
    let tables =
        EndpointRow { ingress_table: TABLE_ALLOW_ALL, egress_table: TABLE_ALLOW_ALL, ..endpoint() };
    let (ipv4, of_other) = ([172, 20, 7, 2], mapped("fd77::2"));
    node.put(Entry::Row(ROW + 1, EndpointRow { ipv4, ipv6: of_other, ..tables }));
    node.put(Entry::Interface(IFINDEX, ROW + 1));
    address
}

/// As `FlowCounts`: of all flows of a family, then of those of each row.
type Counts = [u64; 1 + limits::ENDPOINT_ROWS as usize];

/// TCP connections never lose their places to newer ones, so nobody may take all.
#[test]
fn endpoints_leave_flows_to_the_others() {
    const MOST: u64 = limits::FLOWS_TCP as u64;
    const OWN: usize = 1 + ROW as usize;
    let node = Node::new();
    node.row(TABLE_ALLOW_ALL, TABLE_ALLOW_ALL);
    let pin = node.directories[0].join("maps").join(map::FLOW_COUNTS);
    let map = Map::Array(MapData::from_pin(pin).unwrap());
    let mut table = Array::<_, Counts>::try_from(map).unwrap();
    let mut set_counts = |ipv6: bool, all, own| {
        let mut counts = table.get(&ipv6.into(), 0).unwrap();
        (counts[0], counts[OWN]) = (all, own);
        table.set(ipv6.into(), counts, 0).unwrap();
    };
    let opening =
        |ipv6, source_port| Packet { source_port, ..Packet::out(ipv6, protocol::TCP, 80) };
    let refused = || node.drops(DropReason::TooManyFlows);
    for ipv6 in [false, true] {
        // Two more are too many, and one from elsewhere is sooner.
        let before = refused();
        let [first, second, third] = [1, 2, 3].map(|port| opening(ipv6, port));
        let incoming = Packet { destination_port: 40_000, ..second.reversed() };
        set_counts(ipv6, MOST / 2, MOST / 2);
        assert_eq!(node.enters(&incoming), SHOT);
        set_counts(ipv6, MOST / 4 * 3 - 1, MOST / 4 * 3 - 1);
        assert_eq!(node.leaves(&first), OK);
        assert_eq!(node.leaves(&second), SHOT);
        assert_eq!(refused(), before + 2);
        // What is there goes on, and opens again; UDP has no such limit.
        assert_eq!(node.enters(&first.reversed().flags(SYN | ACK)), OK);
        assert_eq!(node.leaves(&first.clone().flags(ACK)), OK);
        assert_eq!(node.leaves(&first), OK);
        assert_eq!(node.leaves(&Packet { protocol: protocol::UDP, ..second.clone() }), OK);
        // Another endpoint has a share of the rest, however little others left.
        let source = neighbour(&node, ipv6);
        set_counts(ipv6, MOST - 1, MOST - 1);
        assert_eq!(node.leaves(&Packet { source, ..second.clone() }), OK);
        node.put(Entry::Interface(IFINDEX, ROW));
        set_counts(ipv6, MOST - 8, 3 * 8 - 1);
        assert_eq!(node.leaves(&third), OK);
        assert_eq!(node.leaves(&second), SHOT);
        // Flows are counted, so one that is there does not count twice and one that is not, not once.
        set_counts(ipv6, MOST, MOST);
        node.datapath.collect_flows().unwrap();
        assert_eq!((node.leaves(&second), node.enters(&incoming)), (OK, OK));
    }
    let mut counts = |ipv6: bool| {
        let counts = table.get(&ipv6.into(), 0).unwrap();
        (counts[0], counts[OWN])
    };
    assert_eq!([false, true].map(&mut counts), [(5, 4); 2]);
    for ipv6 in [false, true] {
        node.kernel.apply(&Step::FlushFlows(own(ipv6))).unwrap();
    }
    node.datapath.collect_flows().unwrap();
    assert_eq!([false, true].map(counts), [(1, 0); 2]);
}

/// The table of TCP ports, as bytes.
fn ports(node: &Node) -> HashMap<MapData, [u8; 24], [u8; 20]> {
    let pin = node.directories[0].join("maps").join(map::MASQUERADED_TCP);
    HashMap::try_from(Map::HashMap(MapData::from_pin(pin).unwrap())).unwrap()
}

#[test]
fn a_full_table_of_ports_stops_new_connections_only() {
    let node = masquerading();
    let flows = [false, true].map(|ipv6| Packet::out(ipv6, protocol::TCP, 80));
    let more = [false, true].map(|ipv6| Packet::out(ipv6, protocol::TCP, 81));
    for flow in &flows {
        assert!(leaves(&node, flow));
        assert_eq!(node.enters(&flow.reversed().flags(SYN | ACK)), OK);
    }
    let mut table = ports(&node);
    for number in 2..limits::MASQUERADED_TCP {
        let mut key = [0; 24];
        key[..4].copy_from_slice(&number.to_ne_bytes());
        table.insert(key, [0; 20], 0).unwrap();
    }
    let full = || node.drops(DropReason::MasqueradeTableFull);
    for (flow, more) in flows.iter().zip(&more) {
        let before = full();
        assert!(!leaves(&node, more));
        assert!(!leaves(&node, more), "once more");
        assert_eq!(full(), before + 2);
        assert!(leaves(&node, &flow.clone().flags(ACK)), "of a flow that has a port");
        assert!(leaves(&node, &Packet { protocol: protocol::UDP, ..flow.clone() }));
    }
    // What no flow has is free: not at the first sight, when the flow may be younger than that.
    for left in [limits::MASQUERADED_TCP, 2] {
        node.datapath.collect_flows().unwrap();
        assert_eq!(table.keys().count() as u32, left);
    }
    for packet in flows.iter().map(|flow| flow.clone().flags(ACK)).chain(more) {
        assert!(leaves(&node, &packet), "there is room again");
    }
    assert_eq!(table.keys().count(), 4);
    for ipv6 in [false, true] {
        node.kernel.apply(&Step::FlushFlows(own(ipv6))).unwrap();
    }
    for left in [4, 0] {
        node.datapath.collect_flows().unwrap();
        assert_eq!(table.keys().count(), left);
    }
}

/// Sockets of the node that had their ports before these were reserved, or that asked for them.
#[test]
fn a_port_of_the_nodes_own_is_nobody_elses() {
    let test = || {
        // SAFETY: this thread shares nothing with others that depends on its network.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        let limit = Rlimit { current: Some(20_000), maximum: Some(20_000) };
        setrlimit(Resource::Nofile, limit).unwrap();
        let node = masquerading();
        let held = (MASQUERADE_FIRST_PORT..=u16::MAX).step_by(2);
        let sockets = held.map(|port| {
            let at = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
            (TcpListener::bind(at).unwrap(), UdpSocket::bind(at).unwrap())
        });
        let sockets: Vec<_> = sockets.collect();
        let count = |ipv6, protocol, port| {
            let flow = Packet::out(ipv6, protocol, port);
            (10_000..22_000)
                .filter(|source_port| {
                    leaves(&node, &Packet { source_port: *source_port, ..flow.clone() })
                })
                .count()
        };
        let kinds =
            [false, true].map(|ipv6| [protocol::TCP, protocol::UDP].map(|kind| (ipv6, kind)));
        for (ipv6, kind) in kinds.into_iter().flatten() {
            let left = count(ipv6, kind, 80);
            println!("protocol {kind}, IPv6 {ipv6}: {left} flows have a port");
            // Half of the three quarters that one pod may have.
            assert!((5_900..=6_350).contains(&left), "{left}");
        }
        drop(sockets);
        for (ipv6, kind) in kinds.into_iter().flatten() {
            assert!(count(ipv6, kind, 81) > 11_000);
        }
    };
    thread::spawn(test).join().unwrap();
}
