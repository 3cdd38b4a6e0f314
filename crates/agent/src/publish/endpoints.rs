//! `CiliumEndpoint`: what operators and tools read of a pod.

use std::net::IpAddr;

use kube::{
    Api, Client,
    api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions},
};
use serde_json::{Value, json};

use super::{EndpointState, gone_is_done};
use crate::{names, resolve::Scope, resources, tables::ObjectName};

/// Creates or updates the object of an endpoint.
pub(super) async fn write(
    client: &Client,
    scope: &Scope,
    state: &EndpointState,
) -> kube::Result<()> {
    let resource = resources::cilium("CiliumEndpoint");
    let api: Api<DynamicObject> =
        Api::namespaced_with(client.clone(), &state.pod.namespace, &resource);
    let owner = json!([{
        "apiVersion": "v1",
        "kind": "Pod",
        "name": state.pod.name,
        "uid": state.uid,
    }]);
    let content =
        json!({ "metadata": { "ownerReferences": owner }, "status": status(scope, state) });
    let params = PatchParams::default();
    match api.patch(&state.pod.name, &params, &Patch::Merge(&content)).await {
        Err(kube::Error::Api(error)) if error.code == 404 => {}
        other => return other.map(drop),
    }
    let mut object = DynamicObject::new(&state.pod.name, &resource);
    object.metadata.namespace = Some(state.pod.namespace.clone());
    object.metadata.owner_references =
        serde_json::from_value(content["metadata"]["ownerReferences"].clone()).ok();
    object.data = json!({ "status": content["status"] });
    // The namespace may be going: then there is nothing to write to.
    gone_is_done(api.create(&PostParams::default(), &object).await)
}

/// Removes the object of an endpoint that is gone, unless it tells of another one by now.
pub(super) async fn delete(client: &Client, pod: &ObjectName, container: &str) -> kube::Result<()> {
    let resource = resources::cilium("CiliumEndpoint");
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), &pod.namespace, &resource);
    let Some(object) = api.get_opt(&pod.name).await? else { return Ok(()) };
    if object.data["status"]["external-identifiers"]["container-id"] != container {
        return Ok(());
    }
    // Who writes meanwhile has another endpoint to tell of.
    let read = Preconditions {
        uid: object.metadata.uid,
        resource_version: object.metadata.resource_version,
    };
    gone_is_done(api.delete(&pod.name, &DeleteParams::default().preconditions(read)).await)
}

fn status(scope: &Scope, state: &EndpointState) -> Value {
    let of_family = |wanted: fn(&IpAddr) -> bool| {
        state.addresses.iter().find(|address| wanted(address)).map(ToString::to_string)
    };
    let mut addressing = serde_json::Map::new();
    if let Some(ipv4) = of_family(IpAddr::is_ipv4) {
        addressing.insert("ipv4".into(), ipv4.into());
    }
    if let Some(ipv6) = of_family(IpAddr::is_ipv6) {
        addressing.insert("ipv6".into(), ipv6.into());
    }
    let ports: Vec<Value> = state
        .ports
        .iter()
        .map(|port| {
            json!({
                "name": port.name,
                "port": port.port,
                "protocol": names::protocol(port.protocol),
            })
        })
        .collect();
    let enforcement = |enforced: bool| json!({ "enforcing": enforced, "state": if enforced { "enforcing" } else { "disabled" } });
    json!({
        "id": state.id,
        "external-identifiers": {
            "container-id": state.container_id,
            "k8s-namespace": state.pod.namespace,
            "k8s-pod-name": state.pod.name,
            "pod-name": state.pod.to_string(),
        },
        "identity": { "id": state.identity, "labels": state.labels },
        "networking": { "addressing": [addressing], "node": scope.node },
        "policy": { "ingress": enforcement(state.ingress), "egress": enforcement(state.egress) },
        "named-ports": ports,
        "service-account": state.service_account,
        "state": if state.labels.is_empty() { "waiting-for-identity" } else { "ready" },
    })
}
