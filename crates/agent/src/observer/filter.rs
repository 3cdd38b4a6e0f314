//! Which flows a reader wants.

use palisade_api::{
    admin::FlowFilter,
    flow::{Flow, FlowEnd},
};

/// Whether the flow matches: every field of the filter that is not empty has a value that does.
pub fn matches(filter: &FlowFilter, flow: &Flow) -> bool {
    let ends = [&flow.source, &flow.destination];
    any(&filter.pod, |pod| ends.iter().any(|end| is_pod(end, pod)))
        && any(&filter.from_pod, |pod| is_pod(&flow.source, pod))
        && any(&filter.to_pod, |pod| is_pod(&flow.destination, pod))
        && any(&filter.ip, |ip| ends.iter().any(|end| end.address == *ip))
        && any(&filter.identity, |id| ends.iter().any(|end| end.identity == *id))
        && any(&filter.label, |label| ends.iter().any(|end| has_label(end, label)))
        && any(&filter.port, |port| flow.destination.port == *port)
        && any(&filter.protocol, |name| is_protocol(&flow.protocol, name))
        && any(&filter.verdict, |name| flow.verdict.as_str().eq_ignore_ascii_case(name))
        && any(&filter.kind, |name| format!("{:?}", flow.kind).eq_ignore_ascii_case(name))
}

fn any<T>(wanted: &[T], matches: impl FnMut(&T) -> bool) -> bool {
    wanted.is_empty() || wanted.iter().any(matches)
}

/// `namespace/` or `namespace/prefix`; without a slash a prefix in namespace `default`.
fn is_pod(end: &FlowEnd, wanted: &str) -> bool {
    let (namespace, name) = wanted.split_once('/').unwrap_or(("default", wanted));
    end.namespace.as_deref() == Some(namespace)
        && end.pod.as_deref().is_some_and(|pod| pod.starts_with(name))
}

fn has_label(end: &FlowEnd, wanted: &str) -> bool {
    end.labels.iter().any(|label| {
        label == wanted || label.split_once(':').is_some_and(|(_, label)| label == wanted)
    })
}

/// `icmp` stands for both of its versions.
fn is_protocol(protocol: &str, wanted: &str) -> bool {
    protocol.eq_ignore_ascii_case(wanted)
        || (wanted.eq_ignore_ascii_case("icmp") && protocol.starts_with("ICMP"))
}
