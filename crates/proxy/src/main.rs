//! The L7 proxy.

use clap::Parser;
use tracing_subscriber::EnvFilter;

fn main() -> anyhow::Result<()> {
    let options = palisade_proxy::Options::parse();
    // The crate for HTTP/2 warns of each client that misbehaves, which clients could do for ever.
    let filter = EnvFilter::try_from_env("PALISADE_PROXY_LOG")
        .unwrap_or_else(|_| EnvFilter::new("info,h2=error"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    palisade_proxy::run(&options)
}
