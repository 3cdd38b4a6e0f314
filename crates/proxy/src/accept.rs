//! The way in: accepts connections, bounds them, and spreads them over the workers.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    num::NonZero,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tokio::{net::TcpStream, runtime::Handle, sync::mpsc};

use crate::{Proxy, connection, net, runtime, shares::Shares};

/// Connections at a time, if there are descriptors for so many.
const MOST_CONNECTIONS: usize = 50_000;
/// Descriptors for everything but connections.
const OTHER_DESCRIPTORS: usize = 256;

/// A thread for each core, which stays there, each with a runtime of its own.
pub struct Workers(Vec<Worker>);

struct Worker {
    runtime: Handle,
    connections: Arc<AtomicUsize>,
}

impl Workers {
    /// Starts `count` threads, which run until the process ends.
    ///
    /// # Errors
    ///
    /// The system gives no more threads or descriptors.
    pub fn start(count: NonZero<usize>) -> io::Result<Self> {
        let cores = cores(count);
        let start = |number| {
            let runtime = runtime()?;
            let handle = runtime.handle().clone();
            let core = cores.get(number).copied();
            thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
                if let Some(core) = core {
                    stay_on(core);
                }
                runtime.block_on(std::future::pending::<()>());
            })?;
            Ok(Worker { runtime: handle, connections: Arc::default() })
        };
        (0..count.get()).map(start).collect::<io::Result<_>>().map(Self)
    }

    /// Returns once each of them has done what it was at: what they judge from then on, they judge
    /// by the rules that were put before.
    pub async fn settle(&self) {
        let turns: Vec<_> = self.0.iter().map(|worker| worker.runtime.spawn(async {})).collect();
        for turn in turns {
            // A worker that is gone judges nothing.
            _ = turn.await;
        }
    }

    /// The one with the fewest connections.
    fn idlest(&self) -> Option<&Worker> {
        self.0.iter().min_by_key(|worker| worker.connections.load(Ordering::Relaxed))
    }
}

/// One for each worker; none where the process may not use as much time as its cores have, so that
/// the system has to choose.
fn cores(workers: NonZero<usize>) -> Vec<usize> {
    let allowed = sched_getaffinity(None).unwrap_or_else(|_| CpuSet::new());
    let cores: Vec<_> = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core)).collect();
    if cores.len() == workers.get() { cores } else { Vec::new() }
}

/// Keeps the thread on a core, where the caches know its connections and the system need not look
/// for a place whenever they wake it. If it must not be used any more, the kernel lets go of it
/// (`sched_setaffinity(2)`, notes).
fn stay_on(core: usize) {
    let mut cores = CpuSet::new();
    cores.set(core);
    if let Err(error) = sched_setaffinity(None, &cores) {
        tracing::warn!(core, %error, "a worker cannot stay on its core");
    }
}

/// Serves the listeners until the process ends.
///
/// # Errors
///
/// A listener cannot be used.
pub async fn serve(listeners: [TcpListener; 2], proxy: Arc<Proxy>) -> anyhow::Result<()> {
    let connections = Arc::new(Shares::new(most_connections()));
    let (sender, mut accepted) = mpsc::channel(1);
    for listener in listeners {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        tokio::spawn(accept(listener, sender.clone()));
    }
    while let Some((stream, client)) = accepted.recv().await {
        let (Some(permit), Some(worker)) = (connections.admit(client.ip()), proxy.workers.idlest())
        else {
            net::reset(&stream);
            continue;
        };
        let Ok(stream) = stream.into_std() else { continue };
        let count = Counted::new(&worker.connections);
        let proxy = Arc::clone(&proxy);
        worker.runtime.spawn(async move {
            let _held = (permit, count);
            if let Ok(stream) = TcpStream::from_std(stream) {
                connection::serve(&proxy, stream, client).await;
            }
        });
    }
    Ok(())
}

async fn accept(
    listener: tokio::net::TcpListener,
    accepted: mpsc::Sender<(TcpStream, SocketAddr)>,
) {
    loop {
        match listener.accept().await {
            Ok(connection) => {
                if accepted.send(connection).await.is_err() {
                    return;
                }
            }
            // Out of descriptors or memory: the connection stays in the queue, and there is no
            // event that tells when there are some again.
            Err(error) if error.kind() != io::ErrorKind::ConnectionAborted => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(_) => {}
        }
    }
}

/// One more, as long as it lives.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(counter: &Arc<AtomicUsize>) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(counter))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How many connections there may be: each takes two descriptors.
fn most_connections() -> usize {
    let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let descriptors = descriptors.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX));
    (descriptors.saturating_sub(OTHER_DESCRIPTORS) / 2).clamp(1, MOST_CONNECTIONS)
}
