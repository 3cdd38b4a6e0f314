//! The cluster that a demonstration brings up and takes down.

use std::{
    env,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use palisade_api::routing::Routing;

use crate::{exit::Failure, output::note};

/// `palisade-lab`, which stands beside this program.
pub(super) struct Lab {
    program: PathBuf,
}

impl Lab {
    pub(super) fn find() -> Result<Self> {
        let this = env::current_exe().context("this program's own path cannot be found")?;
        let program = this.with_file_name("palisade-lab");
        if program.exists() {
            return Ok(Self { program });
        }
        Err(Failure::refused(format!("{} is missing", program.display()), "Run 'make build'.")
            .into())
    }

    /// The kubeconfig of the lab that is running, if one is.
    pub(super) fn kubeconfig(&self) -> Result<Option<PathBuf>> {
        let output = self.command().arg("kubeconfig").stderr(Stdio::null()).output()?;
        let path = String::from_utf8(output.stdout)?;
        Ok(output.status.success().then(|| PathBuf::from(path.trim())))
    }

    pub(super) fn up(&self, nodes: u16, routing: Routing) -> Result<()> {
        let (nodes, routing) = (nodes.to_string(), routing.to_string());
        self.run(&["up", "--nodes", &nodes, "--routing", &routing])
    }

    pub(super) fn down(&self) -> Result<()> {
        self.run(&["down"])
    }

    fn run(&self, args: &[&str]) -> Result<()> {
        note!("$ palisade lab {}", args.join(" "));
        let status = self.command().args(args).status()?;
        ensure!(status.success(), "palisade lab {} ended with {status}", args.join(" "));
        Ok(())
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.stdin(Stdio::null());
        command
    }
}
