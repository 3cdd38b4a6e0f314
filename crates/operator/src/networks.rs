//! Pod networks of nodes.
//!
//! They stand in `Node.spec.podCIDRs`, where agents and everybody else look: once written they
//! cannot be changed, so two writers cannot both succeed. The operator writes them only where it
//! was told to, and only for nodes that have none.

use std::{
    net::IpAddr,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use anyhow::ensure;
use futures::TryStreamExt;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::{
    Api, Client, ResourceExt,
    api::{DynamicObject, Patch, PatchParams},
    runtime::{WatchStreamExt, watcher},
};
use palisade_api::{
    client::{Patience, WATCH_SECONDS, chain, is_refusal, patient},
    pool::{Pools, taken as others},
};
use serde_json::json;
use tracing::{error, info, warn};

use crate::{
    leader::Watch,
    metrics::Metrics,
    objects::{list, resource},
};

/// Nodes are looked at when one changes, and at least so often.
const PERIOD: Duration = Duration::from_secs(60);

/// Sees to it that every node has pod networks, or says that one has none.
pub(crate) async fn run(client: Client, pools: Option<Pools>, term: Watch, metrics: Arc<Metrics>) {
    let api: Api<Node> = Api::all(client.clone());
    let every = watcher::Config::default().timeout(WATCH_SECONDS);
    let mut changes = Box::pin(patient(watcher(api.clone(), every)).touched_objects());
    let mut patience = Patience::default();
    loop {
        if let Err(error) = round(&client, &api, pools.as_ref(), &term, &metrics).await {
            metrics.failed();
            warn!(error = chain(&*error), "cannot see to the nodes' pod networks yet");
            tokio::time::sleep(patience.after(&*error)).await;
            continue;
        }
        // A watch that fails is begun again; a change that is missed is found after the period.
        let _ = tokio::time::timeout(PERIOD, next_without_network(&mut changes)).await;
    }
}

/// Waits for a node to turn up without networks.
async fn next_without_network(
    changes: &mut (impl futures::TryStream<Ok = Node, Error = watcher::Error> + Unpin),
) {
    loop {
        match changes.try_next().await {
            Ok(Some(node)) if networks(&node).next().is_some() => {}
            Err(_) => {}
            Ok(_) => return,
        }
    }
}

async fn round(
    client: &Client,
    api: &Api<Node>,
    pools: Option<&Pools>,
    term: &Watch,
    metrics: &Metrics,
) -> anyhow::Result<()> {
    let nodes = list(api).await?;
    let without: Vec<&Node> = nodes.iter().filter(|node| networks(node).next().is_none()).collect();
    metrics.nodes.store(nodes.len() as u64, Relaxed);
    metrics.nodes_without_network.store(without.len() as u64, Relaxed);
    if without.is_empty() {
        return Ok(());
    }
    let Some(pools) = pools else {
        for node in without {
            warn!(
                node = node.name_any(),
                "the node has no pod network: start the controller manager with \
                 --allocate-node-cidrs, or install Palisade with config.ipam=cluster-pool"
            );
        }
        return Ok(());
    };
    let mut taken: Vec<IpNet> = nodes.iter().flat_map(networks).collect();
    taken.extend(recorded(client).await?);
    // A pool of before may be larger than what is free of it.
    let others = others(client, &nodes).await?;
    if let Err(fault) = pools.check(&others) {
        warn!("a part of the pods' networks is not given to nodes: config.{fault}");
    }
    taken.extend(others.into_iter().map(|other| other.network));
    taken.extend(claimed(client).await?);
    for node in without {
        let name = node.name_any();
        let Some(found) = pools.allocate(&taken) else {
            error!(
                node = name,
                "every pod network is taken: add one to config.pool-ipv4 or config.pool-ipv6"
            );
            return Ok(());
        };
        ensure!(term.leads(), "another one may lead by now");
        match write(api, node, &found).await {
            Ok(true) => {}
            Ok(false) => continue,
            Err(error) if is_refusal(&error) => return Err(error.into()),
            Err(error) => {
                // What is wrong with one node is no reason for others to wait.
                metrics.failed();
                warn!(node = name, error = chain(&error), "cannot write the node's networks yet");
                continue;
            }
        }
        info!(node = name, networks = ?found, "pod networks");
        metrics.networks_allocated.fetch_add(1, Relaxed);
        metrics.nodes_without_network.fetch_sub(1, Relaxed);
        taken.extend(found);
    }
    Ok(())
}

/// Writes to exactly the version that was read. False where the node has changed meanwhile: that
/// change brings the next round.
async fn write(api: &Api<Node>, node: &Node, networks: &[IpNet]) -> kube::Result<bool> {
    let texts: Vec<String> = networks.iter().map(ToString::to_string).collect();
    let patch = json!({
        "metadata": { "uid": node.metadata.uid, "resourceVersion": node.metadata.resource_version },
        "spec": { "podCIDR": texts.first(), "podCIDRs": texts },
    });
    match api.patch(&node.name_any(), &PatchParams::default(), &Patch::Merge(&patch)).await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Networks of `CiliumNode`s: a node that another installation gave networks to may still have
/// pods in them.
async fn recorded(client: &Client) -> kube::Result<Vec<IpNet>> {
    let resource = resource("CiliumNode", "ciliumnodes");
    let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
    let nodes = list(&api).await?;
    let lists =
        nodes.iter().filter_map(|node| node.data.pointer("/spec/ipam/podCIDRs")?.as_array());
    let texts = lists.flatten().filter_map(|network| network.as_str());
    Ok(texts.filter_map(|text| text.parse().ok()).collect())
}

/// Addresses of pods: those of a node that is lost are there for some time after its own object, and
/// until they are gone, others take who has such an address for one of them.
async fn claimed(client: &Client) -> kube::Result<Vec<IpNet>> {
    let pods = list(&Api::<Pod>::all(client.clone())).await?;
    let statuses = pods.into_iter().filter_map(|pod| pod.status);
    let addresses = statuses.flat_map(|status| status.pod_ips.unwrap_or_default());
    Ok(addresses.filter_map(|address| address.ip.parse::<IpAddr>().ok()).map(IpNet::from).collect())
}

fn networks(node: &Node) -> impl Iterator<Item = IpNet> {
    let spec = node.spec.as_ref();
    let all = spec.and_then(|spec| spec.pod_cidrs.as_deref()).unwrap_or_default();
    let first = spec.and_then(|spec| spec.pod_cidr.as_ref());
    all.iter().chain(first).filter_map(|text| text.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a round writes, with this pool.
    async fn written(pool: &str) -> (Vec<String>, Metrics) {
        let (client, written) = crate::fake::api();
        let pools = Pools::parse(pool, 24, "", 0).unwrap();
        let (metrics, term) = (Metrics::default(), Watch::lasting());
        round(&client, &Api::all(client.clone()), Some(&pools), &term, &metrics).await.unwrap();
        let paths = std::mem::take(&mut *written.lock().unwrap());
        (paths, metrics)
    }

    #[tokio::test]
    async fn a_node_that_cannot_be_written_keeps_no_other_waiting() {
        let (written, metrics) = written("10.0.0.0/16").await;
        assert_eq!(written, ["/api/v1/nodes/first", "/api/v1/nodes/second"]);
        let counts = [&metrics.errors, &metrics.networks_allocated, &metrics.nodes_without_network];
        assert_eq!(counts.map(|count| count.load(Relaxed)), [1, 1, 1]);
    }

    #[tokio::test]
    async fn a_network_in_which_a_pod_is_left_is_given_to_no_node() {
        let (written, _) = written("10.0.9.0/24").await;
        assert_eq!(written, [""; 0]);
    }
}
