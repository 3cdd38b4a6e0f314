//! `palisade lab`: hands over to `palisade-lab`.

use std::{env, os::unix::process::CommandExt, path::PathBuf, process::Command};

use anyhow::{Context, Result};

use crate::{
    exit::{Exit, Failure},
    output::Format,
};

const PROGRAM: &str = "palisade-lab";

/// Becomes `palisade-lab`; returns only where that fails.
pub(crate) fn run(args: &[String], output: Format) -> Result<Exit> {
    let program = beside_this_one()?;
    let mut command = Command::new(&program);
    if let Format::Json = output {
        command.args(["--output", "json"]);
    }
    let error = command.arg0("palisade lab").args(args).exec();
    Err(Failure::unreachable(
        format!("{} cannot be started: {error}", program.display()),
        "Build it with:  make build",
    )
    .into())
}

/// Measures: the lab is what there is to measure.
pub(crate) fn bench(rounds: u16, output: Format) -> Result<Exit> {
    let args = ["bench", "--rounds", &rounds.to_string()];
    run(&args.map(str::to_owned), output)
}

fn beside_this_one() -> Result<PathBuf> {
    let this = env::current_exe().context("this program's own path cannot be found")?;
    Ok(this.with_file_name(PROGRAM))
}
