//! `pods/portforward` as `kubectl` asks for it: SPDY frames in the messages of a WebSocket.
//!
//! For each connection the client opens two streams: one on which it hears what went wrong, then
//! one for the data.

mod spdy;

use std::collections::HashMap;
use std::num::NonZeroU16;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::{SinkExt as _, StreamExt as _};
use hyper::Request;
use hyper::body::Incoming;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::Message;
use tokio_util::sync::CancellationToken;

use self::spdy::{Frame, Headers, Reader, Writer};
use super::error::ApiError;
use super::http::Call;
use super::reply::Reply;
use super::websocket::{self, Socket};
use crate::runtime::{PodRuntime, RuntimeError};

const PROTOCOLS: [&str; 1] = ["SPDY/3.1+portforward.k8s.io"];
/// What may wait for a slow reader before its sender does: messages, chunks of a connection.
const QUEUE: usize = 16;
const BUFFER: usize = 32 * 1024;

pub(super) fn serve(call: &Call, request: Request<Incoming>) -> Result<Reply, ApiError> {
    if call.api.store.get(&call.key()).is_none() {
        return Err(call.not_found());
    }
    let pod = Pod {
        runtime: call.api.runtime.clone(),
        namespace: call.namespace().to_owned(),
        name: call.target.name.clone().unwrap_or_default(),
    };
    let stop = call.api.stop.clone();
    websocket::accept(request, &PROTOCOLS, |socket| async move {
        tokio::select! {
            ended = run(socket, Arc::new(pod)) => if let Err(error) = ended {
                tracing::debug!("port forwarding ended: {error:#}");
            },
            () = stop.cancelled() => {}
        }
    })
}

/// Where connections go.
struct Pod {
    runtime: Arc<dyn PodRuntime>,
    namespace: String,
    name: String,
}

async fn run(socket: Socket, pod: Arc<Pod>) -> anyhow::Result<()> {
    let (mut sink, mut source) = socket.split();
    let (outgoing, mut messages) = mpsc::channel(QUEUE);
    let sender = async {
        while let Some(message) = messages.recv().await {
            sink.send(Message::Binary(message)).await?;
        }
        Ok(())
    };
    let receiver = async {
        let mut session = Session::new(pod, outgoing);
        let mut frames = Reader::default();
        while let Some(message) = source.next().await {
            let Message::Binary(bytes) = message? else { continue };
            frames.push(&bytes);
            while let Some(frame) = frames.next()? {
                session.take(frame).await?;
            }
        }
        Ok(())
    };
    tokio::select! {
        ended = sender => ended,
        ended = receiver => ended,
    }
}

/// The connections that go over one WebSocket; they end with it.
struct Session {
    pod: Arc<Pod>,
    outgoing: mpsc::Sender<Bytes>,
    writer: Writer,
    /// Streams for errors whose data streams are still to come, by request.
    errors: HashMap<String, u32>,
    /// By data stream.
    connections: HashMap<u32, Connection>,
    tasks: JoinSet<u32>,
}

/// What the session needs to know of a connection.
struct Connection {
    /// None once the client has said all.
    to_pod: Option<mpsc::Sender<Bytes>>,
    reset: CancellationToken,
}

impl Session {
    fn new(pod: Arc<Pod>, outgoing: mpsc::Sender<Bytes>) -> Self {
        Self {
            pod,
            outgoing,
            writer: Writer::default(),
            errors: HashMap::new(),
            connections: HashMap::new(),
            tasks: JoinSet::new(),
        }
    }

    async fn take(&mut self, frame: Frame) -> anyhow::Result<()> {
        while let Some(ended) = self.tasks.try_join_next() {
            self.connections.remove(&ended?);
        }
        match frame {
            Frame::Open { stream, headers } => self.open(stream, &headers).await?,
            Frame::Data { stream, bytes, last } => self.pass(stream, bytes, last).await,
            Frame::Reset { stream } => {
                if let Some(connection) = self.connections.get(&stream) {
                    connection.reset.cancel();
                }
            }
            Frame::Ping { id } => self.outgoing.send(spdy::pong(id)).await?,
            Frame::Other => {}
        }
        Ok(())
    }

    async fn open(&mut self, stream: u32, headers: &Headers) -> anyhow::Result<()> {
        let request = headers.get("requestid").unwrap_or_default();
        let port = headers.get("port").and_then(|port| port.parse::<NonZeroU16>().ok());
        let pair = self.errors.get(request).copied();
        match (headers.get("streamtype"), port, pair) {
            (Some("error"), Some(_), None) => {
                self.errors.insert(request.to_owned(), stream);
                self.outgoing.send(self.writer.accept(stream)).await?;
            }
            (Some("data"), Some(port), Some(errors)) => {
                self.errors.remove(request);
                self.outgoing.send(self.writer.accept(stream)).await?;
                self.connect(port.get(), stream, errors);
            }
            _ => self.outgoing.send(spdy::refuse(stream)).await?,
        }
        Ok(())
    }

    fn connect(&mut self, port: u16, stream: u32, errors: u32) {
        let (to_pod, from_client) = mpsc::channel(QUEUE);
        let reset = CancellationToken::new();
        let (pod, outgoing, given_up) = (self.pod.clone(), self.outgoing.clone(), reset.clone());
        self.tasks.spawn(async move {
            let carried = carry(&pod, port, stream, from_client, &outgoing);
            let failure = tokio::select! {
                carried = carried => carried.err(),
                () = given_up.cancelled() => None,
            };
            let failure = failure.map(|error| error.to_string()).unwrap_or_default();
            // The client may be gone; then there is nobody to tell.
            let _ = outgoing.send(spdy::data(stream, b"", true)).await;
            let _ = outgoing.send(spdy::data(errors, failure.as_bytes(), true)).await;
            stream
        });
        self.connections.insert(stream, Connection { to_pod: Some(to_pod), reset });
    }

    /// Hands on what the client said. A pod that does not read holds up the client.
    async fn pass(&mut self, stream: u32, bytes: Bytes, last: bool) {
        let Some(connection) = self.connections.get_mut(&stream) else { return };
        if let Some(to_pod) = &connection.to_pod
            && !bytes.is_empty()
        {
            tokio::select! {
                // An error means that the pod has hung up.
                _ = to_pod.send(bytes) => {}
                () = connection.reset.cancelled() => {}
            }
        }
        if last {
            connection.to_pod = None;
        }
    }
}

/// One connection, until the pod ends it.
async fn carry(
    pod: &Pod,
    port: u16,
    stream: u32,
    mut from_client: mpsc::Receiver<Bytes>,
    outgoing: &mpsc::Sender<Bytes>,
) -> Result<(), RuntimeError> {
    let connection = pod.runtime.connect(&pod.namespace, &pod.name, port).await?;
    let (mut reader, mut writer) = connection.into_split();
    let to_pod = async {
        while let Some(bytes) = from_client.recv().await {
            if writer.write_all(&bytes).await.is_err() {
                break;
            }
        }
        // Either nobody reads any more, or the pod learns that the client has said all.
        let _ = writer.shutdown().await;
        std::future::pending::<()>().await;
    };
    let to_client = async {
        let mut buffer = BytesMut::with_capacity(BUFFER);
        // A connection that breaks off ends here as one that is closed does.
        while let Ok(1..) = reader.read_buf(&mut buffer).await {
            if outgoing.send(spdy::data(stream, &buffer, false)).await.is_err() {
                return;
            }
            buffer.clear();
        }
    };
    tokio::select! {
        () = to_pod => {}
        () = to_client => {}
    }
    Ok(())
}
