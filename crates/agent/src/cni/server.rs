//! The socket that the plugin connects to.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use palisade_api::cni::{
    Attachment, Code, Failure, Operation, Request, Response, decode_length, deletion_queue, encode,
};
use palisade_datapath::netlink::Netlink;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tracing::{debug, warn};

use super::{Attachments, Endpoints, Readiness, host_ifname};

/// So many requests are worked on at once; more wait in the socket's queue.
const CONCURRENCY: usize = 64;

/// A client that says nothing for so long is not the plugin.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// Deletions may be queued at any time, by a plugin that could not reach the agent in time.
const DRAIN_INTERVAL: Duration = Duration::from_secs(10);

/// What answers the plugin. It does so from the start, and says why where it cannot do yet what it
/// is asked for.
pub struct Server<E> {
    socket: PathBuf,
    node: Netlink,
    endpoints: Arc<E>,
    attachments: watch::Sender<Option<Arc<Attachments>>>,
}

impl<E: Endpoints> Server<E> {
    /// A server on `socket` for the pods of `node`'s namespace, that knows no attachment yet.
    pub fn new(socket: PathBuf, node: Netlink, endpoints: Arc<E>) -> Self {
        Self { socket, node, endpoints, attachments: watch::Sender::default() }
    }

    /// From now on pods can be attached.
    pub fn open(&self, attachments: Attachments) {
        self.attachments.send_replace(Some(Arc::new(attachments)));
    }

    /// Tells when pods can be attached.
    pub fn attachments(&self) -> watch::Receiver<Option<Arc<Attachments>>> {
        self.attachments.subscribe()
    }

    /// Takes the socket, for root and its group only.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn listen(&self) -> io::Result<UnixListener> {
        listen(&self.socket)
    }

    /// Answers the plugin for ever.
    pub async fn serve(self: Arc<Self>, listener: UnixListener) {
        let slots = Arc::new(Semaphore::new(CONCURRENCY));
        let accept = async {
            loop {
                let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
                let stream = match listener.accept().await {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        // Out of descriptors: those in use have to be freed first.
                        warn!("cannot accept a CNI request: {error}");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                };
                let server = Arc::clone(&self);
                tokio::spawn(async move {
                    if let Err(error) = server.converse(stream).await {
                        debug!("CNI request: {error}");
                    }
                    drop(slot);
                });
            }
        };
        tokio::join!(accept, self.drain());
    }

    async fn drain(&self) {
        let mut opened = self.attachments.subscribe();
        let attachments = match opened.wait_for(Option::is_some).await {
            Ok(opened) => opened.clone(),
            Err(_) => return,
        };
        let Some(attachments) = attachments else { return };
        let mut ticks = tokio::time::interval(DRAIN_INTERVAL);
        loop {
            ticks.tick().await;
            attachments.drain(self.endpoints.as_ref()).await;
        }
    }

    async fn converse(&self, mut stream: UnixStream) -> io::Result<()> {
        let body = tokio::time::timeout(READ_TIMEOUT, receive(&mut stream)).await??;
        let request = match serde_json::from_slice::<Request>(&body) {
            Ok(request) => request,
            Err(error) => {
                let message = format!("the agent's request: {error}");
                let failure = Failure::new(Code::InvalidJson, message);
                return stream.write_all(&encode(&Response::Failed(failure))?).await;
            }
        };
        let opened = self.attachments.borrow().clone();
        let Some(attachments) = opened else {
            let answer = self.answer_closed(request.operation).await;
            let response = answer.unwrap_or_else(Response::Failed);
            return stream.write_all(&encode(&response)?).await;
        };
        let endpoints = self.endpoints.as_ref();
        let added = match &request.operation {
            Operation::Add(add) => Some(add.attachment.clone()),
            _ => None,
        };
        let answer = answer(request, &attachments, endpoints).await;
        let response = answer.unwrap_or_else(Response::Failed);
        let attached = matches!(response, Response::Attached(_));
        let sent = stream.write_all(&encode(&response)?).await;
        if let (Err(_), true, Some(attachment)) = (&sent, attached, added) {
            // The plugin died: the runtime does not know of the attachment.
            if let Err(failure) = attachments.del(endpoints, &attachment).await {
                warn!("cannot undo {attachment}, whose plugin died: {failure}");
            }
        }
        sent
    }

    /// Before the node's pod networks are known, pods can only leave.
    async fn answer_closed(&self, operation: Operation) -> Result<Response, Failure> {
        let (status, why) = match self.endpoints.readiness().await {
            Readiness::Ready => {
                let why = "the Node object of this node has no pod CIDR in spec.podCIDRs";
                (Code::NotAvailable, why.to_owned())
            }
            Readiness::NotReady(why) => (Code::NotAvailable, why),
            Readiness::Impaired(why) => (Code::LimitedConnectivity, why),
        };
        let message = format!("the agent cannot attach pods yet: {why}");
        match operation {
            Operation::Del(attachment) => self.del_closed(&attachment).await,
            Operation::Status => Err(Failure::new(status, message)),
            Operation::Add(_) | Operation::Check(_) | Operation::Gc(_) => {
                Err(Failure::new(Code::TryAgain, message))
            }
        }
    }

    /// The interface and what is in the kernel go; the rest is left for when the records are open.
    async fn del_closed(&self, attachment: &Attachment) -> Result<Response, Failure> {
        let failed = |error: String| Failure::new(Code::TryAgain, error);
        let queue = deletion_queue(&self.socket);
        fs::create_dir_all(&queue)
            .and_then(|()| fs::write(queue.join(attachment.file_name()), ""))
            .map_err(|error| failed(format!("{}: {error}", queue.display())))?;
        let name = host_ifname(attachment);
        self.node.delete_link(&name).await.map_err(|error| failed(error.to_string()))?;
        self.endpoints.remove(attachment).await?;
        Ok(Response::Done)
    }
}

/// Only root and its group may attach pods.
fn listen(socket: &Path) -> io::Result<UnixListener> {
    let directory = socket.parent().unwrap_or(Path::new("/"));
    if !directory.exists() {
        fs::create_dir_all(directory)?;
        fs::set_permissions(directory, Permissions::from_mode(0o750))?;
    }
    crate::sockets::listen(socket)
}

async fn receive(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut header = [0; 4];
    stream.read_exact(&mut header).await?;
    let mut body = vec![0; decode_length(header)?];
    stream.read_exact(&mut body).await?;
    Ok(body)
}

async fn answer<E: Endpoints>(
    request: Request,
    attachments: &Attachments,
    endpoints: &E,
) -> Result<Response, Failure> {
    let patience = Duration::from_millis(request.patience_ms);
    match request.operation {
        Operation::Add(add) => {
            return attachments.add(endpoints, add, patience).await.map(Response::Attached);
        }
        Operation::Del(attachment) => attachments.del(endpoints, &attachment).await?,
        Operation::Check(check) => attachments.check(endpoints, check).await?,
        Operation::Gc(gc) => attachments.gc(endpoints, gc).await?,
        Operation::Status => attachments.status(endpoints).await?,
    }
    Ok(Response::Done)
}
