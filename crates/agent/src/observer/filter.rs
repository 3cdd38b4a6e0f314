//! Which flows a reader wants.

use palisade_api::{
    admin::FlowFilter,
    flow::{Dns, Flow, FlowEnd, Http, L7},
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
        && any(&filter.protocol, |name| is_protocol(flow, name))
        && any(&filter.verdict, |name| flow.verdict.as_str().eq_ignore_ascii_case(name))
        && any(&filter.kind, |name| format!("{:?}", flow.kind).eq_ignore_ascii_case(name))
        && any(&filter.http_method, |wanted| {
            http(flow).is_some_and(|http| http.method.eq_ignore_ascii_case(wanted))
        })
        && any(&filter.http_path, |wanted| http(flow).is_some_and(|http| is_path(http, wanted)))
        && any(&filter.http_status, |wanted| {
            http(flow).and_then(|http| http.status).is_some_and(|status| is_status(status, wanted))
        })
        && any(&filter.dns_name, |wanted| dns(flow).is_some_and(|dns| is_name(&dns.query, wanted)))
        && any(&filter.server_name, |wanted| {
            server_name(flow).is_some_and(|name| is_name(name, wanted))
        })
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

/// `icmp` stands for both of its versions; what a connection carries counts as well.
fn is_protocol(flow: &Flow, wanted: &str) -> bool {
    flow.protocol.eq_ignore_ascii_case(wanted)
        || flow.l7.as_ref().is_some_and(|l7| l7.protocol().eq_ignore_ascii_case(wanted))
        || (wanted.eq_ignore_ascii_case("icmp") && flow.protocol.starts_with("ICMP"))
}

fn http(flow: &Flow) -> Option<&Http> {
    match &flow.l7 {
        Some(L7::Http(http)) => Some(http),
        _ => None,
    }
}

fn dns(flow: &Flow) -> Option<&Dns> {
    match &flow.l7 {
        Some(L7::Dns(dns)) => Some(dns),
        _ => None,
    }
}

fn server_name(flow: &Flow) -> Option<&str> {
    match &flow.l7 {
        Some(L7::Tls { server_name, .. }) => server_name.as_deref(),
        _ => None,
    }
}

fn is_path(http: &Http, wanted: &str) -> bool {
    let rest = http.url.split_once("://").map_or(http.url.as_str(), |(_, rest)| rest);
    let target = rest.find('/').map_or("", |at| &rest[at..]);
    let path = target.split('?').next().unwrap_or_default();
    fits(path.as_bytes(), wanted.as_bytes())
}

/// `x` stands for any digit.
fn is_status(status: u16, wanted: &str) -> bool {
    let status = status.to_string();
    status.len() == wanted.len()
        && status
            .bytes()
            .zip(wanted.bytes())
            .all(|(digit, wanted)| wanted.eq_ignore_ascii_case(&b'x') || digit == wanted)
}

fn is_name(name: &str, wanted: &str) -> bool {
    let wanted = wanted.strip_suffix('.').unwrap_or(wanted).to_ascii_lowercase();
    fits(name.to_ascii_lowercase().as_bytes(), wanted.as_bytes())
}

/// `*` stands for any text. What follows a star is first looked for where the star has taken the
/// least, and only the last star has to give way: the time is bounded by the product of the lengths.
fn fits(text: &[u8], pattern: &[u8]) -> bool {
    let (mut at, mut read) = (0, 0);
    let mut star = None;
    while at < text.len() {
        match pattern.get(read) {
            Some(b'*') => {
                star = Some((at, read));
                read += 1;
            }
            Some(byte) if *byte == text[at] => (at, read) = (at + 1, read + 1),
            _ => {
                let Some((taken, place)) = star else { return false };
                star = Some((taken + 1, place));
                (at, read) = (taken + 1, place + 1);
            }
        }
    }
    pattern[read..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use palisade_api::flow::{Direction, FlowKind, Verdict};

    use super::*;

    fn flow(l7: Option<L7>) -> Flow {
        let end = |port| FlowEnd {
            address: [10, 0, 0, 1].into(),
            port,
            identity: 300,
            labels: [].into(),
            namespace: None,
            pod: None,
            node: None,
            endpoint: None,
        };
        Flow {
            time: Timestamp::UNIX_EPOCH,
            node: "".into(),
            kind: if l7.is_some() { FlowKind::Request } else { FlowKind::Open },
            verdict: Verdict::Forwarded,
            drop_reason: None,
            direction: Direction::Ingress,
            reply: false,
            rejudged: false,
            protocol: "TCP".into(),
            tcp_flags: String::new(),
            source: end(40000),
            destination: end(80),
            egress: None,
            ingress: None,
            counters: None,
            l7,
        }
    }

    fn request() -> Flow {
        flow(Some(L7::Http(Http {
            method: "GET".into(),
            url: "http://[fd00::1]:80/v1/a/b?c=/d".to_owned(),
            version: "HTTP/1.1".into(),
            status: Some(503),
            grpc_status: None,
            latency_ns: 1,
            mismatches: Vec::new(),
            error: None,
        })))
    }

    fn question() -> Flow {
        flow(Some(L7::Dns(Dns {
            query: "api.example.com".to_owned(),
            qtype: "A".to_owned(),
            rcode: None,
            addresses: Vec::new(),
            ttl: None,
            latency_ns: 1,
            error: None,
        })))
    }

    fn hello() -> Flow {
        flow(Some(L7::Tls { server_name: Some("api.example.com".to_owned()), error: None }))
    }

    type Choose = fn(&mut FlowFilter) -> &mut Vec<String>;

    #[test]
    fn what_is_inside_a_connection_can_be_asked_for() {
        let cases: [(Choose, Flow, &[&str], &[&str]); 7] = [
            (|it| &mut it.kind, request(), &["request", "REQUEST"], &["open"]),
            (|it| &mut it.protocol, request(), &["http", "tcp"], &["dns", "udp"]),
            (|it| &mut it.http_method, request(), &["get", "GET"], &["PUT", "G", "*"]),
            (|it| &mut it.http_path, request(), &["/v1/a/b", "/v1/*", "*"], &["/v1", "/d", ""]),
            (|it| &mut it.http_status, request(), &["503", "5xx", "50X"], &["403", "5x", "4xx"]),
            (
                |it| &mut it.dns_name,
                question(),
                &["API.example.com.", "*.example.com", "*"],
                &["example.com", "*.example", "api"],
            ),
            (|it| &mut it.server_name, hello(), &["*.example.com"], &["example.com"]),
        ];
        for (field, flow, wanted, unwanted) in cases {
            let ask = |word: &str| {
                let mut filter = FlowFilter::default();
                field(&mut filter).push(word.to_owned());
                matches(&filter, &flow)
            };
            for word in wanted {
                assert!(ask(word), "{word}: {flow:?}");
            }
            for word in unwanted {
                assert!(!ask(word), "{word}: {flow:?}");
            }
        }
        let filter = FlowFilter { http_path: vec!["*".to_owned()], ..FlowFilter::default() };
        for other in [question(), hello(), flow(None)] {
            assert!(!matches(&filter, &other), "no request of HTTP has a path: {other:?}");
        }
    }

    #[test]
    fn a_star_stands_for_any_text() {
        for (text, pattern) in [("", ""), ("", "**"), ("abab", "*ab"), ("abcab", "a*c*b")] {
            assert!(fits(text.as_bytes(), pattern.as_bytes()), "{text} {pattern}");
        }
        for (text, pattern) in [("a", ""), ("", "a"), ("abc", "*ab"), ("ab", "a*bc"), ("b", "a*")] {
            assert!(!fits(text.as_bytes(), pattern.as_bytes()), "{text} {pattern}");
        }
        let (long, hostile) = ("a".repeat(10_000), "*a".repeat(1_000) + "b");
        assert!(!fits(long.as_bytes(), hostile.as_bytes()), "and in bounded time");
    }
}
