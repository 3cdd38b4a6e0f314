//! What Kubernetes refuses.

mod builtin;
pub(super) mod names;
mod structural;

use serde_json::Value;

use super::error::{ApiError, Cause};
use super::meta::text;
use super::registry::Resource;

/// Refuses an object that breaks the rules of its kind, naming every field that does.
pub(super) fn check(
    resource: &Resource,
    object: &Value,
    old: Option<&Value>,
) -> Result<(), ApiError> {
    let mut causes = Vec::new();
    metadata(resource, object, &mut causes);
    match &resource.custom {
        Some(custom) => {
            structural::check(object, resource.schema(), "", &mut causes);
            if causes.is_empty() {
                rules(&custom.schema, object, old, &mut causes);
            }
        }
        None => builtin::check(resource.builtin_key(), object, old, &mut causes),
    }
    if causes.is_empty() {
        return Ok(());
    }
    Err(ApiError::invalid(&resource.group, &resource.kind, text(object, "name"), causes))
}

fn metadata(resource: &Resource, object: &Value, causes: &mut Vec<Cause>) {
    let name = text(object, "name");
    if name.is_empty() {
        causes.push(Cause::required("metadata.name", "name or generateName is required"));
    } else if let Some(hint) = names::wrong(resource.builtin_key(), name) {
        causes.push(Cause::invalid("metadata.name", &name.into(), &hint));
    }
    let labels = object["metadata"]["labels"].as_object();
    names::labels("metadata.labels", labels, causes);
    for (key, value) in object["metadata"]["annotations"].as_object().into_iter().flatten() {
        if let Some(hint) = names::wrong_label_key(&key.to_lowercase()) {
            causes.push(Cause::invalid("metadata.annotations", &key.as_str().into(), &hint));
        }
        if !value.is_string() {
            causes.push(Cause::type_invalid(
                format!("metadata.annotations.{key}"),
                value,
                "must be a string",
            ));
        }
    }
}

/// Expression rules (CEL) of a custom resource.
fn rules(schema: &Value, object: &Value, old: Option<&Value>, causes: &mut Vec<Cause>) {
    let Err(errors) = kube_cel::Validator::new().validate(schema, object, old) else { return };
    for error in errors.into_vec() {
        let field = error.field_path.trim_start_matches('.').to_owned();
        let message = format!("Invalid value: {}", error.message);
        causes.push(Cause { reason: "FieldValueInvalid", field, message });
    }
}
