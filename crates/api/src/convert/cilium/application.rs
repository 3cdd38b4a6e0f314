//! What `toPorts` asks of the traffic inside connections: `rules` and `serverNames`.

use palisade_abi::protocol;
use palisade_policy::{
    l7::{
        HeaderRule, HeaderValue, HttpRule, Mismatch, NameError, NamePattern, Pattern, PatternError,
        SecretRef, field,
    },
    model::{Action, Application, Direction, Entry, Peers, PortMatch, PortSpec, Ports},
};
use serde_json::{Map, Value};

use super::{Context, List};
use crate::convert::read::{Reader, present};

/// The fields of a `toPorts` item that are read here.
pub(super) const FIELDS: [&str; 5] =
    ["rules", "serverNames", "terminatingTLS", "originatingTLS", "listener"];

/// What an item of `toPorts` asks for, and where it says so. `ports` are its own; those that
/// cannot carry it are left out.
pub(super) fn application(
    reader: &mut Reader,
    item: &Map<String, Value>,
    path: &str,
    list: List,
    context: &Context<'_>,
    ports: &mut Vec<PortMatch>,
) -> (Application, String) {
    for field in ["terminatingTLS", "originatingTLS", "listener"] {
        if present(item, field).is_some() {
            let suggestion = "leave it out; `serverNames` can tell TLS servers apart";
            reader.problem(format!("{path}.{field}"), "is not supported", suggestion);
        }
    }
    let asked = [rules(reader, item, path, context), server_names(reader, item, path)];
    let mut asked = asked.into_iter().flatten();
    let Some((application, at)) = asked.next() else {
        return (Application::Any, path.to_owned());
    };
    if let Some((_, other)) = asked.next() {
        let message = "only an end of the TLS connection could read what is inside";
        reader.problem(other, message, "leave out `serverNames` or `rules`");
    }
    if list.action == Action::Deny {
        let message = "a deny closes ports, whatever is inside";
        let suggestion = "list what is allowed in an allow rule: the rest is denied";
        reader.problem(&at, message, suggestion);
    }
    if matches!(application, Application::Dns(_)) {
        dns_ports(reader, item, path, list, ports);
    } else {
        tcp_ports(reader, item, path, &application);
    }
    (application, at)
}

const fn word(application: &Application) -> &'static str {
    match application {
        Application::Any => "anything",
        Application::Http(_) => "HTTP",
        Application::Dns(_) => "DNS",
        Application::Tls(_) => "TLS",
    }
}

/// `rules`: an empty list asks for nothing and is fine.
fn rules(
    reader: &mut Reader,
    item: &Map<String, Value>,
    path: &str,
    context: &Context<'_>,
) -> Option<(Application, String)> {
    let path = format!("{path}.rules");
    let map = reader.object(
        present(item, "rules")?,
        &path,
        &["http", "kafka", "dns", "l7proto", "l7"],
    )?;
    let is_empty = |value: &Value| value.is_null() || value.as_array().is_some_and(Vec::is_empty);
    let written: Vec<&str> = ["http", "dns", "kafka", "l7proto", "l7"]
        .into_iter()
        .filter(|field| map.get(*field).is_some_and(|value| !is_empty(value)))
        .collect();
    let (&field, others) = written.split_first()?;
    if let Some(other) = others.first()
        && field != "l7proto"
    {
        let message = format!("`{field}` and `{other}` cannot be asked of one connection");
        reader.problem(format!("{path}.{other}"), message, "make two items of it");
    }
    let at = format!("{path}.{field}");
    match field {
        "http" => {
            let items = reader.list(map, "http", &path).unwrap_or_default();
            let rules = items
                .into_iter()
                .filter_map(|(item, path)| http_rule(reader, item, &path, context));
            Some((Application::Http(rules.collect()), at))
        }
        "dns" => {
            let items = reader.list(map, "dns", &path).unwrap_or_default();
            let names = items.into_iter().filter_map(|(item, path)| fqdn(reader, item, &path));
            Some((Application::Dns(names.collect()), at))
        }
        _ => {
            reader.problem(at, "is not supported", "allow the ports alone");
            None
        }
    }
}

/// `matchName` or `matchPattern`.
pub(super) fn fqdn(reader: &mut Reader, value: &Value, path: &str) -> Option<NamePattern> {
    let map = reader.object(value, path, &["matchName", "matchPattern"])?;
    let (value, field) = match (present(map, "matchName"), present(map, "matchPattern")) {
        (Some(name), None) => (name, "matchName"),
        (None, Some(pattern)) => (pattern, "matchPattern"),
        _ => {
            let message = "has to have either `matchName` or `matchPattern`";
            reader.problem(path, message, "make two items of two");
            return None;
        }
    };
    let path = format!("{path}.{field}");
    let text = reader.text(value, &path)?;
    let parsed = match field {
        "matchName" => NamePattern::name(text),
        _ => NamePattern::pattern(text),
    };
    named(reader, &path, text, parsed)
}

fn named(
    reader: &mut Reader,
    path: &str,
    text: &str,
    name: Result<NamePattern, NameError>,
) -> Option<NamePattern> {
    match name {
        Ok(name) => Some(name),
        Err(error) => {
            let suggestion = match error {
                NameError::Character('*') => "write a pattern as `matchPattern`",
                _ => "write a name such as `www.example.com`, or a pattern such as `*.example.com`",
            };
            reader.problem(path, format!("`{text}` matches no name: {error}"), suggestion);
            None
        }
    }
}

fn server_names(
    reader: &mut Reader,
    item: &Map<String, Value>,
    path: &str,
) -> Option<(Application, String)> {
    let items = reader.list(item, "serverNames", path)?;
    let at = format!("{path}.serverNames");
    if items.is_empty() {
        let suggestion = "leave it out to allow every server, or name some";
        reader.problem(&at, "an empty list allows no connection", suggestion);
    }
    let mut names = Vec::new();
    for (item, path) in items {
        let Some(text) = reader.text(item, &path) else { continue };
        let Some(name) = server_name(reader, &path, text) else { continue };
        if names.contains(&name) {
            reader.problem(&path, format!("`{text}` is there twice"), "leave one out");
        }
        names.push(name);
    }
    Some((Application::Tls(names), at))
}

/// A name, with `*.` or `**.` before it or without: nowhere else a `*` means anything here.
fn server_name(reader: &mut Reader, path: &str, text: &str) -> Option<NamePattern> {
    let rest = text.strip_prefix("**.").or_else(|| text.strip_prefix("*.")).unwrap_or(text);
    match NamePattern::name(rest) {
        Ok(_) => named(reader, path, text, NamePattern::pattern(text)),
        Err(NameError::Character('*')) => {
            let message = format!("`{text}`: a `*` can only stand for the first labels");
            let suggestion = "write a name, `*.example.com` for one label before it, or \
                              `**.example.com` for any number of them";
            reader.problem(path, message, suggestion);
            None
        }
        Err(error) => named(reader, path, text, Err(error)),
    }
}

fn http_rule(
    reader: &mut Reader,
    value: &Value,
    path: &str,
    context: &Context<'_>,
) -> Option<HttpRule> {
    let map =
        reader.object(value, path, &["method", "path", "host", "headers", "headerMatches"])?;
    let mut pattern = |field: &str, read: fn(&str) -> Result<Pattern, PatternError>| {
        let path = format!("{path}.{field}");
        let text = reader.text(present(map, field)?, &path)?;
        if text.is_empty() {
            return None;
        }
        let problem = match read(text) {
            Ok(pattern) => return Some(pattern),
            Err(problem) => problem,
        };
        let suggestion = "write a regular expression that the whole text has to match, \
                          such as `/public/.*`; without look-around and back references";
        reader.problem(path, problem.to_string(), suggestion);
        None
    };
    let (method, target) = (pattern("method", Pattern::new), pattern("path", Pattern::new));
    let host = pattern("host", Pattern::host);
    if method.as_ref().is_some_and(|method| method.is_only("CONNECT")) {
        let message = "tunnels do not pass the proxy, which answers CONNECT itself";
        let suggestion = "leave the rule out; allow the port alone for connections of any kind";
        reader.problem(format!("{path}.method"), message, suggestion);
    }
    let mut headers = Vec::new();
    for (item, path) in reader.list(map, "headers", path).unwrap_or_default() {
        headers.extend(header(reader, item, &path));
    }
    for (item, path) in reader.list(map, "headerMatches", path).unwrap_or_default() {
        headers.extend(header_match(reader, item, &path, context));
    }
    Some(HttpRule { method, path: target, host, headers })
}

/// `Name: value`, `Name value`, or `Name` alone for whatever value.
fn header(reader: &mut Reader, value: &Value, path: &str) -> Option<HeaderRule> {
    let text = reader.text(value, path)?;
    let (name, value) = match text.trim().split_once(' ') {
        Some((name, value)) => (name, Some(value.trim())),
        None => (text.trim(), None),
    };
    let bare = name.strip_suffix(':').unwrap_or(name);
    if let Some((name, value)) = bare.split_once(':').filter(|(name, _)| !name.is_empty()) {
        let message = format!("`{bare}` is no name of a header");
        reader.problem(path, message, format!("write a space behind the colon: `{name}: {value}`"));
        return None;
    }
    let name = header_name(reader, bare, path)?;
    let value = match value {
        Some(value) => Some(header_value(reader, value, path)?),
        None => None,
    };
    upgrade(reader, HeaderRule { name, value, mismatch: Mismatch::Fail }, path)
}

/// The name of a header (RFC 9110 section 5.6.2), in lower case.
fn header_name(reader: &mut Reader, name: &str, path: &str) -> Option<String> {
    if name.is_empty() || !name.bytes().all(field::is_token) {
        let suggestion = "write a name such as `x-token`";
        reader.problem(path, format!("`{name}` is no name of a header"), suggestion);
        return None;
    }
    if name.eq_ignore_ascii_case("host") {
        let message = "the host is not compared as a header";
        reader.problem(path, message, "write `host` of the rule, a regular expression");
        return None;
    }
    let lower = name.to_ascii_lowercase();
    if !field::is_own(&lower) || lower == UPGRADE {
        return Some(lower);
    }
    let (message, suggestion) = match lower.contains('_') {
        true => ("does not pass: servers may read `_` as `-`", "write the name with `-`"),
        false => (
            "belongs to the connection or the framing of the message, which is not for rules",
            "leave it out, or write a header of the request itself, such as `x-token`",
        ),
    };
    reader.problem(path, format!("header `{name}` {message}"), suggestion);
    None
}

/// The field that asks for another protocol on a connection.
const UPGRADE: &str = "upgrade";

/// Websockets are the one upgrade that passes, and only the server can agree to it.
fn upgrade(reader: &mut Reader, mut rule: HeaderRule, path: &str) -> Option<HeaderRule> {
    if rule.name != UPGRADE {
        return Some(rule);
    }
    let is_websocket = match &mut rule.value {
        None => true,
        Some(HeaderValue::Text(text)) => {
            text.make_ascii_lowercase();
            text == "websocket"
        }
        Some(HeaderValue::Secret(_)) => false,
    };
    if is_websocket && matches!(rule.mismatch, Mismatch::Fail | Mismatch::Log) {
        return Some(rule);
    }
    let message = "a rule can only ask whether a request asks for a websocket";
    reader.problem(path, message, "write `Upgrade: websocket` into `headers`");
    None
}

/// The value of a header, without the blanks around it. Whatever else would end the line might
/// begin a header, or a request, that nobody judges.
fn header_value(reader: &mut Reader, text: &str, path: &str) -> Option<HeaderValue> {
    let text = text.trim();
    if field::is_value(text.as_bytes()) {
        return Some(HeaderValue::Text(text.to_owned()));
    }
    let message = "no header has this value, which contains a line break or control character";
    reader.problem(path, message, "write one line of text");
    None
}

fn header_match(
    reader: &mut Reader,
    value: &Value,
    path: &str,
    context: &Context<'_>,
) -> Option<HeaderRule> {
    let map = reader.object(value, path, &["name", "value", "secret", "mismatch"])?;
    let name_path = format!("{path}.name");
    let Some(name) = present(map, "name") else {
        reader.problem(name_path, "is missing", "write the name of the header");
        return None;
    };
    let name = reader.text(name, &name_path)?;
    let name = header_name(reader, name, &name_path)?;
    let value_path = format!("{path}.value");
    let text = match present(map, "value") {
        Some(value) => Some(reader.text(value, &value_path)?),
        None => None,
    };
    let value = match present(map, "secret") {
        Some(secret) => {
            let path = format!("{path}.secret");
            Some(HeaderValue::Secret(secret_ref(reader, secret, &path, context)?))
        }
        None => match text.filter(|text| !text.is_empty()) {
            Some(text) => Some(header_value(reader, text, &value_path)?),
            None => None,
        },
    };
    let mismatch = match present(map, "mismatch") {
        None => Mismatch::Fail,
        Some(word) => {
            let path = format!("{path}.mismatch");
            match reader.word(word, &path, &["LOG", "ADD", "DELETE", "REPLACE"])? {
                "LOG" => Mismatch::Log,
                "ADD" => Mismatch::Add,
                "DELETE" => Mismatch::Delete,
                _ => Mismatch::Replace,
            }
        }
    };
    if value.is_none() && matches!(mismatch, Mismatch::Add | Mismatch::Replace) {
        let message = "there is no value to put into the request";
        reader.problem(format!("{path}.mismatch"), message, "write a `value` or a `secret`");
        return None;
    }
    upgrade(reader, HeaderRule { name, value, mismatch }, path)
}

/// Secrets of other namespaces are not for the authors of a namespaced policy.
fn secret_ref(
    reader: &mut Reader,
    value: &Value,
    path: &str,
    context: &Context<'_>,
) -> Option<SecretRef> {
    let map = reader.object(value, path, &["name", "namespace"])?;
    let mut text = |field: &str| {
        let found = reader.text(present(map, field)?, &format!("{path}.{field}"))?;
        (!found.is_empty()).then(|| found.to_owned())
    };
    let (name, namespace) = (text("name"), text("namespace"));
    let Some(name) = name else {
        reader.problem(format!("{path}.name"), "is missing", "write the name of the Secret");
        return None;
    };
    let own = context.id.namespace.clone();
    let namespace_path = format!("{path}.namespace");
    match (own, namespace) {
        (Some(own), Some(other)) if own != other => {
            let message = format!("a policy in `{own}` cannot use a Secret of `{other}`");
            reader.problem(namespace_path, message, format!("put the Secret into `{own}`"));
            None
        }
        (None, None) => {
            reader.problem(namespace_path, "is missing", "write the namespace of the Secret");
            None
        }
        (own, other) => {
            Some(SecretRef { namespace: own.or(other).unwrap_or_default(), name, key: None })
        }
    }
}

/// Each port of the item with its path.
fn own_ports<'a>(
    reader: &mut Reader,
    item: &'a Map<String, Value>,
    path: &str,
    what: &str,
) -> Vec<(&'a Map<String, Value>, String)> {
    let ports = reader.list(item, "ports", path).unwrap_or_default();
    if ports.is_empty() {
        let message = format!("{what} is asked for on no port in particular");
        reader.problem(format!("{path}.ports"), message, "name the ports");
    }
    let mut found = Vec::new();
    for (port, path) in ports {
        let Some(map) = port.as_object() else { continue };
        if present(map, "port").and_then(Value::as_str) == Some("0") {
            let message = format!("{what} cannot be asked for on all ports");
            reader.problem(format!("{path}.port"), message, "name the port");
        }
        found.push((map, path));
    }
    found
}

fn tcp_ports(
    reader: &mut Reader,
    item: &Map<String, Value>,
    path: &str,
    application: &Application,
) {
    let what = word(application);
    for (port, path) in own_ports(reader, item, path, what) {
        let protocol = present(port, "protocol").and_then(Value::as_str).unwrap_or("ANY");
        if protocol != "TCP" {
            let message = format!("{what} runs over TCP, and the port is of protocol {protocol}");
            reader.problem(format!("{path}.protocol"), message, "write TCP");
        }
    }
}

fn dns_ports(
    reader: &mut Reader,
    item: &Map<String, Value>,
    path: &str,
    list: List,
    ports: &mut Vec<PortMatch>,
) {
    if list.direction == Direction::Ingress {
        let message = "questions of DNS are judged where they leave";
        reader.problem(format!("{path}.rules.dns"), message, "write the rule for `egress`");
    }
    for (port, path) in own_ports(reader, item, path, "DNS") {
        if present(port, "endPort").and_then(Value::as_u64).is_some_and(|end| end > 0) {
            let message = "DNS cannot be asked for on a range of ports";
            reader.problem(format!("{path}.endPort"), message, "name the ports one by one");
        }
        let protocol = present(port, "protocol").and_then(Value::as_str).unwrap_or("ANY");
        if !matches!(protocol, "ANY" | "TCP" | "UDP") {
            let message = format!("DNS does not run over {protocol}");
            reader.problem(format!("{path}.protocol"), message, "write UDP, TCP or ANY");
        }
    }
    ports.retain(|port| matches!(port.protocol, protocol::TCP | protocol::UDP));
}

/// Two entries that ask different things of one connection.
pub(super) fn contradictions(reader: &mut Reader, entries: &[Entry]) {
    let asking: Vec<&Entry> =
        entries.iter().filter(|entry| entry.application.needs_proxy()).collect();
    for (n, entry) in asking.iter().enumerate() {
        let what = word(&entry.application);
        let other = asking[..n].iter().find(|other| {
            word(&other.application) != what
                && same_ports(&entry.ports, &other.ports)
                && (entry.peers == other.peers
                    || [&entry.peers, &other.peers].contains(&&Peers::Any))
        });
        if let Some(other) = other {
            let asked = word(&other.application);
            let message = format!("asks for {what} where {} asks for {asked}", other.path);
            reader.problem(&entry.path, message, "name other ports, or keep one of both");
        }
    }
}

fn same_ports(a: &Ports, b: &Ports) -> bool {
    let (Ports::List(a), Ports::List(b)) = (a, b) else { return true };
    let meet = |a: &PortSpec, b: &PortSpec| match (a, b) {
        (PortSpec::All, _) | (_, PortSpec::All) => true,
        (PortSpec::Range(a, b), PortSpec::Range(c, d)) => a <= d && c <= b,
        (a, b) => a == b,
    };
    a.iter().any(|a| b.iter().any(|b| a.protocol == b.protocol && meet(&a.port, &b.port)))
}
