//! The `scale` subresource.

use hyper::Method;
use serde_json::{Value, json};

use super::error::{ApiError, Cause};
use super::http::Call;
use super::registry::Resource;
use super::reply::{self, Reply};
use super::{body, crud, patch};

struct Paths {
    spec: String,
    status: String,
    selector: Option<String>,
}

fn paths(resource: &Resource) -> Paths {
    match resource.custom.as_ref().and_then(|custom| custom.scale.clone()) {
        Some(scale) => Paths {
            spec: pointer(&scale.spec),
            status: pointer(&scale.status),
            selector: scale.selector.as_deref().map(pointer),
        },
        None => Paths {
            spec: pointer(".spec.replicas"),
            status: pointer(".status.replicas"),
            selector: None,
        },
    }
}

fn pointer(path: &str) -> String {
    path.replace('.', "/")
}

pub(super) fn serve(call: &Call, method: &Method) -> Result<Reply, ApiError> {
    let paths = paths(&call.resource);
    if *method == Method::GET {
        let object = call.api.store.get(&call.key()).ok_or_else(|| call.not_found())?;
        return Ok(reply::object(200, &scale(&paths, &object), call.accept.yaml));
    }
    let dry_run = call.query.dry_run()?;
    let stored = call.api.store.transact(|transaction| {
        let old = transaction.get(&call.key()).ok_or_else(|| call.not_found())?;
        let before = scale(&paths, &old);
        let wanted = match method.as_str() {
            "PUT" => body::decode(&call.content_type, &call.body)?.value,
            "PATCH" => {
                let kind = patch::Kind::of(&call.content_type, &call.resource)?;
                patch::apply_to(&call.resource, kind, &before, &call.body)?
            }
            _ => return Err(ApiError::method_not_allowed()),
        };
        let revision = &wanted["metadata"]["resourceVersion"];
        if revision.as_str().is_some_and(|r| !r.is_empty())
            && *revision != old["metadata"]["resourceVersion"]
        {
            return Err(ApiError::modified(
                &call.resource.group,
                &call.resource.plural,
                call.target.name.as_deref().unwrap_or(""),
            ));
        }
        let replicas = wanted["spec"]["replicas"].as_i64().unwrap_or(0);
        if replicas < 0 {
            let cause = Cause::invalid(
                "spec.replicas",
                &replicas.into(),
                "must be greater than or equal to 0",
            );
            return Err(ApiError::invalid(
                "autoscaling",
                "Scale",
                call.target.name.as_deref().unwrap_or(""),
                vec![cause],
            ));
        }
        let mut value = crud::serve_object(&call.resource, &old);
        set(&mut value, &paths.spec, replicas.into());
        crud::update(call, transaction, &old, value, dry_run, "Scale")
    })?;
    Ok(reply::object(200, &scale(&paths, &stored), call.accept.yaml))
}

fn set(object: &mut Value, pointer: &str, value: Value) {
    let mut place = object;
    for part in pointer.split('/').filter(|part| !part.is_empty()) {
        place = &mut place[part];
    }
    *place = value;
}

fn scale(paths: &Paths, object: &Value) -> Value {
    let number = |path: &str| object.pointer(path).and_then(Value::as_i64).unwrap_or(0);
    let selector = match &paths.selector {
        Some(path) => object.pointer(path).and_then(Value::as_str).unwrap_or("").to_owned(),
        None => selector_text(&object["spec"]["selector"]),
    };
    let metadata = &object["metadata"];
    let mut status = json!({"replicas": number(&paths.status)});
    if !selector.is_empty() {
        status["selector"] = selector.into();
    }
    json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1",
        "metadata": {
            "name": metadata["name"], "namespace": metadata["namespace"], "uid": metadata["uid"],
            "resourceVersion": metadata["resourceVersion"],
            "creationTimestamp": metadata["creationTimestamp"],
        },
        "spec": {"replicas": number(&paths.spec)},
        "status": status,
    })
}

/// A label selector as `kubectl -l` takes it.
pub(super) fn selector_text(selector: &Value) -> String {
    let mut terms: Vec<String> = selector["matchLabels"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or("")))
        .collect();
    for expression in selector["matchExpressions"].as_array().into_iter().flatten() {
        let key = expression["key"].as_str().unwrap_or("");
        let values: Vec<&str> = expression["values"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        terms.push(match expression["operator"].as_str() {
            Some("In") => format!("{key} in ({})", values.join(",")),
            Some("NotIn") => format!("{key} notin ({})", values.join(",")),
            Some("DoesNotExist") => format!("!{key}"),
            _ => key.to_owned(),
        });
    }
    terms.join(",")
}
