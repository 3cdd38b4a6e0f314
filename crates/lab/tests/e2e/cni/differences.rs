//! CHECK finds what is not as ADD left it, one thing at a time, and says which.

use std::path::Path;

use palisade_lab::nodes::Program;
use serde_json::{Value, json};

use super::{Container, Node, addresses, ip_in, keep_away, open};
use crate::harness::{Lab, eventually};

/// A pod as it was made, on which a test breaks one thing.
struct Fresh<'a> {
    container: Container<'a>,
    result: Value,
}

impl<'a> Fresh<'a> {
    fn new(node: &'a Node) -> Self {
        let container = Container::new(node, "fresh");
        let result = container.add();
        container.check(&result).succeeded();
        Self { container, result }
    }

    fn host(&self) -> &str {
        self.result["interfaces"][0]["name"].as_str().unwrap()
    }

    /// CHECK says this, and DEL cleans up all the same.
    #[track_caller]
    fn differs(self, message: &str) {
        self.container.check(&self.result).refused(101, message);
        self.container.delete();
    }
}

fn inside_the_pod(node: &Node) {
    let fresh = Fresh::new(node);
    fresh.container.ip("link del eth0");
    fresh.differs("interface eth0 is missing in the pod");

    let fresh = Fresh::new(node);
    fresh.container.ip("link set eth0 down");
    fresh.differs("interface eth0 is down");

    let fresh = Fresh::new(node);
    fresh.container.ip("link set eth0 address 02:00:00:00:00:01");
    fresh.differs("interface eth0 does not have MAC address");

    for (family, length, everywhere) in [(0, 32, "0.0.0.0/0"), (1, 128, "::/0")] {
        let fresh = Fresh::new(node);
        let address = format!("{}/{length}", addresses(&fresh.result)[family]);
        fresh.container.ip(&format!("addr del {address} dev eth0"));
        fresh.differs(&format!("interface eth0 does not have address {address}"));

        let fresh = Fresh::new(node);
        fresh.container.ip(&format!("route del {everywhere}"));
        fresh.differs(&format!("the route to {everywhere} is missing in the pod"));
    }
}

fn on_the_node(node: &Node) {
    let fresh = Fresh::new(node);
    let message = format!("interface {} is down", fresh.host());
    ip_in(&node.place.netns, &format!("link set {} down", fresh.host()));
    fresh.differs(&message);

    for (family, length) in [(0, 32), (1, 128)] {
        let fresh = Fresh::new(node);
        let address = format!("{}/{length}", addresses(&fresh.result)[family]);
        ip_in(&node.place.netns, &format!("route del {address} dev {}", fresh.host()));
        fresh.differs(&format!("the route to {address} is missing on the node"));
    }

    for program in ["from_pod", "to_pod"] {
        let fresh = Fresh::new(node);
        let pin = node.place.pins.join(format!("{program}-{}", fresh.host()));
        let message = format!("the programs are not attached to {}", fresh.host());
        keep_away(&pin);
        eventually("the program is gone", || !fresh.container.check(&fresh.result).success);
        fresh.container.check(&fresh.result).refused(101, &message);
        std::fs::remove_dir(&pin).unwrap();
        fresh.container.delete();
    }
}

/// A pinned table of these sizes, emptied; what was in it.
fn emptied<const K: usize, const V: usize>(pin: &Path) -> Vec<([u8; K], [u8; V])> {
    let mut table = open(pin);
    let entries: Vec<_> = table.iter().map(Result::unwrap).collect();
    assert!(!entries.is_empty(), "{}", pin.display());
    entries.iter().for_each(|(key, _)| table.remove(key).unwrap());
    entries
}

/// A table loses its entries and gets them again.
fn in_table<const K: usize, const V: usize>(node: &Node, name: &str, fresh: &Fresh<'_>) {
    let pin = node.place.maps.join(name);
    let entries = emptied::<K, V>(&pin);
    let message = format!("the kernel's table {name} does not hold what the agent wrote");
    fresh.container.check(&fresh.result).refused(101, &message);
    let mut table = open::<K, V>(&pin);
    entries.iter().for_each(|(key, value)| table.insert(key, value, 0).unwrap());
    fresh.container.check(&fresh.result).succeeded();
}

fn in_the_kernels_tables(lab: &Lab, node: &Node) {
    lab.apply_policy(
        "default",
        "guard",
        "{podSelector: {matchLabels: {app: shared}}, ingress: [{from: [{podSelector: {matchLabels: \
         {app: friend}}}], ports: [{port: 80}]}]}",
    );
    let fresh = Fresh::new(node);
    in_table::<16, 16>(node, "ENDPOINTS", &fresh);
    in_table::<4, 4>(node, "INTERFACES", &fresh);
    in_table::<8, 72>(node, "CHUNKS", &fresh);
    in_table::<12, 16>(node, "PORTS", &fresh);
    in_table::<12, 16>(node, "PEERS", &fresh);

    // The next agent writes what is missing.
    emptied::<12, 16>(&node.place.maps.join("PEERS"));
    lab.kill(1, Program::Agent);
    eventually("the table is whole again", || fresh.container.check(&fresh.result).success);
    fresh.container.delete();
}

#[test]
fn a_check_names_each_difference() {
    let lab = Lab::up(1);
    lab.pods([("shared", 1), ("friend", 1)]);
    lab.kubectl(&["-n", "kube-system", "rollout", "status", "deployment/kube-dns"]);
    let node = Node::new(&lab);
    let before = node.traces();
    inside_the_pod(&node);
    on_the_node(&node);
    in_the_kernels_tables(&lab, &node);
    node.run("STATUS", json!({})).succeeded();
    eventually("nothing is left", || node.traces() == before);
}
