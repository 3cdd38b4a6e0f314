//! The socket that the plugin connects to.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use palisade_api::cni::{Code, Failure, Operation, Request, Response, decode_length, encode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use super::{Attachments, Endpoints};

/// So many requests are worked on at once; more wait in the socket's queue.
const CONCURRENCY: usize = 64;

/// A client that says nothing for so long is not the plugin.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// Deletions may be queued at any time, by a plugin that could not reach the agent in time.
const DRAIN_INTERVAL: Duration = Duration::from_secs(10);

/// Answers the plugin until `shutdown` resolves.
pub async fn serve<E: Endpoints>(
    attachments: Arc<Attachments>,
    endpoints: Arc<E>,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let listener = listen(&attachments.settings.socket)?;
    let slots = Arc::new(Semaphore::new(CONCURRENCY));
    let drain = drain(Arc::clone(&attachments), Arc::clone(&endpoints));
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
            let (attachments, endpoints) = (Arc::clone(&attachments), Arc::clone(&endpoints));
            tokio::spawn(async move {
                if let Err(error) = converse(stream, &attachments, endpoints.as_ref()).await {
                    debug!("CNI request: {error}");
                }
                drop(slot);
            });
        }
    };
    tokio::pin!(shutdown);
    tokio::select! {
        () = accept => {}
        () = drain => {}
        () = &mut shutdown => {}
    }
    Ok(())
}

async fn drain<E: Endpoints>(attachments: Arc<Attachments>, endpoints: Arc<E>) {
    let mut ticks = tokio::time::interval(DRAIN_INTERVAL);
    loop {
        ticks.tick().await;
        attachments.drain(endpoints.as_ref()).await;
    }
}

/// Only root and its group may attach pods.
fn listen(socket: &Path) -> io::Result<UnixListener> {
    let directory = socket.parent().unwrap_or(Path::new("/"));
    if !directory.exists() {
        fs::create_dir_all(directory)?;
        fs::set_permissions(directory, Permissions::from_mode(0o750))?;
    }
    // One agent runs per directory; what is there is of one that died.
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    fs::set_permissions(socket, Permissions::from_mode(0o660))?;
    Ok(listener)
}

async fn converse<E: Endpoints>(
    mut stream: UnixStream,
    attachments: &Attachments,
    endpoints: &E,
) -> io::Result<()> {
    let body = tokio::time::timeout(READ_TIMEOUT, receive(&mut stream)).await??;
    let request = match serde_json::from_slice::<Request>(&body) {
        Ok(request) => request,
        Err(error) => {
            let failure = Failure::new(Code::InvalidJson, format!("the agent's request: {error}"));
            return stream.write_all(&encode(&Response::Failed(failure))?).await;
        }
    };
    let added = match &request.operation {
        Operation::Add(add) => Some(add.attachment.clone()),
        _ => None,
    };
    let response = answer(request, attachments, endpoints).await.unwrap_or_else(Response::Failed);
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
