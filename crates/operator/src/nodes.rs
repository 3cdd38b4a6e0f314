//! Nodes that get an agent are kept free of new pods until it is ready.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use futures::{StreamExt, stream};
use k8s_openapi::{
    api::core::v1::{Node, Pod, Taint},
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use kube::{
    Api, Client, ResourceExt,
    api::{ListParams, Patch, PatchParams},
    runtime::{WatchStreamExt, watcher},
};
use palisade_api::client::{Patience, WATCH_SECONDS, chain, is_refusal, patient};
use serde_json::{Value, json};
use tracing::{info, warn};

use crate::metrics::Metrics;

/// The taint; people may put it on a node before the node joins.
const TAINT: &str = "node.cilium.io/agent-not-ready";
/// The agents' pods.
const SELECTOR: &str = "k8s-app=palisade";
/// Nodes and pods are looked at when one changes, and at least so often.
const PERIOD: Duration = Duration::from_secs(60);
/// Changes of so short a time are one.
const BUNDLE: Duration = Duration::from_millis(100);

/// Labels that a node must have to get an agent.
pub(crate) type Selector = BTreeMap<String, String>;

/// As the chart writes it: a map in JSON; null selects every node, as in a pod's `nodeSelector`.
pub(crate) fn selector(text: &str) -> Result<Selector, String> {
    let selector: Option<Selector> = serde_json::from_str(text)
        .map_err(|error| format!(r#"{error}; write it like {{"kubernetes.io/os":"linux"}}"#))?;
    Ok(selector.unwrap_or_default())
}

/// Keeps taints true.
pub(crate) async fn run(
    client: Client,
    namespace: String,
    selector: Selector,
    metrics: Arc<Metrics>,
) {
    let nodes: Api<Node> = Api::all(client.clone());
    let agents: Api<Pod> = Api::namespaced(client, &namespace);
    let every = watcher::Config::default().timeout(WATCH_SECONDS);
    let selected = every.clone().labels(SELECTOR);
    let pods = patient(watcher(agents.clone(), selected)).touched_objects();
    let others = patient(watcher(nodes.clone(), every)).touched_objects();
    let mut changes = stream::select(pods.map(drop).boxed(), others.map(drop).boxed());
    let mut patience = Patience::default();
    loop {
        if let Err(error) = round(&nodes, &agents, &selector, &metrics).await {
            metrics.failed();
            warn!(error = chain(&error), "cannot set the taints of nodes yet");
            tokio::time::sleep(patience.after(&error)).await;
            continue;
        }
        let _ = tokio::time::timeout(PERIOD, changes.next()).await;
        while tokio::time::timeout(BUNDLE, changes.next()).await.is_ok() {}
    }
}

async fn round(
    nodes: &Api<Node>,
    agents: &Api<Pod>,
    selector: &Selector,
    metrics: &Metrics,
) -> kube::Result<()> {
    let agents = agents.list(&ListParams::default().labels(SELECTOR)).await?;
    let ready: HashSet<String> =
        agents.items.into_iter().filter(is_ready).filter_map(|pod| pod.spec?.node_name).collect();
    let all = nodes.list(&ListParams::default()).await?.items;
    let state = |node: &Node| match ready.contains(&node.name_any()) {
        true => Agent::Ready,
        false if is_selected(node, selector) => Agent::Awaited,
        false => Agent::Elsewhere,
    };
    let waiting = all.iter().filter(|node| state(node) == Agent::Awaited).count();
    metrics.nodes_not_ready.store(waiting as u64, Relaxed);
    for node in &all {
        let Err(error) = settle(nodes, node, state(node)).await else { continue };
        if is_refusal(&error) {
            return Err(error);
        }
        // What is wrong with one node is no reason for others to wait.
        metrics.failed();
        warn!(node = node.name_any(), error = chain(&error), "cannot set the node's taints yet");
    }
    Ok(())
}

/// The agent of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Agent {
    Ready,
    Awaited,
    /// The node gets none: what its pods wait for is not ours.
    Elsewhere,
}

fn is_selected(node: &Node, selector: &Selector) -> bool {
    selector.iter().all(|(key, value)| node.labels().get(key) == Some(value))
}

/// Makes one node say whether its agent is ready.
async fn settle(api: &Api<Node>, node: &Node, agent: Agent) -> kube::Result<()> {
    let name = node.name_any();
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
    if let Some(wanted) = taints_for(taints, agent == Agent::Awaited) {
        let patch = json!({
            "metadata": { "resourceVersion": node.metadata.resource_version },
            "spec": { "taints": wanted },
        });
        ignore_conflict(
            api.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await.map(drop),
        )?;
        info!(node = name, ?agent, "taint");
    }
    if agent == Agent::Ready && !network_is_available(node) {
        let patch = json!({ "status": { "conditions": [available()] } });
        let params = PatchParams::default();
        ignore_conflict(
            api.patch_status(&name, &params, &Patch::Strategic(&patch)).await.map(drop),
        )?;
    }
    Ok(())
}

/// The taints to write, where those that are there are not right.
fn taints_for(taints: &[Taint], awaited: bool) -> Option<Vec<Taint>> {
    let tainted = taints.iter().any(|taint| taint.key == TAINT);
    if tainted == awaited {
        return None;
    }
    let mut wanted: Vec<Taint> =
        taints.iter().filter(|taint| taint.key != TAINT).cloned().collect();
    if awaited {
        wanted.push(Taint {
            key: TAINT.to_owned(),
            value: Some("true".to_owned()),
            effect: "NoSchedule".to_owned(),
            ..Taint::default()
        });
    }
    Some(wanted)
}

/// Somebody else changed the node: that is a change, and brings the next round.
fn ignore_conflict(outcome: kube::Result<()>) -> kube::Result<()> {
    match outcome {
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        other => other,
    }
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    pod.metadata.deletion_timestamp.is_none()
        && conditions.into_iter().any(|it| it.type_ == "Ready" && it.status == "True")
}

/// Some clouds mark new nodes as without network until somebody says otherwise.
fn network_is_available(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|it| it.type_ == "NetworkUnavailable" && it.status == "False")
}

fn available() -> Value {
    let now = Time(Timestamp::now());
    json!({
        "type": "NetworkUnavailable",
        "status": "False",
        "reason": "PalisadeIsUp",
        "message": "Palisade is running on this node",
        "lastHeartbeatTime": now,
        "lastTransitionTime": now,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taint(key: &str) -> Taint {
        Taint { key: key.to_owned(), effect: "NoSchedule".to_owned(), ..Taint::default() }
    }

    #[test]
    fn only_our_taint_comes_and_goes() {
        let other = taint("dedicated");
        let keys = |taints: Option<Vec<Taint>>| {
            taints.map(|taints| taints.into_iter().map(|taint| taint.key).collect::<Vec<_>>())
        };
        assert_eq!(keys(taints_for(std::slice::from_ref(&other), false)), None);
        assert_eq!(
            keys(taints_for(std::slice::from_ref(&other), true)),
            Some(vec!["dedicated".to_owned(), TAINT.to_owned()])
        );
        let both = [taint(TAINT), other];
        assert_eq!(keys(taints_for(&both, true)), None);
        assert_eq!(keys(taints_for(&both, false)), Some(vec!["dedicated".to_owned()]));
    }

    #[test]
    fn agents_run_where_every_label_is_as_selected() {
        let labels = |text: &str| selector(text).unwrap();
        let linux = r#"{"kubernetes.io/os":"linux"}"#;
        let mut node = Node::default();
        assert!(is_selected(&node, &labels("{}")) && is_selected(&node, &labels("null")));
        assert!(!is_selected(&node, &labels(linux)));
        node.metadata.labels = Some(labels(r#"{"kubernetes.io/os":"linux","zone":"a"}"#));
        assert!(is_selected(&node, &labels(linux)));
        assert!(!is_selected(&node, &labels(r#"{"kubernetes.io/os":"linux","zone":"b"}"#)));
        assert!(selector("zone=a").unwrap_err().contains("write it like"));
    }

    #[tokio::test]
    async fn a_node_that_cannot_be_written_keeps_no_other_waiting() {
        let (client, written) = crate::fake::api();
        let (nodes, agents) = (Api::all(client.clone()), Api::namespaced(client, "default"));
        let metrics = Metrics::default();
        round(&nodes, &agents, &Selector::new(), &metrics).await.unwrap();
        assert_eq!(*written.lock().unwrap(), ["/api/v1/nodes/first", "/api/v1/nodes/second"]);
        assert_eq!(metrics.errors.load(Relaxed), 1);
    }
}
