//! Starting a container.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::Context;
use rustix::process::Signal;
use rustix::thread::UnshareFlags;

use super::{Capabilities, ContainerSpec, Outcome, exec, read_spec, rootfs, supervise};
use crate::sys::{cgroup, netns};

/// Joins and leaves namespaces, then starts [`main`] as the container's pid 1 and waits for it.
pub fn init(spec_path: &Path) -> anyhow::Result<ExitCode> {
    let spec: ContainerSpec = read_spec(spec_path)?;
    let prepared = enter_namespaces(&spec);
    if let Err(error) = prepared {
        report(&mut UnixStream::connect(&spec.notify)?, &Outcome::Failed(format!("{error:#}")))?;
        return Ok(ExitCode::from(128));
    }
    let child = Command::new("/proc/self/exe")
        .arg("container-main")
        .arg(spec_path)
        .spawn()
        .context("cannot start the container's first process")?;
    supervise::until_exit(&child)
}

fn enter_namespaces(spec: &ContainerSpec) -> anyhow::Result<()> {
    cgroup::join(&spec.cgroup)
        .with_context(|| format!("cannot join control group {}", spec.cgroup.display()))?;
    netns::enter(&spec.netns)
        .with_context(|| format!("cannot enter network namespace {}", spec.netns.display()))?;
    netns::unshare(
        UnshareFlags::NEWNS | UnshareFlags::NEWPID | UnshareFlags::NEWUTS | UnshareFlags::NEWIPC,
    )
    .context("cannot create the container's namespaces")
}

/// Pid 1 of the container: puts the root file system together, starts the command, then reaps
/// orphans and forwards signals until the command ends.
pub fn main(spec_path: &Path) -> anyhow::Result<ExitCode> {
    let spec: ContainerSpec = read_spec(spec_path)?;
    // The container must not outlive the helper that the runner watches.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let mut notify = UnixStream::connect(&spec.notify)
        .with_context(|| format!("cannot connect to {}", spec.notify.display()))?;
    match start(&spec) {
        Ok(child) => {
            report(&mut notify, &Outcome::Started)?;
            drop(notify);
            supervise::until_exit(&child)
        }
        Err(error) => {
            report(&mut notify, &Outcome::Failed(format!("{error:#}")))?;
            Ok(ExitCode::from(128))
        }
    }
}

fn start(spec: &ContainerSpec) -> anyhow::Result<std::process::Child> {
    rustix::process::setsid().context("cannot start a session")?;
    rustix::system::sethostname(spec.hostname.as_bytes()).context("cannot set the host name")?;
    rootfs::enter(spec)?;
    let child = exec::spawn(&spec.process, spec.tty)?;
    let own = Capabilities::SUPERVISOR;
    own.bound().and_then(|()| own.limit()).context("cannot give up capabilities")?;
    Ok(child)
}

fn report(notify: &mut UnixStream, outcome: &Outcome) -> anyhow::Result<()> {
    Ok(notify.write_all(&serde_json::to_vec(outcome)?)?)
}
