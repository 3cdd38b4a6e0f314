//! Who an address is taken for, when objects contradict each other.

use palisade_abi::{ROW_HOST, identity as number};

use super::*;
use crate::tables::{
    Change, Intent,
    identities::AddressEntry,
    nodes::{Node, NodeSource},
    pods::{Endpoint, Pod},
};

const OWN: &str = "node1";
const FAR: &str = "node2";
const ENDPOINT: u32 = 7;

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn node(name: &str, source: NodeSource, addresses: &[&str]) -> Intent {
    let node = Node {
        name: name.into(),
        source,
        uid: name.into(),
        addresses: addresses.iter().map(|text| ip(text)).collect(),
        router_addresses: Vec::new(),
        pod_cidrs: Vec::new(),
    };
    Intent::Node(source, Change::Put(node))
}

fn pod(name: &str, node: &str, address: &str) -> Intent {
    Intent::Pod(Change::Put(Pod {
        name: ObjectName::new("default", name),
        uid: name.into(),
        runtime_uid: name.into(),
        node: node.into(),
        addresses: vec![ip(address)],
        host_network: false,
        terminating: false,
        labels: BTreeMap::new(),
        service_account: "default".into(),
        ports: Vec::new(),
    }))
}

fn endpoint(pod: &str, address: &str) -> Intent {
    let IpAddr::V4(ipv4) = ip(address) else { panic!("{address} is not IPv4") };
    Intent::Endpoint(Change::Put(Endpoint {
        id: ENDPOINT,
        pod: ObjectName::new("default", pod),
        uid: pod.into(),
        container_id: pod.into(),
        interface: "lxc1".into(),
        ifindex: 11,
        mac: [2; 6],
        host_mac: [4; 6],
        ipv4: Some(ipv4),
        ipv6: None,
    }))
}

fn owner_of(address: &str, intents: Vec<Intent>) -> Option<AddressEntry> {
    let scope = Scope { node: OWN.into(), cluster: "default".into() };
    let mut resolver = Resolver::new(scope, []);
    let mut tables = Tables::default();
    for intent in intents {
        tables.apply(intent);
        resolver.resolve(&mut tables);
    }
    tables.addresses.get(&ip(address)).map(|entry| **entry)
}

#[test]
fn a_node_is_host_to_itself_and_remote_to_others() {
    let own = owner_of("192.0.2.1", vec![node(OWN, NodeSource::Node, &["192.0.2.1"])]);
    assert_eq!(own.map(|entry| (entry.identity, entry.row)), Some((number::HOST, ROW_HOST)));
    for source in [NodeSource::Node, NodeSource::CiliumNode] {
        let far = owner_of("192.0.2.2", vec![node(FAR, source, &["192.0.2.2"])]);
        assert_eq!(far.map(|entry| entry.identity), Some(number::REMOTE_NODE));
    }
}

#[test]
fn no_object_turns_an_endpoint_into_the_host() {
    for source in [NodeSource::Node, NodeSource::CiliumNode] {
        for name in [OWN, FAR] {
            let forged = owner_of(
                "10.0.1.5",
                vec![
                    pod("web", OWN, "10.0.1.5"),
                    endpoint("web", "10.0.1.5"),
                    node(name, source, &["10.0.1.5"]),
                ],
            );
            assert_eq!(forged.map(|entry| entry.row), Some(ENDPOINT), "{name} {source:?}");
        }
    }
}

#[test]
fn the_own_cilium_node_makes_nobody_host() {
    let forged = owner_of("10.0.2.5", vec![node(OWN, NodeSource::CiliumNode, &["10.0.2.5"])]);
    assert_eq!(forged.map(|entry| entry.identity), None);
}

#[test]
fn an_address_of_a_pod_and_of_another_node_is_nobodys() {
    let pod = || pod("web", FAR, "10.0.2.5");
    let node = || node(FAR, NodeSource::CiliumNode, &["10.0.2.5"]);
    for intents in [vec![pod(), node()], vec![node(), pod()]] {
        let forged = owner_of("10.0.2.5", intents);
        assert_eq!(forged.map(|entry| entry.identity), Some(number::UNKNOWN));
    }
}
