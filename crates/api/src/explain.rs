//! Answers "would this pass, and why?" from policies and the two ends.

use std::{fmt, net::SocketAddr};

use palisade_policy::{
    evaluate::End,
    explain::{self, Reason},
    l7::{
        HttpRequest, Question, Secrets,
        field::{Hops, WEBSOCKET, only},
        server_name,
        target::{ANOTHER_HOST, Authority, Malformed, Target},
    },
    model::Policy,
};

use crate::admin::{Explain, ExplainedEnd, Explanation, Inside, RuleState, Translated};

/// One end and what people call it.
#[derive(Clone, Debug)]
pub struct NamedEnd {
    /// Name.
    pub name: String,
    /// The end.
    pub end: End,
}

/// The answer. A request has no body.
#[must_use]
pub fn explain(
    policies: &[&Policy],
    secrets: &Secrets,
    from: &NamedEnd,
    to: &NamedEnd,
    asked: &Explain,
) -> Explanation {
    let request = match &asked.inside {
        Some(Inside::Http { method, target, host, headers }) => {
            Some(Request::read(method, target, host, headers))
        }
        _ => None,
    };
    let server = match &asked.inside {
        Some(Inside::Tls(name)) => server_name(name.as_bytes()),
        _ => None,
    };
    let question = match (&request, &asked.inside) {
        (Some(Ok(request)), _) => Some(Question::Http(request.judged(), secrets)),
        (Some(Err(fault)), _) => Some(Question::Malformed(*fault)),
        (None, Some(Inside::Dns(name))) => Some(Question::Dns(name)),
        (None, Some(Inside::Tls(_))) => Some(Question::Tls(server.as_deref())),
        (None, _) => None,
    };
    let (protocol, port) = (asked.protocol, asked.port);
    let found = explain::explain(policies, &from.end, &to.end, protocol, port, question.as_ref());
    let ends: Vec<_> = [&found.egress, &found.ingress].into_iter().flatten().map(end).collect();
    let proxied = ends.iter().any(|end| end.proxied);
    let read_as = request
        .and_then(Result::ok)
        .filter(|request| proxied && !request.is_as_written())
        .map(|request| request.to_string());
    Explanation {
        from: from.name.clone(),
        to: to.name.clone(),
        allowed: found.allowed(),
        read_as,
        ends,
        service: None,
    }
}

/// The answer for a Service, from those for its backends.
#[must_use]
pub fn explain_service(from: &NamedEnd, service: Translated) -> Explanation {
    let Translated { name, backends, .. } = &service;
    Explanation {
        from: from.name.clone(),
        to: format!("Service {name}"),
        allowed: !backends.is_empty() && backends.iter().all(|backend| backend.allowed),
        read_as: None,
        ends: Vec::new(),
        service: Some(service),
    }
}

/// A Service that was named as such: `svc/name` or `svc/namespace/name`. With a namespace `svc`, the
/// short form names a pod of that.
#[must_use]
pub fn named_service(text: &str, is_namespace: impl Fn(&str) -> bool) -> Option<(&str, &str)> {
    let (word, rest) = text.split_once('/')?;
    if !matches!(word, "svc" | "service" | "services") {
        return None;
    }
    rest.split_once('/').or_else(|| (!is_namespace(word)).then_some(("default", rest)))
}

/// What one calls a backend.
#[must_use]
pub fn backend_name(end: &NamedEnd, port: u16) -> String {
    let at = SocketAddr::new(end.end.address, port);
    if end.name == end.end.address.to_string() {
        at.to_string()
    } else {
        format!("{} at {at}", end.name)
    }
}

/// A request as the proxy reads it.
struct Request<'a> {
    method: &'a str,
    target: Target,
    host: Option<Authority>,
    /// Those that go further than this hop.
    headers: Vec<(&'a str, &'a [u8])>,
    written: [&'a [u8]; 2],
}

impl<'a> Request<'a> {
    /// `host` is that of a URL, or empty.
    fn read(
        method: &'a str,
        target: &'a str,
        host: &'a str,
        headers: &'a [(String, String)],
    ) -> Result<Self, Malformed> {
        let fields = headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes()));
        let all = |name| fields.clone().filter(move |field| field.0 == name).map(|field| field.1);
        let named = Some(host.as_bytes()).filter(|host| !host.is_empty());
        let said = only(all("host"))?;
        let written = [target.as_bytes(), named.or(said).unwrap_or_default()];
        let [named, said] = [named, said].map(|host| host.map(Authority::read).transpose());
        let (named, said) = (named?, said?);
        if named.is_some() && said.is_some() && named != said {
            return Err(ANOTHER_HOST);
        }
        let host = named.or(said);
        let target = Target::of_request(method, target.as_bytes(), host.as_ref())?;
        let hops = Hops::read(all("connection"))?;
        let websocket = hops.ask_for_websocket(method, all("upgrade")).then_some(WEBSOCKET);
        let headers = fields.clone().filter(|(name, _)| hops.passes(name)).chain(websocket);
        Ok(Self { method, target, host, headers: headers.collect(), written })
    }

    fn is_as_written(&self) -> bool {
        let HttpRequest { target, host, .. } = self.judged();
        self.written == [target, host].map(str::as_bytes)
    }

    fn judged(&self) -> HttpRequest<'_> {
        let host = self.host.as_ref().map_or("", Authority::as_str);
        let (target, headers) = (self.target.as_str(), &self.headers);
        HttpRequest { method: self.method, target, host, headers }
    }
}

impl fmt::Display for Request<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let HttpRequest { method, target, host, .. } = self.judged();
        let scheme = if host.is_empty() { "" } else { "http://" };
        write!(f, "{method} {scheme}{host}{target}")
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
        verdict: reason.ground(),
        rules: rules.collect(),
        nearest: reason.nearest.as_ref().map(ToString::to_string),
    }
}
