//! Protobuf bodies.

use serde_json::Value;

use super::error::ApiError;

/// Decodes a body that begins with the Kubernetes magic number.
pub(super) fn decode(_body: &[u8]) -> Result<Value, ApiError> {
    Err(ApiError::unsupported_media_type(
        "protobuf bodies are not read here; send application/json",
    ))
}
