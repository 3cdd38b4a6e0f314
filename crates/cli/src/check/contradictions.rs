//! Selectors that no labels can meet: legal, and never what somebody wanted.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

/// What is asked of one label.
#[derive(Default)]
struct Wanted<'a> {
    /// One of these, where any are named.
    among: Option<BTreeSet<&'a str>>,
    not: BTreeSet<&'a str>,
    absent: bool,
    present: bool,
}

impl Wanted<'_> {
    fn is_possible(&self) -> bool {
        let left = self.among.as_ref().map(|among| among.difference(&self.not).count());
        left != Some(0) && !(self.absent && (self.present || self.among.is_some()))
    }
}

/// The paths of impossible selectors in an object, each with the label that they trip over.
pub(super) fn find(object: &Value) -> Vec<(String, String)> {
    let mut found = Vec::new();
    search(&object["spec"], "spec", &mut found);
    search(&object["specs"], "specs", &mut found);
    found
}

fn search(value: &Value, path: &str, found: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => {
            found.extend(impossible(value).map(|label| (path.to_owned(), label)));
            for (name, value) in fields {
                search(value, &format!("{path}.{name}"), found);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                search(item, &format!("{path}[{index}]"), found);
            }
        }
        _ => {}
    }
}

/// The label of which a selector wants what cannot be.
fn impossible(selector: &Value) -> Option<String> {
    let mut labels: BTreeMap<&str, Wanted<'_>> = BTreeMap::new();
    for (key, value) in selector["matchLabels"].as_object().into_iter().flatten() {
        narrow(labels.entry(key).or_default(), value.as_str());
    }
    for expression in selector["matchExpressions"].as_array().into_iter().flatten() {
        let Some(key) = expression["key"].as_str() else { continue };
        let wanted = labels.entry(key).or_default();
        let values = expression["values"].as_array().into_iter().flatten();
        let values = values.filter_map(Value::as_str);
        match expression["operator"].as_str() {
            Some("In") => narrow(wanted, values),
            Some("NotIn") => wanted.not.extend(values),
            Some("Exists") => wanted.present = true,
            Some("DoesNotExist") => wanted.absent = true,
            _ => {}
        }
    }
    labels.into_iter().find(|(_, wanted)| !wanted.is_possible()).map(|(key, _)| key.to_owned())
}

fn narrow<'a>(wanted: &mut Wanted<'a>, values: impl IntoIterator<Item = &'a str>) {
    let values: BTreeSet<&str> = values.into_iter().collect();
    wanted.among = Some(match &wanted.among {
        Some(among) => among.intersection(&values).copied().collect(),
        None => values,
    });
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn selectors_that_select_nothing() {
        let expression = |operator: &str, values: &[&str]| json!({"key": "a", "operator": operator, "values": values});
        let is_impossible = |expressions: &[Value]| {
            let selector = json!({"matchLabels": {"a": "x"}, "matchExpressions": expressions});
            let found =
                find(&json!({"spec": {"ingress": [{"from": [{"podSelector": selector}]}]}}));
            let expected = ("spec.ingress[0].from[0].podSelector".to_owned(), "a".to_owned());
            assert!(found.iter().all(|one| *one == expected), "{found:?}");
            !found.is_empty()
        };
        assert!(is_impossible(&[expression("NotIn", &["x", "y"])]));
        assert!(is_impossible(&[expression("In", &["y"])]));
        assert!(is_impossible(&[expression("DoesNotExist", &[])]));
        assert!(!is_impossible(&[expression("In", &["x", "y"]), expression("NotIn", &["y"])]));
        assert!(!is_impossible(&[expression("Exists", &[])]));
        assert!(!is_impossible(&[]));
    }
}
