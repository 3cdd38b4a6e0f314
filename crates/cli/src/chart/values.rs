//! What the user chose: files and `--set`, over what the chart says.

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value};

/// Puts `over` on `base`: maps are merged, everything else is replaced, null takes away.
pub(crate) fn merge(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                if value.is_null() {
                    base.remove(&key);
                } else {
                    merge(base.entry(key).or_insert(Value::Null), value);
                }
            }
        }
        (base, over) => *base = over,
    }
}

/// `a.b=1,c=x`, as in `--set`.
pub(crate) fn parse_set(text: &str) -> Result<Value> {
    let mut all = Value::Object(Map::new());
    let mut assignments: Vec<String> = Vec::new();
    for part in split(text, ',') {
        match assignments.last_mut() {
            // What is no KEY= goes on with the value before it, a list of networks say.
            Some(last) if !part.is_empty() && !part.contains('=') => {
                last.push(',');
                last.push_str(&part);
            }
            _ => assignments.push(part),
        }
    }
    for assignment in assignments {
        let (path, value) =
            assignment.split_once('=').filter(|(path, _)| !path.is_empty()).with_context(|| {
                format!("{text:?}: write KEY=VALUE, as in config.ipam=cluster-pool")
            })?;
        let keys = split(path, '.');
        ensure!(keys.iter().all(|key| !key.is_empty()), "{text:?}: {path:?} has an empty part");
        let value = keys.iter().rev().fold(scalar(value), |value, key| {
            Value::Object(Map::from_iter([(unescape(key), value)]))
        });
        combine(&mut all, value);
    }
    Ok(all)
}

/// Puts one choice on another, as [`merge`] does, but null stays: it takes away what the chart says.
pub(crate) fn combine(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                combine(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (base, over) => *base = over,
    }
}

/// Parts between separators that no `\` and no `{}` protects.
fn split(text: &str, separator: char) -> Vec<String> {
    let mut parts = vec![String::new()];
    let (mut escaped, mut depth) = (false, 0u32);
    for character in text.chars() {
        let splits = character == separator && !escaped && depth == 0;
        match character {
            '{' if !escaped => depth += 1,
            '}' if !escaped => depth = depth.saturating_sub(1),
            _ => {}
        }
        escaped = character == '\\' && !escaped;
        if splits {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(character);
        }
    }
    parts
}

fn unescape(text: &str) -> String {
    let mut escaped = false;
    text.chars()
        .filter(|&character| {
            escaped = character == '\\' && !escaped;
            !escaped
        })
        .collect()
}

fn scalar(text: &str) -> Value {
    if let Some(list) = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')) {
        return split(list, ',').iter().map(|item| scalar(item)).collect();
    }
    match text {
        "true" => true.into(),
        "false" => false.into(),
        "null" => Value::Null,
        "0" => 0.into(),
        // Digits after a zero are no number, but a name or a mask.
        _ if !text.starts_with('0') => match text.parse::<i64>() {
            Ok(number) => number.into(),
            Err(_) => unescape(text).into(),
        },
        _ => unescape(text).into(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn set_means_what_helm_means() {
        let set = |text: &str| parse_set(text).unwrap();
        assert_eq!(set("a.b=1,a.c=x"), json!({ "a": { "b": 1, "c": "x" } }));
        assert_eq!(set("a=true,b=null,c=007"), json!({ "a": true, "b": null, "c": "007" }));
        assert_eq!(set("a={x,2}"), json!({ "a": ["x", 2] }));
        assert_eq!(set(r"a\.b=x\,y"), json!({ "a.b": "x,y" }));
        assert_eq!(set("a=x,y,b=1,2"), json!({ "a": "x,y", "b": "1,2" }));
        assert_eq!(set("a="), json!({ "a": "" }));
        assert!(parse_set("x,a=1").is_err());
        assert!(parse_set("a=1,").is_err());
        assert!(parse_set("a").is_err());
        assert!(parse_set("=1").is_err());
        assert!(parse_set("a..b=1").is_err());
    }

    #[test]
    fn maps_merge_lists_are_replaced_and_null_takes_away() {
        let mut base = json!({ "a": { "x": 1, "y": 2 }, "l": [1, 2] });
        merge(&mut base, json!({ "a": { "y": null, "z": 3 }, "l": [3] }));
        assert_eq!(base, json!({ "a": { "x": 1, "z": 3 }, "l": [3] }));
        combine(&mut base, json!({ "a": null, "l": null }));
        assert_eq!(base, json!({ "a": null, "l": null }));
    }
}
