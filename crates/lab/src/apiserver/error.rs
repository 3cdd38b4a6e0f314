//! Errors as clients see them: an HTTP status with a `meta/v1 Status` body.

use serde_json::{Value, json};

/// A refused request.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    /// HTTP status.
    pub code: u16,
    /// Machine-readable reason, e.g. `NotFound`.
    pub reason: &'static str,
    /// What people read.
    pub message: String,
    /// `Status.details`, null if there is nothing to add.
    pub details: Value,
}

/// One thing wrong with an object; several make an `Invalid` error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// For instance `FieldValueRequired`.
    pub reason: &'static str,
    /// Path of the field, e.g. `spec.ports[0].port`.
    pub field: String,
    /// What is wrong, without the field's name.
    pub message: String,
}

impl Cause {
    /// A field that must be given.
    pub fn required(field: impl Into<String>, hint: &str) -> Self {
        let message = match hint {
            "" => "Required value".to_owned(),
            hint => format!("Required value: {hint}"),
        };
        Self { reason: "FieldValueRequired", field: field.into(), message }
    }

    /// A field with a wrong value.
    pub fn invalid(field: impl Into<String>, value: &Value, hint: &str) -> Self {
        let message = format!("Invalid value: {}: {hint}", show(value));
        Self { reason: "FieldValueInvalid", field: field.into(), message }
    }

    /// A value outside an enumeration.
    pub fn not_supported(field: impl Into<String>, value: &Value, allowed: &[&str]) -> Self {
        let allowed: Vec<String> = allowed.iter().map(|value| format!("{value:?}")).collect();
        let message =
            format!("Unsupported value: {}: supported values: {}", show(value), allowed.join(", "));
        Self { reason: "FieldValueNotSupported", field: field.into(), message }
    }

    /// A value of another type than the schema's.
    pub fn type_invalid(field: impl Into<String>, value: &Value, hint: &str) -> Self {
        let message = format!("Invalid value: {}: {hint}", show_type(value));
        Self { reason: "FieldValueTypeInvalid", field: field.into(), message }
    }

    /// A list item that occurs twice.
    pub fn duplicate(field: impl Into<String>, value: &Value) -> Self {
        let message = format!("Duplicate value: {}", show(value));
        Self { reason: "FieldValueDuplicate", field: field.into(), message }
    }

    /// A field that may not be set or changed.
    pub fn forbidden(field: impl Into<String>, hint: &str) -> Self {
        let message = format!("Forbidden: {hint}");
        Self { reason: "FieldValueForbidden", field: field.into(), message }
    }

    /// A list or text that is too long.
    pub fn too_long(field: impl Into<String>, limit: usize) -> Self {
        let message = format!("Too long: may not be more than {limit} bytes");
        Self { reason: "FieldValueTooLong", field: field.into(), message }
    }
}

fn show(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::String(text) => format!("{text:?}"),
        other => other.to_string(),
    }
}

fn show_type(value: &Value) -> String {
    let name = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    format!("{name:?}")
}

impl ApiError {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self { code, reason, message: message.into(), details: Value::Null }
    }

    /// No such object.
    pub fn not_found(group: &str, resource: &str, name: &str) -> Self {
        let mut error = Self::new(
            404,
            "NotFound",
            format!("{} {name:?} not found", qualified(resource, group)),
        );
        error.details = details(group, resource, name);
        error
    }

    /// No such path.
    pub fn no_such_path() -> Self {
        let mut error =
            Self::new(404, "NotFound", "the server could not find the requested resource");
        error.details = json!({});
        error
    }

    /// An object of this name exists.
    pub fn already_exists(group: &str, resource: &str, name: &str) -> Self {
        let mut error = Self::new(
            409,
            "AlreadyExists",
            format!("{} {name:?} already exists", qualified(resource, group)),
        );
        error.details = details(group, resource, name);
        error
    }

    /// The object does not permit the change in its present state.
    pub fn conflict(group: &str, resource: &str, name: &str, why: &str) -> Self {
        let mut error = Self::new(
            409,
            "Conflict",
            format!(
                "Operation cannot be fulfilled on {} {name:?}: {why}",
                qualified(resource, group)
            ),
        );
        error.details = details(group, resource, name);
        error
    }

    /// The client's copy of the object is out of date.
    pub fn modified(group: &str, resource: &str, name: &str) -> Self {
        let why = "the object has been modified; please apply your changes to the latest version \
                   and try again";
        Self::conflict(group, resource, name, why)
    }

    /// The object breaks rules of its kind.
    pub fn invalid(group: &str, kind: &str, name: &str, causes: Vec<Cause>) -> Self {
        let texts: Vec<String> =
            causes.iter().map(|cause| format!("{}: {}", cause.field, cause.message)).collect();
        let text = match texts.as_slice() {
            [one] => one.clone(),
            many => format!("[{}]", many.join(", ")),
        };
        let subject = qualified(kind, group);
        let mut error = Self::new(422, "Invalid", format!("{subject} {name:?} is invalid: {text}"));
        error.details = details(group, kind, name);
        error.details["causes"] = causes
            .into_iter()
            .map(|cause| json!({"reason": cause.reason, "message": cause.message, "field": cause.field}))
            .collect();
        error
    }

    /// The request itself makes no sense.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// The requester is unknown.
    pub fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// The requester may not do this.
    pub fn forbidden(group: &str, resource: &str, name: &str, why: &str) -> Self {
        let mut error = Self::new(
            403,
            "Forbidden",
            format!("{} {name:?} is forbidden: {why}", qualified(resource, group)),
        );
        error.details = details(group, resource, name);
        error
    }

    /// The verb is not served for this path.
    pub fn method_not_allowed() -> Self {
        let mut error = Self::new(
            405,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource",
        );
        error.details = json!({});
        error
    }

    /// No representation that the client would accept.
    pub fn not_acceptable(message: impl Into<String>) -> Self {
        Self::new(406, "NotAcceptable", message)
    }

    /// The body is in a format that is not read here.
    pub fn unsupported_media_type(message: impl Into<String>) -> Self {
        Self::new(415, "UnsupportedMediaType", message)
    }

    /// The body is larger than the server takes.
    pub fn too_large(limit: usize) -> Self {
        let message =
            format!("Request entity too large: limit is {limit} bytes; make the object smaller");
        Self::new(413, "RequestEntityTooLarge", message)
    }

    /// The object is larger than etcd would keep; said as an API server passes it on.
    pub fn too_large_to_keep() -> Self {
        Self::new(500, "", "etcdserver: request is too large")
    }

    /// The asked-for revision is no longer kept.
    pub fn expired(asked: u64, oldest: u64) -> Self {
        Self::new(410, "Expired", format!("too old resource version: {asked} ({oldest})"))
    }

    /// The asked-for revision does not exist yet.
    pub fn too_new(asked: u64, current: u64) -> Self {
        let message = format!("Too large resource version: {asked}, current: {current}");
        let mut error = Self::new(504, "Timeout", message.clone());
        error.details = json!({
            "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
            "retryAfterSeconds": 1,
        });
        error
    }

    /// A fault of the server.
    pub fn internal(message: impl std::fmt::Display) -> Self {
        Self::new(500, "InternalError", format!("Internal error occurred: {message}"))
    }

    /// Other field managers own what an apply would change.
    pub fn apply_conflict(message: String, causes: Vec<Value>) -> Self {
        let mut error = Self::new(409, "Conflict", message);
        error.details = json!({ "causes": causes });
        error
    }

    /// Too many requests of a kind that must wait, e.g. an eviction.
    pub fn too_many_requests(message: impl Into<String>) -> Self {
        Self::new(429, "TooManyRequests", message)
    }

    /// The `Status` object.
    pub fn status(&self) -> Value {
        let mut status = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code,
        });
        if !self.details.is_null() {
            status["details"] = self.details.clone();
        }
        status
    }
}

impl std::fmt::Display for ApiError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}

/// `deployments.apps`, `pods`.
pub fn qualified(resource: &str, group: &str) -> String {
    if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") }
}

fn details(group: &str, kind: &str, name: &str) -> Value {
    let mut details = json!({ "name": name, "kind": kind });
    if !group.is_empty() {
        details["group"] = group.into();
    }
    details
}
