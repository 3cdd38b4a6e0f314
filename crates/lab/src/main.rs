//! `palisade-lab`: a whole cluster on one machine.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use clap::{Parser, Subcommand, ValueEnum};
use palisade_lab::daemon::{self, Options};
use palisade_lab::layout::{Layout, MAX_NODES, NodePlan};
use palisade_lab::sys::{cgroup, netns};
use palisade_lab::{bench, builtin, container};

/// A whole Kubernetes cluster on this machine, with Palisade as its network.
#[derive(Debug, Parser)]
#[command(
    name = "palisade lab",
    version,
    after_help = "Examples:
  palisade lab up --nodes 3
  export KUBECONFIG=$(palisade lab kubeconfig)
  kubectl get nodes
  palisade lab exec node1 -- ip route
  palisade lab down"
)]
struct Cli {
    /// What to print
    #[arg(short, long, value_enum, global = true, default_value = "table")]
    output: Format,
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Start the lab and wait until it can be used
    #[command(
        after_help = "Examples:\n  palisade lab up\n  palisade lab up --nodes 3\n  palisade lab up --data ./cluster    Go on tomorrow where you end today"
    )]
    Up {
        #[command(flatten)]
        options: Options,
        /// Stay in the foreground; Ctrl-C takes the lab down
        #[arg(long)]
        foreground: bool,
    },
    /// End the lab and remove everything of it, leftovers of a crashed one too
    Down,
    /// Show how the lab is
    #[command(after_help = "Examples:\n  palisade lab status\n  palisade lab status -o json")]
    Status,
    /// Print the path of the kubeconfig
    #[command(after_help = "Example:\n  export KUBECONFIG=$(palisade lab kubeconfig)")]
    Kubeconfig,
    /// Measure the data path and the control path in a lab of its own
    Bench {
        #[command(flatten)]
        options: bench::Options,
    },
    /// Run a command in a node's network namespace
    #[command(
        after_help = "Examples:\n  palisade lab exec node1 -- ip route\n  palisade lab exec node2 -- curl -s 10.244.1.7"
    )]
    Exec {
        /// The node, for example node1
        node: String,
        /// The command
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    #[command(hide = true)]
    Daemon {
        #[command(flatten)]
        options: Options,
    },
    #[command(hide = true)]
    NetnsExec {
        #[arg(long)]
        cgroup: Option<PathBuf>,
        netns: PathBuf,
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    #[command(hide = true)]
    ContainerInit { spec: PathBuf },
    #[command(hide = true)]
    ContainerMain { spec: PathBuf },
    #[command(hide = true)]
    ContainerExec { spec: PathBuf },
    #[command(hide = true)]
    ContainerRun {
        #[arg(long, value_parser = container::Privileges::parse)]
        privileges: container::Privileges,
        #[arg(long)]
        tty: bool,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    #[command(hide = true)]
    Builtin {
        name: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

fn main() -> ExitCode {
    let outcome = as_tool().unwrap_or_else(|| perform(Cli::parse()));
    outcome.unwrap_or_else(|error| {
        eprintln!("Error: {error:#}");
        ExitCode::FAILURE
    })
}

/// Inside containers this program goes by the names of the tools it stands for.
fn as_tool() -> Option<anyhow::Result<ExitCode>> {
    let mut arguments = std::env::args();
    let program = arguments.next()?;
    let name = Path::new(&program).file_name()?.to_str()?;
    let known = builtin::TOOLS.contains(&name) || builtin::ROOT_PROGRAMS.contains(&name);
    known.then(|| builtin::run(name, &arguments.collect::<Vec<_>>()))?
}

fn perform(cli: Cli) -> anyhow::Result<ExitCode> {
    let json = matches!(cli.output, Format::Json);
    match cli.command {
        Task::Up { options, foreground } => daemon::up(&options, foreground, json),
        Task::Down => daemon::down(json),
        Task::Status => daemon::status(json),
        Task::Kubeconfig => kubeconfig(json),
        Task::Bench { options } => bench::run(options, json),
        Task::Exec { node, command } => exec(&node, &command),
        Task::Daemon { options } => daemon::serve(&options),
        Task::NetnsExec { cgroup, netns, command } => {
            netns_exec(cgroup.as_deref(), &netns, &command)
        }
        Task::ContainerInit { spec } => container::init(&spec),
        Task::ContainerMain { spec } => container::main(&spec),
        Task::ContainerExec { spec } => container::exec(&spec),
        Task::ContainerRun { privileges, tty, command } => {
            container::run(&privileges, tty, &command)
        }
        Task::Builtin { name, arguments } => builtin::run(&name, &arguments)
            .with_context(|| format!("there is no built-in program {name:?}"))?,
    }
}

fn kubeconfig(json: bool) -> anyhow::Result<ExitCode> {
    let layout = Layout::default();
    if daemon::running(&layout)?.is_none() {
        eprintln!("No lab is running. Start one with: palisade lab up");
        return Ok(daemon::NOT_RUNNING.into());
    }
    let path = layout.kubeconfig();
    if json {
        println!("{}", serde_json::json!({ "kubeconfig": path }));
    } else {
        println!("{}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

fn exec(node: &str, command: &[OsString]) -> anyhow::Result<ExitCode> {
    let plan = NodePlan::all(MAX_NODES).into_iter().find(|plan| plan.name == node);
    let Some(plan) = plan.filter(|plan| plan.netns_path().exists()) else {
        bail!("there is no node {node:?} in a running lab; `palisade lab status` lists them");
    };
    netns_exec(None, &plan.netns_path(), command)
}

/// Becomes the command, inside the network namespace.
fn netns_exec(
    group: Option<&Path>,
    netns: &Path,
    command: &[OsString],
) -> anyhow::Result<ExitCode> {
    if let Some(group) = group {
        cgroup::join(group).with_context(|| format!("cannot join {}", group.display()))?;
    }
    netns::enter(netns).with_context(|| format!("cannot enter {}", netns.display()))?;
    let Some((program, arguments)) = command.split_first() else { bail!("no command given") };
    Err(Command::new(program).args(arguments).exec())
        .with_context(|| format!("cannot run {}", program.display()))
}
