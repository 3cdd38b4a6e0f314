//! Random policies and packets, from a seed. A small world, so that things meet: few labels, few
//! networks nested into each other, ports at the edges of ranges.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use palisade_abi::{identity as number, protocol};

use crate::{
    evaluate::End,
    identity,
    l7::{
        HeaderRule, HeaderValue, HttpRequest, HttpRule, Mismatch, NamePattern, Pattern, Question,
        SecretRef, Secrets,
    },
    label::{CLUSTER, Label, Labels, POD_NAMESPACE},
    model::{
        Action, Application, Cidr, Direction, Entity, Entry, NamedPort, Peer, Peers, Policy,
        PolicyKind, PolicyRef, PortMatch, PortSpec, Ports, Rule, Section,
    },
    selector::{Key, Operator, Requirement, Selector},
};

/// A source of random numbers (`SplitMix64`): the same for the same seed, everywhere.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Starts from a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap_or_default()
    }

    /// True once in `n` times.
    pub fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// One of some things; there is at least one.
    pub fn pick<'a, T>(&mut self, things: &'a [T]) -> &'a T {
        &things[self.below(things.len())]
    }
}

/// One packet, as the subject sees it.
#[derive(Clone, Debug)]
pub struct Packet {
    /// As the subject sees it.
    pub direction: Direction,
    /// Whose policy is asked.
    pub subject: End,
    /// The other end.
    pub peer: End,
    /// IP protocol.
    pub protocol: u8,
    /// Destination port, or ICMP type.
    pub port: u16,
}

/// Policies, and the ends of packets.
#[derive(Clone, Debug)]
pub struct World {
    /// Policies.
    pub policies: Vec<Policy>,
    /// Identities of pods.
    pub identities: BTreeMap<u32, Labels>,
    /// Pods, each with one address.
    pub pods: Vec<End>,
    /// Nodes, the world and whatever is not a pod.
    pub others: Vec<End>,
}

const NAMESPACES: [&str; 3] = ["a", "b", "c"];
const APPS: [&str; 3] = ["x", "y", "z"];
const NAMES: [(&str, u8); 3] =
    [("web", protocol::TCP), ("dns", protocol::UDP), ("web", protocol::UDP)];
const PORTS: [u16; 12] = [0, 1, 53, 79, 80, 81, 127, 128, 443, 8080, 65_534, 65_535];
const PROTOCOLS: [u8; 6] = [
    protocol::TCP,
    protocol::UDP,
    protocol::SCTP,
    protocol::ICMP,
    protocol::ICMPV6,
    47, // GRE: no ports
];

/// A random address, of few.
pub fn address(random: &mut Random) -> IpAddr {
    let low = *random.pick(&[0u8, 1, 127, 128, 254, 255]);
    let mid = *random.pick(&[0u8, 1, 255]);
    if random.once_in(3) {
        let top = *random.pick(&[0xfd00u16, 0xfd01, 0x2001]);
        return IpAddr::V6(Ipv6Addr::new(top, 0, 0, mid.into(), 0, 0, 0, low.into()));
    }
    let top = *random.pick(&[10u8, 11, 192]);
    IpAddr::V4(Ipv4Addr::new(top, 0, mid, low))
}

fn net(random: &mut Random, address: IpAddr, least: u8) -> IpNet {
    let lens: &[u8] = match address {
        IpAddr::V4(_) => &[0, 1, 7, 8, 9, 15, 16, 23, 24, 25, 31, 32],
        IpAddr::V6(_) => &[0, 1, 8, 15, 16, 63, 64, 65, 120, 121, 127, 128],
    };
    let len = (*random.pick(lens)).max(least);
    IpNet::new(address, len).map_or_else(|_| IpNet::from(address), |net| net.trunc())
}

fn cidr(random: &mut Random) -> Cidr {
    let inside = address(random);
    let outer = net(random, inside, 0);
    let count = random.below(3);
    let except = (0..count)
        .map(|_| {
            let inside = if random.once_in(2) { inside } else { address(random) };
            net(random, inside, outer.prefix_len())
        })
        .filter(|net| outer.contains(net) && *net != outer)
        .collect();
    Cidr { net: outer, except, matches_pods: random.once_in(2) }
}

/// A random selector.
pub fn selector(random: &mut Random) -> Selector {
    let count = random.below(3);
    let requirements = (0..count)
        .map(|_| {
            let source = *random.pick(&["k8s", "any"]);
            let (key, values): (&str, &[&str]) = match random.below(4) {
                0 => (POD_NAMESPACE, &NAMESPACES),
                1 => ("tier", &["1", "2"]),
                _ => ("app", &APPS),
            };
            let values = || values.iter().map(|value| (*value).to_owned());
            let one = values().nth(random.below(values().count())).into_iter().collect();
            let operator = match random.below(6) {
                0 => Operator::Exists,
                1 => Operator::DoesNotExist,
                2 => Operator::NotIn(one),
                3 => Operator::In(values().take(2).collect()),
                _ => Operator::In(one),
            };
            Requirement { key: Key::new(source, key), operator }
        })
        .collect();
    Selector::new(requirements)
}

fn entity(random: &mut Random) -> Entity {
    match random.below(10) {
        0 => Entity::All,
        1 | 2 => Entity::World,
        3 => Entity::WorldIpv4,
        4 => Entity::Host,
        5 => Entity::RemoteNode,
        6 => Entity::KubeApiserver,
        7 => Entity::None,
        8 => Entity::Init,
        _ => Entity::Cluster("default".into()),
    }
}

const DNS_NAMES: [&str; 5] = ["x.io", "a.x.io", "b.x.io", "c.a.x.io", "a.y.io"];
const PATTERNS: [&str; 5] = ["*.x.io", "**.x.io", "a.*.io", "*", "b*.x.io"];
const METHODS: [&str; 3] = ["GET", "PUT", "GET|HEAD"];
const PATHS: [&str; 4] = ["/", "/a", "/a.*", "/(a|b)"];
const HEADERS: [&[(&str, &[u8])]; 3] = [&[], &[("x", b"1")], &[("x", b"2"), ("y", b"2")]];

/// A random pattern of names.
fn name_pattern(random: &mut Random) -> NamePattern {
    if random.once_in(2) {
        return NamePattern::Name((*random.pick(&DNS_NAMES)).into());
    }
    NamePattern::Pattern((*random.pick(&PATTERNS)).into())
}

fn http_rule(random: &mut Random) -> HttpRule {
    let mut maybe = |texts: &[&str]| {
        let text = *random.pick(texts);
        random.once_in(2).then(|| Pattern::new(text).ok()).flatten()
    };
    let (method, path) = (maybe(&METHODS), maybe(&PATHS));
    let headers = (0..random.below(4) / 3).map(|_| header_rule(random)).collect();
    HttpRule { method, path, host: None, headers }
}

fn header_rule(random: &mut Random) -> HeaderRule {
    let value = match random.below(4) {
        0 => None,
        1 => Some(HeaderValue::Text("1".into())),
        2 => Some(HeaderValue::Secret(secret("there"))),
        _ => Some(HeaderValue::Secret(secret("gone"))),
    };
    HeaderRule { name: "x".into(), value, mismatch: *random.pick(&Mismatch::ALL) }
}

fn secret(name: &str) -> SecretRef {
    SecretRef { namespace: "a".into(), name: name.into(), key: None }
}

/// The values of one of the Secrets that random rules refer to; the other is not there.
#[must_use]
pub fn secrets() -> Secrets {
    Secrets::from_iter([(secret("there"), "2".to_owned())])
}

fn application(random: &mut Random) -> Application {
    match random.below(9) {
        0 | 1 => Application::Http((0..1 + random.below(2)).map(|_| http_rule(random)).collect()),
        2 => Application::Dns((0..1 + random.below(2)).map(|_| name_pattern(random)).collect()),
        3 => Application::Tls((0..1 + random.below(2)).map(|_| name_pattern(random)).collect()),
        _ => Application::Any,
    }
}

/// A random question for what may be inside a connection.
pub fn question<'a>(random: &mut Random, secrets: &'a Secrets) -> Question<'a> {
    match random.below(4) {
        0 => Question::Dns(random.pick::<&str>(&DNS_NAMES)),
        1 if random.once_in(4) => Question::Tls(None),
        1 => Question::Tls(Some(*random.pick(&DNS_NAMES))),
        _ => {
            let method = *random.pick(&["GET", "PUT", "POST"]);
            let target = *random.pick(&["/", "/a", "/ab", "/b"]);
            let headers = *random.pick(&HEADERS);
            Question::Http(HttpRequest { method, target, host: "x.io", headers }, secrets)
        }
    }
}

/// What a random endpoint learned from DNS.
/// It may have been told any address, those of pods and nodes too.
pub fn learned(random: &mut Random, world: &World) -> BTreeMap<String, BTreeSet<IpAddr>> {
    const NEVER: [&str; 5] = ["127.0.0.1", "169.254.1.1", "::1", "fe80::1", "::ffff:10.0.0.1"];
    let count = random.below(4);
    (0..count)
        .map(|_| {
            let name = (*random.pick(&DNS_NAMES)).to_owned();
            let count = random.below(3);
            let addresses = (0..count).map(|_| match random.below(8) {
                0 => random.pick(&NEVER).parse().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)),
                1..=5 if !world.others.is_empty() => random.pick(&world.others).address,
                _ => address(random),
            });
            (name, addresses.collect())
        })
        .collect()
}

fn peers(random: &mut Random, names: bool) -> Peers {
    if random.once_in(6) {
        return Peers::Any;
    }
    let count = random.below(4);
    let list = (0..count).map(|_| match random.below(7) {
        5 | 6 if names => Peer::Fqdn(name_pattern(random)),
        0 | 1 => Peer::Selector(selector(random)),
        2 => Peer::Entity(entity(random)),
        _ => Peer::Cidr(cidr(random)),
    });
    Peers::List(list.collect())
}

fn ports(random: &mut Random) -> Ports {
    if random.once_in(3) {
        return Ports::Any;
    }
    let count = random.below(4);
    let list = (0..count).map(|_| {
        if random.once_in(3) {
            let (name, protocol) = *random.pick(&NAMES);
            return PortMatch { protocol, port: PortSpec::Named(name.into()) };
        }
        let protocol = PROTOCOLS[random.below(5)];
        let (a, b) = (*random.pick(&PORTS), *random.pick(&PORTS));
        let port = match random.below(4) {
            0 => PortSpec::All,
            1 => PortSpec::Range(a.min(b), a.max(b)),
            _ => PortSpec::Range(a, a),
        };
        PortMatch { protocol, port }
    });
    Ports::List(list.collect())
}

fn entry(random: &mut Random, direction: Direction, path: String) -> Entry {
    let action = if random.once_in(3) { Action::Deny } else { Action::Allow };
    let allow = action == Action::Allow;
    Entry {
        action,
        peers: peers(random, allow && direction == Direction::Egress),
        ports: ports(random),
        application: if allow { application(random) } else { Application::Any },
        path,
    }
}

fn section(random: &mut Random, direction: Direction, rule: usize) -> Section {
    if random.once_in(3) {
        return Section::default();
    }
    let count = random.below(5);
    let entries =
        (0..count).map(|n| entry(random, direction, format!("specs[{rule}].{direction}[{n}]")));
    Section { entries: entries.collect(), default_deny: !random.once_in(4) }
}

/// A random policy; `n` is its name.
pub fn policy(random: &mut Random, n: usize) -> Policy {
    let kind = *random.pick(&[
        PolicyKind::NetworkPolicy,
        PolicyKind::CiliumNetworkPolicy,
        PolicyKind::CiliumClusterwideNetworkPolicy,
    ]);
    let namespace = (kind != PolicyKind::CiliumClusterwideNetworkPolicy).then(|| "a".to_owned());
    let count = 1 + random.below(2);
    let rules = (0..count)
        .map(|rule| Rule {
            subject: selector(random),
            ingress: section(random, Direction::Ingress, rule),
            egress: section(random, Direction::Egress, rule),
        })
        .collect();
    Policy { id: PolicyRef { kind, namespace, name: format!("policy-{n}") }, rules }
}

/// The labels of a random pod.
pub fn pod_labels(random: &mut Random) -> Labels {
    let mut labels: Labels =
        [Label::k8s(POD_NAMESPACE, *random.pick(&NAMESPACES)), Label::k8s(CLUSTER, "default")]
            .into_iter()
            .collect();
    if !random.once_in(5) {
        labels.insert(Label::k8s("app", *random.pick(&APPS)));
    }
    if random.once_in(2) {
        labels.insert(Label::k8s("tier", *random.pick(&["1", "2"])));
    }
    labels
}

/// The ports of a random pod.
pub fn named_ports(random: &mut Random) -> Vec<NamedPort> {
    let mut found = Vec::new();
    for (name, protocol) in NAMES {
        if random.once_in(2) {
            let port = *random.pick(&[80, 81, 8080]);
            found.push(NamedPort { name: name.into(), protocol, port });
        }
    }
    found
}

fn other(random: &mut Random) -> End {
    let address = address(random);
    let world = if address.is_ipv4() { number::WORLD_IPV4 } else { number::WORLD_IPV6 };
    let nodes = [number::HOST, number::REMOTE_NODE, number::KUBE_APISERVER, number::UNKNOWN];
    let identity = if random.once_in(2) { world } else { *random.pick(&nodes) };
    let labels = identity::reserved(identity).unwrap_or_default();
    End { identity, labels, address, named_ports: Vec::new(), names: BTreeSet::new() }
}

/// A random world.
#[must_use]
pub fn world(random: &mut Random) -> World {
    let identities: BTreeMap<u32, Labels> =
        (0..6).map(|n| (number::CLUSTER_MIN + n, pod_labels(random))).collect();
    let mut pods: BTreeMap<IpAddr, End> = BTreeMap::new();
    for _ in 0..10 {
        let n = u32::try_from(random.below(identities.len())).unwrap_or_default();
        let identity = number::CLUSTER_MIN + n;
        let labels = identities.get(&identity).cloned().unwrap_or_default();
        let address = address(random);
        pods.insert(
            address,
            End {
                identity,
                labels,
                address,
                named_ports: named_ports(random),
                names: BTreeSet::new(),
            },
        );
    }
    let others: Vec<End> =
        (0..12).map(|_| other(random)).filter(|other| !pods.contains_key(&other.address)).collect();
    let count = random.below(6);
    let policies = (0..count).map(|n| policy(random, n)).collect();
    World { policies, identities, pods: pods.into_values().collect(), others }
}

impl World {
    /// A random packet between two ends of the world; the subject is a pod.
    pub fn packet(&self, random: &mut Random) -> Packet {
        let mut subject = random.pick(&self.pods).clone();
        if random.once_in(10) {
            subject.identity = number::INIT;
            subject.labels = identity::reserved(number::INIT).unwrap_or_default();
        }
        let from_pods = self.others.is_empty() || random.once_in(2);
        let peer = random.pick(if from_pods { &self.pods } else { &self.others }).clone();
        Packet {
            direction: *random.pick(&Direction::BOTH),
            subject,
            peer,
            protocol: *random.pick(&PROTOCOLS),
            port: *random.pick(&PORTS),
        }
    }
}
