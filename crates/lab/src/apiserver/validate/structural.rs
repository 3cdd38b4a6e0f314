//! Structural schemas of custom resources.

use serde_json::Value;

use crate::apiserver::body::join;
use crate::apiserver::error::Cause;
use crate::apiserver::schema::Schema;

pub(super) fn check(value: &Value, schema: Schema<'_>, path: &str, causes: &mut Vec<Cause>) {
    if value.is_null() && schema.keyword("nullable") == Some(&Value::Bool(true)) {
        return;
    }
    if !is_of_type(value, schema) {
        let wanted = schema.kind().unwrap_or("int-or-string");
        let hint = format!("{path} in body must be of type {wanted}: {:?}", type_name(value));
        causes.push(Cause::type_invalid(path, value, &hint));
        return;
    }
    scalars(value, schema, path, causes);
    combined(value, schema, path, causes);
    match value {
        Value::Object(fields) => {
            for name in texts(schema.node().get("required")) {
                if fields.get(name).is_none() {
                    causes.push(Cause::required(join(path, name), ""));
                }
            }
            count(
                fields.len(),
                schema,
                ["minProperties", "maxProperties"],
                "properties",
                path,
                causes,
            );
            for (name, child) in fields {
                if let Some(schema) = schema.field(name) {
                    check(child, schema, &join(path, name), causes);
                }
            }
        }
        Value::Array(items) => {
            count(items.len(), schema, ["minItems", "maxItems"], "items", path, causes);
            if let Some(schema) = schema.items() {
                for (index, item) in items.iter().enumerate() {
                    check(item, schema, &format!("{path}[{index}]"), causes);
                }
            }
        }
        _ => {}
    }
}

fn texts(list: Option<&Value>) -> impl Iterator<Item = &str> {
    list.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
}

fn is_of_type(value: &Value, schema: Schema<'_>) -> bool {
    if schema.is_int_or_string() {
        return value.is_string() || value.is_i64() || value.is_u64();
    }
    match schema.kind() {
        None => true,
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("boolean") => value.is_boolean(),
        Some("integer") => {
            value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|n| n.fract() == 0.0)
        }
        Some("number") => value.is_number(),
        Some(_) => true,
    }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn count(
    length: usize,
    schema: Schema<'_>,
    bounds: [&str; 2],
    what: &str,
    path: &str,
    causes: &mut Vec<Cause>,
) {
    let bound = |name: &str| {
        schema.keyword(name).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok())
    };
    if let Some(least) = bound(bounds[0]).filter(|least| length < *least) {
        let hint = format!("{path} in body should have at least {least} {what}");
        causes.push(Cause::invalid(path, &length.into(), &hint));
    }
    if let Some(most) = bound(bounds[1]).filter(|most| length > *most) {
        let message = format!("Too many: {length}: must have at most {most} {what}");
        causes.push(Cause { reason: "FieldValueTooMany", field: path.to_owned(), message });
    }
}

fn scalars(value: &Value, schema: Schema<'_>, path: &str, causes: &mut Vec<Cause>) {
    if let Some(allowed) = schema.node().get("enum").and_then(Value::as_array)
        && !allowed.contains(value)
    {
        let names: Vec<String> = allowed
            .iter()
            .map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned))
            .collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        causes.push(Cause::not_supported(path, value, &names));
    }
    if let Some(number) = value.as_f64() {
        let bound = |name: &str| schema.keyword(name).and_then(Value::as_f64);
        let exclusive = |name: &str| schema.keyword(name) == Some(&Value::Bool(true));
        if let Some(least) = bound("minimum")
            && (number < least || number <= least && exclusive("exclusiveMinimum"))
        {
            let hint = format!("{path} in body should be greater than or equal to {least}");
            causes.push(Cause::invalid(path, value, &hint));
        }
        if let Some(most) = bound("maximum")
            && (number > most || number >= most && exclusive("exclusiveMaximum"))
        {
            let hint = format!("{path} in body should be less than or equal to {most}");
            causes.push(Cause::invalid(path, value, &hint));
        }
    }
    let Some(text) = value.as_str() else { return };
    count(text.chars().count(), schema, ["minLength", "maxLength"], "characters", path, causes);
    if let Some(pattern) = schema.keyword("pattern").and_then(Value::as_str) {
        // A pattern that cannot be read refuses everything: the other way round would let in
        // what its author meant to keep out.
        let matches = regex::Regex::new(pattern).is_ok_and(|pattern| pattern.is_match(text));
        if !matches {
            let hint = format!("{path} in body should match '{pattern}'");
            causes.push(Cause::invalid(path, value, &hint));
        }
    }
    let format = schema.keyword("format").and_then(Value::as_str);
    let fits = match format {
        Some("date-time") => text.parse::<jiff::Timestamp>().is_ok(),
        Some("ipv4") => text.parse::<std::net::Ipv4Addr>().is_ok(),
        Some("ipv6") => text.parse::<std::net::Ipv6Addr>().is_ok(),
        Some("cidr") => text.parse::<ipnet::IpNet>().is_ok(),
        _ => true,
    };
    if !fits {
        let hint = format!("{path} in body must be of type {}: {text:?}", format.unwrap_or(""));
        causes.push(Cause::invalid(path, value, &hint));
    }
}

fn combined(value: &Value, schema: Schema<'_>, path: &str, causes: &mut Vec<Cause>) {
    let branches = |name: &str| -> Vec<Schema<'_>> {
        // The `allOf` of a reference has been followed already.
        let list = schema.node().get(name).and_then(Value::as_array);
        list.into_iter().flatten().map(|node| schema.branch(node)).collect()
    };
    let fits = |branch: &Schema<'_>| {
        let mut found = Vec::new();
        check(value, *branch, path, &mut found);
        found.is_empty()
    };
    for branch in branches("allOf") {
        check(value, branch, path, causes);
    }
    let any = branches("anyOf");
    if !any.is_empty() && !any.iter().any(fits) {
        let hint = format!("{path} in body must validate at least one schema (anyOf)");
        causes.push(Cause::invalid(path, value, &hint));
    }
    let one = branches("oneOf");
    let matching = one.iter().filter(|branch| fits(branch)).count();
    if !one.is_empty() && matching != 1 {
        let hint = format!(
            "{path} in body must validate one and only one schema (oneOf). Found {}",
            if matching == 0 {
                "none valid".to_owned()
            } else {
                format!("{matching} valid alternatives")
            }
        );
        causes.push(Cause::invalid(path, value, &hint));
    }
    if let Some(node) = schema.node().get("not")
        && fits(&schema.branch(node))
    {
        let hint = format!("{path} in body must not validate the schema (not)");
        causes.push(Cause::invalid(path, value, &hint));
    }
}
