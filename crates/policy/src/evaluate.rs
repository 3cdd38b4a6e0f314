//! The oracle: what a set of policies says of one packet, by walking them one by one. It shares
//! no code with the compiler; both are compared in the tests of every layer.

use std::net::IpAddr;

use palisade_abi::identity as number;

use crate::{
    compile::RuleSource,
    label::Labels,
    model::{Action, Direction, Entry, NamedPort, Peer, Peers, Policy, PortMatch, PortSpec, Ports},
};

/// One end of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Security identity.
    pub identity: u32,
    /// Its labels.
    pub labels: Labels,
    /// Address.
    pub address: IpAddr,
    /// Ports that it declares, if it is a pod.
    pub named_ports: Vec<NamedPort>,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether the packet passes.
    pub allowed: bool,
    /// Which rule says so; `None`: no policy selects the endpoint, or the default deny.
    pub rule: Option<RuleSource>,
}

/// What the policies of `subject` say of a packet from (ingress) or to (egress) `peer`. `port` is
/// the destination's, or the ICMP type.
#[must_use]
pub fn evaluate<'a>(
    policies: impl IntoIterator<Item = &'a Policy>,
    direction: Direction,
    subject: &End,
    peer: &End,
    protocol: u8,
    port: u16,
) -> Verdict {
    let mut policies: Vec<&Policy> = policies.into_iter().collect();
    policies.sort_by(|a, b| a.id.cmp(&b.id));
    let mut allow = None;
    let mut deny = None;
    let mut selected = false;
    let mut default_deny = subject.identity == number::INIT;

    for policy in policies {
        for rule in &policy.rules {
            if !rule.subject.matches(&subject.labels) {
                continue;
            }
            let section = rule.section(direction);
            selected |= !section.is_empty();
            default_deny |= section.default_deny;
            for entry in &section.entries {
                let matches = matches_peer(entry, peer)
                    && matches_port(entry, direction, subject, peer, protocol, port);
                let first = if entry.action == Action::Deny { &mut deny } else { &mut allow };
                if matches && first.is_none() {
                    let (policy, path) = (policy.id.clone(), entry.path.clone());
                    *first = Some(RuleSource::Policy { policy, path });
                }
            }
        }
    }

    let local = direction == Direction::Ingress && peer.identity == number::HOST;
    let enforced = selected || default_deny;
    match (deny, allow) {
        _ if !enforced => Verdict { allowed: true, rule: None },
        _ if local => Verdict { allowed: true, rule: Some(RuleSource::AllowLocalhost) },
        (Some(rule), _) => Verdict { allowed: false, rule: Some(rule) },
        (None, Some(rule)) => Verdict { allowed: true, rule: Some(rule) },
        (None, None) if default_deny => Verdict { allowed: false, rule: None },
        (None, None) => Verdict { allowed: true, rule: Some(RuleSource::NoDefaultDeny) },
    }
}

/// A peer that is not known yet is matched by whatever matches everybody, by what matches its
/// address, and, to be safe, by everything that denies anybody at all.
pub(crate) fn matches_peer(entry: &Entry, peer: &End) -> bool {
    let Peers::List(list) = &entry.peers else { return true };
    let unknown = peer.identity == number::UNKNOWN;
    list.iter().any(|one| match one {
        _ if unknown && entry.action == Action::Deny => true,
        Peer::Cidr(cidr) => {
            let world = number::is_world(peer.identity);
            (world || cidr.matches_pods) && cidr.contains(peer.address)
        }
        Peer::Entity(entity) if unknown => entity.selectors().is_none(),
        Peer::Selector(_) if unknown => false,
        Peer::Entity(entity) => entity.matches(&peer.labels),
        Peer::Selector(selector) => selector.matches(&peer.labels),
    })
}

/// Named ports are those of the destination.
pub(crate) fn matches_port(
    entry: &Entry,
    direction: Direction,
    subject: &End,
    peer: &End,
    protocol: u8,
    port: u16,
) -> bool {
    let destination = if direction == Direction::Ingress { subject } else { peer };
    let unknown = direction == Direction::Egress && peer.identity == number::UNKNOWN;
    port_matches(&entry.ports, destination, protocol, port)
        || unknown && name_may_match(entry, protocol)
}

fn port_matches(ports: &Ports, destination: &End, protocol: u8, port: u16) -> bool {
    let Ports::List(list) = ports else { return true };
    list.iter().any(|PortMatch { protocol: wanted, port: spec }| {
        *wanted == protocol
            && match spec {
                PortSpec::All => true,
                PortSpec::Range(first, last) => (*first..=*last).contains(&port),
                PortSpec::Named(name) => destination
                    .named_ports
                    .iter()
                    .any(|p| p.name == *name && p.protocol == protocol && p.port == port),
            }
    })
}

/// Which port a name means is not known for a pod that is not known: a deny then takes them all.
fn name_may_match(entry: &Entry, protocol: u8) -> bool {
    let Ports::List(list) = &entry.ports else { return false };
    entry.action == Action::Deny
        && list.iter().any(|p| p.protocol == protocol && matches!(p.port, PortSpec::Named(_)))
}
