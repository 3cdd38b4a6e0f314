//! Request bodies: JSON (with duplicate fields noticed), YAML, and protobuf turned into JSON.

use std::cell::RefCell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::error::ApiError;
use super::protobuf;

/// A decoded body.
pub(super) struct Decoded {
    /// The object.
    pub value: Value,
    /// Paths of fields that occurred twice; the last one counts.
    pub duplicates: Vec<String>,
}

/// Decodes a body by its media type.
pub(super) fn decode(content_type: &str, body: &[u8]) -> Result<Decoded, ApiError> {
    let media = content_type.split(';').next().unwrap_or("").trim();
    match media {
        "" | "application/json" => json(body),
        "application/yaml" | "text/yaml" | "application/x-yaml" => yaml(body),
        "application/vnd.kubernetes.protobuf" => {
            Ok(Decoded { value: protobuf::decode(body)?, duplicates: Vec::new() })
        }
        other => Err(ApiError::unsupported_media_type(format!(
            "the body of the request was in an unknown format - accepted media types include: \
             application/json, application/yaml, application/vnd.kubernetes.protobuf; not {other:?}"
        ))),
    }
}

/// Decodes JSON.
pub(super) fn json(body: &[u8]) -> Result<Decoded, ApiError> {
    let duplicates = RefCell::new(Vec::new());
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let seed = Node { path: String::new(), duplicates: &duplicates };
    let value = seed
        .deserialize(&mut deserializer)
        .and_then(|value| deserializer.end().map(|()| value))
        .map_err(|error| ApiError::bad_request(format!("the body is not valid JSON: {error}")))?;
    Ok(Decoded { value, duplicates: duplicates.into_inner() })
}

/// Decodes YAML (of which JSON is a part, as `kubectl apply --server-side` sends).
pub(super) fn yaml(body: &[u8]) -> Result<Decoded, ApiError> {
    if body.trim_ascii_start().first() == Some(&b'{') {
        return json(body);
    }
    let text = std::str::from_utf8(body)
        .map_err(|_| ApiError::bad_request("the body is not valid UTF-8"))?;
    let value = serde_saphyr::from_str(text)
        .map_err(|error| ApiError::bad_request(format!("the body is not valid YAML: {error}")))?;
    Ok(Decoded { value, duplicates: Vec::new() })
}

/// Deserialises a value and notes fields that occur twice.
struct Node<'a> {
    path: String,
    duplicates: &'a RefCell<Vec<String>>,
}

impl Node<'_> {
    fn child(&self, path: String) -> Node<'_> {
        Node { path, duplicates: self.duplicates }
    }
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) =
            sequence.next_element_seed(self.child(format!("{}[{}]", self.path, items.len())))?
        {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(name) = map.next_key::<String>()? {
            let path = join(&self.path, &name);
            if path.len() > 64 * 1024 {
                return Err(A::Error::custom("nested too deeply"));
            }
            let value = map.next_value_seed(self.child(path.clone()))?;
            if fields.insert(name, value).is_some() {
                self.duplicates.borrow_mut().push(path);
            }
        }
        Ok(Value::Object(fields))
    }
}

/// `a` + `b` → `a.b`.
pub(super) fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplicates_are_named() {
        let decoded = json(br#"{"a": {"b": 1, "b": 2}, "c": [{"d": 1, "d": 1}]}"#).unwrap();
        assert_eq!(decoded.duplicates, ["a.b", "c[0].d"]);
        assert_eq!(decoded.value["a"]["b"], 2);
    }
}
