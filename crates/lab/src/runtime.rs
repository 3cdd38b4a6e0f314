//! What the API server asks of the pod runner: run a command in a container, attach to one, read
//! its logs, connect to a pod.

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

/// The input end of a command: what the client types.
pub type Input = Box<dyn AsyncRead + Send + Unpin>;
/// An output end of a command: what the client sees.
pub type Output = Box<dyn AsyncWrite + Send + Unpin>;

/// A command to run in a container of a running pod (`kubectl exec`), or an attachment to the
/// container's own process when `command` is empty (`kubectl attach`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecRequest {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// Container, always one that the pod's spec names; `None` when the pod has only one.
    pub container: Option<String>,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Run on a pseudo-terminal; stderr then goes to stdout. Whether a container has one is its
    /// own affair.
    pub tty: bool,
    /// The client sends stdin.
    pub stdin: bool,
}

/// Where the streams of an [`ExecRequest`] end. A stream that the client did not ask for is
/// `None`; the client going away shows as end of file on `stdin` and as errors on the outputs.
pub struct ExecIo {
    /// What the client types.
    pub stdin: Option<Input>,
    /// The command's standard output (all output when `tty`).
    pub stdout: Option<Output>,
    /// The command's standard error; `None` when `tty`.
    pub stderr: Option<Output>,
    /// New sizes of the client's terminal.
    pub resize: mpsc::Receiver<TerminalSize>,
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct TerminalSize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// How a command ended: its exit code, 128 + signal number if a signal ended it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitStatus {
    /// Exit code.
    pub code: i32,
}

/// Which part of a container's output to send (`kubectl logs`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogRequest {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// Container, always one that the pod's spec names; `None` when the pod has only one.
    pub container: Option<String>,
    /// Keep the stream open and send what is written from now on.
    pub follow: bool,
    /// Only the last lines; `None` = all.
    pub tail_lines: Option<u64>,
    /// The output of the previous run of the container.
    pub previous: bool,
    /// Begin every line with its time (RFC 3339 with nanoseconds).
    pub timestamps: bool,
    /// Only lines written at or after this time.
    pub since: Option<jiff::Timestamp>,
}

/// Why the runner could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// No such pod or container is running on this machine.
    #[error("{0}")]
    NotFound(String),
    /// The request makes no sense for the container in its present state.
    #[error("{0}")]
    BadRequest(String),
    /// The command could not be started; what follows is the operating system's reason.
    #[error("cannot run {command:?}: {reason}")]
    CannotStart {
        /// The program.
        command: String,
        /// The operating system's reason.
        reason: String,
    },
    /// Anything else.
    #[error("{0}")]
    Internal(String),
}

/// The pod runner as seen by the API server.
pub trait PodRuntime: Send + Sync + 'static {
    /// Runs a command and resolves once it has ended and its output has been written to `io`.
    /// Dropping the future ends the command; an attachment it ends, and not the container.
    fn exec(
        &self,
        request: ExecRequest,
        io: ExecIo,
    ) -> BoxFuture<'static, Result<ExitStatus, RuntimeError>>;

    /// The container's output. With `follow` the stream ends when the container does.
    fn logs(
        &self,
        request: LogRequest,
    ) -> BoxFuture<'static, Result<BoxStream<'static, Bytes>, RuntimeError>>;

    /// A connection to a port of the pod's own loopback interface: what listens there only, can
    /// be reached too (`kubectl port-forward`).
    fn connect(
        &self,
        namespace: &str,
        pod: &str,
        port: u16,
    ) -> BoxFuture<'static, Result<TcpStream, RuntimeError>>;
}
