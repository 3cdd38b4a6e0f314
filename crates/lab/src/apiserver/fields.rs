//! Fields that the schema does not know, values of the wrong type, nulls, and schema defaults.

use base64::Engine as _;
use serde_json::Value;

use super::body::join;
use super::schema::Schema;

/// Removes fields that the schema does not know and returns their paths.
pub(super) fn prune(value: &mut Value, schema: Schema<'_>) -> Vec<String> {
    let mut unknown = Vec::new();
    prune_at(value, schema, "", &mut unknown);
    unknown
}

fn prune_at(value: &mut Value, schema: Schema<'_>, path: &str, unknown: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            let keeps = schema.keeps_unknown();
            let embedded = schema.is_embedded();
            fields.retain(|name, _| {
                let known = keeps
                    || schema.field(name).is_some()
                    || embedded && matches!(name.as_str(), "apiVersion" | "kind" | "metadata");
                if !known {
                    unknown.push(join(path, name));
                }
                known
            });
            for (name, child) in fields.iter_mut() {
                if let Some(schema) = schema.field(name) {
                    prune_at(child, schema, &join(path, name), unknown);
                }
            }
        }
        Value::Array(items) => {
            let Some(schema) = schema.items() else { return };
            for (index, item) in items.iter_mut().enumerate() {
                prune_at(item, schema, &format!("{path}[{index}]"), unknown);
            }
        }
        _ => {}
    }
}

/// Removes nulls, which built-in kinds take for absent fields.
pub(super) fn drop_nulls(value: &mut Value, schema: Schema<'_>) {
    match value {
        Value::Object(fields) if !schema.is_untyped() => {
            fields.retain(|_, child| !child.is_null());
            for (name, child) in fields.iter_mut() {
                if let Some(schema) = schema.field(name) {
                    drop_nulls(child, schema);
                }
            }
        }
        Value::Array(items) => {
            if let Some(schema) = schema.items() {
                items.iter_mut().for_each(|item| drop_nulls(item, schema));
            }
        }
        _ => {}
    }
}

/// Fills in the schema's defaults.
pub(super) fn default(value: &mut Value, schema: Schema<'_>) {
    match value {
        Value::Object(fields) => {
            for (name, schema) in schema.properties() {
                let Some(default) = schema.default() else { continue };
                let nullable = schema.keyword("nullable") == Some(&Value::Bool(true));
                match fields.get(name) {
                    None => drop(fields.insert(name.to_owned(), default.clone())),
                    Some(Value::Null) if !nullable => {
                        fields.insert(name.to_owned(), default.clone());
                    }
                    Some(_) => {}
                }
            }
            for (name, child) in fields.iter_mut() {
                if let Some(schema) = schema.field(name) {
                    self::default(child, schema);
                }
            }
        }
        Value::Array(items) => {
            if let Some(schema) = schema.items() {
                items.iter_mut().for_each(|item| self::default(item, schema));
            }
        }
        _ => {}
    }
}

/// A value that a built-in kind's field cannot hold: (what was found, path, what belongs there).
pub(super) fn mistyped(value: &Value, schema: Schema<'_>) -> Option<(String, String, String)> {
    mistyped_at(value, schema, "")
}

fn mistyped_at(value: &Value, schema: Schema<'_>, path: &str) -> Option<(String, String, String)> {
    let wrong = |wanted: &str| Some((found(value), path.to_owned(), wanted.to_owned()));
    if value.is_null() || schema.is_untyped() {
        return None;
    }
    if schema.is_int_or_string() {
        let quantity = schema.keyword("type").is_none() && value.is_number();
        return match value {
            Value::String(_) => None,
            Value::Number(number) if number.is_i64() || number.is_u64() || quantity => None,
            _ => wrong("intstr.IntOrString"),
        };
    }
    match (schema.kind(), value) {
        (None, _) => None,
        (Some("object"), Value::Object(fields)) => fields
            .iter()
            .find_map(|(name, child)| mistyped_at(child, schema.field(name)?, &join(path, name))),
        (Some("object"), _) => wrong("object"),
        (Some("array"), Value::Array(items)) => {
            let schema = schema.items()?;
            let mut items = items.iter().enumerate();
            items.find_map(|(index, item)| mistyped_at(item, schema, &format!("{path}[{index}]")))
        }
        (Some("array"), _) => wrong("array"),
        (Some("string"), Value::String(text)) => bad_format(text, schema, path),
        (Some("string"), _) => wrong("string"),
        (Some("boolean"), Value::Bool(_)) => None,
        (Some("boolean"), _) => wrong("bool"),
        (Some("integer"), Value::Number(number)) => {
            let fits = match schema.keyword("format").and_then(Value::as_str) {
                Some("int32") => number.as_i64().is_some_and(|n| i32::try_from(n).is_ok()),
                _ => number.as_i64().is_some(),
            };
            if fits { None } else { wrong(integer(schema)) }
        }
        (Some("integer"), _) => wrong(integer(schema)),
        (Some("number"), Value::Number(_)) => None,
        (Some("number"), _) => wrong("float64"),
        _ => None,
    }
}

fn bad_format(text: &str, schema: Schema<'_>, path: &str) -> Option<(String, String, String)> {
    let bad = match schema.keyword("format").and_then(Value::as_str) {
        Some("byte") => base64::engine::general_purpose::STANDARD.decode(text).is_err(),
        Some("date-time") => text.parse::<jiff::Timestamp>().is_err(),
        _ => false,
    };
    if !bad {
        return None;
    }
    let wanted = match schema.keyword("format").and_then(Value::as_str) {
        Some("byte") => "[]byte (base64)",
        _ => "time.Time (RFC 3339)",
    };
    Some((format!("string {text:?}"), path.to_owned(), wanted.to_owned()))
}

fn integer(schema: Schema<'_>) -> &'static str {
    match schema.keyword("format").and_then(Value::as_str) {
        Some("int32") => "int32",
        _ => "int64",
    }
}

fn found(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) => "bool".to_owned(),
        Value::Number(number) => format!("number {number}"),
        Value::String(_) => "string".to_owned(),
        Value::Array(_) => "array".to_owned(),
        Value::Object(_) => "object".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::apiserver::builtin::DEFINITIONS;

    fn pod() -> Schema<'static> {
        let definitions: &'static _ = &**DEFINITIONS;
        Schema::new(&definitions["io.k8s.api.core.v1.Pod"], definitions)
    }

    #[test]
    fn unknown_fields_are_named_and_removed() {
        let mut value = json!({"spec": {"containers": [{"name": "a", "imag": "b"}]}, "x": 1});
        assert_eq!(prune(&mut value, pod()), ["x", "spec.containers[0].imag"]);
        assert_eq!(value, json!({"spec": {"containers": [{"name": "a"}]}}));
    }

    #[test]
    fn wrong_types_are_named() {
        let value = json!({"spec": {"terminationGracePeriodSeconds": "soon"}});
        let (found, path, wanted) = mistyped(&value, pod()).unwrap();
        assert_eq!((found.as_str(), wanted.as_str()), ("string", "int64"));
        assert_eq!(path, "spec.terminationGracePeriodSeconds");
        let ok = json!({"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"resources":
            {"limits": {"cpu": 1, "memory": "1Gi"}}, "livenessProbe": {"httpGet": {"port": "web"}}}]}});
        assert_eq!(mistyped(&ok, pod()), None);
    }
}
