//! One run of one container: from the specification to the exit code.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::io::AsyncReadExt;
use tokio::net::UnixListener;
use tokio::process::{Child, Command};

use super::console::{self, Console, Wanted};
use super::logs::Log;
use crate::container::{ContainerSpec, Outcome};
use crate::sys::cgroup;

/// A container that is not up by then never will be.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A running container.
#[derive(Debug)]
pub(super) struct Running {
    child: Child,
    copiers: Vec<tokio::task::JoinHandle<()>>,
    /// Pid 1 of the container as this machine sees it.
    pub(super) target: u32,
    pub(super) console: Arc<Console>,
    pub(super) log: Arc<Log>,
    cgroup: PathBuf,
}

/// Starts a container; `directory` holds its files.
pub(super) async fn start(
    directory: &Path,
    spec: &ContainerSpec,
    wanted: Wanted,
    log: Arc<Log>,
) -> anyhow::Result<Running> {
    tokio::fs::create_dir_all(&spec.root).await?;
    cgroup::create(&spec.cgroup).context("cannot create the container's control group")?;
    let spec_path = directory.join("spec.json");
    tokio::fs::write(&spec_path, serde_json::to_vec(spec)?).await?;
    let _ = tokio::fs::remove_file(&spec.notify).await;
    let listener = UnixListener::bind(&spec.notify)
        .with_context(|| format!("cannot listen on {}", spec.notify.display()))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg("container-init").arg(&spec_path).process_group(0);
    let (mut child, console, outputs) =
        console::spawn(command, wanted).context("cannot start container-init")?;
    let copiers = outputs
        .into_iter()
        .map(|(name, stream)| tokio::spawn(Arc::clone(&log).copy(name, stream)))
        .collect();
    let outcome = tokio::time::timeout(START_TIMEOUT, await_outcome(&listener, &mut child)).await;
    let _ = tokio::fs::remove_file(&spec.notify).await;
    let started = match outcome {
        Ok(Ok(target)) => Ok(target),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(anyhow::anyhow!("the container did not start within 30 s")),
    };
    let (console, cgroup) = (Arc::new(console), spec.cgroup.clone());
    let target = *started.as_ref().unwrap_or(&0);
    let mut running = Running { child, copiers, target, console, log, cgroup };
    if started.is_err() {
        running.kill().await;
    }
    started.map(|_| running)
}

async fn await_outcome(listener: &UnixListener, child: &mut Child) -> anyhow::Result<u32> {
    let mut stream = tokio::select! {
        accepted = listener.accept() => accepted?.0,
        status = child.wait() => bail!("container-init ended early: {}", status?),
    };
    let target = stream.peer_cred()?.pid().context("the container's process id is unknown")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    match serde_json::from_slice(&answer).context("the container's start was interrupted")? {
        Outcome::Started => Ok(u32::try_from(target)?),
        Outcome::Failed(reason) => bail!("{reason}"),
    }
}

impl Running {
    /// Waits for the command to end; its exit code.
    pub(super) async fn wait(&mut self) -> i32 {
        let code = match self.child.wait().await {
            Ok(status) => {
                use std::os::unix::process::ExitStatusExt;
                status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
            }
            Err(_) => 255,
        };
        self.finish().await;
        code
    }

    /// Asks the command to end.
    pub(super) fn terminate(&self) {
        if let Some(pid) =
            self.child.id().and_then(|pid| rustix::process::Pid::from_raw(pid as i32))
        {
            // It may have ended by itself.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
    }

    /// Ends everything in the container, now.
    pub(super) async fn kill(&mut self) {
        let path = self.cgroup.clone();
        if let Err(error) = unblock(move || cgroup::remove(&path)).await {
            tracing::warn!("cannot end the processes in {}: {error}", self.cgroup.display());
        }
        let _ = self.child.start_kill();
        let _ = self.child.wait().await;
        self.finish().await;
    }

    /// Leftovers of the container go, and the log is complete.
    async fn finish(&mut self) {
        let path = self.cgroup.clone();
        let _ = unblock(move || cgroup::remove(&path)).await;
        for copier in self.copiers.drain(..) {
            let _ = copier.await;
        }
        self.log.end().await;
    }
}

/// Runs something that blocks for a moment on a thread for such things.
pub(super) async fn unblock<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(std::io::Error::other)?
}
