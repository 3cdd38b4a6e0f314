//! What the agent writes to the API server: identities, conditions, `CiliumEndpoint`s and its
//! `CiliumNode`. Nothing here holds up enforcement; what fails is tried again.

mod endpoints;
#[cfg(test)]
pub(crate) mod fake;
mod identities;
mod nodes;
mod policies;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use kube::Client;
use palisade_api::client::{Patience, chain, is_refusal};
use palisade_policy::{label::Labels, model::PolicyRef};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::Instant,
};
use tracing::debug;

pub use nodes::keep_node;

use crate::{
    engine::Command,
    resolve::Scope,
    tables::{
        ObjectName, Tables,
        pods::Endpoint,
        policies::{Condition, PolicyObject},
    },
};

/// One thing to write.
#[derive(Clone, Debug)]
pub enum Publication {
    /// These labels need a number in the cluster.
    Identity(Arc<Labels>),
    /// The state of a policy object.
    Condition(Arc<PolicyObject>, Condition),
    /// The state of an endpoint.
    Endpoint(Box<EndpointState>),
    /// An endpoint of this pod is gone; the container id tells it from others of the same pod, or
    /// of a later pod of the same name.
    EndpointGone(ObjectName, String),
}

/// What a `CiliumEndpoint` says.
#[derive(Clone, Debug)]
pub struct EndpointState {
    pod: ObjectName,
    uid: String,
    id: u32,
    container_id: String,
    identity: u32,
    labels: Vec<String>,
    addresses: Vec<std::net::IpAddr>,
    ports: Vec<palisade_policy::model::NamedPort>,
    service_account: String,
    ingress: bool,
    egress: bool,
}

impl Publication {
    /// The state of an endpoint as the tables tell. None before the API server told of the pod, as
    /// that owns the object.
    pub fn endpoint(tables: &Tables, endpoint: &Endpoint) -> Option<Self> {
        let pod = tables.pods.get(&endpoint.pod)?;
        let identity = tables.pod_identities.get(&endpoint.pod);
        let entry = tables.policy_entries.get(&endpoint.id);
        let known = identity.and_then(|row| row.identity.map(|id| (id, row.labels.clone())));
        let labels = known.as_ref().map(|(_, labels)| labels.iter().map(ToString::to_string));
        Some(Self::Endpoint(Box::new(EndpointState {
            pod: endpoint.pod.clone(),
            uid: pod.uid.clone(),
            id: endpoint.id,
            container_id: endpoint.container_id.clone(),
            identity: known.as_ref().map_or(palisade_abi::identity::INIT, |(id, _)| *id),
            labels: labels.map(Iterator::collect).unwrap_or_default(),
            addresses: endpoint.addresses().collect(),
            ports: pod.ports.clone(),
            service_account: pod.service_account.clone(),
            ingress: entry.is_some_and(|entry| entry.ingress.policy().is_some()),
            egress: entry.is_some_and(|entry| entry.egress.policy().is_some()),
        })))
    }
}

/// What a publication is about: a newer one replaces an older one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Condition(PolicyRef),
    Endpoint(ObjectName),
}

/// The endpoints of this node, by pod and container. A pod that got another sandbox has two until
/// the runtime takes the first one away.
#[derive(Default)]
struct Living(BTreeMap<(ObjectName, String), Box<EndpointState>>);

impl Living {
    /// What is to be written: if an endpoint is gone whose pod has another one, the state of that.
    fn follow(&mut self, publication: Publication) -> Publication {
        match &publication {
            Publication::Endpoint(state) => {
                let key = (state.pod.clone(), state.container_id.clone());
                self.0.insert(key, state.clone());
                publication
            }
            Publication::EndpointGone(pod, container) => {
                self.0.remove(&(pod.clone(), container.clone()));
                let mut others = self.0.range((pod.clone(), String::new())..);
                let other = others.next().filter(|((of, _), _)| of == pod);
                other.map_or(publication, |(_, state)| Publication::Endpoint(state.clone()))
            }
            _ => publication,
        }
    }
}

/// What has become of the `CiliumEndpoint`s of this node's pods.
#[derive(Clone, Debug, Default)]
pub struct Attempts {
    /// The newest attempt to write each.
    newest: BTreeMap<ObjectName, Result<(), String>>,
    /// Why the API server takes nothing at all, where it does not.
    refusal: Option<String>,
}

impl Attempts {
    /// Why the API server does not have the newest state of a pod of this node, if it has not.
    pub fn failure(&self, pod: &ObjectName) -> Option<&str> {
        match self.newest.get(pod) {
            Some(Ok(())) => None,
            Some(Err(why)) => Some(why),
            None => Some(self.refusal.as_deref().unwrap_or("it is not written yet")),
        }
    }

    fn note(&mut self, publication: &Publication, result: &kube::Result<()>) {
        let result = result.as_ref().map_err(|error| (chain(error), is_refusal(error)));
        self.refusal = result.as_ref().err().filter(|(_, all)| *all).map(|(why, _)| why.clone());
        match publication {
            Publication::Endpoint(state) => {
                self.newest.insert(state.pod.clone(), result.copied().map_err(|(why, _)| why));
            }
            Publication::EndpointGone(pod, _) => _ = self.newest.remove(pod),
            Publication::Identity(_) | Publication::Condition(..) => {}
        }
    }
}

struct Waiting {
    publication: Publication,
    due: Instant,
    patience: Patience,
}

/// Writes what it is told until nobody tells any more.
pub async fn run(
    client: Client,
    scope: Scope,
    mut queue: mpsc::UnboundedReceiver<Publication>,
    commands: mpsc::WeakSender<Command>,
    attempts: watch::Sender<Attempts>,
) {
    let mut waiting: BTreeMap<Subject, Waiting> = BTreeMap::new();
    let mut living = Living::default();
    let mut allocations: JoinSet<Arc<Labels>> = JoinSet::new();
    let mut allocating: HashSet<Arc<Labels>> = HashSet::new();
    // One at a time, so that an older state never overwrites a newer one; beside the queue, so that
    // a slow API server does not make it grow.
    let mut writing: JoinSet<(Subject, Waiting, kube::Result<()>)> = JoinSet::new();
    // A server that refuses one thing because it serves nobody is not asked for the next one either.
    let (mut patience, mut rested) = (Patience::default(), Instant::now());
    loop {
        let due = waiting.values().map(|item| item.due).min().filter(|_| writing.is_empty());
        let due = due.map(|due| due.max(rested));
        let timer = async {
            match due {
                Some(due) => tokio::time::sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            publication = queue.recv() => {
                let Some(publication) = publication else { return };
                let publication = living.follow(publication);
                let subject = match &publication {
                    Publication::Identity(labels) => {
                        if allocating.insert(labels.clone()) {
                            let (client, commands) = (client.clone(), commands.clone());
                            let labels = labels.clone();
                            allocations.spawn(identities::allocate(client, labels, commands));
                        }
                        continue;
                    }
                    Publication::Condition(policy, _) => Subject::Condition(policy.id.clone()),
                    Publication::Endpoint(state) => Subject::Endpoint(state.pod.clone()),
                    Publication::EndpointGone(pod, _) => Subject::Endpoint(pod.clone()),
                };
                let patience = Patience::default();
                let item = Waiting { publication, due: Instant::now(), patience };
                waiting.insert(subject, item);
            }
            Some(done) = allocations.join_next() => {
                if let Ok(labels) = done {
                    allocating.remove(&labels);
                }
            }
            () = timer => {
                // What fails again and again does not come before what has not been tried.
                let next = waiting.iter().min_by_key(|(_, item)| item.due);
                let Some(subject) = next.map(|(subject, _)| subject.clone()) else { continue };
                let Some(item) = waiting.remove(&subject) else { continue };
                let (client, scope) = (client.clone(), scope.clone());
                writing.spawn(async move {
                    let result = write(&client, &scope, &item.publication).await;
                    (subject, item, result)
                });
            }
            Some(written) = writing.join_next() => {
                let Ok((subject, mut item, result)) = written else { continue };
                attempts.send_modify(|attempts| attempts.note(&item.publication, &result));
                let Err(error) = result else { continue };
                debug!(?subject, error = chain(&error), "cannot write to the API yet");
                item.due = if is_refusal(&error) {
                    rested = Instant::now() + patience.after(&error);
                    // After all that is due by then: it may be the only one that is refused.
                    rested
                } else {
                    Instant::now() + item.patience.after(&error)
                };
                // What came meanwhile is newer.
                waiting.entry(subject).or_insert(item);
            }
        }
    }
}

async fn write(client: &Client, scope: &Scope, publication: &Publication) -> kube::Result<()> {
    match publication {
        Publication::Identity(_) => Ok(()),
        Publication::Condition(policy, condition) => {
            policies::report(client, scope, policy, condition).await
        }
        Publication::Endpoint(state) => endpoints::write(client, scope, state).await,
        Publication::EndpointGone(pod, container) => {
            endpoints::delete(client, pod, container).await
        }
    }
}

/// A 404 is as good as done: the object that this is about is gone.
fn gone_is_done<T>(result: kube::Result<T>) -> kube::Result<()> {
    match result {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => other.map(drop),
    }
}
