//! Policy objects to the policy model.
//!
//! The objects are read as plain JSON, so that a field that is not known is seen, and refused,
//! and never silently dropped: a dropped peer would turn "from these" into "from everybody".

mod cilium;
mod kubernetes;
mod read;
mod suggest;

use std::fmt;

use palisade_policy::{
    label::{POD_NAMESPACE, SOURCE_K8S},
    model::{Policy, PolicyKind, PolicyRef, Rule, Section},
    selector::{Key, Requirement, Selector},
};
use serde_json::Value;

use self::read::Reader;

/// Something wrong with an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The field, such as `spec.ingress[0].fromEndpoints[1]`.
    pub path: String,
    /// What is wrong.
    pub message: String,
    /// What to write instead; empty where there is nothing to say.
    pub suggestion: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)?;
        if self.suggestion.is_empty() {
            return Ok(());
        }
        write!(f, "; {}", self.suggestion)
    }
}

/// Endpoints that a refused policy speaks of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedSubject {
    /// Which ones; where that cannot be read, more rather than fewer.
    pub subject: Selector,
    /// Whether the policy speaks of traffic to them.
    pub ingress: bool,
    /// Whether it speaks of traffic from them.
    pub egress: bool,
}

/// A policy that is wrong, or says something that is not supported.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{policy}: {}", problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
pub struct Refusal {
    /// The policy.
    pub policy: PolicyRef,
    /// Why; never empty.
    pub problems: Vec<Problem>,
    /// Whom it speaks of.
    pub subjects: Vec<RefusedSubject>,
}

impl Refusal {
    /// What is in force in place of the policy: its subjects are closed in the directions that it
    /// names.
    #[must_use]
    pub fn lockdown(&self) -> Policy {
        let closed = |default_deny| Section { default_deny, entries: Vec::new() };
        let rules = self
            .subjects
            .iter()
            .map(|refused| Rule {
                subject: refused.subject.clone(),
                ingress: closed(refused.ingress),
                egress: closed(refused.egress),
            })
            .collect();
        Policy { id: self.policy.clone(), rules }
    }
}

/// What a reader of one kind of policy found.
#[derive(Default)]
struct Converted {
    rules: Vec<Rule>,
    subjects: Vec<RefusedSubject>,
}

/// Reads a policy object of the given kind. `cluster` is the cluster's own name.
///
/// # Errors
/// The object is wrong or says something that is not supported: nothing of it is in force, and
/// [`Refusal::lockdown`] should be.
pub fn convert(kind: PolicyKind, object: &Value, cluster: &str) -> Result<Policy, Refusal> {
    let id = policy_ref(kind, object);
    let mut reader = Reader::default();
    let converted = read_policy(&mut reader, &id, object, cluster);
    if reader.problems.is_empty() {
        return Ok(Policy { id, rules: converted.rules });
    }
    let mut subjects = converted.subjects;
    if object.get("spec").or(object.get("specs")).is_none_or(|spec| !is_readable(spec)) {
        subjects.push(RefusedSubject { subject: everybody(&id), ingress: true, egress: true });
    }
    Err(Refusal { policy: id, problems: reader.problems, subjects })
}

fn is_readable(spec: &Value) -> bool {
    spec.is_object() || spec.as_array().is_some_and(|list| list.iter().all(Value::is_object))
}

/// Everybody that a policy may select.
fn everybody(id: &PolicyRef) -> Selector {
    let namespace = Key::new(SOURCE_K8S, POD_NAMESPACE);
    Selector::new(vec![match &id.namespace {
        Some(name) => Requirement::equals(namespace, name),
        None => Requirement::exists(namespace),
    }])
}

/// Looks for problems in a document of any kind. `None`: it is not a policy.
#[must_use]
pub fn check(document: &Value) -> Option<Vec<Problem>> {
    let text = |field: &str| document.get(field).and_then(Value::as_str).unwrap_or_default();
    let kind = match (text("apiVersion"), text("kind")) {
        (_, "NetworkPolicy") => PolicyKind::NetworkPolicy,
        (_, "CiliumNetworkPolicy") => PolicyKind::CiliumNetworkPolicy,
        (_, "CiliumClusterwideNetworkPolicy") => PolicyKind::CiliumClusterwideNetworkPolicy,
        _ => return None,
    };
    let mut reader = Reader::default();
    let expected = match kind {
        PolicyKind::NetworkPolicy => "networking.k8s.io/v1",
        _ => "cilium.io/v2",
    };
    if text("apiVersion") != expected {
        let found = text("apiVersion");
        let message = format!("`{found}` has no {kind}");
        reader.problem("apiVersion", message, format!("write `{expected}`"));
    }
    match document.pointer("/metadata/name").filter(|name| !name.is_null()) {
        Some(name) if reader.text(name, "metadata.name") != Some("") => {}
        _ => reader.problem("metadata.name", "an object needs a name", ""),
    }
    read_policy(&mut reader, &policy_ref(kind, document), document, "default");
    Some(reader.problems)
}

fn policy_ref(kind: PolicyKind, object: &Value) -> PolicyRef {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
    PolicyRef {
        kind,
        namespace: (kind != PolicyKind::CiliumClusterwideNetworkPolicy)
            .then(|| text("/metadata/namespace").unwrap_or("default").to_owned()),
        name: text("/metadata/name").unwrap_or_default().to_owned(),
    }
}

fn read_policy(reader: &mut Reader, id: &PolicyRef, object: &Value, cluster: &str) -> Converted {
    match id.kind {
        PolicyKind::NetworkPolicy => kubernetes::read(reader, id, object, cluster),
        _ => cilium::read(reader, id, object, cluster),
    }
}

#[cfg(test)]
mod tests;
