//! What is deleted and what is not while caches lag behind the API server.

use std::net::TcpListener;
use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use k8s_openapi::api::core::v1::Namespace;
use kube::api::PostParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::reflector;
use kube::runtime::watcher::Event;
use kube::{Client, Config};
use tokio::net::TcpStream;

use super::*;
use crate::apiserver::{ApiServer, ApiServerConfig};
use crate::runtime::{ExecIo, ExecRequest, ExitStatus, LogRequest, PodRuntime, RuntimeError};

/// Runs nothing.
struct Idle;

fn idle<T: Send + 'static>() -> BoxFuture<'static, Result<T, RuntimeError>> {
    futures::future::ready(Err(RuntimeError::NotFound("nothing runs here".into()))).boxed()
}

impl PodRuntime for Idle {
    fn exec(
        &self,
        _: ExecRequest,
        _: ExecIo,
    ) -> BoxFuture<'static, Result<ExitStatus, RuntimeError>> {
        idle()
    }

    fn logs(
        &self,
        _: LogRequest,
    ) -> BoxFuture<'static, Result<BoxStream<'static, Bytes>, RuntimeError>> {
        idle()
    }

    fn connect(
        &self,
        _: &str,
        _: &str,
        _: u16,
    ) -> BoxFuture<'static, Result<TcpStream, RuntimeError>> {
        idle()
    }
}

struct Cluster {
    server: ApiServer,
    client: Client,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.server.shutdown();
    }
}

impl Cluster {
    async fn start() -> Self {
        let config = ApiServerConfig {
            data: None,
            certificate_names: Vec::new(),
            crds: Vec::new(),
            runtime: Arc::new(Idle),
        };
        let server = ApiServer::new(config).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        drop(server.serve(listener));
        let kubeconfig = Kubeconfig::from_yaml(&server.kubeconfig(&url)).unwrap();
        let options = KubeConfigOptions::default();
        let config = Config::from_custom_kubeconfig(kubeconfig, &options).await.unwrap();
        let client = Client::try_from(config).unwrap();
        let namespaces = Api::<Namespace>::all(client.clone());
        let default = object(json!({"metadata": {"name": "default"}}));
        namespaces.create(&PostParams::default(), &default).await.unwrap();
        Self { server, client }
    }

    fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), "default")
    }

    /// A deployment that is deleted in this way, and its replica set.
    async fn deleted(&self, how: &DeleteParams) -> (Deployment, ReplicaSet) {
        let labels = json!({"app": "a"});
        let spec = json!({
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {"containers": [{"name": "a", "image": "a"}]},
            },
        });
        let new = object(json!({"metadata": {"name": "a"}, "spec": spec}));
        let deployments = self.api::<Deployment>();
        let deployment = deployments.create(&PostParams::default(), &new).await.unwrap();
        let owner = deployment.controller_owner_ref(&()).unwrap();
        let metadata = json!({"name": "a-1", "labels": labels, "ownerReferences": [owner]});
        let new = object(json!({"metadata": metadata, "spec": spec}));
        let owned = self.api::<ReplicaSet>().create(&PostParams::default(), &new).await.unwrap();
        deployments.delete("a", how).await.unwrap();
        (deployments.get("a").await.unwrap(), owned)
    }

    /// One round of the collector with caches that hold just this.
    async fn collect(&self, deployments: &[Deployment], replica_sets: &[ReplicaSet]) {
        let context = Context {
            client: self.client.clone(),
            ca: String::new(),
            changed: Arc::default(),
            namespaces: store(&[]),
            nodes: store(&[]),
            pods: store(&[]),
            services: store(&[]),
            slices: store(&[]),
            deployments: store(deployments),
            replica_sets: store(replica_sets),
            stateful_sets: store(&[]),
            complained: std::sync::Mutex::default(),
        };
        reconcile(&context).await.unwrap();
    }

    async fn replica_set(&self) -> Option<ReplicaSet> {
        self.api::<ReplicaSet>().get_opt("a-1").await.unwrap()
    }
}

fn object<T: DeserializeOwned>(json: serde_json::Value) -> T {
    serde_json::from_value(json).unwrap()
}

fn store<K>(objects: &[K]) -> Store<K>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    let (store, mut writer) = reflector::store();
    let listed = objects.iter().cloned().map(Event::InitApply);
    for event in [Event::Init].into_iter().chain(listed).chain([Event::InitDone]) {
        writer.apply_watcher_event(&event);
    }
    store
}

#[tokio::test]
async fn what_an_owner_leaves_behind_stays() {
    let cluster = Cluster::start().await;
    let (deployment, before) = cluster.deleted(&DeleteParams::orphan()).await;
    cluster.collect(std::slice::from_ref(&deployment), std::slice::from_ref(&before)).await;
    assert!(cluster.api::<Deployment>().get_opt("a").await.unwrap().is_none());
    // The deployment's end is known before the replica set's release.
    cluster.collect(&[], &[before]).await;
    let kept = cluster.replica_set().await.unwrap();
    assert_eq!(kept.owner_references(), []);
    cluster.collect(&[], &[kept]).await;
    assert!(cluster.replica_set().await.is_some());
}

#[tokio::test]
async fn an_owner_leaves_behind_what_no_cache_knows_yet() {
    let cluster = Cluster::start().await;
    let (deployment, _) = cluster.deleted(&DeleteParams::orphan()).await;
    cluster.collect(&[deployment], &[]).await;
    let kept = cluster.replica_set().await.unwrap();
    cluster.collect(&[], &[kept]).await;
    assert!(cluster.replica_set().await.is_some());
}

#[tokio::test]
async fn what_nobody_owns_any_more_goes() {
    let cluster = Cluster::start().await;
    let (deployment, owned) = cluster.deleted(&DeleteParams::foreground()).await;
    let deployment = std::slice::from_ref(&deployment);
    cluster.collect(deployment, std::slice::from_ref(&owned)).await;
    let going = cluster.replica_set().await.unwrap();
    assert!(going.metadata.deletion_timestamp.is_some());
    cluster.collect(deployment, &[going]).await;
    assert!(cluster.replica_set().await.is_none());
    assert!(cluster.api::<Deployment>().get_opt("a").await.unwrap().is_some());
    cluster.collect(deployment, &[]).await;
    assert!(cluster.api::<Deployment>().get_opt("a").await.unwrap().is_none());
    // Another one that names the same owner.
    let mut late = owned;
    late.metadata.resource_version = None;
    late.metadata.uid = None;
    let late = cluster.api().create(&PostParams::default(), &late).await.unwrap();
    cluster.collect(&[], &[late]).await;
    assert!(cluster.replica_set().await.is_none());
}
