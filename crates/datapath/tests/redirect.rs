//! Real sockets of real pods through a small proxy: what policy redirects goes through it or
//! nowhere.
//!
//! Needs root. Nodes and pods are network namespaces of the test's own.
#![expect(unsafe_code, reason = "unshare, and sockets of the proxy")]
#![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

#[allow(dead_code, reason = "no test uses all of it")]
#[path = "redirect/proxy.rs"]
mod proxy;
#[path = "redirect/world.rs"]
mod world;

use std::{
    io::{self, Read, Write},
    iter,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use palisade_abi::{
    BackendKey, BackendValue, ServiceKey, ServiceValue, TABLE_ALLOW_ALL, mark, protocol,
};
use palisade_datapath::Entry;
use proxy::Proxy;
use world::{Node, Place, Pod, Rule, world};
use zerocopy::FromZeros;

const WAIT: Duration = Duration::from_millis(400);
const PORT: u16 = 8000;
const OTHER_PORT: u16 = 8001;
/// The port is redirected, the other one closed.
const REDIRECT: u32 = 10;
/// Both are closed.
const CLOSED: u32 = 11;

/// Says to each connection and datagram from whom it came.
struct Server {
    served: Arc<AtomicUsize>,
}

impl Server {
    fn start(place: &Place, address: SocketAddr) -> Self {
        let served = Arc::new(AtomicUsize::new(0));
        let count = served.clone();
        place.run(move || {
            let (tcp, of_tcp) = (TcpListener::bind(address).unwrap(), count.clone());
            thread::spawn(move || {
                for stream in tcp.incoming() {
                    let of_tcp = of_tcp.clone();
                    thread::spawn(move || answer(stream.unwrap(), &of_tcp));
                }
            });
            let udp = UdpSocket::bind(address).unwrap();
            thread::spawn(move || {
                let mut buffer = [0; 64];
                while let Ok((_, from)) = udp.recv_from(&mut buffer) {
                    count.fetch_add(1, Ordering::SeqCst);
                    let _ = udp.send_to(from.to_string().as_bytes(), from);
                }
            });
        });
        Self { served }
    }

    /// Questions that arrived since the last call.
    fn served(&self) -> usize {
        self.served.swap(0, Ordering::SeqCst)
    }
}

fn answer(mut stream: TcpStream, served: &AtomicUsize) {
    let mut buffer = [0; 64];
    let peer = stream.peer_addr().unwrap().to_string();
    while let Ok(length) = stream.read(&mut buffer) {
        if length == 0 {
            return;
        }
        served.fetch_add(1, Ordering::SeqCst);
        if stream.write_all(peer.as_bytes()).is_err() {
            return;
        }
    }
}

fn connect(pod: &Pod, server: SocketAddr) -> io::Result<TcpStream> {
    pod.place.run(move || {
        let stream = TcpStream::connect_timeout(&server, WAIT)?;
        stream.set_read_timeout(Some(WAIT))?;
        Ok(stream)
    })
}

/// Whom the server sees.
fn ask(stream: &mut TcpStream) -> io::Result<SocketAddr> {
    stream.write_all(b"who?")?;
    let mut buffer = [0; 64];
    let length = stream.read(&mut buffer)?;
    let text = String::from_utf8_lossy(&buffer[..length]);
    text.parse().map_err(|_| io::Error::other(format!("the server says {text:?}")))
}

fn ask_by_tcp(pod: &Pod, server: SocketAddr) -> io::Result<SocketAddr> {
    ask(&mut connect(pod, server)?)
}

fn ask_by_udp(pod: &Pod, server: SocketAddr) -> io::Result<SocketAddr> {
    pod.place.run(move || {
        let local = if server.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
        let socket = UdpSocket::bind(local)?;
        socket.set_read_timeout(Some(WAIT))?;
        socket.connect(server)?;
        socket.send(b"who?")?;
        let mut buffer = [0; 64];
        let length = socket.recv(&mut buffer)?;
        String::from_utf8_lossy(&buffer[..length]).parse().map_err(io::Error::other)
    })
}

fn tables(nodes: &[Node]) {
    for node in nodes {
        node.table(REDIRECT, &[(PORT, Rule::Redirect)]);
        node.table(CLOSED, &[]);
    }
}

#[test]
fn redirected_flows_pass_through_the_proxy_and_nowhere_else() {
    let nodes = world();
    tables(&nodes);
    let proxies = [Proxy::start(&nodes[0].place), Proxy::start(&nodes[1].place)];
    let client = &nodes[0].pods[0];
    for far in [0, 1] {
        let pod = 1 - far;
        let server = &nodes[far].pods[pod];
        for ipv6 in [false, true] {
            let address = SocketAddr::new(server.address(ipv6), PORT);
            let _server = Server::start(&server.place, address);
            for (egress, ingress) in [(false, false), (true, false), (false, true), (true, true)] {
                let table = |redirects| if redirects { REDIRECT } else { TABLE_ALLOW_ALL };
                nodes[0].row(0, TABLE_ALLOW_ALL, table(egress));
                nodes[far].row(pod, table(ingress), TABLE_ALLOW_ALL);
                let what = format!("{address}, egress {egress}, ingress {ingress}");
                let expected: &[usize] = match (far, egress, ingress) {
                    (_, false, false) => &[],
                    (0, ..) | (_, true, false) => &[0],
                    (_, false, true) => &[1],
                    (_, true, true) => &[0, 1],
                };
                let through = |seen: &dyn Fn(&proxy::Seen)| {
                    for (number, proxy) in proxies.iter().enumerate() {
                        let all = proxy.seen();
                        let wanted = usize::from(expected.contains(&number));
                        assert_eq!(all.len(), wanted, "proxy {number}, {what}: {all:?}");
                        all.iter().for_each(seen);
                    }
                };
                let mut stream = connect(client, address).expect(&what);
                let own = stream.local_addr().unwrap();
                for _ in 0..3 {
                    assert_eq!(ask(&mut stream).expect(&what), own, "{what}");
                }
                through(&|seen| assert_eq!(*seen, (own, address, true), "{what}"));
                let seen_by_server = ask_by_udp(client, address).expect(&what);
                assert_eq!(seen_by_server.ip(), own.ip(), "UDP, {what}");
                through(&|seen| assert_eq!((seen.0.ip(), seen.1), (own.ip(), address), "{what}"));
            }
            nodes[far].allow_all();
        }
    }
}

/// A pod of each node, each with both families: same node and across.
fn servers(nodes: &[Node; 2]) -> impl Iterator<Item = (usize, usize, SocketAddr)> {
    let addresses = [(0, 1), (1, 0)].into_iter().flat_map(move |(node, pod)| {
        [false, true]
            .map(|ipv6| (node, pod, SocketAddr::new(nodes[node].pods[pod].address(ipv6), PORT)))
    });
    addresses.collect::<Vec<_>>().into_iter()
}

#[test]
fn without_a_proxy_nothing_passes_and_strangers_get_nothing() {
    let nodes = world();
    tables(&nodes);
    let client = &nodes[0].pods[0];
    for (far, pod, address) in servers(&nodes) {
        let server = Server::start(&nodes[far].pods[pod].place, address);
        // By the client's policy, then by the server's.
        for (node, row, ingress, egress) in
            [(0, 0, TABLE_ALLOW_ALL, REDIRECT), (far, pod, REDIRECT, TABLE_ALLOW_ALL)]
        {
            nodes.iter().for_each(Node::allow_all);
            nodes[node].row(row, ingress, egress);
            server.served();
            let what = format!("{address}, redirected on node {node}");
            assert!(ask_by_tcp(client, address).is_err(), "{what}");
            assert!(ask_by_udp(client, address).is_err(), "{what}");

            // Somebody without the mark sits on the proxy's port, and on the server's.
            let strangers = nodes[node].place.run(move || {
                let loopback = if address.is_ipv6() { "[::1]" } else { "127.0.0.1" };
                let any = if address.is_ipv6() { "[::]" } else { "0.0.0.0" };
                [format!("{loopback}:{}", palisade_abi::PROXY_PORT), format!("{any}:{PORT}")].map(
                    |local| {
                        let tcp = TcpListener::bind(&local).unwrap();
                        tcp.set_nonblocking(true).unwrap();
                        let udp = UdpSocket::bind(&local).unwrap();
                        udp.set_nonblocking(true).unwrap();
                        (tcp, udp)
                    },
                )
            });
            assert!(ask_by_tcp(client, address).is_err(), "{what}, strangers");
            assert!(ask_by_udp(client, address).is_err(), "{what}, strangers");
            for (tcp, udp) in &strangers {
                assert_eq!(tcp.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock, "{what}");
                let got = udp.recv(&mut [0; 8]).unwrap_err().kind();
                assert_eq!(got, io::ErrorKind::WouldBlock, "{what}");
            }
            assert_eq!(server.served(), 0, "{what}");
            // A datagram socket that does not share its port would keep the proxy from answering
            // in the server's name.
            let [on_the_proxys_port, (on_the_port, datagrams)] = strangers;
            drop((on_the_proxys_port, datagrams));

            let proxy = Proxy::start(&nodes[node].place);
            let mut stream = connect(client, address).expect(&what);
            ask(&mut stream).expect(&what);
            ask_by_udp(client, address).expect(&what);
            assert_eq!(proxy.seen().len(), 2, "{what}");
            assert_eq!(server.served(), 2, "{what}");
            drop(proxy);
            assert!(ask(&mut stream).is_err(), "{what}: the proxy is gone");
            assert!(ask_by_tcp(client, address).is_err(), "{what}: the proxy is gone");
            assert!(ask_by_udp(client, address).is_err(), "{what}: the proxy is gone");
            assert_eq!(server.served(), 0, "{what}: the proxy is gone");
            let _proxy = Proxy::start(&nodes[node].place);
            ask_by_tcp(client, address).expect(&what);
            ask_by_udp(client, address).expect(&what);
            drop(on_the_port);
        }
    }
}

#[test]
fn changes_of_policy_reach_open_flows() {
    const MIXED: u32 = 12;
    let nodes = world();
    tables(&nodes);
    nodes.iter().for_each(|node| {
        node.table(MIXED, &[(OTHER_PORT, Rule::Deny), (PORT, Rule::Redirect), (9000, Rule::Allow)]);
    });
    let proxies = [Proxy::start(&nodes[0].place), Proxy::start(&nodes[1].place)];
    let through = || proxies.iter().map(|proxy| proxy.seen().len()).sum::<usize>();
    let client = &nodes[0].pods[0];
    for (far, pod, address) in servers(&nodes) {
        let place = &nodes[far].pods[pod].place;
        let at = |port| SocketAddr::new(address.ip(), port);
        let _servers = [PORT, OTHER_PORT, 9000].map(|port| Server::start(place, at(port)));
        let by_client = |table| nodes[0].row(0, TABLE_ALLOW_ALL, table);
        let by_server = |table| nodes[far].row(pod, table, TABLE_ALLOW_ALL);
        for set in [&by_client as &dyn Fn(u32), &by_server] {
            nodes.iter().for_each(Node::allow_all);
            // Side by side: denied, redirected, allowed.
            set(MIXED);
            assert!(ask_by_tcp(client, at(OTHER_PORT)).is_err(), "{address}");
            assert!(ask_by_udp(client, at(OTHER_PORT)).is_err(), "{address}");
            assert_eq!(through(), 0, "{address}");
            ask_by_tcp(client, at(9000)).unwrap();
            ask_by_udp(client, at(9000)).unwrap();
            assert_eq!(through(), 0, "{address}");
            ask_by_tcp(client, address).unwrap();
            ask_by_udp(client, address).unwrap();
            assert_eq!(through(), 2, "{address}");

            // Redirected, denied, redirected again, allowed: the proxy keeps its connection.
            let mut stream = connect(client, address).unwrap();
            ask(&mut stream).unwrap();
            set(CLOSED);
            for _ in 0..2 {
                assert!(ask(&mut stream).is_err(), "denied, {address}");
            }
            assert!(ask_by_tcp(client, address).is_err(), "denied, {address}");
            assert!(ask_by_udp(client, address).is_err(), "denied, {address}");
            through();
            set(REDIRECT);
            let mut stream = connect(client, address).unwrap();
            ask(&mut stream).unwrap();
            assert_eq!(through(), 1, "{address}");
            set(TABLE_ALLOW_ALL);
            ask(&mut stream).unwrap();
            ask_by_tcp(client, address).unwrap();
            assert_eq!(through(), 0, "{address}: a new connection is direct");

            // A direct connection cannot join the proxy; the next one does.
            let mut direct = connect(client, address).unwrap();
            ask(&mut direct).unwrap();
            set(REDIRECT);
            assert!(ask(&mut direct).is_err(), "{address}: has to go through the proxy");
            assert_eq!(through(), 0, "{address}");
            ask_by_tcp(client, address).unwrap();
            assert_eq!(through(), 1, "{address}");
            set(TABLE_ALLOW_ALL);
        }
        nodes.iter().for_each(Node::allow_all);
    }
}

#[test]
fn a_datagram_flow_joins_the_proxy() {
    let nodes = world();
    tables(&nodes);
    let proxy = Proxy::start(&nodes[0].place);
    let client = &nodes[0].pods[0];
    for (far, pod, address) in servers(&nodes) {
        let _server = Server::start(&nodes[far].pods[pod].place, address);
        nodes[0].allow_all();
        let local = if address.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
        let socket = client.place.run(move || {
            let socket = UdpSocket::bind(local).unwrap();
            socket.set_read_timeout(Some(WAIT)).unwrap();
            socket.connect(address).unwrap();
            socket
        });
        let ask = || {
            socket.send(b"who?").unwrap();
            socket.recv(&mut [0; 64])
        };
        ask().unwrap();
        assert_eq!(proxy.seen().len(), 0, "{address}");
        nodes[0].row(0, TABLE_ALLOW_ALL, REDIRECT);
        ask().unwrap();
        assert_eq!(proxy.seen().len(), 1, "{address}");
        nodes[0].row(0, TABLE_ALLOW_ALL, CLOSED);
        assert!(ask().is_err(), "{address}");
        assert_eq!(proxy.seen().len(), 0, "{address}");
    }
}

#[test]
fn a_service_in_front_changes_nothing() {
    let nodes = world();
    tables(&nodes);
    let proxies = [Proxy::start(&nodes[0].place), Proxy::start(&nodes[1].place)];
    let client = &nodes[0].pods[0];
    for (version, (far, pod, address)) in servers(&nodes).enumerate() {
        let _server = Server::start(&nodes[far].pods[pod].place, address);
        let service = if address.is_ipv6() { "fd96::1" } else { "10.96.0.1" };
        let service = SocketAddr::new(service.parse().unwrap(), 80);
        for protocol in [protocol::TCP, protocol::UDP] {
            let version = version as u32 + 1;
            let backend = BackendValue {
                address: world::key(address.ip()),
                port: address.port().to_be(),
                ..FromZeros::new_zeroed()
            };
            nodes[0].put(Entry::Backend(BackendKey { version, index: 0 }, backend));
            let key = ServiceKey {
                address: world::key(service.ip()),
                port: service.port().to_be(),
                protocol,
                reserved: 0,
            };
            let value = ServiceValue { version, backends: 1, ..FromZeros::new_zeroed() };
            nodes[0].put(Entry::Service(key, value));
        }
        nodes[0].row(0, TABLE_ALLOW_ALL, REDIRECT);
        nodes[far].row(pod, REDIRECT, TABLE_ALLOW_ALL);
        let wanted = if far == 0 { 1 } else { 2 };
        let through = || proxies.iter().map(|proxy| proxy.seen().len()).sum::<usize>();
        let mut stream = connect(client, service).unwrap();
        let own = stream.local_addr().unwrap();
        for _ in 0..3 {
            assert_eq!(ask(&mut stream).unwrap(), own, "{address}");
        }
        assert_eq!(through(), wanted, "{address}");
        ask_by_udp(client, service).unwrap();
        assert_eq!(through(), wanted, "{address}");
        nodes.iter().for_each(Node::allow_all);
    }
}

#[test]
fn pods_cannot_forge_marks() {
    let nodes = world();
    tables(&nodes);
    let proxy = Proxy::start(&nodes[0].place);
    let client = &nodes[0].pods[0];
    nodes[0].row(0, TABLE_ALLOW_ALL, REDIRECT);
    for (far, pod, address) in servers(&nodes) {
        let closed = SocketAddr::new(address.ip(), OTHER_PORT);
        let place = &nodes[far].pods[pod].place;
        let servers = [address, closed].map(|address| Server::start(place, address));
        for mark in [mark::TO_PROXY, mark::FROM_PROXY, mark::CLIENT_AGAIN, mark::SERVER_AGAIN] {
            for (target, passes) in [(address, true), (closed, false)] {
                let what = format!("{target} with mark {mark:#x}");
                let socket = client.place.run(move || {
                    let local = if target.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
                    let socket = UdpSocket::bind(local).unwrap();
                    proxy::set(&socket, libc::SOL_SOCKET, libc::SO_MARK, mark as i32);
                    socket.set_read_timeout(Some(WAIT)).unwrap();
                    socket.connect(target).unwrap();
                    socket
                });
                socket.send(b"who?").unwrap();
                assert_eq!(socket.recv(&mut [0; 64]).is_ok(), passes, "{what}");
                assert_eq!(proxy.seen().len(), usize::from(passes), "{what}");
            }
        }
        let [_, closed] = &servers;
        assert_eq!(closed.served(), 0, "{address}");
    }
}

/// The proxy may close first; then the client's port waits at the proxy.
#[test]
fn a_port_can_be_used_again_at_once() {
    let nodes = world();
    tables(&nodes);
    let proxy = Proxy::start_with(&nodes[0].place, true);
    let client = &nodes[0].pods[0];
    nodes[0].row(0, TABLE_ALLOW_ALL, REDIRECT);
    // Whoever listens on the node at the servers' port, by either family, gets nothing of it.
    let stranger = nodes[0].place.run(|| {
        let listener = TcpListener::bind(format!("[::]:{PORT}")).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    });
    for (far, pod, address) in servers(&nodes) {
        let _server = Server::start(&nodes[far].pods[pod].place, address);
        let own = SocketAddr::new(client.address(address.is_ipv6()), 30_000);
        for _ in 0..2 {
            let mut stream = client.place.run(move || {
                let open = || {
                    let socket = proxy::plain_socket(address.is_ipv6());
                    proxy::set(&socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
                    proxy::bind(&socket, own).unwrap();
                    proxy::connect(&socket, address).map(|()| socket)
                };
                // The last acknowledgement may still be under way.
                let busy = |opened: &io::Result<_>| {
                    opened.as_ref().is_err_and(|error: &io::Error| {
                        error.kind() == io::ErrorKind::AddrNotAvailable
                    })
                };
                let socket = iter::repeat_with(open).find(|opened| !busy(opened)).unwrap();
                let stream = TcpStream::from(socket.unwrap());
                stream.set_read_timeout(Some(WAIT)).unwrap();
                stream
            });
            assert_eq!(ask(&mut stream).unwrap().ip(), own.ip(), "{address}");
            let end = stream.read(&mut [0; 8]).unwrap();
            assert_eq!((end, proxy.seen().len()), (0, 1), "{address}: the proxy closes first");
        }
        assert_eq!(stranger.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock, "{address}");
    }
}
