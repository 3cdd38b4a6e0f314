//! What an earlier run of the lab said of nodes and pods is not true any more.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};

use super::Cluster;
use crate::controllers::settled;

/// Takes back that nodes and pods are ready, and removes nodes that this run does not have.
pub(super) async fn forget(client: &Client, cluster: &Cluster) -> kube::Result<()> {
    let nodes = Api::<Node>::all(client.clone());
    for node in nodes.list(&ListParams::default()).await? {
        let name = node.name_any();
        if cluster.nodes.iter().any(|known| known.name == name) {
            let status = json!({"status": {"conditions": [starting()]}});
            nodes.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)).await?;
            continue;
        }
        // Its pods follow: the garbage collector finds that nobody runs them.
        nodes.delete(&name, &DeleteParams::default()).await?;
        let kind = GroupVersionKind::gvk("cilium.io", "v2", "CiliumNode");
        let facts = Api::<DynamicObject>::all_with(client.clone(), &ApiResource::from_gvk(&kind));
        settled(facts.delete(&name, &DeleteParams::default()).await)?;
    }
    for pod in Api::<Pod>::all(client.clone()).list(&ListParams::default()).await? {
        let ended = |phase: &str| matches!(phase, "Succeeded" | "Failed");
        let status = pod.status.as_ref();
        if status.and_then(|status| status.phase.as_deref()).is_none_or(ended) {
            continue;
        }
        let conditions = status.and_then(|status| status.conditions.clone()).unwrap_or_default();
        let conditions: Vec<Value> = conditions
            .into_iter()
            .map(|condition| match condition.type_.as_str() {
                "Ready" | "ContainersReady" => json!({"type": condition.type_, "status": "False",
                    "reason": "ContainersNotReady", "lastTransitionTime": now()}),
                _ => json!(condition),
            })
            .collect();
        let api = Api::<Pod>::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
        let status = Patch::Merge(json!({"status": {"conditions": conditions}}));
        api.patch_status(&pod.name_any(), &PatchParams::default(), &status).await?;
    }
    let none = json!({"status": {"availableReplicas": null, "readyReplicas": null}});
    for deployment in Api::<Deployment>::all(client.clone()).list(&ListParams::default()).await? {
        let namespace = deployment.namespace().unwrap_or_default();
        let api = Api::<Deployment>::namespaced(client.clone(), &namespace);
        let (name, how) = (deployment.name_any(), PatchParams::default());
        api.patch_status(&name, &how, &Patch::Merge(&none)).await?;
    }
    Ok(())
}

fn starting() -> Value {
    json!({"type": "Ready", "status": "False", "reason": "KubeletNotReady",
           "message": "the lab is starting", "lastTransitionTime": now()})
}

fn now() -> Value {
    json!(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::now()))
}
