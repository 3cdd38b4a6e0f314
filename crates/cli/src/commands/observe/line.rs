//! A flow on one line.

use jiff::{Timestamp, tz::TimeZone};
use palisade_api::flow::{Direction, Flow, FlowEnd, FlowKind, Judgement, Outcome, Verdict};

/// Identities below this have names instead of numbers.
const FIRST_CLUSTER_IDENTITY: u32 = 256;

/// `TIME [node]: SOURCE (identity) -> DESTINATION (identity) what VERDICT (why) (summary)`.
pub(super) fn compact(flow: &Flow, node: bool) -> String {
    let mut line = time(&flow.time);
    if node {
        line += &format!(" [{}]", flow.node);
    }
    let (from, arrow, to) = if flow.reply {
        (&flow.destination, "<-", &flow.source)
    } else {
        (&flow.source, "->", &flow.destination)
    };
    line += &format!(": {} {arrow} {} {}", end(from, flow), end(to, flow), what(flow));
    line += &format!(" {}", flow.verdict.as_str());
    let ground = ground(flow);
    if !ground.is_empty() {
        line += &format!(" [{ground}]");
    }
    line += &format!(" ({})", summary(flow));
    line
}

fn time(text: &str) -> String {
    text.parse::<Timestamp>().map_or_else(
        |_| text.to_owned(),
        |time| time.to_zoned(TimeZone::system()).strftime("%b %e %H:%M:%S.%3f").to_string(),
    )
}

fn end(end: &FlowEnd, flow: &Flow) -> String {
    let port = match (end.port, is_icmp(flow)) {
        (0, _) | (_, true) => String::new(),
        (port, false) => format!(":{port}"),
    };
    let name = match (end.name(), port.is_empty()) {
        (name, false) if name == end.address.to_string() && end.address.is_ipv6() => {
            format!("[{name}]")
        }
        (name, _) => name,
    };
    format!("{name}{port} {}", identity(end))
}

fn identity(end: &FlowEnd) -> String {
    let reserved = end.labels.iter().find_map(|label| label.strip_prefix("reserved:"));
    match reserved {
        Some(name) if end.identity < FIRST_CLUSTER_IDENTITY => format!("({name})"),
        _ => format!("(ID:{})", end.identity),
    }
}

fn is_icmp(flow: &Flow) -> bool {
    flow.protocol.to_ascii_lowercase().starts_with("icmp")
}

fn what(flow: &Flow) -> String {
    let direction = match flow.direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    };
    match (flow.kind, flow.verdict) {
        (FlowKind::Drop, _) | (_, Verdict::Dropped) => {
            let reason = flow.drop_reason.as_deref().unwrap_or("reason unknown");
            format!("{direction} {reason}")
        }
        (FlowKind::Open, _) if flow.rejudged => format!("{direction} open (judged again)"),
        (FlowKind::Open, _) => format!("{direction} open"),
        (FlowKind::Close, _) => format!("{direction} close"),
        (FlowKind::Request, _) => format!("{direction} request"),
        (FlowKind::Response, _) => format!("{direction} response"),
    }
}

/// Which rules decided, in words.
fn ground(flow: &Flow) -> String {
    [("egress", &flow.egress), ("ingress", &flow.ingress)]
        .into_iter()
        .filter_map(|(direction, judgement)| Some((direction, judgement.as_ref()?)))
        .filter_map(|(direction, judgement)| Some(format!("{direction} {}", said(judgement)?)))
        .collect::<Vec<_>>()
        .join("; ")
}

fn said(judgement: &Judgement) -> Option<String> {
    let rule = judgement.rule.as_ref().map(|rule| {
        let path = if rule.path.is_empty() { String::new() } else { format!(" {}", rule.path) };
        format!("{}{path}", rule.policy)
    });
    let rule = rule.unwrap_or_else(|| "a rule that changed since".to_owned());
    match judgement.outcome {
        Outcome::NoPolicy => None,
        Outcome::AllowedByRule => Some(format!("allowed by {rule}")),
        Outcome::DeniedByRule => Some(format!("denied by {rule}")),
        Outcome::DefaultDeny if judgement.default_deny_by.is_empty() => {
            Some("denied by default".to_owned())
        }
        Outcome::DefaultDeny => {
            let by = judgement.default_deny_by.join(", ");
            Some(format!("denied by default: no rule of {by} allows it"))
        }
        Outcome::Unknown => Some("decided by a rule that changed since".to_owned()),
    }
}

fn summary(flow: &Flow) -> String {
    let mut summary = match flow.tcp_flags.as_str() {
        "" => flow.protocol.clone(),
        flags => format!("TCP Flags: {}", flags.replace(',', ", ")),
    };
    if is_icmp(flow) {
        summary += &format!(" type {}", flow.source.port.max(flow.destination.port));
    }
    if let Some(counters) = flow.counters {
        summary += &format!(
            "; sent {} packets, {} bytes; received {} packets, {} bytes",
            counters.packets, counters.bytes, counters.reply_packets, counters.reply_bytes
        );
    }
    summary
}

#[cfg(test)]
mod tests {
    use palisade_api::flow::RuleName;

    use super::*;

    fn pod(name: &str, port: u16, identity: u32) -> FlowEnd {
        FlowEnd {
            address: "10.244.1.7".parse().unwrap(),
            port,
            identity,
            labels: vec!["k8s:org=empire".to_owned()],
            namespace: Some("default".to_owned()),
            pod: Some(name.to_owned()),
            node: None,
            endpoint: None,
        }
    }

    fn flow() -> Flow {
        Flow {
            time: "2026-01-01T00:20:34.567890123Z".to_owned(),
            node: "node1".to_owned(),
            kind: FlowKind::Drop,
            verdict: Verdict::Dropped,
            drop_reason: Some("Policy denied".to_owned()),
            direction: Direction::Ingress,
            reply: false,
            rejudged: false,
            protocol: "TCP".to_owned(),
            tcp_flags: "SYN".to_owned(),
            source: pod("xwing", 40000, 1234),
            destination: pod("deathstar-1", 80, 5678),
            egress: Some(Judgement {
                outcome: Outcome::NoPolicy,
                rule: None,
                default_deny_by: Vec::new(),
            }),
            ingress: Some(Judgement {
                outcome: Outcome::DefaultDeny,
                rule: None,
                default_deny_by: vec!["NetworkPolicy default/policy".to_owned()],
            }),
            counters: None,
            l7: None,
        }
    }

    fn without_time(line: &str) -> &str {
        let from = line.find(": ").unwrap();
        &line[from..]
    }

    #[test]
    fn a_denied_connection_names_the_policy() {
        assert_eq!(
            without_time(&compact(&flow(), false)),
            ": default/xwing:40000 (ID:1234) -> default/deathstar-1:80 (ID:5678) ingress Policy \
             denied DROPPED [ingress denied by default: no rule of NetworkPolicy default/policy \
             allows it] (TCP Flags: SYN)"
        );
    }

    #[test]
    fn an_allowed_connection_names_the_rule() {
        let mut flow = flow();
        (flow.kind, flow.verdict, flow.drop_reason) = (FlowKind::Open, Verdict::Forwarded, None);
        flow.ingress = Some(Judgement {
            outcome: Outcome::AllowedByRule,
            rule: Some(RuleName {
                policy: "NetworkPolicy default/policy".to_owned(),
                path: "spec.ingress[0]".to_owned(),
            }),
            default_deny_by: Vec::new(),
        });
        assert!(compact(&flow, true).ends_with(
            "ingress open FORWARDED [ingress allowed by NetworkPolicy default/policy \
             spec.ingress[0]] (TCP Flags: SYN)"
        ));
    }

    #[test]
    fn a_reply_is_told_from_the_client_s_end() {
        let mut flow = flow();
        flow.reply = true;
        assert!(
            compact(&flow, false).contains("default/deathstar-1:80 (ID:5678) <- default/xwing")
        );
    }

    #[test]
    fn outsiders_are_told_by_address_and_reserved_name() {
        let mut flow = flow();
        flow.source = FlowEnd {
            address: "fd31::9".parse().unwrap(),
            port: 4000,
            identity: 9,
            labels: vec!["reserved:world-ipv4".to_owned()],
            namespace: None,
            pod: None,
            node: None,
            endpoint: None,
        };
        assert!(compact(&flow, false).contains(": [fd31::9]:4000 (world-ipv4) -> "));
    }
}
