//! `exec`, `attach`, `logs` and `portforward` for the API server.

use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use super::container::unblock;
use super::terminal::{END_OF_INPUT, Terminal};
use super::{Live, Runner, Target};
use crate::container::ExecSpec;
use crate::runtime::{
    ExecIo, ExecRequest, ExitStatus, Input, LogRequest, Output, PodRuntime, RuntimeError,
};
use crate::sys::netns;

/// Output that is still on its way when the command has ended gets so long.
const DRAIN: Duration = Duration::from_secs(2);

static NUMBER: AtomicU64 = AtomicU64::new(0);

impl PodRuntime for Runner {
    fn exec(
        &self,
        request: ExecRequest,
        io: ExecIo,
    ) -> BoxFuture<'static, Result<ExitStatus, RuntimeError>> {
        let live = self.live(&request.namespace, &request.pod, request.container.as_deref());
        let scratch = self.settings.layout.run_dir().join("exec");
        Box::pin(async move {
            let (name, live) = live?;
            let target = live.running.ok_or_else(|| {
                RuntimeError::BadRequest(format!(
                    "container not found (\"{name}\"): it is not running"
                ))
            })?;
            if request.command.is_empty() {
                target.console.attach(io).await.map_err(internal)?;
                // How the container ended is in the pod's status.
                return Ok(ExitStatus { code: 0 });
            }
            exec(target, request, io, &scratch).await
        })
    }

    fn logs(
        &self,
        request: LogRequest,
    ) -> BoxFuture<'static, Result<BoxStream<'static, Bytes>, RuntimeError>> {
        let live = self.live(&request.namespace, &request.pod, request.container.as_deref());
        Box::pin(async move {
            let (name, live) = live?;
            let log = if request.previous { live.previous } else { live.current };
            let log = log.ok_or_else(|| {
                let what =
                    if request.previous { "previous terminated container" } else { "container" };
                let (pod, text) = (&request.pod, "is waiting to start or has no output yet");
                RuntimeError::BadRequest(format!("{what} \"{name}\" in pod \"{pod}\" {text}"))
            })?;
            log.read(&request).await.map_err(internal)
        })
    }

    fn connect(
        &self,
        namespace: &str,
        pod: &str,
        port: u16,
    ) -> BoxFuture<'static, Result<TcpStream, RuntimeError>> {
        let shared = self.shared(namespace, pod);
        let netns = shared.and_then(|shared| shared.netns.get().cloned());
        let netns = netns.ok_or_else(|| not_running(namespace, pod));
        let pod = format!("{namespace}/{pod}");
        Box::pin(async move {
            let netns = netns?;
            let socket = unblock(move || netns::run_in(&netns, move || connect_local(port)));
            let socket = socket.await.and_then(|socket| {
                socket.set_nonblocking(true)?;
                TcpStream::from_std(socket)
            });
            socket.map_err(|error| {
                RuntimeError::BadRequest(format!(
                    "cannot connect to port {port} in pod {pod}: {error}"
                ))
            })
        })
    }
}

/// Loopback answers at once.
fn connect_local(port: u16) -> std::io::Result<std::net::TcpStream> {
    use std::net::{Ipv4Addr, Ipv6Addr, TcpStream};
    let v4 = match TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
        Ok(socket) => return Ok(socket),
        Err(error) => error,
    };
    TcpStream::connect((Ipv6Addr::LOCALHOST, port))
        .map_err(|v6| std::io::Error::new(v6.kind(), format!("127.0.0.1: {v4}; ::1: {v6}")))
}

fn internal(error: impl std::fmt::Display) -> RuntimeError {
    RuntimeError::Internal(error.to_string())
}

fn not_running(namespace: &str, pod: &str) -> RuntimeError {
    RuntimeError::NotFound(format!(
        "pod {namespace}/{pod} is not running; why, tells: kubectl -n {namespace} describe pod {pod}"
    ))
}

impl Runner {
    fn live(
        &self,
        namespace: &str,
        pod: &str,
        container: Option<&str>,
    ) -> Result<(String, Live), RuntimeError> {
        let missing = || not_running(namespace, pod);
        let shared = self.shared(namespace, pod).ok_or_else(missing)?;
        let name = match container {
            Some(name) => name.to_owned(),
            None => super::lock(&shared.containers).keys().next().cloned().ok_or_else(missing)?,
        };
        let live = shared.get(&name).unwrap_or_default();
        Ok((name, live))
    }
}

async fn exec(
    target: Target,
    request: ExecRequest,
    io: ExecIo,
    scratch: &Path,
) -> Result<ExitStatus, RuntimeError> {
    let files = Files::create(scratch, &target, request.command.clone(), request.tty)
        .await
        .map_err(internal)?;
    let status = if request.tty {
        on_terminal(&files, io).await.map_err(internal)?
    } else {
        on_pipes(&files, io).await.map_err(internal)?
    };
    files.outcome(status, &request.command).await
}

/// Runs a command whose output nobody wants.
pub(super) async fn run_quietly(
    target: &Target,
    command: Vec<String>,
    scratch: &Path,
) -> anyhow::Result<i32> {
    let files = Files::create(scratch, target, command.clone(), false).await?;
    let mut child =
        files.command().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let status = child.wait().await?;
    Ok(files.outcome(status, &command).await?.code)
}

/// The specification of one command and the place for its failure to start.
struct Files {
    spec: std::path::PathBuf,
    failure: std::path::PathBuf,
}

impl Files {
    async fn create(
        scratch: &Path,
        target: &Target,
        command: Vec<String>,
        tty: bool,
    ) -> std::io::Result<Self> {
        tokio::fs::create_dir_all(scratch).await?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let files = Self {
            spec: scratch.join(format!("{number}.json")),
            failure: scratch.join(format!("{number}.failure")),
        };
        let mut process = target.process.with_command(command);
        if tty {
            process.name_terminal();
        }
        let spec = ExecSpec {
            target: target.pid,
            cgroup: target.cgroup.clone(),
            failure: files.failure.clone(),
            tty,
            process,
        };
        tokio::fs::write(&files.spec, serde_json::to_vec(&spec)?).await?;
        Ok(files)
    }

    fn command(&self) -> Command {
        let mut command = Command::new("/proc/self/exe");
        command.arg("container-exec").arg(&self.spec).kill_on_drop(true).process_group(0);
        command
    }

    async fn outcome(
        &self,
        status: std::process::ExitStatus,
        command: &[String],
    ) -> Result<ExitStatus, RuntimeError> {
        use std::os::unix::process::ExitStatusExt;
        let reason = tokio::fs::read_to_string(&self.failure).await.unwrap_or_default();
        if !reason.is_empty() {
            let command = command.first().cloned().unwrap_or_default();
            return Err(RuntimeError::CannotStart { command, reason });
        }
        let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        Ok(ExitStatus { code })
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.spec);
        let _ = std::fs::remove_file(&self.failure);
    }
}

async fn on_pipes(files: &Files, io: ExecIo) -> std::io::Result<std::process::ExitStatus> {
    let piped = |wanted: bool| if wanted { Stdio::piped() } else { Stdio::null() };
    let mut child = files
        .command()
        .stdin(piped(io.stdin.is_some()))
        .stdout(piped(io.stdout.is_some()))
        .stderr(piped(io.stderr.is_some()))
        .spawn()?;
    let input = match (io.stdin, child.stdin.take()) {
        (Some(from), Some(to)) => Some(tokio::spawn(copy_input(from, to))),
        _ => None,
    };
    let outputs = [
        child.stdout.take().zip(io.stdout).map(|(from, to)| tokio::spawn(copy(from, to))),
        child.stderr.take().zip(io.stderr).map(|(from, to)| tokio::spawn(copy(from, to))),
    ];
    finish(&mut child, input, outputs.into_iter().flatten()).await
}

/// A task that ends with its owner.
struct Abort(tokio::task::JoinHandle<()>);

impl Drop for Abort {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn finish(
    child: &mut Child,
    input: Option<tokio::task::JoinHandle<()>>,
    outputs: impl Iterator<Item = tokio::task::JoinHandle<()>>,
) -> std::io::Result<std::process::ExitStatus> {
    let _input = input.map(Abort);
    let outputs: Vec<_> = outputs.map(Abort).collect();
    let status = child.wait().await?;
    let drained = async {
        for mut output in outputs {
            let _ = (&mut output.0).await;
        }
    };
    // A process left in the background may hold the pipes open for ever.
    let _ = tokio::time::timeout(DRAIN, drained).await;
    Ok(status)
}

async fn copy_input(mut from: Input, mut to: impl AsyncWrite + Unpin) {
    // Errors are one of the ends going away; the other sees the end of the stream then.
    let _ = tokio::io::copy(&mut from, &mut to).await;
    let _ = to.shutdown().await;
}

async fn copy(mut from: impl tokio::io::AsyncRead + Unpin, mut to: Output) {
    let _ = tokio::io::copy(&mut from, &mut to).await;
    let _ = to.shutdown().await;
}

async fn on_terminal(files: &Files, mut io: ExecIo) -> std::io::Result<std::process::ExitStatus> {
    let (terminal, end) = Terminal::open()?;
    let mut child =
        files.command().stdin(end.try_clone()?).stdout(end.try_clone()?).stderr(end).spawn()?;
    let input = io.stdin.take().map(|from| tokio::spawn(type_in(from, terminal.clone())));
    let output = io.stdout.take().map(|to| tokio::spawn(copy(terminal.clone(), to)));
    let mut resize = io.resize;
    let _resizes = Abort(tokio::spawn(async move {
        while let Some(size) = resize.recv().await {
            terminal.resize(size);
        }
    }));
    finish(&mut child, input, output.into_iter()).await
}

async fn type_in(mut from: Input, mut terminal: Terminal) {
    // Errors are one of the ends going away.
    let _ = tokio::io::copy(&mut from, &mut terminal).await;
    let _ = terminal.write_all(&[END_OF_INPUT]).await;
}
