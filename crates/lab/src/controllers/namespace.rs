//! Namespaces: what each has from the start, and how it ends.

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, ServiceAccount};
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::core::{DynamicObject, GroupVersionKind};
use kube::discovery::{ApiResource, Scope};
use kube::{Api, ResourceExt};
use serde_json::json;

use super::{Context, settled};

/// Kinds that protect the others: they go when nothing is left to protect.
const LAST: [&str; 2] = ["NetworkPolicy", "CiliumNetworkPolicy"];

pub(super) async fn reconcile(context: &Context) -> kube::Result<()> {
    for namespace in context.namespaces.state() {
        if namespace.metadata.deletion_timestamp.is_some() {
            terminate(context, &namespace).await?;
        } else {
            furnish(context, &namespace.name_any()).await?;
        }
    }
    Ok(())
}

async fn furnish(context: &Context, name: &str) -> kube::Result<()> {
    let accounts = Api::<ServiceAccount>::namespaced(context.client.clone(), name);
    let maps = Api::<ConfigMap>::namespaced(context.client.clone(), name);
    let known = format!("furnished/{name}");
    if super::scheduler::said(context, &known) {
        return Ok(());
    }
    let account = serde_json::from_value(json!({"metadata": {"name": "default"}}));
    let account = account.map_err(kube::Error::SerdeError)?;
    settled(accounts.create(&PostParams::default(), &account).await)?;
    let map = serde_json::from_value(
        json!({"metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": context.ca}}),
    )
    .map_err(kube::Error::SerdeError)?;
    settled(maps.create(&PostParams::default(), &map).await)?;
    super::scheduler::say(context, known);
    Ok(())
}

async fn terminate(context: &Context, namespace: &Namespace) -> kube::Result<()> {
    let name = namespace.name_any();
    super::scheduler::unsay(context, &format!("furnished/{name}"));
    let discovery = kube::Discovery::new(context.client.clone()).run().await?;
    let mut kinds = Vec::new();
    for group in discovery.groups() {
        for (resource, capabilities) in group.recommended_resources() {
            let listed = capabilities.operations.iter().any(|verb| verb == "list")
                && capabilities.operations.iter().any(|verb| verb == "delete");
            if capabilities.scope == Scope::Namespaced && listed {
                kinds.push(resource);
            }
        }
    }
    let (last, first): (Vec<_>, Vec<_>) =
        kinds.into_iter().partition(|kind| LAST.contains(&kind.kind.as_str()));
    if !empty(context, &name, &first).await? || !empty(context, &name, &last).await? {
        return Ok(());
    }
    finalize(context, namespace).await
}

/// Deletes everything of these kinds; whether nothing is left.
async fn empty(context: &Context, namespace: &str, kinds: &[ApiResource]) -> kube::Result<bool> {
    let mut left = false;
    for kind in kinds {
        let api = Api::<DynamicObject>::namespaced_with(context.client.clone(), namespace, kind);
        for object in api.list(&ListParams::default()).await? {
            left |= kind.kind != "Event";
            if object.metadata.deletion_timestamp.is_none() {
                let name = object.name_any();
                settled(api.delete(&name, &DeleteParams::background()).await)?;
            }
        }
    }
    Ok(!left)
}

async fn finalize(context: &Context, namespace: &Namespace) -> kube::Result<()> {
    let mut done = namespace.clone();
    if let Some(spec) = &mut done.spec {
        spec.finalizers = Some(Vec::new());
    }
    done.metadata.managed_fields = None;
    let mut value = serde_json::to_value(&done).map_err(kube::Error::SerdeError)?;
    let kind = GroupVersionKind::gvk("", "v1", "Namespace");
    value["apiVersion"] = kind.api_version().into();
    value["kind"] = kind.kind.into();
    let body = serde_json::to_vec(&value).map_err(kube::Error::SerdeError)?;
    let uri = format!("/api/v1/namespaces/{}/finalize", namespace.name_any());
    let request = http_put(&uri, body)?;
    settled(context.client.request::<serde_json::Value>(request).await)
}

fn http_put(uri: &str, body: Vec<u8>) -> kube::Result<hyper::Request<Vec<u8>>> {
    hyper::Request::put(uri)
        .header("content-type", "application/json")
        .body(body)
        .map_err(kube::Error::HttpError)
}
