//! OpenAPI v3, one document per group and version.
//!
//! Of version 2 there is a document without contents: clients ask for it about kinds that version 3
//! does not have, and what they look for is not there either.

use serde_json::{Map, Value, json};

use super::discovery::{hash, tagged};
use super::error::ApiError;
use super::registry::{Registry, Resource, group_version};
use super::reply::{self, Reply};
use super::schema::Definitions;

/// Answers under `/openapi/`.
pub(super) fn serve(
    registry: &Registry,
    path: &str,
    accept: Option<&str>,
    known: Option<&str>,
) -> Result<Reply, ApiError> {
    let path = path.trim_end_matches('/');
    if path == "/openapi/v2" {
        return Ok(version_2(accept));
    }
    if path == "/openapi/v3" {
        return Ok(tagged("application/json", &index(registry), known));
    }
    let place = path.strip_prefix("/openapi/v3/").ok_or_else(ApiError::no_such_path)?;
    let found = versions(registry)
        .into_iter()
        .find(|(group, version)| self::place(group, version) == place);
    let (group, version) = found.ok_or_else(ApiError::no_such_path)?;
    Ok(tagged("application/json", &document(registry, &group, &version), known))
}

fn version_2(accept: Option<&str>) -> Reply {
    let (title, version) = ("Kubernetes", "v1.37.1");
    if !accept.is_some_and(|accept| accept.contains("proto-openapi")) {
        let info = json!({"title": title, "version": version});
        let document = json!({"swagger": "2.0", "info": info, "paths": {}, "definitions": {}});
        return reply::object(200, &document, false);
    }
    // `openapi.v2.Document { swagger = 1; info = 2 { title = 1; version = 2 } }`; all lengths fit
    // into one byte.
    let field = |number: u8, bytes: &[u8]| {
        let length = u8::try_from(bytes.len()).unwrap_or(0);
        [&[number << 3 | 2, length], bytes].concat()
    };
    let info = [field(1, title.as_bytes()), field(2, version.as_bytes())].concat();
    let document = [field(1, b"2.0"), field(2, &info)].concat();
    let kind = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
    reply::full(200, kind, document)
}

fn versions(registry: &Registry) -> Vec<(String, String)> {
    let mut versions: Vec<(String, String)> =
        registry.iter().map(|found| (found.group.clone(), found.version.clone())).collect();
    versions.dedup();
    versions
}

fn place(group: &str, version: &str) -> String {
    let prefix = if group.is_empty() { "api" } else { "apis" };
    format!("{prefix}/{}", group_version(group, version))
}

fn index(registry: &Registry) -> Value {
    let mut paths = Map::new();
    for (group, version) in versions(registry) {
        let place = place(&group, &version);
        let tag = hash(document(registry, &group, &version).to_string().as_bytes());
        let url = json!({"serverRelativeURL": format!("/openapi/v3/{place}?hash={tag}")});
        paths.insert(place, url);
    }
    json!({ "paths": paths })
}

fn document(registry: &Registry, group: &str, version: &str) -> Value {
    let mut paths = Map::new();
    let mut schemas = Map::new();
    for resource in registry.iter().filter(|r| r.group == group && r.version == version) {
        add_paths(resource, &mut paths);
        let common = ["DeleteOptions", "Status", "ListMeta"]
            .map(|name| format!("io.k8s.apimachinery.pkg.apis.meta.v1.{name}"));
        for name in common.iter().chain([&resource.definition]) {
            add_schema(name, &resource.definitions, &mut schemas);
        }
    }
    json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1.37.1"},
        "paths": paths,
        "components": {"schemas": schemas},
    })
}

/// A schema and all that it refers to.
fn add_schema(name: &str, definitions: &Definitions, schemas: &mut Map<String, Value>) {
    let Some(node) = definitions.get(name) else { return };
    if schemas.contains_key(name) {
        return;
    }
    schemas.insert(name.to_owned(), node.clone());
    let mut pending = vec![node];
    while let Some(node) = pending.pop() {
        match node {
            Value::Object(fields) => {
                if let Some(target) = fields.get("$ref").and_then(Value::as_str) {
                    add_schema(target.rsplit('/').next().unwrap_or(""), definitions, schemas);
                }
                pending.extend(fields.values());
            }
            Value::Array(items) => pending.extend(items),
            _ => {}
        }
    }
}

fn add_paths(resource: &Resource, paths: &mut Map<String, Value>) {
    let base = format!("/{}", place(&resource.group, &resource.version));
    let collection = if resource.namespaced {
        format!("{base}/namespaces/{{namespace}}/{}", resource.plural)
    } else {
        format!("{base}/{}", resource.plural)
    };
    let item = format!("{collection}/{{name}}");
    let gvk = json!({"group": resource.group, "version": resource.version, "kind": resource.kind});
    let schema = json!({"$ref": format!("#/components/schemas/{}", resource.definition)});
    let content = |types: &[&str]| -> Value {
        types.iter().map(|media| ((*media).to_owned(), json!({ "schema": schema }))).collect()
    };
    let all = ["application/json", "application/yaml"];
    let operation = |action: &str, parameters: &[&str], body: Option<Value>| {
        let parameters: Vec<Value> = parameters
            .iter()
            .map(|name| json!({"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": true}}))
            .collect();
        let mut operation = json!({
            "operationId": format!("{action}{}", resource.kind),
            "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": gvk,
            "parameters": parameters,
            "responses": {"200": {"description": "OK", "content": content(&all)}},
        });
        if let Some(content) = body {
            operation["requestBody"] = json!({"required": true, "content": content});
        }
        operation
    };
    let write = ["dryRun", "fieldManager", "fieldValidation", "pretty"];
    let patch = ["dryRun", "fieldManager", "fieldValidation", "force", "pretty"];
    let mut patches = vec![
        "application/json-patch+json",
        "application/merge-patch+json",
        "application/apply-patch+yaml",
    ];
    if resource.custom.is_none() {
        patches.push("application/strategic-merge-patch+json");
    }
    paths.insert(
        collection,
        json!({
            "get": operation("list", &["labelSelector", "fieldSelector", "limit", "continue", "watch"], None),
            "post": operation("post", &write, Some(content(&all))),
            "delete": operation("deletecollection", &["labelSelector", "fieldSelector", "dryRun"], None),
        }),
    );
    paths.insert(
        item,
        json!({
            "get": operation("get", &["pretty"], None),
            "put": operation("put", &write, Some(content(&all))),
            "patch": operation("patch", &patch, Some(content(&patches))),
            "delete": operation("delete", &["dryRun", "gracePeriodSeconds", "propagationPolicy"], None),
        }),
    );
}
