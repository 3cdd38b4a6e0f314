//! Who am I, and what may I do: the one user is the administrator, who may do everything.

use hyper::Method;
use serde_json::{Value, json};

use super::error::ApiError;
use super::http::Call;
use super::registry::REVIEWS;
use super::reply::{self, Reply};
use super::request::Target;
use super::{Api, body, meta, tls};

/// Is this a path of a review?
pub(super) fn is_review(target: &Target) -> bool {
    REVIEWS.iter().any(|review| {
        review.group == target.group
            && review.version == target.version
            && review.plural == target.resource
    })
}

/// Answers a review.
pub(super) fn answer(
    api: &Api,
    method: &Method,
    target: &Target,
    bytes: &[u8],
    content_type: Option<&str>,
) -> Result<Reply, ApiError> {
    if *method != Method::POST || target.name.is_some() {
        return Err(ApiError::method_not_allowed());
    }
    let content_type = content_type.unwrap_or("");
    // kubectl asks about itself in protobuf; every such question has the same answer, whatever
    // its specification.
    let about_self = target.resource.starts_with("selfsubject");
    let mut review = match REVIEWS.iter().find(|review| review.plural == target.resource) {
        Some(kind) if about_self && content_type.contains("protobuf") => json!({
            "apiVersion": format!("{}/{}", kind.group, kind.version), "kind": kind.kind,
            "spec": {},
        }),
        _ => object(body::decode(content_type, bytes)?.value)?,
    };
    let status = match target.resource.as_str() {
        "selfsubjectreviews" => json!({"userInfo": administrator()}),
        "tokenreviews" => {
            let token = review["spec"]["token"].as_str().unwrap_or("");
            if is_known_token(api, token) {
                json!({"authenticated": true, "user": administrator()})
            } else {
                json!({"authenticated": false, "error": "unknown token"})
            }
        }
        "selfsubjectrulesreviews" => json!({
            "incomplete": false,
            "resourceRules": [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}],
            "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}],
        }),
        _ => json!({"allowed": true, "reason": "the lab's only user may do everything"}),
    };
    review["status"] = status;
    meta::metadata(&mut review).insert("creationTimestamp".into(), Value::Null);
    Ok(reply::object(201, &review, false))
}

fn object(value: Value) -> Result<Value, ApiError> {
    if !value.is_object() || value.get("spec").is_some_and(|spec| !spec.is_object()) {
        return Err(ApiError::bad_request("the body must be an object, and so must its spec"));
    }
    Ok(value)
}

fn administrator() -> Value {
    json!({"username": "kubernetes-admin", "groups": ["system:masters", "system:authenticated"]})
}

/// Is it the administrator's token, or one issued for a service account?
pub(super) fn is_known_token(api: &Api, token: &str) -> bool {
    let matches = |known: &str| {
        known.len() == token.len()
            && known.bytes().zip(token.bytes()).fold(0, |sum, (a, b)| sum | (a ^ b)) == 0
    };
    matches(&api.material.token)
        || api.tokens().iter().any(|(known, end)| matches(known) && *end > jiff::Timestamp::now())
}

/// `serviceaccounts/token`.
pub(super) fn token(call: &Call) -> Result<Reply, ApiError> {
    let account = call.api.store.get(&call.key()).ok_or_else(|| call.not_found())?;
    let mut request = object(body::decode(&call.content_type, &call.body)?.value)?;
    let seconds = request["spec"]["expirationSeconds"].as_i64().unwrap_or(3600).clamp(600, 1 << 32);
    let end = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds);
    let token = tls::random_hex(32).map_err(ApiError::internal)?;
    let mut tokens = call.api.tokens();
    tokens.retain(|(_, end)| *end > jiff::Timestamp::now());
    tokens.push((token.clone(), end));
    drop(tokens);
    request["apiVersion"] = "authentication.k8s.io/v1".into();
    request["kind"] = "TokenRequest".into();
    request["metadata"] = json!({
        "name": account["metadata"]["name"], "namespace": account["metadata"]["namespace"],
        "creationTimestamp": meta::now(),
    });
    request["spec"]["expirationSeconds"] = seconds.into();
    request["status"] = json!({"token": token, "expirationTimestamp": meta::timestamp(end)});
    Ok(reply::object(201, &request, false))
}
