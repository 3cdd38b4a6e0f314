//! Why a packet is allowed or denied.

use std::fmt;

use palisade_abi::identity;

use crate::{
    compile::RuleSource,
    evaluate::{Asked, End, Verdict, judge, matches_peer, matches_port},
    l7::{Difference, HttpRequest, HttpRule, Question, target::Malformed},
    model::{Action, Application, Direction, Entry, Policy, PolicyRef, Ports},
};

/// What a rule that did not match lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Missing {
    /// It matches the peer and the port, and allows other things inside.
    Inside,
    /// It matches the peer, on other ports.
    Port,
    /// It matches the port, for other peers.
    Peer,
    /// Neither.
    Both,
}

/// A rule that allows something close to what was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nearest {
    /// The rule.
    pub source: RuleSource,
    /// What it lacks.
    pub missing: Missing,
    /// The ports that it allows, for people.
    pub ports: String,
    /// What it allows inside, for people; empty: everything.
    pub inside: String,
}

/// Why one end's policies decide as they do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    /// Whose policies, seen from that end.
    pub direction: Direction,
    /// The verdict and the rule that made it.
    pub verdict: Verdict,
    /// Rules that match, in the order of their precedence; the first one decides.
    pub matched: Vec<(Action, RuleSource)>,
    /// Policies that close the end for whatever no rule allows.
    pub default_deny_by: Vec<PolicyRef>,
    /// The proxy answers so whatever the rules are: it is not certain what is asked for.
    pub malformed: Option<Malformed>,
    /// Where it is denied: the rule that comes closest to allowing it.
    pub nearest: Option<Nearest>,
}

/// Why a packet passes or does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// What the sender's policies say; `None`: they are not enforced here.
    pub egress: Option<Reason>,
    /// What the receiver's policies say; `None`: they are not enforced here.
    pub ingress: Option<Reason>,
}

impl Explanation {
    /// Whether both ends agree to the packet.
    #[must_use]
    pub fn allowed(&self) -> bool {
        [&self.egress, &self.ingress].into_iter().flatten().all(|reason| reason.verdict.allowed)
    }
}

/// Explains a packet from `source` to `destination`, or what is asked for inside the connection
/// that it belongs to. Only pods are subject to policies.
#[must_use]
pub fn explain(
    policies: &[&Policy],
    source: &End,
    destination: &End,
    protocol: u8,
    port: u16,
    question: Option<&Question<'_>>,
) -> Explanation {
    let reason = |direction, subject: &End, peer| {
        let subject_to_policy = subject.identity >= identity::CLUSTER_MIN
            || matches!(subject.identity, identity::INIT | identity::HEALTH);
        let asked = Asked { direction, subject, peer, protocol, port };
        subject_to_policy.then(|| reason(policies, &asked, question))
    };
    Explanation {
        egress: reason(Direction::Egress, source, destination),
        ingress: reason(Direction::Ingress, destination, source),
    }
}

fn reason(policies: &[&Policy], asked: &Asked<'_>, question: Option<&Question<'_>>) -> Reason {
    let Asked { direction, subject, peer, protocol, port } = *asked;
    let (verdict, matched) = judge(policies.iter().copied(), asked, question);
    let mut default_deny_by = Vec::new();
    let mut spoken: Option<&Application> = None;
    let mut nearest: Option<((Missing, Difference), Nearest)> = None;
    let mut sorted = policies.to_vec();
    sorted.sort_by(|a, b| a.id.cmp(&b.id));
    for policy in sorted {
        let selecting = policy.rules.iter().filter(|rule| rule.subject.matches(&subject.labels));
        for section in selecting.map(|rule| rule.section(direction)) {
            if section.default_deny && !default_deny_by.contains(&policy.id) {
                default_deny_by.push(policy.id.clone());
            }
            for entry in section.entries.iter().filter(|entry| entry.action == Action::Allow) {
                let to_port = matches_port(entry, direction, subject, peer, protocol, port);
                let missing = match (matches_peer(entry, peer), to_port) {
                    (true, true) => Missing::Inside,
                    (true, false) => Missing::Port,
                    (false, true) => Missing::Peer,
                    (false, false) => Missing::Both,
                };
                if missing == Missing::Inside && entry.application.needs_proxy() {
                    spoken.get_or_insert(&entry.application);
                }
                let (mut path, mut inside) = (entry.path.clone(), entry.application.to_string());
                let mut difference = Difference::Both;
                if let (Missing::Inside, Some(Question::Http(request, _)), Application::Http(rules)) =
                    (missing, question, &entry.application)
                    && let Some((least, item)) = nearest_item(rules, request)
                {
                    difference = least;
                    path = format!("{path}[{item}]");
                    inside = rules[item].to_string();
                }
                let distance = (missing, difference);
                if nearest.as_ref().is_none_or(|(found, _)| distance < *found) {
                    let source = RuleSource::Policy { policy: policy.id.clone(), path };
                    let ports = describe_ports(entry);
                    nearest = Some((distance, Nearest { source, missing, ports, inside }));
                }
            }
        }
    }
    let malformed = match (question, spoken) {
        (Some(Question::Malformed(fault)), Some(Application::Http(_))) if verdict.proxied => {
            Some(*fault)
        }
        _ => None,
    };
    let unruled = !verdict.allowed && verdict.rule.is_none() && malformed.is_none();
    let nearest = nearest.map(|(_, nearest)| nearest).filter(|_| unruled);
    Reason { direction, verdict, matched, default_deny_by, malformed, nearest }
}

/// The rule that differs least from a request, by its place in the list.
fn nearest_item(rules: &[HttpRule], request: &HttpRequest<'_>) -> Option<(Difference, usize)> {
    rules.iter().enumerate().map(|(item, rule)| (rule.difference(request), item)).min()
}

fn describe_ports(entry: &Entry) -> String {
    match &entry.ports {
        Ports::Any => "every port".into(),
        Ports::List(list) if list.is_empty() => "no port".into(),
        Ports::List(list) => list.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    }
}

fn names(policies: &[PolicyRef]) -> String {
    policies.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Nearest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { source, missing, ports, inside } = self;
        match missing {
            Missing::Inside => write!(f, "{source} allows {inside}"),
            Missing::Port => write!(f, "{source} allows this peer, on {ports}"),
            Missing::Peer => write!(f, "{source} allows this port, for other peers"),
            Missing::Both => {
                write!(f, "the nearest rule, {source}, allows other peers on {ports}")
            }
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(Malformed { status, why }) = self.malformed {
            return write!(f, "{}: denied: the proxy answers {status}: {why}", self.direction);
        }
        let word = match (self.verdict.allowed, self.verdict.proxied) {
            (true, true) => "allowed through the proxy",
            (true, false) => "allowed",
            (false, true) => "denied by the proxy",
            (false, false) => "denied",
        };
        write!(f, "{}: {word} ", self.direction)?;
        match &self.verdict.rule {
            Some(rule) => write!(f, "by {rule}")?,
            None if self.verdict.allowed => f.write_str("because no policy selects the pod")?,
            None if self.default_deny_by.is_empty() => {
                f.write_str("because the pod's labels are not known yet")?;
            }
            None if self.verdict.proxied => f.write_str("because no rule allows what is inside")?,
            None => write!(f, "by default; closed by {}", names(&self.default_deny_by))?,
        }
        match &self.nearest {
            Some(nearest) => write!(f, "; {nearest}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.allowed() { "ALLOWED" } else { "DENIED" };
        f.write_str(verdict)?;
        for reason in [&self.egress, &self.ingress].into_iter().flatten() {
            write!(f, "\n  {reason}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        arbitrary::{self, Packet, Random},
        l7::Secrets,
    };

    #[test]
    fn the_first_rule_that_matches_is_the_one_that_decides() {
        let secrets = Secrets::default();
        for seed in 0..2000 {
            let mut random = Random::new(seed);
            let world = arbitrary::world(&mut random);
            let policies: Vec<&Policy> = world.policies.iter().collect();
            let Packet { direction, subject, peer, protocol, port } = &world.packet(&mut random);
            let (protocol, port) = (*protocol, *port);
            let asked = Asked { direction: *direction, subject, peer, protocol, port };
            let question = arbitrary::question(&mut random, &secrets);
            for question in [None, Some(&question)] {
                let found = reason(&policies, &asked, question);
                let first = found.matched.first().map(|(_, source)| source.clone());
                assert_eq!(found.verdict.rule, first, "seed {seed}");
                assert!(!found.to_string().is_empty());
                let near = found.nearest.as_ref().map(|nearest| nearest.missing);
                if near == Some(Missing::Inside) {
                    assert!(!found.verdict.allowed, "seed {seed}");
                }
            }
        }
    }
}
