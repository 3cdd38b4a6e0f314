//! By tables that the resolver filled, as in the agent.

use palisade_api::{admin::Inside, convert::convert, routing::Routing, service::Addresses};
use palisade_policy::model::PolicyKind;
use serde_json::{Value, json};

use super::*;
use crate::{
    resolve::Resolver,
    tables::{
        Change, Intent,
        identities::Identity,
        namespaces::Namespace,
        nodes::{Node, NodeSource},
        pods::Endpoint,
        policies::PolicyObject,
        secrets::Secret,
        services::{EndpointSlice, ServicePort, SliceBackend},
    },
};

const OWN: &str = "node1";
const FAR: &str = "node2";

struct World {
    scope: Scope,
    resolver: Resolver,
    tables: Tables,
}

impl World {
    /// A namespace, and a pod of this node for each name, with the address 10.0.0.n and its name
    /// for a label.
    fn with(pods: &[&str]) -> Self {
        let scope = Scope { node: OWN.into(), cluster: "default".into(), routing: Routing::Native };
        let resolver = Resolver::new(scope.clone(), []);
        let mut world = Self { scope, resolver, tables: Tables::default() };
        let namespace = Namespace { name: "default".into(), labels: BTreeMap::new() };
        world.put(Intent::Namespace(Change::Put(namespace)));
        for (n, name) in (1..).zip(pods) {
            world.pod(name, OWN, n);
            world.put(Intent::Endpoint(Change::Put(Endpoint {
                id: n.into(),
                pod: ObjectName::new("default", *name),
                uid: (*name).into(),
                container_id: (*name).into(),
                interface: format!("lxc{n}"),
                ifindex: n.into(),
                mac: [2; 6],
                host_mac: [4; 6],
                ipv4: Some([10, 0, 0, n].into()),
                ipv6: None,
            })));
        }
        world
    }

    fn pod(&mut self, name: &str, node: &str, n: u8) {
        self.put(Intent::Pod(Change::Put(Pod {
            name: ObjectName::new("default", name),
            uid: name.into(),
            runtime_uid: name.into(),
            node: node.into(),
            addresses: vec![[10, 0, 0, n].into()],
            host_network: false,
            terminating: false,
            labels: BTreeMap::from([("app".into(), name.into())]),
            service_account: "default".into(),
            ports: Vec::new(),
        })));
    }

    /// Labels get their numbers at once.
    fn put(&mut self, intent: Intent) {
        self.tables.apply(intent);
        self.resolver.resolve(&mut self.tables);
        let unnumbered = self.tables.pod_identities.rows().filter(|row| row.identity.is_none());
        for labels in unnumbered.map(|row| row.labels.clone()).collect::<Vec<_>>() {
            let id = 1000 + u32::try_from(self.tables.identities.len()).unwrap();
            self.tables.apply(Intent::Identity(Change::Put(Identity { id, labels })));
        }
        self.resolver.resolve(&mut self.tables);
    }

    fn policy(&mut self, spec: &Value) {
        let kind = PolicyKind::CiliumNetworkPolicy;
        let metadata = json!({ "name": "a", "namespace": "default" });
        let content = match convert(kind, &json!({ "metadata": metadata, "spec": spec }), "default")
        {
            Ok(policy) => PolicyContent::Accepted(policy.into()),
            Err(refusal) => PolicyContent::Refused {
                message: refusal.to_string(),
                lockdown: refusal.lockdown(),
            },
        };
        let id = PolicyRef { kind, namespace: Some("default".into()), name: "a".into() };
        let object = PolicyObject { id, uid: "a".into(), generation: 1, content, reported: None };
        self.put(Intent::Policy(kind, Change::Put(object)));
    }

    fn explain(&self, from: &str, to: &str, port: u16) -> Result<Explanation, NoAnswer> {
        self.explain_inside(from, to, port, None)
    }

    fn explain_inside(
        &self,
        from: &str,
        to: &str,
        port: u16,
        inside: Option<Inside>,
    ) -> Result<Explanation, NoAnswer> {
        let refused = self.tables.policies.rows();
        let last_good = refused
            .filter_map(|object| {
                Some((object.id.clone(), self.resolver.last_good(object)?.clone()))
            })
            .collect();
        let (from, to) = (from.to_owned(), to.to_owned());
        let asked = Explain { from, to, protocol: 6, port, inside };
        explain(&self.scope, &self.tables, &last_good, &asked)
    }

    fn allows(&self, from: &str, to: &str, port: u16) -> bool {
        self.explain(from, to, port).unwrap().allowed
    }
}

fn unknown(answer: Result<Explanation, NoAnswer>) -> String {
    match answer.unwrap_err() {
        NoAnswer::Unknown(why) => why,
        elsewhere => panic!("{elsewhere:?}"),
    }
}

fn into_server(from: &str) -> Value {
    json!({
        "endpointSelector": { "matchLabels": { "app": "server" } },
        "ingress": [{ "fromEndpoints": [{ "matchLabels": { "app": from } }] }],
    })
}

#[test]
fn a_refused_policy_is_judged_by_its_last_good_version() {
    let mut refused = into_server("client");
    refused["ingress"][0]["nonsense"] = json!(true);
    let mut world = World::with(&["client", "other", "server"]);
    assert!(world.allows("client", "server", 80) && world.allows("other", "server", 80));
    world.policy(&into_server("client"));
    assert!(world.allows("client", "server", 80) && !world.allows("other", "server", 80));
    world.policy(&refused);
    assert!(world.allows("client", "server", 80) && !world.allows("other", "server", 80));

    // Where none was ever accepted, the subject is closed.
    let mut world = World::with(&["client", "other", "server"]);
    world.policy(&refused);
    assert!(!world.allows("client", "server", 80) && world.allows("server", "client", 80));
}

#[test]
fn an_address_counts_for_the_names_that_it_was_learned_for() {
    let mut world = World::with(&["client", "other"]);
    world.policy(&json!({
        "endpointSelector": { "matchLabels": { "app": "client" } },
        "egress": [{ "toFQDNs": [{ "matchName": "a.example" }] }],
    }));
    let learn = |world: &mut World, endpoint: u32, container: &str, name: &str| {
        let addresses = BTreeSet::from([[203, 0, 113, 5].into()]);
        let names = BTreeMap::from([(name.to_owned(), addresses)]);
        let container = container.to_owned();
        let row = LearnedNames { endpoint, container, generation: 1, names };
        world.put(Intent::Names(Change::Put(row)));
    };
    let (near, far) = ("203.0.113.5", "203.0.113.6");
    assert!(!world.allows("client", near, 8088), "nothing is learned yet");
    learn(&mut world, 2, "other", "a.example");
    assert!(!world.allows("client", near, 8088), "what others learn counts for them");
    learn(&mut world, 1, "before", "a.example");
    assert!(!world.allows("client", near, 8088), "what a container before it learned");
    learn(&mut world, 1, "client", "b.example");
    assert!(!world.allows("client", near, 8088), "another name");
    learn(&mut world, 1, "client", "a.example");
    assert!(world.allows("client", near, 8088) && !world.allows("client", far, 8088));
}

#[test]
fn names_learned_on_another_node_are_asked_for_there() {
    let mut world = World::with(&["server"]);
    world.pod("client", FAR, 9);
    let labels = json!({ "matchLabels": { "app": "client" } });
    world.policy(
        &json!({ "endpointSelector": labels, "egress": [{ "toCIDR": ["203.0.113.5/32"] }] }),
    );
    assert!(world.explain("client", "203.0.113.5", 80).is_ok());
    let names = json!([{ "toFQDNs": [{ "matchName": "a.example" }] }]);
    world.policy(&json!({ "endpointSelector": labels, "egress": names }));
    assert!(world.explain("client", "10.0.0.1", 80).is_ok());
    let elsewhere = world.explain("client", "203.0.113.5", 80).unwrap_err();
    assert!(matches!(elsewhere, NoAnswer::Elsewhere { node, .. } if node == FAR));
    // On this node, and no endpoint yet.
    world.pod("client", OWN, 9);
    let error = unknown(world.explain("client", "203.0.113.5", 80));
    assert!(error.contains("once it is connected"), "{error}");
}

#[test]
fn rules_have_the_values_of_secrets_as_the_proxy_has_them() {
    let mut world = World::with(&["client", "server"]);
    let secret = json!({ "name": "x-token", "secret": { "name": "token" }, "mismatch": "REPLACE" });
    world.policy(&json!({
        "endpointSelector": { "matchLabels": { "app": "server" } },
        "ingress": [{ "toPorts": [{
            "ports": [{ "port": "80", "protocol": "TCP" }],
            "rules": { "http": [{}, { "path": "/x", "headerMatches": [secret] }] },
        }] }],
    }));
    let ask = |world: &World, target: &str| {
        let (method, target, host) = ("GET".into(), target.into(), String::new());
        let inside = Some(Inside::Http { method, target, host, headers: Vec::new() });
        let found = world.explain_inside("client", "server", 80, inside).unwrap();
        (found.allowed, found.ends.into_iter().find(|end| end.direction == "ingress").unwrap())
    };
    assert!(ask(&world, "/y").0);
    let (allowed, end) = ask(&world, "/x");
    assert!(!allowed, "another rule allows it, and the header would stay as it is");
    assert!(end.verdict.ends_with("for want of Secret default/token"), "{end:?}");
    assert!(end.nearest.unwrap().contains("rules.http[1] allows /x, and needs Secret"));
    let name = ObjectName::new("palisade-secrets", "default.token");
    let data = |value: &[u8]| BTreeMap::from([("value".to_owned(), value.to_vec())]);
    world.put(Intent::Secret(Change::Put(Secret { name: name.clone(), data: data(b"1\n") })));
    assert!(!ask(&world, "/x").0, "no value of a header");
    world.put(Intent::Secret(Change::Put(Secret { name: name.clone(), data: data(b"1") })));
    let (allowed, end) = ask(&world, "/x");
    assert!(allowed && end.rules.len() == 1, "{end:?}");
    world.put(Intent::Secret(Change::Delete(name)));
    assert!(!ask(&world, "/x").0);
}

const CLUSTER_IP: &str = "10.96.0.9";

/// A Service with port 80, whose backends take port 8080.
fn service(world: &mut World, backends: &[(&str, bool)]) {
    service_at(world, "front", (CLUSTER_IP, &[]), 80, backends);
}

/// A Service with one port, at an address of its own and at others, whose backends take port 8080.
fn service_at(
    world: &mut World,
    name: &str,
    (own, lent): (&str, &[&str]),
    number: u16,
    backends: &[(&str, bool)],
) {
    let name = ObjectName::new("default", name);
    let port = |port| vec![ServicePort { name: "web".into(), protocol: 6, port }];
    let ip = |text: &str| text.parse().unwrap();
    world.put(Intent::Service(Change::Put(Service {
        name: name.clone(),
        addresses: Addresses {
            own: BTreeSet::from([ip(own)]),
            lent: lent.iter().map(|text| ip(text)).collect(),
        },
        ports: port(number),
        affinity: None,
    })));
    let backends = backends.iter().map(|(address, ready)| SliceBackend {
        address: address.parse().unwrap(),
        ready: *ready,
        serving: *ready,
    });
    world.put(Intent::Slice(Change::Put(EndpointSlice {
        service: name.name.clone(),
        name,
        by_controller: false,
        ports: port(8080),
        backends: backends.collect(),
    })));
}

#[test]
fn a_service_is_judged_at_its_backends() {
    let mut world = World::with(&["client", "server", "other"]);
    service(&mut world, &[("10.0.0.2", true), ("10.0.0.9", false)]);
    let ports = json!([{ "ports": [{ "port": "8080", "protocol": "TCP" }] }]);
    world.policy(&json!({
        "endpointSelector": { "matchLabels": { "app": "server" } },
        "ingress": [{ "fromEndpoints": [{ "matchLabels": { "app": "client" } }], "toPorts": ports }],
    }));
    for to in ["svc/front", "svc/default/front", "front", "default/front", CLUSTER_IP] {
        let found = world.explain("client", to, 80).unwrap();
        assert_eq!(found.to, "Service default/front");
        let service = found.service.unwrap();
        assert_eq!(service.frontend, "10.96.0.9:80/TCP");
        let [backend] = &service.backends[..] else { panic!("{service:?}") };
        assert_eq!(backend.to, "default/server at 10.0.0.2:8080");
        assert!(found.allowed && backend.ends.iter().any(|end| end.direction == "ingress"));
        assert!(!world.allows("other", to, 80), "{to}");
    }
    service(&mut world, &[("10.0.0.2", true), ("10.0.0.1", true)]);
    let found = world.explain("other", "front", 80).unwrap();
    let verdicts: Vec<bool> = found.service.unwrap().backends.iter().map(|it| it.allowed).collect();
    assert!(!found.allowed);
    assert_eq!(verdicts, [true, false], "in the order of their addresses");
}

#[test]
fn what_a_service_does_not_take_is_an_error() {
    let mut world = World::with(&["client", "server"]);
    service(&mut world, &[("10.0.0.2", true)]);
    for (from, to, port, expected) in [
        ("client", CLUSTER_IP, 8080, "has no port 8080/TCP; it has 80/TCP"),
        ("client", "svc/back", 80, "there is no Service default/back"),
        (CLUSTER_IP, "server", 80, "which opens no connections"),
    ] {
        let error = unknown(world.explain(from, to, port));
        assert!(error.contains(expected), "{error}");
    }
    service(&mut world, &[]);
    let refused = world.explain("client", "front", 80).unwrap();
    assert!(!refused.allowed && refused.service.unwrap().backends.is_empty());
    let name = ObjectName::new("default", "front");
    let (addresses, ports) = (Addresses::default(), Vec::new());
    world.put(Intent::Service(Change::Put(Service { name, addresses, ports, affinity: None })));
    assert!(unknown(world.explain("client", "svc/front", 80)).contains("is headless"));
}

/// As the data path finds it: by address and port.
#[test]
fn an_address_that_several_have_is_explained_port_by_port() {
    const SHARED: &str = "203.0.113.7";
    const NODE: &str = "192.0.2.1";
    let mut world = World::with(&["client", "one", "other"]);
    world.put(Intent::Node(
        NodeSource::Node,
        Change::Put(Node {
            name: OWN.into(),
            source: NodeSource::Node,
            uid: OWN.into(),
            addresses: vec![NODE.parse().unwrap()],
            router_addresses: Vec::new(),
            pod_cidrs: Vec::new(),
        }),
    ));
    let lent = [SHARED, NODE, "10.96.0.2"];
    service_at(&mut world, "a", ("10.96.0.1", &lent), 80, &[("10.0.0.2", true)]);
    service_at(&mut world, "b", ("10.96.0.2", &lent), 81, &[("10.0.0.3", true)]);
    for (to, port, service, frontend) in [
        (SHARED, 80, Some("default/a"), "203.0.113.7:80/TCP"),
        (SHARED, 81, Some("default/b"), "203.0.113.7:81/TCP"),
        ("::ffff:203.0.113.7", 81, Some("default/b"), "203.0.113.7:81/TCP"),
        (SHARED, 82, None, ""),
        (NODE, 80, Some("default/a"), "192.0.2.1:80/TCP"),
        (NODE, 82, None, ""),
        ("10.96.0.2", 80, Some("default/a"), "10.96.0.2:80/TCP"),
        ("10.96.0.2", 81, Some("default/b"), "10.96.0.2:81/TCP"),
        ("svc/b", 81, Some("default/b"), "10.96.0.2:81/TCP"),
    ] {
        let found = world.explain("client", to, port).unwrap().service;
        let found = found.map(|it| (it.name, it.frontend));
        let expected = service.map(|name| (name.to_owned(), frontend.to_owned()));
        assert_eq!(found, expected, "{to}:{port}");
    }
    for (to, port) in [("svc/a", 81), ("svc/b", 80), ("10.96.0.2", 82)] {
        let error = unknown(world.explain("client", to, port));
        assert!(error.contains("has no port"), "{error}");
    }
    // At its other ports the node is the node, and opens connections as ever.
    world.policy(&json!({
        "endpointSelector": { "matchLabels": { "app": "client" } },
        "egress": [{ "toEntities": ["host"] }],
        "ingress": [{ "fromEntities": ["host", "world"] }],
    }));
    assert!(world.allows("client", NODE, 82) && !world.allows("client", NODE, 80));
    assert!(!world.allows("client", SHARED, 82));
    assert!(world.allows(NODE, "client", 80) && world.allows(SHARED, "client", 80));
    let error = unknown(world.explain("10.96.0.2", "client", 80));
    assert!(error.contains("is Service default/b, which opens no connections"), "{error}");
}

#[test]
fn a_pod_of_the_very_name_is_no_service() {
    let mut world = World::with(&["client", "front"]);
    service(&mut world, &[("10.0.0.1", true)]);
    assert_eq!(world.explain("client", "front", 80).unwrap().to, "default/front");
    assert!(world.explain("client", "svc/front", 80).unwrap().service.is_some());
}
