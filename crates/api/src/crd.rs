//! Custom resources of `cilium.io/v2`: their definitions, with structural schemas.
//!
//! The schemas hold every field of the API, those too that [`crate::convert`] refuses: a manifest
//! that names one is stored, and its status says what is not supported.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::{Value, json};

mod policy;

/// The API group.
pub const GROUP: &str = "cilium.io";
/// The only version.
pub const VERSION: &str = "v2";

/// Annotation of a `CiliumIdentity` that nobody uses, with the time since when. An agent removes it
/// before it uses the number again; the operator removes the object only with it.
pub const UNUSED_SINCE: &str = "palisade.io/unused-since";

/// What tells one definition from another.
struct Definition {
    kind: &'static str,
    plural: &'static str,
    short_names: &'static [&'static str],
    categories: &'static [&'static str],
    namespaced: bool,
    has_status: bool,
    columns: Value,
    schema: Value,
}

impl Definition {
    fn to_json(&self) -> Value {
        let subresources = if self.has_status { json!({ "status": {} }) } else { json!({}) };
        json!({
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": { "name": format!("{}.{GROUP}", self.plural) },
            "spec": {
                "group": GROUP,
                "scope": if self.namespaced { "Namespaced" } else { "Cluster" },
                "names": {
                    "kind": self.kind,
                    "listKind": format!("{}List", self.kind),
                    "plural": self.plural,
                    "singular": self.kind.to_lowercase(),
                    "shortNames": self.short_names,
                    "categories": self.categories,
                },
                "versions": [{
                    "name": VERSION,
                    "served": true,
                    "storage": true,
                    "subresources": subresources,
                    "additionalPrinterColumns": self.columns,
                    "schema": { "openAPIV3Schema": self.schema },
                }],
            },
        })
    }
}

/// All definitions as JSON, ready to apply.
#[must_use]
pub fn manifests() -> Vec<Value> {
    definitions().iter().map(Definition::to_json).collect()
}

/// All definitions.
///
/// # Panics
/// Never: the tests see to it that every definition fits the type.
#[must_use]
pub fn all() -> Vec<CustomResourceDefinition> {
    manifests()
        .into_iter()
        .map(|manifest| serde_json::from_value(manifest).expect("definitions are constant"))
        .collect()
}

fn column(name: &str, path: &str, kind: &str) -> Value {
    json!({ "name": name, "type": kind, "jsonPath": path })
}

fn wide(name: &str, path: &str) -> Value {
    json!({ "name": name, "type": "string", "jsonPath": path, "priority": 1 })
}

fn age() -> Value {
    column("Age", ".metadata.creationTimestamp", "date")
}

/// The schema of a whole object with the given fields beside the metadata.
fn object(mut fields: Value, required: &[&str]) -> Value {
    if let Some(map) = fields.as_object_mut() {
        map.insert("apiVersion".into(), json!({ "type": "string" }));
        map.insert("kind".into(), json!({ "type": "string" }));
        map.insert("metadata".into(), json!({ "type": "object" }));
    }
    let mut all = vec!["metadata"];
    all.extend(required);
    json!({ "type": "object", "properties": fields, "required": all })
}

fn string() -> Value {
    json!({ "type": "string" })
}

fn list(items: Value) -> Value {
    json!({ "type": "array", "items": items })
}

fn strings() -> Value {
    list(string())
}

fn string_map() -> Value {
    json!({ "type": "object", "additionalProperties": { "type": "string" } })
}

/// What `kubectl explain` says of a field.
fn about(text: &str, mut schema: Value) -> Value {
    schema["description"] = text.into();
    schema
}

/// What has to hold beyond the structure, in the Common Expression Language, and what to say where
/// it does not. The API server refuses what would take too long: no list of any length is looked
/// through.
fn valid(mut schema: Value, rules: &[(&str, &str)]) -> Value {
    let rules = rules.iter().map(|(rule, message)| json!({ "rule": rule, "message": message }));
    schema["x-kubernetes-validations"] = rules.collect();
    schema
}

/// A part of an object that is kept as it is.
fn opaque() -> Value {
    json!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true })
}

fn definitions() -> Vec<Definition> {
    vec![
        Definition {
            kind: "CiliumNetworkPolicy",
            plural: "ciliumnetworkpolicies",
            short_names: &["cnp", "ciliumnp"],
            categories: &["cilium", "ciliumpolicy"],
            namespaced: true,
            has_status: true,
            columns: policy::columns(),
            schema: policy::schema(),
        },
        Definition {
            kind: "CiliumClusterwideNetworkPolicy",
            plural: "ciliumclusterwidenetworkpolicies",
            short_names: &["ccnp"],
            categories: &["cilium", "ciliumpolicy"],
            namespaced: false,
            has_status: true,
            columns: policy::columns(),
            schema: policy::schema(),
        },
        Definition {
            kind: "CiliumIdentity",
            plural: "ciliumidentities",
            short_names: &["ciliumid"],
            categories: &["cilium"],
            namespaced: false,
            has_status: false,
            columns: json!([
                column("Namespace", ".metadata.labels.io\\.kubernetes\\.pod\\.namespace", "string"),
                age()
            ]),
            schema: valid(
                object(
                    json!({ "security-labels": about(
                        "The labels that the number stands for, each with its source.",
                        string_map(),
                    ) }),
                    &["security-labels"],
                ),
                &[(
                    "self.security__dash__labels == oldSelf.security__dash__labels",
                    "a number stands for the same labels as long as it exists; make a new one",
                )],
            ),
        },
        Definition {
            kind: "CiliumEndpoint",
            plural: "ciliumendpoints",
            short_names: &["cep", "ciliumep"],
            categories: &["cilium"],
            namespaced: true,
            has_status: false,
            columns: endpoint_columns(),
            schema: object(json!({ "status": endpoint_status() }), &[]),
        },
        Definition {
            kind: "CiliumNode",
            plural: "ciliumnodes",
            short_names: &["cn", "ciliumn"],
            categories: &["cilium"],
            namespaced: false,
            has_status: true,
            columns: json!([
                column(
                    "CiliumInternalIP",
                    ".spec.addresses[?(@.type==\"CiliumInternalIP\")].ip",
                    "string"
                ),
                column("InternalIP", ".spec.addresses[?(@.type==\"InternalIP\")].ip", "string"),
                age()
            ]),
            schema: object(json!({ "spec": node_spec(), "status": opaque() }), &["spec"]),
        },
    ]
}

fn endpoint_columns() -> Value {
    json!([
        column("Security Identity", ".status.identity.id", "integer"),
        wide("Ingress Enforcement", ".status.policy.ingress.state"),
        wide("Egress Enforcement", ".status.policy.egress.state"),
        column("Endpoint State", ".status.state", "string"),
        column("IPv4", ".status.networking.addressing[0].ipv4", "string"),
        column("IPv6", ".status.networking.addressing[0].ipv6", "string"),
        age()
    ])
}

fn endpoint_status() -> Value {
    let number = json!({ "type": "integer", "format": "int64" });
    let direction = json!({ "type": "object", "properties": {
        "enforcing": { "type": "boolean" },
        "state": string(),
        "allowed": list(opaque()),
        "denied": list(opaque()),
    }});
    json!({ "type": "object", "properties": {
        "id": number,
        "state": { "type": "string", "enum": [
            "creating", "waiting-for-identity", "not-ready", "waiting-to-regenerate",
            "regenerating", "restoring", "ready", "disconnecting", "disconnected", "invalid",
        ]},
        "identity": { "type": "object", "properties": { "id": number, "labels": strings() } },
        "networking": { "type": "object", "required": ["addressing"], "properties": {
            "node": string(),
            "addressing": list(json!({ "type": "object", "properties": {
                "ipv4": string(), "ipv6": string(),
            }})),
        }},
        "encryption": { "type": "object", "properties": { "key": { "type": "integer" } } },
        "policy": { "type": "object", "properties": {
            "ingress": direction, "egress": direction,
        }},
        "named-ports": list(json!({ "type": "object", "properties": {
            "name": string(), "port": { "type": "integer" }, "protocol": string(),
        }})),
        "service-account": string(),
        "external-identifiers": opaque(),
        "health": opaque(),
        "controllers": list(opaque()),
        "log": list(opaque()),
    }})
}

fn node_spec() -> Value {
    json!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true, "properties": {
        "addresses": list(json!({ "type": "object", "properties": {
            "type": string(), "ip": string(),
        }})),
        "ipam": { "type": "object", "x-kubernetes-preserve-unknown-fields": true, "properties": {
            "podCIDRs": strings(),
        }},
        "health": { "type": "object", "properties": { "ipv4": string(), "ipv6": string() } },
        "ingress": { "type": "object", "properties": { "ipv4": string(), "ipv6": string() } },
        "encryption": { "type": "object", "properties": { "key": { "type": "integer" } } },
        "bootid": string(),
        "nodeidentity": { "type": "integer", "format": "int64" },
    }})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_definition_is_one_that_kubernetes_reads() {
        let all = all();
        let names: Vec<_> = all.iter().filter_map(|crd| crd.metadata.name.as_deref()).collect();
        assert_eq!(
            names,
            [
                "ciliumnetworkpolicies.cilium.io",
                "ciliumclusterwidenetworkpolicies.cilium.io",
                "ciliumidentities.cilium.io",
                "ciliumendpoints.cilium.io",
                "ciliumnodes.cilium.io"
            ]
        );
    }

    /// Whoever writes a policy is told by the API server what it lacks.
    #[test]
    fn policies_and_identities_are_checked_as_they_are_written() {
        let messages = |kind: usize, path: &str| {
            let schema = definitions()[kind].schema.pointer(path).cloned().unwrap_or_default();
            let rules = schema["x-kubernetes-validations"].as_array().cloned().unwrap_or_default();
            assert!(
                rules.iter().all(|rule| rule["rule"].is_string() && rule["message"].is_string())
            );
            rules.len()
        };
        for policy in [0, 1] {
            let counts =
                ["", "/properties/spec", "/properties/specs/items"].map(|at| messages(policy, at));
            assert_eq!(counts, [1, 2, 2]);
        }
        assert_eq!(messages(2, ""), 1);
    }
}
