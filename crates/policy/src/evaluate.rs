//! The oracle: what a set of policies says of one packet, by walking them one by one. It shares
//! no code with the compiler; both are compared in the tests of every layer.

use std::{collections::BTreeSet, net::IpAddr};

use palisade_abi::identity as number;

use crate::{
    compile::RuleSource,
    l7::{HeaderEdit, HttpMatcher, HttpRequest, HttpRule, Question, Secrets, may_learn},
    label::Labels,
    model::{
        Action, Application, Direction, Entry, NamedPort, Peer, Peers, Policy, PortMatch, PortSpec,
        Ports,
    },
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
    /// Names for which DNS gave its address to those whose policies are asked.
    pub names: BTreeSet<String>,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether the packet passes.
    pub allowed: bool,
    /// Whether it passes through the proxy, which has the last word.
    pub proxied: bool,
    /// Which rule says so; `None`: no policy selects the endpoint, or the default deny.
    pub rule: Option<RuleSource>,
}

impl Verdict {
    const fn allow(rule: Option<RuleSource>) -> Self {
        Self { allowed: true, proxied: false, rule }
    }

    const fn deny(rule: Option<RuleSource>) -> Self {
        Self { allowed: false, proxied: false, rule }
    }
}

/// A packet, as the subject sees it.
#[derive(Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub(crate) direction: Direction,
    pub(crate) subject: &'a End,
    pub(crate) peer: &'a End,
    pub(crate) protocol: u8,
    pub(crate) port: u16,
}

/// What the policies that select the subject say.
#[derive(Default)]
struct Heard<'a> {
    /// Some policy says something.
    selected: bool,
    default_deny: bool,
    /// The entries that match, in the order of policies.
    entries: Vec<(RuleSource, &'a Entry)>,
}

impl<'a> Heard<'a> {
    fn ask(policies: impl IntoIterator<Item = &'a Policy>, asked: &Asked<'_>) -> Self {
        let mut policies: Vec<&Policy> = policies.into_iter().collect();
        policies.sort_by(|a, b| a.id.cmp(&b.id));
        let Asked { direction, subject, peer, protocol, port } = *asked;
        let default_deny = subject.identity == number::INIT;
        let mut heard = Self { default_deny, ..Self::default() };
        for policy in policies {
            let selecting = policy.rules.iter().filter(|one| one.subject.matches(&subject.labels));
            for section in selecting.map(|rule| rule.section(direction)) {
                heard.selected |= !section.is_empty();
                heard.default_deny |= section.default_deny;
                let matching = section.entries.iter().filter(|entry| {
                    matches_peer(entry, peer)
                        && matches_port(entry, direction, subject, peer, protocol, port)
                });
                heard.entries.extend(matching.map(|entry| {
                    let (policy, path) = (policy.id.clone(), entry.path.clone());
                    (RuleSource::Policy { policy, path }, entry)
                }));
            }
        }
        heard
    }

    /// The entries that allow and that something else is true of.
    fn allowing(
        &self,
        also: impl Fn(&Entry) -> bool,
    ) -> impl Iterator<Item = &(RuleSource, &'a Entry)> {
        self.entries.iter().filter(move |(_, entry)| entry.action == Action::Allow && also(entry))
    }

    fn verdict(&self, asked: &Asked<'_>) -> Verdict {
        let local = asked.direction == Direction::Ingress && asked.peer.identity == number::HOST;
        let deny = self.entries.iter().find(|(_, entry)| entry.action == Action::Deny);
        let redirect = self.allowing(|entry| entry.application != Application::Any).next();
        let allow = self.allowing(|_| true).next();
        match (deny, redirect, allow) {
            _ if !self.selected && !self.default_deny => Verdict::allow(None),
            _ if local => Verdict::allow(Some(RuleSource::AllowLocalhost)),
            (Some((rule, _)), ..) => Verdict::deny(Some(rule.clone())),
            (_, Some((rule, _)), _) => {
                Verdict { allowed: true, proxied: true, rule: Some(rule.clone()) }
            }
            (.., Some((rule, _))) => Verdict::allow(Some(rule.clone())),
            _ if self.default_deny => Verdict::deny(None),
            _ => Verdict::allow(Some(RuleSource::NoDefaultDeny)),
        }
    }

    /// What admits what is asked for inside a proxied connection.
    fn admitting(&self, asked: &Asked<'_>, question: &Question<'_>) -> Admitted {
        let proxied = |entry: &Entry| entry.application != Application::Any;
        let first = self.allowing(proxied).map(|(_, entry)| &entry.application).next();
        let open = (!self.default_deny).then_some(RuleSource::NoDefaultDeny);
        // Another protocol than the first of the rules asks for is admitted by none.
        match (first, question) {
            (Some(Application::Http(_)), Question::Http(request, secrets)) => {
                self.admitting_request(asked, request, secrets, open.as_ref())
            }
            (Some(Application::Dns(_)), Question::Dns(_)) => {
                let plain = |entry: &Entry| {
                    entry.application == Application::Any
                        && how_spoken_of(entry, asked) == Spoken::ByItself
                };
                let rules = self.admitting_name(question).chain(self.allowing(plain));
                Admitted::by(rules.map(|(rule, _)| rule.clone()).chain(open).collect())
            }
            (Some(Application::Tls(_)), _) if open.is_some() => {
                Admitted::by(open.into_iter().collect())
            }
            (Some(Application::Tls(_)), Question::Tls(_)) => {
                Admitted::by(self.admitting_name(question).map(|(rule, _)| rule.clone()).collect())
            }
            _ => Admitted::default(),
        }
    }

    fn admitting_name(
        &self,
        question: &Question<'_>,
    ) -> impl Iterator<Item = &(RuleSource, &'a Entry)> {
        self.allowing(move |entry| match (&entry.application, question) {
            (Application::Dns(names), Question::Dns(name))
            | (Application::Tls(names), Question::Tls(Some(name))) => {
                names.iter().any(|pattern| pattern.matches(name))
            }
            _ => false,
        })
    }

    /// All rules are asked together, as the proxy asks them: what one of them would have changed
    /// does not pass unchanged because another allows it.
    fn admitting_request(
        &self,
        asked: &Asked<'_>,
        request: &HttpRequest<'_>,
        secrets: &Secrets,
        open: Option<&RuleSource>,
    ) -> Admitted {
        let mut asks: Vec<(&RuleSource, HttpRule)> = Vec::new();
        for (source, entry) in self.allowing(|_| true) {
            if let Application::Http(rules) = &entry.application {
                asks.extend(rules.iter().map(|rule| (source, rule.clone())));
            }
        }
        let plain = |entry: &Entry| {
            entry.application == Application::Any
                && how_spoken_of(entry, asked) != Spoken::AmongOthers
        };
        let everything = self.allowing(plain).map(|(source, _)| source).chain(open);
        asks.extend(everything.map(|source| (source, HttpRule::default())));
        let (sources, rules): (Vec<&RuleSource>, Vec<HttpRule>) = asks.into_iter().unzip();
        let (matcher, _) = HttpMatcher::new(&rules, secrets);
        let Some(found) = matcher.judge(request) else { return Admitted::default() };
        let admits = |rule: &usize| matcher.judge_by(request, |other| other == *rule).is_some();
        let admitting = (0..rules.len()).filter(admits);
        let mut rules: Vec<RuleSource> = admitting.map(|rule| sources[rule].clone()).collect();
        rules.dedup();
        Admitted { rules, edits: found.edits }
    }

    /// All rules that match, in the order of their precedence.
    fn matching(&self, verdict: &Verdict) -> Vec<(Action, RuleSource)> {
        let mut found: Vec<&(RuleSource, &Entry)> = self.entries.iter().collect();
        found.sort_by_key(|(_, entry)| (entry.action, entry.application == Application::Any));
        let mut rules: Vec<(Action, RuleSource)> =
            found.into_iter().map(|(rule, entry)| (entry.action, rule.clone())).collect();
        match &verdict.rule {
            Some(local @ RuleSource::AllowLocalhost) => {
                rules.insert(0, (Action::Allow, local.clone()));
            }
            Some(open @ RuleSource::NoDefaultDeny) => rules.push((Action::Allow, open.clone())),
            _ => {}
        }
        rules
    }
}

/// The rules that admit what is asked for inside a connection, and what they do to it.
#[derive(Default)]
struct Admitted {
    /// The first decides; none: it is denied.
    rules: Vec<RuleSource>,
    edits: Vec<HeaderEdit>,
}

impl Admitted {
    const fn by(rules: Vec<RuleSource>) -> Self {
        Self { rules, edits: Vec::new() }
    }
}

/// How an entry that matches a port speaks of it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Spoken {
    /// It names this port.
    ByItself,
    /// It names no ports.
    NotAtAll,
    /// It names a range.
    AmongOthers,
}

fn how_spoken_of(entry: &Entry, asked: &Asked<'_>) -> Spoken {
    let Ports::List(list) = &entry.ports else { return Spoken::NotAtAll };
    let own = || list.iter().filter(|one| one.protocol == asked.protocol);
    let named = |one: &PortMatch| match &one.port {
        PortSpec::All => false,
        PortSpec::Range(first, last) => *first == asked.port && *last == asked.port,
        PortSpec::Named(_) => {
            let only = Ports::List(vec![one.clone()]);
            port_matches(&only, asked.destination(), asked.protocol, asked.port)
        }
    };
    if own().any(named) {
        Spoken::ByItself
    } else if own().any(|one| one.port == PortSpec::All) {
        Spoken::NotAtAll
    } else {
        Spoken::AmongOthers
    }
}

impl Asked<'_> {
    /// Named ports are those of the destination.
    const fn destination(&self) -> &End {
        match self.direction {
            Direction::Ingress => self.subject,
            Direction::Egress => self.peer,
        }
    }
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
    let asked = Asked { direction, subject, peer, protocol, port };
    Heard::ask(policies, &asked).verdict(&asked)
}

/// The same for what is asked for inside the connection. Where only the proxy can tell, this is
/// what it says; `proxied` with no rule: none of the rules for such a connection admits it.
#[must_use]
pub fn evaluate_inside<'a>(
    policies: impl IntoIterator<Item = &'a Policy>,
    direction: Direction,
    subject: &End,
    peer: &End,
    protocol: u8,
    port: u16,
    question: &Question<'_>,
) -> Verdict {
    let asked = Asked { direction, subject, peer, protocol, port };
    judge(policies, &asked, Some(question)).verdict
}

/// All that is said of a packet, or of what is asked for inside the connection.
pub(crate) struct Judged {
    pub(crate) verdict: Verdict,
    /// The rules that match, in the order of their precedence.
    pub(crate) matched: Vec<(Action, RuleSource)>,
    /// What they make of a request.
    pub(crate) edits: Vec<HeaderEdit>,
}

pub(crate) fn judge<'a>(
    policies: impl IntoIterator<Item = &'a Policy>,
    asked: &Asked<'_>,
    question: Option<&Question<'_>>,
) -> Judged {
    let heard = Heard::ask(policies, asked);
    let verdict = heard.verdict(asked);
    let Some(question) = question.filter(|_| verdict.proxied) else {
        return Judged { matched: heard.matching(&verdict), verdict, edits: Vec::new() };
    };
    let Admitted { rules, edits } = heard.admitting(asked, question);
    let rule = rules.first().cloned();
    let verdict = Verdict { allowed: rule.is_some(), proxied: true, rule };
    let matched = rules.into_iter().map(|rule| (Action::Allow, rule)).collect();
    Judged { verdict, matched, edits }
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
        Peer::Fqdn(pattern) => {
            number::is_world(peer.identity)
                && may_learn(peer.address)
                && peer.names.iter().any(|name| pattern.matches(name))
        }
        Peer::Entity(entity) if unknown => entity.selectors().is_none(),
        Peer::Selector(_) if unknown => false,
        Peer::Entity(entity) => entity.matches(&peer.labels),
        Peer::Selector(selector) => selector.matches(&peer.labels),
    })
}

/// Whether an entry matches the port, or the ICMP type.
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
