//! `pods/exec` and `pods/attach` over WebSocket (`v5.channel.k8s.io`, `v4.channel.k8s.io`).
//!
//! The first byte of every message names its channel; 255 announces that one has ended.

use std::io;

use bytes::{Bytes, BytesMut};
use futures::{SinkExt as _, StreamExt as _};
use hyper::Request;
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message;

use super::error::ApiError;
use super::http::Call;
use super::logs::{container, from_runtime};
use super::reply::Reply;
use super::websocket::{self, Socket};
use crate::runtime::{ExecIo, ExecRequest, ExitStatus, RuntimeError, TerminalSize};

const PROTOCOLS: [&str; 2] = ["v5.channel.k8s.io", "v4.channel.k8s.io"];
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;
const BUFFER: usize = 32 * 1024;

pub(super) fn serve(call: Call, request: Request<Incoming>) -> Result<Reply, ApiError> {
    let pod = call.api.store.get(&call.key()).ok_or_else(|| call.not_found())?;
    let container = container(&pod, call.query.get("container"))?;
    let attach = call.subresource() == "attach";
    let command = call.query.all("command").to_vec();
    if command.is_empty() && !attach {
        return Err(ApiError::bad_request(
            "you must specify at least one command for the container",
        ));
    }
    let tty = call.query.flag("tty");
    let wants = Streams {
        stdin: call.query.flag("stdin"),
        stdout: call.query.flag("stdout"),
        stderr: call.query.flag("stderr") && !tty,
    };
    let exec = ExecRequest {
        namespace: call.namespace().to_owned(),
        pod: call.target.name.clone().unwrap_or_default(),
        container: Some(container),
        command,
        tty,
        stdin: wants.stdin,
    };
    websocket::accept(request, &PROTOCOLS, |socket| async move {
        if let Err(error) = run(socket, call, exec, wants).await {
            tracing::debug!(%error, "exec session ended");
        }
    })
}

struct Streams {
    stdin: bool,
    stdout: bool,
    stderr: bool,
}

async fn run(
    socket: Socket,
    call: Call,
    request: ExecRequest,
    wants: Streams,
) -> Result<(), tokio_tungstenite::tungstenite::Error> {
    let (mut sink, mut source) = socket.split();
    let (outgoing, mut messages) = mpsc::channel::<Bytes>(16);
    let (sizes, resize) = mpsc::channel(8);
    let (input, stdin) = pipe(wants.stdin);
    let (stdout, from_stdout) = pipe(wants.stdout);
    let (stderr, from_stderr) = pipe(wants.stderr);
    let io = ExecIo {
        stdin: stdin.map(|stream| Box::new(stream) as _),
        stdout: stdout.map(|stream| Box::new(stream) as _),
        stderr: stderr.map(|stream| Box::new(stream) as _),
        resize,
    };
    let outputs = futures::future::join(
        forward(STDOUT, from_stdout, outgoing.clone()),
        forward(STDERR, from_stderr, outgoing.clone()),
    );
    let command = call.api.runtime.exec(request, io);
    // The outcome is told once all output has been sent.
    let session = async move {
        let (result, _) = futures::future::join(command, outputs).await;
        let mut message = BytesMut::from(&[ERROR][..]);
        message.extend_from_slice(outcome(result).to_string().as_bytes());
        let _ = outgoing.send(message.freeze()).await;
    };
    let receiver = async {
        let mut input = input;
        while let Some(Ok(message)) = source.next().await {
            match message {
                Message::Binary(bytes) => receive(&bytes, &mut input, &sizes).await,
                Message::Close(_) => return,
                _ => {}
            }
        }
    };
    let sender = async {
        while let Some(message) = messages.recv().await {
            sink.send(Message::Binary(message)).await?;
        }
        sink.send(websocket::end()).await?;
        sink.close().await
    };
    let stop = call.api.stop.clone();
    let done = futures::future::join(session, sender);
    tokio::select! {
        (_, sent) = done => sent,
        // The client is gone: dropping the session ends the command.
        () = receiver => Ok(()),
        () = stop.cancelled() => Ok(()),
    }
}

fn pipe(wanted: bool) -> (Option<DuplexStream>, Option<DuplexStream>) {
    if !wanted {
        return (None, None);
    }
    let (near, far) = tokio::io::duplex(BUFFER);
    (Some(near), Some(far))
}

async fn receive(
    bytes: &[u8],
    input: &mut Option<DuplexStream>,
    sizes: &mpsc::Sender<TerminalSize>,
) {
    match bytes.split_first() {
        Some((&STDIN, data)) => {
            let Some(stream) = input else { return };
            if stream.write_all(data).await.is_err() {
                *input = None;
            }
        }
        Some((&RESIZE, data)) => {
            if let Ok(size) = serde_json::from_slice(data) {
                let _ = sizes.try_send(size);
            }
        }
        Some((&CLOSE, [STDIN])) => *input = None,
        _ => {}
    }
}

async fn forward(
    channel: u8,
    stream: Option<impl AsyncRead + Unpin>,
    outgoing: mpsc::Sender<Bytes>,
) -> io::Result<()> {
    let Some(mut stream) = stream else { return Ok(()) };
    loop {
        let mut message = BytesMut::with_capacity(BUFFER + 1);
        message.extend_from_slice(&[channel]);
        if stream.read_buf(&mut message).await? == 0 {
            return Ok(());
        }
        if outgoing.send(message.freeze()).await.is_err() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
    }
}

fn outcome(result: Result<ExitStatus, RuntimeError>) -> Value {
    match result {
        Ok(ExitStatus { code: 0 }) => json!({"metadata": {}, "status": "Success"}),
        Ok(ExitStatus { code }) => json!({
            "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
            "message": format!("command terminated with non-zero exit code: exit status {code}"),
            "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
        }),
        Err(error) => from_runtime(error).status(),
    }
}
