//! The controllers: level-triggered, one after the other, on caches of the API server's objects.
//!
//! Caches lag behind. A step that creates or deletes therefore either gives its objects names
//! that follow from their owners, so that doing it twice fails harmlessly, or looks again at the
//! API server before it acts.

mod bootstrap;
mod deployment;
mod endpoints;
mod garbage;
mod namespace;
mod replicas;
mod scheduler;
mod stateful;

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::Notify;

pub use bootstrap::{Cluster, bootstrap};

/// Changes that come together are handled together.
const SETTLE: Duration = Duration::from_millis(5);
/// Everything is looked at again after so long, whatever the caches say.
const RESYNC: Duration = Duration::from_secs(10);
/// After an error.
const RETRY: Duration = Duration::from_millis(500);

/// What the controllers know and how they act.
struct Context {
    client: Client,
    ca: String,
    changed: Arc<Notify>,
    namespaces: Store<Namespace>,
    nodes: Store<Node>,
    pods: Store<Pod>,
    services: Store<Service>,
    slices: Store<EndpointSlice>,
    deployments: Store<Deployment>,
    replica_sets: Store<ReplicaSet>,
    stateful_sets: Store<StatefulSet>,
    complained: std::sync::Mutex<std::collections::HashSet<String>>,
}

/// Runs the controllers until the lab ends. `ca` is the certificate that pods trust.
pub async fn run(client: Client, ca: String) -> anyhow::Result<()> {
    let changed = Arc::new(Notify::new());
    let context = Context {
        namespaces: follow(&client, &changed),
        nodes: follow(&client, &changed),
        pods: follow(&client, &changed),
        services: follow(&client, &changed),
        slices: follow(&client, &changed),
        deployments: follow(&client, &changed),
        replica_sets: follow(&client, &changed),
        stateful_sets: follow(&client, &changed),
        complained: std::sync::Mutex::default(),
        client,
        ca,
        changed,
    };
    context.wait_complete().await?;
    loop {
        let pause = if context.round().await { RESYNC } else { RETRY };
        let _ = tokio::time::timeout(pause, context.changed.notified()).await;
        tokio::time::sleep(SETTLE).await;
    }
}

impl Context {
    async fn wait_complete(&self) -> anyhow::Result<()> {
        self.namespaces.wait_until_ready().await?;
        self.nodes.wait_until_ready().await?;
        self.pods.wait_until_ready().await?;
        self.services.wait_until_ready().await?;
        self.slices.wait_until_ready().await?;
        self.deployments.wait_until_ready().await?;
        self.replica_sets.wait_until_ready().await?;
        self.stateful_sets.wait_until_ready().await?;
        Ok(())
    }

    /// One round of everything; whether all went well.
    async fn round(&self) -> bool {
        let mut well = true;
        let mut check = |what: &str, result: kube::Result<()>| {
            if let Err(error) = result {
                tracing::warn!("{what}: {error}");
                well = false;
            }
        };
        check("namespaces", namespace::reconcile(self).await);
        check("deployments", deployment::reconcile(self).await);
        check("replica sets", replicas::reconcile(self).await);
        check("stateful sets", stateful::reconcile(self).await);
        check("scheduler", scheduler::reconcile(self).await);
        check("endpoints", endpoints::reconcile(self).await);
        check("garbage", garbage::reconcile(self).await);
        well
    }
}

/// A cache of all objects of a kind; `changed` is told of every change.
fn follow<K>(client: &Client, changed: &Arc<Notify>) -> Store<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + Send + Sync + DeserializeOwned + 'static,
{
    let (store, writer) = reflector::store();
    let stream = watcher(Api::<K>::all(client.clone()), watcher::Config::default())
        .default_backoff()
        .reflect(writer);
    let changed = Arc::clone(changed);
    tokio::spawn(stream.for_each(move |event| {
        match event {
            Ok(_) => changed.notify_one(),
            Err(error) => tracing::warn!("watching {}: {error}", K::kind(&())),
        }
        std::future::ready(())
    }));
    store
}

/// Errors that mean that somebody else was faster; the caches will tell.
fn settled<T>(result: kube::Result<T>) -> kube::Result<()> {
    match result {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        Err(error) => Err(error),
    }
}

/// A short name for a value, in letters that no word can be read from.
fn fingerprint(value: &impl serde::Serialize) -> String {
    use sha2::{Digest, Sha256};
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let bytes = serde_json::to_vec(value).unwrap_or_default();
    let digest = Sha256::digest(&bytes);
    digest.iter().take(10).map(|b| char::from(LETTERS[usize::from(*b) % LETTERS.len()])).collect()
}
