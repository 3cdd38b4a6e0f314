//! `CiliumNode`: this node's addresses and pod networks.

use kube::{
    Api, Client,
    api::{DynamicObject, Patch, PatchParams, PostParams},
};
use serde_json::json;
use tracing::debug;

use super::PAUSE;
use crate::{
    resources,
    tables::nodes::{Node, router_address},
};

/// Writes the object of this node until it is written.
pub async fn publish_node(client: Client, node: Node) {
    let mut pause = PAUSE.0;
    while let Err(error) = write(&client, &node).await {
        debug!(%error, "cannot write the CiliumNode yet");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

async fn write(client: &Client, node: &Node) -> kube::Result<()> {
    let resource = resources::cilium("CiliumNode");
    let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
    let internal = node.addresses.iter().map(|ip| json!({ "type": "InternalIP", "ip": ip }));
    let routers = node.pod_cidrs.iter().filter_map(router_address);
    let routers = routers.map(|ip| json!({ "type": "CiliumInternalIP", "ip": ip }));
    let addresses: Vec<_> = internal.chain(routers).collect();
    let cidrs: Vec<String> = node.pod_cidrs.iter().map(ToString::to_string).collect();
    let owners = json!([
        { "apiVersion": "v1", "kind": "Node", "name": node.name, "uid": node.uid }
    ]);
    let spec = json!({ "addresses": addresses, "ipam": { "podCIDRs": cidrs } });
    let patch = json!({ "metadata": { "ownerReferences": owners }, "spec": spec });
    match api.patch(&node.name, &PatchParams::default(), &Patch::Merge(&patch)).await {
        Err(kube::Error::Api(error)) if error.code == 404 => {}
        other => return other.map(drop),
    }
    let mut object = DynamicObject::new(&node.name, &resource);
    object.metadata.owner_references = serde_json::from_value(owners).ok();
    object.data = json!({ "spec": spec });
    match api.create(&PostParams::default(), &object).await {
        Err(kube::Error::Api(error)) if error.code == 409 => Ok(()),
        other => other.map(drop),
    }
}
