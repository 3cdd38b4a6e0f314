//! What the Kubernetes API says, where one can be reached.

use std::{
    collections::BTreeSet,
    env,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{
    Api, Client, Config,
    api::{ApiResource, DynamicObject, GroupVersionKind, ListParams},
    config::{KubeConfigOptions, Kubeconfig},
};

/// The lab writes it when it comes up.
const LAB_KUBECONFIG: &str = "/run/palisade/lab/kubeconfig";
const TIMEOUT: Duration = Duration::from_secs(5);

/// What `status` and `version` want to know of the API server.
pub(crate) struct Cluster {
    /// Version of the API server.
    pub(crate) version: String,
    /// Names of all nodes.
    pub(crate) nodes: Vec<String>,
    /// Pods that want an address of their own, as `namespace/name`.
    pub(crate) pods: BTreeSet<String>,
    /// Pods for which there is a `CiliumEndpoint`, as `namespace/name`.
    pub(crate) endpoints: BTreeSet<String>,
}

/// Reads it; every request is bounded in time.
pub(crate) fn read(kubeconfig: Option<&Path>) -> Result<Cluster> {
    on_runtime(async {
        let client = client(kubeconfig).await?;
        let version = client.apiserver_version().await.context("the API server's version")?;
        let everything = ListParams::default();
        let nodes = Api::<Node>::all(client.clone()).list(&everything).await.context("nodes")?;
        let pods = Api::<Pod>::all(client.clone()).list(&everything).await.context("pods")?;
        let kind = GroupVersionKind::gvk("cilium.io", "v2", "CiliumEndpoint");
        let resource = ApiResource::from_gvk(&kind);
        let endpoints = Api::<DynamicObject>::all_with(client, &resource)
            .list(&everything)
            .await
            .map(|list| list.items)
            .unwrap_or_default();
        Ok(Cluster {
            version: version.git_version,
            nodes: nodes.items.into_iter().filter_map(|node| node.metadata.name).collect(),
            pods: pods.items.iter().filter(|pod| wants_address(pod)).map(pod_name).collect(),
            endpoints: endpoints
                .into_iter()
                .map(|endpoint| key(endpoint.metadata.namespace, endpoint.metadata.name))
                .collect(),
        })
    })
}

/// Only the API server's version.
pub(crate) fn version(kubeconfig: Option<&Path>) -> Result<String> {
    on_runtime(async {
        let version = client(kubeconfig).await?.apiserver_version().await?;
        Ok(version.git_version)
    })
}

fn on_runtime<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        tokio::time::timeout(TIMEOUT * 2, work)
            .await
            .unwrap_or_else(|_| Err(anyhow::anyhow!("the API server does not answer")))
    })
}

async fn client(kubeconfig: Option<&Path>) -> Result<Client> {
    let mut config = match chosen(kubeconfig) {
        Some(file) => {
            let read = Kubeconfig::read_from(&file).with_context(|| file.display().to_string())?;
            Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await?
        }
        None => Config::infer().await?,
    };
    config.connect_timeout = Some(TIMEOUT);
    config.read_timeout = Some(TIMEOUT);
    Ok(Client::try_from(config)?)
}

/// The file given, else none where `KUBECONFIG` is for kube to read, else the lab's.
fn chosen(given: Option<&Path>) -> Option<PathBuf> {
    if let Some(given) = given {
        return Some(given.to_owned());
    }
    if env::var_os("KUBECONFIG").is_some() {
        return None;
    }
    Some(PathBuf::from(LAB_KUBECONFIG)).filter(|file| file.exists())
}

/// Pods on the host's network have no address of their own, and those that ended need none.
fn wants_address(pod: &Pod) -> bool {
    let host = pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or_default();
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    !host && !matches!(phase, Some("Succeeded" | "Failed"))
}

fn pod_name(pod: &Pod) -> String {
    key(pod.metadata.namespace.clone(), pod.metadata.name.clone())
}

fn key(namespace: Option<String>, name: Option<String>) -> String {
    format!("{}/{}", namespace.unwrap_or_default(), name.unwrap_or_default())
}
