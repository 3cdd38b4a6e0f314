//! Objects whose owner is gone, and pods whose node is.

use std::collections::HashSet;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions};
use kube::runtime::reflector::Store;
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::json;

use super::{Context, settled};

#[cfg(test)]
mod tests;

const FOREGROUND: &str = "foregroundDeletion";
const ORPHAN: &str = "orphan";

pub(super) async fn reconcile(context: &Context) -> kube::Result<()> {
    finish(context, &context.deployments, |uid| dependents(&context.replica_sets, uid)).await?;
    finish(context, &context.replica_sets, |uid| dependents(&context.pods, uid)).await?;
    finish(context, &context.stateful_sets, |uid| dependents(&context.pods, uid)).await?;
    sweep(context, &context.replica_sets).await?;
    sweep(context, &context.slices).await?;
    sweep(context, &context.pods).await?;
    strand(context).await
}

fn dependents<K>(store: &Store<K>, uid: &str) -> Vec<(String, String, bool)>
where
    K: Resource<DynamicType = ()> + Clone + 'static,
{
    store
        .state()
        .iter()
        .filter(|object| object.owner_references().iter().any(|owner| owner.uid == uid))
        .map(|object| {
            let going = object.meta().deletion_timestamp.is_some();
            (object.namespace().unwrap_or_default(), object.name_any(), going)
        })
        .collect()
}

/// Ends deletions that wait for their dependents, or that leave them behind.
async fn finish<K>(
    context: &Context,
    store: &Store<K>,
    dependents: impl Fn(&str) -> Vec<(String, String, bool)>,
) -> kube::Result<()>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned
        + Dependents
        + 'static,
{
    for object in store.state() {
        if object.meta().deletion_timestamp.is_none() {
            continue;
        }
        let finalizers = object.finalizers().to_vec();
        let namespace = object.namespace().unwrap_or_default();
        let uid = object.uid().unwrap_or_default();
        let left = dependents(&uid);
        if finalizers.iter().any(|f| f == ORPHAN) {
            // The cache may lack the newest one, and what keeps its owner goes with it.
            K::release_all(context, &namespace, &uid).await?;
        } else if finalizers.iter().any(|f| f == FOREGROUND) {
            for (namespace, name, going) in &left {
                if !going {
                    K::delete(context, namespace, name).await?;
                }
            }
            if !left.is_empty() {
                continue;
            }
        } else {
            continue;
        }
        let rest: Vec<_> = finalizers.iter().filter(|f| *f != FOREGROUND && *f != ORPHAN).collect();
        let patch = Patch::Merge(json!({"metadata": {"finalizers": rest}}));
        let api = Api::<K>::namespaced(context.client.clone(), &namespace);
        settled(api.patch(&object.name_any(), &PatchParams::default(), &patch).await)?;
    }
    Ok(())
}

/// What an owner's dependents are.
trait Dependents {
    type Kind: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned;

    async fn delete(context: &Context, namespace: &str, name: &str) -> kube::Result<()> {
        let api = Api::<Self::Kind>::namespaced(context.client.clone(), namespace);
        settled(api.delete(name, &DeleteParams::foreground()).await)
    }

    async fn release_all(context: &Context, namespace: &str, owner: &str) -> kube::Result<()> {
        let api = Api::<Self::Kind>::namespaced(context.client.clone(), namespace);
        for object in api.list(&ListParams::default()).await? {
            let (left, released): (Vec<_>, Vec<_>) =
                object.owner_references().iter().partition(|reference| reference.uid != owner);
            if released.is_empty() {
                continue;
            }
            let patch = Patch::Merge(json!({"metadata": {"ownerReferences": left}}));
            settled(api.patch(&object.name_any(), &PatchParams::default(), &patch).await)?;
        }
        Ok(())
    }
}

impl Dependents for Deployment {
    type Kind = ReplicaSet;
}
impl Dependents for ReplicaSet {
    type Kind = Pod;
}
impl Dependents for StatefulSet {
    type Kind = Pod;
}

/// Deletes objects of which an owner, of a kind that we know, does not exist any more.
async fn sweep<K>(context: &Context, store: &Store<K>) -> kube::Result<()>
where
    K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned
        + 'static,
{
    for object in store.state() {
        let meta = object.meta();
        if meta.deletion_timestamp.is_some() {
            continue;
        }
        let namespace = object.namespace().unwrap_or_default();
        for owner in object.owner_references() {
            if !cached(context, owner) && !exists(context, &namespace, owner).await? {
                let api = Api::<K>::namespaced(context.client.clone(), &namespace);
                let name = object.name_any();
                // Only what was looked at: its owner may have released it since.
                let unchanged = Preconditions {
                    resource_version: object.resource_version(),
                    uid: object.uid(),
                };
                let delete = DeleteParams::background().preconditions(unchanged);
                settled(api.delete(&name, &delete).await)?;
                break;
            }
        }
    }
    Ok(())
}

fn cached(context: &Context, owner: &OwnerReference) -> bool {
    fn has<K: Resource<DynamicType = ()> + Clone + 'static>(store: &Store<K>, uid: &str) -> bool {
        store.find(|object| object.uid().as_deref() == Some(uid)).is_some()
    }
    match owner.kind.as_str() {
        "Deployment" => has(&context.deployments, &owner.uid),
        "ReplicaSet" => has(&context.replica_sets, &owner.uid),
        "StatefulSet" => has(&context.stateful_sets, &owner.uid),
        "Service" => has(&context.services, &owner.uid),
        "Pod" => has(&context.pods, &owner.uid),
        // Owners of other kinds are not ours to judge.
        _ => true,
    }
}

/// The caches may be behind; the API server is not.
async fn exists(context: &Context, namespace: &str, owner: &OwnerReference) -> kube::Result<bool> {
    async fn there<K>(
        context: &Context,
        namespace: &str,
        owner: &OwnerReference,
    ) -> kube::Result<bool>
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
            + Clone
            + std::fmt::Debug
            + DeserializeOwned,
    {
        let api = Api::<K>::namespaced(context.client.clone(), namespace);
        let found = api.get_opt(&owner.name).await?;
        Ok(found.is_some_and(|object| object.uid().as_deref() == Some(owner.uid.as_str())))
    }
    match owner.kind.as_str() {
        "Deployment" => there::<Deployment>(context, namespace, owner).await,
        "ReplicaSet" => there::<ReplicaSet>(context, namespace, owner).await,
        "StatefulSet" => there::<StatefulSet>(context, namespace, owner).await,
        "Service" => there::<Service>(context, namespace, owner).await,
        "Pod" => there::<Pod>(context, namespace, owner).await,
        _ => Ok(true),
    }
}

/// Nobody runs the pods of a node that does not exist: they go without being asked.
async fn strand(context: &Context) -> kube::Result<()> {
    let nodes: HashSet<String> = context.nodes.state().iter().map(|node| node.name_any()).collect();
    for pod in context.pods.state() {
        let Some(node) = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()) else {
            continue;
        };
        if nodes.contains(&node) {
            continue;
        }
        let namespace = pod.namespace().unwrap_or_default();
        let api = Api::<Pod>::namespaced(context.client.clone(), &namespace);
        let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        settled(api.delete(&pod.name_any(), &now).await)?;
    }
    Ok(())
}
