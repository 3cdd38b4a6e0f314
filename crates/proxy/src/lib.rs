//! The L7 proxy: a process that judges what is said inside the connections that the data path
//! hands it.
//!
//! | module | question it answers |
//! |---|---|
//! | [`accept`] | who connects to whom, and may one more do so? |
//! | [`net`] | how do sockets speak in the names of others? |
//! | [`rules`], [`agent`] | what are the rules now? |
//! | [`judge`] | what do they ask of this connection, and of this request? |
//! | [`dns`] | which names may be asked for, and what may be learned from the answers? |
//! | [`tls`] | whom does a TLS client want? |
//! | [`http`] | what does an HTTP message say, and how is it said again? |
//! | [`log`] | who hears what happened? |
//! | `shares` | how many of something may a client have? |
//! | `sandbox` | what is given up once all is open? |

pub mod accept;
pub mod agent;
mod buffer;
mod connection;
pub mod dns;
pub mod http;
pub mod judge;
pub mod log;
pub mod net;
mod relay;
pub mod rules;
mod sandbox;
mod shares;
pub mod tls;

use std::{path::PathBuf, sync::Arc, thread};

use tokio::runtime::{Builder, Handle, Runtime};

use crate::{accept::Workers, dns::Dns, log::Log, rules::Store, shares::Shares};

/// What the proxy is told when it starts.
#[derive(Debug, clap::Parser)]
#[command(version, about = "Judges requests inside connections that the data path hands it")]
pub struct Options {
    /// Directory of the agent's sockets.
    #[arg(long, env = "PALISADE_PROXY_RUN_DIR")]
    pub run_dir: PathBuf,
    /// Directory for the last good rules.
    #[arg(long, env = "PALISADE_PROXY_STATE_DIR")]
    pub state_dir: PathBuf,
    /// Port of the listeners on 127.0.0.1 and `::1`.
    #[arg(long, env = "PALISADE_PROXY_PORT", default_value_t = palisade_abi::PROXY_PORT)]
    pub port: u16,
}

/// What every part of the proxy shares.
pub struct Proxy {
    /// The rules.
    pub rules: Store,
    /// What happened.
    pub log: Log,
    /// What is asked of name servers.
    pub dns: Dns,
    /// Long heads of requests that are in memory.
    pub(crate) long_heads: Arc<Shares>,
    /// Who serves the connections.
    pub workers: Workers,
    /// Where questions in datagrams are answered.
    pub main: Handle,
}

#[cfg(test)]
impl Proxy {
    /// On the runtime of a test, with nothing to listen to, and the link to an agent whose socket
    /// would be in the directory.
    fn alone(directory: &std::path::Path) -> (Arc<Self>, agent::Link) {
        let rules = Store::open(directory).unwrap();
        let (agent, link) = agent::link(directory.join(palisade_api::proxy::SOCKET));
        let (log, dns) = (Log::default(), Dns::new(agent));
        let workers = Workers::start(std::num::NonZero::<usize>::MIN).unwrap();
        let long_heads = Arc::new(Shares::new(http::MOST_LONG_HEADS));
        let main = Handle::current();
        (Arc::new(Self { rules, log, dns, long_heads, workers, main }), link)
    }
}

/// Runs until the process is told to end.
///
/// # Errors
///
/// The proxy cannot start.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let cores = std::thread::available_parallelism()?;
    let listeners = net::listeners(options.port)?;
    let datagrams = dns::sockets(options.port)?;
    sandbox::become_nobody(&options.state_dir)?;
    let rules = Store::open(&options.state_dir)?;
    let (agent, link) = agent::link(options.run_dir.join(palisade_api::proxy::SOCKET));
    sandbox::raise_descriptors();
    sandbox::enter(&options.state_dir)?;
    let (log, dns, workers) = (Log::default(), Dns::new(agent), Workers::start(cores)?);
    let main = runtime()?;
    let long_heads = Arc::new(Shares::new(http::MOST_LONG_HEADS));
    let main_handle = main.handle().clone();
    let proxy = Arc::new(Proxy { rules, log, dns, long_heads, workers, main: main_handle });
    // Rules may be many: no connection and no question waits until they are read and made ready.
    let (link, linked) = (link.run(Arc::clone(&proxy)), runtime()?);
    thread::Builder::new().name("agent".into()).spawn(move || linked.block_on(link))?;
    main.block_on(async {
        dns::serve_udp(&proxy, datagrams)?;
        accept::serve(listeners, proxy).await
    })
}

/// A runtime of one thread: tasks of a connection never change threads.
fn runtime() -> std::io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}
