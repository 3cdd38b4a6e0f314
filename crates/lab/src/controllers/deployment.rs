//! Deployments: one ReplicaSet for each version of the template, and the way from one to the next.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Resource, ResourceExt};
use serde_json::{Value, json};

use super::replicas::owned;
use super::{Context, fingerprint, settled};

const REVISION: &str = "deployment.kubernetes.io/revision";
const HASH: &str = "pod-template-hash";

pub(super) async fn reconcile(context: &Context) -> kube::Result<()> {
    for deployment in context.deployments.state() {
        if deployment.metadata.deletion_timestamp.is_none() {
            reconcile_one(context, &deployment).await?;
        }
    }
    Ok(())
}

async fn reconcile_one(context: &Context, deployment: &Deployment) -> kube::Result<()> {
    let uid = deployment.uid().unwrap_or_default();
    let sets: Vec<Arc<ReplicaSet>> =
        context.replica_sets.state().into_iter().filter(|set| owned(&**set, &uid)).collect();
    let spec = &deployment.spec;
    let hash = fingerprint(&spec.template);
    let (current, old): (Vec<_>, Vec<_>) =
        sets.iter().partition(|set| set.labels().get(HASH) == Some(&hash));
    let Some(current) = current.first() else {
        let newest = sets.iter().map(|set| revision(&**set)).max().unwrap_or(0);
        create(context, deployment, &hash, newest + 1).await?;
        return write_status(context, deployment, None, &old).await;
    };
    let paused = spec.paused == Some(true);
    if !paused {
        roll(context, deployment, current, &old).await?;
    }
    if deployment.annotations().get(REVISION) != current.annotations().get(REVISION) {
        let patch =
            json!({"metadata": {"annotations": {REVISION: revision(&***current).to_string()}}});
        let api = deployments(context, deployment);
        let name = deployment.name_any();
        settled(api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await)?;
    }
    write_status(context, deployment, Some(current), &old).await
}

fn deployments(context: &Context, deployment: &Deployment) -> Api<Deployment> {
    Api::namespaced(context.client.clone(), &deployment.namespace().unwrap_or_default())
}

fn revision(object: &impl Resource) -> i64 {
    object.annotations().get(REVISION).and_then(|text| text.parse().ok()).unwrap_or(0)
}

async fn create(
    context: &Context,
    deployment: &Deployment,
    hash: &str,
    revision: i64,
) -> kube::Result<()> {
    let spec = &deployment.spec;
    let mut template = spec.template.clone();
    let metadata = template.metadata.get_or_insert_default();
    metadata.labels.get_or_insert_default().insert(HASH.to_owned(), hash.to_owned());
    let labels = metadata.labels.clone();
    let mut selector = spec.selector.clone();
    selector.match_labels.get_or_insert_default().insert(HASH.to_owned(), hash.to_owned());
    let namespace = deployment.namespace().unwrap_or_default();
    let set = ReplicaSet {
        metadata: ObjectMeta {
            name: Some(format!("{}-{hash}", deployment.name_any())),
            namespace: Some(namespace.clone()),
            labels,
            annotations: Some([(REVISION.to_owned(), revision.to_string())].into()),
            owner_references: deployment.controller_owner_ref(&()).map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        spec: ReplicaSetSpec {
            replicas: Some(0),
            selector,
            template: Some(template),
            min_ready_seconds: spec.min_ready_seconds,
        },
        ..ReplicaSet::default()
    };
    let api = Api::<ReplicaSet>::namespaced(context.client.clone(), &namespace);
    settled(api.create(&PostParams::default(), &set).await)
}

fn size(set: &ReplicaSet) -> i32 {
    set.spec.replicas.unwrap_or(0)
}

fn there(set: &ReplicaSet) -> i32 {
    set.status.as_ref().map_or(0, |status| status.replicas)
}

fn available(set: &ReplicaSet) -> i32 {
    set.status.as_ref().and_then(|status| status.available_replicas).unwrap_or(0)
}

/// One step towards the newest version, within the bounds of the strategy.
async fn roll(
    context: &Context,
    deployment: &Deployment,
    current: &ReplicaSet,
    old: &[&Arc<ReplicaSet>],
) -> kube::Result<()> {
    let spec = &deployment.spec;
    let wanted = spec.replicas.unwrap_or(1);
    let strategy = spec.strategy.clone().unwrap_or_default();
    if strategy.type_.as_deref() == Some("Recreate") {
        for set in old.iter().filter(|set| size(set) > 0) {
            resize(context, set, 0).await?;
        }
        let gone = old.iter().all(|set| there(set) == 0);
        return if gone { resize(context, current, wanted).await } else { Ok(()) };
    }
    let rolling = strategy.rolling_update.unwrap_or_default();
    let surge = share(rolling.max_surge.as_ref(), wanted, true);
    let mut unavailable = share(rolling.max_unavailable.as_ref(), wanted, false);
    if surge == 0 && unavailable == 0 {
        unavailable = 1;
    }
    let old_size: i32 = old.iter().map(|set| size(set)).sum();
    let target = if size(current) > wanted {
        wanted
    } else {
        (wanted + surge - old_size).clamp(size(current), wanted)
    };
    resize(context, current, target).await?;
    let ready: i32 =
        old.iter().map(|set| available(set)).sum::<i32>() + available(current).min(target);
    let mut spare = (ready - (wanted - unavailable)).max(0);
    for set in old.iter().filter(|set| size(set) > 0) {
        // Replicas that do not serve anyway cost nothing.
        let broken = (size(set) - available(set)).max(0);
        let take = (broken + spare).min(size(set));
        spare -= (take - broken).max(0);
        if take > 0 {
            resize(context, set, size(set) - take).await?;
        }
    }
    Ok(())
}

fn share(value: Option<&IntOrString>, of: i32, up: bool) -> i32 {
    let percent = |percent: i32| {
        let product = of * percent;
        if up { (product + 99) / 100 } else { product / 100 }
    };
    match value {
        None => percent(25),
        Some(IntOrString::Int(number)) => *number,
        Some(IntOrString::String(text)) => {
            text.trim_end_matches('%').parse().map(percent).unwrap_or(0)
        }
    }
}

async fn resize(context: &Context, set: &ReplicaSet, replicas: i32) -> kube::Result<()> {
    if size(set) == replicas {
        return Ok(());
    }
    let namespace = set.namespace().unwrap_or_default();
    let api = Api::<ReplicaSet>::namespaced(context.client.clone(), &namespace);
    let patch = Patch::Merge(json!({"spec": {"replicas": replicas}}));
    settled(api.patch(&set.name_any(), &PatchParams::default(), &patch).await)
}

async fn write_status(
    context: &Context,
    deployment: &Deployment,
    current: Option<&ReplicaSet>,
    old: &[&Arc<ReplicaSet>],
) -> kube::Result<()> {
    let wanted = deployment.spec.replicas.unwrap_or(1);
    let all = || current.into_iter().chain(old.iter().map(|set| &***set));
    let total: i32 = all().map(there).sum();
    let available: i32 = all().map(available).sum();
    let updated = current.map_or(0, there);
    let complete = updated == wanted && total == wanted && available >= wanted;
    let name = current.map(ResourceExt::name_any).unwrap_or_default();
    let minimum =
        wanted
            - share(
                deployment.spec.strategy.as_ref().and_then(|strategy| {
                    strategy.rolling_update.as_ref()?.max_unavailable.as_ref()
                }),
                wanted,
                false,
            );
    let (is_available, reason, message) = if available >= minimum {
        ("True", "MinimumReplicasAvailable", "Deployment has minimum availability.")
    } else {
        ("False", "MinimumReplicasUnavailable", "Deployment does not have minimum availability.")
    };
    let old_conditions =
        serde_json::to_value(deployment.status.as_ref().and_then(|s| s.conditions.clone()))
            .unwrap_or_default();
    let progress = if complete {
        ("NewReplicaSetAvailable", format!("ReplicaSet \"{name}\" has successfully progressed."))
    } else {
        ("ReplicaSetUpdated", format!("ReplicaSet \"{name}\" is progressing."))
    };
    let status = json!({
        "observedGeneration": deployment.metadata.generation,
        "replicas": total,
        "updatedReplicas": updated,
        "readyReplicas": available,
        "availableReplicas": available,
        "unavailableReplicas": (wanted - available).max(0),
        "conditions": [
            condition(&old_conditions, "Available", is_available, reason, message),
            condition(&old_conditions, "Progressing", "True", progress.0, &progress.1),
        ],
    });
    let before = serde_json::to_value(&deployment.status).unwrap_or_default();
    let same = status.as_object().into_iter().flatten().all(|(key, value)| {
        let zero = value == &json!(0) && before[key].is_null();
        zero || &before[key] == value
    });
    if same {
        return Ok(());
    }
    let api = deployments(context, deployment);
    let patch = Patch::Merge(json!({"status": status}));
    settled(api.patch_status(&deployment.name_any(), &PatchParams::default(), &patch).await)
}

/// A condition that keeps its times while it says the same.
fn condition(old: &Value, kind: &str, status: &str, reason: &str, message: &str) -> Value {
    let now = json!(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::now()));
    let before = old.as_array().into_iter().flatten().find(|c| c["type"] == kind);
    let kept = |same: bool, field: &str| match before {
        Some(before) if same => before[field].clone(),
        _ => now.clone(),
    };
    let same_status = before.is_some_and(|before| before["status"] == status);
    let same =
        same_status && before.is_some_and(|b| b["reason"] == reason && b["message"] == message);
    json!({
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": kept(same_status, "lastTransitionTime"),
        "lastUpdateTime": kept(same, "lastUpdateTime"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_round_as_documented() {
        assert_eq!(share(None, 2, true), 1);
        assert_eq!(share(None, 2, false), 0);
        assert_eq!(share(Some(&IntOrString::String("50%".into())), 3, true), 2);
        assert_eq!(share(Some(&IntOrString::Int(2)), 3, false), 2);
    }
}
