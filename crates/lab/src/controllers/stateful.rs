//! StatefulSets, in their simplest form: numbered pods, one after the other.

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, Resource, ResourceExt};
use serde_json::json;

use super::replicas::{active, from_template, owned, ready};
use super::{Context, fingerprint, settled};

const REVISION: &str = "controller-revision-hash";

pub(super) async fn reconcile(context: &Context) -> kube::Result<()> {
    for set in context.stateful_sets.state() {
        if set.metadata.deletion_timestamp.is_none() {
            reconcile_one(context, &set).await?;
        }
    }
    Ok(())
}

async fn reconcile_one(context: &Context, set: &StatefulSet) -> kube::Result<()> {
    let spec = &set.spec;
    let (name, namespace) = (set.name_any(), set.namespace().unwrap_or_default());
    let uid = set.uid().unwrap_or_default();
    let wanted = spec.replicas.unwrap_or(1);
    let hash = format!("{name}-{}", fingerprint(&spec.template));
    let api = Api::<Pod>::namespaced(context.client.clone(), &namespace);
    let pods: Vec<_> = context.pods.state().into_iter().filter(|pod| owned(&**pod, &uid)).collect();
    let ordinal = |pod: &Pod| pod.name_any().rsplit('-').next().and_then(|n| n.parse::<i32>().ok());
    let parallel = spec.pod_management_policy.as_deref() == Some("Parallel");
    let mut waiting = false;
    for number in 0..wanted {
        let found = pods.iter().find(|pod| ordinal(pod) == Some(number));
        let settled_here = match found {
            Some(pod) if !active(pod) && pod.metadata.deletion_timestamp.is_none() => {
                settled(api.delete(&pod.name_any(), &DeleteParams::default()).await)?;
                false
            }
            Some(pod) => ready(pod) && active(pod),
            None => {
                let pod = numbered(set, &name, &namespace, number, &hash);
                settled(api.create(&PostParams::default(), &pod).await)?;
                false
            }
        };
        waiting |= !settled_here;
        if waiting && !parallel {
            break;
        }
    }
    let outdated = |pod: &Pod| {
        let surplus = ordinal(pod).is_none_or(|number| number >= wanted);
        let on_delete =
            spec.update_strategy.as_ref().and_then(|s| s.type_.as_deref()) == Some("OnDelete");
        surplus || (!waiting && !on_delete && pod.labels().get(REVISION) != Some(&hash))
    };
    let highest = pods
        .iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_none() && outdated(pod))
        .max_by_key(|pod| ordinal(pod));
    if let Some(pod) = highest {
        settled(api.delete(&pod.name_any(), &DeleteParams::default()).await)?;
    }
    let current: Vec<&Pod> = pods.iter().map(|pod| &**pod).filter(|pod| active(pod)).collect();
    write_status(context, set, &current, &hash).await
}

fn numbered(set: &StatefulSet, name: &str, namespace: &str, number: i32, hash: &str) -> Pod {
    let template = set.spec.template.clone();
    let own = format!("{name}-{number}");
    let mut pod = from_template(&template, own.clone(), namespace, set.controller_owner_ref(&()));
    let labels = pod.metadata.labels.get_or_insert_default();
    labels.insert("statefulset.kubernetes.io/pod-name".to_owned(), own.clone());
    labels.insert("apps.kubernetes.io/pod-index".to_owned(), number.to_string());
    labels.insert(REVISION.to_owned(), hash.to_owned());
    if let Some(spec) = &mut pod.spec {
        spec.hostname = Some(own);
        spec.subdomain = set.spec.service_name.clone();
    }
    pod
}

async fn write_status(
    context: &Context,
    set: &StatefulSet,
    pods: &[&Pod],
    hash: &str,
) -> kube::Result<()> {
    let updated =
        pods.iter().filter(|pod| pod.labels().get(REVISION).is_some_and(|h| h == hash)).count();
    let ready = pods.iter().filter(|pod| ready(pod)).count();
    let status = json!({
        "observedGeneration": set.metadata.generation,
        "replicas": pods.len(),
        "readyReplicas": ready,
        "availableReplicas": ready,
        "currentReplicas": updated,
        "updatedReplicas": updated,
        "currentRevision": hash,
        "updateRevision": hash,
    });
    let before = serde_json::to_value(&set.status).unwrap_or_default();
    let same =
        status.as_object().into_iter().flatten().all(|(key, value)| {
            &before[key] == value || (value == &json!(0) && before[key].is_null())
        });
    if same {
        return Ok(());
    }
    let namespace = set.namespace().unwrap_or_default();
    let api = Api::<StatefulSet>::namespaced(context.client.clone(), &namespace);
    let patch = Patch::Merge(json!({"status": status}));
    settled(api.patch_status(&set.name_any(), &PatchParams::default(), &patch).await)
}
