//! `metadata.managedFields`: who wrote which field.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::super::meta::{metadata, now};
use super::super::registry::Resource;
use super::super::schema::{ListKind, Schema};

/// Steps to a field as `FieldsV1` writes them: `f:spec`, `k:{"name":"a"}`, `v:"x"`.
pub(crate) type Path = Vec<String>;
/// Fields with their values; items of keyed lists are fields of their own, with a null.
pub(crate) type Leaves = BTreeMap<Path, Value>;

/// One writer's fields.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// The manager.
    pub manager: String,
    /// `Apply` or `Update`.
    pub operation: String,
    /// Version in which it wrote.
    pub api_version: String,
    /// Subresource, or empty.
    pub subresource: String,
    /// When.
    pub time: String,
    /// What.
    pub fields: BTreeSet<Path>,
}

/// Metadata that is the server's own, or the object's name.
const UNOWNED: [&str; 11] = [
    "name",
    "namespace",
    "uid",
    "creationTimestamp",
    "resourceVersion",
    "generation",
    "selfLink",
    "managedFields",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "generateName",
];

/// All fields of an object that can have a manager.
pub(crate) fn leaves(object: &Value, schema: Schema<'_>) -> Leaves {
    let mut stripped = object.clone();
    if let Some(fields) = stripped.as_object_mut() {
        fields.remove("apiVersion");
        fields.remove("kind");
        if let Some(metadata) = fields.get_mut("metadata").and_then(Value::as_object_mut) {
            UNOWNED.iter().for_each(|name| drop(metadata.remove(*name)));
            if metadata.is_empty() {
                fields.remove("metadata");
            }
        }
    }
    let mut found = Leaves::new();
    collect(&stripped, Some(schema), &mut Vec::new(), &mut found);
    found
}

fn collect(value: &Value, schema: Option<Schema<'_>>, path: &mut Path, out: &mut Leaves) {
    match value {
        Value::Object(fields)
            if !fields.is_empty() && schema.is_none_or(|schema| !schema.is_atomic()) =>
        {
            for (name, child) in fields {
                path.push(format!("f:{name}"));
                collect(child, schema.and_then(|schema| schema.field(name)), path, out);
                path.pop();
            }
        }
        Value::Array(items) if schema.is_some_and(|s| s.list_kind() != ListKind::Atomic) => {
            let Some(schema) = schema else { return };
            for item in items {
                path.push(element(item, schema));
                match schema.list_kind() {
                    ListKind::Set => drop(out.insert(path.clone(), item.clone())),
                    _ => {
                        out.insert(path.clone(), Value::Null);
                        collect(item, schema.items(), path, out);
                    }
                }
                path.pop();
            }
        }
        _ if path.is_empty() => {}
        other => drop(out.insert(path.clone(), other.clone())),
    }
}

/// The step to a list item.
pub(crate) fn element(item: &Value, list: Schema<'_>) -> String {
    let ListKind::Map(keys) = list.list_kind() else { return format!("v:{item}") };
    let mut named = Map::new();
    for key in keys {
        let value = match item.get(&key) {
            Some(value) => Some(value),
            None => list.items().and_then(|items| items.property(&key)).and_then(Schema::default),
        };
        if let Some(value) = value {
            named.insert(key, value.clone());
        }
    }
    format!("k:{}", Value::Object(named))
}

/// The entries of an object.
pub(crate) fn entries(object: &Value) -> Vec<Entry> {
    let list = object["metadata"]["managedFields"].as_array();
    list.into_iter().flatten().filter_map(read).collect()
}

fn read(entry: &Value) -> Option<Entry> {
    let text = |field: &str| entry[field].as_str().unwrap_or("").to_owned();
    let mut fields = BTreeSet::new();
    flatten(entry.get("fieldsV1")?, &mut Vec::new(), &mut fields);
    Some(Entry {
        manager: text("manager"),
        operation: text("operation"),
        api_version: text("apiVersion"),
        subresource: text("subresource"),
        time: text("time"),
        fields,
    })
}

fn flatten(tree: &Value, path: &mut Path, out: &mut BTreeSet<Path>) {
    let Some(children) = tree.as_object() else { return };
    if children.is_empty() && !path.is_empty() {
        out.insert(path.clone());
    }
    for (step, child) in children {
        if step == "." {
            out.insert(path.clone());
            continue;
        }
        path.push(step.clone());
        flatten(child, path, out);
        path.pop();
    }
}

/// Writes the entries into an object; empty ones are dropped.
pub(crate) fn write(object: &mut Value, entries: Vec<Entry>) {
    let list: Vec<Value> = entries
        .into_iter()
        .filter(|entry| !entry.fields.is_empty())
        .map(|entry| {
            let mut value = json!({
                "manager": entry.manager, "operation": entry.operation,
                "apiVersion": entry.api_version, "time": entry.time, "fieldsType": "FieldsV1",
                "fieldsV1": tree(&entry.fields),
            });
            if !entry.subresource.is_empty() {
                value["subresource"] = entry.subresource.into();
            }
            value
        })
        .collect();
    if list.is_empty() {
        metadata(object).remove("managedFields");
    } else {
        metadata(object).insert("managedFields".into(), list.into());
    }
}

fn tree(fields: &BTreeSet<Path>) -> Value {
    let mut root = json!({});
    for path in fields {
        let mut place = &mut root;
        for step in path {
            place = &mut place[step.as_str()];
            if place.is_null() {
                *place = json!({});
            }
        }
        // A field with fields of its own under it is marked by a dot.
        let inner = fields.range(path.clone()..).nth(1).is_some_and(|next| next.starts_with(path));
        if inner {
            place["."] = json!({});
        }
    }
    root
}

/// Notes that `manager` changed `old` into `new` by an ordinary write.
pub(crate) fn record(
    resource: &Resource,
    old: Option<&Value>,
    new: &mut Value,
    manager: &str,
    subresource: &str,
) {
    let schema = resource.schema();
    let before = old.map(|old| leaves(old, schema)).unwrap_or_default();
    let after = leaves(new, schema);
    let changed: BTreeSet<Path> = after
        .iter()
        .filter(|(path, value)| before.get(*path) != Some(*value))
        .map(|(path, _)| path.clone())
        .collect();
    let gone = before.keys().any(|path| !after.contains_key(path));
    if changed.is_empty() && !gone {
        return;
    }
    let mut entries = entries(new);
    for entry in &mut entries {
        let mine = entry.manager == manager
            && entry.operation == "Update"
            && entry.subresource == subresource;
        entry.fields.retain(|path| {
            (after.contains_key(path) || !before.contains_key(path))
                && (mine || !changed.contains(path))
        });
    }
    if !changed.is_empty() {
        let found = entries.iter().position(|entry| {
            entry.manager == manager
                && entry.operation == "Update"
                && entry.subresource == subresource
                && entry.api_version == resource.api_version()
        });
        match found {
            Some(index) => {
                entries[index].fields.extend(changed);
                entries[index].time = now();
            }
            None => entries.push(Entry {
                manager: manager.to_owned(),
                operation: "Update".to_owned(),
                api_version: resource.api_version(),
                subresource: subresource.to_owned(),
                time: now(),
                fields: changed,
            }),
        }
    }
    write(new, entries);
}

/// Are two states of an object the same but for when they were written?
pub(crate) fn same_but_for_times(old: &Value, new: &Value) -> bool {
    let strip = |object: &Value| {
        let mut object = object.clone();
        let fields = metadata(&mut object);
        fields.remove("resourceVersion");
        for entry in
            fields.get_mut("managedFields").and_then(Value::as_array_mut).into_iter().flatten()
        {
            entry["time"] = Value::Null;
        }
        object
    };
    strip(old) == strip(new)
}
