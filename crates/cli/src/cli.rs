//! The command line.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use palisade_api::routing::Routing;

use crate::{
    commands::{
        connectivity::ConnectivityCommand,
        install::{ConfigCommand, InstallArgs, UninstallArgs},
        node::NodeCommand,
        sysdump::SysdumpArgs,
    },
    exit,
    output::Format,
};

/// Network security for Kubernetes, with eBPF.
#[derive(Debug, Parser)]
#[command(
    name = "palisade",
    version,
    arg_required_else_help = true,
    after_help = exit::HELP,
    after_long_help = concat!(
        "Examples:\n",
        "  palisade demo starwars               See a policy at work, on this machine\n",
        "  palisade lab up --nodes 3            Start a cluster on this machine\n",
        "  palisade status --wait               Wait until it is ready\n",
        "  palisade policy check policy.yaml    Find mistakes before applying\n",
        "  palisade observe --verdict dropped -f\n",
    )
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags of every command.
#[derive(Clone, Debug, Args)]
pub(crate) struct Global {
    /// What to print.
    #[arg(short, long, global = true, value_enum, default_value_t)]
    pub(crate) output: Format,
    /// An agent's admin socket; may be given more than once. By default the sockets of all lab
    /// nodes on this machine, else /run/palisade/admin.sock.
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        env = "PALISADE_SOCKET",
        value_delimiter = ','
    )]
    pub(crate) socket: Vec<PathBuf>,
    /// Kubeconfig file. By default $KUBECONFIG, else the running lab's, else ~/.kube/config.
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig.
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) context: Option<String>,
}

#[derive(Debug, Subcommand)]
#[expect(clippy::large_enum_variant, reason = "one command lives for one run")]
pub(crate) enum Command {
    /// Versions of this command, of the agents and of the API server.
    #[command(after_help = "Examples:\n  palisade version\n  palisade version --client -o json")]
    Version {
        /// Only this command's own version.
        #[arg(long)]
        client: bool,
    },
    /// How the cluster's networking is.
    #[command(
        after_help = "Examples:\n  palisade status\n  palisade status --wait --wait-duration 90s\n  palisade status -o json | jq .pods_count"
    )]
    Status(StatusArgs),
    /// The pods that the agents of this machine look after.
    #[command(
        subcommand,
        visible_alias = "ep",
        after_help = "Examples:\n  palisade endpoint list\n  palisade endpoint get default/tiefighter"
    )]
    Endpoint(EndpointCommand),
    /// The security identities: a number for each set of labels.
    #[command(
        subcommand,
        visible_alias = "id",
        after_help = "Examples:\n  palisade identity list\n  palisade identity get 2"
    )]
    Identity(IdentityCommand),
    /// Policies: what is in force, and checking files before applying them.
    #[command(
        subcommand,
        after_help = "Examples:\n  palisade policy get\n  palisade policy check policies/*.yaml"
    )]
    Policy(PolicyCommand),
    /// Flows and requests: who talks to whom, what was dropped, and by which rule.
    #[command(
        after_help = "Examples:\n  palisade observe\n  palisade observe --follow --verdict dropped\n  palisade observe --from-pod default/xwing --port 80\n  palisade observe --last 100 -o json\n  palisade observe --type request --http-status 4xx\n  palisade observe --http-method PUT --http-path '/v1/*' --follow\n  palisade observe --protocol dns --dns-name '*.example.com'"
    )]
    Observe(ObserveArgs),
    /// A table of the agents, as it is; without a name, the names.
    #[command(
        after_help = "Examples:\n  palisade get\n  palisade get pods\n  palisade get ipcache -o json"
    )]
    Get {
        /// Name of the table.
        table: Option<String>,
        /// Only this node's.
        #[arg(long, value_name = "NODE")]
        node: Option<String>,
    },
    /// Make Palisade the network of a cluster.
    #[command(
        after_help = "Examples:\n  palisade install --wait\n  palisade install --set config.ipam=cluster-pool --dry-run\n  palisade install --context kind-kind --values values.yaml"
    )]
    Install(InstallArgs),
    /// Bring an installation to this version, with the values of before and those given.
    #[command(
        after_help = "Examples:\n  palisade upgrade --wait\n  palisade upgrade --set config.log-level=debug --dry-run"
    )]
    Upgrade(InstallArgs),
    /// Take Palisade out of a cluster, nodes included.
    #[command(
        after_help = "Examples:\n  palisade uninstall\n  palisade uninstall --context kind-kind"
    )]
    Uninstall(UninstallArgs),
    /// The settings of an installation.
    #[command(
        subcommand,
        after_help = "Examples:\n  palisade config view\n  palisade config set log-level=debug"
    )]
    Config(ConfigCommand),
    /// Whether pods reach what they may, and nothing else.
    #[command(subcommand, after_help = "Example:\n  palisade connectivity test")]
    Connectivity(ConnectivityCommand),
    /// Collect what is known of a cluster's network, without secrets.
    #[command(after_help = "Example:\n  palisade sysdump")]
    Sysdump(SysdumpArgs),
    /// What Palisade's pods do on their node.
    #[command(subcommand, hide = true)]
    Node(NodeCommand),
    /// A whole cluster on this machine: up, down, status, kubeconfig, exec.
    #[command(
        disable_help_flag = true,
        after_help = "Examples:\n  palisade lab up --nodes 3\n  export KUBECONFIG=$(palisade lab kubeconfig)\n  palisade lab down"
    )]
    Lab {
        /// Passed on to palisade-lab; see `palisade lab --help`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        args: Vec<String>,
    },
    /// Demonstrations that bring their own cluster and take it down again.
    #[command(subcommand, after_help = "Example:\n  palisade demo starwars")]
    Demo(DemoCommand),
    /// Measures what Palisade costs on this machine, in a lab of its own, beside a bare veth pair
    /// and an nftables rule set of the same meaning.
    #[command(after_help = "Examples:\n  palisade bench\n  palisade bench --rounds 3 -o json")]
    Bench {
        /// Rounds of the data path's comparison; each takes about ten seconds.
        #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u16).range(1..=100))]
        rounds: u16,
    },
    /// Completion for a shell, on standard output.
    #[command(after_help = "Example:\n  source <(palisade completion bash)")]
    Completion {
        /// Which shell.
        shell: Shell,
    },
}

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// Wait until everything is ready.
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long to wait at most, such as 90s or 5m.
    #[arg(long, default_value = "5m", value_name = "DURATION", value_parser = duration)]
    pub(crate) wait_duration: Duration,
    /// Every pod of Palisade, with its containers.
    #[arg(long)]
    pub(crate) verbose: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum EndpointCommand {
    /// All of them.
    #[command(after_help = "Examples:\n  palisade endpoint list\n  palisade endpoint list -o json")]
    List,
    /// One of them, in full.
    #[command(after_help = "Example:\n  palisade endpoint get default/tiefighter")]
    Get {
        /// Number, `namespace/pod`, or address.
        endpoint: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum IdentityCommand {
    /// All of them.
    #[command(after_help = "Examples:\n  palisade identity list\n  palisade identity list -o json")]
    List,
    /// One of them.
    #[command(after_help = "Example:\n  palisade identity get 2")]
    Get {
        /// Number.
        #[arg(value_parser = identity)]
        id: u32,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Policy objects and the rules in force, per endpoint.
    #[command(
        after_help = "Examples:\n  palisade policy get\n  palisade policy get default/deathstar-6c8bdf9c4-x2x5q"
    )]
    Get {
        /// Only the rules of this endpoint: number, `namespace/pod`, or address.
        endpoint: Option<String>,
    },
    /// Finds mistakes in policy files, without a cluster.
    #[command(
        after_help = "Examples:\n  palisade policy check policies/*.yaml\n  kubectl get cnp,ccnp,netpol -A -o yaml | palisade policy check -"
    )]
    Check {
        /// YAML or JSON files with any number of documents; `-` is standard input.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Would this pass, and why? Exits with 0 if it would and 1 if not.
    #[command(
        after_help = "Examples:\n  palisade policy explain --from tiefighter --to deathstar --port 80 --http 'PUT /v1/exhaust-port'\n  palisade policy explain --from web --to svc/shop/cart --port 80\n  palisade policy explain --from web --to api --port 80 --http 'GET /v1' --header 'X-Role: admin'\n  palisade policy explain --from web --to 192.0.2.1 --port 443 -f pods.yaml -f policies.yaml"
    )]
    Explain(ExplainArgs),
}

#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// The sender: `namespace/pod`, a prefix of it, a pod of the namespace `default`, or an
    /// address.
    #[arg(long, value_name = "POD")]
    pub(crate) from: String,
    /// The receiver, likewise; or a Service: `svc/name`, `namespace/name`, or its address. Its
    /// backends are judged then.
    #[arg(long, value_name = "POD")]
    pub(crate) to: String,
    /// The receiver's port, that of the Service where it is one; or the ICMP type.
    #[arg(long, value_name = "PORT")]
    pub(crate) port: u16,
    /// tcp unless said otherwise, udp with --dns.
    #[arg(long, value_parser = ["tcp", "udp", "sctp", "icmp", "icmpv6"], ignore_case = true)]
    pub(crate) protocol: Option<String>,
    /// A request inside the connection: method and path, or method and http:// URL, read as the
    /// proxy reads it.
    #[arg(long, value_name = "REQUEST", group = "inside")]
    pub(crate) http: Option<String>,
    /// A header of the request, `Name: value`; may be repeated. `-`: those on standard input, one a
    /// line, up to an empty line; secrets are not seen in lists of processes then.
    #[arg(long, value_name = "HEADER", requires = "http")]
    pub(crate) header: Vec<String>,
    /// A question for a DNS name.
    #[arg(long, value_name = "NAME", group = "inside")]
    pub(crate) dns: Option<String>,
    /// TLS for a server name.
    #[arg(long, value_name = "NAME", group = "inside")]
    pub(crate) server_name: Option<String>,
    /// Pods (or what makes them), namespaces, Services, policies and the Secrets of the namespace
    /// `palisade-secrets` from files instead of the cluster; `-` is standard input.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ObserveArgs {
    /// So many of the newest flows (20 by default; none with --follow).
    #[arg(long, value_name = "N")]
    pub(crate) last: Option<usize>,
    /// Go on with new flows.
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Either end: `namespace/pod`, a prefix of it, or a pod of the namespace `default`.
    #[arg(long, value_name = "POD", value_parser = pod)]
    pub(crate) pod: Vec<String>,
    /// The sender.
    #[arg(long, value_name = "POD", value_parser = pod)]
    pub(crate) from_pod: Vec<String>,
    /// The receiver.
    #[arg(long, value_name = "POD", value_parser = pod)]
    pub(crate) to_pod: Vec<String>,
    /// Either end is in this namespace.
    #[arg(short, long, value_name = "NAMESPACE")]
    pub(crate) namespace: Vec<String>,
    /// Either end has this address.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) ip: Vec<std::net::IpAddr>,
    /// Either end has this identity.
    #[arg(long, value_name = "NUMBER")]
    pub(crate) identity: Vec<u32>,
    /// Either end has this label.
    #[arg(short, long, value_name = "LABEL")]
    pub(crate) label: Vec<String>,
    /// The receiver's port.
    #[arg(long, value_name = "PORT")]
    pub(crate) port: Vec<u16>,
    /// Protocol of the connection, or of what is asked for inside.
    #[arg(
        long,
        value_parser = ["tcp", "udp", "sctp", "icmp", "icmpv6", "http", "dns", "tls"],
        ignore_case = true
    )]
    pub(crate) protocol: Vec<String>,
    /// Whether it went on; redirected: to the proxy, which tells of each request.
    #[arg(long, value_parser = ["forwarded", "dropped", "redirected"], ignore_case = true)]
    pub(crate) verdict: Vec<String>,
    /// What happened; request: something was asked for inside a connection, and answered.
    #[arg(
        short = 't',
        long = "type",
        visible_alias = "kind",
        value_parser = ["open", "close", "drop", "request"]
    )]
    pub(crate) kind: Vec<String>,
    /// A request of HTTP with this method.
    #[arg(long, value_name = "METHOD")]
    pub(crate) http_method: Vec<String>,
    /// A request of HTTP for this path, without the query; `*` stands for any text.
    #[arg(long, value_name = "PATH")]
    pub(crate) http_path: Vec<String>,
    /// A request of HTTP with this status; `x` stands for any digit, as in 5xx.
    #[arg(long, value_name = "STATUS", value_parser = http_status)]
    pub(crate) http_status: Vec<String>,
    /// A question of DNS for this name; `*` stands for any text.
    #[arg(long, value_name = "NAME")]
    pub(crate) dns_name: Vec<String>,
    /// TLS for this server name; `*` stands for any text.
    #[arg(long, value_name = "NAME")]
    pub(crate) server_name: Vec<String>,
    /// Only what this node saw.
    #[arg(long, value_name = "NODE")]
    pub(crate) node: Option<String>,
}

/// A status, or a class of them.
fn pod(text: &str) -> Result<String, String> {
    let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
    match namespace.is_empty() || name.contains('/') {
        true => {
            Err("a pod is named as namespace/pod, or as pod in the namespace default".to_owned())
        }
        false => Ok(text.to_owned()),
    }
}

fn http_status(text: &str) -> Result<String, String> {
    let is_place = |byte: u8| byte.is_ascii_digit() || byte.eq_ignore_ascii_case(&b'x');
    match text.len() == 3 && text.bytes().all(is_place) {
        true => Ok(text.to_owned()),
        false => Err("write three digits, such as 403, or 5xx for all of a class".to_owned()),
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum DemoCommand {
    /// The Star Wars walk-through: land on the death star, then see who may not.
    #[command(
        after_help = "Examples:\n  palisade demo starwars\n  palisade demo starwars --nodes 3 --keep\n  palisade demo starwars --in-cluster --kubeconfig FILE"
    )]
    Starwars(StarwarsArgs),
}

#[derive(Debug, Args)]
pub(crate) struct StarwarsArgs {
    /// Nodes of the cluster.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) nodes: u16,
    /// How pods of different nodes reach each other: native or overlay.
    #[arg(long, default_value_t)]
    pub(crate) routing: Routing,
    /// Leave the cluster and the applications as they are at the end.
    #[arg(long)]
    pub(crate) keep: bool,
    /// Run in the lab that is up, and leave it up.
    #[arg(long)]
    pub(crate) use_running: bool,
    /// Run in the cluster that the kubeconfig leads to, in the namespace palisade-starwars, which
    /// must not be there yet and goes at the end.
    #[arg(long, conflicts_with_all = ["use_running", "nodes", "routing"])]
    pub(crate) in_cluster: bool,
}

/// `5m` or `90s`; a mere number is of seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    if let Ok(seconds) = text.parse() {
        return Ok(Duration::from_secs(seconds));
    }
    let span = text.parse::<jiff::SignedDuration>().ok();
    let span = span.and_then(|span| Duration::try_from(span).ok());
    span.ok_or_else(|| "write a duration such as 90s or 5m".to_owned())
}

/// RFC 1123, a label: what a namespace can be called.
pub(crate) fn namespace(text: &str) -> Result<String, String> {
    let known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let ends = text.starts_with('-') || text.ends_with('-');
    match (1..=63).contains(&text.len()) && text.bytes().all(known) && !ends {
        true => Ok(text.to_owned()),
        false => Err("a namespace has up to 63 of a-z, 0-9 and -, and no - at its ends".to_owned()),
    }
}

fn identity(text: &str) -> Result<u32, String> {
    let hint = "an identity is a number; palisade identity list shows them";
    text.parse().map_err(|_| hint.to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations_have_units_or_are_seconds() {
        for (text, seconds) in [("5s", 5), ("5m", 300), ("1m30s", 90), ("30", 30)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for wrong in ["", "5 apples", "-5s", "m"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn lab_passes_everything_on() {
        let cli =
            Cli::parse_from(["palisade", "lab", "up", "--nodes", "3", "-o", "json", "--help"]);
        let Command::Lab { args } = cli.command else { panic!("{:?}", cli.command) };
        assert_eq!(args, ["up", "--nodes", "3", "-o", "json", "--help"]);
    }

    fn without_examples(command: &clap::Command, path: &str, found: &mut Vec<String>) {
        // What only pods call needs none.
        if command.is_hide_set() {
            return;
        }
        let path = format!("{path} {}", command.get_name());
        let help = [command.get_after_help(), command.get_after_long_help()];
        if !help.into_iter().flatten().any(|text| text.to_string().contains("Example")) {
            found.push(path.clone());
        }
        for inner in command.get_subcommands() {
            without_examples(inner, &path, found);
        }
    }

    #[test]
    fn every_command_shows_how_it_is_used() {
        let mut found = Vec::new();
        without_examples(&Cli::command(), "", &mut found);
        assert!(found.is_empty(), "no examples: {found:?}");
    }
}
