//! `CiliumNode`: this node's addresses and pod networks.

use std::net::IpAddr;

use kube::{
    Api, Client,
    api::{DynamicObject, Patch, PatchParams, PostParams},
};
use palisade_api::client::{Patience, chain};
use serde_json::json;
use tokio::sync::watch;
use tracing::debug;

use crate::{
    engine::Progress,
    resources,
    tables::{
        Tables, TablesReader,
        nodes::{Node, router_address},
    },
};

/// Keeps the object of this node true: its addresses may change, and somebody may delete it.
pub async fn keep_node(
    client: Client,
    name: String,
    tables: TablesReader,
    mut progress: watch::Receiver<Progress>,
) {
    let mut patience = Patience::default();
    loop {
        let untold = untold(&tables.read(), &name);
        if let Some(node) = untold
            && let Err(error) = write(&client, &node).await
        {
            debug!(error = chain(&error), "cannot write the CiliumNode yet");
            tokio::time::sleep(patience.after(&error)).await;
            continue;
        }
        if progress.changed().await.is_err() {
            return;
        }
    }
}

/// The node, unless its `CiliumNode` says all of it already.
fn untold(tables: &Tables, name: &str) -> Option<Node> {
    let node = tables.node(name).filter(|node| !node.pod_cidrs.is_empty())?;
    let told = tables.cilium_nodes.get(&name.to_owned()).is_some_and(|told| {
        told.addresses == node.addresses
            && told.router_addresses == routers(node)
            && told.pod_cidrs == node.pod_cidrs
    });
    (!told).then(|| (**node).clone())
}

fn routers(node: &Node) -> Vec<IpAddr> {
    node.pod_cidrs.iter().filter_map(router_address).collect()
}

async fn write(client: &Client, node: &Node) -> kube::Result<()> {
    let resource = resources::cilium("CiliumNode");
    let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
    let internal = node.addresses.iter().map(|ip| json!({ "type": "InternalIP", "ip": ip }));
    let routers = routers(node);
    let routers = routers.iter().map(|ip| json!({ "type": "CiliumInternalIP", "ip": ip }));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::{Change, Intent, nodes::NodeSource};

    fn node(source: NodeSource, address: &str) -> Node {
        let mut node = Node {
            name: "node1".into(),
            source,
            uid: "node1".into(),
            addresses: vec![address.parse().expect("an address")],
            router_addresses: Vec::new(),
            pod_cidrs: vec!["10.0.1.0/24".parse().expect("a network")],
        };
        if source == NodeSource::CiliumNode {
            node.router_addresses = routers(&node);
        }
        node
    }

    #[test]
    fn the_object_follows_the_node() {
        let mut tables = Tables::default();
        let mut put = |source, address| {
            tables.apply(Intent::Node(source, Change::Put(node(source, address))));
            untold(&tables, "node1").map(|node| node.addresses)
        };
        let [first, second] = ["192.0.2.1", "192.0.2.2"];
        let addresses = |text: &str| Some(vec![text.parse::<IpAddr>().expect("an address")]);
        assert_eq!(put(NodeSource::Node, first), addresses(first), "there is no object yet");
        assert_eq!(put(NodeSource::CiliumNode, first), None, "it says everything");
        assert_eq!(put(NodeSource::Node, second), addresses(second), "the address changed");
        assert_eq!(put(NodeSource::CiliumNode, second), None);
        let gone = Change::Delete("node1".to_owned());
        tables.apply(Intent::Node(NodeSource::CiliumNode, gone));
        assert!(untold(&tables, "node1").is_some(), "somebody deleted it");
    }
}
