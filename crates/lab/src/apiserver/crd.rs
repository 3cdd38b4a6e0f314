//! Custom resource definitions: which resources they add, and what is checked of them.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::builtin;
use super::registry::Resource;
use super::schema::Definitions;

/// What only custom resources have.
#[derive(Debug)]
pub struct Custom {
    /// Additional printer columns as the definition gives them.
    pub columns: Vec<Value>,
    /// Fields for field selectors.
    pub selectable: Vec<String>,
    /// JSON paths of the scale subresource: spec replicas, status replicas, label selector.
    pub scale: Option<ScalePaths>,
    /// The schema as given, for expression rules.
    pub schema: Value,
    /// A warning for every request, if the version is deprecated.
    pub deprecation: Option<String>,
}

/// Where the scale subresource reads and writes.
#[derive(Clone, Debug, Default)]
pub struct ScalePaths {
    /// For instance `.spec.replicas`.
    pub spec: String,
    /// For instance `.status.replicas`.
    pub status: String,
    /// For instance `.status.selector`.
    pub selector: Option<String>,
}

/// The resources that a definition adds: one per served version.
pub(super) fn resources(definition: &Value) -> Vec<Resource> {
    let spec = &definition["spec"];
    let versions = spec["versions"].as_array().map_or(&[][..], Vec::as_slice);
    let served = versions.iter().filter(|version| version["served"] == true);
    served.map(|version| resource(spec, version)).collect()
}

fn resource(spec: &Value, version: &Value) -> Resource {
    let names = &spec["names"];
    let text = |value: &Value| value.as_str().unwrap_or("").to_owned();
    let texts = |value: &Value| -> Vec<String> {
        value
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect()
    };
    let (group, kind) = (text(&spec["group"]), text(&names["kind"]));
    let version_name = text(&version["name"]);
    let reversed: Vec<&str> = group.split('.').rev().collect();
    let definition = format!("{}.{version_name}.{kind}", reversed.join("."));
    let schema = version["schema"]["openAPIV3Schema"].clone();
    let mut subresources = Vec::new();
    for name in ["scale", "status"] {
        if version["subresources"][name].is_object() {
            subresources.push(name.to_owned());
        }
    }
    let plural = text(&names["plural"]);
    Resource {
        list_kind: text(&names["listKind"]),
        singular: text(&names["singular"]),
        short_names: texts(&names["shortNames"]),
        categories: texts(&names["categories"]),
        namespaced: spec["scope"] == "Namespaced",
        subresources,
        storage: format!("{group}/{plural}").into(),
        definitions: Arc::new(definitions(&definition, &schema, &group, &version_name, &kind)),
        definition,
        generation: true,
        custom: Some(Custom {
            columns: version["additionalPrinterColumns"].as_array().cloned().unwrap_or_default(),
            selectable: version["selectableFields"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|field| field["jsonPath"].as_str())
                .map(|path| path.trim_start_matches('.').to_owned())
                .collect(),
            scale: version["subresources"]["scale"].is_object().then(|| {
                let scale = &version["subresources"]["scale"];
                ScalePaths {
                    spec: text(&scale["specReplicasPath"]),
                    status: text(&scale["statusReplicasPath"]),
                    selector: scale["labelSelectorPath"].as_str().map(str::to_owned),
                }
            }),
            schema,
            deprecation: (version["deprecated"] == true).then(
                || match version["deprecationWarning"].as_str() {
                    Some(text) => text.to_owned(),
                    None => format!("{group}/{version_name} {kind} is deprecated"),
                },
            ),
        }),
        group,
        version: version_name,
        kind,
        plural,
    }
}

/// The kind's own schema, completed by what every object has, and what that refers to.
fn definitions(name: &str, schema: &Value, group: &str, version: &str, kind: &str) -> Definitions {
    const COMMON: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.";
    let mut definitions: Definitions = builtin::DEFINITIONS
        .iter()
        .filter(|(name, _)| name.starts_with(COMMON))
        .map(|(name, node)| (name.clone(), node.clone()))
        .collect();
    let mut own = schema.as_object().cloned().unwrap_or_default();
    own.insert("type".into(), "object".into());
    own.insert(
        "x-kubernetes-group-version-kind".into(),
        json!([{"group": group, "version": version, "kind": kind}]),
    );
    let properties = own.entry("properties").or_insert_with(|| Value::Object(Map::new()));
    let pod = &builtin::DEFINITIONS["io.k8s.api.core.v1.Pod"]["properties"];
    properties["apiVersion"] = pod["apiVersion"].clone();
    properties["kind"] = pod["kind"].clone();
    properties["metadata"] = pod["metadata"].clone();
    definitions.insert(name.to_owned(), Value::Object(own));
    definitions
}

/// The status of an accepted definition.
pub(super) fn status(definition: &Value) -> Value {
    let now = super::meta::now();
    let condition = |kind: &str, reason: &str, message: &str| {
        json!({"type": kind, "status": "True", "reason": reason, "message": message,
               "lastTransitionTime": now})
    };
    let versions = definition["spec"]["versions"].as_array().into_iter().flatten();
    let stored: Vec<&Value> =
        versions.filter(|version| version["storage"] == true).map(|v| &v["name"]).collect();
    json!({
        "acceptedNames": definition["spec"]["names"],
        "conditions": [
            condition("NamesAccepted", "NoConflicts", "no conflicts found"),
            condition("Established", "InitialNamesAccepted", "the initial names have been accepted"),
        ],
        "storedVersions": stored,
    })
}
