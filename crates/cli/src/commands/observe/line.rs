//! A flow on one line.

use jiff::tz::TimeZone;
use palisade_api::flow::{Direction, Dns, Flow, FlowEnd, FlowKind, Http, Judgement, L7, Outcome};

/// Identities below this have names instead of numbers.
const FIRST_CLUSTER_IDENTITY: u32 = 256;

/// `TIME [node]: SOURCE (identity) -> DESTINATION (identity) what VERDICT (why) (summary)`.
pub(super) fn compact(flow: &Flow, node: bool) -> String {
    let time = flow.time.to_zoned(TimeZone::system());
    let mut line = time.strftime("%b %e %H:%M:%S.%3f").to_string();
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
    printable(line)
}

/// Without control characters, which terminals obey. Who writes records escapes what came from the
/// network; who reads them does not rely on it.
fn printable(line: String) -> String {
    if !line.contains(char::is_control) {
        return line;
    }
    let shown = |char: char| match char.is_control() {
        true => char.escape_unicode().to_string(),
        false => char.to_string(),
    };
    line.chars().map(shown).collect()
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
    match flow.kind {
        FlowKind::Drop => {
            let reason = flow.drop_reason.as_deref().unwrap_or("reason unknown");
            // Some tell of a direction themselves.
            match reason.split_once(' ') {
                Some(("egress" | "ingress", _)) => reason.to_owned(),
                _ => format!("{direction} {reason}"),
            }
        }
        FlowKind::Open if flow.rejudged => format!("{direction} open (judged again)"),
        FlowKind::Open => format!("{direction} open"),
        FlowKind::Close => format!("{direction} close"),
        FlowKind::Request => format!("{direction} request"),
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
    match &flow.l7 {
        Some(L7::Http(http)) => return http_summary(http),
        Some(L7::Dns(dns)) => return dns_summary(dns),
        Some(L7::Tls { server_name, error }) => {
            let name = server_name.as_deref().unwrap_or("no server name");
            return with_error(format!("TLS for {name}"), error.as_ref());
        }
        Some(L7::Stream { error }) => return with_error("TCP".to_owned(), Some(error)),
        None => {}
    }
    let mut summary = match flow.tcp_flags.as_str() {
        "" => flow.protocol.to_string(),
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

/// `HTTP/1.1 GET http://host/path: 200, 1.3 ms`.
fn http_summary(http: &Http) -> String {
    let asked = match (&*http.method, http.url.as_str()) {
        ("", _) => "that cannot be read".to_owned(),
        (method, "") => method.to_owned(),
        (method, url) => format!("{method} {url}"),
    };
    let mut status =
        http.status.map_or_else(|| "no answer".to_owned(), |status| status.to_string());
    if let Some(grpc) = http.grpc_status {
        status += &format!(", grpc-status {grpc}");
    }
    let text = format!("{} {asked}: {status}, {}", http.version, millis(http.latency_ns));
    let mut text = with_error(text, http.error.as_ref());
    if !http.mismatches.is_empty() {
        text += &format!("; not as the rule wants: {}", http.mismatches.join(", "));
    }
    text
}

fn with_error(text: String, error: Option<&String>) -> String {
    match error {
        Some(error) => format!("{text}; {error}"),
        None => text,
    }
}

/// `DNS AAAA host: NOERROR fd00::1, ttl 30 s, 1.3 ms`.
fn dns_summary(dns: &Dns) -> String {
    let mut text = format!("DNS {} {}: ", dns.qtype, dns.query);
    text += dns.rcode.as_deref().unwrap_or("no answer");
    for address in &dns.addresses {
        text += &format!(" {address}");
    }
    if let Some(ttl) = dns.ttl {
        text += &format!(", ttl {ttl} s");
    }
    text += ", ";
    text += &millis(dns.latency_ns);
    with_error(text, dns.error.as_ref())
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn millis(nanos: u64) -> String {
    format!("{:.1} ms", nanos as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use palisade_api::flow::{RuleName, Verdict};

    use super::*;

    fn pod(name: &str, port: u16, identity: u32) -> FlowEnd {
        FlowEnd {
            address: "10.244.1.7".parse().unwrap(),
            port,
            identity,
            labels: ["k8s:org=empire".to_owned()].into(),
            namespace: Some("default".into()),
            pod: Some(name.into()),
            node: None,
            endpoint: None,
        }
    }

    fn flow() -> Flow {
        Flow {
            time: "2026-01-01T00:20:34.567890123Z".parse().unwrap(),
            node: "node1".into(),
            kind: FlowKind::Drop,
            verdict: Verdict::Dropped,
            drop_reason: Some("Policy denied".into()),
            direction: Direction::Ingress,
            reply: false,
            rejudged: false,
            protocol: "TCP".into(),
            tcp_flags: "SYN".to_owned(),
            source: pod("xwing", 40000, 1234),
            destination: pod("deathstar-1", 80, 5678),
            egress: Some(Arc::new(Judgement {
                outcome: Outcome::NoPolicy,
                rule: None,
                default_deny_by: Vec::new(),
            })),
            ingress: Some(Arc::new(Judgement {
                outcome: Outcome::DefaultDeny,
                rule: None,
                default_deny_by: vec!["NetworkPolicy default/policy".to_owned()],
            })),
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
    fn a_direction_is_said_once() {
        let what = |reason: &'static str, direction| {
            what(&Flow { drop_reason: Some(reason.into()), direction, ..flow() })
        };
        assert_eq!(what("egress policy denied", Direction::Egress), "egress policy denied");
        assert_eq!(what("ingress policy denied", Direction::Egress), "ingress policy denied");
        assert_eq!(what("spoofed source", Direction::Egress), "egress spoofed source");
    }

    #[test]
    fn an_allowed_connection_names_the_rule() {
        let mut flow = flow();
        (flow.kind, flow.verdict, flow.drop_reason) = (FlowKind::Open, Verdict::Forwarded, None);
        flow.ingress = Some(Arc::new(Judgement {
            outcome: Outcome::AllowedByRule,
            rule: Some(RuleName {
                policy: "NetworkPolicy default/policy".to_owned(),
                path: "spec.ingress[0]".to_owned(),
            }),
            default_deny_by: Vec::new(),
        }));
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
            labels: ["reserved:world-ipv4".to_owned()].into(),
            namespace: None,
            pod: None,
            node: None,
            endpoint: None,
        };
        assert!(compact(&flow, false).contains(": [fd31::9]:4000 (world-ipv4) -> "));
    }

    fn request(verdict: Verdict, l7: L7) -> Flow {
        let (kind, tcp_flags) = (FlowKind::Request, String::new());
        Flow { kind, verdict, drop_reason: None, tcp_flags, l7: Some(l7), ..flow() }
    }

    #[test]
    fn a_terminal_obeys_nothing_in_it() {
        let l7 = L7::Stream { error: "\u{1b}[2J\u{9b}31m\nx".to_owned() };
        let line = compact(&request(Verdict::Dropped, l7), false);
        assert!(line.contains("\\u{1b}[2J\\u{9b}31m\\u{a}x"), "{line}");
    }

    fn http(status: Option<u16>) -> Http {
        Http {
            method: "PUT".into(),
            url: "http://deathstar/v1/exhaust-port".to_owned(),
            version: "HTTP/1.1".into(),
            status,
            grpc_status: None,
            latency_ns: 1_340_000,
            mismatches: Vec::new(),
            error: None,
        }
    }

    #[test]
    fn a_denied_request_says_what_was_asked_for_and_what_closes_the_end() {
        let flow = request(Verdict::Dropped, L7::Http(http(Some(403))));
        assert_eq!(
            without_time(&compact(&flow, false)),
            ": default/xwing:40000 (ID:1234) -> default/deathstar-1:80 (ID:5678) ingress request \
             DROPPED [ingress denied by default: no rule of NetworkPolicy default/policy allows \
             it] (HTTP/1.1 PUT http://deathstar/v1/exhaust-port: 403, 1.3 ms)"
        );
    }

    #[test]
    fn what_became_of_a_request_is_told() {
        let ends = |l7: L7, end: &str| {
            let line = compact(&request(Verdict::Forwarded, l7), false);
            assert!(line.ends_with(end), "{line}");
        };
        let error = Some("the server closed the connection".to_owned());
        ends(
            L7::Http(Http { error, mismatches: vec!["x-token".to_owned()], ..http(None) }),
            "exhaust-port: no answer, 1.3 ms; the server closed the connection; not as the rule \
             wants: x-token)",
        );
        ends(
            L7::Http(Http { method: "".into(), url: String::new(), ..http(Some(400)) }),
            "(HTTP/1.1 that cannot be read: 400, 1.3 ms)",
        );
        let dns = Dns {
            query: "api.example.com".to_owned(),
            qtype: "A".to_owned(),
            rcode: Some("NOERROR".to_owned()),
            addresses: vec!["192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap()],
            ttl: Some(30),
            latency_ns: 250_000,
            error: None,
        };
        ends(
            L7::Dns(dns.clone()),
            "(DNS A api.example.com: NOERROR 192.0.2.1 192.0.2.2, ttl 30 s, 0.2 ms)",
        );
        let (rcode, addresses, ttl) = (None, Vec::new(), None);
        ends(
            L7::Dns(Dns { rcode, addresses, ttl, error: Some("too many".to_owned()), ..dns }),
            "(DNS A api.example.com: no answer, 0.2 ms; too many)",
        );
        let server_name = Some("api.example.com".to_owned());
        let error = Some("cut".to_owned());
        ends(
            L7::Tls { server_name: server_name.clone(), error: None },
            "(TLS for api.example.com)",
        );
        ends(L7::Tls { server_name, error }, "(TLS for api.example.com; cut)");
        ends(L7::Tls { server_name: None, error: None }, "(TLS for no server name)");
        ends(L7::Stream { error: "cut".to_owned() }, "(TCP; cut)");
        ends(
            L7::Http(Http { grpc_status: Some(7), ..http(Some(200)) }),
            "exhaust-port: 200, grpc-status 7, 1.3 ms)",
        );
        ends(
            L7::Http(Http { url: String::new(), ..http(Some(400)) }),
            "(HTTP/1.1 PUT: 400, 1.3 ms)",
        );
    }

    #[test]
    fn a_connection_that_the_proxy_looks_into_is_redirected() {
        let mut flow = flow();
        (flow.kind, flow.drop_reason) = (FlowKind::Open, None);
        flow.verdict = Verdict::Redirected;
        assert!(compact(&flow, false).contains("ingress open REDIRECTED ["));
    }
}
