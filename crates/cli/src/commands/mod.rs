//! One file for each command.

pub(crate) mod connectivity;
mod endpoint;
mod identity;
pub(crate) mod install;
mod lab;
pub(crate) mod node;
mod observe;
mod policy;
mod status;
pub(crate) mod sysdump;
mod table;
mod version;

use anyhow::Result;
use clap::CommandFactory;

use crate::{
    check,
    cli::{Cli, Command, DemoCommand, PolicyCommand},
    demo,
    exit::Exit,
    explain,
    output::say,
};

/// Runs the command that was given.
pub(crate) fn run(cli: Cli) -> Result<Exit> {
    let global = &cli.global;
    match cli.command {
        Command::Version { client } => version::run(global, client),
        Command::Status(args) => status::run(global, &args),
        Command::Endpoint(command) => endpoint::run(global, command),
        Command::Identity(command) => identity::run(global, command),
        Command::Policy(PolicyCommand::Get { endpoint }) => policy::get(global, endpoint),
        Command::Policy(PolicyCommand::Check { files }) => check::run(global.output, &files),
        Command::Policy(PolicyCommand::Explain(args)) => explain::run(global, &args),
        Command::Observe(args) => observe::run(global, args),
        Command::Get { table, node } => table::run(global, table, node.as_deref()),
        Command::Install(args) => install::install(global, &args),
        Command::Upgrade(args) => install::upgrade(global, &args),
        Command::Uninstall(args) => install::uninstall(global, &args),
        Command::Config(command) => install::config(global, command),
        Command::Connectivity(command) => connectivity::run(global, command),
        Command::Sysdump(args) => sysdump::run(global, args),
        Command::Node(command) => node::run(command),
        Command::Lab { args } => lab::run(&args, global.output),
        Command::Bench { rounds } => lab::bench(rounds, global.output),
        Command::Demo(DemoCommand::Starwars(args)) => demo::starwars::run(global, &args),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "palisade", &mut script);
            say!("{}", String::from_utf8_lossy(&script).trim_end());
            Ok(Exit::Ok)
        }
    }
}
