//! What a policy says, whatever object it was written as.

use std::{fmt, net::IpAddr};

use ipnet::IpNet;
use palisade_abi::protocol;
use serde::{Deserialize, Serialize};

use crate::{
    l7::{HttpRule, NamePattern},
    label::{CLUSTER, Labels, SOURCE_K8S, SOURCE_RESERVED},
    selector::{Key, Requirement, Selector},
};

/// Kind of object that a policy was written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum PolicyKind {
    /// `networking.k8s.io/v1`.
    NetworkPolicy,
    /// `cilium.io/v2`, in a namespace.
    CiliumNetworkPolicy,
    /// `cilium.io/v2`, in the whole cluster.
    CiliumClusterwideNetworkPolicy,
}

impl PolicyKind {
    /// As in the object's `kind`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NetworkPolicy => "NetworkPolicy",
            Self::CiliumNetworkPolicy => "CiliumNetworkPolicy",
            Self::CiliumClusterwideNetworkPolicy => "CiliumClusterwideNetworkPolicy",
        }
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Names a policy object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PolicyRef {
    /// Kind.
    pub kind: PolicyKind,
    /// Namespace, for the kinds that have one.
    pub namespace: Option<String>,
    /// Name.
    pub name: String,
}

impl fmt::Display for PolicyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.kind)?;
        if let Some(namespace) = &self.namespace {
            write!(f, "{namespace}/")?;
        }
        f.write_str(&self.name)
    }
}

/// A policy object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Its name.
    pub id: PolicyRef,
    /// What it says.
    pub rules: Vec<Rule>,
}

/// What a policy says about some endpoints.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rule {
    /// Which endpoints.
    pub subject: Selector,
    /// Traffic to them.
    pub ingress: Section,
    /// Traffic from them.
    pub egress: Section,
}

impl Rule {
    /// What the rule says about a direction.
    #[must_use]
    pub const fn section(&self, direction: Direction) -> &Section {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }
}

/// Direction, as the subject sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Direction {
    /// To the subject.
    Ingress,
    /// From the subject.
    Egress,
}

impl Direction {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Ingress, Self::Egress];
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

/// What a rule says about one direction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Section {
    /// Whether the subject is closed for whatever no entry allows.
    pub default_deny: bool,
    /// The entries.
    pub entries: Vec<Entry>,
}

impl Section {
    /// Whether the section says nothing at all.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        !self.default_deny && self.entries.is_empty()
    }
}

/// What becomes of traffic. Deny goes before allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Action {
    /// Dropped.
    Deny,
    /// Passed on.
    Allow,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Deny => "deny",
            Self::Allow => "allow",
        })
    }
}

/// Matches if both the peer and the port do.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Entry {
    /// What becomes of matching traffic.
    pub action: Action,
    /// Which peers.
    pub peers: Peers,
    /// Which ports of the destination.
    pub ports: Ports,
    /// What it asks of the traffic inside; anything but [`Application::Any`] only if it allows.
    pub application: Application,
    /// Where the policy says so, such as `spec.ingress[0]`.
    pub path: String,
}

/// What an entry asks of the traffic inside a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Application {
    /// Nothing.
    #[default]
    Any,
    /// To be HTTP, and requests that one of the rules matches.
    Http(Vec<HttpRule>),
    /// To be DNS, and questions for names that one of the patterns matches.
    Dns(Vec<NamePattern>),
    /// To be TLS, for a server name that one of the patterns matches.
    Tls(Vec<NamePattern>),
}

impl Application {
    /// Whether only the proxy can tell what the entry allows.
    #[must_use]
    pub fn needs_proxy(&self) -> bool {
        *self != Self::Any
    }
}

impl fmt::Display for Application {
    /// As in "allows ...".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |things: Vec<String>| things.join(", ");
        match self {
            Self::Any => f.write_str("everything"),
            Self::Http(rules) => {
                write!(
                    f,
                    "HTTP requests: {}",
                    list(rules.iter().map(HttpRule::to_string).collect())
                )
            }
            Self::Dns(names) => {
                write!(f, "DNS names: {}", list(names.iter().map(NamePattern::to_string).collect()))
            }
            Self::Tls(names) => {
                write!(
                    f,
                    "TLS servers: {}",
                    list(names.iter().map(NamePattern::to_string).collect())
                )
            }
        }
    }
}

/// Peers of an entry.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Peers {
    /// Everybody, in the cluster and out of it.
    Any,
    /// Those that one of the list matches; nobody if it is empty.
    List(Vec<Peer>),
}

impl Peers {
    /// Matches no peer at all.
    pub const NOBODY: Self = Self::List(Vec::new());
}

/// One peer of an entry.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Peer {
    /// Identities with these labels.
    Selector(Selector),
    /// Addresses.
    Cidr(Cidr),
    /// A named set of identities.
    Entity(Entity),
    /// Addresses outside the cluster that DNS gave for such names to the subject, or to endpoints
    /// that the very same rules select.
    Fqdn(NamePattern),
}

/// Addresses in a network, without some networks inside it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Cidr {
    /// The network.
    pub net: IpNet,
    /// What this entry does *not* match; it denies nothing that another entry allows.
    pub except: Vec<IpNet>,
    /// Whether pods and nodes are matched too (`NetworkPolicy`), or only the world (`cilium.io`).
    pub matches_pods: bool,
}

impl Cidr {
    /// Whether the address is inside.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.net.contains(&address) && !self.except.iter().any(|net| net.contains(&address))
    }
}

/// A named set of identities.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Entity {
    /// Everybody.
    All,
    /// Outside the cluster.
    World,
    /// Outside the cluster, over IPv4.
    WorldIpv4,
    /// Outside the cluster, over IPv6.
    WorldIpv6,
    /// Every node, reserved identity and pod of the cluster with this name.
    Cluster(String),
    /// The node of the subject.
    Host,
    /// Other nodes.
    RemoteNode,
    /// Endpoints whose labels are not known yet.
    Init,
    /// Ingress proxies.
    Ingress,
    /// Pods of other plugins.
    Unmanaged,
    /// Health probes.
    Health,
    /// The API server.
    KubeApiserver,
    /// Nobody.
    None,
}

impl Entity {
    /// The selectors that together make the entity; `None` is [`Entity::All`].
    #[must_use]
    pub fn selectors(&self) -> Option<Vec<Selector>> {
        let reserved = |keys: &[&str]| -> Vec<Selector> {
            keys.iter()
                .map(|key| {
                    Selector::new(vec![Requirement::exists(Key::new(SOURCE_RESERVED, *key))])
                })
                .collect()
        };
        Some(match self {
            Self::All => return None,
            Self::World => reserved(&["world", "world-ipv4", "world-ipv6"]),
            Self::WorldIpv4 => reserved(&["world-ipv4"]),
            Self::WorldIpv6 => reserved(&["world-ipv6"]),
            Self::Cluster(name) => {
                let mut all = reserved(&[
                    "host",
                    "remote-node",
                    "init",
                    "ingress",
                    "health",
                    "unmanaged",
                    "kube-apiserver",
                ]);
                let pods = Requirement::equals(Key::new(SOURCE_K8S, CLUSTER), name);
                all.push(Selector::new(vec![pods]));
                all
            }
            Self::Host => reserved(&["host"]),
            Self::RemoteNode => reserved(&["remote-node"]),
            Self::Init => reserved(&["init"]),
            Self::Ingress => reserved(&["ingress"]),
            Self::Unmanaged => reserved(&["unmanaged"]),
            Self::Health => reserved(&["health"]),
            Self::KubeApiserver => reserved(&["kube-apiserver"]),
            Self::None => Vec::new(),
        })
    }

    /// Whether the entity contains an identity with these labels.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        self.selectors().is_none_or(|list| list.iter().any(|selector| selector.matches(labels)))
    }
}

/// Ports of an entry.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Ports {
    /// Every protocol and port, ICMP included.
    Any,
    /// Those that one of the list matches; none if it is empty.
    List(Vec<PortMatch>),
}

/// Ports of one protocol.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PortMatch {
    /// IP protocol number.
    pub protocol: u8,
    /// Which ports, or ICMP types.
    pub port: PortSpec,
}

/// Which ports of a protocol.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum PortSpec {
    /// All of them.
    All,
    /// From the first to the last, both included. An ICMP type is a range of one.
    Range(u16, u16),
    /// What the destination pod declares under this name.
    Named(String),
}

impl fmt::Display for PortMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.protocol {
            protocol::TCP => f.write_str("TCP")?,
            protocol::UDP => f.write_str("UDP")?,
            protocol::SCTP => f.write_str("SCTP")?,
            protocol::ICMP => f.write_str("ICMPv4")?,
            protocol::ICMPV6 => f.write_str("ICMPv6")?,
            other => write!(f, "protocol {other}")?,
        }
        match &self.port {
            PortSpec::All => Ok(()),
            PortSpec::Range(first, last) if first == last => write!(f, "/{first}"),
            PortSpec::Range(first, last) => write!(f, "/{first}-{last}"),
            PortSpec::Named(name) => write!(f, "/{name}"),
        }
    }
}

/// A port that a pod declares.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NamedPort {
    /// Name.
    pub name: String,
    /// IP protocol number.
    pub protocol: u8,
    /// Port.
    pub port: u16,
}
