//! What was installed, kept in the cluster: a later command goes on from it.

use std::fmt;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::apply;
use crate::exit::Failure;

/// Name of the ConfigMap.
pub(super) const NAME: &str = "palisade-install";

/// What was installed.
#[derive(Debug)]
pub(super) struct Record {
    /// The values that somebody chose.
    pub(super) values: Value,
    /// Version of the chart.
    pub(super) version: String,
    /// What was applied, in this order.
    pub(super) objects: Vec<Reference>,
}

impl Default for Record {
    fn default() -> Self {
        Self { values: json!({}), version: String::new(), objects: Vec::new() }
    }
}

/// Which object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Reference {
    pub(super) api_version: String,
    pub(super) kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) namespace: Option<String>,
    pub(super) name: String,
}

impl Reference {
    pub(super) fn of(object: &Value) -> Self {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Self {
            api_version: text(&object["apiVersion"]),
            kind: text(&object["kind"]),
            namespace: object["metadata"]["namespace"].as_str().map(str::to_owned),
            name: text(&object["metadata"]["name"]),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind.to_lowercase(), self.name)
    }
}

impl Record {
    pub(super) async fn read(client: &Client, namespace: &str) -> Result<Option<Self>> {
        let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
        let Some(map) = api.get_opt(NAME).await? else { return Ok(None) };
        let data = map.data.unwrap_or_default();
        let field = |name: &str| {
            data.get(name).with_context(|| format!("configmap {namespace}/{NAME} has no {name}"))
        };
        Ok(Some(Self {
            values: serde_json::from_str(field("values")?)?,
            version: field("version")?.clone(),
            objects: serde_json::from_str(field("objects")?)?,
        }))
    }

    /// As [`Record::read`], for commands that need one.
    pub(super) async fn require(client: &Client, namespace: &str) -> Result<Self> {
        let record = Self::read(client, namespace).await?;
        record.ok_or_else(|| {
            Failure::not_found(format!(
                "this command did not install Palisade in the namespace {namespace}: install it \
                 with `palisade install`, name another namespace with -n, or, if Helm installed \
                 it, go on with helm"
            ))
            .into()
        })
    }

    pub(super) async fn write(&self, client: &Client, namespace: &str) -> Result<()> {
        let object = json!({
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": NAME,
                "namespace": namespace,
                "labels": { "app.kubernetes.io/part-of": "palisade" },
            },
            "data": {
                "values": self.values.to_string(),
                "version": self.version,
                "objects": serde_json::to_string(&self.objects)?,
            },
        });
        apply::quietly(client, &object).await
    }
}
