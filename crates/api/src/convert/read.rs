//! Reads JSON strictly and notes what is wrong with it, each with its field.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use palisade_policy::{
    is_ipv4_mapped,
    label::NAMESPACE_LABELS,
    model::{Cidr, PortSpec},
    selector::Operator,
};
use serde_json::{Map, Value};

use super::{Problem, suggest::did_you_mean};

#[derive(Default)]
pub(super) struct Reader {
    pub(super) problems: Vec<Problem>,
}

/// A requirement as written: the key is still what the user wrote.
pub(super) struct Written {
    pub(super) key: String,
    pub(super) operator: Operator,
    pub(super) path: String,
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A field that is there and not null.
pub(super) fn present<'a>(map: &'a Map<String, Value>, field: &str) -> Option<&'a Value> {
    map.get(field).filter(|value| !value.is_null())
}

impl Reader {
    pub(super) fn problem(
        &mut self,
        path: impl Into<String>,
        message: impl Into<String>,
        suggestion: impl Into<String>,
    ) {
        self.problems.push(Problem {
            path: path.into(),
            message: message.into(),
            suggestion: suggestion.into(),
        });
    }

    fn wrong_type(&mut self, path: &str, wanted: &str, found: &Value) {
        self.problem(path, format!("must be {wanted}, is {}", kind_of(found)), "");
    }

    /// An object with no fields but the known ones.
    pub(super) fn object<'a>(
        &mut self,
        value: &'a Value,
        path: &str,
        known: &[&str],
    ) -> Option<&'a Map<String, Value>> {
        let Value::Object(map) = value else {
            self.wrong_type(path, "an object", value);
            return None;
        };
        for field in map.keys().filter(|field| !known.contains(&field.as_str())) {
            let path = if path.is_empty() { field.clone() } else { format!("{path}.{field}") };
            self.problem(path, "there is no such field", did_you_mean(field, known));
        }
        Some(map)
    }

    /// The items of a list with their paths; `None` if the field is missing or null.
    pub(super) fn list<'a>(
        &mut self,
        map: &'a Map<String, Value>,
        field: &str,
        path: &str,
    ) -> Option<Vec<(&'a Value, String)>> {
        let value = present(map, field)?;
        let path = if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") };
        let Value::Array(items) = value else {
            self.wrong_type(&path, "a list", value);
            return Some(Vec::new());
        };
        Some(items.iter().enumerate().map(|(n, item)| (item, format!("{path}[{n}]"))).collect())
    }

    pub(super) fn text<'a>(&mut self, value: &'a Value, path: &str) -> Option<&'a str> {
        let text = value.as_str();
        if text.is_none() {
            let suggestion = match value {
                Value::Bool(_) => {
                    "write it in quotes: YAML takes n, no, off, y, yes and on for that"
                }
                Value::Number(_) => "write it in quotes",
                _ => "",
            };
            self.problem(path, format!("must be a string, is {}", kind_of(value)), suggestion);
        }
        text
    }

    pub(super) fn boolean(
        &mut self,
        map: &Map<String, Value>,
        field: &str,
        path: &str,
    ) -> Option<bool> {
        let value = present(map, field)?;
        if !value.is_boolean() {
            self.wrong_type(&format!("{path}.{field}"), "true or false", value);
        }
        value.as_bool()
    }

    /// One of some words.
    pub(super) fn word(
        &mut self,
        value: &Value,
        path: &str,
        known: &[&'static str],
    ) -> Option<&'static str> {
        let text = self.text(value, path)?;
        let found = known.iter().find(|word| **word == text).copied();
        if found.is_none() {
            self.problem(path, format!("`{text}` is not known here"), did_you_mean(text, known));
        }
        found
    }

    /// A port number within bounds.
    pub(super) fn number(&mut self, value: &Value, path: &str, least: u16) -> Option<u16> {
        let number = value.as_u64().and_then(|n| u16::try_from(n).ok()).filter(|n| *n >= least);
        if number.is_none() {
            self.problem(path, format!("`{value}` is not a number from {least} to 65535"), "");
        }
        number
    }

    /// The name of a port (RFC 6335).
    pub(super) fn port_name(&mut self, name: &str, path: &str) -> Option<PortSpec> {
        let valid = (1..=15).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && name.bytes().any(|b| b.is_ascii_lowercase())
            && !name.starts_with('-')
            && !name.ends_with('-')
            && !name.contains("--");
        if !valid {
            let message = format!("`{name}` is neither a port number nor the name of a port");
            let suggestion = match name.parse::<u16>() {
                Ok(number) => format!("write {number} without quotes"),
                Err(_) => "a name has up to 15 lower-case letters, digits and dashes".into(),
            };
            self.problem(path, message, suggestion);
            return None;
        }
        Some(PortSpec::Named(name.to_owned()))
    }

    pub(super) fn net(&mut self, value: &Value, path: &str) -> Option<IpNet> {
        let text = self.text(value, path)?;
        if let Ok(address) = text.parse::<IpAddr>().map(IpNet::from) {
            self.problem(path, format!("`{text}` has no length"), format!("write {address}"));
            return None;
        }
        let Ok(net) = text.parse::<IpNet>() else {
            let suggestion = "write an address and a length, such as 10.0.0.0/8 or fd00::/8";
            self.problem(path, format!("`{text}` is not a network"), suggestion);
            return None;
        };
        if is_ipv4_mapped(net) {
            let message =
                format!("`{text}` stands for IPv4 addresses, which packets carry as IPv4");
            self.problem(path, message, "write the IPv4 network itself");
            return None;
        }
        Some(net.trunc())
    }

    /// `cidr` with its `except`s.
    pub(super) fn cidr(
        &mut self,
        map: &Map<String, Value>,
        path: &str,
        matches_pods: bool,
    ) -> Option<Cidr> {
        let Some(value) = present(map, "cidr") else {
            self.problem(
                format!("{path}.cidr"),
                "is missing",
                "write a network such as 10.0.0.0/8",
            );
            return None;
        };
        let net = self.net(value, &format!("{path}.cidr"))?;
        let mut except = Vec::new();
        for (item, path) in self.list(map, "except", path).unwrap_or_default() {
            let inner = self.net(item, &path)?;
            if !net.contains(&inner) || net == inner {
                let message = format!("{inner} does not lie inside {net}");
                self.problem(&path, message, "an exception carves a part out of its own `cidr`");
                return None;
            }
            except.push(inner);
        }
        Some(Cidr { net, except, matches_pods })
    }

    /// `matchLabels` and `matchExpressions`. What cannot be read is left out.
    pub(super) fn label_selector(&mut self, value: &Value, path: &str) -> Vec<Written> {
        let mut found = Vec::new();
        let Some(map) = self.object(value, path, &["matchLabels", "matchExpressions"]) else {
            return found;
        };
        if let Some(labels) = present(map, "matchLabels") {
            let path = format!("{path}.matchLabels");
            let Value::Object(labels) = labels else {
                self.wrong_type(&path, "an object", labels);
                return found;
            };
            for (key, value) in labels {
                let path = format!("{path}.{key}");
                let Some(value) = self.label_value(value, &path) else { continue };
                let Some(key) = self.label_key(key, &path) else { continue };
                let operator = Operator::In(BTreeSet::from([value.to_owned()]));
                found.push(Written { key: key.to_owned(), operator, path });
            }
        }
        for (item, path) in self.list(map, "matchExpressions", path).unwrap_or_default() {
            found.extend(self.expression(item, path));
        }
        found
    }

    /// What a label can be called: no pod has a label of another name, so that a selector which
    /// wants its absence would select all.
    fn label_key<'a>(&mut self, key: &'a str, path: &str) -> Option<&'a str> {
        let (_, bare) = key.split_once(':').unwrap_or(("", key));
        // The longest name of a namespace's label is longer with what comes before it.
        let bare = bare.strip_prefix(NAMESPACE_LABELS).unwrap_or(bare);
        let (prefix, name) =
            bare.split_once('/').map_or((None, bare), |(it, name)| (Some(it), name));
        let valid = is_label_text(name)
            && !name.is_empty()
            && prefix.is_none_or(|prefix| prefix.len() <= 253 && is_subdomain(prefix));
        if !valid {
            let suggestion = "a key is a name of up to 63 letters, digits, `-`, `_` and `.`, such as \
                              `app`, perhaps with a domain before it, such as `example.org/app`";
            self.problem(path, format!("`{key}` is the key of no label"), suggestion);
        }
        valid.then_some(key)
    }

    /// What a label can say: a selector with anything else in it selects nothing.
    fn label_value<'a>(&mut self, value: &'a Value, path: &str) -> Option<&'a str> {
        let text = self.text(value, path)?;
        let valid = is_label_text(text);
        if !valid {
            let suggestion = "a value has up to 63 letters, digits, `-`, `_` and `.`, and begins and \
                              ends with a letter or a digit";
            self.problem(path, format!("`{text}` is the value of no label"), suggestion);
        }
        valid.then_some(text)
    }

    /// Lists that the API server takes up to a length only.
    pub(super) fn at_most<T>(&mut self, items: &[T], path: &str, most: usize) {
        if items.len() > most {
            let message = format!("has {} items; {most} are allowed", items.len());
            self.problem(path, message, "make several of it");
        }
    }

    fn expression(&mut self, value: &Value, path: String) -> Option<Written> {
        let map = self.object(value, &path, &["key", "operator", "values"])?;
        let Some(key) = present(map, "key") else {
            self.problem(format!("{path}.key"), "is missing", "");
            return None;
        };
        let written = format!("{path}.key");
        let key = self.text(key, &written)?;
        let key = self.label_key(key, &written)?.to_owned();
        let Some(operator) = present(map, "operator") else {
            let suggestion = "write one of In, NotIn, Exists, DoesNotExist";
            self.problem(format!("{path}.operator"), "is missing", suggestion);
            return None;
        };
        let known = ["In", "NotIn", "Exists", "DoesNotExist"];
        let operator = self.word(operator, &format!("{path}.operator"), &known)?;
        let mut values = BTreeSet::new();
        for (item, path) in self.list(map, "values", &path).unwrap_or_default() {
            values.insert(self.label_value(item, &path)?.to_owned());
        }
        let wants_values = matches!(operator, "In" | "NotIn");
        if wants_values == values.is_empty() {
            let message = if wants_values { "is missing" } else { "must not be there" };
            self.problem(format!("{path}.values"), format!("{message} with {operator}"), "");
            return None;
        }
        let operator = match operator {
            "In" => Operator::In(values),
            "NotIn" => Operator::NotIn(values),
            "Exists" => Operator::Exists,
            _ => Operator::DoesNotExist,
        };
        Some(Written { key, operator, path })
    }
}

/// The name in a label's key, which must not be empty, or its value.
fn is_label_text(text: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let ends = [text.bytes().next(), text.bytes().next_back()];
    text.len() <= 63
        && text.bytes().all(known)
        && ends.into_iter().flatten().all(|byte| byte.is_ascii_alphanumeric())
}

/// RFC 1123: small letters, digits and `-` between dots.
fn is_subdomain(text: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    text.split('.').all(|part| {
        !part.is_empty()
            && part.bytes().all(known)
            && !part.starts_with('-')
            && !part.ends_with('-')
    })
}
