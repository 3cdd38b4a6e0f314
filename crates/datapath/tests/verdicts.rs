//! The real programs, loaded into the real kernel, asked about packets by `BPF_PROG_TEST_RUN`.
//!
//! Needs root, a bpffs at `/sys/fs/bpf` and a cgroup v2 hierarchy; `make setup` provides them.

#![expect(unsafe_code, reason = "unshare is unsafe to call from a program with threads")]
#![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

#[path = "verdicts/masquerade.rs"]
mod masquerade;
#[path = "verdicts/services.rs"]
mod services;

use std::{
    collections::BTreeMap,
    fs,
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    sync::atomic::{AtomicU32, Ordering},
};

use palisade_abi::{
    Address, CHUNK_RULES, ChunkKey, ChunkValue, DropReason, EndpointKey, EndpointRow,
    EndpointValue, IpcacheKey, IpcacheValue, NODE_NONE, PREFIX_ID_BIT, PREFIX_POD_BIT, PeerKey,
    PeerValue, PortKey, PortValue, ROW_NONE, TABLE_ALLOW_ALL, TABLE_NONE, TunnelValue, identity,
    protocol, row_flags, tunnel_kind,
};
use palisade_datapath::{Config, Datapath, Entry, Kernel, Key, Plan, Step, execute};
use palisade_policy::{
    CompiledPolicy,
    arbitrary::{self, Random as Dice, World},
    evaluate::evaluate,
    model::Direction,
    resolve::{EndpointId, EndpointInfo, GroupDirection, PodPorts, Repository},
};

const OK: u32 = 0;
const SHOT: u32 = 2;
/// To the ingress of the same interface, where it is given to the proxy.
const REDIRECTED: u32 = 7;
/// `lo`: an interface that every network namespace has.
const IFINDEX: u32 = 1;
const ROW: u32 = 2;
const POD_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const OWN: u32 = 1000;
const PEER: u32 = 1001;

/// Numbers of IPv6 headers: options for the destination, fragment, routing.
const OPTIONS: u8 = 60;
const FRAGMENT: u8 = 44;
const ROUTING: u8 = 43;
const SYN: u8 = 2;
const ACK: u8 = 16;

struct Node {
    datapath: Datapath,
    kernel: Arc<dyn Kernel>,
    directories: [PathBuf; 2],
}

impl Node {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "palisade-test-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::SeqCst)
        );
        let bpffs = PathBuf::from("/sys/fs/bpf").join(&name);
        let cgroup = cgroup_root().join(&name);
        fs::create_dir_all(&cgroup).unwrap();
        let config = Config { bpffs: bpffs.clone(), cgroup: cgroup.clone() };
        let datapath = Datapath::open(&config).unwrap();
        let kernel = datapath.kernel();
        let node = Self { datapath, kernel, directories: [bpffs, cgroup] };
        node.put(Entry::Interface(IFINDEX, ROW));
        node
    }

    /// Another agent begins where the one before ended.
    fn taken_over(&self) {
        let [bpffs, cgroup] = self.directories.clone();
        Datapath::open(&Config { bpffs, cgroup }).unwrap();
    }

    fn put(&self, entry: Entry) {
        self.kernel.apply(&Step::Put(entry)).unwrap();
    }

    fn row(&self, ingress_table: u32, egress_table: u32) {
        self.put(Entry::Row(ROW, EndpointRow { ingress_table, egress_table, ..endpoint() }));
    }

    fn peer(&self, address: Address, identity: u32, prefix: u32) {
        let value = EndpointValue { identity, prefix, row: ROW_NONE, node: NODE_NONE };
        self.put(Entry::Endpoint(EndpointKey { address }, value));
        self.kernel.apply(&Step::BumpShard(address)).unwrap();
    }

    fn leaves(&self, packet: &Packet) -> u32 {
        self.datapath.test_run("from_pod", IFINDEX, &packet.frame(POD_MAC, HOST_MAC), 1).unwrap().0
    }

    fn enters(&self, packet: &Packet) -> u32 {
        self.datapath.test_run("to_pod", IFINDEX, &packet.frame(HOST_MAC, POD_MAC), 1).unwrap().0
    }

    fn run(&self, program: &'static str, packet: &Packet) -> u32 {
        self.datapath.test_run(program, IFINDEX, &packet.frame(POD_MAC, HOST_MAC), 1).unwrap().0
    }

    fn drops(&self, reason: DropReason) -> u64 {
        self.datapath.metrics().unwrap().drops(reason).packets
    }

    /// Table 2: the peer's identity may be reached at TCP and UDP port 80.
    fn allow_80(&self, table: u32) {
        let head = ChunkValue {
            default_peers: [0; 2],
            default_ports: [0; 2],
            deny: [0; 2],
            redirect: [0; 2],
            port_prefixes: 1 << 16,
            chunks: 1,
        };
        self.put(Entry::Peer(PeerKey { table, chunk: 0, id: PEER }, PeerValue { rules: [1, 0] }));
        for protocol in [protocol::TCP, protocol::UDP] {
            self.put(Entry::Port(
                port_key(table, 0, protocol, 80, 16),
                PortValue { rules: [1, 0] },
            ));
        }
        self.put(Entry::Chunk(ChunkKey { table, chunk: 0 }, head));
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let [bpffs, cgroup] = &self.directories;
        let _ = fs::remove_dir_all(bpffs.join("links"));
        let _ = fs::remove_dir_all(bpffs);
        let _ = fs::remove_dir(cgroup);
    }
}

fn endpoint() -> EndpointRow {
    EndpointRow {
        ifindex: IFINDEX,
        identity: OWN,
        flags: row_flags::VALID,
        endpoint: 7,
        mac: POD_MAC,
        host_mac: HOST_MAC,
        ipv4: [172, 20, 7, 1],
        ipv6: own(true),
        ..EndpointRow::default()
    }
}

fn cgroup_root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).unwrap();
    PathBuf::from(line.split(' ').nth(1).unwrap())
}

fn port_key(table: u32, chunk: u16, protocol: u8, port: u16, prefix_len: u8) -> PortKey {
    PortKey { table, chunk, prefix_len, protocol, port, reserved: 0 }
}

fn mapped(address: &str) -> Address {
    match address.parse().unwrap() {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

fn own(ipv6: bool) -> Address {
    mapped(if ipv6 { "fd77::1" } else { "172.20.7.1" })
}

fn other(ipv6: bool) -> Address {
    mapped(if ipv6 { "fd00::2" } else { "10.0.0.2" })
}

#[derive(Clone)]
struct Packet {
    source: Address,
    destination: Address,
    protocol: u8,
    source_port: u16,
    destination_port: u16,
    /// TCP flags or ICMP type.
    detail: u8,
}

impl Packet {
    fn out(ipv6: bool, protocol: u8, port: u16) -> Self {
        Self {
            source: own(ipv6),
            destination: other(ipv6),
            protocol,
            source_port: 40_000,
            destination_port: port,
            detail: SYN,
        }
    }

    fn flags(mut self, flags: u8) -> Self {
        self.detail = flags;
        self
    }

    fn reversed(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            ..self.clone()
        }
    }

    fn transport(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self.protocol {
            protocol::ICMP | protocol::ICMPV6 => {
                bytes.extend([self.detail, 0, 0, 0]);
                bytes.extend(self.source_port.to_be_bytes());
                bytes.extend([0, 1]);
            }
            protocol::TCP => {
                bytes.extend(self.source_port.to_be_bytes());
                bytes.extend(self.destination_port.to_be_bytes());
                bytes.extend([0; 8]);
                bytes.extend([0x50, self.detail, 0xff, 0xff, 0, 0, 0, 0]);
            }
            _ => {
                bytes.extend(self.source_port.to_be_bytes());
                bytes.extend(self.destination_port.to_be_bytes());
                bytes.extend([0, 12, 0, 0, 1, 2, 3, 4]);
            }
        }
        bytes
    }

    fn frame(&self, source_mac: [u8; 6], destination_mac: [u8; 6]) -> Vec<u8> {
        let transport = self.transport();
        let length = transport.len() as u16;
        let mut frame = Vec::new();
        frame.extend(destination_mac);
        frame.extend(source_mac);
        if self.source[..12] == mapped("0.0.0.0")[..12] {
            frame.extend([0x08, 0x00, 0x45, 0]);
            frame.extend((length + 20).to_be_bytes());
            frame.extend([0, 1, 0, 0, 64, self.protocol, 0, 0]);
            frame.extend(&self.source[12..]);
            frame.extend(&self.destination[12..]);
        } else {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(length.to_be_bytes());
            frame.extend([self.protocol, 64]);
            frame.extend(self.source);
            frame.extend(self.destination);
        }
        frame.extend(transport);
        frame
    }
}

#[test]
fn nothing_passes_before_policy_is_programmed() {
    let node = Node::new();
    for ipv6 in [false, true] {
        let packet = Packet::out(ipv6, protocol::TCP, 80);
        assert_eq!(node.leaves(&packet), SHOT, "no row");
        node.row(TABLE_NONE, TABLE_NONE);
        assert_eq!(node.leaves(&packet), SHOT, "no table");
        assert_eq!(node.enters(&packet.reversed()), SHOT, "no table");
        node.row(9, 9);
        assert_eq!(node.leaves(&packet), SHOT, "a table without chunks");
        node.row(TABLE_ALLOW_ALL, TABLE_ALLOW_ALL);
        assert_eq!(node.leaves(&packet), OK);
        assert_eq!(node.enters(&packet.reversed().flags(SYN)), OK);
        node.put(Entry::Row(ROW, EndpointRow::default()));
    }
}

#[test]
fn egress_and_ingress_follow_peer_and_port() {
    let node = Node::new();
    node.allow_80(2);
    for ipv6 in [false, true] {
        node.peer(other(ipv6), PEER, 0);
        for protocol in [protocol::TCP, protocol::UDP] {
            node.row(TABLE_ALLOW_ALL, 2);
            assert_eq!(node.leaves(&Packet::out(ipv6, protocol, 80)), OK);
            assert_eq!(node.leaves(&Packet::out(ipv6, protocol, 81)), SHOT);
            node.row(2, TABLE_ALLOW_ALL);
            let mut incoming = Packet::out(ipv6, protocol, 0).reversed();
            incoming.source_port = 50_000;
            incoming.destination_port = 80;
            assert_eq!(node.enters(&incoming), OK);
            incoming.destination_port = 81;
            assert_eq!(node.enters(&incoming), SHOT);
        }
        node.row(TABLE_ALLOW_ALL, 2);
        node.peer(other(ipv6), PEER + 1, 0);
        assert_eq!(node.leaves(&Packet::out(ipv6, protocol::TCP, 80)), SHOT, "another identity");
    }
}

#[test]
fn replies_pass_and_open_nothing() {
    let node = Node::new();
    node.allow_80(2);
    // Nobody may come in, the pod may reach port 80.
    node.allow_80(3);
    node.row(3, 2);
    for ipv6 in [false, true] {
        node.peer(other(ipv6), PEER, 0);
        for protocol in [protocol::TCP, protocol::UDP] {
            let request = Packet::out(ipv6, protocol, 80);
            let reply = request.reversed().flags(SYN | ACK);
            assert_eq!(node.enters(&reply), SHOT, "an answer to nothing");
            assert_eq!(node.leaves(&request), OK);
            assert_eq!(node.enters(&reply), OK);
            assert_eq!(node.leaves(&request.clone().flags(ACK)), OK);
            let mut stranger = reply.clone();
            stranger.destination_port += 1;
            assert_eq!(node.enters(&stranger), SHOT, "an answer to another port");
        }
        let tcp = Packet::out(ipv6, protocol::TCP, 80);
        assert_eq!(node.enters(&tcp.reversed().flags(SYN)), SHOT, "a SYN is never a reply");
        assert_eq!(node.enters(&tcp.reversed().flags(ACK)), OK, "and hurts no flow that lives");
    }
}

#[test]
fn echo_requests_are_never_replies() {
    let node = Node::new();
    node.allow_80(2);
    for ipv6 in [false, true] {
        let (protocol, request, reply) =
            if ipv6 { (protocol::ICMPV6, 128, 129) } else { (protocol::ICMP, 8, 0) };
        node.peer(other(ipv6), PEER, 0);
        node.row(2, TABLE_ALLOW_ALL);
        let mut ping = Packet::out(ipv6, protocol, 0).flags(request);
        for id in [7, 0] {
            ping.source_port = id;
            let mut pong = ping.clone().flags(reply);
            (pong.source, pong.destination) = (ping.destination, ping.source);
            assert_eq!(node.enters(&pong), SHOT, "before the ping");
            assert_eq!(node.leaves(&ping), OK);
            assert_eq!(node.enters(&pong), OK);
            assert_eq!(node.enters(&pong.clone().flags(request)), SHOT, "a ping with that id");
            pong.source_port = 8;
            assert_eq!(node.enters(&pong), SHOT, "another id");
        }
    }
}

#[test]
fn a_change_stops_live_flows_and_spares_the_allowed() {
    let node = Node::new();
    node.allow_80(2);
    node.allow_80(3);
    for ipv6 in [false, true] {
        node.peer(other(ipv6), PEER, 0);
        for protocol in [protocol::TCP, protocol::UDP] {
            node.row(TABLE_ALLOW_ALL, TABLE_ALLOW_ALL);
            let kept = Packet::out(ipv6, protocol, 80);
            let cut = Packet::out(ipv6, protocol, 81);
            for packet in [&kept, &cut] {
                assert_eq!(node.leaves(packet), OK);
                assert_eq!(node.enters(&packet.reversed().flags(SYN | ACK)), OK);
            }
            node.row(TABLE_ALLOW_ALL, 2);
            assert_eq!(node.enters(&cut.reversed().flags(ACK)), SHOT, "the answer stops too");
            assert_eq!(node.leaves(&cut.clone().flags(ACK)), SHOT);
            assert_eq!(node.enters(&cut.reversed().flags(ACK)), SHOT, "nor does it open anew");
            assert_eq!(node.leaves(&cut.clone().flags(ACK)), SHOT);
            assert_eq!(node.leaves(&kept.clone().flags(ACK)), OK);
            assert_eq!(node.enters(&kept.reversed().flags(ACK)), OK);
            // The peer becomes somebody else.
            node.peer(other(ipv6), PEER + 1, 0);
            assert_eq!(node.leaves(&kept.clone().flags(ACK)), SHOT);
            node.peer(other(ipv6), PEER, 0);
        }
    }
}

/// An agent dies after a change and before flows are told of it; the next one finds the change made.
#[test]
fn what_an_agent_changed_when_it_died_holds_for_live_flows() {
    let node = Node::new();
    let renamed = |ipv6| {
        let value = EndpointValue { identity: PEER + 1, prefix: 0, row: ROW_NONE, node: NODE_NONE };
        Step::Put(Entry::Endpoint(EndpointKey { address: other(ipv6) }, value))
    };
    let closed = |_| Step::Delete(Key::Chunk(ChunkKey { table: 2, chunk: 0 }));
    let flows = [false, true].map(|ipv6| {
        [protocol::TCP, protocol::UDP].map(|protocol| (ipv6, Packet::out(ipv6, protocol, 80)))
    });
    let flows = flows.as_flattened();
    for change in [renamed as fn(bool) -> Step, closed] {
        node.allow_80(2);
        node.row(TABLE_ALLOW_ALL, 2);
        for (ipv6, opened) in flows {
            node.peer(other(*ipv6), PEER, 0);
            assert_eq!(node.leaves(opened), OK);
            assert_eq!(node.enters(&opened.reversed().flags(SYN | ACK)), OK);
        }
        node.taken_over();
        for (_, opened) in flows {
            assert_eq!(node.leaves(&opened.clone().flags(ACK)), OK, "nothing changed");
            assert_eq!(node.enters(&opened.reversed().flags(ACK)), OK, "nothing changed");
        }
        for (ipv6, opened) in flows {
            node.kernel.apply(&change(*ipv6)).unwrap();
            assert_eq!(node.leaves(&opened.clone().flags(ACK)), OK, "the flow was not told");
        }
        node.taken_over();
        for (_, opened) in flows {
            assert_eq!(node.leaves(&opened.clone().flags(ACK)), SHOT);
            assert_eq!(node.enters(&opened.reversed().flags(ACK)), SHOT);
        }
    }
}

/// One pod leaves; the next one gets its address, its number and even its interface. What the first
/// one asked for is not answered to the second one.
#[test]
fn the_next_pod_with_an_address_inherits_no_flow() {
    const CLOSED: u32 = 9;
    let node = Node::new();
    for ipv6 in [false, true] {
        node.peer(other(ipv6), PEER, 0);
        for protocol in [protocol::TCP, protocol::UDP] {
            node.row(TABLE_ALLOW_ALL, TABLE_ALLOW_ALL);
            let opened = Packet::out(ipv6, protocol, 81);
            let let_in = Packet { source_port: 443, ..Packet::out(ipv6, protocol, 50_000) };
            assert_eq!(node.leaves(&opened), OK);
            assert_eq!(node.enters(&opened.reversed().flags(SYN | ACK)), OK);
            assert_eq!(node.enters(&let_in.reversed().flags(SYN)), OK);
            assert_eq!(node.leaves(&let_in.clone().flags(SYN | ACK)), OK);

            let address = own(ipv6);
            let leave = [
                Step::Put(Entry::Row(ROW, EndpointRow::default())),
                Step::Delete(Key::Interface(IFINDEX)),
                Step::Delete(Key::Endpoint(EndpointKey { address })),
                Step::BumpShard(address),
                Step::FlushFlows(address),
            ];
            execute(&*node.kernel, &Plan(leave.into())).unwrap();

            // It may reach everybody, and be reached by nobody.
            node.row(CLOSED, TABLE_ALLOW_ALL);
            node.put(Entry::Interface(IFINDEX, ROW));
            for flags in [ACK, SYN | ACK] {
                let answer = opened.reversed().flags(flags);
                assert_eq!(node.enters(&answer), SHOT, "an answer to the pod before");
            }
            for flags in [ACK, SYN] {
                let more = let_in.reversed().flags(flags);
                assert_eq!(node.enters(&more), SHOT, "what the pod before let in");
            }
            // Its own flows are as anybody's, from the same port, too.
            assert_eq!(node.leaves(&opened), OK);
            assert_eq!(node.enters(&opened.reversed().flags(SYN | ACK)), OK);
        }
    }
}

#[test]
fn endpoints_speak_for_themselves_only() {
    let node = Node::new();
    node.row(TABLE_ALLOW_ALL, TABLE_ALLOW_ALL);
    for ipv6 in [false, true] {
        let honest = Packet::out(ipv6, protocol::TCP, 80);
        assert_eq!(node.leaves(&honest), OK);
        for forged in ["10.0.0.9", "0.0.0.0", "127.0.0.1", "fd00::9", "::1", "fe80::5"] {
            let source = mapped(forged);
            if (source[..12] != mapped("0.0.0.0")[..12]) != ipv6 {
                continue;
            }
            assert_eq!(node.leaves(&Packet { source, ..honest.clone() }), SHOT, "from {forged}");
        }
        let run = |frame: &[u8]| node.datapath.test_run("from_pod", IFINDEX, frame, 1).unwrap().0;
        let mut stolen_mac = honest.clone();
        stolen_mac.source_port = 41_000;
        assert_eq!(run(&stolen_mac.frame([2, 9, 9, 9, 9, 9], HOST_MAC)), SHOT);
        let mut cut_short = honest.frame(POD_MAC, HOST_MAC);
        cut_short.truncate(cut_short.len() - 8);
        assert_eq!(run(&cut_short), SHOT);
    }
    let arp = |sender: [u8; 4], mac: [u8; 6]| {
        let mut frame = Vec::new();
        frame.extend([0xff; 6]);
        frame.extend(POD_MAC);
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(mac);
        frame.extend(sender);
        frame.extend([0; 6]);
        frame.extend([10, 0, 0, 254]);
        node.datapath.test_run("from_pod", IFINDEX, &frame, 1).unwrap().0
    };
    assert_eq!(arp([172, 20, 7, 1], POD_MAC), OK);
    assert_eq!(arp([10, 0, 0, 9], POD_MAC), SHOT);
    assert_eq!(arp([172, 20, 7, 1], [2, 9, 9, 9, 9, 9]), SHOT);
    let mut advertisement = Packet::out(true, protocol::ICMPV6, 0).flags(134);
    assert_eq!(node.leaves(&advertisement), SHOT, "router advertisement");
    advertisement.detail = 137;
    assert_eq!(node.leaves(&advertisement), SHOT, "redirect");
}

/// An IPv6 packet with headers between its own and that of its protocol.
fn extended(chain: &[u8], packet: &Packet) -> Vec<u8> {
    let mut frame = packet.frame(POD_MAC, HOST_MAC);
    let (next, at) = (20, 54);
    let numbers = chain.iter().copied().chain([packet.protocol]);
    frame[next] = chain[0];
    // Padding; of a fragment it is all of the datagram.
    let filler = |header: u8| if header == FRAGMENT { [0; 6] } else { [1, 4, 0, 0, 0, 0] };
    let headers: Vec<u8> = chain
        .iter()
        .zip(numbers.skip(1))
        .flat_map(|(header, next)| [&[next, 0][..], &filler(*header)].concat())
        .collect();
    let length = (frame.len() - at + headers.len()) as u16;
    frame[18..20].copy_from_slice(&length.to_be_bytes());
    frame.splice(at..at, headers);
    frame
}

/// What is behind many headers is judged as what it is, or does not pass.
#[test]
fn no_chain_of_headers_hides_a_protocol() {
    let node = Node::new();
    // Whatever is not known to be something else may pass.
    node.row(TABLE_ALLOW_ALL, TABLE_ALLOW_ALL);
    let run = |chain: &[u8]| {
        let frame = extended(chain, &Packet::out(true, protocol::UDP, 80));
        node.datapath.test_run("from_pod", IFINDEX, &frame, 1).unwrap().0
    };
    for allowed in [&[OPTIONS; 1][..], &[OPTIONS; 5], &[FRAGMENT], &[OPTIONS, OPTIONS, FRAGMENT]] {
        assert_eq!(run(allowed), OK, "{allowed:?}");
    }
    for last in [OPTIONS, FRAGMENT, ROUTING] {
        for length in 5..9 {
            let chain = [vec![OPTIONS; length], vec![last]].concat();
            assert_eq!(run(&chain), SHOT, "{chain:?}");
        }
    }
    assert_eq!(run(&[ROUTING]), SHOT);
}

/// Messages to neighbours are upkeep of the link, not a way to everybody.
#[test]
fn neighbours_are_asked_on_the_link_only() {
    let node = Node::new();
    let ask = |kind: u8, destination: &str| {
        let destination = mapped(destination);
        let packet = Packet { destination, ..Packet::out(true, protocol::ICMPV6, 0) };
        let mut frame = packet.flags(kind).frame(POD_MAC, HOST_MAC);
        let target = if kind == 136 { own(true) } else { other(true) };
        let (hop_limit, at) = (21, 54);
        frame[hop_limit] = 255;
        frame.truncate(at + 8);
        frame.extend(target);
        frame[18..20].copy_from_slice(&24_u16.to_be_bytes());
        node.datapath.test_run("from_pod", IFINDEX, &frame, 1).unwrap().0
    };
    // Policy allows nothing.
    node.allow_80(2);
    node.row(2, 2);
    for kind in [135, 136] {
        for neighbour in ["fe80::1", "ff02::1:ff00:2"] {
            assert_eq!(ask(kind, neighbour), OK, "{kind} to {neighbour}");
        }
        for elsewhere in ["2001:db8::1", "fd00::2"] {
            assert_eq!(ask(kind, elsewhere), SHOT, "{kind} to {elsewhere}");
        }
    }
}

/// A small generator that repeats: xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Few of few rules, so that bitmaps meet and both verdicts are common.
    fn bitmap(&mut self) -> u128 {
        const RULES: [u32; 6] = [0, 1, 63, 64, 100, 127];
        (0..self.below(4)).fold(0, |map, _| map | 1 << RULES[self.below(6) as usize])
    }
}

#[derive(Default)]
struct Chunk {
    default_peers: u128,
    default_ports: u128,
    deny: u128,
    redirect: u128,
    peers: Vec<(u32, u128)>,
    ports: Vec<((u8, u8, u16), u128)>,
}

fn words(map: u128) -> [u64; 2] {
    [map as u64, (map >> 64) as u64]
}

const IDENTITIES: [u32; 4] = [PEER, identity::WORLD_IPV4, identity::UNKNOWN, 70];
const PREFIXES: [u32; 3] = [0, PREFIX_ID_BIT | 1, PREFIX_ID_BIT | 2];
const SAMPLE_PORTS: [u16; 6] = [0, 79, 80, 81, 8080, 65_535];

fn random_table(random: &mut Random) -> Vec<Chunk> {
    let chunk = |random: &mut Random| {
        let mut chunk = Chunk {
            default_peers: random.bitmap(),
            default_ports: random.bitmap(),
            deny: random.bitmap(),
            redirect: random.bitmap(),
            ..Chunk::default()
        };
        for identity in IDENTITIES {
            if random.below(2) == 0 {
                chunk.peers.push((identity, random.bitmap() | random.bitmap()));
            }
        }
        for prefix in &PREFIXES[1..] {
            for id in [*prefix, prefix | PREFIX_POD_BIT] {
                if random.below(2) == 0 {
                    chunk.peers.push((id, random.bitmap()));
                }
            }
        }
        for _ in 0..random.below(6) {
            let length = [0, 1, 8, 15, 16][random.below(5) as usize];
            let mask = (0xffff_u32 << (16 - u32::from(length))) as u16;
            let port = SAMPLE_PORTS[random.below(6) as usize] & mask;
            let key = (protocol::TCP, length, port);
            if chunk.ports.iter().all(|(known, _)| *known != key) {
                chunk.ports.push((key, random.bitmap() | random.bitmap()));
            }
        }
        chunk
    };
    (0..=random.below(3)).map(|_| chunk(random)).collect()
}

/// The verdict as the ABI describes it, in as few words as possible.
fn verdict(table: &[Chunk], id: u32, prefix: u32, port: u16) -> u32 {
    let prefix = match prefix {
        0 => None,
        prefix if identity::is_world(id) => Some(prefix),
        prefix => Some(prefix | PREFIX_POD_BIT),
    };
    for chunk in table {
        let find = |id| chunk.peers.iter().find(|(key, _)| *key == id).map(|(_, rules)| *rules);
        let peers =
            find(id).unwrap_or(chunk.default_peers) | prefix.and_then(find).unwrap_or_default();
        let ports = (0..=16_u8)
            .rev()
            .find_map(|length| {
                let mask = (0xffff_u32 << (16 - u32::from(length))) as u16;
                let key = (protocol::TCP, length, port & mask);
                chunk.ports.iter().find(|(known, _)| *known == key).map(|(_, rules)| *rules)
            })
            .unwrap_or(chunk.default_ports);
        let hit = peers & ports;
        if hit != 0 {
            let is = |kind: u128| kind >> hit.trailing_zeros() & 1 == 1;
            return match (is(chunk.deny), is(chunk.redirect)) {
                (true, _) => SHOT,
                (false, true) => REDIRECTED,
                (false, false) => OK,
            };
        }
    }
    SHOT
}

fn program(node: &Node, number: u32, table: &[Chunk]) {
    let mut steps = Vec::new();
    for (index, chunk) in table.iter().enumerate() {
        let index = index as u32;
        for (id, rules) in &chunk.peers {
            let key = PeerKey { table: number, chunk: index, id: *id };
            steps.push(Step::Put(Entry::Peer(key, PeerValue { rules: words(*rules) })));
        }
        let mut port_prefixes = 0;
        for ((protocol, length, port), rules) in &chunk.ports {
            port_prefixes |= 1 << length;
            let key = port_key(number, index as u16, *protocol, *port, *length);
            steps.push(Step::Put(Entry::Port(key, PortValue { rules: words(*rules) })));
        }
        let head = ChunkValue {
            default_peers: words(chunk.default_peers),
            default_ports: words(chunk.default_ports),
            deny: words(chunk.deny),
            redirect: words(chunk.redirect),
            port_prefixes,
            chunks: table.len() as u32,
        };
        steps.push(Step::Put(Entry::Chunk(ChunkKey { table: number, chunk: index }, head)));
    }
    execute(&*node.kernel, &Plan(steps)).unwrap();
}

/// 1,600 random tables, 72 questions in each direction, over IPv4 and IPv6 in turn: 230,400 pairs.
#[test]
fn the_kernel_judges_as_the_tables_say() {
    assert_eq!(CHUNK_RULES, u128::BITS);
    let node = Node::new();
    let mut random = Random(0x5eed_0001);
    let (mut pairs, mut passed, mut proxied) = (0_u32, 0_u32, 0_u32);
    for number in 0..1600_u32 {
        let table = random_table(&mut random);
        let ipv6 = number % 2 == 1;
        program(&node, number + 2, &table);
        node.row(number + 2, number + 2);
        for id in IDENTITIES {
            for prefix in PREFIXES {
                node.peer(other(ipv6), id, prefix);
                for port in SAMPLE_PORTS {
                    let expected = verdict(&table, id, prefix, port);
                    let what = format!("table {number}, {id}, {prefix:#x}, port {port}");
                    let mut incoming = Packet::out(ipv6, protocol::TCP, 50_000).reversed();
                    incoming.destination_port = port;
                    assert_eq!(node.enters(&incoming), expected, "{what}, in");
                    // No proxy listens here.
                    let out = if expected == OK { OK } else { SHOT };
                    let got = node.leaves(&Packet::out(ipv6, protocol::TCP, port));
                    assert_eq!(got, out, "{what}, out");
                    pairs += 2;
                    passed += u32::from(expected == OK);
                    proxied += u32::from(expected == REDIRECTED);
                }
            }
        }
        for chunk in 0..table.len() as u32 {
            let key = Key::Chunk(ChunkKey { table: number + 2, chunk });
            node.kernel.apply(&Step::Delete(key)).unwrap();
        }
    }
    println!("{pairs} pairs agree, {passed} of them allowed twice, {proxied} redirected");
    assert_eq!(u64::from(proxied), node.drops(DropReason::ProxyGone), "redirected on the way out");
    for count in [passed, proxied, pairs / 2 - passed - proxied] {
        assert!(count > pairs / 40, "each verdict must be common");
    }
}

#[test]
fn networks_are_found_by_their_longest_prefix() {
    let node = Node::new();
    let head = ChunkValue {
        default_peers: [0; 2],
        default_ports: [1, 0],
        deny: [0; 2],
        redirect: [0; 2],
        port_prefixes: 0,
        chunks: 1,
    };
    let wide = PREFIX_ID_BIT | 1;
    node.put(Entry::Chunk(ChunkKey { table: 2, chunk: 0 }, head));
    node.put(Entry::Peer(PeerKey { table: 2, chunk: 0, id: wide }, PeerValue { rules: [1, 0] }));
    node.row(TABLE_ALLOW_ALL, 2);
    let networks = [
        ("0.0.0.0", 96, 0),
        ("10.0.0.0", 104, wide),
        ("10.0.0.0", 128 - 16, PREFIX_ID_BIT | 2),
        ("::", 0, 0),
        ("fd00::", 16, wide),
        ("fd00::", 64, PREFIX_ID_BIT | 2),
    ];
    for (address, prefix_len, prefix) in networks {
        let key = IpcacheKey { prefix_len, address: mapped(address) };
        let value = IpcacheValue { identity: identity::WORLD_IPV4, prefix };
        node.put(Entry::Ipcache(key, value));
    }
    for (destination, expected) in [
        ("10.1.0.1", OK),
        ("10.0.0.9", SHOT),
        ("192.0.2.1", SHOT),
        ("fd00:0:1::1", OK),
        ("fd00::9", SHOT),
        ("2001:db8::1", SHOT),
    ] {
        let destination = mapped(destination);
        let ipv6 = destination[..12] != mapped("0.0.0.0")[..12];
        let packet = Packet { destination, ..Packet::out(ipv6, protocol::TCP, 443) };
        assert_eq!(node.leaves(&packet), expected);
    }
}

/// Tables of one world in the kernel, and what to remove when it ends.
struct Programmed<'a> {
    node: &'a Node,
    next: u32,
    known: Vec<(*const CompiledPolicy, u32)>,
    steps: Vec<Step>,
}

impl Programmed<'_> {
    fn table(&mut self, direction: &GroupDirection) -> u32 {
        let GroupDirection::Enforced(_, policy) = direction else { return TABLE_ALLOW_ALL };
        let pointer = Arc::as_ptr(policy);
        if let Some((_, number)) = self.known.iter().find(|(known, _)| *known == pointer) {
            return *number;
        }
        let number = self.next;
        self.next += 1;
        self.known.push((pointer, number));
        self.write(number, policy);
        number
    }

    fn write(&mut self, table: u32, policy: &CompiledPolicy) {
        let mut steps = Vec::new();
        for (chunk, rules) in policy.chunks.iter().enumerate() {
            let chunk = chunk as u32;
            for (id, map) in &rules.peers {
                let key = PeerKey { table, chunk, id: *id };
                self.steps.push(Step::Delete(Key::Peer(key)));
                steps.push(Step::Put(Entry::Peer(key, PeerValue { rules: words(*map) })));
            }
            for ((protocol, length, port), map) in &rules.ports {
                let key = port_key(table, chunk as u16, *protocol, *port, *length);
                self.steps.push(Step::Delete(Key::Port(key)));
                steps.push(Step::Put(Entry::Port(key, PortValue { rules: words(*map) })));
            }
            let key = ChunkKey { table, chunk };
            self.steps.push(Step::Delete(Key::Chunk(key)));
            steps.push(Step::Put(Entry::Chunk(key, rules.value(policy.chunks.len() as u32))));
        }
        execute(&*self.node.kernel, &Plan(steps)).unwrap();
    }
}

fn repository(world: &World) -> Repository {
    let mut repository = Repository::new();
    for (identity, labels) in &world.identities {
        repository.upsert_identity(*identity, labels.clone());
    }
    for pod in &world.pods {
        let ports = pod.named_ports.clone();
        repository.set_pod(PodPorts { ip: pod.address, identity: pod.identity, ports });
    }
    for policy in &world.policies {
        repository.upsert_policy(policy.clone());
    }
    repository
}

/// Whether policy alone decides on the packet: not the guards, not the flow table.
fn is_for_policy(packet: &arbitrary::Packet) -> bool {
    let guarded = match packet.peer.address {
        IpAddr::V4(address) => address.octets()[0] >= 224,
        IpAddr::V6(address) => address.is_multicast() || address.segments()[0] == 0xfe80,
    };
    let ipv6 = packet.peer.address.is_ipv6();
    let plain = match packet.protocol {
        protocol::ICMP => !ipv6 && packet.port < 256 && !matches!(packet.port, 0 | 3 | 11 | 12),
        protocol::ICMPV6 => ipv6 && packet.port < 256 && !matches!(packet.port, 1..=4 | 129..=143),
        _ => true,
    };
    plain && !guarded
}

/// `source_port` is another each time: what was proxied stays proxied.
fn ask(node: &Node, question: &arbitrary::Packet, source_port: u16) -> u32 {
    let ipv6 = question.peer.address.is_ipv6();
    let peer = mapped(&question.peer.address.to_string());
    let icmp = matches!(question.protocol, protocol::ICMP | protocol::ICMPV6);
    let mut packet = Packet {
        source: own(ipv6),
        destination: peer,
        protocol: question.protocol,
        source_port,
        destination_port: question.port,
        detail: if icmp { question.port as u8 } else { SYN },
    };
    if !matches!(question.protocol, protocol::TCP | protocol::UDP | protocol::SCTP) && !icmp {
        // Without ports both directions are one flow: what an earlier question opened must not
        // answer this one.
        node.kernel.apply(&Step::FlushFlows(own(ipv6))).unwrap();
    }
    if question.direction == Direction::Egress {
        return node.leaves(&packet);
    }
    (packet.source, packet.destination) = (peer, own(ipv6));
    node.enters(&packet)
}

/// Objects → tables → kernel against objects → naive evaluator. 3,000 worlds of 60 packets, of
/// which the guards and the flow table leave well over 100,000 to policy.
#[test]
fn the_kernel_judges_as_the_policies_say() {
    let node = Node::new();
    let (mut pairs, mut passed, mut proxied, mut next) = (0_u32, 0_u32, 0_u64, 2);
    for seed in 0..3000 {
        let mut dice = Dice::new(seed);
        let world = arbitrary::world(&mut dice);
        let packets: Vec<_> =
            (0..60).map(|_| world.packet(&mut dice)).filter(is_for_policy).collect();
        let mut repository = repository(&world);
        for (number, packet) in packets.iter().enumerate() {
            let info = EndpointInfo {
                identity: packet.subject.identity,
                labels: packet.subject.labels.clone(),
                named_ports: packet.subject.named_ports.clone(),
            };
            repository.upsert_endpoint(EndpointId(number as u32), info);
        }
        repository.commit();
        let mut programmed = Programmed { node: &node, next, known: Vec::new(), steps: Vec::new() };
        for (number, packet) in packets.iter().enumerate() {
            let policy = repository.endpoint_policy(EndpointId(number as u32)).unwrap();
            let ingress = programmed.table(&policy.ingress);
            let egress = programmed.table(&policy.egress);
            node.row(ingress, egress);
            let address = packet.peer.address;
            let prefix = repository.prefix_of(address);
            node.peer(mapped(&address.to_string()), packet.peer.identity, prefix);
            let expected = evaluate(
                &world.policies,
                packet.direction,
                &packet.subject,
                &packet.peer,
                packet.protocol,
                packet.port,
            );
            let ports = matches!(packet.protocol, protocol::TCP | protocol::UDP);
            let outwards = packet.direction == Direction::Egress;
            let wanted = match (expected.allowed, expected.proxied, ports) {
                (true, false, _) => OK,
                (true, true, true) if !outwards => REDIRECTED,
                _ => SHOT,
            };
            let source_port = 1024 + (pairs % 64_000) as u16;
            assert_eq!(ask(&node, packet, source_port), wanted, "seed {seed}: {packet:#?}");
            pairs += 1;
            passed += u32::from(wanted == OK);
            // No proxy listens here, which is how its packets are known on the way out.
            proxied += u64::from(expected.proxied && ports && outwards);
        }
        next = programmed.next;
        let steps = std::mem::take(&mut programmed.steps);
        execute(&*node.kernel, &Plan(steps)).unwrap();
    }
    println!("{pairs} pairs agree, {passed} of them allowed, {proxied} redirected on the way out");
    assert_eq!(proxied, node.drops(DropReason::ProxyGone));
    assert!(pairs >= 100_000 && proxied > 1000, "{pairs}, {proxied}");
}

#[test]
fn pods_of_other_nodes_come_out_of_the_overlay_only() {
    let node = Node::new();
    let run = |program, packet: &Packet| node.run(program, packet);
    for ipv6 in [false, true] {
        let packet = Packet::out(ipv6, protocol::UDP, 80).reversed();
        let value = EndpointValue { identity: OWN, prefix: 0, row: ROW, node: NODE_NONE };
        node.put(Entry::Endpoint(EndpointKey { address: own(ipv6) }, value));
        node.datapath.set_tunnels(&BTreeMap::new()).unwrap();
        assert_eq!(run("from_underlay", &packet), OK, "the world");
        assert_eq!(run("from_underlay", &packet.reversed()), SHOT, "as an own pod");
        let key = IpcacheKey { prefix_len: 120, address: other(ipv6) };
        for (kind, bare) in [(tunnel_kind::PODS, SHOT), (tunnel_kind::NODE, OK)] {
            let tunnel = TunnelValue { node: mapped("192.0.2.2"), kind };
            node.datapath.set_tunnels(&BTreeMap::from([(key, tunnel)])).unwrap();
            let drops = node.drops(DropReason::Spoofed);
            assert_eq!(run("from_underlay", &packet), bare, "{kind}");
            assert_eq!(run("from_net", &packet), OK, "without an overlay");
            // No envelope tells who sent it.
            assert_eq!(run("from_overlay", &packet), SHOT, "{kind}");
            let expected = if bare == SHOT { 2 } else { 1 };
            assert_eq!(node.drops(DropReason::Spoofed), drops + expected);
        }
    }
}

/// The verifier gives up at a million instructions; kernels differ in how many they need.
#[test]
fn the_verifier_is_far_from_its_limit() {
    let begun = std::time::SystemTime::now();
    let _node = Node::new();
    let mut names = Vec::new();
    for program in aya::programs::loaded_programs().flatten() {
        let walked = program.verified_instruction_count().unwrap_or_default();
        let name = program.name_as_str().unwrap_or_default().to_owned();
        let ours = [
            "from_pod",
            "to_pod",
            "from_net",
            "from_underlay",
            "from_overlay",
            "to_net",
            "connect4",
            "connect6",
        ];
        if ours.contains(&name.as_str()) && program.loaded_at().is_some_and(|at| at > begun) {
            println!("{name}: {walked}");
            assert!(walked < 100_000, "{name}: {walked} instructions");
            names.push(name);
        }
    }
    assert!(names.len() >= 8, "{names:?}");
}
