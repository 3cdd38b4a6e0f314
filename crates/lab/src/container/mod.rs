//! The inside of containers: helpers that the pod runner starts as fresh, single-threaded
//! processes, because namespaces can only be joined and left by such.
//!
//! ```text
//! daemon ─ container-init (joins the control group and the pod's netns, unshares the rest)
//!            └ container-main (pid 1 of the container: root file system, reaps, forwards signals)
//!                └ container-run (own session, user, capabilities) → becomes the command
//! daemon ─ container-exec (joins all namespaces of a running container)
//!            └ container-run (the same, with a terminal where one is wanted)
//! ```

mod capabilities;
mod exec;
mod init;
mod privileges;
mod program;
mod rootfs;
mod supervise;

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use capabilities::Capabilities;
pub use exec::{exec, run};
pub use init::{init, main};
pub use privileges::Privileges;

/// Where this program is found inside every container.
pub const LAB_IN_CONTAINER: &str = "/.palisade/lab";
/// The search path of containers that do not set one.
pub const DEFAULT_PATH: &str =
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/.palisade/bin";

/// A directory or file of the machine that shows up in a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Volume {
    /// Path on the machine.
    pub source: PathBuf,
    /// Path in the container.
    pub target: PathBuf,
    /// No writes.
    pub read_only: bool,
}

/// What to run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Process {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Working directory; `/` if empty.
    pub directory: String,
    /// Who it is and what it may do.
    pub privileges: Privileges,
}

/// A container to create.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// Socket on which the outcome of the start is awaited.
    pub notify: PathBuf,
    /// Network namespace to join.
    pub netns: PathBuf,
    /// Control group to join.
    pub cgroup: PathBuf,
    /// Empty directory on which the root file system is put together.
    pub root: PathBuf,
    /// Host name.
    pub hostname: String,
    /// Files for `/etc`: name and content.
    pub etc: Vec<(String, String)>,
    /// Volumes.
    pub volumes: Vec<Volume>,
    /// Nothing but volumes can be written to.
    pub read_only: bool,
    /// Input and output are a terminal, which becomes the command's.
    pub tty: bool,
    /// The command.
    pub process: Process,
}

/// A command to run in a running container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExecSpec {
    /// Process id of the container's pid 1, as this machine sees it.
    pub target: u32,
    /// Control group to join.
    pub cgroup: PathBuf,
    /// File that gets the reason why the command could not be started.
    pub failure: PathBuf,
    /// stdin is a terminal that becomes the controlling one.
    pub tty: bool,
    /// The command.
    pub process: Process,
}

/// What `container-main` says on the notify socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The command runs.
    Started,
    /// The command could not be started; why.
    Failed(String),
}

fn read_spec<T: serde::de::DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("cannot parse {}", path.display()))
}
