//! The pod runner: the part of the kubelet that a lab needs, for all nodes at once.

mod cni;
mod console;
mod container;
mod environment;
mod events;
mod exec;
mod images;
mod logs;
mod probes;
mod status;
mod terminal;
mod worker;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use tokio::sync::watch;

pub(crate) use events::Recorder;
pub use images::DNS_IMAGE;

use crate::container::Process;
use crate::layout::{Layout, NodePlan};
use console::Console;
use logs::Log;

/// What the runner needs to know of its surroundings.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Paths of the lab.
    pub layout: Layout,
    /// The control group of all nodes.
    pub cgroup: PathBuf,
    /// The CNI plugin.
    pub cni_plugin: PathBuf,
    /// The nodes.
    pub nodes: Vec<NodePlan>,
}

/// All pods of the lab.
#[derive(Debug)]
pub struct Runner {
    settings: Settings,
    pods: Mutex<HashMap<String, PodEntry>>,
}

#[derive(Debug)]
struct PodEntry {
    namespace: String,
    name: String,
    updates: watch::Sender<Option<Pod>>,
    shared: Arc<Shared>,
}

/// What `exec`, `logs` and `portforward` may know of a pod.
#[derive(Debug, Default)]
struct Shared {
    /// Its network, once it has one.
    netns: OnceLock<PathBuf>,
    containers: Mutex<HashMap<String, Live>>,
}

/// A container that has run at least once.
#[derive(Debug, Default, Clone)]
struct Live {
    running: Option<Target>,
    current: Option<Arc<Log>>,
    previous: Option<Arc<Log>>,
}

/// Where `exec` and `attach` go.
#[derive(Debug, Clone)]
struct Target {
    pid: u32,
    cgroup: PathBuf,
    process: Process,
    console: Arc<Console>,
}

impl Shared {
    fn update(&self, container: &str, change: impl FnOnce(&mut Live)) {
        change(lock(&self.containers).entry(container.to_owned()).or_default());
    }

    fn get(&self, container: &str) -> Option<Live> {
        lock(&self.containers).get(container).cloned()
    }
}

/// The data is whole after every statement, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Runner {
    /// A runner without pods.
    pub fn new(settings: Settings) -> Arc<Self> {
        Arc::new(Self { settings, pods: Mutex::default() })
    }

    /// Runs the pods that the API server assigns to our nodes, until the lab ends.
    pub async fn run(self: Arc<Self>, client: Client) {
        let api = Api::<Pod>::all(client.clone());
        let mut stream = watcher(api, watcher::Config::default()).default_backoff().boxed();
        let mut seen = Vec::new();
        while let Some(event) = stream.next().await {
            match event {
                Ok(watcher::Event::Apply(pod)) => self.apply(&client, pod),
                Ok(watcher::Event::InitApply(pod)) => {
                    seen.extend(pod.uid());
                    self.apply(&client, pod);
                }
                Ok(watcher::Event::Delete(pod)) => self.forget(&pod.uid().unwrap_or_default()),
                Ok(watcher::Event::Init) => seen.clear(),
                Ok(watcher::Event::InitDone) => {
                    let gone: Vec<_> = lock(&self.pods)
                        .keys()
                        .filter(|uid| !seen.contains(uid))
                        .cloned()
                        .collect();
                    gone.iter().for_each(|uid| self.forget(uid));
                }
                Err(error) => tracing::warn!("watching pods: {error}"),
            }
        }
    }

    fn apply(self: &Arc<Self>, client: &Client, pod: Pod) {
        let Some(node) = self.node_of(&pod) else { return };
        let uid = pod.uid().unwrap_or_default();
        let mut pods = lock(&self.pods);
        if let Some(entry) = pods.get(&uid) {
            entry.updates.send_replace(Some(pod));
            return;
        }
        let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
        let (updates, receiver) = watch::channel(Some(pod));
        let shared = Arc::new(Shared::default());
        pods.insert(
            uid.clone(),
            PodEntry { namespace, name, updates, shared: Arc::clone(&shared) },
        );
        let (runner, client) = (Arc::clone(self), client.clone());
        tokio::spawn(async move {
            worker::run(&runner.settings, client, node, receiver, shared).await;
            lock(&runner.pods).remove(&uid);
        });
    }

    /// The object is gone; its worker takes down what is left.
    fn forget(&self, uid: &str) {
        if let Some(entry) = lock(&self.pods).get(uid) {
            entry.updates.send_replace(None);
        }
    }

    fn node_of(&self, pod: &Pod) -> Option<NodePlan> {
        let name = pod.spec.as_ref()?.node_name.as_deref()?;
        self.settings.nodes.iter().find(|node| node.name == name).cloned()
    }

    fn shared(&self, namespace: &str, name: &str) -> Option<Arc<Shared>> {
        lock(&self.pods)
            .values()
            .find(|entry| entry.namespace == namespace && entry.name == name)
            .map(|entry| Arc::clone(&entry.shared))
    }

    /// How many pods there are.
    pub fn len(&self) -> usize {
        lock(&self.pods).len()
    }

    /// Whether there are no pods.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
