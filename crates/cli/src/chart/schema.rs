//! Checks values against the chart's schema: the keywords that `values.schema.json` uses.

use anyhow::{Context, Result, bail};
use regex::Regex;
use serde_json::Value;

/// Every field that is wrong, one a line.
pub(super) fn problems(schema: &Value, values: &Value) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    check(schema, values, "", &mut problems)?;
    Ok(problems)
}

/// A tag that is a number, for one.
fn would_be_right_as_text(schema: &Value, value: &Value) -> Result<bool> {
    let plain = value.is_number() || value.is_boolean();
    Ok(plain && problems(schema, &Value::String(value.to_string()))?.is_empty())
}

fn check(whole: &Value, value: &Value, path: &str, problems: &mut Vec<String>) -> Result<()> {
    let schema = whole.as_object().context("a schema is an object")?;
    let mut problem =
        |text: String| problems.push(format!("{}: {text}", path.trim_start_matches('.')));
    // What a pattern means, in words.
    let meaning = schema.get("description").and_then(Value::as_str);
    if let Some(kinds) = schema.get("type") {
        let kinds: Vec<&str> = match kinds {
            Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
            kind => kind.as_str().into_iter().collect(),
        };
        if !kinds.iter().any(|kind| is(value, kind)) {
            problem(match meaning {
                _ if would_be_right_as_text(whole, value)? => {
                    format!(
                        "{value} is no text: write it in quotes, in a file of values (--values)"
                    )
                }
                Some(meaning) => format!("{value} is not {meaning}"),
                None => format!("{value} is not of type {}", kinds.join(" or ")),
            });
            return Ok(());
        }
    }
    for (keyword, wanted) in schema {
        match (keyword.as_str(), value) {
            ("enum", _) if !wanted.as_array().is_some_and(|all| all.contains(value)) => {
                problem(format!("{value} is none of {wanted}"));
            }
            ("pattern", Value::String(text)) => {
                let pattern = wanted.as_str().context("a pattern is a text")?;
                if !Regex::new(pattern)?.is_match(text) {
                    problem(match meaning {
                        Some(meaning) => format!("{value} is not {meaning}"),
                        None => format!("{value} does not match {pattern}"),
                    });
                }
            }
            ("not", _) if self::problems(wanted, value)?.is_empty() => problem(match meaning {
                Some(meaning) => format!("{value} is not {meaning}"),
                None => format!("{value} must not match {wanted}"),
            }),
            ("minimum", Value::Number(number)) if number.as_i64() < wanted.as_i64() => {
                problem(format!("{number} is less than {wanted}"));
            }
            ("maximum", Value::Number(number)) if number.as_i64() > wanted.as_i64() => {
                problem(format!("{number} is more than {wanted}"));
            }
            (
                "type"
                | "enum"
                | "pattern"
                | "not"
                | "minimum"
                | "maximum"
                | "items"
                | "required"
                | "properties"
                | "additionalProperties"
                | "description"
                | "$schema",
                _,
            ) => {}
            (other, _) => bail!("the schema's keyword {other} is not known here"),
        }
    }
    if let (Value::Array(items), Some(schema)) = (value, schema.get("items")) {
        for (index, item) in items.iter().enumerate() {
            check(schema, item, &format!("{path}[{index}]"), problems)?;
        }
    }
    if let (Value::Object(fields), Some(Value::Array(required))) = (value, schema.get("required")) {
        let missing =
            required.iter().filter_map(Value::as_str).filter(|&it| !fields.contains_key(it));
        problems.extend(missing.map(|name| {
            let at = format!("{path}.{name}");
            format!("{}: must have a value, not null", at.trim_start_matches('.'))
        }));
    }
    let (Value::Object(fields), known) = (value, schema.get("properties")) else { return Ok(()) };
    for (name, field) in fields {
        let at = format!("{path}.{name}");
        match (known.and_then(|known| known.get(name)), schema.get("additionalProperties")) {
            (Some(schema), _) => check(schema, field, &at, problems)?,
            (None, Some(Value::Bool(false))) => {
                let names = known.and_then(Value::as_object).map(|it| it.keys().cloned());
                let names: Vec<String> = names.into_iter().flatten().collect();
                problems.push(format!(
                    "{}: there is no such value; there are {}",
                    at.trim_start_matches('.'),
                    names.join(", ")
                ));
            }
            (None, Some(schema @ Value::Object(_))) => check(schema, field, &at, problems)?,
            (None, _) => {}
        }
    }
    Ok(())
}

fn is(value: &Value, kind: &str) -> bool {
    match kind {
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        "boolean" => value.is_boolean(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_wrong_value_is_named_with_what_is_right() {
        let schema = json!({
            "type": "object",
            "additionalProperties": false,
            "properties": {
                "mode": { "type": "string", "enum": ["a", "b"] },
                "count": { "type": ["string", "integer"], "minimum": 1, "pattern": "^[0-9]+%$" },
                "time": { "type": "string", "pattern": "^[0-9]+m$", "description": "like 5m" },
                "tag": { "type": "string", "pattern": "^[0-9.]+$", "description": "a tag" },
                "all": { "type": "array", "items": { "type": "object" } },
                "name": { "not": { "pattern": "^x" }, "description": "a name without x" },
            },
        });
        let problems = |values: Value| problems(&schema, &values).unwrap().join("\n");
        assert_eq!(problems(json!({ "mode": "a", "count": 1, "all": [{}] })), "");
        assert_eq!(problems(json!({ "mode": "c" })), r#"mode: "c" is none of ["a","b"]"#);
        assert_eq!(problems(json!({ "mode": 1 })), "mode: 1 is not of type string");
        assert_eq!(problems(json!({ "count": 0 })), "count: 0 is less than 1");
        assert_eq!(problems(json!({ "count": "x" })), r#"count: "x" does not match ^[0-9]+%$"#);
        assert_eq!(problems(json!({ "time": 5 })), "time: 5 is not like 5m");
        assert_eq!(problems(json!({ "time": "x" })), r#"time: "x" is not like 5m"#);
        let quoted = "tag: 20240101 is no text: write it in quotes, in a file of values (--values)";
        assert_eq!(problems(json!({ "tag": 20_240_101 })), quoted);
        assert_eq!(problems(json!({ "tag": true })), "tag: true is not a tag");
        assert_eq!(problems(json!({ "all": [1] })), "all[0]: 1 is not of type object");
        let required = json!({ "properties": { "a": { "required": ["b"] } }, "required": ["a"] });
        let lacks = |values: Value| super::problems(&required, &values).unwrap().join("\n");
        assert_eq!(lacks(json!({})), "a: must have a value, not null");
        assert_eq!(lacks(json!({ "a": {} })), "a.b: must have a value, not null");
        assert_eq!(lacks(json!({ "a": { "b": 1 } })), "");
        assert_eq!(problems(json!({ "name": "y" })), "");
        assert_eq!(problems(json!({ "name": "xy" })), r#"name: "xy" is not a name without x"#);
        assert_eq!(
            problems(json!({ "mod": "a" })),
            "mod: there is no such value; there are all, count, mode, name, tag, time"
        );
    }
}
