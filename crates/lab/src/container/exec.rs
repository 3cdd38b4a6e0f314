//! Running a command in a container that is there already.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use rustix::process::Signal;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{ExecSpec, LAB_IN_CONTAINER, Privileges, Process, program, read_spec, supervise};
use crate::sys::cgroup;

/// The order matters: the mount namespace last, since the others are opened through `/proc`.
const NAMESPACES: [(&str, LinkNameSpaceType); 5] = [
    ("ipc", LinkNameSpaceType::InterProcessCommunication),
    ("uts", LinkNameSpaceType::HostNameAndNISDomainName),
    ("net", LinkNameSpaceType::Network),
    ("pid", LinkNameSpaceType::ProcessID),
    ("mnt", LinkNameSpaceType::Mount),
];

/// Joins the container and runs the command there; its exit code is ours.
pub fn exec(spec_path: &Path) -> anyhow::Result<ExitCode> {
    let spec: ExecSpec = read_spec(spec_path)?;
    let mut failure = File::create(&spec.failure)?;
    match start(&spec) {
        Ok(child) => supervise::until_exit(&child),
        Err(error) => {
            write!(failure, "{error:#}")?;
            Ok(ExitCode::from(126))
        }
    }
}

fn start(spec: &ExecSpec) -> anyhow::Result<std::process::Child> {
    cgroup::join(&spec.cgroup).context("the container is gone")?;
    let namespaces = NAMESPACES
        .iter()
        .map(|(name, kind)| {
            let path = format!("/proc/{}/ns/{name}", spec.target);
            Ok((File::open(&path).context("the container is gone")?, *kind))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    for (file, kind) in &namespaces {
        move_into_link_name_space(file.as_fd(), Some(*kind))
            .with_context(|| format!("cannot join the container's namespace {kind:?}"))?;
    }
    spawn(&spec.process, spec.tty)
}

/// Starts the command by way of [`run`].
pub(super) fn spawn(process: &Process, tty: bool) -> anyhow::Result<std::process::Child> {
    let wanted = program::command(process)?;
    let mut command = Command::new(LAB_IN_CONTAINER);
    command.arg("container-run").arg("--privileges").arg(process.privileges.argument()?);
    if tty {
        command.arg("--tty");
    }
    command.arg("--").arg(wanted.get_program()).args(&process.argv[1..]);
    command.env_clear().envs(process.env.iter().map(|(k, v)| (k, v)));
    command.spawn().with_context(|| format!("exec: {:?}", process.argv[0]))
}

/// Becomes the command, in a session of its own.
pub fn run(privileges: &Privileges, tty: bool, argv: &[String]) -> anyhow::Result<ExitCode> {
    rustix::process::setsid().context("cannot start a session")?;
    if tty {
        rustix::process::ioctl_tiocsctty(std::io::stdin()).context("cannot take the terminal")?;
    }
    privileges.take()?;
    // Who becomes another user loses this.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let Some((name, arguments)) = argv.split_first() else { bail!("no command specified") };
    Err(Command::new(name).args(arguments).exec()).with_context(|| format!("exec: {name:?}"))
}

impl Process {
    /// The same surroundings with another command.
    pub fn with_command(&self, argv: Vec<String>) -> Self {
        Self { argv, ..self.clone() }
    }

    /// Says which kind of terminal it runs on, unless somebody has.
    pub fn name_terminal(&mut self) {
        if !self.env.iter().any(|(name, _)| name == "TERM") {
            self.env.push(("TERM".to_owned(), "xterm".to_owned()));
        }
    }
}
