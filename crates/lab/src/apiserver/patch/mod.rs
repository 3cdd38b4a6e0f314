//! The four kinds of patch.

pub(super) mod apply;
pub(super) mod managed;
mod strategic;

use serde_json::Value;

use super::body;
use super::error::ApiError;
use super::registry::Resource;

/// A kind of patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// RFC 6902.
    Json,
    /// RFC 7396.
    Merge,
    /// Kubernetes' own, which merges lists by keys.
    Strategic,
    /// Server-side apply.
    Apply,
}

impl Kind {
    /// The kind by its media type.
    pub(super) fn of(content_type: &str, resource: &Resource) -> Result<Self, ApiError> {
        let media = content_type.split(';').next().unwrap_or("").trim();
        match media {
            "application/json-patch+json" => Ok(Self::Json),
            "application/merge-patch+json" => Ok(Self::Merge),
            "application/strategic-merge-patch+json" if resource.custom.is_none() => {
                Ok(Self::Strategic)
            }
            "application/apply-patch+yaml" => Ok(Self::Apply),
            other => Err(ApiError::unsupported_media_type(format!(
                "the body of the request was in an unknown format - accepted media types include: \
                 application/json-patch+json, application/merge-patch+json, {}\
                 application/apply-patch+yaml; not {other:?}",
                if resource.custom.is_none() {
                    "application/strategic-merge-patch+json, "
                } else {
                    ""
                }
            ))),
        }
    }
}

/// The object after a JSON, merge or strategic patch.
pub(super) fn apply_to(
    resource: &Resource,
    kind: Kind,
    object: &Value,
    bytes: &[u8],
) -> Result<Value, ApiError> {
    let patch = body::json(bytes)?.value;
    let mut patched = object.clone();
    match kind {
        Kind::Json => {
            let patch: json_patch::Patch = serde_json::from_value(patch)
                .map_err(|error| ApiError::bad_request(format!("not a JSON patch: {error}")))?;
            json_patch::patch(&mut patched, &patch).map_err(|error| {
                let mut refusal = ApiError::bad_request(format!(
                    "the server rejected our request due to an error in our request: {error}"
                ));
                refusal.code = 422;
                refusal.reason = "Invalid";
                refusal
            })?;
        }
        Kind::Merge => json_patch::merge(&mut patched, &patch),
        Kind::Strategic => strategic::merge(&mut patched, patch, resource.schema())?,
        Kind::Apply => {
            return Err(ApiError::unsupported_media_type(
                "apply is not served for this subresource",
            ));
        }
    }
    if !patched.is_object() {
        return Err(ApiError::bad_request("the patch would leave no object"));
    }
    Ok(patched)
}
