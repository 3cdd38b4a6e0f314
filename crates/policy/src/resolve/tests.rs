//! The compiled tables against the oracle; the incremental engine against one from scratch.

use super::*;
use crate::{
    arbitrary::{self, Packet, Random, World},
    compile::{Chunk, RuleSource},
    evaluate::{End, Verdict, evaluate, evaluate_inside},
    l7::{Demand, HttpMatcher, HttpRule, Question},
    label::Label,
    model::{
        Action, Application, Cidr, Entry, Peer, Peers, PolicyKind, PortMatch, PortSpec, Ports,
        Rule, Section,
    },
    selector::{Key, Requirement},
};

fn repository(world: &World) -> Repository {
    let mut repository = Repository::new();
    for (identity, labels) in &world.identities {
        repository.upsert_identity(*identity, labels.clone());
    }
    for pod in &world.pods {
        repository.set_pod(PodPorts {
            ip: pod.address,
            identity: pod.identity,
            ports: pod.named_ports.clone(),
        });
    }
    for policy in &world.policies {
        repository.upsert_policy(policy.clone());
    }
    repository
}

fn endpoint(end: &End) -> EndpointInfo {
    EndpointInfo {
        identity: end.identity,
        labels: end.labels.clone(),
        named_ports: end.named_ports.clone(),
    }
}

/// A packet's lookup in the tables of the repository.
struct Lookup {
    tables: Arc<CompiledPolicy>,
    identity: u32,
    prefix: u32,
    protocol: u8,
    port: u16,
}

impl Lookup {
    /// `None`: no tables are asked.
    fn new(repository: &Repository, endpoint: EndpointId, packet: &Packet) -> Option<Self> {
        let policy = repository.endpoint_policy(endpoint).expect("the endpoint is known");
        let tables = match packet.direction {
            Direction::Ingress => policy.ingress,
            Direction::Egress => policy.egress,
        };
        let GroupDirection::Enforced(_, tables) = tables else { return None };
        let Packet { peer, protocol, port, .. } = packet;
        let prefix = repository.prefix_of(peer.address);
        Some(Self { tables, identity: peer.identity, prefix, protocol: *protocol, port: *port })
    }

    /// What the kernel would say.
    fn verdict(&self) -> Verdict {
        let Self { tables, identity, prefix, protocol, port } = self;
        let Some(number) = tables.lookup(*identity, *prefix, *protocol, *port) else {
            return Verdict { allowed: false, proxied: false, rule: None };
        };
        let rule = tables.rule(number).expect("every bit has a rule");
        let chunk = &tables.chunks[number as usize / 128];
        let bit = |bitmap: u128| bitmap >> (number % 128) & 1 == 1;
        assert_eq!(bit(chunk.deny), rule.action == Action::Deny);
        assert_eq!(bit(chunk.redirect), rule.application.needs_proxy());
        let (allowed, proxied) = (!bit(chunk.deny), bit(chunk.redirect));
        Verdict { allowed, proxied, rule: Some(rule.source.clone()) }
    }

    /// What the proxy would say.
    fn inside(&self, question: &Question<'_>) -> Option<RuleSource> {
        let Self { tables, identity, prefix, protocol, port } = self;
        match (tables.demand(*identity, *prefix, *protocol, *port), question) {
            (Demand::Pass(rule), _) => Some(rule),
            (Demand::Http(rules), Question::Http(request, secrets)) => {
                let source = |rule: u32| rules.iter().find(|(_, number)| *number == rule);
                let counting = tables.http_rules().into_iter();
                let counting = counting.filter(|(number, _)| source(*number).is_some());
                let (numbers, list): (Vec<u32>, Vec<HttpRule>) = counting.unzip();
                let (matcher, errors) = HttpMatcher::new(&list, secrets);
                assert_eq!(errors, []);
                let found = matcher.judge(request)?;
                source(numbers[found.rule]).map(|(source, _)| source.clone())
            }
            (Demand::Dns(names), Question::Dns(name))
            | (Demand::Tls(names), Question::Tls(Some(name))) => {
                names.into_iter().find(|(_, one)| one.matches(name)).map(|(rule, _)| rule)
            }
            _ => None,
        }
    }
}

/// The rules that say something of an endpoint's own packets, and whether it is closed anyway:
/// those with the same share what they learn.
fn scope(world: &World, subject: &End) -> (bool, Vec<(PolicyRef, usize)>) {
    let rules = world.policies.iter().flat_map(|policy| {
        let selecting =
            policy.rules.iter().enumerate().filter(|(_, rule)| {
                rule.subject.matches(&subject.labels) && !rule.egress.is_empty()
            });
        selecting.map(|(n, _)| (policy.id.clone(), n))
    });
    (subject.identity == number::INIT, rules.collect())
}

#[test]
fn tables_say_what_the_oracle_says() {
    let (mut pairs, mut proxied, mut admitted, mut by_name) = (0, 0, 0, 0);
    let secrets = arbitrary::secrets();
    for seed in 0..3000 {
        let mut random = Random::new(seed);
        let world = arbitrary::world(&mut random);
        let mut repository = repository(&world);
        let mut packets: Vec<_> = (0..50).map(|_| world.packet(&mut random)).collect();
        let learned: Vec<Names> =
            packets.iter().map(|_| arbitrary::learned(&mut random, &world)).collect();
        let id = |n: usize| EndpointId(u32::try_from(n).expect("few"));
        for (n, packet) in packets.iter().enumerate() {
            repository.upsert_endpoint(id(n), endpoint(&packet.subject));
            repository.set_learned(id(n), learned[n].clone());
        }
        repository.commit();
        let scopes: Vec<_> = packets.iter().map(|packet| scope(&world, &packet.subject)).collect();
        for (n, packet) in packets.iter_mut().enumerate() {
            let same = (0..scopes.len()).filter(|other| scopes[*other] == scopes[n]);
            let names = same.flat_map(|other| &learned[other]);
            let of_peer = names.filter(|(_, found)| found.contains(&packet.peer.address));
            packet.peer.names = of_peer.map(|(name, _)| name.clone()).collect();
        }
        for (n, packet) in packets.iter().enumerate() {
            let Packet { direction, subject, peer, protocol, port } = packet;
            let expected = evaluate(&world.policies, *direction, subject, peer, *protocol, *port);
            let lookup = Lookup::new(&repository, id(n), packet);
            let found = match &lookup {
                Some(lookup) => lookup.verdict(),
                None => Verdict { allowed: true, proxied: false, rule: None },
            };
            assert_eq!(found, expected, "seed {seed}: {packet:#?}\n{:#?}", world.policies);
            pairs += 1;
            let nameless = End { names: BTreeSet::new(), ..peer.clone() };
            by_name += usize::from(
                evaluate(&world.policies, *direction, subject, &nameless, *protocol, *port)
                    != expected,
            );
            let Some(lookup) = lookup.filter(|_| expected.proxied) else { continue };
            for _ in 0..4 {
                let question = arbitrary::question(&mut random, &secrets);
                let expected = evaluate_inside(
                    &world.policies,
                    *direction,
                    subject,
                    peer,
                    *protocol,
                    *port,
                    &question,
                );
                let found = lookup.inside(&question);
                let context = (packet, &question, &world.policies);
                assert_eq!(found, expected.rule, "seed {seed}: {context:#?}");
                assert_eq!(found.is_some(), expected.allowed);
                proxied += 1;
                admitted += usize::from(expected.allowed);
            }
        }
    }
    assert!(pairs >= 100_000);
    println!("{proxied} questions, {admitted} admitted; {by_name} verdicts made by a name");
    assert!(proxied > 10_000 && admitted > proxied / 20 && admitted < proxied / 20 * 19);
    assert!(by_name > 500, "names must count");
}

/// Tables with the networks themselves in place of their numbers.
fn canonical(repository: &Repository, policy: &CompiledPolicy) -> String {
    let names: BTreeMap<u32, IpNet> =
        repository.prefixes().map(|(net, number)| (number, net)).collect();
    let chunk = |chunk: &Arc<Chunk>| {
        let peers: BTreeMap<String, u128> = chunk
            .peers
            .iter()
            .map(|(id, rules)| {
                let name = match names.get(&(id & !PREFIX_POD_BIT)) {
                    Some(net) => format!("{net} pod {}", id & PREFIX_POD_BIT != 0),
                    None => id.to_string(),
                };
                (name, *rules)
            })
            .collect();
        format!(
            "{} {} {} {} {peers:?} {:?}",
            chunk.default_peers, chunk.default_ports, chunk.deny, chunk.redirect, chunk.ports
        )
    };
    let chunks: Vec<String> = policy.chunks.iter().map(chunk).collect();
    format!("{chunks:?} {:?} {:?} {:?}", policy.rules, policy.default_deny_by, policy.fqdns)
}

/// Applies changes as the writer of the kernel's tables does.
fn apply(tables: &mut BTreeMap<GroupId, CompiledPolicy>, changes: Changes) {
    for change in changes.groups {
        match change.update {
            GroupUpdate::Replaced(policy) => {
                tables.insert(change.group, (*policy).clone());
            }
            GroupUpdate::Removed => {
                tables.remove(&change.group);
            }
            GroupUpdate::Peers(policy, delta) => {
                let table = tables.get_mut(&change.group).expect("the group is known");
                for PeerDelta { chunk, id, rules } in delta {
                    let peers = &mut Arc::make_mut(&mut table.chunks[chunk as usize]).peers;
                    match rules {
                        Some(rules) => peers.insert(id, rules),
                        None => peers.remove(&id),
                    };
                }
                table.hash = policy.hash;
                assert_eq!(*table, *policy, "the delta leads to the new tables");
            }
        }
    }
}

#[test]
fn any_sequence_of_events_leads_to_the_tables_made_from_scratch() {
    for seed in 0..600 {
        let mut random = Random::new(seed);
        let mut world = World { policies: Vec::new(), ..arbitrary::world(&mut random) };
        let mut repository = Repository::new();
        let mut tables = BTreeMap::new();
        let mut endpoints: BTreeMap<EndpointId, EndpointInfo> = BTreeMap::new();
        let mut learned: BTreeMap<EndpointId, Names> = BTreeMap::new();
        let all = std::mem::take(&mut world.pods);
        let mut known = std::mem::take(&mut world.identities);
        for _ in 0..80 {
            match random.below(12) {
                0 | 1 => {
                    let n = random.below(4);
                    let policy = arbitrary::policy(&mut random, n);
                    world.policies.retain(|old| old.id != policy.id);
                    world.policies.push(policy.clone());
                    repository.upsert_policy(policy);
                }
                2 if !world.policies.is_empty() => {
                    let at = random.below(world.policies.len());
                    let old = world.policies.remove(at);
                    repository.remove_policy(&old.id);
                }
                3 | 4 => {
                    let id = number::CLUSTER_MIN + u32::try_from(random.below(6)).expect("few");
                    let labels = arbitrary::pod_labels(&mut random);
                    if random.once_in(3) {
                        known.insert(id, labels);
                    }
                    let labels = known.entry(id).or_default().clone();
                    world.identities.insert(id, labels.clone());
                    repository.upsert_identity(id, labels);
                }
                5 => {
                    let id = number::CLUSTER_MIN + u32::try_from(random.below(6)).expect("few");
                    world.identities.remove(&id);
                    repository.remove_identity(id);
                }
                6 | 7 => {
                    let mut pod = random.pick(&all).clone();
                    world.pods.retain(|other| other.address != pod.address);
                    repository.remove_pod(pod.address);
                    if !random.once_in(3) {
                        pod.named_ports = arbitrary::named_ports(&mut random);
                        repository.set_pod(PodPorts {
                            ip: pod.address,
                            identity: pod.identity,
                            ports: pod.named_ports.clone(),
                        });
                        world.pods.push(pod);
                    }
                }
                8 | 9 => {
                    let id = EndpointId(u32::try_from(random.below(5)).expect("few"));
                    let names = arbitrary::learned(&mut random, &world);
                    if endpoints.contains_key(&id) {
                        learned.insert(id, names.clone());
                    }
                    repository.set_learned(id, names);
                }
                _ => {
                    let id = EndpointId(u32::try_from(random.below(5)).expect("few"));
                    if random.once_in(3) {
                        endpoints.remove(&id);
                        learned.remove(&id);
                        repository.remove_endpoint(id);
                    } else {
                        let info = endpoint(random.pick(&all));
                        endpoints.insert(id, info.clone());
                        repository.upsert_endpoint(id, info);
                    }
                }
            }
            if random.once_in(3) {
                apply(&mut tables, repository.commit());
            }
            if random.once_in(6) {
                repository.acknowledge_prefixes();
            }
        }
        apply(&mut tables, repository.commit());
        repository.acknowledge_prefixes();
        apply(&mut tables, repository.commit());

        let mut fresh = super::tests::repository(&world);
        for (id, info) in &endpoints {
            fresh.upsert_endpoint(*id, info.clone());
        }
        for (id, names) in learned {
            fresh.set_learned(id, names);
        }
        fresh.commit();
        let nets = |repository: &Repository| -> Vec<IpNet> {
            repository.prefixes().map(|(net, _)| net).collect()
        };
        assert_eq!(nets(&repository), nets(&fresh), "seed {seed}");
        assert_eq!(repository.selectors().count(), fresh.selectors().count(), "seed {seed}");
        assert_eq!(tables.len(), fresh.groups().count(), "seed {seed}");
        for id in endpoints.keys() {
            let ours = repository.endpoint_policy(*id).expect("known");
            let theirs = fresh.endpoint_policy(*id).expect("known");
            for pair in [(ours.ingress, theirs.ingress), (ours.egress, theirs.egress)] {
                match pair {
                    (GroupDirection::AllowAll, GroupDirection::AllowAll) => {}
                    (
                        GroupDirection::Enforced(group, ours),
                        GroupDirection::Enforced(_, theirs),
                    ) => {
                        assert_eq!(tables.get(&group), Some(&*ours), "seed {seed}");
                        let (ours, theirs) =
                            (canonical(&repository, &ours), canonical(&fresh, &theirs));
                        assert_eq!(ours, theirs, "seed {seed}");
                    }
                    (ours, theirs) => panic!("seed {seed}: {ours:?} is not {theirs:?}"),
                }
            }
        }
    }
}

fn policy(name: &str, entries: Vec<Entry>) -> Policy {
    Policy {
        id: PolicyRef {
            kind: PolicyKind::CiliumClusterwideNetworkPolicy,
            namespace: None,
            name: name.into(),
        },
        rules: vec![Rule {
            subject: Selector::default(),
            ingress: Section { default_deny: true, entries },
            egress: Section::default(),
        }],
    }
}

fn allow(peers: Peers, port: u16, path: &str) -> Entry {
    let port = PortMatch { protocol: 6, port: PortSpec::Range(port, port) };
    Entry {
        action: Action::Allow,
        peers,
        ports: Ports::List(vec![port]),
        application: Application::Any,
        path: path.into(),
    }
}

fn pod(identity: u32) -> EndpointInfo {
    let labels = [Label::k8s("app", "x")].into_iter().collect();
    EndpointInfo { identity, labels, named_ports: Vec::new() }
}

#[test]
fn more_rules_than_fit_close_the_group_and_name_the_policies() {
    let entries = |count: u16| (1..=count).map(|n| allow(Peers::Any, n, "spec.ingress")).collect();
    let mut repository = Repository::new();
    repository.upsert_endpoint(EndpointId(1), pod(256));
    // One rule is the node's own.
    repository.upsert_policy(policy("fits", entries(4095)));
    let changes = repository.commit();
    assert!(changes.errors.is_empty());
    repository.upsert_policy(policy("fits", entries(4096)));
    let changes = repository.commit();
    assert!(changes.errors[0].to_string().contains("CiliumClusterwideNetworkPolicy fits"));
    let GroupDirection::Enforced(_, tables) = &changes.endpoints[0].1.ingress else {
        panic!("the endpoint is enforced");
    };
    assert_eq!(tables.lookup(number::WORLD_IPV4, 0, 6, 1), None);
    assert_eq!(tables.lookup(number::HOST, 0, 6, 1), Some(0));
}

#[test]
fn endpoints_with_the_same_rules_share_their_tables() {
    let mut repository = Repository::new();
    repository.upsert_policy(policy("p", vec![allow(Peers::Any, 80, "spec.ingress[0]")]));
    repository.upsert_endpoint(EndpointId(1), pod(256));
    repository.upsert_endpoint(EndpointId(2), pod(256));
    let changes = repository.commit();
    assert_eq!(changes.groups.len(), 1);
    assert_eq!(changes.endpoints[0].1, changes.endpoints[1].1);
    assert_eq!(changes.endpoints[0].1.egress, GroupDirection::AllowAll);
    assert_eq!(repository.commit(), Changes::default(), "nothing happened since");
}

#[test]
fn a_new_identity_is_one_entry() {
    let mut repository = Repository::new();
    let app = Requirement::equals(Key::new("any", "app"), "x");
    let peers = Peers::List(vec![Peer::Selector(Selector::new(vec![app]))]);
    repository.upsert_policy(policy("p", vec![allow(peers, 80, "spec.ingress[0]")]));
    repository.upsert_endpoint(EndpointId(1), pod(256));
    repository.commit();
    repository.upsert_identity(300, Labels::from_iter([Label::k8s("app", "x")]));
    repository.upsert_identity(301, Labels::from_iter([Label::k8s("app", "y")]));
    let changes = repository.commit();
    assert!(changes.endpoints.is_empty());
    let GroupUpdate::Peers(_, delta) = &changes.groups[0].update else { panic!("a delta") };
    assert_eq!(*delta, [PeerDelta { chunk: 0, id: 300, rules: Some(0b10) }]);
}

#[test]
fn a_prefix_stays_in_the_tables_until_no_address_refers_to_it() {
    let cidr = |net: &str| {
        let net = net.parse().expect("a network");
        Peers::List(vec![Peer::Cidr(Cidr { net, except: Vec::new(), matches_pods: false })])
    };
    let mut repository = Repository::new();
    let outer: IpNet = "10.0.0.0/8".parse().expect("a network");
    let inner: IpNet = "10.1.0.0/16".parse().expect("a network");
    repository.adopt_prefixes([(outer, 0x0100_0007)]);
    repository.upsert_endpoint(EndpointId(1), pod(256));
    repository.upsert_policy(policy("outer", vec![allow(cidr("10.0.0.0/8"), 80, "a")]));
    repository.upsert_policy(policy("inner", vec![allow(cidr("10.1.0.0/16"), 81, "b")]));
    repository.commit();
    assert_eq!(repository.prefixes().next(), Some((outer, 0x0100_0007)), "the number is kept");
    let number = repository.prefix_of("10.1.2.3".parse().expect("an address"));

    repository.remove_policy(&policy("inner", Vec::new()).id);
    let changes = repository.commit();
    assert_eq!(changes.prefixes_removed, [(inner, number)]);
    let tables = |repository: &Repository| match repository.endpoint_policy(EndpointId(1)) {
        Some(EndpointPolicy { ingress: GroupDirection::Enforced(_, tables), .. }) => tables,
        other => panic!("{other:?} is not enforced"),
    };
    assert!(tables(&repository).lookup(number::WORLD_IPV4, number, 6, 80).is_some());
    repository.acknowledge_prefixes();
    repository.commit();
    assert!(tables(&repository).lookup(number::WORLD_IPV4, number, 6, 80).is_none());
}

#[test]
fn an_endpoint_without_known_labels_is_closed_both_ways() {
    let mut repository = Repository::new();
    repository.upsert_endpoint(EndpointId(1), pod(number::INIT));
    let changes = repository.commit();
    let GroupDirection::Enforced(_, egress) = &changes.endpoints[0].1.egress else {
        panic!("closed");
    };
    assert_eq!(egress.lookup(number::WORLD_IPV4, 0, 6, 80), None);
    let GroupDirection::Enforced(_, ingress) = &changes.endpoints[0].1.ingress else {
        panic!("closed");
    };
    assert_eq!(ingress.lookup(256, 0, 6, 80), None);
    assert_eq!(ingress.rules[0].source, RuleSource::AllowLocalhost);
}

/// As large as an object may be: nothing may take the square of that.
#[test]
fn a_policy_of_very_many_networks_is_a_matter_of_seconds() {
    let nets = (0u32..40_000).map(|n| {
        let net = format!("10.{}.{}.0/24", n / 200, n % 200);
        Peer::Cidr(Cidr { net: net.parse().unwrap(), except: Vec::new(), matches_pods: false })
    });
    let mut policy = arbitrary::policy(&mut Random::new(1), 0);
    policy.rules.truncate(1);
    policy.rules[0].subject = Selector::default();
    policy.rules[0].egress = Section::default();
    policy.rules[0].ingress = Section {
        default_deny: true,
        entries: vec![Entry {
            action: Action::Allow,
            peers: Peers::List(nets.collect()),
            ports: Ports::Any,
            application: Application::Any,
            path: "spec.ingress[0]".into(),
        }],
    };
    let mut repository = Repository::new();
    repository.upsert_endpoint(
        EndpointId(1),
        EndpointInfo { identity: 1000, labels: Labels::default(), named_ports: Vec::new() },
    );
    let begun = std::time::Instant::now();
    repository.upsert_policy(policy.clone());
    let changes = repository.commit();
    assert_eq!(changes.prefixes_added.len(), 40_000);
    repository.acknowledge_prefixes();
    repository.remove_policy(&policy.id);
    repository.commit();
    repository.acknowledge_prefixes();
    assert!(begun.elapsed() < std::time::Duration::from_secs(30), "{:?}", begun.elapsed());
}
