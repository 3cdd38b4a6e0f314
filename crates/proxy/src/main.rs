//! The L7 proxy.

use clap::Parser;
use tracing_subscriber::EnvFilter;

fn main() -> anyhow::Result<()> {
    let options = palisade_proxy::Options::parse();
    let filter = EnvFilter::try_from_env("PALISADE_PROXY_LOG").unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    palisade_proxy::run(&options)
}
