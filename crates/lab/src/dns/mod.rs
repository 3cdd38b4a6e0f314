//! The cluster's DNS server: a program that runs in an ordinary pod.

mod server;
pub mod wire;
pub mod zone;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Seconds that answers may be kept.
const TTL: u32 = 5;

#[derive(Debug, Parser)]
#[command(name = "dns", about = "The cluster's DNS server")]
struct Arguments {
    /// How to reach the API server
    #[arg(long)]
    kubeconfig: PathBuf,
    #[arg(long, default_value_t = 53)]
    port: u16,
    /// Port of the readiness probe
    #[arg(long, default_value_t = 8181)]
    ready_port: u16,
    /// Resolvers for names outside the cluster
    #[arg(long)]
    forward: Vec<std::net::SocketAddr>,
}

/// Serves until it is ended.
pub fn run(arguments: &[String]) -> anyhow::Result<ExitCode> {
    let name = std::iter::once("dns".to_owned());
    let arguments = Arguments::try_parse_from(name.chain(arguments.iter().cloned()))?;
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(server::serve(arguments))?;
    Ok(ExitCode::SUCCESS)
}
