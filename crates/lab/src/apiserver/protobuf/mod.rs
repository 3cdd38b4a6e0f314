//! Protobuf bodies, which `kubectl create` sends for built-in kinds, turned into JSON.
//!
//! What a field is (text, number, list, map, message) is known from the kind's JSON schema; only
//! the numbers of the fields are not, and stand in `fields.txt`. A field that is not known is an
//! error: leaving it out would store less than was asked for.

mod wire;

use std::{collections::HashMap, sync::LazyLock};

use base64::Engine as _;
use serde_json::{Map, Value};

use self::wire::{Field, fields, number};
use super::{
    builtin::{DEFINITIONS, KINDS},
    error::ApiError,
    schema::Schema,
};

/// Before every body (`k8s.io/apimachinery/pkg/runtime/serializer/protobuf`).
const MAGIC: &[u8] = b"k8s\0";
/// Messages within messages; schemas refer to themselves.
const DEPTH: usize = 64;
/// Kinds that are sent but not stored.
const UNSTORED: [(&str, &str, &str); 4] = [
    ("authentication.k8s.io/v1", "TokenRequest", "io.k8s.api.authentication.v1.TokenRequest"),
    ("autoscaling/v1", "Scale", "io.k8s.api.autoscaling.v1.Scale"),
    ("meta.k8s.io/v1", "DeleteOptions", DELETE_OPTIONS),
    ("v1", "DeleteOptions", DELETE_OPTIONS),
];
const DELETE_OPTIONS: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions";

/// A field of a message by its number.
#[derive(Clone, Copy)]
enum Member {
    /// A property of this name.
    Property(&'static str),
    /// A message whose properties are the outer one's in JSON.
    Embedded(&'static str),
}

type Members = HashMap<u32, Member>;

/// Members of all messages by the messages' names.
static MESSAGES: LazyLock<HashMap<&str, Members>> = LazyLock::new(|| {
    let mut messages: HashMap<&str, Members> = HashMap::new();
    let (mut message, mut next) = ("", 1);
    for line in include_str!("fields.txt").lines().filter(|line| !line.starts_with('#')) {
        let names = match line.split_once(": ") {
            Some((name, rest)) => {
                (message, next) = (name, 1);
                rest
            }
            None => line,
        };
        for name in names.split_whitespace() {
            if let Some(jump) = name.strip_prefix('=').and_then(|jump| jump.parse().ok()) {
                next = jump;
                continue;
            }
            let member = name.strip_prefix('+').map_or(Member::Property(name), Member::Embedded);
            messages.entry(message).or_default().insert(next, member);
            next += 1;
        }
    }
    messages
});

/// Decodes a body that begins with the Kubernetes magic number.
pub(super) fn decode(body: &[u8]) -> Result<Value, ApiError> {
    let envelope = body
        .strip_prefix(MAGIC)
        .ok_or_else(|| malformed("it does not begin with the Kubernetes magic number"))?;
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    // runtime.Unknown
    for field in fields(envelope) {
        match field? {
            (1, Field::Bytes(meta)) => {
                // runtime.TypeMeta
                for field in fields(meta) {
                    match field? {
                        (1, Field::Bytes(text)) => api_version = utf8(text)?,
                        (2, Field::Bytes(text)) => kind = utf8(text)?,
                        _ => {}
                    }
                }
            }
            (2, Field::Bytes(bytes)) => raw = bytes,
            (3, Field::Bytes(encoding)) if !encoding.is_empty() => {
                return Err(malformed("its content is encoded once more"));
            }
            _ => {}
        }
    }
    let definition = definition(&api_version, &kind).ok_or_else(|| {
        ApiError::unsupported_media_type(format!(
            "{kind} of {api_version} is not read as protobuf; send it as application/json"
        ))
    })?;
    let Some(node) = DEFINITIONS.get(definition) else {
        return Err(ApiError::internal(format!("no schema {definition}")));
    };
    let mut object = message(short(definition), Schema::new(node, &DEFINITIONS), raw, DEPTH)?;
    object.insert("apiVersion".into(), api_version.into());
    object.insert("kind".into(), kind.into());
    Ok(Value::Object(object))
}

fn definition(api_version: &str, kind: &str) -> Option<&'static str> {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let stored = KINDS
        .iter()
        .find(|known| known.group == group && known.version == version && known.kind == kind);
    let unstored = UNSTORED.iter().find(|known| (known.0, known.1) == (api_version, kind));
    stored.map(|known| known.definition).or_else(|| unstored.map(|known| known.2))
}

/// The name of a definition in `fields.txt`.
fn short(definition: &str) -> &str {
    let api = definition.strip_prefix("io.k8s.api.");
    let machinery = definition.strip_prefix("io.k8s.apimachinery.pkg.apis.");
    api.or(machinery).unwrap_or(definition)
}

fn message(
    name: &str,
    schema: Schema<'_>,
    bytes: &[u8],
    depth: usize,
) -> Result<Map<String, Value>, ApiError> {
    let depth = depth.checked_sub(1).ok_or_else(|| malformed("it is nested too deeply"))?;
    let unknown = |number: u32| {
        ApiError::bad_request(format!(
            "field {number} of the protobuf message {name} is not known here; send the object as \
             application/json"
        ))
    };
    let members = MESSAGES.get(name);
    let mut object = Map::new();
    for field in fields(bytes) {
        let (number, field) = field?;
        match members.and_then(|members| members.get(&number)) {
            Some(Member::Property(property)) => {
                let schema = schema.property(property).ok_or_else(|| unknown(number))?;
                insert(&mut object, property, schema, field, depth)?;
            }
            Some(Member::Embedded(inner)) => {
                object.extend(message(inner, schema, field.bytes()?, depth)?);
            }
            None => return Err(unknown(number)),
        }
    }
    Ok(object)
}

/// Sets, or for lists and maps extends, a property.
fn insert(
    object: &mut Map<String, Value>,
    name: &str,
    schema: Schema<'_>,
    field: Field<'_>,
    depth: usize,
) -> Result<(), ApiError> {
    if let Some(items) = schema.items() {
        let item = value(items, field, depth)?.unwrap_or_else(|| "".into());
        if let Value::Array(list) = object.entry(name).or_insert_with(|| Value::Array(Vec::new())) {
            list.push(item);
        }
        return Ok(());
    }
    if let Some(values) = schema.additional() {
        let (mut key, mut item) = (String::new(), None);
        for field in fields(field.bytes()?) {
            match field? {
                (1, Field::Bytes(text)) => key = utf8(text)?,
                (2, field) => item = value(values, field, depth)?,
                _ => return Err(malformed("a map entry has a third field")),
            }
        }
        if let Value::Object(map) = object.entry(name).or_insert_with(|| Value::Object(Map::new()))
        {
            map.insert(key, item.unwrap_or_else(|| "".into()));
        }
        return Ok(());
    }
    if let Some(value) = value(schema, field, depth)? {
        object.insert(name.to_owned(), value);
    }
    Ok(())
}

/// A single value. None: text or a time that is empty, which stands for none.
fn value(schema: Schema<'_>, field: Field<'_>, depth: usize) -> Result<Option<Value>, ApiError> {
    let definition = schema.name().unwrap_or("");
    match definition.rsplit('.').next().unwrap_or("") {
        "Quantity" => return Ok(Some(first_text(field.bytes()?, 1)?.into())),
        "Time" | "MicroTime" => return time(field.bytes()?),
        "IntOrString" => return int_or_string(field.bytes()?).map(Some),
        "FieldsV1" | "RawExtension" => return raw(field.bytes()?),
        _ => {}
    }
    Ok(match schema.kind() {
        Some("string") if schema.format() == Some("byte") => {
            Some(base64::engine::general_purpose::STANDARD.encode(field.bytes()?).into())
        }
        Some("string") => {
            Some(utf8(field.bytes()?)?).filter(|text| !text.is_empty()).map(Into::into)
        }
        Some("integer") => Some(field.integer()?.into()),
        Some("boolean") => Some((field.integer()? != 0).into()),
        _ => Some(message(short(definition), schema, field.bytes()?, depth)?.into()),
    })
}

fn first_text(bytes: &[u8], wanted: u32) -> Result<String, ApiError> {
    for field in fields(bytes) {
        if let (number, Field::Bytes(text)) = field?
            && number == wanted
        {
            return utf8(text);
        }
    }
    Ok(String::new())
}

/// Seconds and nanoseconds since 1970.
fn time(bytes: &[u8]) -> Result<Option<Value>, ApiError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let nanoseconds = i32::try_from(number(bytes, 2)?).map_err(|_| malformed("a time"))?;
    let time = jiff::Timestamp::new(number(bytes, 1)?, nanoseconds)
        .map_err(|error| malformed(format!("a time: {error}")))?;
    Ok(Some(time.to_string().into()))
}

fn int_or_string(bytes: &[u8]) -> Result<Value, ApiError> {
    match number(bytes, 1)? {
        0 => Ok(number(bytes, 2)?.into()),
        _ => Ok(first_text(bytes, 3)?.into()),
    }
}

/// JSON within.
fn raw(bytes: &[u8]) -> Result<Option<Value>, ApiError> {
    let text = first_text(bytes, 1)?;
    if text.is_empty() {
        return Ok(None);
    }
    serde_json::from_str(&text).map(Some).map_err(|error| malformed(format!("raw JSON: {error}")))
}

fn utf8(bytes: &[u8]) -> Result<String, ApiError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| malformed("text is not UTF-8"))
}

fn malformed(why: impl std::fmt::Display) -> ApiError {
    ApiError::bad_request(format!("the body is not a Kubernetes protobuf message: {why}"))
}

#[cfg(test)]
mod tests;
