//! Answers on `RUN_DIR/admin.sock`: one JSON value per line each way.

mod answers;
mod explain;

use std::{
    io,
    path::Path,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use palisade_api::admin::{Observe, Request, Response, SOCKET};
use palisade_datapath::Datapath;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream, unix::OwnedWriteHalf},
    sync::{broadcast::error::RecvError, watch},
};
use tracing::warn;

use crate::{
    cni::Attachments,
    endpoints::Health,
    engine::{Progress, Rounds},
    observer::{Observer, matches},
    proxy::ProxyLink,
    publish::Attempts,
    resolve::Scope,
    tables::TablesReader,
};

/// When the agent was ready.
#[derive(Clone)]
pub struct Readiness {
    begun: Instant,
    progress: watch::Receiver<Progress>,
    attachments: watch::Receiver<Option<Arc<Attachments>>>,
    after: Arc<OnceLock<Duration>>,
}

impl Readiness {
    /// The agent is ready once everything is in force and pods can be attached.
    pub fn new(
        begun: Instant,
        progress: watch::Receiver<Progress>,
        attachments: watch::Receiver<Option<Arc<Attachments>>>,
    ) -> Self {
        Self { begun, progress, attachments, after: Arc::default() }
    }

    /// Waits until it is, and takes the time.
    pub async fn observe(mut self) {
        let synced = self.progress.wait_for(|progress| progress.synced).await.is_ok();
        if synced && self.attachments.wait_for(Option::is_some).await.is_ok() {
            self.after.get_or_init(|| self.begun.elapsed());
        }
    }

    /// How long that took; none before.
    pub fn after(&self) -> Option<Duration> {
        self.after.get().copied()
    }
}

/// What the answers are made from.
pub struct Admin {
    /// Whom the agent works for.
    pub scope: Scope,
    /// When the process began.
    pub begun: Instant,
    /// The tables.
    pub tables: TablesReader,
    /// What is in force.
    pub progress: watch::Receiver<Progress>,
    /// Whether a round of the engine is under way.
    pub rounds: Arc<Rounds>,
    /// The flows.
    pub observer: Arc<Observer>,
    /// The kernel's counters.
    pub datapath: Arc<Datapath>,
    /// The way to the L7 proxy.
    pub proxy: Arc<ProxyLink>,
    /// What is wrong on this node.
    pub health: Arc<Health>,
    /// When it was ready.
    pub readiness: Readiness,
    /// The pods' addresses.
    pub attachments: watch::Receiver<Option<Arc<Attachments>>>,
    /// What has become of their objects.
    pub attempts: watch::Receiver<Attempts>,
}

/// Takes the socket, for the owner and the group only.
///
/// # Errors
/// The socket cannot be made.
pub fn listen(run_dir: &Path) -> io::Result<UnixListener> {
    crate::sockets::listen(&run_dir.join(SOCKET))
}

/// Answers whoever connects.
pub async fn serve(admin: Arc<Admin>, listener: UnixListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let admin = admin.clone();
                tokio::spawn(async move {
                    // A caller that went away needs no answer.
                    let _ = converse(&admin, stream).await;
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept on the admin socket");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(admin: &Admin, stream: UnixStream) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    while let Some(line) = lines.next_line().await? {
        match serde_json::from_str::<Request>(&line) {
            Ok(Request::Observe(observe)) => stream_flows(admin, &observe, &mut write).await?,
            Ok(request @ (Request::TableGet { .. } | Request::PolicyGet { .. })) => {
                // Tables are shown between rounds only, when what is in them is in force, or it is
                // known what is not.
                let ask = || admin.rounds.between(|| answers::answer(admin, &request));
                let answer = tokio::task::block_in_place(ask);
                send(&mut write, &answer).await?;
            }
            Ok(request) => send(&mut write, &answers::answer(admin, &request)).await?,
            Err(error) => {
                let text = format!("this agent does not understand the request: {error}");
                send(&mut write, &Response::Error(text)).await?;
            }
        }
    }
    Ok(())
}

async fn send(write: &mut OwnedWriteHalf, response: &Response) -> io::Result<()> {
    let mut line = serde_json::to_vec(response)?;
    line.push(b'\n');
    write.write_all(&line).await
}

async fn stream_flows(
    admin: &Admin,
    observe: &Observe,
    write: &mut OwnedWriteHalf,
) -> io::Result<()> {
    let (kept, mut coming) = admin.observer.follow();
    let past: Vec<_> = kept.into_iter().filter(|flow| matches(&observe.filter, flow)).collect();
    let all = if observe.follow { 0 } else { past.len() };
    let skip = past.len().saturating_sub(observe.last.unwrap_or(all));
    for flow in past.iter().skip(skip) {
        send(write, &Response::Flow(Box::new((**flow).clone()))).await?;
    }
    if !observe.follow {
        return send(write, &Response::End).await;
    }
    loop {
        match coming.recv().await {
            Ok(flow) if matches(&observe.filter, &flow) => {
                send(write, &Response::Flow(Box::new((*flow).clone()))).await?;
            }
            Ok(_) => {}
            Err(RecvError::Lagged(lost)) => send(write, &Response::Lost(lost)).await?,
            Err(RecvError::Closed) => return Ok(()),
        }
    }
}
