//! The scheduler: spreads pods over the nodes that are ready for them.

use std::collections::HashMap;

use k8s_openapi::api::core::v1::{Node, Pod, Taint, Toleration};
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;

use super::{Context, settled};
use crate::runner::Recorder;

pub(super) async fn reconcile(context: &Context) -> kube::Result<()> {
    let pods = context.pods.state();
    let nodes = context.nodes.state();
    let mut load: HashMap<String, usize> = HashMap::new();
    for pod in &pods {
        if let Some(node) = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()) {
            *load.entry(node).or_default() += 1;
        }
    }
    for pod in &pods {
        let Some(spec) = &pod.spec else { continue };
        let ours = spec.scheduler_name.as_deref().unwrap_or("default-scheduler");
        let wanted = spec.node_name.is_none()
            && pod.metadata.deletion_timestamp.is_none()
            && ours == "default-scheduler";
        if !wanted {
            continue;
        }
        let fitting = nodes.iter().filter(|node| refusal(pod, node).is_none());
        let best = fitting
            .min_by_key(|node| (load.get(&node.name_any()).copied().unwrap_or(0), node.name_any()));
        match best {
            Some(node) => {
                *load.entry(node.name_any()).or_default() += 1;
                bind(context, pod, &node.name_any()).await?;
            }
            None => complain(context, pod, &nodes).await?,
        }
    }
    Ok(())
}

/// Why a pod cannot run on a node.
fn refusal(pod: &Pod, node: &Node) -> Option<String> {
    let ready = node
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .any(|condition| condition.type_ == "Ready" && condition.status == "True");
    if !ready {
        return Some("node(s) were not ready".to_owned());
    }
    if node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true) {
        return Some("node(s) were unschedulable".to_owned());
    }
    let spec = pod.spec.as_ref()?;
    let labels = node.labels();
    let selected = spec.node_selector.iter().flatten().all(|(k, v)| labels.get(k) == Some(v));
    if !selected {
        return Some("node(s) didn't match Pod's node affinity/selector".to_owned());
    }
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    let untolerated = taints
        .filter(|taint| taint.effect != "PreferNoSchedule")
        .find(|taint| !spec.tolerations.iter().flatten().any(|t| tolerates(t, taint)));
    untolerated.map(|taint| format!("node(s) had untolerated taint {{{}}}", taint.key))
}

fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let effect = toleration.effect.as_deref().unwrap_or_default();
    if !effect.is_empty() && effect != taint.effect {
        return false;
    }
    let key = toleration.key.as_deref().unwrap_or_default();
    if key.is_empty() {
        return toleration.operator.as_deref() == Some("Exists");
    }
    key == taint.key
        && (toleration.operator.as_deref() == Some("Exists")
            || toleration.value.as_deref().unwrap_or_default()
                == taint.value.as_deref().unwrap_or_default())
}

async fn bind(context: &Context, pod: &Pod, node: &str) -> kube::Result<()> {
    let namespace = pod.namespace().unwrap_or_default();
    let body = json!({
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": {"name": pod.name_any(), "namespace": namespace, "uid": pod.uid()},
        "target": {"apiVersion": "v1", "kind": "Node", "name": node},
    });
    let uri = format!("/api/v1/namespaces/{namespace}/pods/{}/binding", pod.name_any());
    let request = hyper::Request::post(&uri)
        .header("content-type", "application/json")
        .body(serde_json::to_vec(&body).map_err(kube::Error::SerdeError)?)
        .map_err(kube::Error::HttpError)?;
    settled(context.client.request::<serde_json::Value>(request).await)?;
    let recorder = Recorder::new(context.client.clone(), "default-scheduler", None);
    let text = format!("Successfully assigned {namespace}/{} to {node}", pod.name_any());
    recorder.normal(pod, "Scheduled", text).await;
    Ok(())
}

/// Tells, once for each reason, why a pod must wait.
async fn complain(
    context: &Context,
    pod: &Pod,
    nodes: &[std::sync::Arc<Node>],
) -> kube::Result<()> {
    let mut reasons: HashMap<String, usize> = HashMap::new();
    for reason in nodes.iter().filter_map(|node| refusal(pod, node)) {
        *reasons.entry(reason).or_default() += 1;
    }
    let mut reasons: Vec<_> =
        reasons.into_iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    reasons.sort();
    let text = format!("0/{} nodes are available: {}.", nodes.len(), reasons.join(", "));
    let key = format!("unschedulable/{}/{text}", pod.uid().unwrap_or_default());
    if said(context, &key) {
        return Ok(());
    }
    let recorder = Recorder::new(context.client.clone(), "default-scheduler", None);
    recorder.warning(pod, "FailedScheduling", &text).await;
    let patch = json!({"status": {"phase": "Pending", "conditions": [{
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": text,
        "lastTransitionTime": jiff::Timestamp::now().to_string(),
    }]}});
    let namespace = pod.namespace().unwrap_or_default();
    let api = Api::<Pod>::namespaced(context.client.clone(), &namespace);
    let name = pod.name_any();
    settled(api.patch_status(&name, &PatchParams::default(), &Patch::Merge(&patch)).await)?;
    say(context, key);
    Ok(())
}

/// Whether this has been said, or done, already.
pub(super) fn said(context: &Context, key: &str) -> bool {
    context.complained.lock().is_ok_and(|said| said.contains(key))
}

pub(super) fn say(context: &Context, key: String) {
    if let Ok(mut said) = context.complained.lock() {
        said.insert(key);
    }
}

pub(super) fn unsay(context: &Context, key: &str) {
    if let Ok(mut said) = context.complained.lock() {
        said.remove(key);
    }
}
