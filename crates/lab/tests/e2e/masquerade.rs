//! Pods and what is outside the cluster: it meets nodes only, whatever becomes of the pods' packets.

use std::{
    fs,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use palisade_lab::nodes::Program;
use socket2::{Domain, Protocol as IpProtocol, Socket, Type};

use super::{
    connectivity::palisade,
    harness::{Beyond, Lab, Outside, Pod, eventually},
    overlay::{checksum, command, octets, transfer},
    probe::{self, Answer, Protocol, Target, allow_echo},
    traffic::{Conversations, Counter, Flow, PORT, serve_echo},
};

const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Echo];
/// A port where nobody listens.
const CLOSED: u16 = 9;
/// First of the ports that masqueraded flows have on a node.
const FIRST: u16 = 0xc000;
const WAIT: Duration = Duration::from_secs(1);

/// A cluster that the outside knows the nodes of, and no more.
struct World {
    lab: Lab,
    /// Two of the first node, one of the second.
    pods: [Pod; 3],
    outside: Outside,
    /// Counts what arrives there from a pod's own address.
    leaks: Counter,
}

impl World {
    fn new(options: &[&str]) -> Self {
        let lab = Lab::up_with(2, options);
        let pods = lab.pods([("one", 1), ("two", 1), ("far", 2)]);
        let outside = Outside::new(&lab);
        outside.forget_pods(&lab);
        serve_echo(&outside.pod);
        for pod in pods.iter().chain([&outside.pod]) {
            allow_echo(pod);
        }
        let leaks = Counter::start(&outside.pod, &pods.each_ref());
        Self { lab, pods, outside, leaks }
    }

    /// The node that a pod runs on.
    fn node_of(&self, pod: usize) -> Pod {
        self.lab.node(if pod == 2 { 2 } else { 1 })
    }

    /// What each protocol and both families say.
    fn answers(&self, pod: usize) -> Vec<Answer> {
        let targets =
            self.outside.pod.addresses.into_iter().flat_map(|address| {
                PROTOCOLS.map(|protocol| Target { protocol, address, port: PORT })
            });
        probe::start(&self.pods[pod], targets.collect()).join().unwrap().unwrap()
    }

    fn end(self) {
        assert_eq!(self.leaks.count(), 0, "packets came from pods' own addresses");
    }
}

fn any(address: IpAddr, port: u16) -> SocketAddr {
    match address {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, port).into(),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, port).into(),
    }
}

/// By which address and port a server outside knows a datagram's sender, who has `port`.
fn known_as(from: &Pod, port: u16, server: &UdpSocket) -> SocketAddr {
    let to = server.local_addr().unwrap();
    let word = [port.to_be_bytes(), from_word(from)].concat();
    let sent = word.clone();
    let socket = from.run(move || UdpSocket::bind(any(to.ip(), port)));
    socket.set_read_timeout(Some(WAIT)).unwrap();
    socket.send_to(&sent, to).unwrap();
    let mut buffer = [0; 16];
    let (length, peer) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(buffer[..length], word);
    server.send_to(&word, peer).unwrap();
    let (length, answered) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], answered), (&word[..], to));
    peer
}

fn from_word(pod: &Pod) -> [u8; 2] {
    match pod.addresses[0] {
        IpAddr::V4(v4) => [v4.octets()[2], v4.octets()[3]],
        IpAddr::V6(_) => unreachable!("IPv4 comes first"),
    }
}

fn everybody_is_answered_and_known_by_the_node(world: &World) {
    for pod in 0..3 {
        assert_eq!(world.answers(pod), [Answer::Open; 6], "pod {pod}");
    }
    for address in world.outside.pod.addresses {
        let server = world.outside.pod.run(move || UdpSocket::bind(SocketAddr::new(address, 0)));
        server.set_read_timeout(Some(WAIT)).unwrap();
        // One port of three pods to one server: three flows, and three ports where they meet.
        let peers: Vec<SocketAddr> =
            (0..3).map(|pod| known_as(&world.pods[pod], 5555, &server)).collect();
        for (pod, peer) in peers.iter().enumerate() {
            assert!(world.node_of(pod).addresses.contains(&peer.ip()), "pod {pod} is {peer}");
            assert!(peer.port() >= FIRST, "pod {pod} is {peer}");
        }
        assert_ne!(peers[0], peers[1], "two pods of one node");
        // The same flow keeps its port.
        assert_eq!(known_as(&world.pods[0], 5555, &server), peers[0]);
    }
    // What the node itself says has its own ports, and pods' flows are not in its way.
    let node = world.lab.node(1);
    allow_echo(&node);
    let targets = world
        .outside
        .pod
        .addresses
        .into_iter()
        .flat_map(|address| PROTOCOLS.map(|protocol| Target { protocol, address, port: PORT }));
    let answers = probe::start(&node, targets.collect()).join().unwrap().unwrap();
    assert_eq!(answers, [Answer::Open; 6], "the node");
    let reserved = command(&node, "cat /proc/sys/net/ipv4/ip_local_reserved_ports");
    assert!(reserved.contains("49152-65535"), "{reserved}");
}

/// Records are about pods, not about what stands for them outside.
fn records_show_the_pod(world: &World) {
    for address in world.outside.pod.addresses {
        Flow::tcp(&world.pods[0], address).unwrap().ask(1).unwrap();
        let target = address.to_string();
        let question = ["observe", "--from-pod", "default/one", "--ip", &target, "-t", "open"];
        eventually("the flow is told of", || {
            let (code, told) = palisade(&world.lab, &question);
            assert_eq!(code, 0, "{told}");
            told.contains(&SocketAddr::new(address, PORT).to_string())
        });
    }
}

/// Errors about a flow reach who must know them.
fn errors_come_back(world: &World) {
    for address in world.outside.pod.addresses {
        let to = SocketAddr::new(address, CLOSED);
        let refused = world.pods[0].run(move || {
            let socket = UdpSocket::bind(any(address, 0))?;
            socket.set_read_timeout(Some(WAIT))?;
            socket.connect(to)?;
            socket.send(b"?")?;
            Ok(socket.recv(&mut [0; 8]).unwrap_err().kind())
        });
        assert_eq!(refused, io::ErrorKind::ConnectionRefused, "{address}");
        let refused = world.pods[0].run(move || Ok(TcpStream::connect_timeout(&to, WAIT)));
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::ConnectionRefused, "{address}");
    }
}

/// A narrower way behind the outside: whoever sends too much is told, and sends less.
fn the_path_may_be_narrow(world: &World) {
    let beyond = Beyond::new(&world.lab, &world.outside, 1300);
    for address in beyond.pod.addresses {
        let ping = command(&world.pods[0], &format!("ping -c2 -i0.2 -W1 -Mdo -s1350 {address}"));
        let told = ["Frag needed and DF set (mtu = 1300)", "Packet too big: mtu=1300"];
        assert!(told.iter().any(|told| ping.contains(told)), "{address}: {ping}");
        // Its router cannot look for it before duplicate detection of the router's own address ends.
        eventually("what is small enough gets there", || {
            let ping = command(&world.pods[1], &format!("ping -c1 -W1 -Mdo -s1200 {address}"));
            ping.contains(" 0% packet loss")
        });
        transfer(&world.pods[2], &beyond.pod, address, WAIT);
    }
}

/// Datagrams in several pieces, both ways.
fn fragments_keep_together(world: &World) {
    for address in world.outside.pod.addresses {
        let server = world.outside.pod.run(move || UdpSocket::bind(SocketAddr::new(address, 0)));
        server.set_read_timeout(Some(WAIT)).unwrap();
        let to = server.local_addr().unwrap();
        let socket = world.pods[1].run(move || UdpSocket::bind(any(address, 0)));
        socket.set_read_timeout(Some(WAIT)).unwrap();
        let sent: Vec<u8> = (0..5000_u32).map(|number| number as u8).collect();
        let mut buffer = vec![0; 6000];
        socket.send_to(&sent, to).unwrap();
        let (length, peer) = server.recv_from(&mut buffer).unwrap();
        assert!(buffer[..length] == sent[..], "{address}: {length} bytes there");
        // The way to the pod is narrower than the uplink: the first answer may bring an error, which
        // says how large the pieces may be.
        let answered = (0..3).find_map(|_| {
            server.send_to(&sent, peer).ok()?;
            socket.recv(&mut buffer).ok()
        });
        let length = answered.unwrap_or_default();
        assert!(buffer[..length] == sent[..], "{address}: {length} bytes back");
    }
}

/// What cannot have the node's address does not leave, and is told of.
fn what_cannot_be_masqueraded_stays(world: &World) {
    let timestamp = [13, 0, 0xf2, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let IpAddr::V4(address) = world.outside.pod.addresses[0] else { unreachable!() };
    world.pods[0].run(move || {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(IpProtocol::ICMPV4))?;
        socket.send_to(&timestamp, &SocketAddr::from((address, 0)).into()).map(drop)
    });
    eventually("the drop is told of", || {
        let (_, told) = palisade(&world.lab, &["observe", "--verdict", "dropped"]);
        told.lines().any(|line| line.contains("cannot be masqueraded"))
    });
}

/// A pod's port on the node is for those whom the pod asked.
fn strangers_do_not_get_in(world: &World) {
    for (address, second) in world.outside.pod.addresses.into_iter().zip(world.outside.second) {
        let bind = move |address| move || UdpSocket::bind(SocketAddr::new(address, 0));
        let server = world.outside.pod.run(bind(address));
        let stranger = world.outside.pod.run(bind(second));
        let other_port = world.outside.pod.run(bind(address));
        server.set_read_timeout(Some(WAIT)).unwrap();
        let to = server.local_addr().unwrap();
        let socket = world.pods[0].run(move || UdpSocket::bind(any(address, 0)));
        socket.set_read_timeout(Some(WAIT)).unwrap();
        socket.send_to(b"hello", to).unwrap();
        let (_, peer) = server.recv_from(&mut [0; 8]).unwrap();
        for from in [&stranger, &other_port] {
            from.send_to(b"forged", peer).unwrap();
        }
        server.send_to(b"true", peer).unwrap();
        let mut word = [0; 8];
        let (length, _) = socket.recv_from(&mut word).unwrap();
        assert_eq!(&word[..length], b"true", "{address}");
    }
}

/// An ICMP error that says of a datagram that nobody is at its port.
fn unreachable([from, to]: [SocketAddr; 2]) -> Vec<u8> {
    let (source, destination) = (octets(from.ip()), octets(to.ip()));
    let mut bytes = vec![if from.is_ipv4() { 3 } else { 1 }, if from.is_ipv4() { 3 } else { 4 }];
    bytes.extend([0; 6]);
    bytes.extend(match from {
        SocketAddr::V4(_) => vec![0x45, 0, 0, 28, 0, 1, 0, 0, 64, 17, 0, 0],
        SocketAddr::V6(_) => vec![0x60, 0, 0, 0, 0, 8, 17, 64],
    });
    bytes.extend([source, destination].concat());
    bytes.extend([from.port().to_be_bytes(), to.port().to_be_bytes()].concat());
    bytes.extend([0, 8, 0, 0]);
    // Of ICMPv6 the kernel makes the checksum.
    if from.is_ipv4() {
        let sum = checksum(&[&bytes]);
        bytes[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    bytes
}

/// An error reaches a pod only if it quotes what the pod sent, as it was outside.
fn forged_errors_do_not_get_in(world: &World) {
    let outside = &world.outside;
    for (family, address) in outside.pod.addresses.into_iter().enumerate() {
        let server = outside.pod.run(move || UdpSocket::bind(SocketAddr::new(address, 0)));
        server.set_read_timeout(Some(WAIT)).unwrap();
        let to = server.local_addr().unwrap();
        let socket = world.pods[0].run(move || {
            let socket = UdpSocket::bind(any(address, 0))?;
            socket.connect(to).map(|()| socket)
        });
        socket.set_read_timeout(Some(WAIT)).unwrap();
        let own =
            SocketAddr::new(world.pods[0].addresses[family], socket.local_addr().unwrap().port());
        socket.send(b"hello").unwrap();
        let (_, peer) = server.recv_from(&mut [0; 8]).unwrap();
        let protocol = if to.is_ipv4() { IpProtocol::ICMPV4 } else { IpProtocol::ICMPV6 };
        let raw = outside
            .pod
            .run(move || Socket::new(Domain::for_address(to), Type::RAW, Some(protocol)));
        let tell = |quoted| {
            let at = SocketAddr::new(peer.ip(), 0);
            raw.send_to(&unreachable(quoted), &at.into()).unwrap();
        };
        let port_of = |at: SocketAddr, port| SocketAddr::new(at.ip(), port);
        let arrived = Counter::start(&world.pods[0], &[&outside.pod]);
        for quoted in [
            [peer, port_of(to, to.port() ^ 1)],
            [peer, SocketAddr::new(outside.second[family], to.port())],
            [port_of(peer, peer.port() ^ 1), to],
            [own, to],
            [port_of(own, peer.port()), to],
            [to, peer],
        ] {
            tell(quoted);
        }
        server.send_to(b"true", peer).unwrap();
        let mut word = [0; 8];
        let length = socket.recv(&mut word).unwrap();
        assert_eq!(&word[..length], b"true", "{address}");
        eventually("what arrived is counted", || arrived.count() > 0);
        assert_eq!(arrived.count(), 1, "{address}");
        tell([peer, to]);
        let refused = socket.recv(&mut word).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "{address}");
    }
}

/// Whoever calls a port of the node that leads to a pod comes under the node's address, as with
/// kube-proxy. The pod's policy does not take them for the node, which it always hears.
fn callers_of_a_node_port_are_not_the_node(world: &World) {
    const NODE_PORT: u16 = 30_080;
    let node = world.lab.node(1);
    serve_echo(&world.pods[0]);
    let rules = world.pods[0].addresses.map(|pod| {
        let (family, to) = match pod {
            IpAddr::V4(_) => ("ip", format!("{pod}:{PORT}")),
            IpAddr::V6(_) => ("ip6", format!("[{pod}]:{PORT}")),
        };
        format!(
            "table {family} named {{ chain pre {{ type nat hook prerouting priority dstnat; \
             meta l4proto {{ tcp, udp }} th dport {NODE_PORT} dnat to {to}; }}; \
             chain post {{ type nat hook postrouting priority srcnat; \
             ct status dnat masquerade; }}; }}"
        )
    });
    node.run(move || {
        let added = std::process::Command::new("nft").arg(rules.join("\n")).output()?;
        assert!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
        Ok(())
    });
    let call = |from: &Pod, to: [IpAddr; 2], port| {
        let protocols = [Protocol::Tcp, Protocol::Udp];
        let targets = to
            .into_iter()
            .flat_map(|address| protocols.map(|protocol| Target { protocol, address, port }));
        probe::start(from, targets.collect()).join().unwrap().unwrap()
    };
    let callers = [&world.outside.pod, &world.pods[1], &world.pods[2]];
    for from in callers {
        assert_eq!(call(from, node.addresses, NODE_PORT), [Answer::Open; 4], "no policy");
    }
    let port = SocketAddr::new(node.addresses[0], NODE_PORT);
    let mut open = callers.map(|from| Flow::tcp_at(from, port).unwrap());
    world.lab.apply_cilium_policy(
        "default",
        "nobody",
        "spec:\n  endpointSelector: {matchLabels: {app: one}}\n  ingressDeny:\n  - fromEntities: [world, cluster]",
    );
    for flow in &mut open {
        assert!(flow.ask(1).is_err(), "a denied flow goes on");
    }
    for from in callers {
        assert_eq!(call(from, node.addresses, NODE_PORT), [Answer::Silence; 4], "denied");
    }
    assert_eq!(call(&node, world.pods[0].addresses, PORT), [Answer::Open; 4], "the node");
    world.lab.kubectl(&["delete", "cnp", "nobody"]);
    world.lab.await_policies(0);
    for from in callers {
        assert_eq!(call(from, node.addresses, NODE_PORT), [Answer::Open; 4], "no policy again");
    }
    for family in ["ip", "ip6"] {
        command(&node, &format!("nft delete table {family} named"));
    }
}

/// A connection to the outside that nobody says anything on.
struct Idle {
    inside: TcpStream,
    outside: TcpStream,
}

impl Idle {
    /// One for each family.
    fn open(world: &World, pod: usize) -> [Self; 2] {
        world.outside.pod.addresses.map(|address| {
            let listen = move || TcpListener::bind(SocketAddr::new(address, 0));
            let listener = world.outside.pod.run(listen);
            let to = listener.local_addr().unwrap();
            let inside = world.pods[pod].run(move || TcpStream::connect_timeout(&to, WAIT));
            let outside = listener.accept().unwrap().0;
            let mut idle = Self { inside, outside };
            for end in [&idle.inside, &idle.outside] {
                end.set_read_timeout(Some(WAIT)).unwrap();
            }
            idle.speak();
            idle
        })
    }

    /// The outside has something to say.
    fn speak(&mut self) {
        for (from, to) in [(&self.outside, &self.inside), (&self.inside, &self.outside)] {
            let (mut from, mut to, mut word) = (from, to, [0; 4]);
            from.write_all(b"word").unwrap();
            to.read_exact(&mut word).unwrap();
            assert_eq!(&word, b"word");
        }
    }
}

/// Datagrams from a pod to each port of the outside, from so many of its own. Two at a time: what is
/// used twice is not the first that a table gives up.
fn flood(world: &World, pod: usize, sources: usize) {
    let targets = world.outside.pod.addresses.into_iter().chain(world.outside.second);
    let targets: Vec<IpAddr> = targets.collect();
    world.pods[pod].run(move || {
        for _ in 0..sources {
            for address in &targets {
                let socket = UdpSocket::bind(any(*address, 0))?;
                for port in 1..=u16::MAX {
                    for _ in 0..2 {
                        socket.send_to(b"x", SocketAddr::new(*address, port))?;
                    }
                }
            }
        }
        Ok(())
    });
}

/// The ports of connections are not taken away, least of all by somebody else.
#[test]
fn a_flood_of_one_pod_cuts_off_no_other() {
    let world = World::new(&["--routing", "native", "--masquerade", "always"]);
    let mut idle = Idle::open(&world, 0);
    flood(&world, 1, 2);
    for connection in &mut idle {
        connection.speak();
    }
    world.end();
}

#[test]
fn the_outside_meets_nodes_only() {
    let world = World::new(&["--routing", "overlay"]);
    everybody_is_answered_and_known_by_the_node(&world);
    records_show_the_pod(&world);
    errors_come_back(&world);
    fragments_keep_together(&world);
    strangers_do_not_get_in(&world);
    forged_errors_do_not_get_in(&world);
    callers_of_a_node_port_are_not_the_node(&world);
    the_path_may_be_narrow(&world);
    what_cannot_be_masqueraded_stays(&world);
    world.end();
}

/// Policies and deaths under open flows to the outside.
#[test]
fn masqueraded_flows_follow_policy_and_outlive_the_agent() {
    let world = World::new(&["--routing", "native", "--masquerade", "always"]);
    let flows = |pod: &Pod| -> Vec<Flow> {
        let all = world.outside.pod.addresses.into_iter();
        all.flat_map(|to| [Flow::tcp(pod, to), Flow::udp(pod, to)])
            .collect::<Result<_, _>>()
            .unwrap()
    };
    let allowed = Conversations::start(flows(&world.pods[1]));
    let mut idle = Idle::open(&world, 1);
    let mut denied = flows(&world.pods[0]);
    for flow in &mut denied {
        flow.ask(1).unwrap();
    }
    world.lab.apply_policy(
        "default",
        "stay",
        "{podSelector: {matchLabels: {app: one}}, policyTypes: [Egress]}",
    );
    for flow in &mut denied {
        assert!(flow.ask(2).is_err(), "a denied flow goes on");
    }
    assert_eq!(world.answers(0), [Answer::Silence; 6], "denied");
    assert_eq!(world.answers(1), [Answer::Open; 6], "allowed");
    world.lab.kubectl(&["delete", "netpol", "stay"]);
    world.lab.await_policies(0);
    for flow in &mut flows(&world.pods[0]) {
        flow.ask(3).unwrap();
    }
    for _ in 0..3 {
        let before = world.lab.process(1, Program::Agent);
        // Of an agent of another version, which had no such table.
        fs::remove_file(world.lab.cni(1).maps.join("MASQUERADED_TCP")).unwrap();
        world.lab.kill(1, Program::Agent);
        eventually("the agent is ready again", || {
            let status = world.lab.statuses().into_iter().next().flatten();
            status.is_some_and(|now| {
                now.ready && now.pid != before.as_raw_nonzero().get().cast_unsigned()
            })
        });
        for connection in &mut idle {
            connection.speak();
        }
        assert_eq!(world.answers(1), [Answer::Open; 6], "after the agent's death");
    }
    let (interrupted, words, slowest) = allowed.end();
    println!("allowed flows: {interrupted} interrupted, {words} words, slowest {slowest:?}");
    assert_eq!(interrupted, 0);
    // Without an overlay, too, pods of different nodes meet under their own addresses.
    serve_echo(&world.pods[2]);
    for address in world.pods[2].addresses {
        Flow::tcp(&world.pods[0], address).unwrap().ask(4).unwrap();
    }
    world.end();
}
