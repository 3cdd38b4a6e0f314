//! The way in: accepts connections, bounds them, and spreads them over the workers.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr, TcpListener},
    num::NonZero,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use tokio::{net::TcpStream, runtime::Handle, sync::mpsc};

use crate::{Proxy, connection, net, runtime};

/// Connections at a time, if there are descriptors for so many.
const MOST_CONNECTIONS: usize = 50_000;
/// Descriptors for everything but connections.
const OTHER_DESCRIPTORS: usize = 256;
/// A client may have no more than this share of the connections that are left: a few greedy ones
/// do not leave the others without.
const CLIENT_SHARE: usize = 4;

/// A thread for each core, each with a runtime of its own.
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
        let start = |number| {
            let runtime = runtime()?;
            let handle = runtime.handle().clone();
            thread::Builder::new()
                .name(format!("worker-{number}"))
                .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
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

/// Serves the listeners until the process ends.
///
/// # Errors
///
/// A listener cannot be used.
pub async fn serve(listeners: [TcpListener; 2], proxy: Arc<Proxy>) -> anyhow::Result<()> {
    let limits = Arc::new(Limits::of_the_process());
    let (sender, mut accepted) = mpsc::channel(1);
    for listener in listeners {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        tokio::spawn(accept(listener, sender.clone()));
    }
    while let Some((stream, client)) = accepted.recv().await {
        let (Some(permit), Some(worker)) = (limits.admit(client.ip()), proxy.workers.idlest())
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

/// How many connections there may be.
struct Limits {
    most: usize,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    total: usize,
    clients: HashMap<IpAddr, usize>,
}

impl Limits {
    /// Each connection takes two descriptors.
    fn of_the_process() -> Self {
        let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let descriptors =
            descriptors.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX));
        let most = (descriptors.saturating_sub(OTHER_DESCRIPTORS) / 2).clamp(1, MOST_CONNECTIONS);
        Self { most, open: Mutex::default() }
    }

    fn admit(self: &Arc<Self>, client: IpAddr) -> Option<Permit> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let of_client = open.clients.get(&client).copied().unwrap_or(0);
        let free = self.most.saturating_sub(open.total);
        if of_client * CLIENT_SHARE >= free {
            return None;
        }
        open.total += 1;
        open.clients.insert(client, of_client + 1);
        Some(Permit { limits: Arc::clone(self), client })
    }
}

/// A connection that counts, until it is dropped.
struct Permit {
    limits: Arc<Limits>,
    client: IpAddr,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut open = self.limits.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.total -= 1;
        let left = open.clients.get_mut(&self.client).map(|count| {
            *count -= 1;
            *count
        });
        if left == Some(0) {
            open.clients.remove(&self.client);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_gets_its_share_and_gives_it_back() {
        let limits = Arc::new(Limits { most: 8, open: Mutex::default() });
        let (one, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let held: Vec<_> = (0..2).map(|_| limits.admit(one).unwrap()).collect();
        assert!(limits.admit(one).is_none());
        assert!(limits.admit(other).is_some());
        drop(held);
        assert!(limits.admit(one).is_some());
        assert!(limits.open.lock().unwrap().clients.is_empty());
    }

    #[test]
    fn greedy_clients_leave_something() {
        let limits = Arc::new(Limits { most: 1000, open: Mutex::default() });
        let client = |n| IpAddr::from([10, 0, 1, n]);
        let take = |n| std::iter::from_fn(|| limits.admit(client(n))).collect::<Vec<_>>();
        let held: Vec<_> = (0..10).map(take).collect();
        assert!(held[0].len() > 100);
        assert!(limits.admit(client(101)).is_some());
    }

    #[test]
    fn all_together_get_no_more_than_there_is() {
        let limits = Arc::new(Limits { most: 3, open: Mutex::default() });
        let client = |n| IpAddr::from([10, 0, 0, n]);
        let _held: Vec<_> = (0..3).map(|n| limits.admit(client(n)).unwrap()).collect();
        assert!(limits.admit(client(9)).is_none());
    }
}
