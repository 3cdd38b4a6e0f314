//! The ways that are compared: between two pods, and between two plain network namespaces.

use std::{
    io::Write,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::{Value, json};

use crate::sys::netns;

/// A client, a server, and how the one calls the other.
#[derive(Clone, Debug)]
pub(super) struct Path {
    pub(super) client: PathBuf,
    pub(super) server: PathBuf,
    pub(super) address: IpAddr,
}

/// Ports that the policies of the bench allow.
#[derive(Clone, Copy, Debug)]
pub(super) enum Port {
    Tcp,
    Udp,
}

impl Port {
    pub(super) const ALL: [Self; 2] = [Self::Tcp, Self::Udp];
    /// One number for both protocols; see also [`RULES`].
    pub(super) const NUMBER: u16 = 7777;

    pub(super) fn in_policy(self) -> Value {
        let protocol = match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        };
        json!({"protocol": protocol, "port": Self::NUMBER})
    }
}

impl Path {
    /// Whether a port that no policy of the bench names is out of reach.
    pub(super) fn refuses_others(&self) -> Result<bool> {
        let other = Port::NUMBER + 1;
        let _listener =
            netns::run_in(&self.server, move || TcpListener::bind((Ipv4Addr::UNSPECIFIED, other)))?;
        let to = SocketAddr::new(self.address, other);
        let reached = netns::run_in(&self.client, move || {
            Ok(TcpStream::connect_timeout(&to, Duration::from_millis(200)).is_ok())
        })?;
        Ok(!reached)
    }
}

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Variant {
    /// Two pods, each with a policy.
    Palisade,
    /// One veth pair, nothing in between: the limit.
    Veth,
    /// Two veth pairs and a router.
    Routed,
    /// As [`Self::Routed`], with connection tracking and a verdict map of the same meaning as the
    /// pods' policies.
    Nftables,
}

/// Network namespaces that go with this value.
pub(super) struct Baselines {
    namespaces: Vec<String>,
    firewall: bool,
}

const PREFIX: &str = "palisade-bench-";
/// The bare pair, and two clients and servers with a router in between.
const NAMESPACES: [&str; 8] = [
    "veth-client",
    "veth-server",
    "routed-client",
    "routed-router",
    "routed-server",
    "nft-client",
    "nft-router",
    "nft-server",
];
/// The same in each set: namespaces keep them apart.
const CLIENT: &str = "192.0.2.2";
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
const RULES: &str = "
table inet bench {
  map allowed {
    type ipv4_addr . ipv4_addr . inet_proto . inet_service : verdict
    elements = { 192.0.2.2 . 198.51.100.2 . tcp . 7777 : accept,
                 192.0.2.2 . 198.51.100.2 . udp . 7777 : accept }
  }
  chain forward {
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    ip saddr . ip daddr . meta l4proto . th dport vmap @allowed
  }
}
";

impl Baselines {
    pub(super) fn build() -> Result<Self> {
        let mut built = Self { namespaces: Vec::new(), firewall: true };
        for name in NAMESPACES {
            let name = format!("{PREFIX}{name}");
            // One that an earlier run could not take along.
            netns::remove(&name)?;
            netns::create(&name).with_context(|| format!("network namespace {name}"))?;
            built.namespaces.push(name);
        }
        connect("veth-client", CLIENT, "veth-server", &SERVER.to_string())?;
        route("veth-client", "198.51.100.0/24", "dev", "veth-server")?;
        route("veth-server", "192.0.2.0/24", "dev", "veth-client")?;
        for set in ["routed", "nft"] {
            let [client, router, server] =
                ["client", "router", "server"].map(|role| format!("{set}-{role}"));
            connect(&client, CLIENT, &router, "192.0.2.1")?;
            connect(&router, "198.51.100.1", &server, &SERVER.to_string())?;
            route(&client, "default", "via", "192.0.2.1")?;
            route(&server, "default", "via", "198.51.100.1")?;
            netns::run_in(&place(&router), || {
                std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")
            })?;
        }
        if let Err(error) = load_rules("nft-router") {
            eprintln!("bench: no comparison with nftables: {error:#}");
            built.firewall = false;
        }
        Ok(built)
    }

    /// All ways, the pods' first.
    pub(super) fn paths(&self, pods: Path) -> Vec<(Variant, Path)> {
        let between = |set: &str| Path {
            client: place(&format!("{set}-client")),
            server: place(&format!("{set}-server")),
            address: SERVER.into(),
        };
        let mut paths = vec![
            (Variant::Palisade, pods),
            (Variant::Veth, between("veth")),
            (Variant::Routed, between("routed")),
        ];
        if self.firewall {
            paths.push((Variant::Nftables, between("nft")));
        }
        paths
    }
}

impl Drop for Baselines {
    fn drop(&mut self) {
        for name in &self.namespaces {
            if let Err(error) = netns::remove(name) {
                eprintln!("bench: network namespace {name}: {error}");
            }
        }
    }
}

fn place(name: &str) -> PathBuf {
    netns::path(&format!("{PREFIX}{name}"))
}

/// A veth pair; each end has the name of where it leads.
fn connect(left: &str, left_address: &str, right: &str, right_address: &str) -> Result<()> {
    let (here, there) = (format!("{PREFIX}{left}"), format!("{PREFIX}{right}"));
    let pair = ["link", "add", right, "netns", &here, "type", "veth", "peer", "name", left];
    ip(&[&pair[..], &["netns", &there]].concat())?;
    for (netns, device, address) in [(&here, right, left_address), (&there, left, right_address)] {
        ip(&["-n", netns, "address", "add", &format!("{address}/24"), "dev", device])?;
        ip(&["-n", netns, "link", "set", device, "up"])?;
    }
    Ok(())
}

fn route(from: &str, to: &str, how: &str, next: &str) -> Result<()> {
    ip(&["-n", &format!("{PREFIX}{from}"), "route", "add", to, how, next])
}

fn ip(args: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(args).output().context("ip (package iproute2)")?;
    if output.status.success() {
        return Ok(());
    }
    bail!("ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim())
}

fn load_rules(router: &str) -> Result<()> {
    let mut nft = Command::new("ip")
        .args(["netns", "exec", &format!("{PREFIX}{router}"), "nft", "-f", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    nft.stdin.take().context("no pipe to nft")?.write_all(RULES.as_bytes())?;
    let output = nft.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    bail!("nft: {}", String::from_utf8_lossy(&output.stderr).trim())
}
