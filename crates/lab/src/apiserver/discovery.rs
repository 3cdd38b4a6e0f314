//! Discovery: which groups, versions and resources there are.

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::error::ApiError;
use super::registry::{REVIEWS, Registry, Resource, group_version};
use super::reply::{self, Reply};

const AGGREGATED: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
const VERBS: [&str; 8] =
    ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

/// `/version`.
pub(super) fn version() -> Value {
    json!({
        "major": "1", "minor": "37", "gitVersion": "v1.37.1+palisade", "gitCommit": "",
        "gitTreeState": "clean", "buildDate": "2026-11-01T00:00:00Z", "goVersion": "",
        "compiler": "rustc", "platform": format!("linux/{}", std::env::consts::ARCH),
    })
}

/// The paths that `/` lists.
pub(super) fn root(registry: &Registry) -> Vec<String> {
    let mut paths: Vec<String> =
        ["/api", "/api/v1", "/apis", "/healthz", "/livez", "/openapi/v3", "/readyz", "/version"]
            .map(str::to_owned)
            .to_vec();
    for (group, versions) in registry.groups().iter().filter(|(group, _)| !group.is_empty()) {
        paths.push(format!("/apis/{group}"));
        paths.extend(versions.iter().map(|version| format!("/apis/{group}/{version}")));
    }
    paths.sort();
    paths
}

/// `/api`.
pub(super) fn core(registry: &Registry, accept: Option<&str>, known: Option<&str>) -> Reply {
    if wants_aggregated(accept) {
        return aggregated(registry, true, known);
    }
    let versions =
        json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []});
    reply::object(200, &versions, false)
}

/// `/apis`.
pub(super) fn groups(registry: &Registry, accept: Option<&str>, known: Option<&str>) -> Reply {
    if wants_aggregated(accept) {
        return aggregated(registry, false, known);
    }
    let groups: Vec<Value> = registry
        .groups()
        .iter()
        .filter(|(group, _)| !group.is_empty())
        .map(|(group, versions)| api_group(group, versions))
        .collect();
    let list = json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups});
    reply::object(200, &list, false)
}

/// `/apis/GROUP`.
pub(super) fn group(registry: &Registry, name: &str) -> Result<Reply, ApiError> {
    let groups = registry.groups();
    let (group, versions) =
        groups.iter().find(|(group, _)| group == name).ok_or_else(ApiError::no_such_path)?;
    let mut answer = api_group(group, versions);
    answer["kind"] = "APIGroup".into();
    answer["apiVersion"] = "v1".into();
    Ok(reply::object(200, &answer, false))
}

fn api_group(group: &str, versions: &[String]) -> Value {
    let versions: Vec<Value> = versions
        .iter()
        .map(|version| json!({"groupVersion": group_version(group, version), "version": version}))
        .collect();
    json!({"name": group, "preferredVersion": versions[0], "versions": versions})
}

/// `/api/v1`, `/apis/GROUP/VERSION`.
pub(super) fn resources(
    registry: &Registry,
    group: &str,
    version: &str,
) -> Result<Reply, ApiError> {
    let mut rows = Vec::new();
    for found in registry.iter().filter(|found| found.group == group && found.version == version) {
        rows.push(json!({
            "name": found.plural, "singularName": found.singular, "namespaced": found.namespaced,
            "kind": found.kind, "verbs": VERBS, "shortNames": found.short_names,
            "categories": found.categories,
        }));
        for name in &found.subresources {
            let (kind, verbs) = subresource(found, name);
            let mut row = json!({
                "name": format!("{}/{name}", found.plural), "singularName": "",
                "namespaced": found.namespaced, "kind": kind.2, "verbs": verbs,
            });
            if (kind.0, kind.1) != (group, version) {
                row["group"] = kind.0.into();
                row["version"] = kind.1.into();
            }
            rows.push(row);
        }
    }
    for review in REVIEWS.iter().filter(|r| r.group == group && r.version == version) {
        rows.push(json!({
            "name": review.plural, "singularName": review.kind.to_lowercase(),
            "namespaced": review.namespaced, "kind": review.kind, "verbs": ["create"],
        }));
    }
    if rows.is_empty() {
        return Err(ApiError::no_such_path());
    }
    let list = json!({
        "kind": "APIResourceList", "apiVersion": "v1",
        "groupVersion": group_version(group, version), "resources": rows,
    });
    Ok(reply::object(200, &list, false))
}

/// (group, version, kind) of what a subresource takes, and its verbs.
fn subresource<'a>(
    resource: &'a Resource,
    name: &str,
) -> ((&'a str, &'a str, &'a str), &'static [&'static str]) {
    let own = (resource.group.as_str(), resource.version.as_str(), resource.kind.as_str());
    match name {
        "scale" => (("autoscaling", "v1", "Scale"), &["get", "patch", "update"]),
        "log" => (own, &["get"]),
        "exec" => (("", "v1", "PodExecOptions"), &["create", "get"]),
        "attach" => (("", "v1", "PodAttachOptions"), &["create", "get"]),
        "portforward" => (("", "v1", "PodPortForwardOptions"), &["create", "get"]),
        "binding" => (("", "v1", "Binding"), &["create"]),
        "eviction" => (("policy", "v1", "Eviction"), &["create"]),
        "token" => (("authentication.k8s.io", "v1", "TokenRequest"), &["create"]),
        "finalize" => (own, &["update"]),
        _ => (own, &["get", "patch", "update"]),
    }
}

fn wants_aggregated(accept: Option<&str>) -> bool {
    let Some(first) = accept.and_then(|accept| accept.split(',').next()) else { return false };
    let mut parts: Vec<&str> = first.split(';').map(str::trim).collect();
    parts.sort_unstable();
    parts == ["application/json", "as=APIGroupDiscoveryList", "g=apidiscovery.k8s.io", "v=v2"]
}

fn aggregated(registry: &Registry, core: bool, known: Option<&str>) -> Reply {
    let groups = registry.groups();
    let items: Vec<Value> = groups
        .iter()
        .filter(|(group, _)| group.is_empty() == core)
        .map(|(group, versions)| {
            let versions: Vec<Value> = versions
                .iter()
                .map(|version| version_discovery(registry, group, version))
                .collect();
            json!({"metadata": {"name": group, "creationTimestamp": null}, "versions": versions})
        })
        .collect();
    let list = json!({
        "kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2",
        "metadata": {}, "items": items,
    });
    tagged(AGGREGATED, &list, known)
}

/// An answer with an `ETag`, or 304 if the client has it.
pub(super) fn tagged(content_type: &str, value: &Value, known: Option<&str>) -> Reply {
    let text = value.to_string();
    let tag = format!("\"{}\"", hash(text.as_bytes()));
    let mut answer = if known == Some(tag.as_str()) {
        reply::full(304, content_type, "")
    } else {
        reply::full(200, content_type, text)
    };
    if let Ok(value) = tag.parse() {
        answer.headers_mut().insert(hyper::header::ETAG, value);
    }
    answer
        .headers_mut()
        .insert(hyper::header::VARY, hyper::header::HeaderValue::from_static("Accept"));
    answer
}

/// SHA-256 in hexadecimal.
pub(super) fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02X}")).collect()
}

fn version_discovery(registry: &Registry, group: &str, version: &str) -> Value {
    let scope = |namespaced| if namespaced { "Namespaced" } else { "Cluster" };
    let mut resources = Vec::new();
    for found in registry.iter().filter(|found| found.group == group && found.version == version) {
        let mut subresources = Vec::new();
        for name in &found.subresources {
            let ((group, version, kind), verbs) = subresource(found, name);
            subresources.push(json!({
                "subresource": name, "verbs": verbs,
                "responseKind": {"group": group, "version": version, "kind": kind},
            }));
        }
        resources.push(json!({
            "resource": found.plural, "singularResource": found.singular,
            "responseKind": {"group": group, "version": version, "kind": found.kind},
            "scope": scope(found.namespaced), "verbs": VERBS, "shortNames": found.short_names,
            "categories": found.categories, "subresources": subresources,
        }));
    }
    for review in REVIEWS.iter().filter(|r| r.group == group && r.version == version) {
        resources.push(json!({
            "resource": review.plural, "singularResource": review.kind.to_lowercase(),
            "responseKind": {"group": group, "version": version, "kind": review.kind},
            "scope": scope(review.namespaced), "verbs": ["create"],
        }));
    }
    json!({"version": version, "freshness": "Current", "resources": resources})
}
