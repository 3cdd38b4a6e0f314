//! The agent's side of `RUN_DIR/proxy.sock`: the proxy of this node gets its rules here, and says
//! here what it has taken over, what its clients learn and what it saw.

mod book;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    io,
    os::unix::fs::chown,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

pub use book::{RuleBook, Tables};
use palisade_api::proxy::{
    FromProxy, Hello, Message, RulesDelta, SOCKET, ToProxy, USER, VERSION, body_length, encode,
};
use palisade_policy::{l7::Secrets, model::PolicyRef};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream, unix::OwnedReadHalf},
    sync::{Semaphore, broadcast, mpsc, watch},
    task::AbortHandle,
};
use tracing::{info, warn};

use crate::{engine::Command, fqdn::Names, observer::Observer, reconcile::mirror::Mirror};

/// Deltas that a connection may be behind; one that is further behind gets everything anew.
const BEHIND: usize = 256;
/// Answers that may wait for a connection.
const ANSWERS: usize = 1024;
/// What may be learned at a time, of all connections: twice as much as a proxy has under way.
static LEARNING: Semaphore = Semaphore::const_new(8192);
/// So long a round waits for the proxy to take over what changed.
const PATIENCE: Duration = Duration::from_millis(500);

/// How far the proxy is.
#[derive(Clone, Copy, Debug, Default)]
struct State {
    /// Connections so far.
    connections: u64,
    /// Number of the connection that counts: the newest one.
    connection: Option<u64>,
    /// What it acknowledged last.
    acknowledged: u64,
    /// What any of them acknowledged last. It is on disk: one that comes after it begins with that.
    kept: u64,
    /// It was waited for in vain; it is not waited for again before it says something.
    late: bool,
}

/// Rules for the proxy, and how far it is with them.
#[derive(Debug)]
pub struct ProxyLink {
    book: Mutex<RuleBook>,
    deltas: broadcast::Sender<Arc<RulesDelta>>,
    /// The engine has seen all of its inputs. Before, a proxy that outlived an earlier agent goes
    /// on with what it has.
    complete: watch::Sender<bool>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Default for ProxyLink {
    fn default() -> Self {
        Self {
            book: Mutex::default(),
            deltas: broadcast::channel(BEHIND).0,
            complete: watch::Sender::new(false),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }
}

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ProxyLink {
    /// Hands on what the kernel holds by now, and waits until the proxy judges by it too. What is
    /// missing is returned: until then the proxy denies what the newer rules allow, or goes on
    /// with what the earlier ones allowed.
    pub fn update(&self, mirror: &mut Mirror, tables: Tables, secrets: &Secrets) -> Option<String> {
        let mut book = guard(&self.book);
        if let Some(delta) = book.update(mirror, tables, secrets) {
            // Without a proxy nobody takes it.
            let _ = self.deltas.send(Arc::new(delta));
        }
        let (version, needed) = (book.rules().version, book.is_needed());
        drop(book);
        self.complete.send_if_modified(|complete| !std::mem::replace(complete, true));
        let state = guard(&self.state);
        if state.connection.is_none() {
            return needed.then(|| "no L7 proxy is connected: what needs it is closed".into());
        }
        let waiting = |state: &mut State| {
            state.connection.is_some() && state.acknowledged < version && !state.late
        };
        let (mut state, _) = self
            .changed
            .wait_timeout_while(state, PATIENCE, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        state.late = state.acknowledged < version;
        let lacks = state.late && needed;
        lacks.then(|| format!("the L7 proxy has not taken over version {version} yet"))
    }

    /// Whether an endpoint may be reached and may send: whatever proxy there is knows its policy, if
    /// that asks for one. A proxy that does not know the endpoint judges by the policy of the other
    /// end alone.
    pub fn knows(&self, endpoint: u32) -> bool {
        let needed = guard(&self.book).needed_by(endpoint);
        needed.is_none_or(|version| guard(&self.state).kept >= version)
    }

    /// Policies that are not in force yet, because they speak of what is inside connections and the
    /// proxy does not have them.
    pub fn lacking(&self) -> BTreeSet<PolicyRef> {
        let acknowledged = guard(&self.state).acknowledged;
        guard(&self.book).lacking(acknowledged)
    }

    /// Whether a proxy is connected, and the version of the rules that it has.
    pub fn acknowledged(&self) -> Option<u64> {
        let state = guard(&self.state);
        state.connection.map(|_| state.acknowledged)
    }

    fn connected(&self) -> u64 {
        let mut state = guard(&self.state);
        let number = state.connections + 1;
        *state = State {
            connections: number,
            connection: Some(number),
            kept: state.kept,
            acknowledged: 0,
            late: true,
        };
        self.changed.notify_all();
        number
    }

    /// Notes what a connection acknowledged; whether it had been given up.
    fn note(&self, connection: u64, version: u64) -> bool {
        let mut state = guard(&self.state);
        let mut late = false;
        if state.connection == Some(connection) {
            state.acknowledged = version;
            state.kept = version;
            late = std::mem::take(&mut state.late);
        }
        self.changed.notify_all();
        late
    }

    fn disconnected(&self, connection: u64) {
        let mut state = guard(&self.state);
        if state.connection == Some(connection) {
            let State { connections, kept, .. } = *state;
            *state = State { connections, kept, ..State::default() };
        }
        self.changed.notify_all();
    }
}

/// What the agent does with what the proxy says.
pub struct Desk {
    /// The rules.
    pub link: Arc<ProxyLink>,
    /// Takes what the proxy saw.
    pub observer: Arc<Observer>,
    /// Asks the engine for another round, so that what it says of the proxy is true again.
    pub engine: mpsc::WeakSender<Command>,
    /// Takes what clients learn.
    pub names: Arc<Names>,
}

/// Takes the socket, for the proxy's user only.
///
/// # Errors
/// The socket cannot be made.
pub fn listen(run_dir: &Path) -> io::Result<UnixListener> {
    let path = run_dir.join(SOCKET);
    let listener = crate::sockets::listen(&path)?;
    chown(&path, Some(USER), Some(USER))?;
    Ok(listener)
}

/// Serves whatever proxy connects; the newest one counts, and the one before is heard no more.
pub async fn serve(desk: Arc<Desk>, listener: UnixListener) {
    let mut newest: Option<AbortHandle> = None;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                if let Some(before) = newest.take() {
                    before.abort();
                }
                // In their order: from now on the one before has no say, whatever became of it.
                let number = desk.link.connected();
                let desk = desk.clone();
                let conversation = tokio::spawn(async move {
                    info!("the L7 proxy is connected");
                    let ended = converse(&desk, number, stream).await;
                    desk.link.disconnected(number);
                    desk.wake_engine().await;
                    let why =
                        ended.err().map_or("it closed the connection".into(), |e| e.to_string());
                    warn!("the L7 proxy is gone: {why}");
                });
                newest = Some(conversation.abort_handle());
            }
            Err(error) => {
                warn!(%error, "cannot accept on the proxy's socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

impl Desk {
    async fn wake_engine(&self) {
        if let Some(engine) = self.engine.upgrade() {
            // The engine ended: there is nothing to tell any more.
            let _ = engine.send(Command::Retry).await;
        }
    }
}

async fn converse(desk: &Arc<Desk>, number: u64, stream: UnixStream) -> io::Result<()> {
    let (mut read, mut write) = stream.into_split();
    write.write_all(&encode(&Hello { version: VERSION })?).await?;
    let hello: Hello = receive(&mut read).await?;
    if hello.version != VERSION {
        let found = hello.version;
        return Err(io::Error::other(format!("it speaks version {found}, the agent {VERSION}")));
    }
    let (answers, mut answered) = mpsc::channel(ANSWERS);
    let hear = hear(desk, number, read, answers);
    let tell = async {
        let mut complete = desk.link.complete.subscribe();
        complete.wait_for(|complete| *complete).await.map_err(io::Error::other)?;
        let mut deltas = snapshot(desk, &mut write).await?;
        loop {
            tokio::select! {
                delta = deltas.recv() => match delta {
                    Ok(delta) => send(&mut write, &ToProxy::Delta((*delta).clone())).await?,
                    Err(_) => deltas = snapshot(desk, &mut write).await?,
                },
                Some(answer) = answered.recv() => send(&mut write, &answer).await?,
            }
        }
    };
    tokio::select! {
        ended = hear => ended,
        ended = tell => ended,
    }
}

/// Sends all of the rules; what changes from then on comes from the receiver.
async fn snapshot(
    desk: &Desk,
    write: &mut (impl AsyncWriteExt + Unpin),
) -> io::Result<broadcast::Receiver<Arc<RulesDelta>>> {
    let (frame, deltas) = {
        let book = guard(&desk.link.book);
        (encode(&ToProxy::Snapshot(book.rules().clone()))?, desk.link.deltas.subscribe())
    };
    write.write_all(&frame).await?;
    Ok(deltas)
}

async fn send(write: &mut (impl AsyncWriteExt + Unpin), message: &ToProxy) -> io::Result<()> {
    write.write_all(&encode(message)?).await
}

async fn hear(
    desk: &Arc<Desk>,
    number: u64,
    mut read: OwnedReadHalf,
    answers: mpsc::Sender<ToProxy>,
) -> io::Result<()> {
    loop {
        match receive(&mut read).await? {
            FromProxy::Ack { version } => {
                let first = desk.link.note(number, version);
                if first {
                    desk.wake_engine().await;
                }
            }
            FromProxy::Learn { id, client, name, addresses, ttl } => {
                // Waiting for a turn would be waiting for a proxy that waits for its answers.
                let turn =
                    LEARNING.try_acquire().map_err(|_| io::Error::other("it learns too much"))?;
                let (names, answers) = (desk.names.clone(), answers.clone());
                tokio::spawn(async move {
                    let _turn = turn;
                    let answer = match names.learn(client, &name, &addresses, ttl).await {
                        Ok(()) => ToProxy::Learned { id },
                        Err(why) => {
                            warn!(%client, name, %why, "an answer of DNS is held back");
                            ToProxy::LearnRefused { id }
                        }
                    };
                    // The connection ended, and the question with it.
                    let _ = answers.send(answer).await;
                });
            }
            FromProxy::Records(records) => desk.observer.record_requests(records)?,
        }
    }
}

async fn receive<T: Message>(read: &mut OwnedReadHalf) -> io::Result<T> {
    let mut body = vec![0; body_length::<T>(read.read_u32().await?)?];
    read.read_exact(&mut body).await?;
    T::read(&body)
}
