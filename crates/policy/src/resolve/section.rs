//! One rule's say about one direction, and what it resolves to while a group uses it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use palisade_abi::identity;
use roaring::RoaringBitmap;

use super::{EndpointId, GroupId};
use crate::{
    compile::{Bit, BitPeers, BitPorts, RuleInfo, RuleSource},
    index::{Index, SelectorId},
    l7::NamePattern,
    model::{
        self, Action, Application, Cidr, Direction, Peer, Peers, Policy, PolicyRef, PortSpec, Ports,
    },
    pods::{Agreement, Numbers, Pods, PortName},
    prefix::{Prefixes, is_ipv4_mapped},
    selector::Selector,
};

/// Number of a section. A section that changes gets a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct SectionId(pub(super) u32);

#[derive(Debug)]
pub(super) struct Section {
    /// The whole policy, of which all sections share one copy.
    pub(super) policy: Arc<Policy>,
    rule: usize,
    pub(super) direction: Direction,
    /// Names of ports that the entries use.
    pub(super) names: BTreeSet<PortName>,
    pub(super) endpoints: BTreeSet<EndpointId>,
    pub(super) groups: BTreeSet<GroupId>,
    /// Its policy is gone.
    pub(super) removed: bool,
    /// One for each entry, while a group uses the section.
    resolved: Vec<Resolved>,
}

/// What an entry resolves to.
#[derive(Debug, Default)]
struct Resolved {
    peers: BitPeers,
    ports: BitPorts,
    /// Egress only: what its named ports mean at the peers that it matches.
    named: Vec<Named>,
}

/// The peers of an entry at which a name means this port.
#[derive(Debug, Default, PartialEq)]
struct Named {
    protocol: u8,
    port: u16,
    identities: RoaringBitmap,
    addresses: BTreeSet<IpAddr>,
}

fn entry_names(ports: &Ports) -> BTreeSet<PortName> {
    let Ports::List(list) = ports else { return BTreeSet::new() };
    list.iter()
        .filter_map(|port| match &port.port {
            PortSpec::Named(name) => Some((name.clone(), port.protocol)),
            _ => None,
        })
        .collect()
}

impl Section {
    pub(super) fn new(policy: Arc<Policy>, rule: usize, direction: Direction) -> Self {
        let entries = &policy.rules[rule].section(direction).entries;
        Self {
            names: entries.iter().flat_map(|entry| entry_names(&entry.ports)).collect(),
            policy,
            rule,
            direction,
            endpoints: BTreeSet::new(),
            groups: BTreeSet::new(),
            removed: false,
            resolved: Vec::new(),
        }
    }

    pub(super) fn subject(&self) -> &Selector {
        &self.policy.rules[self.rule].subject
    }

    pub(super) fn said(&self) -> &model::Section {
        self.policy.rules[self.rule].section(self.direction)
    }

    pub(super) fn says_the_same(&self, other: &Self) -> bool {
        self.subject() == other.subject() && self.said() == other.said()
    }

    /// Precedence among equals.
    pub(super) fn order(&self) -> (&PolicyRef, usize) {
        (&self.policy.id, self.rule)
    }

    pub(super) fn selectors(&self) -> impl Iterator<Item = SelectorId> {
        self.resolved.iter().flat_map(|entry| entry.peers.selectors.iter().copied())
    }

    pub(super) fn cidrs(&self) -> impl Iterator<Item = &Cidr> {
        self.resolved.iter().flat_map(|entry| &entry.peers.cidrs)
    }

    /// Names whose addresses the entries speak of.
    pub(super) fn fqdns(&self) -> impl Iterator<Item = &NamePattern> {
        self.said()
            .entries
            .iter()
            .flat_map(|entry| match &entry.peers {
                Peers::Any => &[],
                Peers::List(list) => list.as_slice(),
            })
            .filter_map(|peer| match peer {
                Peer::Fqdn(pattern) => Some(pattern),
                _ => None,
            })
    }

    /// Takes hold of the selectors and prefixes.
    pub(super) fn resolve(&mut self, index: &mut Index, prefixes: &mut Prefixes) {
        self.resolved = self
            .said()
            .entries
            .iter()
            .map(|entry| Resolved {
                peers: resolve_peers(entry.action, &entry.peers, index),
                ports: static_ports(&entry.ports),
                named: Vec::new(),
            })
            .collect();
        for net in self.cidrs().flat_map(nets) {
            prefixes.acquire(net);
        }
    }

    /// Undoes [`Section::resolve`] and [`Section::resolve_names`].
    pub(super) fn unresolve(&mut self, index: &mut Index, prefixes: &mut Prefixes) {
        for selector in self.selectors() {
            index.release(selector);
        }
        for net in self.cidrs().flat_map(nets) {
            prefixes.release(net);
        }
        for address in self.resolved.iter().flat_map(|entry| &entry.named).flat_map(addresses) {
            prefixes.release(address);
        }
        self.resolved.clear();
    }

    /// Finds out what names mean at the peers. Whether anything differs from before.
    pub(super) fn resolve_names(
        &mut self,
        index: &Index,
        pods: &Pods,
        prefixes: &mut Prefixes,
    ) -> bool {
        let mut changed = false;
        let said = self.policy.rules[self.rule].section(self.direction);
        for (entry, resolved) in said.entries.iter().zip(&mut self.resolved) {
            let named = resolve_names(&entry_names(&entry.ports), &resolved.peers, index, pods);
            if named == resolved.named {
                continue;
            }
            changed = true;
            for net in named.iter().flat_map(addresses) {
                prefixes.acquire(net);
            }
            for net in resolved.named.iter().flat_map(addresses) {
                prefixes.release(net);
            }
            resolved.named = named;
        }
        changed
    }
}

fn nets(cidr: &Cidr) -> impl Iterator<Item = IpNet> + use<> {
    std::iter::once(cidr.net).chain(cidr.except.clone())
}

fn addresses(named: &Named) -> impl Iterator<Item = IpNet> + '_ {
    named.addresses.iter().map(|address| IpNet::from(*address))
}

fn resolve_peers(action: Action, peers: &Peers, index: &mut Index) -> BitPeers {
    let mut resolved = BitPeers::default();
    let mut selectors = BTreeSet::new();
    let list = match peers {
        Peers::Any => {
            resolved.any = true;
            return resolved;
        }
        Peers::List(list) => list,
    };
    for peer in list {
        match peer {
            Peer::Selector(selector) => {
                selectors.insert(selector.clone());
            }
            Peer::Cidr(cidr) => {
                let mut cidr = cidr.clone();
                cidr.net = cidr.net.trunc();
                // Such addresses are never seen; the kernel would take them for IPv4.
                if !is_ipv4_mapped(cidr.net) {
                    cidr.except.retain(|net| !is_ipv4_mapped(*net));
                    resolved.cidrs.push(cidr);
                }
            }
            Peer::Fqdn(pattern) => resolved.fqdns.push(pattern.clone()),
            Peer::Entity(entity) => match entity.selectors() {
                Some(list) => selectors.extend(list),
                None => resolved.any = true,
            },
        }
    }
    resolved.unknown = action == Action::Deny && !list.is_empty();
    resolved.selectors = selectors.iter().map(|selector| index.acquire(selector)).collect();
    resolved.selectors.sort();
    resolved
}

fn static_ports(ports: &Ports) -> BitPorts {
    let mut resolved = BitPorts::default();
    match ports {
        Ports::Any => return BitPorts::every(),
        Ports::List(list) => {
            for port in list {
                match port.port {
                    PortSpec::All => resolved.add_protocol(port.protocol),
                    PortSpec::Range(first, last) => resolved.add_range(port.protocol, first, last),
                    PortSpec::Named(_) => {}
                }
            }
        }
    }
    resolved
}

fn resolve_names(
    names: &BTreeSet<PortName>,
    peers: &BitPeers,
    index: &Index,
    pods: &Pods,
) -> Vec<Named> {
    let mut found: BTreeMap<(u8, u16), Named> = BTreeMap::new();
    for name in names {
        let mut add = |numbers: &Numbers, identity: Option<u32>, address: Option<IpAddr>| {
            for &port in numbers {
                let named = found.entry((name.1, port)).or_insert_with(|| Named {
                    protocol: name.1,
                    port,
                    ..Named::default()
                });
                named.identities.extend(identity);
                named.addresses.extend(address);
            }
        };
        for (identity, agreement) in pods.declaring(name) {
            let selected =
                peers.any || peers.selectors.iter().any(|id| index.contains(*id, identity));
            if !selected {
                for (address, numbers) in pods.addresses(identity, name) {
                    let inside = |cidr: &Cidr| cidr.matches_pods && cidr.contains(address);
                    if peers.cidrs.iter().any(inside) {
                        add(numbers, None, Some(address));
                    }
                }
                continue;
            }
            match agreement {
                Agreement::All(numbers) => add(numbers, Some(identity), None),
                Agreement::Each(pods) => {
                    for (address, numbers) in pods {
                        add(numbers, None, Some(address));
                    }
                }
            }
        }
    }
    found.into_values().collect()
}

/// The rules of a group in the order of their precedence. `open`: what no rule matches passes.
pub(super) fn bits(
    sections: &[&Section],
    names: &[(PortName, Numbers)],
    direction: Direction,
    open: bool,
) -> Vec<Bit> {
    let mut rules = Rules::default();
    if direction == Direction::Ingress {
        let peers = BitPeers {
            identities: RoaringBitmap::from_iter([identity::HOST]),
            ..BitPeers::default()
        };
        rules.deny.push(synthetic(RuleSource::AllowLocalhost, peers));
    }
    for section in sections {
        for (entry, resolved) in section.said().entries.iter().zip(&section.resolved) {
            let source =
                RuleSource::Policy { policy: section.policy.id.clone(), path: entry.path.clone() };
            let mut ports = resolved.ports.clone();
            let wanted = entry_names(&entry.ports);
            for ((name, numbers), protocol) in names.iter().map(|pair| (pair, pair.0.1)) {
                if wanted.contains(name) {
                    numbers.iter().for_each(|port| ports.add_range(protocol, *port, *port));
                }
            }
            let said = Said { action: entry.action, application: &entry.application, source };
            rules.add(&said, resolved.peers.clone(), ports);
            if direction == Direction::Egress {
                rules.add_named(&said, resolved, &wanted);
            }
        }
    }
    let mut all = rules.deny;
    all.extend(rules.redirect);
    all.extend(rules.allow);
    if open {
        let peers = BitPeers { any: true, ..BitPeers::default() };
        all.push(synthetic(RuleSource::NoDefaultDeny, peers));
    }
    all
}

fn synthetic(source: RuleSource, peers: BitPeers) -> Bit {
    let ports = BitPorts::every();
    Bit {
        info: RuleInfo {
            action: Action::Allow,
            application: Application::Any,
            ports: ports.named.clone(),
            source,
            also: Vec::new(),
        },
        peers,
        ports,
    }
}

/// What an entry says of the traffic that it matches.
struct Said<'a> {
    action: Action,
    application: &'a Application,
    source: RuleSource,
}

/// What makes two rules one.
type Sameness = (Action, Application, bool, Vec<SelectorId>, Vec<Cidr>, Vec<NamePattern>, BitPorts);

#[derive(Default)]
struct Rules {
    deny: Vec<Bit>,
    redirect: Vec<Bit>,
    allow: Vec<Bit>,
    known: HashMap<Sameness, usize>,
}

impl Rules {
    fn list(&mut self, said: &Said<'_>) -> &mut Vec<Bit> {
        match said.action {
            Action::Deny => &mut self.deny,
            Action::Allow if said.application.needs_proxy() => &mut self.redirect,
            Action::Allow => &mut self.allow,
        }
    }

    fn add(&mut self, said: &Said<'_>, peers: BitPeers, ports: BitPorts) {
        if peers.is_nobody() || ports.is_empty() {
            return;
        }
        let sameness = (
            said.action,
            said.application.clone(),
            peers.any,
            peers.selectors.clone(),
            peers.cidrs.clone(),
            peers.fqdns.clone(),
            ports.clone(),
        );
        if let Some(at) = self.known.get(&sameness).copied() {
            if let Some(bit) = self.list(said).get_mut(at)
                && bit.info.source != said.source
                && !bit.info.also.contains(&said.source)
            {
                bit.info.also.push(said.source.clone());
            }
            return;
        }
        let at = self.list(said).len();
        self.known.insert(sameness, at);
        self.push(said, peers, ports);
    }

    fn add_named(&mut self, said: &Said<'_>, resolved: &Resolved, names: &BTreeSet<PortName>) {
        for named in &resolved.named {
            let peers = BitPeers {
                identities: named.identities.clone(),
                addresses: named.addresses.clone(),
                ..BitPeers::default()
            };
            let mut ports = BitPorts::default();
            ports.add_range(named.protocol, named.port, named.port);
            self.push(said, peers, ports);
        }
        let anybody = resolved.peers.any || resolved.peers.unknown;
        if said.action == Action::Deny && !names.is_empty() && anybody {
            // What the name means at a pod that is not known yet cannot be known either.
            let peers = BitPeers { unknown: true, ..BitPeers::default() };
            let mut ports = BitPorts::default();
            for (_, protocol) in names {
                ports.add_protocol(*protocol);
            }
            self.push(said, peers, ports);
        }
    }

    fn push(&mut self, said: &Said<'_>, peers: BitPeers, ports: BitPorts) {
        let info = RuleInfo {
            action: said.action,
            application: said.application.clone(),
            ports: ports.named.clone(),
            source: said.source.clone(),
            also: Vec::new(),
        };
        self.list(said).push(Bit { info, peers, ports });
    }
}
