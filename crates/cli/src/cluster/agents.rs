//! What the agents of an installation say of themselves, each in its own pod. The API server does
//! not know: an agent that it cannot reach is ready all the same, as its pods are connected.

use std::time::Duration;

use anyhow::{Context, Result};
use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use palisade_api::{admin::Status, client::chain};
use tokio::time::{Instant, timeout_at};

use super::{Installation, client, exec, on_runtime};
use crate::cli::Global;

const CONTAINER: &str = "agent";
/// So many are asked at once.
const AT_ONCE: usize = 16;
/// All have been asked after so long, or will not be.
const PATIENCE: Duration = Duration::from_secs(20);

/// One agent's answer.
pub(crate) struct Asked {
    pub(crate) pod: String,
    pub(crate) answer: Answer,
}

/// What came of the question.
pub(crate) enum Answer {
    Status(Box<Status>),
    /// It was asked, and did not say.
    None(String),
    /// It could not be asked, which says nothing about it.
    Unasked(String),
}

/// Asks each agent that runs.
pub(crate) fn ask(global: &Global, installation: &Installation) -> Result<Vec<Asked>> {
    on_runtime(None, async {
        let pods = Api::<Pod>::namespaced(client(global).await?, &installation.namespace);
        let running = installation.pods.iter().filter(|pod| {
            pod.containers.iter().any(|container| container.name == CONTAINER && container.running)
        });
        let deadline = Instant::now() + PATIENCE;
        let questions = running.map(|pod| async {
            let answer = timeout_at(deadline, answer(&pods, &pod.name)).await;
            let answer = answer.context("no answer in time").flatten();
            let answer = answer.unwrap_or_else(|error| Answer::Unasked(chain(&*error)));
            Asked { pod: pod.name.clone(), answer }
        });
        Ok(stream::iter(questions).buffered(AT_ONCE).collect().await)
    })
}

async fn answer(pods: &Api<Pod>, pod: &str) -> Result<Answer> {
    let command = ["/palisade", "node", "status"].map(str::to_owned).to_vec();
    let (_, said) = exec(pods, pod, Some(CONTAINER), command, None).await?;
    let status = serde_json::from_str(&said).with_context(|| {
        let first = said.lines().next().unwrap_or_default();
        format!("not the answer of this command's own version: {first}")
    })?;
    Ok(match status {
        Ok(status) => Answer::Status(Box::new(status)),
        Err(why) => Answer::None(why),
    })
}
