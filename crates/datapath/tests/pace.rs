//! How fast a pod may ask through the proxy. A program of its own: what it sends would take the CPUs
//! that other tests await datagrams on.
//!
//! Needs root. Nodes and pods are network namespaces of the test's own.
#![expect(unsafe_code, reason = "unshare, and sockets of the proxy")]
#![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

#[allow(dead_code, reason = "no test uses all of it")]
#[path = "redirect/proxy.rs"]
mod proxy;
#[allow(dead_code, reason = "no test uses all of it")]
#[path = "redirect/world.rs"]
mod world;

use std::{
    iter,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use palisade_abi::{DropReason, TABLE_ALLOW_ALL, limits};
use world::{Node, Place, Rule, world};

const PORT: u16 = 53;
const REDIRECT: u32 = 10;
/// Longer than a pod must ask nothing to ask as much at once as it may.
const WAIT: Duration = Duration::from_millis(400);
/// By then whatever was sent has come somewhere.
const PATIENCE: Duration = Duration::from_secs(5);
/// So many are under way at once: fewer than a CPU's backlog holds (`net.core.netdev_max_backlog`).
const UNDER_WAY: usize = 64;

/// Where the questions of a node go, and what became of them.
struct Questions<'n> {
    node: &'n Node,
    proxy: [UdpSocket; 2],
}

impl Questions<'_> {
    fn dropped(&self) -> usize {
        let drops = self.node.datapath.metrics().unwrap().drops(DropReason::TooManyQuestions);
        usize::try_from(drops.packets).unwrap()
    }

    fn arrived(&self) -> usize {
        let of = |socket: &UdpSocket| iter::from_fn(|| socket.recv(&mut [0; 8]).ok()).count();
        self.proxy.iter().map(of).sum()
    }

    /// Asks in turn by each of the sockets; how many questions came to the proxy. All others were
    /// dropped for their pace.
    fn ask(&self, sockets: &[UdpSocket; 2], count: usize) -> usize {
        let (before, mut all) = (self.dropped(), 0);
        let mut sent = 0;
        for (at, socket) in sockets.iter().cycle().take(count).enumerate() {
            socket.send(b"who?").unwrap();
            sent += 1;
            if sent % UNDER_WAY != 0 && at + 1 < count {
                continue;
            }
            let begun = Instant::now();
            while all + self.dropped() - before < sent {
                all += self.arrived();
                assert!(begun.elapsed() < PATIENCE, "{all} of {sent} came, others were lost");
            }
        }
        all
    }
}

/// A socket of the node at which the proxy would listen.
fn listener(place: &Place, ipv6: bool) -> UdpSocket {
    let loopback: IpAddr =
        if ipv6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
    let socket = proxy::datagrams(place, SocketAddr::new(loopback, palisade_abi::PROXY_PORT));
    socket.set_nonblocking(true).unwrap();
    socket
}

/// What one pod asks beyond the pace is dropped, of both families together; what it asks at once is
/// not, and neither is what another pod asks.
#[test]
fn a_pod_asks_no_faster_than_it_may() {
    let nodes = world();
    let [node, far] = &nodes;
    for node in &nodes {
        node.table(REDIRECT, &[(PORT, Rule::Redirect)]);
    }
    let proxy = [false, true].map(|ipv6| listener(&node.place, ipv6));
    let questions = Questions { node, proxy };
    let sockets = |pod: usize| {
        node.row(pod, TABLE_ALLOW_ALL, REDIRECT);
        [false, true].map(|ipv6| {
            let server = SocketAddr::new(far.pods[0].address(ipv6), PORT);
            let own = SocketAddr::new(node.pods[pod].address(ipv6), 0);
            node.pods[pod].place.run(move || {
                let socket = UdpSocket::bind(own).unwrap();
                socket.connect(server).unwrap();
                socket
            })
        })
    };
    let [greedy, other] = [sockets(0), sockets(1)];
    let at_once = usize::try_from(limits::QUESTIONS_AT_ONCE).unwrap();
    for round in 0..2 {
        assert_eq!(questions.ask(&greedy, at_once), at_once, "at once, {round}");
        thread::sleep(WAIT);
    }
    let begun = Instant::now();
    let arrived = questions.ask(&greedy, 20 * at_once);
    let grown = begun.elapsed().as_nanos() / u128::from(limits::QUESTION_NANOS);
    let most = 1 + at_once + usize::try_from(grown).unwrap();
    assert!((at_once..=most).contains(&arrived), "{arrived} of at most {most}");
    assert!(arrived < 20 * at_once, "it asked no faster than it may");
    assert_eq!(questions.ask(&other, at_once), at_once, "another pod");
    thread::sleep(WAIT);
    assert_eq!(questions.ask(&greedy, at_once), at_once, "it waited");
}
