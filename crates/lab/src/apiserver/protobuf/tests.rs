use super::*;
use crate::apiserver::schema::Definitions;

/// What is written elsewhere as one value.
const VALUES: [&str; 6] =
    ["Quantity", "Time", "MicroTime", "IntOrString", "FieldsV1", "RawExtension"];

fn text(number: u8, bytes: &[u8]) -> Vec<u8> {
    assert!(bytes.len() < 128);
    [&[number << 3 | 2, bytes.len() as u8][..], bytes].concat()
}

fn body(api_version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
    let meta = [text(1, api_version.as_bytes()), text(2, kind.as_bytes())].concat();
    [MAGIC, &text(1, &meta), &text(2, raw)].concat()
}

#[test]
fn every_number_has_a_property() {
    let names = DEFINITIONS.keys().map(|name| (short(name), name)).collect::<HashMap<_, _>>();
    let mut missing = Vec::new();
    for (message, members) in &*MESSAGES {
        let Some(definition) = names.get(message) else { continue };
        for member in members.values() {
            if let Member::Property(name) = member
                && DEFINITIONS[*definition]["properties"].get(name).is_none()
            {
                missing.push(format!("{message}.{name}"));
            }
        }
    }
    missing.sort();
    assert!(missing.is_empty(), "{missing:?}");
}

/// The names of all messages below a definition.
fn reach(name: &str, definitions: &Definitions, found: &mut Vec<String>) {
    let last = name.rsplit('.').next().unwrap();
    let object = definitions[name].get("properties").is_some();
    if VALUES.contains(&last) || !object || found.iter().any(|known| known == name) {
        return;
    }
    found.push(name.to_owned());
    let text = definitions[name].to_string();
    for part in text.split("#/components/schemas/").skip(1) {
        reach(part.split('"').next().unwrap(), definitions, found);
    }
}

fn properties(message: &str) -> Vec<&'static str> {
    let members = MESSAGES.get(message).unwrap_or_else(|| panic!("no numbers for {message}"));
    members
        .values()
        .flat_map(|member| match member {
            Member::Property(name) => vec![*name],
            Member::Embedded(inner) => properties(inner),
        })
        .collect()
}

#[test]
fn every_property_has_a_number() {
    let mut found = Vec::new();
    for kind in KINDS.iter().filter(|kind| kind.kind != "CustomResourceDefinition") {
        reach(kind.definition, &DEFINITIONS, &mut found);
    }
    for (_, _, definition) in UNSTORED {
        reach(definition, &DEFINITIONS, &mut found);
    }
    let mut missing = Vec::new();
    for definition in found {
        let known = properties(short(&definition));
        for name in DEFINITIONS[&definition]["properties"].as_object().unwrap().keys() {
            let about_type = matches!(name.as_str(), "kind" | "apiVersion");
            if !about_type && !known.contains(&name.as_str()) {
                missing.push(format!("{}.{name}", short(&definition)));
            }
        }
    }
    // It came with 1.37; nodes report it, as JSON.
    assert_eq!(missing, ["core.v1.NodeSystemInfo.runningInUserNamespace"]);
}

#[test]
fn reads_a_config_map() {
    let metadata = [text(1, b"settings"), text(11, &[text(1, b"app"), text(2, b"x")].concat())];
    let data = [text(1, b"colour"), text(2, b"blue")].concat();
    let binary = [text(1, b"key"), text(2, &[0xff, 0])].concat();
    let raw = [text(1, &metadata.concat()), text(2, &data), text(3, &binary)].concat();
    let object = decode(&body("v1", "ConfigMap", &raw)).unwrap();
    assert_eq!(
        object,
        serde_json::json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "settings", "labels": {"app": "x"}},
            "data": {"colour": "blue"}, "binaryData": {"key": "/wA="},
        })
    );
}

#[test]
fn an_unknown_field_or_kind_is_named() {
    let error = decode(&body("v1", "ConfigMap", &text(15, b"x"))).unwrap_err().to_string();
    assert!(error.contains("field 15 of the protobuf message core.v1.ConfigMap"), "{error}");
    let error = decode(&body("example.org/v1", "Thing", b"")).unwrap_err().to_string();
    assert!(error.contains("Thing of example.org/v1"), "{error}");
    assert!(decode(b"no magic").is_err());
}

#[test]
fn no_bytes_are_too_strange() {
    let good =
        body("v1", "Pod", &[text(1, &text(1, b"pod")), text(2, &text(2, &text(1, b"c")))].concat());
    assert!(decode(&good).is_ok());
    for length in 0..good.len() {
        let _ = decode(&good[..length]);
    }
    // A generator of its own (xorshift), so that a failure can be had again.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..200_000 {
        let mut bytes = good.clone();
        for _ in 0..3 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let at = 4 + state as usize % (bytes.len() - 4);
            bytes[at] = (state >> 32) as u8;
        }
        let _ = decode(&bytes);
    }
}
