//! What a cluster needs once, whoever does it: definitions of custom resources, pod networks for
//! nodes, collection of identities that nobody uses, and the taint of nodes that are not ready.
//!
//! Several may run; one of them, the holder of the Lease, works.

mod crds;
#[cfg(test)]
mod fake;
mod identities;
mod leader;
mod metrics;
mod networks;
mod nodes;
mod objects;
mod serve;

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use clap::{Parser, ValueEnum};
use kube::Client;
use palisade_api::{client, pool::Pools};
use tokio::{
    signal::unix::{SignalKind, signal},
    task::{JoinError, JoinSet},
};
use tracing::info;
use tracing_subscriber::EnvFilter;

use crate::{
    identities::Collector,
    leader::{Elector, Watch},
    metrics::Metrics,
};

/// Does for a cluster what is to be done once: CRDs, pod networks, identities, taints.
#[derive(Debug, Parser)]
#[command(name = "palisade-operator", version)]
struct Options {
    /// How to reach the API server; by default with the service account of the pod that this
    /// runs in.
    #[arg(long, env = "PALISADE_OPERATOR_KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
    /// What tells this process from the others; the name of its pod.
    #[arg(long, env = "PALISADE_OPERATOR_IDENTITY")]
    identity: String,
    /// Namespace that Palisade is installed in; the Lease is there, and the agents' pods.
    #[arg(long, env = "PALISADE_OPERATOR_NAMESPACE", default_value = "kube-system")]
    namespace: String,
    /// Name of the cluster, as the agents have it.
    #[arg(long, env = "PALISADE_OPERATOR_CLUSTER_NAME", default_value = "default")]
    cluster_name: String,
    /// Where nodes get their pod networks from.
    #[arg(long, env = "PALISADE_OPERATOR_IPAM", value_enum, default_value_t)]
    ipam: Ipam,
    /// Networks, separated by commas, that pod networks of nodes are cut from; only with `--ipam
    /// cluster-pool`.
    #[arg(long, env = "PALISADE_OPERATOR_POOL_IPV4", default_value = "")]
    pool_ipv4: String,
    /// Prefix length of a node's IPv4 network.
    #[arg(long, env = "PALISADE_OPERATOR_POOL_IPV4_MASK", default_value_t = 24)]
    pool_ipv4_mask: u8,
    /// As --pool-ipv4.
    #[arg(long, env = "PALISADE_OPERATOR_POOL_IPV6", default_value = "")]
    pool_ipv6: String,
    /// Prefix length of a node's IPv6 network.
    #[arg(long, env = "PALISADE_OPERATOR_POOL_IPV6_MASK", default_value_t = 120)]
    pool_ipv6_mask: u8,
    /// How long nobody must have used an identity before its number is free, such as `30m`.
    #[arg(long, env = "PALISADE_OPERATOR_IDENTITY_GRACE", default_value = "30m", value_parser = duration)]
    identity_grace: Duration,
    /// Labels, as a map in JSON, of the nodes that get an agent; others are left alone.
    #[arg(
        long,
        env = "PALISADE_OPERATOR_AGENT_NODE_SELECTOR",
        default_value = "{}",
        value_parser = nodes::selector
    )]
    agent_node_selector: nodes::Selector,
    /// Address of /healthz, /readyz and /metrics.
    #[arg(long, env = "PALISADE_OPERATOR_LISTEN", default_value = "127.0.0.1:9963")]
    listen: SocketAddr,
}

/// Where nodes get their pod networks from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Ipam {
    /// Kubernetes writes `Node.spec.podCIDRs`.
    #[default]
    Kubernetes,
    /// The operator does, for nodes that have none.
    ClusterPool,
}

fn duration(text: &str) -> Result<Duration, String> {
    let span: jiff::SignedDuration =
        text.parse().map_err(|error| format!("{error}; write it like 30m or 1h30m"))?;
    Duration::try_from(span).map_err(|_| "a duration cannot be negative".to_owned())
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let filter = EnvFilter::try_from_env("PALISADE_OPERATOR_LOG").unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(run(options))
}

async fn run(options: Options) -> anyhow::Result<()> {
    let pools = pools(&options)?;
    let client = client::client(options.kubeconfig.as_deref()).await?;
    let metrics = Arc::new(Metrics::default());
    let mut tasks = JoinSet::new();
    tasks.spawn(serve::serve(serve::listen(options.listen).await?, metrics.clone()));
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let elector = Elector::new(client.clone(), &options.namespace, &options.identity);
    let lead = async {
        let mut term = elector.wait().await;
        info!(identity = options.identity, "leading");
        metrics.leading();
        let watch = term.watch();
        match term.during(work(&client, &options, pools, watch, &metrics)).await {
            None => anyhow::bail!("the Lease is lost; another may lead by now"),
            Some(ended) => anyhow::bail!("a task ended: {ended:?}"),
        }
    };
    tokio::select! {
        outcome = lead => return outcome,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    info!("stopping");
    elector.release().await;
    Ok(())
}

/// Everything that one alone does, for as long as the term lasts; returns when a part of it ends.
async fn work(
    client: &Client,
    options: &Options,
    pools: Option<Pools>,
    term: Watch,
    metrics: &Arc<Metrics>,
) -> Option<Result<(), JoinError>> {
    crds::apply(client).await;
    metrics.ready();
    let mut work: JoinSet<()> = JoinSet::new();
    work.spawn(networks::run(client.clone(), pools, term.clone(), metrics.clone()));
    let (namespace, selector) = (options.namespace.clone(), options.agent_node_selector.clone());
    work.spawn(nodes::run(client.clone(), namespace, selector, metrics.clone()));
    let collector = Collector::new(client.clone(), &options.cluster_name, options.identity_grace);
    work.spawn(collector.run(term, metrics.clone()));
    work.join_next().await
}

fn pools(options: &Options) -> anyhow::Result<Option<Pools>> {
    let Options { pool_ipv4, pool_ipv4_mask, pool_ipv6, pool_ipv6_mask, .. } = options;
    match options.ipam {
        Ipam::Kubernetes => Ok(None),
        Ipam::ClusterPool => {
            Ok(Some(Pools::parse(pool_ipv4, *pool_ipv4_mask, pool_ipv6, *pool_ipv6_mask)?))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_api_server_that_is_away_is_named_with_the_cause_and_where_its_address_is_from() {
        let file = std::env::temp_dir().join(format!("palisade-away-{}", std::process::id()));
        let config = r#"{"apiVersion": "v1", "kind": "Config", "current-context": "a",
            "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
            "clusters": [{"name": "a", "cluster": {"server": "https://127.0.0.1:1"}}],
            "users": [{"name": "a", "user": {}}]}"#;
        std::fs::write(&file, config).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let error = runtime.block_on(async {
            let client = client::client(Some(&file)).await.unwrap();
            client.apiserver_version().await.unwrap_err()
        });
        let text = client::chain(&error);
        assert!(text.starts_with("the API server at https://127.0.0.1:1/ cannot be"), "{text}");
        assert!(text.contains("Connection refused"), "{text}");
        assert!(text.ends_with(&format!("{} says that it is there", file.display())), "{text}");
        std::fs::remove_file(file).unwrap();
    }
}
