//! Waiting until what was applied runs.

use std::time::Duration;

use anyhow::Result;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use kube::{Api, Client, runtime::wait::await_condition};

use crate::{exit::Failure, progress::Progress};

/// Agents on every node, and an operator.
pub(super) async fn wait(client: &Client, namespace: &str, limit: Duration) -> Result<()> {
    let _progress = Progress::start("waiting for Palisade to run");
    let agents: Api<DaemonSet> = Api::namespaced(client.clone(), namespace);
    let operators: Api<Deployment> = Api::namespaced(client.clone(), namespace);
    let both = async {
        await_condition(agents, "palisade", |it: Option<&DaemonSet>| it.is_some_and(is_rolled_out))
            .await?;
        let operates = |it: Option<&Deployment>| it.is_some_and(operates);
        await_condition(operators, "palisade-operator", operates).await
    };
    match tokio::time::timeout(limit, both).await {
        Ok(outcome) => Ok(outcome.map(drop)?),
        Err(_) => Err(Failure::refused(
            format!("Palisade does not run after {} s", limit.as_secs()),
            "See what it waits for with:  palisade status",
        )
        .into()),
    }
}

/// Where no node is selected there is nothing to wait for, once the controller has looked.
pub(super) fn is_rolled_out(agents: &DaemonSet) -> bool {
    let Some(status) = &agents.status else { return false };
    status.observed_generation == agents.metadata.generation
        && status.updated_number_scheduled.unwrap_or_default() == status.desired_number_scheduled
        && status.number_ready == status.desired_number_scheduled
}

/// One is enough: a cluster of one node has no place for a second.
fn operates(operators: &Deployment) -> bool {
    let Some(status) = &operators.status else { return false };
    status.observed_generation == operators.metadata.generation
        && status.updated_replicas.unwrap_or_default() > 0
        && status.available_replicas.unwrap_or_default() > 0
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_rollout_is_done_when_the_controller_has_seen_it_and_all_pods_are_ready() {
        let done = |observed: Option<i64>, desired: i32, ready: i32| {
            let set = json!({
                "metadata": { "generation": 2 },
                "spec": { "selector": {}, "template": {} },
                "status": {
                    "observedGeneration": observed, "desiredNumberScheduled": desired,
                    "updatedNumberScheduled": desired, "numberReady": ready,
                    "currentNumberScheduled": desired, "numberMisscheduled": 0,
                },
            });
            is_rolled_out(&serde_json::from_value(set).unwrap())
        };
        assert!(done(Some(2), 3, 3) && !done(Some(2), 3, 2) && !done(Some(1), 3, 3));
        assert!(done(Some(2), 0, 0), "no node is selected");
        assert!(!done(Some(1), 0, 0) && !done(None, 0, 0), "nobody has looked yet");
    }
}
