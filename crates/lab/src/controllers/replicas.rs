//! ReplicaSets: the right number of pods, and the status that tells of them.

use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Resource, ResourceExt};
use serde_json::json;

use super::{Context, settled};

pub(super) async fn reconcile(context: &Context) -> kube::Result<()> {
    for set in context.replica_sets.state() {
        if set.metadata.deletion_timestamp.is_none() {
            reconcile_one(context, &set).await?;
        }
    }
    Ok(())
}

async fn reconcile_one(context: &Context, set: &ReplicaSet) -> kube::Result<()> {
    let uid = set.uid().unwrap_or_default();
    let cached: Vec<_> =
        context.pods.state().into_iter().filter(|pod| owned(&**pod, &uid)).collect();
    let live: Vec<&Pod> = cached.iter().map(|pod| &**pod).filter(|pod| active(pod)).collect();
    let wanted = usize::try_from(wanted(set)).unwrap_or(0);
    if live.len() != wanted {
        scale(context, set, &uid, wanted).await?;
    }
    write_status(context, set, &live).await
}

fn wanted(set: &ReplicaSet) -> i32 {
    set.spec.replicas.unwrap_or(1)
}

/// Whether `uid` controls the object.
pub(super) fn owned<K: Resource>(object: &K, uid: &str) -> bool {
    object.owner_references().iter().any(|owner| owner.controller == Some(true) && owner.uid == uid)
}

/// Whether a pod counts: not going, not ended.
pub(super) fn active(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    pod.metadata.deletion_timestamp.is_none() && !matches!(phase, Some("Failed" | "Succeeded"))
}

pub(super) fn ready(pod: &Pod) -> bool {
    pod.status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

async fn scale(context: &Context, set: &ReplicaSet, uid: &str, wanted: usize) -> kube::Result<()> {
    let namespace = set.namespace().unwrap_or_default();
    let api = Api::<Pod>::namespaced(context.client.clone(), &namespace);
    let all = api.list(&ListParams::default()).await?;
    let mut live: Vec<Pod> =
        all.items.into_iter().filter(|pod| owned(pod, uid) && active(pod)).collect();
    let template = set.spec.template.clone().unwrap_or_default();
    for number in live.len()..wanted {
        let seed = (uid, number, jiff::Timestamp::now().as_nanosecond().to_string());
        let suffix: String = super::fingerprint(&seed).chars().take(5).collect();
        let name = format!("{}-{suffix}", set.name_any());
        let pod = from_template(&template, name, &namespace, set.controller_owner_ref(&()));
        settled(api.create(&PostParams::default(), &pod).await)?;
    }
    if live.len() > wanted {
        // Those that serve least go first: unready ones, then the youngest.
        live.sort_by_key(|pod| {
            (ready(pod), std::cmp::Reverse(pod.creation_timestamp().map(|t| t.0)))
        });
        for pod in &live[..live.len() - wanted] {
            settled(api.delete(&pod.name_any(), &DeleteParams::default()).await)?;
        }
    }
    Ok(())
}

pub(super) fn from_template(
    template: &PodTemplateSpec,
    name: String,
    namespace: &str,
    owner: Option<OwnerReference>,
) -> Pod {
    let metadata = template.metadata.clone().unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: Some(namespace.to_owned()),
            labels: metadata.labels,
            annotations: metadata.annotations,
            owner_references: owner.map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        spec: template.spec.clone(),
        ..Pod::default()
    }
}

async fn write_status(context: &Context, set: &ReplicaSet, live: &[&Pod]) -> kube::Result<()> {
    let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    let ready = count(live.iter().filter(|pod| ready(pod)).count());
    let status = json!({
        "replicas": live.len(),
        "fullyLabeledReplicas": live.len(),
        "readyReplicas": ready,
        "availableReplicas": ready,
        "observedGeneration": set.metadata.generation,
    });
    let old = set.status.clone().unwrap_or_default();
    let same = old.replicas == count(live.len())
        && old.ready_replicas.unwrap_or(0) == ready
        && old.available_replicas.unwrap_or(0) == ready
        && old.observed_generation == set.metadata.generation;
    if same {
        return Ok(());
    }
    let namespace = set.namespace().unwrap_or_default();
    let api = Api::<ReplicaSet>::namespaced(context.client.clone(), &namespace);
    let patch = Patch::Merge(json!({"status": status}));
    settled(api.patch_status(&set.name_any(), &PatchParams::default(), &patch).await)
}
