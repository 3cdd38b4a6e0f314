//! Pods of different nodes through the overlay: as without it, and nobody else gets in.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::PathBuf,
    process::Command,
    thread,
    time::Duration,
};

use palisade_lab::sys::netns;

use super::{
    connectivity::palisade,
    harness::{Lab, Outside, Pod, eventually, text},
    probe::{self, Answer, Protocol, Target},
    traffic::serve_echo,
};

const OVERLAY: [&str; 2] = ["--routing", "overlay"];
const TUNNEL: u16 = 8472;
const PORT: u16 = 80;
/// Where forged packets should arrive, if they did.
const TRAP: u16 = 9999;
/// What the envelope takes of the fabric's 1500 bytes.
const MTU: usize = 1450;
const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Echo];

pub(crate) fn answers(from: &Pod, to: &[IpAddr]) -> Vec<Answer> {
    probe::allow_echo(from);
    let targets = to
        .iter()
        .flat_map(|&address| PROTOCOLS.map(|protocol| Target { protocol, address, port: PORT }));
    probe::start(from, targets.collect()).join().unwrap().unwrap()
}

pub(crate) fn all(answers: &[Answer], expected: Answer) -> bool {
    answers.iter().all(|answer| *answer == expected)
}

/// The address by which a server in another network sees `from`.
fn seen(from: &Pod, at: &Pod, address: IpAddr) -> IpAddr {
    let listener = at.run(move || TcpListener::bind(SocketAddr::new(address, 0)));
    let to = listener.local_addr().unwrap();
    let client = from.spawn(move || TcpStream::connect_timeout(&to, Duration::from_secs(2)));
    let (_, peer) = listener.accept().unwrap();
    client.join().unwrap().unwrap();
    peer.ip()
}

pub(crate) fn command(pod: &Pod, line: &str) -> String {
    let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
    pod.run(move || Ok(text(&Command::new(&words[0]).args(&words[1..]).output()?)))
}

/// Sends a million bytes each way, over a connection that is made in time.
pub(crate) fn transfer(from: &Pod, at: &Pod, address: IpAddr, connect: Duration) {
    const BYTES: usize = 1 << 20;
    let listener = at.run(move || TcpListener::bind(SocketAddr::new(address, 0)));
    let to = listener.local_addr().unwrap();
    let serving = thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut bytes = vec![0; BYTES];
        stream.read_exact(&mut bytes).unwrap();
        stream.write_all(&bytes).unwrap();
    });
    let mut stream = from.run(move || TcpStream::connect_timeout(&to, connect));
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let sent = vec![7; BYTES];
    stream.write_all(&sent).unwrap();
    let mut back = vec![0; BYTES];
    stream.read_exact(&mut back).unwrap();
    assert!(sent == back, "{address}");
    serving.join().unwrap();
}

#[test]
fn pods_of_different_nodes_meet_in_the_overlay() {
    let lab = Lab::up_with(3, &OVERLAY);
    let [server, friend, foe] = lab.pods([("server", 2), ("friend", 1), ("foe", 3)]);
    let nodes = [1, 2, 3].map(|number| lab.node(number));
    serve_echo(&server);
    serve_echo(&nodes[1]);
    for from in [&friend, &foe, &nodes[0]] {
        assert!(all(&answers(from, &server.addresses), Answer::Open), "pods");
    }
    assert!(all(&answers(&friend, &nodes[1].addresses), Answer::Open), "the other node");
    for family in [0, 1] {
        assert_eq!(seen(&friend, &server, server.addresses[family]), friend.addresses[family]);
        let node = nodes[1].addresses[family];
        assert_eq!(seen(&friend, &nodes[1], node), friend.addresses[family]);
        let node = nodes[0].addresses[family];
        assert_eq!(seen(&nodes[0], &server, server.addresses[family]), node);
        let route = command(&nodes[0], &format!("ip route get {}", server.addresses[family]));
        assert!(route.contains("palisade_vxlan"), "{route}");
    }

    lab.apply_policy(
        "default",
        "friends",
        "{podSelector: {matchLabels: {app: server}}, \
         ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]}",
    );
    assert!(all(&answers(&friend, &server.addresses), Answer::Open), "allowed");
    assert!(all(&answers(&foe, &server.addresses), Answer::Silence), "ingress denied");
    lab.apply_policy(
        "default",
        "stay",
        "{podSelector: {matchLabels: {app: friend}}, policyTypes: [Egress]}",
    );
    assert!(all(&answers(&friend, &server.addresses), Answer::Silence), "egress denied");
    lab.kubectl(&["delete", "netpol", "--all"]);
    lab.await_policies(0);

    for address in server.addresses {
        transfer(&friend, &server, address, Duration::from_secs(2));
        let header = if address.is_ipv4() { 28 } else { 48 };
        let ping = |size: usize| command(&friend, &format!("ping -c1 -W2 -Mdo -s{size} {address}"));
        let fits = ping(MTU - header);
        assert!(fits.contains(" 0% packet loss"), "{fits}");
        let large = ping(MTU - header + 1);
        assert!(large.contains("too long") && large.contains(&MTU.to_string()), "{large}");
    }
    // A pod whose link is larger, as from before there was an overlay, is told by its node.
    command(&friend, "ip link set eth0 mtu 1500");
    let route = command(&nodes[0], &format!("ip route get {}", friend.addresses[0]));
    let host_side = route.split(' ').find(|word| word.starts_with("lxc")).unwrap();
    command(&nodes[0], &format!("ip link set {host_side} mtu 1500"));
    for address in server.addresses {
        let ping = command(&friend, &format!("ping -c2 -i0.2 -W2 -Mdo -s1440 {address}"));
        let told = ["Frag needed and DF set (mtu = 1450)", "Packet too big: mtu=1450"];
        assert!(told.iter().any(|told| ping.contains(told)), "{ping}");
        transfer(&friend, &server, address, Duration::from_secs(2));
    }

    // Somebody takes the interface away: it comes back, with its programs and routes.
    command(&nodes[1], "ip link del palisade_vxlan");
    eventually("the overlay is back", || all(&answers(&friend, &server.addresses), Answer::Open));

    // Another network takes its port: that is told of, and passes with the other network.
    let problem = |says: bool| {
        let status = lab.statuses().swap_remove(1).unwrap();
        status.problems.iter().any(|it| it.contains("another VXLAN network")) == says
    };
    command(&nodes[1], "ip link add other type vxlan id 1 dstport 8472 nolearning");
    eventually("the other network has the port", || {
        command(&nodes[1], "ip link del palisade_vxlan");
        command(&nodes[1], "ip link set other up");
        command(&nodes[1], "ip link show other").contains(",UP")
    });
    eventually("the node says that it reaches nobody", || problem(true));
    command(&nodes[1], "ip link del other");
    eventually("the node is content", || problem(false));
    eventually("the overlay is back", || all(&answers(&friend, &server.addresses), Answer::Open));
}

/// Nobody names the uplink here; it has the program of the overlay as long as there is one.
#[test]
fn pods_meet_without_the_overlay_that_there_was() {
    let lab = Lab::up_with(2, &OVERLAY);
    let [server, client] = lab.pods([("server", 2), ("client", 1)]);
    serve_echo(&server);
    let _own = [1, 2].map(|number| lab.suspend_agent(number));
    for routing in ["overlay", "native", "overlay"] {
        let _agents = [1, 2].map(|number| lab.other_agent(number, &["--routing", routing]));
        let open = || all(&answers(&client, &server.addresses), Answer::Open);
        eventually("pods meet", open);
        let program = if routing == "overlay" { "from_underlay-" } else { "from_net-" };
        eventually("the uplink has its program", || {
            let pins = fs::read_dir(lab.cni(1).pins).unwrap();
            let mut names = pins.map(|pin| pin.unwrap().file_name().into_string().unwrap());
            names.any(|name| name.starts_with(program))
        });
        let route = command(&lab.node(1), &format!("ip route get {}", server.addresses[0]));
        assert_eq!(route.contains("palisade_vxlan"), routing == "overlay", "{route}");
    }
}

/// With native routing, answers of other nodes' servers to the proxy come in by the uplink, whether or
/// not somebody named it.
#[test]
fn an_uplink_that_nobody_named_gets_its_program() {
    let lab = Lab::up(1);
    let _own = lab.suspend_agent(1);
    let at_uplink = || {
        let pins = fs::read_dir(lab.cni(1).pins).unwrap().map(|pin| pin.unwrap().path());
        let is_there = |pin: &PathBuf| pin.to_str().unwrap().contains("/from_net-");
        pins.filter(is_there).collect::<Vec<_>>()
    };
    let named = at_uplink();
    assert!(!named.is_empty());
    named.iter().for_each(|pin| fs::remove_file(pin).unwrap());
    let _agent = lab.other_agent(1, &["--routing", "native"]);
    eventually("the program is there", || at_uplink() == named);
}

/// Sum of 16-bit words, as all of IP wants it.
pub(crate) fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes: Vec<u8> = parts.concat();
    let words = bytes.chunks(2).map(|pair| {
        u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or_default()]))
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// A VXLAN envelope with a datagram to [`TRAP`] in it.
fn envelope(from: IpAddr, to: IpAddr, word: &[u8; 4]) -> Vec<u8> {
    let mut udp = Vec::new();
    udp.extend(5000_u16.to_be_bytes());
    udp.extend(TRAP.to_be_bytes());
    udp.extend([0, 12, 0, 0]);
    udp.extend(word);
    let (source, destination) = (octets(from), octets(to));
    let sum = checksum(&[&source, &destination, &[0, 17, 0, 12], &udp]);
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    let mut ip = Vec::new();
    if from.is_ipv4() {
        ip.extend([0x45, 0, 0, 32, 0, 1, 0, 0, 64, 17, 0, 0]);
        ip.extend(source);
        ip.extend(destination);
        let sum = checksum(&[&ip]);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        ip.extend([0x60, 0, 0, 0, 0, 12, 17, 64]);
        ip.extend(source);
        ip.extend(destination);
    }
    let ethertype: [u8; 2] = if from.is_ipv4() { [8, 0] } else { [0x86, 0xdd] };
    let ethernet = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]].concat();
    [&[8, 0, 0, 0, 0, 0, 0, 0], &ethernet[..], &ethertype, &ip, &udp].concat()
}

fn send(from: &Pod, to: SocketAddr, bytes: Vec<u8>) {
    from.run(move || {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        UdpSocket::bind(any)?.send_to(&bytes, to)
    });
}

#[test]
fn forged_envelopes_gain_nothing() {
    let lab = Lab::up_with(3, &OVERLAY);
    let [server, client, thief, neighbour] =
        lab.pods([("server", 2), ("client", 1), ("thief", 3), ("neighbour", 2)]);
    let nodes = [1, 2, 3].map(|number| lab.node(number));
    let outside = Outside::new(&lab);
    serve_echo(&server);
    assert!(all(&answers(&client, &server.addresses), Answer::Open));

    for family in [0, 1] {
        let (to, honest) = (server.addresses[family], client.addresses[family]);
        let trap = server.run(move || UdpSocket::bind(SocketAddr::new(to, TRAP)));
        trap.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let heard = || {
            let mut word = [0; 4];
            trap.recv(&mut word).unwrap();
            word
        };
        for end in nodes[1].addresses {
            let end = SocketAddr::new(end, TUNNEL);
            // From a pod of another node, from one of the same, from outside.
            for from in [&thief, &neighbour, &outside.pod] {
                send(from, end, envelope(honest, to, b"pod!"));
                send(from, end, envelope(from.addresses[family], to, b"own!"));
            }
            // From a node that the source is not on; the server's own node; a stranger's source.
            for forged in [
                honest,
                nodes[0].addresses[family],
                neighbour.addresses[family],
                outside.second[family],
            ] {
                send(&nodes[2], end, envelope(forged, to, b"node"));
            }
            // From the world to the world: nobody relays.
            let world = outside.pod.addresses[family];
            send(&nodes[0], end, envelope(honest, world, b"away"));
        }
        // Without an envelope.
        netns::run_in(std::path::Path::new("/run/netns/palisade-test-outside"), move || {
            // The kernel would else have the address usable a moment later.
            let how = if honest.is_ipv4() { "/32 dev lo" } else { "/128 dev lo nodad" };
            let line = format!("addr add {honest}{how}");
            Command::new("ip").args(line.split(' ')).status().map(drop)
        })
        .unwrap();
        outside.pod.run(move || {
            UdpSocket::bind(SocketAddr::new(honest, 0))?.send_to(b"bare", SocketAddr::new(to, TRAP))
        });
        // What is as it should be arrives, and nothing before it.
        let end = SocketAddr::new(nodes[1].addresses[0], TUNNEL);
        send(&nodes[0], end, envelope(honest, to, b"true"));
        assert_eq!(&heard(), b"true", "{to}");
        trap.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        assert!(trap.recv(&mut [0; 4]).is_err(), "{to}: something came late");
        let (code, told) = palisade(&lab, &["observe", "--verdict", "dropped"]);
        let told: Vec<&str> = told.lines().filter(|line| line.contains("spoofed source")).collect();
        assert!(code == 0 && told.len() > 10, "{told:?}");
    }
}
