//! Why a packet is allowed or denied.

use std::fmt;

use palisade_abi::identity;

use crate::{
    compile::RuleSource,
    evaluate::{Asked, End, Judged, Verdict, judge, matches_peer, matches_port},
    l7::{
        Difference, HeaderEdit, HttpRequest, HttpRule, Question, SecretRef, Secrets, Unwritable,
        target::Malformed,
    },
    model::{Action, Application, Direction, Entry, Policy, PolicyRef, Ports},
};

/// What a rule that did not match lacks; the least first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Missing {
    /// It matches all, and nothing passes, because a value that it would write is not there.
    Secret,
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
    /// A value that it needs for that, and that is not there.
    pub secret: Option<SecretRef>,
}

/// What the proxy does whatever the rules allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It answers so: it is not certain what is asked for, or what would be sent.
    Answers(Malformed),
    /// It resets the connection: the client names no server.
    Resets,
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
    /// No rule has a say.
    pub refusal: Option<Refusal>,
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
/// that it belongs to. Only pods are subject to policies. The receiver's are asked about a request
/// as the sender's leave it.
#[must_use]
pub fn explain(
    policies: &[&Policy],
    source: &End,
    destination: &End,
    protocol: u8,
    port: u16,
    question: Option<&Question<'_>>,
) -> Explanation {
    let ask = |direction, subject: &End, peer, question: Option<&Question<'_>>| {
        let subject_to_policy = subject.identity >= identity::CLUSTER_MIN
            || matches!(subject.identity, identity::INIT | identity::HEALTH);
        let asked = Asked { direction, subject, peer, protocol, port };
        subject_to_policy.then(|| reason(policies, &asked, question))
    };
    let (egress, edits) = ask(Direction::Egress, source, destination, question).unzip();
    let edits = edits.unwrap_or_default();
    let sent = match question {
        // What cannot be sent was denied by then.
        Some(Question::Http(request, _)) => request.edited(&edits).unwrap_or_default(),
        _ => Vec::new(),
    };
    let headers: Vec<(&str, &[u8])> =
        sent.iter().map(|(name, value)| (&**name, &**value)).collect();
    let sent = question.map(|question| match question {
        Question::Http(request, secrets) => {
            Question::Http(HttpRequest { headers: &headers, ..*request }, secrets)
        }
        other => *other,
    });
    let ingress = ask(Direction::Ingress, destination, source, sent.as_ref());
    Explanation { egress, ingress: ingress.map(|(reason, _)| reason) }
}

/// Besides, what the rules make of a request.
fn reason(
    policies: &[&Policy],
    asked: &Asked<'_>,
    question: Option<&Question<'_>>,
) -> (Reason, Vec<HeaderEdit>) {
    let judged = judge(policies.iter().copied(), asked, question);
    let direction = asked.direction;
    let mut sorted = policies.to_vec();
    sorted.sort_by(|a, b| a.id.cmp(&b.id));
    let mut default_deny_by = Vec::new();
    let mut entries: Vec<(&Policy, &Entry)> = Vec::new();
    for policy in sorted {
        let labels = &asked.subject.labels;
        let selecting = policy.rules.iter().filter(|rule| rule.subject.matches(labels));
        for section in selecting.map(|rule| rule.section(direction)) {
            if section.default_deny && !default_deny_by.contains(&policy.id) {
                default_deny_by.push(policy.id.clone());
            }
            let allowing = section.entries.iter().filter(|entry| entry.action == Action::Allow);
            entries.extend(allowing.map(|entry| (policy, entry)));
        }
    }
    let speaks =
        |entry: &Entry| entry.application.needs_proxy() && missing(entry, asked) == Missing::Inside;
    let spoken = entries.iter().map(|(_, entry)| *entry).find(|entry| speaks(entry));
    let spoken = spoken.map(|entry| &entry.application);
    let refusal =
        question.zip(spoken).and_then(|(question, spoken)| refusal(spoken, question, &judged));
    let Judged { mut verdict, matched, edits } = judged;
    verdict.allowed &= refusal.is_none();
    let unruled = !verdict.allowed && verdict.rule.is_none() && refusal.is_none();
    // Where something else is to be said, what an HTTP rule allows is beside the point.
    let inside = question.filter(|_| matches!(spoken, None | Some(Application::Http(_))));
    let near = |(policy, entry): &(&Policy, &Entry)| near(policy, entry, asked, inside);
    let nearest = unruled.then(|| entries.iter().map(near).min_by_key(|(distance, _)| *distance));
    let nearest = nearest.flatten().map(|(_, nearest)| nearest);
    (Reason { direction, verdict, matched, default_deny_by, refusal, nearest }, edits)
}

fn missing(entry: &Entry, asked: &Asked<'_>) -> Missing {
    let Asked { direction, subject, peer, protocol, port } = *asked;
    let to_port = matches_port(entry, direction, subject, peer, protocol, port);
    match (matches_peer(entry, peer), to_port) {
        (true, true) => Missing::Inside,
        (true, false) => Missing::Port,
        (false, true) => Missing::Peer,
        (false, false) => Missing::Both,
    }
}

/// What a proxy would do that speaks what the first rule asks for, whatever the rules allow.
fn refusal(
    spoken: &Application,
    question: &Question<'_>,
    Judged { verdict, edits, .. }: &Judged,
) -> Option<Refusal> {
    match (question, spoken) {
        _ if !verdict.proxied => None,
        (Question::Malformed(fault), Application::Http(_)) => Some(Refusal::Answers(*fault)),
        (Question::Http(request, _), Application::Http(_)) => {
            let Unwritable = request.edited(edits).err()?;
            Some(Refusal::Answers(Malformed { status: 403, why: Unwritable::WHY }))
        }
        (Question::Tls(None), Application::Tls(_)) if !verdict.allowed => Some(Refusal::Resets),
        _ => None,
    }
}

/// A rule that does not allow what was asked, and how far it is from that.
fn near(
    policy: &Policy,
    entry: &Entry,
    asked: &Asked<'_>,
    question: Option<&Question<'_>>,
) -> ((Missing, Difference), Nearest) {
    let missing = missing(entry, asked);
    let source = |path| RuleSource::Policy { policy: policy.id.clone(), path };
    let ports = describe_ports(entry);
    if let (Missing::Inside, Some(Question::Http(request, secrets)), Application::Http(rules)) =
        (missing, question, &entry.application)
        && let Some((difference, item)) = nearest_item(rules, request, secrets)
    {
        let rule = &rules[item];
        let missing = match difference {
            Difference::Secret => Missing::Secret,
            _ => Missing::Inside,
        };
        let source = source(format!("{}[{item}]", entry.path));
        let (inside, secret) = (rule.to_string(), rule.lacks(secrets).cloned());
        return ((missing, difference), Nearest { source, missing, ports, inside, secret });
    }
    let (source, inside) = (source(entry.path.clone()), entry.application.to_string());
    let nearest = Nearest { source, missing, ports, inside, secret: None };
    ((missing, Difference::Both), nearest)
}

/// The rule that differs least from a request, by its place in the list.
fn nearest_item(
    rules: &[HttpRule],
    request: &HttpRequest<'_>,
    secrets: &Secrets,
) -> Option<(Difference, usize)> {
    let differences = rules.iter().map(|rule| rule.difference(request, secrets));
    differences.zip(0..).min()
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
        let Self { source, missing, ports, inside, secret } = self;
        match missing {
            Missing::Secret | Missing::Inside => {
                write!(f, "{source} allows {inside}")?;
                let Some(secret) = secret else { return Ok(()) };
                let copy = secret.copy();
                write!(
                    f,
                    ", and needs {secret}, of which there is no copy `{copy}` with one line of text"
                )
            }
            Missing::Port => write!(f, "{source} allows this peer, on {ports}"),
            Missing::Peer => write!(f, "{source} allows this port, for other peers"),
            Missing::Both => {
                write!(f, "the nearest rule, {source}, allows other peers on {ports}")
            }
        }
    }
}

impl Reason {
    /// The verdict and its ground, in words.
    #[must_use]
    pub fn ground(&self) -> String {
        let direction = self.direction;
        match self.refusal {
            Some(Refusal::Answers(Malformed { status, why })) => {
                return format!("{direction}: denied: the proxy answers {status}: {why}");
            }
            Some(Refusal::Resets) => {
                let why = "the client names no server, or not as TLS has it (no dot at the end)";
                return format!("{direction}: denied: the proxy resets the connection: {why}");
            }
            None => {}
        }
        let word = match (self.verdict.allowed, self.verdict.proxied) {
            (true, true) => "allowed through the proxy",
            (true, false) => "allowed",
            (false, true) => "denied by the proxy",
            (false, false) => "denied",
        };
        format!("{direction}: {word} {}", self.why())
    }

    fn why(&self) -> String {
        let Verdict { allowed, proxied, rule } = &self.verdict;
        let wanting = self.nearest.as_ref().filter(|near| near.missing == Missing::Secret);
        match (rule, wanting.and_then(|near| near.secret.as_ref())) {
            (Some(rule), _) => format!("by {rule}"),
            _ if *allowed => "because no policy selects the pod".into(),
            (None, Some(secret)) => format!("for want of {secret}"),
            _ if *proxied => "because no rule allows what is inside".into(),
            _ if self.default_deny_by.is_empty() => {
                "because the pod's labels are not known yet".into()
            }
            _ => format!("by default; closed by {}", names(&self.default_deny_by)),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.ground())?;
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
        l7::{HeaderRule, HeaderValue, Mismatch, NamePattern},
        model::{Peers, PolicyKind, Rule, Section},
    };

    #[test]
    fn the_first_rule_that_matches_is_the_one_that_decides() {
        let secrets = arbitrary::secrets();
        for seed in 0..2000 {
            let mut random = Random::new(seed);
            let world = arbitrary::world(&mut random);
            let policies: Vec<&Policy> = world.policies.iter().collect();
            let Packet { direction, subject, peer, protocol, port } = &world.packet(&mut random);
            let (protocol, port) = (*protocol, *port);
            let asked = Asked { direction: *direction, subject, peer, protocol, port };
            let question = arbitrary::question(&mut random, &secrets);
            for question in [None, Some(&question)] {
                let (found, _) = reason(&policies, &asked, question);
                let first = found.matched.first().map(|(_, source)| source.clone());
                assert_eq!(found.verdict.rule, first, "seed {seed}");
                let judged = judge(policies.iter().copied(), &asked, question);
                assert_eq!(found.verdict, judged.verdict, "seed {seed}");
                assert!(!found.to_string().is_empty());
                let near = found.nearest.as_ref().map(|nearest| nearest.missing);
                if matches!(near, Some(Missing::Inside | Missing::Secret)) {
                    assert!(!found.verdict.allowed, "seed {seed}");
                }
            }
        }
    }

    /// What everybody may ask everybody, in one direction.
    fn policy(direction: Direction, rule: HttpRule) -> Policy {
        let entry = Entry {
            action: Action::Allow,
            peers: Peers::Any,
            ports: Ports::Any,
            application: Application::Http(vec![rule]),
            path: "spec".into(),
        };
        let section = Section { default_deny: true, entries: vec![entry] };
        let rule = match direction {
            Direction::Ingress => Rule { ingress: section, ..Rule::default() },
            Direction::Egress => Rule { egress: section, ..Rule::default() },
        };
        let kind = PolicyKind::CiliumClusterwideNetworkPolicy;
        let id = PolicyRef { kind, namespace: None, name: direction.to_string() };
        Policy { id, rules: vec![rule] }
    }

    fn header(name: &str, value: &str, mismatch: Mismatch) -> HttpRule {
        let value = Some(HeaderValue::Text(value.into()));
        let header = HeaderRule { name: name.into(), value, mismatch };
        HttpRule { headers: vec![header], ..HttpRule::default() }
    }

    /// Between two pods.
    fn explained(policies: &[&Policy], question: &Question<'_>) -> Explanation {
        let mut random = Random::new(1);
        let pods = arbitrary::world(&mut random).pods;
        explain(policies, &pods[0], &pods[1], 6, 80, Some(question))
    }

    /// Of a request with the header `x: 1`.
    fn request(policies: &[&Policy]) -> Explanation {
        let headers: [(&str, &[u8]); 1] = [("x", b"1")];
        let request = HttpRequest { method: "GET", target: "/", host: "a", headers: &headers };
        explained(policies, &Question::Http(request, &Secrets::default()))
    }

    #[test]
    fn the_receiver_is_asked_about_what_the_sender_leaves() {
        let wants = |value: &str| policy(Direction::Ingress, header("x", value, Mismatch::Fail));
        let allowed = |sends: Option<Mismatch>, wanted: &str| {
            let sends = sends.map(|sends| policy(Direction::Egress, header("x", "2", sends)));
            let wants = wants(wanted);
            request(&sends.iter().chain([&wants]).collect::<Vec<_>>()).allowed()
        };
        for (sends, first, second) in [
            (None, true, false),
            (Some(Mismatch::Fail), false, false),
            (Some(Mismatch::Log), true, false),
            (Some(Mismatch::Add), false, false),
            (Some(Mismatch::Delete), false, false),
            (Some(Mismatch::Replace), false, true),
        ] {
            assert_eq!((allowed(sends, "1"), allowed(sends, "2")), (first, second), "{sends:?}");
        }
    }

    #[test]
    fn what_the_proxy_would_not_write_is_denied_at_the_end_that_wants_it() {
        let any = || policy(Direction::Ingress, HttpRule::default());
        for (name, value, written) in [("y", "1", true), ("host", "1", false), ("y", "\n", false)] {
            let sends = policy(Direction::Egress, header(name, value, Mismatch::Add));
            let found = request(&[&sends, &any()]);
            let egress = found.egress.as_ref().expect("a pod");
            assert_eq!((found.allowed(), egress.verdict.allowed), (written, written), "{name}");
            assert_eq!(egress.ground().contains("the proxy answers 403"), !written);
            let receives = policy(Direction::Ingress, header(name, value, Mismatch::Add));
            assert_eq!(request(&[&receives]).allowed(), written);
        }
    }

    #[test]
    fn who_names_no_server_is_refused_where_names_are_asked_for() {
        for default_deny in [false, true] {
            let mut policy = policy(Direction::Ingress, HttpRule::default());
            let section = &mut policy.rules[0].ingress;
            section.default_deny = default_deny;
            section.entries[0].application = Application::Tls(vec![NamePattern::everything()]);
            let found = explained(&[&policy], &Question::Tls(None));
            assert_eq!(found.allowed(), !default_deny);
            let ground = found.ingress.expect("a pod").ground();
            assert_eq!(ground.contains("the proxy resets"), default_deny, "{ground}");
        }
    }
}
