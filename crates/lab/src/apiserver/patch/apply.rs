//! Server-side apply: the applier states what it wants; it owns that and nothing else.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::super::error::ApiError;
use super::super::meta::now;
use super::super::registry::Resource;
use super::super::schema::{ListKind, Schema};
use super::managed::{self, Entry, Path};

/// The object after `manager` has applied `applied`. Conflicts with what other managers own are
/// an error, or with `force` taken over.
pub(crate) fn apply(
    resource: &Resource,
    live: Option<&Value>,
    applied: &Value,
    manager: &str,
    force: bool,
    subresource: &str,
) -> Result<Value, ApiError> {
    let schema = resource.schema();
    let mut merged = live.cloned().unwrap_or_else(|| Value::Object(Map::new()));
    merge(&mut merged, applied, Some(schema));

    let wanted: BTreeSet<Path> = managed::leaves(applied, schema).into_keys().collect();
    let (own, mut others): (Vec<Entry>, Vec<Entry>) =
        managed::entries(&merged).into_iter().partition(|entry| {
            entry.manager == manager
                && entry.operation == "Apply"
                && entry.subresource == subresource
        });
    let dropped = own.iter().flat_map(|entry| &entry.fields).filter(|path| !wanted.contains(*path));
    for path in dropped {
        if !others.iter().any(|entry| entry.fields.iter().any(|owned| owned.starts_with(path))) {
            remove(&mut merged, path, Some(schema));
        }
    }

    let before = live.map(|live| managed::leaves(live, schema)).unwrap_or_default();
    let after = managed::leaves(&merged, schema);
    let changed: BTreeSet<&Path> = after
        .iter()
        .filter(|(path, value)| before.get(*path) != Some(*value))
        .map(|(path, _)| path)
        .collect();
    let mut conflicts = Vec::new();
    for entry in &mut others {
        for path in entry.fields.iter().filter(|path| changed.contains(path)) {
            conflicts.push((entry.manager.clone(), entry.api_version.clone(), readable(path)));
        }
        if force {
            entry.fields.retain(|path| !changed.contains(path));
        }
    }
    if !force && !conflicts.is_empty() {
        return Err(refusal(&conflicts));
    }
    let unchanged = own.first().is_some_and(|entry| entry.fields == wanted);
    let time = match own.first() {
        Some(entry) if unchanged && changed.is_empty() => entry.time.clone(),
        _ => now(),
    };
    others.push(Entry {
        manager: manager.to_owned(),
        operation: "Apply".to_owned(),
        api_version: resource.api_version(),
        subresource: subresource.to_owned(),
        time,
        fields: wanted,
    });
    managed::write(&mut merged, others);
    if let Some(live) = live {
        merged["metadata"]["resourceVersion"] = match &applied["metadata"]["resourceVersion"] {
            Value::String(asked) => asked.clone().into(),
            _ => live["metadata"]["resourceVersion"].clone(),
        };
    }
    Ok(merged)
}

fn refusal(conflicts: &[(String, String, String)]) -> ApiError {
    let mut texts = Vec::new();
    let mut causes = Vec::new();
    for (manager, version, field) in conflicts {
        let with = format!("conflict with {manager:?} using {version}");
        texts.push(format!("{with}: {field}"));
        causes.push(json!({"reason": "FieldManagerConflict", "message": with, "field": field}));
    }
    let message = match texts.as_slice() {
        [one] => format!("Apply failed with 1 conflict: {one}"),
        many => format!("Apply failed with {} conflicts: {}", many.len(), many.join("\n- ")),
    };
    ApiError::apply_conflict(message, causes)
}

/// `.spec.containers[name="a"].image`.
fn readable(path: &Path) -> String {
    let mut text = String::new();
    for step in path {
        match step.split_once(':') {
            Some(("f", name)) => text.push_str(&format!(".{name}")),
            Some(("k", keys)) => {
                let keys: Map<String, Value> = serde_json::from_str(keys).unwrap_or_default();
                let keys: Vec<String> =
                    keys.iter().map(|(name, value)| format!("{name}={value}")).collect();
                text.push_str(&format!("[{}]", keys.join(",")));
            }
            Some(("v", value)) => text.push_str(&format!("[={value}]")),
            _ => {}
        }
    }
    text
}

fn merge(target: &mut Value, applied: &Value, schema: Option<Schema<'_>>) {
    match applied {
        Value::Object(fields) if schema.is_none_or(|schema| !schema.is_atomic()) => {
            if !target.is_object() {
                *target = Value::Object(Map::new());
            }
            for (name, child) in fields {
                // What the server says of its own is not the applier's to set.
                let place = &mut target[name.as_str()];
                merge(place, child, schema.and_then(|schema| schema.field(name)));
            }
        }
        Value::Array(items) => match schema.filter(|s| s.list_kind() != ListKind::Atomic) {
            Some(schema) => merge_list(target, items, schema),
            None => *target = applied.clone(),
        },
        other => *target = other.clone(),
    }
}

/// Applied items in their order; others stay where they are.
fn merge_list(target: &mut Value, applied: &[Value], schema: Schema<'_>) {
    let mut items = match target.take() {
        Value::Array(items) => items,
        _ => Vec::new(),
    };
    for item in applied {
        let id = managed::element(item, schema);
        match items.iter_mut().find(|known| managed::element(known, schema) == id) {
            Some(known) => merge(known, item, schema.items()),
            None => items.push(item.clone()),
        }
    }
    // The applied items take the places that they had, in the applied order.
    let order: Vec<String> = applied.iter().map(|item| managed::element(item, schema)).collect();
    let places: Vec<usize> = items
        .iter()
        .enumerate()
        .filter(|(_, item)| order.contains(&managed::element(item, schema)))
        .map(|(place, _)| place)
        .collect();
    let mut sorted: Vec<Value> = places.iter().map(|place| items[*place].clone()).collect();
    sorted.sort_by_key(|item| {
        let id = managed::element(item, schema);
        order.iter().position(|known| *known == id)
    });
    for (place, item) in places.into_iter().zip(sorted) {
        items[place] = item;
    }
    *target = Value::Array(items);
}

fn remove(target: &mut Value, path: &[String], schema: Option<Schema<'_>>) {
    let Some((step, rest)) = path.split_first() else { return };
    if let Some(name) = step.strip_prefix("f:") {
        let Some(fields) = target.as_object_mut() else { return };
        if rest.is_empty() {
            fields.remove(name);
            return;
        }
        let inner = schema.and_then(|schema| schema.field(name));
        if let Some(child) = fields.get_mut(name) {
            remove(child, rest, inner);
            // A map or list that this emptied was there for these entries only.
            if child.as_object().is_some_and(Map::is_empty)
                || child.as_array().is_some_and(Vec::is_empty)
            {
                fields.remove(name);
            }
        }
        return;
    }
    let (Some(items), Some(schema)) = (target.as_array_mut(), schema) else { return };
    let Some(index) = items.iter().position(|item| managed::element(item, schema) == *step) else {
        return;
    };
    if rest.is_empty() {
        items.remove(index);
    } else {
        remove(&mut items[index], rest, schema.items());
    }
}
