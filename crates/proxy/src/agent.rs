//! The link to the agent: rules come in, acknowledgements, learned names and records go out.

use std::{collections::HashMap, io, net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

use palisade_api::proxy::{FromProxy, Hello, Message, Rules, ToProxy, VERSION, decode, encode};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, oneshot},
    time::{MissedTickBehavior, interval},
};

use crate::Proxy;

/// Between two attempts to reach an agent that is away.
const PAUSE: Duration = Duration::from_millis(100);
/// Between two attempts to keep rules that the disk had no room for.
const AGAIN: Duration = Duration::from_secs(5);
/// Questions that wait to be sent.
const QUEUE: usize = 1024;

/// How the rest of the proxy asks the agent.
#[derive(Clone)]
pub struct Agent(mpsc::Sender<Question>);

/// Why a client must not hear something new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotLearned {
    /// The agent, and with it the kernel, will not have it.
    Refused,
    /// The agent is away.
    Away,
}

struct Question {
    client: IpAddr,
    name: String,
    addresses: Vec<IpAddr>,
    ttl: u32,
    answer: oneshot::Sender<Result<(), NotLearned>>,
}

impl Agent {
    /// Returns once the client may reach the addresses that it is about to hear.
    ///
    /// # Errors
    ///
    /// It must not hear them.
    pub async fn learn(
        &self,
        client: IpAddr,
        name: String,
        addresses: Vec<IpAddr>,
        ttl: u32,
    ) -> Result<(), NotLearned> {
        let (answer, learned) = oneshot::channel();
        let question = Question { client, name, addresses, ttl, answer };
        self.0.try_send(question).map_err(|_| NotLearned::Away)?;
        learned.await.map_err(|_| NotLearned::Away)?
    }
}

/// The connection to the agent, made again whenever it breaks.
pub struct Link {
    socket: PathBuf,
    questions: mpsc::Receiver<Question>,
}

/// Both ends of what leads to the agent.
#[must_use]
pub fn link(socket: PathBuf) -> (Agent, Link) {
    let (sender, questions) = mpsc::channel(QUEUE);
    (Agent(sender), Link { socket, questions })
}

impl Link {
    /// Keeps the connection until the process ends.
    pub async fn run(mut self, proxy: Arc<Proxy>) {
        loop {
            if let Ok(stream) = UnixStream::connect(&self.socket).await {
                let Err(error) = self.serve(stream, &proxy).await;
                tracing::warn!(%error, "lost the agent; the rules at hand stay in force");
            }
            self.refuse_all();
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Nobody is there to answer: better no than late.
    fn refuse_all(&mut self) {
        while let Ok(question) = self.questions.try_recv() {
            _ = question.answer.send(Err(NotLearned::Away));
        }
    }

    async fn serve(
        &mut self,
        stream: UnixStream,
        proxy: &Proxy,
    ) -> io::Result<std::convert::Infallible> {
        let (read, mut write) = stream.into_split();
        let mut frames = Frames { read, buffer: Vec::new() };
        send(&mut write, &Hello { version: VERSION }).await?;
        let hello: Hello = frames.next().await?;
        if hello.version != VERSION {
            return Err(io::Error::other(format!(
                "the agent speaks version {}, this proxy {VERSION}",
                hello.version
            )));
        }
        let mut waiting = HashMap::new();
        let mut next_id = 0u64;
        let mut again = interval(AGAIN);
        again.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                message = frames.next() => {
                    let mut batch = vec![message?];
                    while let Some(message) = frames.ready()? {
                        batch.push(message);
                    }
                    if let Some(rules) = take(batch, proxy, &mut waiting)? {
                        send(&mut write, &put(rules, proxy).await?).await?;
                    }
                }
                Some(question) = self.questions.recv() => {
                    next_id += 1;
                    let Question { client, name, addresses, ttl, answer } = question;
                    waiting.insert(next_id, answer);
                    let learn = FromProxy::Learn { id: next_id, client, name, addresses, ttl };
                    send(&mut write, &learn).await?;
                }
                _ = again.tick(), if !proxy.rules.is_kept() => proxy.rules.save()?,
                records = proxy.log.next() => {
                    let told = records.len() as u64 + records.lost;
                    let sent = send(&mut write, &FromProxy::Records(records)).await;
                    sent.inspect_err(|_| proxy.log.lose(told))?;
                }
            }
        }
    }
}

type Waiting = HashMap<u64, oneshot::Sender<Result<(), NotLearned>>>;

/// Does what the agent says; the newest rules, if it speaks of any.
fn take(batch: Vec<ToProxy>, proxy: &Proxy, waiting: &mut Waiting) -> io::Result<Option<Rules>> {
    let mut newest: Option<Rules> = None;
    for message in batch {
        match message {
            ToProxy::Snapshot(rules) => newest = Some(rules),
            ToProxy::Delta(delta) => {
                let at_hand = || proxy.rules.load().rules.clone();
                newest.get_or_insert_with(at_hand).apply(delta).map_err(io::Error::other)?;
            }
            ToProxy::Learned { id } => answer(waiting, id, Ok(())),
            ToProxy::LearnRefused { id } => answer(waiting, id, Err(NotLearned::Refused)),
        }
    }
    Ok(newest)
}

fn answer(waiting: &mut Waiting, id: u64, outcome: Result<(), NotLearned>) {
    if let Some(answer) = waiting.remove(&id) {
        // Who asked may have given up waiting.
        _ = answer.send(outcome);
    }
}

/// Puts rules in force, and says so once a process that starts from the file does not go back
/// behind them, if there is a file, and nothing that was judged before goes on.
async fn put(rules: Rules, proxy: &Proxy) -> io::Result<FromProxy> {
    let version = rules.version;
    proxy.dns.forget_gone(&rules);
    proxy.rules.put(rules);
    proxy.rules.save()?;
    proxy.workers.settle().await;
    // The main thread is no worker, and answers questions.
    _ = proxy.main.spawn(async {}).await;
    Ok(FromProxy::Ack { version })
}

async fn send(write: &mut OwnedWriteHalf, message: &impl Message) -> io::Result<()> {
    write.write_all(&encode(message)?).await
}

/// The agent's messages, one by one.
struct Frames {
    read: OwnedReadHalf,
    buffer: Vec<u8>,
}

impl Frames {
    /// The next message, if it was read already.
    fn ready<T: Message>(&mut self) -> io::Result<Option<T>> {
        let Some((message, length)) = decode(&self.buffer)? else { return Ok(None) };
        self.buffer.drain(..length);
        Ok(Some(message))
    }

    /// The next message. May be dropped at any time: what was read stays in the buffer.
    async fn next<T: Message>(&mut self) -> io::Result<T> {
        loop {
            if let Some(message) = self.ready()? {
                return Ok(message);
            }
            if self.read.read_buf(&mut self.buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use palisade_api::proxy::{Records, SOCKET};
    use tokio::net::UnixListener;

    use super::*;
    use crate::log::tests::record;

    /// What the proxy says after its greeting, once an agent was greeted.
    async fn accept(listener: &UnixListener) -> (Frames, OwnedWriteHalf) {
        let (read, mut write) = listener.accept().await.unwrap().0.into_split();
        let mut frames = Frames { read, buffer: Vec::new() };
        send(&mut write, &Hello { version: VERSION }).await.unwrap();
        let _: Hello = frames.next().await.unwrap();
        (frames, write)
    }

    #[tokio::test]
    async fn records_that_nobody_got_are_counted() {
        let directory = std::env::temp_dir().join(format!("palisade-link-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let listener = UnixListener::bind(directory.join(SOCKET)).unwrap();
        let (proxy, link) = Proxy::alone(&directory);
        let running = tokio::spawn(link.run(Arc::clone(&proxy)));
        let (deaf, _write) = accept(&listener).await;
        let socket = socket2::SockRef::from(deaf.read.as_ref());
        socket.shutdown(std::net::Shutdown::Read).unwrap();
        proxy.log.add(record());
        proxy.log.add(record());
        let (mut next, _write) = accept(&listener).await;
        proxy.log.add(record());
        let heard: FromProxy = next.next().await.unwrap();
        let FromProxy::Records(Records { lost, .. }) = heard else { panic!("{heard:?}") };
        assert_eq!(lost, 2);
        running.abort();
        fs::remove_dir_all(&directory).unwrap();
    }
}
