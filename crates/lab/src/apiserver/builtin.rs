//! The built-in kinds and their schemas.
//!
//! Types and descriptions come from `k8s-openapi`. It does not carry the `x-kubernetes-*` keys
//! that say how lists are merged; [`EXTENSIONS`] adds them.

use std::sync::{Arc, LazyLock};

use k8s_openapi::api;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions;
use schemars::generate::{SchemaGenerator, SchemaSettings};
use serde_json::{Map, Value, json};

use super::schema::Definitions;

/// A built-in kind.
#[derive(Debug)]
pub(super) struct Builtin {
    /// API group; empty for core.
    pub group: &'static str,
    /// Version.
    pub version: &'static str,
    /// Kind.
    pub kind: &'static str,
    /// Plural, as in URLs.
    pub plural: &'static str,
    /// Short names.
    pub short: &'static [&'static str],
    /// In namespaces?
    pub namespaced: bool,
    /// In `kubectl get all`?
    pub all: bool,
    /// Its schema's name.
    pub definition: &'static str,
    /// Subresources.
    pub subresources: &'static [&'static str],
    /// `metadata.generation` counts changes of the specification.
    pub generation: bool,
}

macro_rules! kinds {
    ($($group:literal $version:literal $kind:literal $plural:literal $short:expr, $scope:ident $all:ident $generation:ident $definition:literal $sub:expr;)*) => {
        &[$(Builtin {
            group: $group, version: $version, kind: $kind, plural: $plural, short: &$short,
            namespaced: kinds!(@scope $scope), all: kinds!(@all $all),
            definition: $definition, subresources: &$sub, generation: kinds!(@generation $generation),
        }),*]
    };
    (@scope namespaced) => { true };
    (@scope cluster) => { false };
    (@all all) => { true };
    (@all only) => { false };
    (@generation counted) => { true };
    (@generation plain) => { false };
}

/// All built-in kinds.
pub(super) const KINDS: &[Builtin] = kinds! {
    "" "v1" "ConfigMap" "configmaps" ["cm"], namespaced only plain "io.k8s.api.core.v1.ConfigMap" [];
    "" "v1" "Endpoints" "endpoints" ["ep"], namespaced only plain "io.k8s.api.core.v1.Endpoints" [];
    "" "v1" "Event" "events" ["ev"], namespaced only plain "io.k8s.api.core.v1.Event" [];
    "" "v1" "Namespace" "namespaces" ["ns"], cluster only plain "io.k8s.api.core.v1.Namespace" ["finalize", "status"];
    "" "v1" "Node" "nodes" ["no"], cluster only plain "io.k8s.api.core.v1.Node" ["status"];
    "" "v1" "Pod" "pods" ["po"], namespaced all counted "io.k8s.api.core.v1.Pod" ["attach", "binding", "eviction", "exec", "log", "portforward", "status"];
    "" "v1" "Secret" "secrets" [], namespaced only plain "io.k8s.api.core.v1.Secret" [];
    "" "v1" "Service" "services" ["svc"], namespaced all plain "io.k8s.api.core.v1.Service" ["status"];
    "" "v1" "ServiceAccount" "serviceaccounts" ["sa"], namespaced only plain "io.k8s.api.core.v1.ServiceAccount" ["token"];
    "apps" "v1" "DaemonSet" "daemonsets" ["ds"], namespaced all counted "io.k8s.api.apps.v1.DaemonSet" ["status"];
    "apps" "v1" "Deployment" "deployments" ["deploy"], namespaced all counted "io.k8s.api.apps.v1.Deployment" ["scale", "status"];
    "apps" "v1" "ReplicaSet" "replicasets" ["rs"], namespaced all counted "io.k8s.api.apps.v1.ReplicaSet" ["scale", "status"];
    "apps" "v1" "StatefulSet" "statefulsets" ["sts"], namespaced all counted "io.k8s.api.apps.v1.StatefulSet" ["scale", "status"];
    "apiextensions.k8s.io" "v1" "CustomResourceDefinition" "customresourcedefinitions" ["crd", "crds"], cluster only counted "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.CustomResourceDefinition" ["status"];
    "coordination.k8s.io" "v1" "Lease" "leases" [], namespaced only plain "io.k8s.api.coordination.v1.Lease" [];
    "discovery.k8s.io" "v1" "EndpointSlice" "endpointslices" [], namespaced only counted "io.k8s.api.discovery.v1.EndpointSlice" [];
    "events.k8s.io" "v1" "Event" "events" ["ev"], namespaced only plain "io.k8s.api.events.v1.Event" [];
    "networking.k8s.io" "v1" "NetworkPolicy" "networkpolicies" ["netpol"], namespaced only counted "io.k8s.api.networking.v1.NetworkPolicy" [];
    "policy" "v1" "PodDisruptionBudget" "poddisruptionbudgets" ["pdb"], namespaced only counted "io.k8s.api.policy.v1.PodDisruptionBudget" ["status"];
    "rbac.authorization.k8s.io" "v1" "ClusterRole" "clusterroles" [], cluster only plain "io.k8s.api.rbac.v1.ClusterRole" [];
    "rbac.authorization.k8s.io" "v1" "ClusterRoleBinding" "clusterrolebindings" [], cluster only plain "io.k8s.api.rbac.v1.ClusterRoleBinding" [];
    "rbac.authorization.k8s.io" "v1" "Role" "roles" [], namespaced only plain "io.k8s.api.rbac.v1.Role" [];
    "rbac.authorization.k8s.io" "v1" "RoleBinding" "rolebindings" [], namespaced only plain "io.k8s.api.rbac.v1.RoleBinding" [];
};

/// What a list or map field says about merging.
enum Merge {
    /// List: `x-kubernetes-list-type: map` with these keys, and a strategic merge by the first
    /// (or by none).
    Keyed { keys: &'static [&'static str], strategic: bool, retain: bool },
    /// List of distinct scalars; merged strategically too if so.
    Set { strategic: bool },
    /// List with a strategic merge key, but atomic for apply.
    StrategicOnly(&'static str),
    /// Map: strategic merge clears keys that the patch does not retain.
    RetainKeys,
}

const fn keyed(keys: &'static [&'static str]) -> Merge {
    Merge::Keyed { keys, strategic: true, retain: false }
}

const fn retained(keys: &'static [&'static str]) -> Merge {
    Merge::Keyed { keys, strategic: true, retain: true }
}

const fn apply_only(keys: &'static [&'static str]) -> Merge {
    Merge::Keyed { keys, strategic: false, retain: false }
}

/// (definition, field, how it merges). Lists that are not named here are atomic, which is said
/// explicitly in the served schema only where a reader would look for it.
const EXTENSIONS: &[(&str, &str, Merge)] = &[
    (
        "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta",
        "finalizers",
        Merge::Set { strategic: true },
    ),
    ("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta", "ownerReferences", keyed(&["uid"])),
    ("io.k8s.api.core.v1.PodSpec", "containers", keyed(&["name"])),
    ("io.k8s.api.core.v1.PodSpec", "initContainers", keyed(&["name"])),
    ("io.k8s.api.core.v1.PodSpec", "ephemeralContainers", keyed(&["name"])),
    ("io.k8s.api.core.v1.PodSpec", "volumes", retained(&["name"])),
    ("io.k8s.api.core.v1.PodSpec", "imagePullSecrets", keyed(&["name"])),
    ("io.k8s.api.core.v1.PodSpec", "hostAliases", keyed(&["ip"])),
    (
        "io.k8s.api.core.v1.PodSpec",
        "topologySpreadConstraints",
        keyed(&["topologyKey", "whenUnsatisfiable"]),
    ),
    ("io.k8s.api.core.v1.PodSpec", "schedulingGates", keyed(&["name"])),
    ("io.k8s.api.core.v1.PodSpec", "resourceClaims", retained(&["name"])),
    ("io.k8s.api.core.v1.Container", "ports", keyed(&["containerPort", "protocol"])),
    ("io.k8s.api.core.v1.Container", "env", keyed(&["name"])),
    ("io.k8s.api.core.v1.Container", "volumeMounts", keyed(&["mountPath"])),
    ("io.k8s.api.core.v1.Container", "volumeDevices", keyed(&["devicePath"])),
    ("io.k8s.api.core.v1.EphemeralContainer", "ports", keyed(&["containerPort", "protocol"])),
    ("io.k8s.api.core.v1.EphemeralContainer", "env", keyed(&["name"])),
    ("io.k8s.api.core.v1.EphemeralContainer", "volumeMounts", keyed(&["mountPath"])),
    ("io.k8s.api.core.v1.EphemeralContainer", "volumeDevices", keyed(&["devicePath"])),
    ("io.k8s.api.core.v1.ResourceRequirements", "claims", apply_only(&["name"])),
    ("io.k8s.api.core.v1.PodStatus", "conditions", keyed(&["type"])),
    ("io.k8s.api.core.v1.PodStatus", "podIPs", keyed(&["ip"])),
    ("io.k8s.api.core.v1.PodStatus", "hostIPs", Merge::StrategicOnly("ip")),
    ("io.k8s.api.core.v1.ServiceSpec", "ports", keyed(&["port", "protocol"])),
    ("io.k8s.api.core.v1.ServiceStatus", "conditions", keyed(&["type"])),
    ("io.k8s.api.core.v1.ServiceAccount", "secrets", keyed(&["name"])),
    ("io.k8s.api.core.v1.NamespaceStatus", "conditions", keyed(&["type"])),
    ("io.k8s.api.core.v1.NodeStatus", "conditions", keyed(&["type"])),
    ("io.k8s.api.core.v1.NodeStatus", "addresses", keyed(&["type"])),
    ("io.k8s.api.core.v1.NodeSpec", "podCIDRs", Merge::Set { strategic: true }),
    ("io.k8s.api.apps.v1.DeploymentSpec", "strategy", Merge::RetainKeys),
    ("io.k8s.api.apps.v1.DeploymentStatus", "conditions", keyed(&["type"])),
    ("io.k8s.api.apps.v1.ReplicaSetStatus", "conditions", keyed(&["type"])),
    ("io.k8s.api.apps.v1.StatefulSetStatus", "conditions", keyed(&["type"])),
    ("io.k8s.api.apps.v1.DaemonSetStatus", "conditions", keyed(&["type"])),
    ("io.k8s.api.discovery.v1.Endpoint", "addresses", Merge::Set { strategic: false }),
    (
        "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.CustomResourceDefinitionStatus",
        "conditions",
        apply_only(&["type"]),
    ),
];

/// Definitions whose objects are one value when merged.
const ATOMIC: &[&str] = &[
    "io.k8s.apimachinery.pkg.apis.meta.v1.LabelSelector",
    "io.k8s.api.core.v1.ConfigMapKeySelector",
    "io.k8s.api.core.v1.LocalObjectReference",
    "io.k8s.api.core.v1.NodeSelector",
    "io.k8s.api.core.v1.NodeSelectorTerm",
    "io.k8s.api.core.v1.ObjectFieldSelector",
    "io.k8s.api.core.v1.ObjectReference",
    "io.k8s.api.core.v1.ResourceFieldSelector",
    "io.k8s.api.core.v1.SecretKeySelector",
    "io.k8s.api.core.v1.SecretReference",
    "io.k8s.api.core.v1.TypedLocalObjectReference",
    "io.k8s.api.rbac.v1.RoleRef",
    "io.k8s.api.rbac.v1.Subject",
];

/// Maps that are one value when merged: (definition, field).
const ATOMIC_FIELDS: &[(&str, &str)] = &[
    ("io.k8s.api.core.v1.PodSpec", "nodeSelector"),
    ("io.k8s.api.core.v1.ServiceSpec", "selector"),
];

/// Defaults that decide list keys, and so must be known to merges.
const KEY_DEFAULTS: &[(&str, &str, &str)] = &[
    ("io.k8s.api.core.v1.ContainerPort", "protocol", "TCP"),
    ("io.k8s.api.core.v1.ServicePort", "protocol", "TCP"),
];

/// Schemas of all built-in kinds.
pub(super) static DEFINITIONS: LazyLock<Arc<Definitions>> =
    LazyLock::new(|| Arc::new(definitions()));

fn definitions() -> Definitions {
    let settings = SchemaSettings::openapi3()
        .with(|settings| settings.definitions_path = "/components/schemas".into());
    let mut generator = SchemaGenerator::new(settings);
    collect(&mut generator);
    let mut definitions: Definitions = generator
        .take_definitions(false)
        .into_iter()
        .map(|(name, node)| (name, tidy(node)))
        .collect();
    for kind in KINDS {
        top_level(&mut definitions, kind);
    }
    extend(&mut definitions);
    definitions
}

fn collect(generator: &mut SchemaGenerator) {
    macro_rules! collect {
        ($($kind:path),* $(,)?) => { $(generator.subschema_for::<$kind>();)* };
    }
    collect!(
        api::core::v1::ConfigMap,
        api::core::v1::Endpoints,
        api::core::v1::Event,
        api::core::v1::Namespace,
        api::core::v1::Node,
        api::core::v1::Pod,
        api::core::v1::Secret,
        api::core::v1::Service,
        api::core::v1::ServiceAccount,
        api::apps::v1::DaemonSet,
        api::apps::v1::Deployment,
        api::apps::v1::ReplicaSet,
        api::apps::v1::StatefulSet,
        apiextensions::v1::CustomResourceDefinition,
        api::coordination::v1::Lease,
        api::discovery::v1::EndpointSlice,
        api::events::v1::Event,
        api::networking::v1::NetworkPolicy,
        api::policy::v1::PodDisruptionBudget,
        api::rbac::v1::ClusterRole,
        api::rbac::v1::ClusterRoleBinding,
        api::rbac::v1::Role,
        api::rbac::v1::RoleBinding,
        api::authentication::v1::TokenRequest,
        api::autoscaling::v1::Scale,
        k8s_openapi::apimachinery::pkg::apis::meta::v1::DeleteOptions,
        k8s_openapi::apimachinery::pkg::apis::meta::v1::ListMeta,
        k8s_openapi::apimachinery::pkg::apis::meta::v1::Status,
    );
}

/// Writes a generated schema as Kubernetes does: a reference with a description is an `allOf`.
fn tidy(node: Value) -> Value {
    match node {
        Value::Object(mut fields) => {
            // `JSONSchemaProps` has a property of this name, which is no reference.
            if fields.get("$ref").is_some_and(Value::is_string) {
                let target = fields.remove("$ref");
                if fields.is_empty() {
                    return json!({ "$ref": target });
                }
                fields.insert("allOf".to_owned(), json!([{ "$ref": target }]));
                return Value::Object(fields);
            }
            Value::Object(fields.into_iter().map(|(name, node)| (name, tidy(node))).collect())
        }
        Value::Array(items) => items.into_iter().map(tidy).collect(),
        other => other,
    }
}

fn top_level(definitions: &mut Definitions, kind: &Builtin) {
    let Some(node) = definitions.get_mut(kind.definition) else { return };
    // The server fills in metadata; asking people for it would refuse what Kubernetes takes.
    if let Some(required) = node.get_mut("required").and_then(Value::as_array_mut) {
        required.retain(|name| name != "metadata");
        if required.is_empty() {
            node.as_object_mut().map(|node| node.remove("required"));
        }
    }
    node["x-kubernetes-group-version-kind"] =
        json!([{"group": kind.group, "version": kind.version, "kind": kind.kind}]);
}

fn extend(definitions: &mut Definitions) {
    for (definition, field, merge) in EXTENSIONS {
        let Some(node) = property(definitions, definition, field) else { continue };
        match merge {
            Merge::Keyed { keys, strategic, retain } => {
                node.insert("x-kubernetes-list-type".into(), "map".into());
                node.insert("x-kubernetes-list-map-keys".into(), json!(keys));
                if *strategic {
                    let strategy = if *retain { "merge,retainKeys" } else { "merge" };
                    node.insert("x-kubernetes-patch-merge-key".into(), keys[0].into());
                    node.insert("x-kubernetes-patch-strategy".into(), strategy.into());
                }
            }
            Merge::Set { strategic } => {
                node.insert("x-kubernetes-list-type".into(), "set".into());
                if *strategic {
                    node.insert("x-kubernetes-patch-strategy".into(), "merge".into());
                }
            }
            Merge::StrategicOnly(key) => {
                node.insert("x-kubernetes-list-type".into(), "atomic".into());
                node.insert("x-kubernetes-patch-merge-key".into(), (*key).into());
                node.insert("x-kubernetes-patch-strategy".into(), "merge".into());
            }
            Merge::RetainKeys => {
                node.insert("x-kubernetes-patch-strategy".into(), "retainKeys".into());
            }
        }
    }
    for (definition, field) in ATOMIC_FIELDS {
        if let Some(node) = property(definitions, definition, field) {
            node.insert("x-kubernetes-map-type".into(), "atomic".into());
        }
    }
    for (definition, field, default) in KEY_DEFAULTS {
        if let Some(node) = property(definitions, definition, field) {
            node.insert("default".into(), (*default).into());
        }
    }
    for definition in ATOMIC {
        if let Some(node) = definitions.get_mut(*definition) {
            node["x-kubernetes-map-type"] = "atomic".into();
        }
    }
}

fn property<'a>(
    definitions: &'a mut Definitions,
    definition: &str,
    field: &str,
) -> Option<&'a mut Map<String, Value>> {
    definitions.get_mut(definition)?.get_mut("properties")?.get_mut(field)?.as_object_mut()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_schema() {
        for kind in KINDS {
            assert!(DEFINITIONS.contains_key(kind.definition), "{}", kind.definition);
        }
    }

    #[test]
    fn every_extension_names_an_existing_field() {
        let mut definitions = (**DEFINITIONS).clone();
        let fields = EXTENSIONS.iter().map(|(definition, field, _)| (*definition, *field));
        let defaults = KEY_DEFAULTS.iter().map(|(definition, field, _)| (*definition, *field));
        for (definition, field) in fields.chain(defaults).chain(ATOMIC_FIELDS.iter().copied()) {
            assert!(
                property(&mut definitions, definition, field).is_some(),
                "{definition}.{field}"
            );
        }
    }

    #[test]
    fn references_resolve() {
        fn check(node: &Value) {
            if let Some(name) = node.get("$ref").and_then(Value::as_str) {
                let name = name.rsplit('/').next().unwrap();
                assert!(DEFINITIONS.contains_key(name), "{name}");
            }
            match node {
                Value::Object(fields) => fields.values().for_each(check),
                Value::Array(items) => items.iter().for_each(check),
                _ => {}
            }
        }
        DEFINITIONS.values().for_each(check);
    }
}
