//! Who an address is taken for, when objects contradict each other; what is said of policies whose
//! Secrets come and go.

use palisade_abi::{ROW_HOST, identity as number};
use palisade_api::{convert::convert, service::Addresses};
use palisade_policy::{
    identity::{PodLabels, security_labels},
    model::{Peer, Peers, PolicyKind, PolicyRef},
};
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::tables::{
    Change, Intent,
    identities::{AddressEntry, Identity},
    namespaces::Namespace,
    nodes::{Node, NodeSource, Way},
    pods::{Endpoint, Pod},
    policies::{Finding, PolicyContent},
    secrets::Secret,
    services::{EndpointSlice, Service, ServicePort, SliceBackend},
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
    let scope = Scope { node: OWN.into(), cluster: "default".into(), routing: Routing::Native };
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

fn api_servers(family: &str, addresses: &[&str]) -> Intent {
    let backend = |text: &&str| SliceBackend { address: ip(text), ready: true, serving: true };
    Intent::Slice(Change::Put(EndpointSlice {
        name: ObjectName::new("default", format!("kubernetes-{family}")),
        service: "kubernetes".into(),
        by_controller: false,
        ports: Vec::new(),
        backends: addresses.iter().map(backend).collect(),
    }))
}

/// Wherever it moves to: who is it then, and who no longer?
#[test]
fn the_api_server_is_known_on_nodes_and_outside() {
    // Whom the entity names by identity, and whom by address.
    const PLACES: [(&str, bool, bool); 5] = [
        ("192.0.2.1", true, false),
        ("192.0.2.2", true, false),
        ("203.0.113.7", false, true),
        ("2001:db8::7", false, true),
        // Of a pod: it stays what it is, as networks in policies do not mean pods.
        ("10.0.1.5", false, true),
    ];
    let scope = Scope { node: OWN.into(), cluster: "default".into(), routing: Routing::Native };
    let (mut resolver, mut tables) = (Resolver::new(scope, []), Tables::default());
    let object = json!({
        "metadata": { "name": "p", "namespace": "default" },
        "spec": { "endpointSelector": {}, "egress": [{ "toEntities": ["kube-apiserver"] }] },
    });
    let policy = convert(PolicyKind::CiliumNetworkPolicy, &object, "default").unwrap();
    for intent in [
        node(OWN, NodeSource::Node, &["192.0.2.1"]),
        node(FAR, NodeSource::Node, &["192.0.2.2", "192.0.2.22"]),
        node("forged", NodeSource::CiliumNode, &["203.0.113.7", "203.0.113.8"]),
        pod("web", OWN, "10.0.1.5"),
        endpoint("web", "10.0.1.5"),
    ] {
        tables.apply(intent);
    }
    let by_identity = |tables: &Tables, address| {
        let labels = tables.labels_of(tables.identity_of(ip(address)));
        labels.get("reserved", "kube-apiserver").is_some()
    };
    let by_address = |tables: &Tables, address| {
        let policy = tables.api_servers.spelled_out(&policy);
        let entries = policy.rules.iter().flat_map(|rule| rule.egress.entries.clone());
        let mut peers = entries.flat_map(|entry| match entry.peers {
            Peers::List(list) => list,
            Peers::Any => Vec::new(),
        });
        peers.any(|peer| matches!(peer, Peer::Cidr(cidr) if cidr.contains(ip(address))))
    };
    for round in 0..2 * PLACES.len() {
        let (place, identity, address) = PLACES[round % PLACES.len()];
        tables.apply(api_servers("ipv4", &[place]));
        resolver.resolve(&mut tables);
        for (other, _, _) in PLACES {
            let is_here = other == place;
            assert_eq!(by_identity(&tables, other), is_here && identity, "{other} at {place}");
            assert_eq!(by_address(&tables, other), is_here && address, "{other} at {place}");
        }
        assert_eq!(by_identity(&tables, "192.0.2.22"), place == "192.0.2.2", "the other address");
        assert!(!by_identity(&tables, "203.0.113.8"), "a `CiliumNode` makes nobody one");
    }
    tables.apply(api_servers("ipv4", &["192.0.2.2"]));
    tables.apply(api_servers("ipv6", &["2001:db8::7"]));
    resolver.resolve(&mut tables);
    assert!(by_identity(&tables, "192.0.2.2") && by_address(&tables, "2001:db8::7"));
    // The node lost the address: it is still the API server's.
    tables.apply(node(FAR, NodeSource::Node, &["192.0.2.3"]));
    resolver.resolve(&mut tables);
    assert!(by_address(&tables, "192.0.2.2") && !by_identity(&tables, "192.0.2.3"));
    // What follows Services and pods does not count.
    let Intent::Slice(Change::Put(slice)) = api_servers("ipv4", &["192.0.2.3"]) else { panic!() };
    tables.apply(Intent::Slice(Change::Put(EndpointSlice { by_controller: true, ..slice })));
    resolver.resolve(&mut tables);
    assert!(!by_identity(&tables, "192.0.2.3") && by_address(&tables, "2001:db8::7"));
}

#[test]
fn an_address_that_a_node_lost_is_nobodys_whatever_its_cilium_node_says() {
    let before = || {
        vec![
            node(FAR, NodeSource::Node, &["192.0.2.2"]),
            node(FAR, NodeSource::CiliumNode, &["192.0.2.2"]),
        ]
    };
    assert_eq!(owner_of("192.0.2.2", before()).map(|it| it.identity), Some(number::REMOTE_NODE));
    let after = before().into_iter().chain([node(FAR, NodeSource::Node, &["192.0.2.3"])]).collect();
    assert_eq!(owner_of("192.0.2.2", after), None);
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

/// A pod is made again under its name. Whatever comes first, what the API says or what the runtime
/// does, neither of the two pods is ever taken for the other.
#[test]
fn a_pod_of_the_same_name_is_never_taken_for_the_one_before() {
    const OLD: (u32, &str) = (1000, "10.0.1.5");
    const NEW: (u32, &str) = (1001, "10.0.1.6");
    let labels = |app: &str| BTreeMap::from([("app".to_owned(), app.to_owned())]);
    let in_api = |uid: &str, address: &str| {
        let Intent::Pod(Change::Put(pod)) = pod("web", OWN, address) else { unreachable!() };
        let labels = labels(uid);
        Intent::Pod(Change::Put(Pod { uid: uid.into(), runtime_uid: uid.into(), labels, ..pod }))
    };
    let attached = |id: u32, uid: &str, address: &str| {
        let Intent::Endpoint(Change::Put(end)) = endpoint("web", address) else { unreachable!() };
        Intent::Endpoint(Change::Put(Endpoint { id, uid: uid.into(), ..end }))
    };
    let numbered = |id: u32, uid: &str| {
        let labels = security_labels(&PodLabels {
            namespace: "default",
            namespace_labels: Some(&BTreeMap::new()),
            pod_labels: Some(&labels(uid)),
            service_account: "default",
            cluster: "default",
        });
        Intent::Identity(Change::Put(Identity { id, labels: Arc::new(labels) }))
    };
    let namespace = || Namespace { name: "default".into(), labels: BTreeMap::new() };
    let begin = || {
        let mut bench = (
            Resolver::new(
                Scope { node: OWN.into(), cluster: "default".into(), routing: Routing::Native },
                [],
            ),
            Tables::default(),
        );
        for intent in [
            Intent::Namespace(Change::Put(namespace())),
            numbered(OLD.0, "old"),
            numbered(NEW.0, "new"),
            in_api("old", OLD.1),
            attached(ENDPOINT, "old", OLD.1),
        ] {
            after(&mut bench, intent);
        }
        bench
    };
    fn after((resolver, tables): &mut (Resolver, Tables), intent: Intent) -> [Option<u32>; 2] {
        tables.apply(intent);
        resolver.resolve(tables);
        [OLD, NEW].map(|(_, address)| tables.addresses.get(&ip(address)).map(|it| it.identity))
    }
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let mut bench = begin();
        let mut last = [Some(OLD.0), None];
        for number in order {
            let [old, new] = after(
                &mut bench,
                match number {
                    0 => in_api("new", NEW.1),
                    1 => Intent::Endpoint(Change::Delete(ENDPOINT)),
                    _ => attached(ENDPOINT + 1, "new", NEW.1),
                },
            );
            assert!([None, Some(OLD.0), Some(number::INIT)].contains(&old), "{order:?}: {old:?}");
            assert!([None, Some(NEW.0), Some(number::INIT)].contains(&new), "{order:?}: {new:?}");
            last = [old, new];
        }
        assert_eq!(last, [None, Some(NEW.0)], "{order:?}");
    }
    // The API says that the old one is gone, and nothing of the new one.
    let mut bench = begin();
    let gone = Intent::Pod(Change::Delete(ObjectName::new("default", "web")));
    assert_eq!(after(&mut bench, gone), [Some(number::INIT), None]);
    let known = after(&mut bench, attached(ENDPOINT + 1, "new", NEW.1));
    assert_eq!(known, [Some(number::INIT); 2]);
}

/// A policy that compares a header with a Secret, as it is after its status says `reported`.
fn secretive(reported: Option<Condition>) -> Intent {
    let kind = PolicyKind::CiliumNetworkPolicy;
    let secret = json!({ "name": "x-token", "secret": { "name": "token" } });
    let ports = json!({
        "ports": [{ "port": "80", "protocol": "TCP" }],
        "rules": { "http": [{}, { "headerMatches": [secret] }] },
    });
    let object = json!({
        "metadata": { "name": "a", "namespace": "default" },
        "spec": { "endpointSelector": {}, "ingress": [{ "toPorts": [ports] }] },
    });
    let content =
        PolicyContent::Accepted(convert(kind, &object, "default").expect("a policy").into());
    let id = PolicyRef { kind, namespace: Some("default".into()), name: "a".into() };
    let object = PolicyObject { id, uid: "a".into(), generation: 3, content, reported };
    Intent::Policy(kind, Change::Put(object))
}

fn token(data: &[(&str, &[u8])]) -> Secret {
    let data = data.iter().map(|(key, value)| ((*key).to_owned(), value.to_vec())).collect();
    Secret { name: ObjectName::new("elsewhere", "default.token"), data }
}

#[test]
fn a_policy_without_its_secret_says_so_until_it_is_there() {
    let scope = Scope { node: OWN.into(), cluster: "default".into(), routing: Routing::Native };
    let mut resolver = Resolver::new(scope, []);
    let mut tables = Tables { secrets_namespace: "elsewhere".into(), ..Tables::default() };
    let mut after = |intent: Intent| {
        tables.apply(intent);
        let conditions = resolver.resolve(&mut tables).conditions;
        conditions.into_iter().map(|(_, condition)| condition).next_back()
    };
    let finding = |found: Option<Condition>| found.map(|condition| condition.finding);

    assert_eq!(after(secretive(None)), None, "nobody knows yet which Secrets there are");
    let missing = after(Intent::Secret(Change::Replace(Vec::new()))).expect("a condition");
    assert_eq!((missing.finding, missing.generation), (Finding::SecretMissing, Some(3)));
    let path = "spec.ingress[0].toPorts[0].rules.http[1].headerMatches: ";
    assert!(missing.message.starts_with(path), "{}", missing.message);
    for word in [
        "`x-token`",
        "`default.token`",
        "`elsewhere`",
        "without a line break at its end",
        "copy Secret `default/token`",
    ] {
        assert!(missing.message.contains(word), "{word}: {}", missing.message);
    }
    assert_eq!(after(secretive(Some(missing))), None, "it is said already");

    for useless in [
        token(&[("a", b"1"), ("b", b"2")]),
        token(&[("a", b"\xff")]),
        token(&[("a", b"1\n")]),
        token(&[("a", b"1\r\nx: y")]),
        token(&[("a", b" 1")]),
    ] {
        assert_eq!(after(Intent::Secret(Change::Put(useless))), None, "no value either");
    }
    let found = after(Intent::Secret(Change::Put(token(&[("a", b"1")])))).expect("a condition");
    assert_eq!(found.finding, Finding::Accepted);
    assert_eq!(after(secretive(Some(found))), None);

    let gone = Change::Delete(ObjectName::new("elsewhere", "default.token"));
    assert_eq!(finding(after(Intent::Secret(gone))), Some(Finding::SecretMissing));
    let failed = Change::Failed("away".into());
    assert_eq!(after(Intent::Secret(failed)), None);
    assert_eq!(after(secretive(None)), None, "what is known may be old");
    let again = Change::Replace(vec![token(&[("a", b"1")])]);
    assert_eq!(finding(after(Intent::Secret(again))), Some(Finding::Accepted));
}

/// `destination`, who sends or may send it, and how, of every way through the overlay.
fn overlay_ways(nodes: Vec<Node>) -> Vec<(String, String, Way)> {
    let scope = Scope { node: OWN.into(), cluster: "default".into(), routing: Routing::Overlay };
    let mut resolver = Resolver::new(scope, []);
    let mut tables = Tables::default();
    for node in nodes {
        tables.apply(Intent::Node(node.source, Change::Put(node)));
    }
    resolver.resolve(&mut tables);
    let rows = tables.routes.rows();
    rows.map(|row| (row.destination.to_string(), row.via.to_string(), row.way)).collect()
}

fn with_pods(name: &str, source: NodeSource, addresses: &[&str], pods: &[&str]) -> Node {
    let Intent::Node(_, Change::Put(node)) = node(name, source, addresses) else { unreachable!() };
    Node { pod_cidrs: pods.iter().map(|text| text.parse().expect("a network")).collect(), ..node }
}

#[test]
fn the_overlay_has_one_end_for_each_node() {
    let ways = overlay_ways(vec![
        with_pods(OWN, NodeSource::Node, &["192.0.2.1"], &["10.0.1.0/24"]),
        with_pods(
            FAR,
            NodeSource::Node,
            &["2001:db8::2", "192.0.2.2"],
            &["10.0.2.0/24", "fd00:2::/64"],
        ),
    ]);
    let end = "192.0.2.2";
    let expected = [
        ("10.0.2.0/24", end, Way::Overlay),
        ("192.0.2.2/32", end, Way::OverlayOfPods),
        ("2001:db8::2/128", end, Way::OverlayOfPods),
        ("fd00:2::/64", end, Way::Overlay),
    ];
    let expected = expected.map(|(to, via, way)| (to.to_owned(), via.to_owned(), way));
    assert_eq!(ways, expected);
}

#[test]
fn nobody_comes_out_of_the_overlay_as_this_node_or_by_a_cilium_node() {
    let own = || with_pods(OWN, NodeSource::Node, &["192.0.2.1"], &["10.0.1.0/24"]);
    let forged = ["10.0.1.0/24", "10.0.1.128/25", "10.0.0.0/16", "192.0.2.0/24", "0.0.0.0/0"];
    for pods in forged {
        let far = with_pods(FAR, NodeSource::Node, &["192.0.2.1"], &[pods]);
        assert_eq!(overlay_ways(vec![own(), far]), [], "{pods}");
    }
    let far = with_pods(FAR, NodeSource::CiliumNode, &["192.0.2.2"], &["10.0.2.0/24"]);
    assert_eq!(overlay_ways(vec![own(), far]), []);
}

const SHARED: &str = "203.0.113.7";

/// A Service of one family, with TCP ports.
fn service(name: &str, own: &str, lent: &[&str], ports: &[u16]) -> Service {
    let lent = lent.iter().map(|text| ip(text)).collect();
    Service {
        name: ObjectName::new("default", name),
        addresses: Addresses { own: BTreeSet::from([ip(own)]), lent },
        ports: ports.iter().map(|port| tcp(*port)).collect(),
        affinity: None,
    }
}

fn tcp(port: u16) -> ServicePort {
    ServicePort { name: port.to_string(), protocol: 6, port }
}

/// The one backend of a Service.
fn behind(service: &str, address: &str) -> Intent {
    Intent::Slice(Change::Put(EndpointSlice {
        name: ObjectName::new("default", format!("{service}-1")),
        service: service.into(),
        by_controller: true,
        ports: [80, 81].map(tcp).to_vec(),
        backends: vec![SliceBackend { address: ip(address), ready: true, serving: true }],
    }))
}

fn put(service: Service) -> Intent {
    Intent::Service(Change::Put(service))
}

fn gone(name: &str) -> Intent {
    Intent::Service(Change::Delete(ObjectName::new("default", name)))
}

struct Frontends(Resolver, Tables);

impl Frontends {
    fn new() -> Self {
        let scope = Scope { node: OWN.into(), cluster: "default".into(), routing: Routing::Native };
        Self(Resolver::new(scope, []), Tables::default())
    }

    fn after(&mut self, intents: impl IntoIterator<Item = Intent>) {
        intents.into_iter().for_each(|intent| self.1.apply(intent));
        self.0.resolve(&mut self.1);
    }

    /// The Service and the backend that are reached, everywhere.
    fn all(&self) -> BTreeMap<(IpAddr, u16), String> {
        let rows = self.1.service_entries.rows().map(|row| {
            let backends: Vec<_> = row.backends.iter().map(ToString::to_string).collect();
            let reached = format!("{} {}", row.service.name, backends.join(","));
            ((row.frontend.address, row.frontend.port), reached)
        });
        rows.collect()
    }
}

#[test]
fn what_a_service_has_of_its_own_is_lent_to_no_other() {
    const MINE: &str = "10.96.0.2";
    let thief = || put(service("a", "10.96.0.1", &[MINE, SHARED], &[80]));
    let owner = || put(service("b", MINE, &[SHARED], &[80, 81]));
    for order in [[thief(), owner()], [owner(), thief()]] {
        let mut world = Frontends::new();
        world.after([behind("a", "10.0.0.1"), behind("b", "10.0.0.2")]);
        for intent in order {
            world.after([intent]);
        }
        let (a, b) = ("a 10.0.0.1:80", "b 10.0.0.2:80");
        let reached = |world: &Frontends, address: &str, port| {
            world.all().get(&(ip(address), port)).cloned().unwrap_or_default()
        };
        assert_eq!(reached(&world, MINE, 80), b);
        assert_eq!(reached(&world, SHARED, 80), a);
        assert_eq!(reached(&world, SHARED, 81), "b 10.0.0.2:81");
        // What changes behind the other changes nothing; whoever is next is reached at once.
        world.after([behind("a", "10.0.0.9")]);
        assert_eq!(reached(&world, MINE, 80), b);
        assert_eq!(reached(&world, SHARED, 80), "a 10.0.0.9:80");
        world.after([gone("a")]);
        assert_eq!(reached(&world, SHARED, 80), b);
        world.after([thief()]);
        assert_eq!(reached(&world, SHARED, 80), "a 10.0.0.9:80");
        world.after([gone("b")]);
        assert_eq!(reached(&world, MINE, 80), "a 10.0.0.9:80");
        assert_eq!(reached(&world, SHARED, 81), "");
        world.after([gone("a")]);
        assert!(world.all().is_empty() && world.0.tenants.is_empty());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    /// Whatever came when, the last word of each Service says who is reached where.
    #[test]
    fn frontends_are_those_of_the_services_as_they_are(
        steps in prop::collection::vec(
            (0usize..3, 0u8..8, 0usize..4, 0u8..16, 1u8..4, any::<bool>()), 1..24,
        )
    ) {
        const NAMES: [&str; 3] = ["a", "b", "c"];
        const ADDRESSES: [&str; 4] = ["10.96.0.1", "10.96.0.2", "10.96.0.3", SHARED];
        let (mut world, mut services, mut backends) =
            (Frontends::new(), BTreeMap::new(), BTreeMap::new());
        for (name, what, own, lent, ports, resolve) in steps {
            let name = NAMES[name];
            let chosen = |mask: u8| move |n: &usize| mask >> n & 1 == 1;
            let intent = match what {
                0 => {
                    services.remove(name);
                    gone(name)
                }
                1 => {
                    let backend = format!("10.0.0.{}", 1 + lent);
                    backends.insert(name, backend.clone());
                    behind(name, &backend)
                }
                _ => {
                    let lent: Vec<_> = (0..4).filter(chosen(lent)).map(|n| ADDRESSES[n]).collect();
                    let ports: Vec<_> = (0..2).filter(chosen(ports)).map(|n| [80, 81][n]).collect();
                    services.insert(name, (ADDRESSES[own], lent.clone(), ports.clone()));
                    put(service(name, ADDRESSES[own], &lent, &ports))
                }
            };
            world.1.apply(intent);
            if resolve {
                world.after([]);
            }
        }
        world.after([]);
        let mut expected = BTreeMap::new();
        for (address, port) in ADDRESSES.iter().flat_map(|it| [(*it, 80), (*it, 81)]) {
            let with_port = services.iter().filter(|(_, (.., ports))| ports.contains(&port));
            let own = with_port.clone().find(|(_, (own, ..))| *own == address);
            let lent = with_port.clone().find(|(_, (_, lent, _))| lent.contains(&address));
            if let Some((name, _)) = own.or(lent) {
                let backend = backends.get(name).map(|it| format!("{it}:{port}"));
                let reached = format!("{name} {}", backend.unwrap_or_default());
                expected.insert((ip(address), port), reached);
            }
        }
        prop_assert_eq!(world.all(), expected);
    }
}
