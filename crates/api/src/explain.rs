//! Answers "would this pass, and why?" from policies and the two ends.

use palisade_policy::{
    evaluate::End,
    explain::{self, Reason},
    l7::{HttpRequest, Question, Secrets},
    model::Policy,
};

use crate::admin::{Explain, ExplainedEnd, Explanation, Inside, RuleState};

/// One end and what people call it.
#[derive(Clone, Debug)]
pub struct NamedEnd {
    /// Name.
    pub name: String,
    /// The end.
    pub end: End,
}

/// The answer. Values of secrets are not looked at: headers that have to equal one do not.
#[must_use]
pub fn explain(
    policies: &[&Policy],
    from: &NamedEnd,
    to: &NamedEnd,
    asked: &Explain,
) -> Explanation {
    let secrets = Secrets::default();
    let question = asked.inside.as_ref().map(|inside| match inside {
        Inside::Http { method, target, host } => {
            Question::Http(HttpRequest { method, target, host, headers: &[] }, &secrets)
        }
        Inside::Dns(name) => Question::Dns(name),
        Inside::Tls(name) => Question::Tls(Some(name)),
    });
    let (protocol, port) = (asked.protocol, asked.port);
    let found = explain::explain(policies, &from.end, &to.end, protocol, port, question.as_ref());
    Explanation {
        from: from.name.clone(),
        to: to.name.clone(),
        allowed: found.allowed(),
        ends: [&found.egress, &found.ingress].into_iter().flatten().map(end).collect(),
    }
}

fn end(reason: &Reason) -> ExplainedEnd {
    let rules = reason.matched.iter().map(|(action, source)| {
        let (policy, path) = match source {
            palisade_policy::RuleSource::Policy { policy, path } => {
                (policy.to_string(), path.clone())
            }
            other => (other.to_string(), String::new()),
        };
        RuleState { action: action.to_string(), policy, path }
    });
    ExplainedEnd {
        direction: reason.direction.to_string(),
        allowed: reason.verdict.allowed,
        proxied: reason.verdict.proxied,
        verdict: Reason { nearest: None, ..reason.clone() }.to_string(),
        rules: rules.collect(),
        nearest: reason.nearest.as_ref().map(ToString::to_string),
    }
}
