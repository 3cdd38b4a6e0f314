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

pub(super) fn is_rolled_out(agents: &DaemonSet) -> bool {
    let Some(status) = &agents.status else { return false };
    status.observed_generation == agents.metadata.generation
        && status.updated_number_scheduled.unwrap_or_default() == status.desired_number_scheduled
        && status.number_ready == status.desired_number_scheduled
        && status.desired_number_scheduled > 0
}

/// One is enough: a cluster of one node has no place for a second.
fn operates(operators: &Deployment) -> bool {
    let Some(status) = &operators.status else { return false };
    status.observed_generation == operators.metadata.generation
        && status.updated_replicas.unwrap_or_default() > 0
        && status.available_replicas.unwrap_or_default() > 0
}
