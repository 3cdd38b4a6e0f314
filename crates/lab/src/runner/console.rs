//! A running container's own input and output, for those who attach to it.

use std::io;
use std::process::Stdio;

use bytes::Bytes;
use k8s_openapi::api::core::v1::Container;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::sync::{Mutex, broadcast};
use tokio_util::io::InspectReader;

use super::terminal::Terminal;
use crate::runtime::{ExecIo, Input, TerminalSize};

/// Chunks of output that may wait for a slow client. The container never waits.
const BEHIND: usize = 256;

/// What a container's specification says of its input and output.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub(super) stdin: bool,
    once: bool,
    pub(super) tty: bool,
}

impl Wanted {
    pub(super) fn of(container: &Container) -> Self {
        Self {
            stdin: container.stdin == Some(true),
            once: container.stdin_once == Some(true),
            tty: container.tty == Some(true),
        }
    }
}

/// See the module.
pub(super) struct Console {
    input: Mutex<Option<Box<dyn AsyncWrite + Send + Unpin>>>,
    /// The input ends with the first client's.
    once: bool,
    terminal: Option<Terminal>,
    /// Ends when all is said.
    output: broadcast::WeakSender<Chunk>,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console").finish_non_exhaustive()
    }
}

#[derive(Debug, Clone)]
struct Chunk {
    stream: &'static str,
    bytes: Bytes,
}

/// Output of a container: the stream's name and what comes from it.
pub(super) type Stream = (&'static str, Box<dyn AsyncRead + Send + Unpin>);

/// Starts a container's first process with the input and output that it wants.
pub(super) fn spawn(
    mut command: Command,
    wanted: Wanted,
) -> io::Result<(Child, Console, Vec<Stream>)> {
    let (output, _) = broadcast::channel(BEHIND);
    let told = |stream, reader: Box<dyn AsyncRead + Send + Unpin>| -> Stream {
        let output = output.clone();
        let tell = move |bytes: &[u8]| {
            if output.receiver_count() > 0 {
                // The last one may have left just now.
                let _ = output.send(Chunk { stream, bytes: Bytes::copy_from_slice(bytes) });
            }
        };
        (stream, Box::new(InspectReader::new(reader, tell)))
    };
    let mut console = Console {
        input: Mutex::new(None),
        once: wanted.once && !wanted.tty,
        terminal: None,
        output: output.downgrade(),
    };
    if wanted.tty {
        let (terminal, end) = Terminal::open()?;
        let child = command.stdin(end.try_clone()?).stdout(end.try_clone()?).stderr(end).spawn()?;
        if wanted.stdin {
            console.input = Mutex::new(Some(Box::new(terminal.clone())));
        }
        console.terminal = Some(terminal.clone());
        return Ok((child, console, vec![told("stdout", Box::new(terminal))]));
    }
    let stdin = if wanted.stdin { Stdio::piped() } else { Stdio::null() };
    let mut child = command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    console.input = Mutex::new(child.stdin.take().map(|pipe| Box::new(pipe) as _));
    let stdout = child.stdout.take().map(|pipe| told("stdout", Box::new(pipe)));
    let stderr = child.stderr.take().map(|pipe| told("stderr", Box::new(pipe)));
    Ok((child, console, stdout.into_iter().chain(stderr).collect()))
}

impl Console {
    /// Shows a client what the container says from now on, and the container what they type, until
    /// the container ends.
    pub(super) async fn attach(&self, io: ExecIo) -> io::Result<()> {
        let Some(output) = self.output.upgrade().map(|output| output.subscribe()) else {
            return Ok(());
        };
        let ExecIo { stdin, mut stdout, mut stderr, mut resize } = io;
        let show = show(output, &mut stdout, &mut stderr);
        let type_in = async {
            if let Some(from) = stdin {
                self.type_in(from).await;
            }
            std::future::pending::<()>().await;
        };
        let resizes = async {
            while let Some(size) = resize.recv().await {
                self.resize(size);
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            shown = show => shown,
            () = type_in => Ok(()),
            () = resizes => Ok(()),
        }
    }

    async fn type_in(&self, mut from: Input) {
        let _end = EndOfInput(self);
        let mut buffer = vec![0; 4096];
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            let mut input = self.input.lock().await;
            let Some(to) = &mut *input else { return };
            if to.write_all(&buffer[..length]).await.is_err() {
                return;
            }
        }
    }

    fn resize(&self, size: TerminalSize) {
        if let Some(terminal) = &self.terminal {
            terminal.resize(size);
        }
    }
}

/// The client has said all, or is gone.
struct EndOfInput<'a>(&'a Console);

impl Drop for EndOfInput<'_> {
    fn drop(&mut self) {
        // Somebody else who is writing right now ends it later.
        if self.0.once
            && let Ok(mut input) = self.0.input.try_lock()
        {
            input.take();
        }
    }
}

async fn show(
    mut output: broadcast::Receiver<Chunk>,
    stdout: &mut Option<crate::runtime::Output>,
    stderr: &mut Option<crate::runtime::Output>,
) -> io::Result<()> {
    loop {
        let chunk = match output.recv().await {
            Ok(chunk) => chunk,
            Err(broadcast::error::RecvError::Closed) => return Ok(()),
            Err(broadcast::error::RecvError::Lagged(_)) => {
                return Err(io::Error::other(
                    "the container writes faster than it can be shown; all of it is in its logs",
                ));
            }
        };
        let to = if chunk.stream == "stderr" { &mut *stderr } else { &mut *stdout };
        if let Some(to) = to {
            to.write_all(&chunk.bytes).await?;
        }
    }
}
