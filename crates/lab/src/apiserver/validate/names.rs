//! Names and labels.

use serde_json::{Map, Value};

use crate::apiserver::error::Cause;

const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric \
    characters, '-' or '.', and must start and end with an alphanumeric character (e.g. \
    'example.com', regex used for validation is \
    '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters \
    or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', \
    regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";

/// What is wrong with the name of an object of this kind.
pub(super) fn wrong(kind: &str, name: &str) -> Option<String> {
    if kind.starts_with("rbac.authorization.k8s.io/") {
        let bad = name == "." || name == ".." || name.contains(['/', '%']);
        return bad.then(|| "may not be '.' or '..' or contain '/' or '%'".to_owned());
    }
    match kind {
        "/namespaces" | "/services" => wrong_label(name),
        _ => wrong_subdomain(name),
    }
}

/// A DNS label?
pub(super) fn wrong_label(name: &str) -> Option<String> {
    if name.len() > 63 {
        return Some("must be no more than 63 characters".to_owned());
    }
    (!is_label(name)).then(|| LABEL.to_owned())
}

/// A DNS subdomain?
pub(super) fn wrong_subdomain(name: &str) -> Option<String> {
    if name.len() > 253 {
        return Some("must be no more than 253 characters".to_owned());
    }
    (!name.split('.').all(is_label)).then(|| SUBDOMAIN.to_owned())
}

fn is_label(text: &str) -> bool {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    !text.is_empty() && text.chars().all(good) && !text.starts_with('-') && !text.ends_with('-')
}

/// Labels of an object.
pub(super) fn labels(path: &str, labels: Option<&Map<String, Value>>, causes: &mut Vec<Cause>) {
    for (key, value) in labels.into_iter().flatten() {
        if let Some(hint) = wrong_label_key(key) {
            causes.push(Cause::invalid(path, &key.as_str().into(), &hint));
        }
        match value.as_str() {
            None => {
                causes.push(Cause::type_invalid(
                    format!("{path}.{key}"),
                    value,
                    "must be a string",
                ));
            }
            Some(text) => {
                if let Some(hint) = wrong_label_value(text) {
                    causes.push(Cause::invalid(path, value, &hint));
                }
            }
        }
    }
}

fn is_word(text: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let end = |c: char| c.is_ascii_alphanumeric();
    text.len() <= 63 && text.chars().all(good) && text.starts_with(end) && text.ends_with(end)
}

/// What is wrong with a label's key.
pub(in crate::apiserver) fn wrong_label_key(key: &str) -> Option<String> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    let bad_prefix = prefix.is_some_and(|prefix| wrong_subdomain(prefix).is_some());
    (bad_prefix || !is_word(name)).then(|| {
        "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and \
         end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex \
         used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]') with an optional DNS \
         subdomain prefix and '/' (e.g. 'example.com/MyName')"
            .to_owned()
    })
}

/// What is wrong with a label's value.
pub(in crate::apiserver) fn wrong_label_value(value: &str) -> Option<String> {
    (!value.is_empty() && !is_word(value)).then(|| {
        "a valid label must be an empty string or consist of at most 63 alphanumeric characters, \
         '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  \
         or 'my_value',  or '12345', regex used for validation is \
         '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
            .to_owned()
    })
}
