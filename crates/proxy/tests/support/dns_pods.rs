//! Two pods that ask, and what is asked and answered.
#![allow(dead_code, reason = "no test uses all of it")]

use std::{
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    sync::Arc,
    time::Duration,
};

use palisade_abi::identity;
use palisade_api::proxy::{Endpoint, Peer, Rules};
use palisade_policy::{
    Chunk, CompiledPolicy, NamedPorts, RuleInfo,
    l7::NamePattern,
    model::{Action, Application},
};

use crate::{
    message::{A, Message, address},
    name_server::{Asked, Say},
    world::{CLIENT4, CLIENT6, SERVER4, SERVER6, WAIT, World, agent::source},
};

pub(crate) const ID: u16 = 0x1234;
pub(crate) const FORMERR: u8 = 1;
pub(crate) const SERVFAIL: u8 = 2;
pub(crate) const NOTIMP: u8 = 4;
pub(crate) const REFUSED: u8 = 5;
/// Time in which nothing happens that should not.
pub(crate) const QUIET: Duration = Duration::from_millis(300);
/// Another pod of the node, with an address of its own on the client's side.
pub(crate) const OTHER4: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 77, 1, 3));

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn pattern(text: &str) -> NamePattern {
    if text.contains('*') {
        return NamePattern::pattern(text).unwrap();
    }
    NamePattern::name(text).unwrap()
}

/// Rules under which two pods may ask for some names, and reach some by name.
pub(crate) fn rules(version: u64, names: &[&str], fqdns: &[&str]) -> Rules {
    let names = names.iter().map(|name| pattern(name)).collect();
    let rule = RuleInfo {
        action: Action::Allow,
        application: Application::Dns(names),
        ports: NamedPorts::default(),
        source: source(0),
        also: Vec::new(),
    };
    let chunk = Chunk { default_peers: 1, default_ports: 1, redirect: 1, ..Chunk::default() };
    let table = CompiledPolicy {
        chunks: vec![Arc::new(chunk)],
        rules: vec![rule],
        fqdns: fqdns.iter().map(|name| pattern(name)).collect(),
        hash: version,
        ..CompiledPolicy::default()
    };
    let pod = |id| Endpoint { id, identity: 300, ingress: None, egress: Some(2) };
    let peer = |identity| Peer { identity, prefix: 0, host: false };
    Rules {
        version,
        endpoints: [(CLIENT4, pod(7)), (CLIENT6, pod(7)), (OTHER4, pod(8))].into(),
        tables: [(2, Arc::new(table))].into(),
        addresses: [
            (SERVER4, peer(302)),
            (SERVER6, peer(302)),
            (ip("203.0.113.9"), peer(identity::REMOTE_NODE)),
        ]
        .into(),
        networks: [
            ("0.0.0.0/0".parse().unwrap(), peer(identity::WORLD_IPV4)),
            ("::/0".parse().unwrap(), peer(identity::WORLD_IPV6)),
            ("10.244.0.0/16".parse().unwrap(), peer(identity::UNKNOWN)),
        ]
        .into(),
        ..Rules::default()
    }
}

/// The names of most tests.
pub(crate) fn usual() -> Rules {
    rules(1, &["api.example.com", "*.cdn.example.com"], &[])
}

pub(crate) fn world(rules: Rules) -> World {
    let world = World::new(rules);
    world.client.ip("addr add 10.77.1.3/24 dev eth0");
    world.server.ip("addr add 10.77.2.3/24 dev eth0");
    world.server.ip("addr add fd77:2::3/64 dev eth0 nodad");
    world
}

/// Answers every question with one address.
pub(crate) fn plain(asked: &Asked) -> Vec<Say> {
    vec![Say::Answer(with_address(asked, ip("93.184.216.34")))]
}

pub(crate) fn with_address(asked: &Asked, found: IpAddr) -> Vec<u8> {
    Message::answer_to(&asked.message).answer(address(&asked.name(), 60, found)).bytes()
}

pub(crate) fn query(name: &str) -> Vec<u8> {
    Message::query(ID, name, A).bytes()
}

/// A socket of a pod, connected to a name server: what comes from elsewhere is not heard.
pub(crate) fn socket(world: &World, client: IpAddr, server: IpAddr) -> UdpSocket {
    let socket = world.client.run(move || UdpSocket::bind((client, 0)).unwrap());
    socket.connect((server, 53)).unwrap();
    socket.set_read_timeout(Some(WAIT)).unwrap();
    socket
}

pub(crate) fn receive(socket: &UdpSocket) -> Vec<u8> {
    let mut buffer = [0; 65536];
    loop {
        match socket.recv(&mut buffer) {
            // A signal for some other thread of the test.
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            received => return buffer[..received.unwrap()].to_vec(),
        }
    }
}

/// Nothing comes for a while.
pub(crate) fn silent(socket: &UdpSocket) {
    socket.set_read_timeout(Some(QUIET)).unwrap();
    let mut buffer = [0; 65536];
    if let Ok(length) = socket.recv(&mut buffer) {
        panic!("{:?}", &buffer[..length]);
    }
    socket.set_read_timeout(Some(WAIT)).unwrap();
}

pub(crate) fn ask(world: &World, server: IpAddr, message: &[u8]) -> Vec<u8> {
    let client = if server.is_ipv4() { CLIENT4 } else { CLIENT6 };
    let socket = socket(world, client, server);
    socket.send(message).unwrap();
    receive(&socket)
}

pub(crate) fn connect(world: &World, server: IpAddr) -> TcpStream {
    world.connect_to(SocketAddr::new(server, 53))
}

pub(crate) fn rcode(answer: &[u8]) -> u8 {
    assert!(answer[2] & 0x80 != 0, "no answer: {answer:?}");
    answer[3] & 0x0f
}
