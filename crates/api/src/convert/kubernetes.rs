//! `networking.k8s.io/v1` `NetworkPolicy`.

use palisade_abi::protocol;
use palisade_policy::{
    identity::is_relevant,
    label::{CLUSTER, NAMESPACE_LABELS, POD_NAMESPACE, SOURCE_K8S},
    model::{
        Action, Application, Entry, Peer, Peers, PolicyRef, PortMatch, PortSpec, Ports, Rule,
        Section,
    },
    selector::{Key, Requirement, Selector},
};
use serde_json::{Map, Value};

use super::{
    Converted, RefusedSubject,
    read::{Reader, Written, present},
};

/// What the readers of the parts need to know of the whole.
struct Context<'a> {
    namespace: &'a str,
    cluster: &'a str,
}

pub(super) fn read(
    reader: &mut Reader,
    id: &PolicyRef,
    object: &Value,
    cluster: &str,
) -> Converted {
    let mut converted = Converted::default();
    let known = ["apiVersion", "kind", "metadata", "spec", "status"];
    let Some(object) = reader.object(object, "", &known) else { return converted };
    let Some(spec) = present(object, "spec") else {
        reader.problem("spec", "is missing", "");
        return converted;
    };
    let known = ["podSelector", "policyTypes", "ingress", "egress"];
    let Some(spec) = reader.object(spec, "spec", &known) else { return converted };
    let context = Context { namespace: id.namespace.as_deref().unwrap_or("default"), cluster };

    let mut requirements = vec![Requirement::equals(k8s(POD_NAMESPACE), context.namespace)];
    if let Some(selector) = present(spec, "podSelector") {
        let written = reader.label_selector(selector, "spec.podSelector");
        requirements.extend(own_labels(reader, written, false));
    }
    let subject = Selector::new(requirements);
    let ingress = entries(reader, spec, "ingress", "from", &context);
    let egress = entries(reader, spec, "egress", "to", &context);
    let (closes_ingress, closes_egress) = policy_types(reader, spec, !egress.is_empty());
    let section = |closes: bool, entries| match closes {
        true => Section { default_deny: true, entries },
        false => Section::default(),
    };
    converted.subjects.push(RefusedSubject {
        subject: subject.clone(),
        ingress: closes_ingress,
        egress: closes_egress || present(spec, "egress").is_some(),
    });
    converted.rules.push(Rule {
        subject,
        ingress: section(closes_ingress, ingress),
        egress: section(closes_egress, egress),
    });
    converted
}

fn k8s(key: impl Into<String>) -> Key {
    Key::new(SOURCE_K8S, key)
}

/// Directions in which the policy is in effect.
fn policy_types(reader: &mut Reader, spec: &Map<String, Value>, has_egress: bool) -> (bool, bool) {
    let types = reader.list(spec, "policyTypes", "spec").unwrap_or_default();
    if types.is_empty() {
        return (true, has_egress);
    }
    let mut found = (false, false);
    for (item, path) in types {
        match reader.word(item, &path, &["Ingress", "Egress"]) {
            Some("Ingress") => found.0 = true,
            Some(_) => found.1 = true,
            // What was meant is not known: take it for both.
            None => found = (true, true),
        }
    }
    found
}

fn entries(
    reader: &mut Reader,
    spec: &Map<String, Value>,
    field: &str,
    peers_field: &'static str,
    context: &Context<'_>,
) -> Vec<Entry> {
    let rules = reader.list(spec, field, "spec").unwrap_or_default();
    rules
        .into_iter()
        .filter_map(|(value, path)| {
            let rule = reader.object(value, &path, &[peers_field, "ports"])?;
            let peers = reader.list(rule, peers_field, &path).unwrap_or_default();
            let peers = match peers.is_empty() {
                true => Peers::Any,
                false => Peers::List(
                    peers
                        .into_iter()
                        .filter_map(|(value, path)| peer(reader, value, &path, context))
                        .collect(),
                ),
            };
            let ports = reader.list(rule, "ports", &path).unwrap_or_default();
            let ports = match ports.is_empty() {
                true => Ports::Any,
                false => Ports::List(
                    ports
                        .into_iter()
                        .filter_map(|(value, path)| port(reader, value, &path))
                        .collect(),
                ),
            };
            Some(Entry { action: Action::Allow, peers, ports, application: Application::Any, path })
        })
        .collect()
}

fn peer(reader: &mut Reader, value: &Value, path: &str, context: &Context<'_>) -> Option<Peer> {
    let map = reader.object(value, path, &["podSelector", "namespaceSelector", "ipBlock"])?;
    let (pods, namespaces) = (present(map, "podSelector"), present(map, "namespaceSelector"));
    if let Some(block) = present(map, "ipBlock") {
        if pods.is_some() || namespaces.is_some() {
            let suggestion = "make two peers of it";
            reader.problem(path, "`ipBlock` goes with no other selector", suggestion);
            return None;
        }
        let path = format!("{path}.ipBlock");
        let block = reader.object(block, &path, &["cidr", "except"])?;
        return reader.cidr(block, &path, true).map(Peer::Cidr);
    }
    if pods.is_none() && namespaces.is_none() {
        let suggestion = "write podSelector: {}, namespaceSelector: {} or an ipBlock, or leave the \
                          whole list out for everybody";
        reader.problem(path, "a peer must say whom it means", suggestion);
        return None;
    }
    let mut requirements = vec![Requirement::equals(k8s(CLUSTER), context.cluster)];
    match namespaces {
        None => requirements.push(Requirement::equals(k8s(POD_NAMESPACE), context.namespace)),
        Some(selector) => {
            requirements.push(Requirement::exists(k8s(POD_NAMESPACE)));
            let written = reader.label_selector(selector, &format!("{path}.namespaceSelector"));
            requirements.extend(written.into_iter().map(|written| Requirement {
                key: k8s(format!("{NAMESPACE_LABELS}{}", written.key)),
                operator: written.operator,
            }));
        }
    }
    if let Some(selector) = pods {
        let written = reader.label_selector(selector, &format!("{path}.podSelector"));
        requirements.extend(own_labels(reader, written, true));
    }
    Some(Peer::Selector(Selector::new(requirements)))
}

/// Requirements on labels that pods give themselves.
fn own_labels(reader: &mut Reader, written: Vec<Written>, peer: bool) -> Vec<Requirement> {
    written
        .into_iter()
        .filter_map(|Written { key, operator, path }| {
            if key == POD_NAMESPACE || key.starts_with("io.cilium.k8s.") {
                let message = format!("`{key}` is not a label that a pod can give itself");
                reader.problem(path, message, "select namespaces with a namespaceSelector");
                return None;
            }
            if peer && !is_relevant(&key) {
                reader.problem(path, irrelevant(&key), IRRELEVANT_SUGGESTION);
                return None;
            }
            Some(Requirement { key: k8s(key), operator })
        })
        .collect()
}

/// Why a peer cannot be selected by a label.
pub(super) fn irrelevant(key: &str) -> String {
    format!("peers cannot be told apart by `{key}`, which differs from replica to replica")
}

/// What to do about it.
pub(super) const IRRELEVANT_SUGGESTION: &str = "select them by a label of their workload";

fn port(reader: &mut Reader, value: &Value, path: &str) -> Option<PortMatch> {
    let map = reader.object(value, path, &["protocol", "port", "endPort"])?;
    let protocol = match present(map, "protocol") {
        None => protocol::TCP,
        Some(value) => {
            match reader.word(value, &format!("{path}.protocol"), &["TCP", "UDP", "SCTP"])? {
                "TCP" => protocol::TCP,
                "UDP" => protocol::UDP,
                _ => protocol::SCTP,
            }
        }
    };
    let port_path = format!("{path}.port");
    let end = present(map, "endPort");
    let end_path = format!("{path}.endPort");
    let port = match (present(map, "port"), end) {
        (None, None) => PortSpec::All,
        (None, Some(_)) => {
            reader.problem(
                end_path,
                "there is no `port` to start from",
                "write the first port too",
            );
            return None;
        }
        (Some(Value::String(name)), None) => reader.port_name(name, &port_path)?,
        (Some(Value::String(_)), Some(_)) => {
            reader.problem(end_path, "a named port is no range", "write numbers");
            return None;
        }
        (Some(value), end) => {
            let first = reader.number(value, &port_path, 1)?;
            let last = match end {
                Some(end) => reader.number(end, &end_path, 1)?,
                None => first,
            };
            if last < first {
                reader.problem(end_path, format!("{last} is less than `port`, {first}"), "");
                return None;
            }
            PortSpec::Range(first, last)
        }
    };
    Some(PortMatch { protocol, port })
}
