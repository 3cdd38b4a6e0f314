//! The fabric between nodes, in real network namespaces. Needs root and no running lab.

use std::io::Read;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use palisade_lab::fabric;
use palisade_lab::layout::{API_PORT, FABRIC_NETNS, FABRIC_V4, FABRIC_V6, NodePlan};
use palisade_lab::sys::netns;

const LIMIT: Duration = Duration::from_secs(2);

/// Removes what the test made, however it ends.
struct Cleanup(Vec<NodePlan>);

impl Drop for Cleanup {
    fn drop(&mut self) {
        for node in &self.0 {
            let _ = netns::remove(&node.netns());
        }
        let _ = netns::remove(FABRIC_NETNS);
    }
}

fn reaches(from: &NodePlan, to: SocketAddr) -> bool {
    netns::run_in(&from.netns_path(), move || TcpStream::connect_timeout(&to, LIMIT)).is_ok()
}

#[test]
fn nodes_reach_each_other_and_the_api_server_in_both_families() {
    if !rustix::process::geteuid().is_root() || netns::path(FABRIC_NETNS).exists() {
        eprintln!("skipped: needs root and no running lab");
        return;
    }
    let nodes = NodePlan::all(2);
    let _cleanup = Cleanup(nodes.clone());
    fabric::create(&nodes).unwrap();

    let listeners = fabric::listen().unwrap();
    assert_eq!(listeners.len(), 2);
    for address in [IpAddr::from(FABRIC_V4), FABRIC_V6.into()] {
        for node in &nodes {
            assert!(reaches(node, SocketAddr::new(address, API_PORT)), "{} {address}", node.name);
        }
    }

    for address in nodes[1].addresses() {
        let listener = netns::run_in(&nodes[1].netns_path(), move || {
            TcpListener::bind(SocketAddr::new(address, 8080))
        })
        .unwrap();
        let answering = std::thread::spawn(move || {
            let (mut stream, peer) = listener.accept().unwrap();
            let mut end = [0];
            assert_eq!(stream.read(&mut end).unwrap(), 0);
            peer.ip()
        });
        assert!(reaches(&nodes[0], SocketAddr::new(address, 8080)), "{address}");
        let peer = answering.join().unwrap();
        assert!(nodes[0].addresses().contains(&peer), "no translation on the way: {peer}");
    }
}
