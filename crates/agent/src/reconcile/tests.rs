//! Writes that fail. After each single step of a change it is asked who may talk to whom: nothing
//! may be allowed that neither the state before nor the state after allows.

use std::{
    net::IpAddr,
    sync::{Mutex, PoisonError},
};

use palisade_abi::{
    ChunkKey, EndpointKey, EndpointRow, IpcacheKey, PREFIX_POD_BIT, PeerKey, PortKey, ROW_HOST,
    TABLE_ALLOW_ALL, TABLE_NONE,
    identity::{UNKNOWN, is_world},
};
use palisade_api::{convert::convert, routing::Routing};
use palisade_datapath::{
    Key,
    fake::{FakeKernel, FakeTables},
};
use palisade_policy::{
    identity::{PodLabels, candidates, security_labels},
    model::{PolicyKind, PolicyRef},
};
use serde_json::{Value, json};

use super::*;
use crate::{
    resolve::{Resolver, Scope},
    tables::{
        Change, Intent, ObjectName,
        identities::Identity,
        namespaces::Namespace,
        nodes::{Node, NodeSource},
        pods::{Endpoint, Pod},
        policies::{PolicyContent, PolicyObject},
        services::ServiceEntry,
    },
};

const TCP: u8 = 6;
const PEERS: [&str; 9] = [
    "10.0.1.11",
    "10.0.1.12",
    "10.0.1.13",
    "10.0.1.14",
    "10.0.2.11",
    "10.0.2.12",
    "10.0.2.13",
    "192.0.2.7",
    "192.9.9.9",
];

/// Who may talk: endpoint, outwards, peer, port.
type Allowed = BTreeSet<(u32, bool, IpAddr, u16)>;
type Refuses = Box<dyn Fn(usize, &Step) -> bool + Send>;

/// A kernel that refuses what it is told to, and looks after each step at what is allowed.
struct Watched {
    kernel: FakeKernel,
    watch: Mutex<Watch>,
}

#[derive(Default)]
struct Watch {
    steps: usize,
    refuses: Option<Refuses>,
    /// What is allowed after each step, while somebody wants to know.
    seen: Option<Vec<(Step, Allowed)>>,
}

impl Watched {
    fn watch(&self) -> std::sync::MutexGuard<'_, Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kernel for Watched {
    fn apply(&self, step: &Step) -> Result<(), KernelError> {
        let mut watch = self.watch();
        let number = watch.steps;
        watch.steps += 1;
        if watch.refuses.as_ref().is_some_and(|refuses| refuses(number, step)) {
            return Err(KernelError::Full { table: "test" });
        }
        self.kernel.apply(step)?;
        if let Some(seen) = &mut watch.seen {
            seen.push((*step, allowed(&self.kernel.tables())));
        }
        Ok(())
    }

    fn dump(&self) -> Result<Vec<Entry>, KernelError> {
        self.kernel.dump()
    }
}

/// Asks the tables as the programs do.
fn allowed(tables: &FakeTables) -> Allowed {
    let mut allowed = Allowed::new();
    for (number, row) in tables.rows.iter().filter(|(number, _)| **number > ROW_HOST) {
        for (outwards, table) in [(false, row.ingress_table), (true, row.egress_table)] {
            for peer in PEERS.iter().map(|text| ip(text)) {
                for port in [80, 81] {
                    if admits(tables, table, peer, port) {
                        allowed.insert((*number, outwards, peer, port));
                    }
                }
            }
        }
    }
    allowed
}

fn bits(words: [u64; 2]) -> u128 {
    u128::from(words[0]) | u128::from(words[1]) << 64
}

/// Identity and prefix.
fn identify(tables: &FakeTables, peer: IpAddr) -> (u32, u32) {
    let key = Key::Endpoint(EndpointKey { address: mirror::address_bytes(peer) });
    if let Some(Entry::Endpoint(_, value)) = tables.entries.get(&key) {
        // A local sender is who its row says it is.
        let identity = tables.rows.get(&value.row).filter(|_| value.row > ROW_HOST);
        return (identity.map_or(value.identity, |row| row.identity), value.prefix);
    }
    let networks = tables.entries.values().filter_map(|entry| match entry {
        Entry::Ipcache(key, value) => {
            mirror::network_from(key).filter(|net| net.contains(&peer)).map(|_| (key, value))
        }
        _ => None,
    });
    let longest = networks.max_by_key(|(key, _): &(&IpcacheKey, _)| key.prefix_len);
    longest.map_or((UNKNOWN, 0), |(_, value)| (value.identity, value.prefix))
}

fn admits(tables: &FakeTables, table: u32, peer: IpAddr, port: u16) -> bool {
    match table {
        TABLE_NONE => return false,
        TABLE_ALLOW_ALL => return true,
        _ => {}
    }
    let (identity, prefix) = identify(tables, peer);
    let prefix = match prefix {
        0 => 0,
        prefix if is_world(identity) => prefix,
        prefix => prefix | PREFIX_POD_BIT,
    };
    let mut chunk = 0;
    loop {
        let key = Key::Chunk(ChunkKey { table, chunk });
        let Some(Entry::Chunk(_, content)) = tables.entries.get(&key) else { return false };
        let peer = |id| match tables.entries.get(&Key::Peer(PeerKey { table, chunk, id })) {
            Some(Entry::Peer(_, value)) => Some(bits(value.rules)),
            _ => None,
        };
        let mut peers = peer(identity).unwrap_or_else(|| bits(content.default_peers));
        peers |= if prefix == 0 { 0 } else { peer(prefix).unwrap_or_default() };
        let of_port = (0..=16_u8).rev().find_map(|prefix_len| {
            let mask = u16::try_from(0xffff_u32 << (16 - prefix_len) & 0xffff).unwrap_or(0);
            let chunk = u16::try_from(chunk).expect("few chunks");
            let (protocol, reserved) = (TCP, 0);
            let key = PortKey { table, chunk, prefix_len, protocol, port: port & mask, reserved };
            match tables.entries.get(&Key::Port(key)) {
                Some(Entry::Port(_, value)) => Some(bits(value.rules)),
                _ => None,
            }
        });
        let hit = peers & of_port.unwrap_or_else(|| bits(content.default_ports));
        if hit != 0 {
            return bits(content.deny) >> hit.trailing_zeros() & 1 == 0;
        }
        chunk += 1;
        if chunk == content.chunks {
            return false;
        }
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Everything between the API and a kernel.
struct Agent {
    kernel: Arc<Watched>,
    tables: Tables,
    resolver: Resolver,
    reconciler: Reconciler,
}

impl Agent {
    fn new() -> Self {
        let kernel = Arc::new(Watched { kernel: FakeKernel::default(), watch: Mutex::default() });
        let mut agent = Self::over(kernel);
        assert_eq!(agent.round(Self::world()), Vec::<String>::new());
        agent
    }

    /// The next one over a kernel, without having heard anything.
    fn over(kernel: Arc<Watched>) -> Self {
        let scope =
            Scope { node: "node1".into(), cluster: "default".into(), routing: Routing::Native };
        let reconciler = Reconciler::new(kernel.clone()).expect("a kernel that can be read");
        let resolver = Resolver::new(scope, reconciler.policy_prefixes().clone());
        Self { kernel, tables: Tables::default(), resolver, reconciler }
    }

    fn world() -> Vec<Intent> {
        let mut world = vec![Intent::Namespace(Change::Put(Namespace {
            name: "default".into(),
            labels: BTreeMap::new(),
        }))];
        world.extend([1, 2].map(node));
        for (name, app) in [("web", "web"), ("friend", "friend"), ("foe", "foe")] {
            let address = format!("10.0.1.{}", 11 + world.len() - 3);
            world.push(pod(name, app, "node1", &address));
        }
        world.push(pod("far-friend", "friend", "node2", "10.0.2.11"));
        world.push(pod("far-foe", "foe", "node2", "10.0.2.12"));
        world.extend([("web", 2), ("friend", 3), ("foe", 4)].map(endpoint));
        world
    }

    /// What the kernel lacks after the round.
    fn round(&mut self, intents: Vec<Intent>) -> Vec<String> {
        for intent in intents {
            if let Intent::Pod(Change::Put(pod)) = &intent {
                self.tables.apply(identity_of(pod));
            }
            self.tables.apply(intent);
        }
        let outcome = self.resolver.resolve(&mut self.tables);
        let report = self.reconciler.round(&mut self.tables, &outcome.changes);
        if report.prefixes_settled {
            self.resolver.acknowledge_prefixes();
        }
        report.problems
    }

    /// Rounds until nothing is left to do.
    fn settle(&mut self, intents: Vec<Intent>) {
        self.round(intents);
        for _ in 0..5 {
            if self.round(Vec::new()).is_empty() && self.reconciler.is_settled() {
                return;
            }
        }
        panic!("the kernel never holds what is wanted");
    }

    fn refuse(&self, refuses: impl Fn(usize, &Step) -> bool + Send + 'static) {
        let mut watch = self.kernel.watch();
        watch.steps = 0;
        watch.refuses = Some(Box::new(refuses));
    }

    fn heal(&self) {
        self.kernel.watch().refuses = None;
    }

    fn allowed(&self) -> Allowed {
        allowed(&self.kernel.kernel.tables())
    }

    /// All but the tables' numbers.
    fn held(&self) -> (Vec<Entry>, usize, Allowed) {
        let tables = self.kernel.kernel.tables();
        let compiled = |key: &Key| matches!(key, Key::Chunk(_) | Key::Peer(_) | Key::Port(_));
        let (compiled, plain): (Vec<_>, Vec<_>) =
            tables.entries.iter().partition(|(key, _)| compiled(key));
        (plain.into_iter().map(|(_, entry)| *entry).collect(), compiled.len(), allowed(&tables))
    }
}

fn node(number: u8) -> Intent {
    Intent::Node(
        NodeSource::Node,
        Change::Put(Node {
            name: format!("node{number}"),
            source: NodeSource::Node,
            uid: format!("node{number}"),
            addresses: vec![[172, 31, 255, number].into()],
            router_addresses: Vec::new(),
            pod_cidrs: vec![format!("10.0.{number}.0/24").parse().expect("a network")],
        }),
    )
}

fn pod(name: &str, app: &str, node: &str, address: &str) -> Intent {
    Intent::Pod(Change::Put(Pod {
        name: ObjectName::new("default", name),
        uid: name.into(),
        runtime_uid: name.into(),
        node: node.into(),
        addresses: vec![ip(address)],
        host_network: false,
        terminating: false,
        labels: [("app".to_owned(), app.to_owned())].into(),
        service_account: "default".into(),
        ports: Vec::new(),
    }))
}

/// The cluster knows the number of the pod's labels, which follows from them.
fn identity_of(pod: &Pod) -> Intent {
    let labels = security_labels(&PodLabels {
        namespace: "default",
        namespace_labels: Some(&BTreeMap::new()),
        pod_labels: Some(&pod.labels),
        service_account: &pod.service_account,
        cluster: "default",
    });
    let id = candidates(&labels).next().expect("a number");
    Intent::Identity(Change::Put(Identity { id, labels: Arc::new(labels) }))
}

fn gone(name: &str) -> Intent {
    Intent::Pod(Change::Delete(ObjectName::new("default", name)))
}

fn endpoint((name, id): (&str, u8)) -> Intent {
    Intent::Endpoint(Change::Put(Endpoint {
        id: id.into(),
        pod: ObjectName::new("default", name),
        uid: name.into(),
        container_id: name.into(),
        interface: format!("lxc{id}"),
        ifindex: 10 + u32::from(id),
        mac: [2; 6],
        host_mac: [4; 6],
        ipv4: Some([10, 0, 1, id + 9].into()),
        ipv6: None,
    }))
}

fn policy(kind: PolicyKind, name: &str, spec: &Value) -> Intent {
    let id = policy_name(kind, name);
    let object = json!({ "metadata": { "name": name, "namespace": "default" }, "spec": spec });
    let accepted = convert(kind, &object, "default").expect("a policy");
    let content = PolicyContent::Accepted(accepted.into());
    let object = PolicyObject { id, uid: name.into(), generation: 1, content, reported: None };
    Intent::Policy(kind, Change::Put(object))
}

fn policy_name(kind: PolicyKind, name: &str) -> PolicyRef {
    PolicyRef { kind, namespace: Some("default".into()), name: name.into() }
}

fn network_policy(ingress: &Value) -> Intent {
    let spec = json!({ "podSelector": { "matchLabels": { "app": "web" } }, "ingress": ingress });
    policy(PolicyKind::NetworkPolicy, "web", &spec)
}

/// Everybody but `app` may talk to the web pod.
fn deny(app: &str, port: &str) -> Intent {
    protect("web", &[app], port)
}

/// Everybody but `apps` may talk to `subject`.
fn protect(subject: &str, apps: &[&str], port: &str) -> Intent {
    let apps: Vec<_> = apps.iter().map(|app| json!({ "matchLabels": { "app": app } })).collect();
    let spec = json!({
        "endpointSelector": { "matchLabels": { "app": subject } },
        "ingress": [{
            "fromEntities": ["all"],
            "toPorts": [{ "ports": [{ "port": port, "protocol": "TCP" }] }],
        }],
        "ingressDeny": [{ "fromEndpoints": apps }],
    });
    policy(PolicyKind::CiliumNetworkPolicy, "web", &spec)
}

struct Scenario {
    name: &'static str,
    before: fn() -> Vec<Intent>,
    change: fn() -> Vec<Intent>,
    /// The change is of several things that have nothing to do with each other: each of them may
    /// be in force before the others.
    apart: bool,
}

fn scenario(
    name: &'static str,
    before: fn() -> Vec<Intent>,
    change: fn() -> Vec<Intent>,
) -> Scenario {
    Scenario { name, before, change, apart: false }
}

fn scenarios() -> Vec<Scenario> {
    vec![
        scenario("an exception appears", || vec![wide_block()], || vec![narrow_block()]),
        scenario("an exception goes", || vec![narrow_block()], || vec![wide_block()]),
        scenario("a block of pods appears", || vec![wide_block()], || vec![pod_block()]),
        scenario("a block of pods goes", || vec![pod_block()], || vec![wide_block()]),
        scenario("a policy appears and denies", Vec::new, || vec![deny("foe", "80")]),
        scenario(
            "a policy goes, another closes",
            || vec![deny("foe", "80")],
            || {
                vec![
                    Intent::Policy(
                        PolicyKind::CiliumNetworkPolicy,
                        Change::Delete(policy_name(PolicyKind::CiliumNetworkPolicy, "web")),
                    ),
                    network_policy(&json!([])),
                ]
            },
        ),
        scenario(
            "a pod here becomes a foe",
            || vec![deny("foe", "80")],
            || vec![pod("friend", "foe", "node1", "10.0.1.12")],
        ),
        scenario(
            "a pod far away becomes a foe",
            || vec![deny("foe", "80")],
            || vec![pod("far-friend", "foe", "node2", "10.0.2.11")],
        ),
        scenario(
            "pods of a new identity come that are denied",
            || vec![deny("stranger", "80")],
            || {
                vec![
                    pod("stranger", "stranger", "node1", "10.0.1.14"),
                    pod("far-stranger", "stranger", "node2", "10.0.2.13"),
                    endpoint(("stranger", 5)),
                ]
            },
        ),
        Scenario {
            apart: true,
            ..scenario(
                "a pod gets a new identity that is denied, and the policy changes",
                || vec![deny("stranger", "80")],
                || {
                    vec![
                        pod("friend", "stranger", "node1", "10.0.1.12"),
                        pod("far-friend", "stranger", "node2", "10.0.2.11"),
                        deny("stranger", "81"),
                    ]
                },
            )
        },
        scenario(
            "who is denied gets a new identity that is denied, and the policy changes",
            || {
                vec![
                    pod("late", "late", "node1", "10.0.1.14"),
                    endpoint(("late", 5)),
                    protect("late", &["foe", "stranger"], "80"),
                ]
            },
            || {
                vec![
                    pod("foe", "stranger", "node1", "10.0.1.13"),
                    pod("far-foe", "stranger", "node2", "10.0.2.12"),
                    protect("late", &["foe", "stranger"], "81"),
                ]
            },
        ),
        scenario(
            "pods leave",
            || vec![deny("foe", "80")],
            || vec![gone("far-friend"), gone("foe"), Intent::Endpoint(Change::Delete(4))],
        ),
    ]
}

fn wide_block() -> Intent {
    network_policy(&json!([{ "from": [{ "ipBlock": { "cidr": "192.0.0.0/8" } }] }]))
}

fn narrow_block() -> Intent {
    let block = json!({ "cidr": "192.0.0.0/8", "except": ["192.0.2.0/24"] });
    network_policy(&json!([{ "from": [{ "ipBlock": block }] }]))
}

fn pod_block() -> Intent {
    let block = json!({ "cidr": "10.0.0.0/16", "except": ["10.0.2.8/29"] });
    network_policy(&json!([{ "from": [{ "ipBlock": block }] }]))
}

/// The agent before the change; what it allows then, and what it holds after a change that
/// nothing disturbs, and in how many writes.
fn undisturbed(scenario: &Scenario) -> (Allowed, (Vec<Entry>, usize, Allowed), usize) {
    let mut agent = before(scenario);
    let old = agent.allowed();
    agent.kernel.watch().steps = 0;
    agent.settle((scenario.change)());
    let steps = agent.kernel.watch().steps;
    (old, agent.held(), steps)
}

fn before(scenario: &Scenario) -> Agent {
    let mut agent = Agent::new();
    agent.settle((scenario.before)());
    agent
}

fn check(scenario: &Scenario, what: &str, refuses: impl Fn(usize, &Step) -> bool + Send + 'static) {
    let (mut fine, held, _) = undisturbed(scenario);
    fine.extend(&held.2);
    let alone = if scenario.apart { (scenario.change)().len() } else { 0 };
    for index in 0..alone {
        let mut agent = before(scenario);
        agent.settle(vec![(scenario.change)().swap_remove(index)]);
        fine.extend(agent.allowed());
    }
    let mut agent = before(scenario);
    agent.kernel.watch().seen = Some(Vec::new());
    agent.refuse(refuses);
    agent.round((scenario.change)());
    agent.round(Vec::new());
    agent.heal();
    agent.settle(Vec::new());
    let seen = agent.kernel.watch().seen.take().unwrap_or_default();
    for (number, (step, allowed)) in seen.iter().enumerate() {
        let open: Vec<_> = allowed.difference(&fine).collect();
        assert!(
            open.is_empty(),
            "{}, {what}: step {number} {step:?} opens {open:?}",
            scenario.name
        );
    }
    let (entries, compiled, allowed) = agent.held();
    assert_eq!(entries, held.0, "{}, {what}", scenario.name);
    assert_eq!(compiled, held.1, "{}, {what}: entries of compiled policies", scenario.name);
    assert!(allowed == held.2, "{}, {what}: not what should be allowed", scenario.name);
}

#[test]
fn the_scenarios_change_what_they_say() {
    for scenario in scenarios() {
        let (old, (_, _, new), steps) = undisturbed(&scenario);
        assert!(steps > 0 && !new.is_empty(), "{}", scenario.name);
        assert_ne!(old, new, "{}", scenario.name);
    }
}

#[test]
fn a_write_that_fails_opens_nothing_and_is_made_up_for() {
    for scenario in scenarios() {
        let (_, _, steps) = undisturbed(&scenario);
        for failing in 0..=steps {
            check(&scenario, &format!("write {failing}"), move |number, _| number == failing);
        }
    }
}

#[test]
fn a_full_table_opens_nothing_and_is_made_up_for() {
    type Wants = fn(&Step) -> bool;
    let tables: [(&str, Wants); 5] = [
        ("addresses", |step| matches!(step, Step::Put(Entry::Endpoint(..)))),
        ("networks", |step| matches!(step, Step::Put(Entry::Ipcache(..)))),
        ("chunks", |step| matches!(step, Step::Put(Entry::Chunk(..)))),
        ("peers", |step| matches!(step, Step::Put(Entry::Peer(..)))),
        ("ports", |step| matches!(step, Step::Put(Entry::Port(..)))),
    ];
    for scenario in scenarios() {
        for (name, wants) in tables {
            check(&scenario, name, move |_, step| wants(step));
        }
    }
}

#[test]
fn removals_and_denials_happen_beside_a_full_table() {
    let mut agent = Agent::new();
    agent.refuse(|_, step| matches!(step, Step::Put(Entry::Endpoint(..))));
    let problems = agent.round(vec![
        pod("far-stranger", "friend", "node2", "10.0.2.13"),
        gone("far-friend"),
        network_policy(&json!([])),
    ]);
    assert_eq!(problems, ["the kernel's table test is full"]);
    let key = |text| Key::Endpoint(EndpointKey { address: mirror::address_bytes(ip(text)) });
    let tables = agent.kernel.kernel.tables();
    assert!(!tables.entries.contains_key(&key("10.0.2.11")), "the pod that left is still there");
    let web =
        allowed(&tables).into_iter().find(|(row, outwards, ..)| (*row, *outwards) == (2, false));
    assert_eq!(web, None, "the policy is not in force");
}

/// Of the pods that have one address one after the other.
const PASSED_ON: &str = "10.0.1.12";

fn heir() -> Intent {
    pod("heir", "foe", "node1", PASSED_ON)
}

fn heir_attached(id: u32) -> Intent {
    let Intent::Endpoint(Change::Put(old)) = endpoint(("friend", 3)) else { unreachable!() };
    let pod = ObjectName::new("default", "heir");
    Intent::Endpoint(Change::Put(Endpoint { id, pod, uid: "heir".into(), ifindex: 77, ..old }))
}

/// The pod that had the address is closed, then what the kernel remembers of its flows goes, and
/// only then somebody else has the address: answers to what the first one asked for would pass,
/// whatever the second one's policy.
fn assert_nothing_is_inherited(what: &str, agent: &Agent) {
    let address = mirror::address_bytes(ip(PASSED_ON));
    let seen = agent.kernel.watch().seen.take().unwrap_or_default();
    let first = |wanted: &dyn Fn(&Step) -> bool| {
        seen.iter().position(|(step, _)| wanted(step)).unwrap_or(usize::MAX)
    };
    let closed = first(
        &|step| matches!(step, Step::Put(Entry::Row(3, row)) if *row == EndpointRow::default()),
    );
    let flushed = first(&|step| *step == Step::FlushFlows(address));
    let opened = first(&|step| matches!(step, Step::Put(Entry::Row(_, row)) if row.ifindex == 77));
    assert!(closed < flushed && flushed < opened, "{what}: {closed}, {flushed}, {opened}");
    assert!(opened < seen.len(), "{what}: the next pod never comes");
}

#[test]
fn flows_go_with_their_pod_before_the_next_one_has_its_address() {
    let leaves = || Intent::Endpoint(Change::Delete(3));
    for failing in 0..3 {
        let changes = [
            ("another number", vec![gone("friend"), leaves(), heir(), heir_attached(5)]),
            ("its number", vec![gone("friend"), leaves(), heir(), heir_attached(3)]),
            ("its number, unasked", vec![gone("friend"), heir(), heir_attached(3)]),
            ("while the API knows both", vec![leaves(), heir(), heir_attached(5)]),
        ];
        for (what, change) in changes {
            let mut agent = Agent::new();
            agent.kernel.watch().seen = Some(Vec::new());
            let mut change = Some(change);
            agent.refuse(|_, step| matches!(step, Step::FlushFlows(_)));
            for _ in 0..failing {
                let problems = agent.round(change.take().unwrap_or_default());
                assert!(!problems.is_empty(), "{what}: nobody says that flows are still there");
            }
            agent.heal();
            agent.settle(change.unwrap_or_default());
            assert_nothing_is_inherited(&format!("{what}, {failing} times refused"), &agent);
        }
    }
}

/// The agent is killed between two of the writes that take a pod out, and the next one hears of the
/// next pod before it has written anything.
#[test]
fn an_agent_that_is_killed_while_a_pod_leaves_leaves_no_flows() {
    for id in [3, 5] {
        for writes in 0.. {
            let mut agent = Agent::new();
            agent.kernel.watch().seen = Some(Vec::new());
            agent.refuse(move |number, _| number >= writes);
            let leaves = vec![gone("friend"), Intent::Endpoint(Change::Delete(3))];
            let whole = agent.round(leaves).is_empty();
            agent.heal();

            let mut next = Agent::over(agent.kernel);
            let mut world = Agent::world();
            world.retain(|intent| match intent {
                Intent::Endpoint(Change::Put(endpoint)) => endpoint.id != 3,
                Intent::Pod(Change::Put(pod)) => pod.name.name != "friend",
                _ => true,
            });
            world.extend([heir(), heir_attached(id)]);
            next.settle(world);
            assert_nothing_is_inherited(&format!("after {writes} writes, number {id}"), &next);
            if whole {
                break;
            }
        }
    }
}

/// The version of a Service's backends, once it has some.
fn version(agent: &mut Agent) -> u32 {
    let frontend = Frontend { address: ip("10.96.0.1"), port: 80, protocol: TCP };
    let (service, affinity) = (ObjectName::new("default", "web"), None);
    let backends = vec!["10.0.1.11:80".parse().expect("an end")];
    agent.tables.service_entries.put(ServiceEntry { frontend, service, backends, affinity });
    agent.settle(Vec::new());
    agent.reconciler.mirror().services.get(&frontend).expect("it is written").version
}

/// Flows say by which version of their Service they are where they are, and live on.
#[test]
fn versions_of_services_do_not_come_again() {
    let mut agent = Agent::new();
    let first = version(&mut agent);
    assert_ne!(version(&mut Agent::new()), first, "in tables of another layout");
    let frontend = Frontend { address: ip("10.96.0.1"), port: 80, protocol: TCP };
    agent.tables.service_entries.delete(&frontend);
    agent.settle(Vec::new());
    assert_ne!(version(&mut Agent::over(agent.kernel)), first, "after the Service was gone");
}
