//! Conditions of policy objects; events of those that have none.

use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{DynamicObject, Patch, PatchParams, PostParams},
};
use palisade_policy::model::PolicyKind;
use serde_json::json;

use super::gone_is_done;
use crate::{
    resolve::Scope,
    resources,
    tables::policies::{Condition, PolicyObject},
};

/// Says on the object, or beside it, what was found.
pub(super) async fn report(
    client: &Client,
    scope: &Scope,
    policy: &PolicyObject,
    condition: &Condition,
) -> kube::Result<()> {
    if policy.id.kind == PolicyKind::NetworkPolicy {
        return event(client, scope, policy, condition).await;
    }
    let resource = resources::policy(policy.id.kind);
    let api: Api<DynamicObject> = match &policy.id.namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    let status = json!({ "status": { "conditions": [{
        "type": "Valid",
        "status": if condition.finding.is_valid() { "True" } else { "False" },
        "reason": condition.finding.as_str(),
        "message": condition.message,
        "observedGeneration": condition.generation,
        "lastTransitionTime": Timestamp::now(),
    }]}});
    let params = PatchParams::default();
    gone_is_done(api.patch_status(&policy.id.name, &params, &Patch::Merge(status)).await)
}

async fn event(
    client: &Client,
    scope: &Scope,
    policy: &PolicyObject,
    condition: &Condition,
) -> kube::Result<()> {
    let namespace = policy.id.namespace.clone().unwrap_or_default();
    // One event for each version of the object and node: repeating it is a conflict, and fine.
    let name = format!("{}.{}.{}", policy.uid, policy.generation, scope.node);
    let now = Time(Timestamp::now());
    let event = Event {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: Some(namespace.clone()),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some("networking.k8s.io/v1".into()),
            kind: Some("NetworkPolicy".into()),
            name: Some(policy.id.name.clone()),
            namespace: Some(namespace.clone()),
            uid: Some(policy.uid.clone()),
            ..ObjectReference::default()
        },
        type_: Some("Warning".into()),
        reason: Some("Refused".into()),
        message: Some(condition.message.clone()),
        source: Some(EventSource {
            component: Some("palisade-agent".into()),
            host: Some(scope.node.clone()),
        }),
        first_timestamp: Some(now.clone()),
        last_timestamp: Some(now),
        count: Some(1),
        ..Event::default()
    };
    let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
    match api.create(&PostParams::default(), &event).await {
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        other => gone_is_done(other),
    }
}
