//! `palisade`: how people ask Palisade what it does, check policies, and try it out.

// A reader that goes away is no reason to panic: see `output`.
#![warn(clippy::print_stdout)]

mod agents;
mod chart;
mod check;
mod cli;
mod cluster;
mod commands;
mod demo;
mod exit;
mod explain;
mod interrupt;
mod output;
mod progress;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match commands::run(cli::Cli::parse()) {
        Ok(exit) => exit.into(),
        Err(error) => exit::report(&error).into(),
    }
}
