//! What the Kubernetes API says, where one can be reached.

pub(crate) mod agents;
mod installation;
mod pods;

use std::{
    collections::BTreeSet,
    env,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use k8s_openapi::{
    api::core::v1::{Node, Pod},
    apimachinery::pkg::apis::meta::v1::Status,
};
use kube::{
    Api, Client, Config,
    api::{AttachParams, ListParams},
    config::{KubeConfigOptions, Kubeconfig},
};

use palisade_api::client::chain;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

pub(crate) use installation::{Container, Installation, PodState, Replicas};
pub(crate) use pods::{ClusterPod, Pods};

use crate::{cli::Global, exit::Failure};

/// The lab writes it when it comes up.
const LAB_KUBECONFIG: &str = "/run/palisade/lab/kubeconfig";
const TIMEOUT: Duration = Duration::from_secs(5);
/// A command in a container must have ended after so long.
const EXEC: Duration = Duration::from_secs(15);
/// Longer than a watch stays quiet.
const WATCH: Duration = Duration::from_secs(300);

/// What `status` and `version` want to know of the API server.
pub(crate) struct Cluster {
    /// Version of the API server.
    pub(crate) version: String,
    /// Names of all nodes.
    pub(crate) nodes: Vec<String>,
    pub(crate) pods: Pods,
    /// Pods for which there is a `CiliumEndpoint`, as `namespace/name`; or why nobody knows.
    pub(crate) endpoints: Result<BTreeSet<String>, String>,
    /// Names of nodes that nobody gave a network for pods.
    pub(crate) without_network: Vec<String>,
    /// What `palisade install` or Helm put into it; a lab has none.
    pub(crate) installation: Option<Installation>,
}

/// Reads it; every request is bounded in time.
pub(crate) fn read(global: &Global) -> Result<Cluster> {
    on_runtime(Some(TIMEOUT * 2), async {
        let client = client(global).await?;
        let version = client.apiserver_version().await.context("the API server's version")?;
        let nodes = Api::<Node>::all(client.clone());
        let nodes = nodes.list(&ListParams::default()).await.context("nodes")?;
        let without_network = nodes.items.iter().filter(|node| !has_network(node));
        Ok(Cluster {
            installation: Installation::find(&client).await?,
            without_network: without_network.filter_map(|it| it.metadata.name.clone()).collect(),
            version: version.git_version,
            nodes: nodes.items.into_iter().filter_map(|node| node.metadata.name).collect(),
            pods: pods::read(&client).await.context("pods")?,
            endpoints: pods::endpoints(&client).await,
        })
    })
}

/// The pods as they are now.
pub(crate) fn pods(global: &Global) -> Result<Pods> {
    on_runtime(Some(TIMEOUT * 2), async {
        pods::read(&client(global).await?).await.context("pods")
    })
}

/// Only the API server's version, and what is installed.
pub(crate) fn version(global: &Global) -> Result<(String, Option<Installation>)> {
    on_runtime(Some(TIMEOUT * 2), async {
        let client = client(global).await?;
        let version = client.apiserver_version().await?;
        Ok((version.git_version, Installation::find(&client).await.unwrap_or_default()))
    })
}

/// Runs work that speaks to the API server, all of it within `limit` if there is one.
pub(crate) fn on_runtime<T>(
    limit: Option<Duration>,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        let Some(limit) = limit else { return work.await };
        tokio::time::timeout(limit, work)
            .await
            .unwrap_or_else(|_| Err(anyhow::anyhow!("the API server does not answer")))
    });
    // Whoever interrupts the work does not wait for what it began on other threads.
    runtime.shutdown_background();
    result
}

/// The way to the API server that was asked for, or the one that is there. It answers.
pub(crate) async fn client(global: &Global) -> Result<Client> {
    let mut config = config(global).await?;
    config.connect_timeout = Some(TIMEOUT);
    config.read_timeout = Some(WATCH);
    let url = config.cluster_url.clone();
    let client = Client::try_from(config)?;
    match client.apiserver_version().await {
        // Whatever it says, it is there.
        Ok(_) | Err(kube::Error::Api(_)) => Ok(client),
        Err(error) => Err(Failure::unreachable(
            format!("the API server at {url} cannot be reached: {}", chain(&error)),
            "Does it run? Name another one with --kubeconfig FILE or --context NAME.",
        )
        .into()),
    }
}

async fn config(global: &Global) -> Result<Config> {
    let read = match chosen(global.kubeconfig.as_deref()) {
        Some(file) => Kubeconfig::read_from(&file),
        None if global.context.is_some() || env::var_os("KUBECONFIG").is_some() => {
            named_but_missing()?;
            Kubeconfig::read()
        }
        // Its text holds those of its causes.
        None => return Config::infer().await.map_err(|error| anyhow::anyhow!("{error}")),
    };
    let read = read.map_err(|error| anyhow::anyhow!("{error}"))?;
    let contexts: Vec<String> = read.contexts.iter().map(|it| it.name.clone()).collect();
    let options =
        KubeConfigOptions { context: global.context.clone(), ..KubeConfigOptions::default() };
    Config::from_custom_kubeconfig(read, &options).await.map_err(|error| {
        let advice = match contexts.as_slice() {
            [] => "It has no contexts at all. Name another one with --kubeconfig FILE.".to_owned(),
            some => format!("Choose one of its contexts with --context: {}", some.join(", ")),
        };
        Failure::refused(format!("the kubeconfig is of no use: {error}"), advice).into()
    })
}

/// Runs a command in a container of a pod; whether it succeeded, and what it said. It does not hear
/// where its input ends. A command that was not run, or of whose end nobody knows, is an error.
pub(crate) async fn exec(
    pods: &Api<Pod>,
    pod: &str,
    container: Option<&str>,
    command: Vec<String>,
    input: Option<&str>,
) -> Result<(bool, String)> {
    let params = AttachParams {
        container: container.map(str::to_owned),
        ..AttachParams::default().stdin(input.is_some()).stdout(true).stderr(true)
    };
    let run = async {
        let mut process = pods.exec(pod, command, &params).await?;
        let (mut stdin, stdout, stderr) = (process.stdin(), process.stdout(), process.stderr());
        let status = process.take_status().context("no status")?;
        let write = async {
            if let (Some(stdin), Some(input)) = (&mut stdin, input) {
                // A command that ended before it read everything says why.
                let _ = stdin.write_all(input.as_bytes()).await;
            }
        };
        // None must wait for the others. The input stays open: to close it would end the whole
        // connection to a server of before Kubernetes 1.30.
        let ((), out, err) = tokio::join!(write, read_all(stdout), read_all(stderr));
        let status = status.await.context("the command ended without a status")?;
        let said = format!("{}{}", out?, err?).trim().to_owned();
        Ok((succeeded(&status)?, said))
    };
    tokio::time::timeout(EXEC, run).await.context("no answer in time")?
}

/// Only a command that ended by itself has an outcome of its own.
fn succeeded(status: &Status) -> Result<bool> {
    match (status.status.as_deref(), status.reason.as_deref()) {
        (Some("Success"), _) => Ok(true),
        (_, Some("NonZeroExitCode")) => Ok(false),
        _ => bail!(
            "the command was not run: {}",
            status.message.as_deref().unwrap_or("nobody says why")
        ),
    }
}

async fn read_all(stream: Option<impl AsyncRead + Unpin>) -> std::io::Result<String> {
    let mut text = Vec::new();
    if let Some(mut stream) = stream {
        stream.read_to_end(&mut text).await?;
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// `KUBECONFIG` that names nothing there is a slip of its own.
fn named_but_missing() -> Result<()> {
    let Some(named) = env::var_os("KUBECONFIG") else { return Ok(()) };
    for file in env::split_paths(&named) {
        // Unlike `exists`, this tells a file that may not be read from one that is not there.
        match file.metadata() {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => bail!("$KUBECONFIG: {}: {error}", file.display()),
        }
    }
    bail!("$KUBECONFIG names {}, which does not exist", Path::new(&named).display())
}

/// The file given, else none where `KUBECONFIG` is for kube to read, else the lab's.
pub(crate) fn chosen(given: Option<&Path>) -> Option<PathBuf> {
    if let Some(given) = given {
        return Some(given.to_owned());
    }
    if env::var_os("KUBECONFIG").is_some() {
        return None;
    }
    Some(PathBuf::from(LAB_KUBECONFIG)).filter(|file| file.exists())
}

fn has_network(node: &Node) -> bool {
    let spec = node.spec.as_ref();
    spec.is_some_and(|spec| spec.pod_cidrs.as_ref().is_some_and(|it| !it.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_command_that_ran_has_an_outcome() {
        let status = |status: &str, reason: &str| Status {
            status: Some(status.into()),
            reason: Some(reason.into()),
            message: Some("no such container".into()),
            ..Status::default()
        };
        assert!(succeeded(&status("Success", "")).unwrap());
        assert!(!succeeded(&status("Failure", "NonZeroExitCode")).unwrap());
        let error = succeeded(&status("Failure", "InternalError")).unwrap_err();
        assert_eq!(error.to_string(), "the command was not run: no such container");
        assert!(succeeded(&Status::default()).is_err());
    }
}
