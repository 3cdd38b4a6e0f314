//! The pods of a cluster that somebody connects.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, GroupVersionKind, ListParams},
};
use palisade_api::client::chain;

/// Those that want an address of their own, as `namespace/name`.
pub(crate) type Pods = BTreeMap<String, ClusterPod>;

/// What the API server says of one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ClusterPod {
    /// Tells it from an earlier one of its name.
    pub(crate) uid: String,
    pub(crate) node: Option<String>,
    /// It has an address, and nobody is about to take it away.
    pub(crate) connected: bool,
}

pub(super) async fn read(client: &Client) -> kube::Result<Pods> {
    let pods = Api::<Pod>::all(client.clone()).list(&ListParams::default()).await?;
    Ok(pods.items.into_iter().filter(wants_address).map(of).collect())
}

/// Pods for which there is a `CiliumEndpoint`, or why nobody knows. A cluster that does not serve the
/// kind has none.
pub(super) async fn endpoints(client: &Client) -> Result<BTreeSet<String>, String> {
    let kind = GroupVersionKind::gvk("cilium.io", "v2", "CiliumEndpoint");
    let api = Api::<DynamicObject>::all_with(client.clone(), &ApiResource::from_gvk(&kind));
    match api.list(&ListParams::default()).await {
        Ok(list) => {
            let names = list.items.into_iter().map(|object| object.metadata);
            Ok(names.map(|it| key(it.namespace, it.name)).collect())
        }
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(BTreeSet::new()),
        Err(error) => Err(chain(&error)),
    }
}

fn of(pod: Pod) -> (String, ClusterPod) {
    let has_address = pod.status.is_some_and(|status| status.pod_ip.is_some());
    let metadata = pod.metadata;
    let told = ClusterPod {
        uid: metadata.uid.unwrap_or_default(),
        node: pod.spec.and_then(|spec| spec.node_name),
        connected: has_address && metadata.deletion_timestamp.is_none(),
    };
    (key(metadata.namespace, metadata.name), told)
}

/// Pods on the host's network have no address of their own, and those that ended need none.
fn wants_address(pod: &Pod) -> bool {
    let host = pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or_default();
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    !host && !matches!(phase, Some("Succeeded" | "Failed"))
}

fn key(namespace: Option<String>, name: Option<String>) -> String {
    format!("{}/{}", namespace.unwrap_or_default(), name.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_that_goes_is_not_connected_for_long() {
        let pod = |deleted: Option<&str>| {
            let metadata = json!({ "namespace": "default", "name": "web", "uid": "u",
                "deletionTimestamp": deleted });
            let status = json!({ "phase": "Running", "podIP": "10.0.1.5" });
            let spec = json!({ "nodeName": "node1", "containers": [] });
            let pod = json!({ "metadata": metadata, "spec": spec, "status": status });
            of(serde_json::from_value(pod).unwrap())
        };
        let (name, stays) = pod(None);
        let node = Some("node1".to_owned());
        assert_eq!(stays, ClusterPod { uid: "u".into(), node, connected: true });
        assert_eq!(name, "default/web");
        let (_, goes) = pod(Some("2026-01-01T00:00:00Z"));
        assert_eq!(goes, ClusterPod { connected: false, ..stays });
    }
}
