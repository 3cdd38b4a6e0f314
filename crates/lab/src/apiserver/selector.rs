//! Label and field selectors of list, watch and deletecollection.

use serde_json::Value;

use super::error::ApiError;
use super::registry::Resource;
use super::validate::names;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    Missing(String),
    Greater(String, i64),
    Less(String, i64),
}

/// What a list or watch is limited to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Selector {
    labels: Vec<Requirement>,
    /// (path, value, equal?)
    fields: Vec<(String, String, bool)>,
}

impl Selector {
    /// Reads both selectors.
    pub(super) fn parse(
        resource: &Resource,
        labels: Option<&str>,
        fields: Option<&str>,
    ) -> Result<Self, ApiError> {
        let mut selector = Self { labels: parse_labels(labels.unwrap_or(""))?, fields: Vec::new() };
        for term in fields.unwrap_or("").split(',').filter(|term| !term.trim().is_empty()) {
            let (path, value, equal) = split_field(term).ok_or_else(|| {
                ApiError::bad_request(format!(
                    "invalid selector: '{term}'; can't understand '{term}'"
                ))
            })?;
            if !supported(resource, path) {
                return Err(ApiError::bad_request(format!("field label not supported: {path}")));
            }
            selector.fields.push((path.to_owned(), value.to_owned(), equal));
        }
        Ok(selector)
    }

    /// Does the object match?
    pub(super) fn matches(&self, object: &Value) -> bool {
        let labels = &object["metadata"]["labels"];
        self.labels.iter().all(|requirement| requirement.matches(labels))
            && self
                .fields
                .iter()
                .all(|(path, value, equal)| (field(object, path) == *value) == *equal)
    }
}

impl Requirement {
    fn matches(&self, labels: &Value) -> bool {
        let label = |key: &str| labels.get(key).and_then(Value::as_str);
        let number = |key: &str| label(key).and_then(|value| value.parse::<i64>().ok());
        match self {
            Self::In(key, values) => label(key).is_some_and(|is| values.iter().any(|v| v == is)),
            Self::NotIn(key, values) => {
                !label(key).is_some_and(|is| values.iter().any(|v| v == is))
            }
            Self::Exists(key) => label(key).is_some(),
            Self::Missing(key) => label(key).is_none(),
            Self::Greater(key, bound) => number(key).is_some_and(|is| is > *bound),
            Self::Less(key, bound) => number(key).is_some_and(|is| is < *bound),
        }
    }
}

fn split_field(term: &str) -> Option<(&str, &str, bool)> {
    if let Some((path, value)) = term.split_once("!=") {
        return Some((path.trim(), value.trim(), false));
    }
    let (path, value) = term.split_once("==").or_else(|| term.split_once('='))?;
    Some((path.trim(), value.trim(), true))
}

fn supported(resource: &Resource, path: &str) -> bool {
    if matches!(path, "metadata.name" | "metadata.namespace") {
        return true;
    }
    let more: &[&str] = match resource.builtin_key() {
        "/pods" => &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ],
        "/events" => &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "regarding.kind",
            "regarding.namespace",
            "regarding.name",
            "regarding.uid",
            "reason",
            "reportingComponent",
            "reportingController",
            "source",
            "type",
        ],
        "/namespaces" => &["status.phase"],
        "/nodes" => &["spec.unschedulable"],
        "/secrets" => &["type"],
        "/services" => &["spec.clusterIP", "spec.type"],
        "apps/replicasets" => &["status.replicas"],
        _ => &[],
    };
    if let Some(custom) = &resource.custom {
        return custom.selectable.iter().any(|known| known == path);
    }
    more.contains(&path)
}

/// The text of a field; absent is empty, as in Kubernetes.
fn field(object: &Value, path: &str) -> String {
    // Stored events have the core shape.
    let path = match path.strip_prefix("regarding.") {
        Some(rest) => format!("involvedObject.{rest}"),
        None => match path {
            "reportingController" => "reportingComponent".to_owned(),
            "source" => "source.component".to_owned(),
            other => other.to_owned(),
        },
    };
    let mut value = object;
    for part in path.split('.') {
        value = &value[part];
    }
    match value {
        Value::String(text) => text.clone(),
        Value::Null if path == "spec.unschedulable" || path == "spec.hostNetwork" => "false".into(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn parse_labels(text: &str) -> Result<Vec<Requirement>, ApiError> {
    let bad = |term: &str| {
        ApiError::bad_request(format!(
            "unable to parse requirement: {term:?}: write key=value, key!=value, key in (a,b), \
             key notin (a,b), key or !key"
        ))
    };
    split_terms(text).into_iter().map(|term| requirement(term).ok_or_else(|| bad(term))).collect()
}

/// Splits at commas outside parentheses.
fn split_terms(text: &str) -> Vec<&str> {
    let (mut terms, mut depth, mut start) = (Vec::new(), 0_i32, 0);
    for (index, byte) in text.bytes().enumerate() {
        match byte {
            b'(' => depth += 1,
            b')' => depth -= 1,
            b',' if depth == 0 => {
                terms.push(text[start..index].trim());
                start = index + 1;
            }
            _ => {}
        }
    }
    terms.push(text[start..].trim());
    terms.retain(|term| !term.is_empty());
    terms
}

fn requirement(term: &str) -> Option<Requirement> {
    if let Some(key) = term.strip_prefix('!') {
        return Some(Requirement::Missing(label_key(key)?));
    }
    if let Some(rest) = term.strip_suffix(')') {
        let (head, values) = rest.split_once('(')?;
        let values = values.split(',').map(label_value).collect::<Option<_>>()?;
        let mut words = head.split_whitespace();
        let (key, operator) = (label_key(words.next()?)?, words.next()?);
        return match operator {
            "in" => Some(Requirement::In(key, values)),
            "notin" => Some(Requirement::NotIn(key, values)),
            _ => None,
        };
    }
    if let Some((key, value)) = term.split_once("!=") {
        return Some(Requirement::NotIn(label_key(key)?, vec![label_value(value)?]));
    }
    if let Some((key, value)) = term.split_once("==").or_else(|| term.split_once('=')) {
        return Some(Requirement::In(label_key(key)?, vec![label_value(value)?]));
    }
    if let Some((key, value)) = term.split_once('>') {
        return Some(Requirement::Greater(label_key(key)?, value.trim().parse().ok()?));
    }
    if let Some((key, value)) = term.split_once('<') {
        return Some(Requirement::Less(label_key(key)?, value.trim().parse().ok()?));
    }
    Some(Requirement::Exists(label_key(term)?))
}

fn label_key(text: &str) -> Option<String> {
    let key = text.trim();
    names::wrong_label_key(key).is_none().then(|| key.to_owned())
}

fn label_value(text: &str) -> Option<String> {
    let value = text.trim();
    names::wrong_label_value(value).is_none().then(|| value.to_owned())
}

/// Does a `LabelSelector` object match labels? An absent one matches nothing, an empty one all.
pub(super) fn label_selector_matches(selector: &Value, labels: &Value) -> bool {
    let Some(selector) = selector.as_object() else { return false };
    let equal = selector.get("matchLabels").and_then(Value::as_object);
    let equal = equal.into_iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    let expressions = selector.get("matchExpressions").and_then(Value::as_array);
    equal
        && expressions.into_iter().flatten().all(|expression| {
            let label = labels.get(expression["key"].as_str().unwrap_or(""));
            let values = expression["values"].as_array().map_or(&[][..], Vec::as_slice);
            match expression["operator"].as_str() {
                Some("In") => label.is_some_and(|label| values.contains(label)),
                Some("NotIn") => !label.is_some_and(|label| values.contains(label)),
                Some("Exists") => label.is_some(),
                Some("DoesNotExist") => label.is_none(),
                _ => false,
            }
        })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn matches(selector: &str, labels: Value) -> bool {
        let selector = Selector { labels: parse_labels(selector).unwrap(), fields: Vec::new() };
        selector.matches(&json!({"metadata": {"labels": labels}}))
    }

    #[test]
    fn label_requirements() {
        assert!(matches("a=b,c in (d, e),!f", json!({"a": "b", "c": "e"})));
        assert!(!matches("a=b,c in (d, e)", json!({"a": "b", "c": "x"})));
        assert!(matches("a!=b", json!({})));
        assert!(matches("a notin (b,c)", json!({"a": "d"})));
        assert!(matches("a", json!({"a": ""})));
        assert!(matches("n>3", json!({"n": "4"})));
        assert!(!matches("!a", json!({"a": "b"})));
        for wrong in ["a in b", "a==((", "a=b=c", "a in (b,(c))", "a=$", "-a", "!", "a b=c", "a>b"]
        {
            assert!(parse_labels(wrong).is_err(), "{wrong}");
        }
    }
}
