//! Strategic merge: a merge patch that merges lists by the keys that the schema names.

use serde_json::{Map, Value};

use super::super::error::ApiError;
use super::super::schema::Schema;

const DIRECTIVE: &str = "$patch";
const RETAIN: &str = "$retainKeys";
const DELETE_FROM: &str = "$deleteFromPrimitiveList/";
const ORDER: &str = "$setElementOrder/";

/// Merges `patch` into `target`.
pub(super) fn merge(target: &mut Value, patch: Value, schema: Schema<'_>) -> Result<(), ApiError> {
    let Value::Object(patch) = patch else {
        return Err(ApiError::bad_request("a strategic merge patch must be an object"));
    };
    merge_map(target, patch, Some(schema))
}

fn merge_map(
    target: &mut Value,
    mut patch: Map<String, Value>,
    schema: Option<Schema<'_>>,
) -> Result<(), ApiError> {
    match patch.remove(DIRECTIVE) {
        None => {}
        Some(directive) if directive == "replace" => {
            *target = Value::Object(patch);
            return Ok(());
        }
        Some(directive) if directive == "delete" => {
            *target = Value::Object(Map::new());
            return Ok(());
        }
        Some(directive) if directive == "merge" => {}
        Some(other) => {
            return Err(ApiError::bad_request(format!(
                "{DIRECTIVE}: {other} is not replace, merge or delete"
            )));
        }
    }
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(fields) = target else { return Ok(()) };
    if let Some(retained) = patch.remove(RETAIN) {
        let retained = retained.as_array().cloned().unwrap_or_default();
        fields.retain(|name, _| retained.iter().any(|kept| kept == name));
    }
    let mut orders = Vec::new();
    for (name, value) in patch {
        if let Some(list) = name.strip_prefix(DELETE_FROM) {
            let gone = value.as_array().cloned().unwrap_or_default();
            if let Some(items) = fields.get_mut(list).and_then(Value::as_array_mut) {
                items.retain(|item| !gone.contains(item));
            }
        } else if let Some(list) = name.strip_prefix(ORDER) {
            orders.push((list.to_owned(), value));
        } else {
            let schema = schema.and_then(|schema| schema.field(&name));
            merge_field(fields, name, value, schema)?;
        }
    }
    for (name, order) in orders {
        let key = schema.and_then(|s| s.field(&name)).and_then(Schema::patch_merge_key);
        if let (Some(Value::Array(items)), Value::Array(order)) = (fields.get_mut(&name), order) {
            sort(items, &order, key);
        }
    }
    Ok(())
}

fn merge_field(
    fields: &mut Map<String, Value>,
    name: String,
    value: Value,
    schema: Option<Schema<'_>>,
) -> Result<(), ApiError> {
    match value {
        Value::Null => drop(fields.remove(&name)),
        Value::Object(patch) => {
            let place = fields.entry(name).or_insert(Value::Null);
            merge_map(place, patch, schema)?;
        }
        Value::Array(patch) => {
            let place = fields.entry(name).or_insert_with(|| Value::Array(Vec::new()));
            merge_list(place, patch, schema)?;
        }
        scalar => drop(fields.insert(name, scalar)),
    }
    Ok(())
}

fn merge_list(
    target: &mut Value,
    mut patch: Vec<Value>,
    schema: Option<Schema<'_>>,
) -> Result<(), ApiError> {
    let merges = schema.is_some_and(|schema| schema.has_patch_strategy("merge"));
    let replaces = patch.iter().any(|item| item[DIRECTIVE] == "replace" && is_bare(item));
    patch.retain(|item| !(item[DIRECTIVE] == "replace" && is_bare(item)));
    let (Some(schema), true, false, Some(items)) =
        (schema, merges, replaces, target.as_array_mut())
    else {
        *target = Value::Array(patch);
        return Ok(());
    };
    let Some(key) = schema.patch_merge_key() else {
        for item in patch {
            if !items.contains(&item) {
                items.push(item);
            }
        }
        return Ok(());
    };
    for item in patch {
        let Value::Object(mut item) = item else {
            return Err(ApiError::bad_request("items of this list must be objects"));
        };
        let Some(id) = item.get(key).cloned() else {
            return Err(ApiError::bad_request(format!(
                "a list item of the patch lacks its merge key {key:?}"
            )));
        };
        let found = items.iter().position(|known| known[key] == id);
        if item.get(DIRECTIVE).is_some_and(|directive| directive == "delete") {
            items.retain(|known| known[key] != id);
            continue;
        }
        match found {
            Some(index) => merge_map(&mut items[index], item, schema.items())?,
            None => {
                item.remove(DIRECTIVE);
                let mut fresh = Value::Object(Map::new());
                merge_map(&mut fresh, item, schema.items())?;
                items.push(fresh);
            }
        }
    }
    Ok(())
}

fn is_bare(item: &Value) -> bool {
    item.as_object().is_some_and(|fields| fields.len() == 1)
}

/// Puts items in the given order; others keep their place relative to the one before them.
fn sort(items: &mut [Value], order: &[Value], key: Option<&str>) {
    let id = |item: &Value| key.map_or_else(|| item.clone(), |key| item[key].clone());
    let order: Vec<Value> = order.iter().map(id).collect();
    let mut last = 0;
    let mut ranked: Vec<(usize, Value)> = Vec::with_capacity(items.len());
    for item in items.iter() {
        if let Some(rank) = order.iter().position(|known| *known == id(item)) {
            last = rank;
        }
        ranked.push((last, item.clone()));
    }
    ranked.sort_by_key(|(rank, _)| *rank);
    for (place, (_, item)) in items.iter_mut().zip(ranked) {
        *place = item;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::apiserver::builtin::DEFINITIONS;

    fn merged(mut target: Value, patch: Value) -> Value {
        let schema = Schema::new(&DEFINITIONS["io.k8s.api.core.v1.Pod"], &DEFINITIONS);
        merge(&mut target, patch, schema).unwrap();
        target
    }

    #[test]
    fn lists_are_merged_by_key() {
        let pod = json!({"spec": {"containers": [{"name": "a", "image": "x"}, {"name": "b"}]}});
        let patch = json!({"spec": {"containers": [{"name": "a", "tty": true},
            {"name": "b", "$patch": "delete"}, {"name": "c"}]}});
        let expected = json!({"spec": {"containers": [{"name": "a", "image": "x", "tty": true},
            {"name": "c"}]}});
        assert_eq!(merged(pod, patch), expected);
    }

    #[test]
    fn directives() {
        let pod =
            json!({"metadata": {"finalizers": ["a", "b"]}, "spec": {"nodeSelector": {"x": "y"}}});
        let patch = json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"]},
            "spec": {"nodeSelector": {"$patch": "replace", "z": "w"}}});
        let expected =
            json!({"metadata": {"finalizers": ["b"]}, "spec": {"nodeSelector": {"z": "w"}}});
        assert_eq!(merged(pod, patch), expected);
    }

    #[test]
    fn order_is_taken_over() {
        let pod = json!({"spec": {"containers": [{"name": "a"}, {"name": "b"}]}});
        let patch = json!({"spec": {"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}],
            "containers": []}});
        let expected = json!({"spec": {"containers": [{"name": "b"}, {"name": "a"}]}});
        assert_eq!(merged(pod, patch), expected);
    }
}
