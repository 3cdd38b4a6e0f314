//! What the CLI asks an agent on `RUN_DIR/admin.sock`.
//!
//! One JSON value per line each way. Every request gets one [`Response`]; [`Request::Observe`]
//! gets a line per flow until the last one asked for, or, when following, until either side
//! closes. A connection may carry several requests, one after the other.

use std::{
    collections::BTreeMap,
    io::{self, BufRead, BufReader, Write},
    net::IpAddr,
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::flow::Flow;

/// Name of the socket in the agent's run directory.
pub const SOCKET: &str = "admin.sock";

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
#[expect(clippy::large_enum_variant, reason = "one request lives for one question")]
pub enum Request {
    /// How the agent is: [`Response::Status`].
    Status,
    /// The node's endpoints: [`Response::Endpoints`].
    EndpointList,
    /// One endpoint: [`Response::Endpoint`].
    EndpointGet {
        /// Number, `namespace/pod`, or address.
        endpoint: String,
    },
    /// Every identity that the agent knows: [`Response::Identities`].
    IdentityList,
    /// One identity: [`Response::Identity`].
    IdentityGet {
        /// Number.
        id: u32,
    },
    /// Policies and the rules in force: [`Response::Policy`].
    PolicyGet {
        /// Only the rules of this endpoint (number, `namespace/pod`, or address).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        endpoint: Option<String>,
    },
    /// Whether something would pass, and why: [`Response::Explanation`].
    Explain(Explain),
    /// Flows: a line of [`Response::Flow`] each.
    Observe(Observe),
    /// The names of all tables: [`Response::Tables`].
    TableList,
    /// The rows of a table: [`Response::Table`].
    TableGet {
        /// One of the names that [`Request::TableList`] answers.
        table: String,
    },
    /// Prometheus text: [`Response::Metrics`].
    Metrics,
}

/// Would this pass?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explain {
    /// The sender: `namespace/pod`, the beginning of that, or an address.
    pub from: String,
    /// The receiver, likewise; or a Service: `svc/name`, `svc/namespace/name`, `namespace/name`, or
    /// an address of it.
    pub to: String,
    /// IP protocol number.
    pub protocol: u8,
    /// The receiver's port, that of the Service where it is one; or the ICMP type.
    pub port: u16,
    /// What is asked for inside the connection; without it only the connection is judged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inside: Option<Inside>,
}

/// What is asked for inside a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Inside {
    /// A request of HTTP.
    Http {
        /// Method.
        method: String,
        /// Path and query, as a client writes them in the first line.
        target: String,
        /// Host of a URL, empty where there is none.
        host: String,
        /// Header fields as a client sends them: names in lower case, values without blanks around
        /// them.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        headers: Vec<(String, String)>,
    },
    /// A question of DNS for a name.
    Dns(String),
    /// TLS for a server name.
    Tls(String),
}

/// Whether something would pass, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// The sender that was meant.
    pub from: String,
    /// The receiver that was meant.
    pub to: String,
    /// Both ends agree to it.
    pub allowed: bool,
    /// The request inside as the proxy reads, judges and forwards it, where that is not how it was
    /// written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_as: Option<String>,
    /// What the policies of each end say; an end that is no pod has none.
    pub ends: Vec<ExplainedEnd>,
    /// The receiver is a Service. What is allowed is allowed to each of its backends; what the
    /// policies say is told with these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Translated>,
}

/// A Service, and who is judged in its place: policies do not know Services.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Translated {
    /// `namespace/name`.
    pub name: String,
    /// What clients connect to, as in `10.96.0.10:80/TCP`.
    pub frontend: String,
    /// An answer for each backend, at its own port; none: connections are refused.
    pub backends: Vec<Explanation>,
}

/// What the policies of one end say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExplainedEnd {
    /// `egress` of the sender, or `ingress` of the receiver.
    pub direction: String,
    /// They agree to it.
    pub allowed: bool,
    /// The proxy sees the connection.
    pub proxied: bool,
    /// The verdict and its ground, in words.
    pub verdict: String,
    /// Rules that match, in the order of their precedence; the first one decides.
    pub rules: Vec<RuleState>,
    /// Where no rule allows it: what the nearest one allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nearest: Option<String>,
}

/// Which flows to tell.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Observe {
    /// Past flows to begin with, the newest ones. With `follow` none unless asked for; without,
    /// all that are kept unless a number is given.
    pub last: Option<usize>,
    /// Go on with new flows.
    pub follow: bool,
    /// What a flow must match; the fields of the filter are AND-ed, the values of one OR-ed.
    pub filter: FlowFilter,
}

/// An empty field matches every flow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FlowFilter {
    /// Either end is one of these pods: `namespace/` or `namespace/prefix-of-name`.
    pub pod: Vec<String>,
    /// The sender is.
    pub from_pod: Vec<String>,
    /// The receiver is.
    pub to_pod: Vec<String>,
    /// Either end has one of these addresses.
    pub ip: Vec<IpAddr>,
    /// Either end has one of these identities.
    pub identity: Vec<u32>,
    /// Either end has one of these labels, as in `k8s:app=web` or `app=web` (any source).
    pub label: Vec<String>,
    /// The receiver's port is one of these.
    pub port: Vec<u16>,
    /// The protocol's name, or that of the one inside (`http`, `dns`, `tls`), is one of these, in
    /// any case.
    pub protocol: Vec<String>,
    /// The verdict is one of these: `forwarded`, `dropped`, `redirected`.
    pub verdict: Vec<String>,
    /// The kind is one of these: `open`, `close`, `drop`, `request`.
    pub kind: Vec<String>,
    /// A request of HTTP with one of these methods, in any case.
    pub http_method: Vec<String>,
    /// A request of HTTP for one of these paths, without the query; `*` stands for any text.
    pub http_path: Vec<String>,
    /// A request of HTTP with one of these statuses; `x` stands for any digit, as in `5xx`.
    pub http_status: Vec<String>,
    /// A question of DNS for one of these names, in any case; `*` stands for any text.
    pub dns_name: Vec<String>,
    /// TLS for one of these server names, in any case; `*` stands for any text.
    pub server_name: Vec<String>,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "response", content = "body", rename_all = "kebab-case")]
pub enum Response {
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// To [`Request::EndpointList`].
    Endpoints(Vec<Endpoint>),
    /// To [`Request::EndpointGet`].
    Endpoint(Box<Endpoint>),
    /// To [`Request::IdentityList`].
    Identities(Vec<Identity>),
    /// To [`Request::IdentityGet`].
    Identity(Identity),
    /// To [`Request::PolicyGet`].
    Policy(Box<PolicyReport>),
    /// To [`Request::Explain`].
    Explanation(Box<Explanation>),
    /// To [`Request::Observe`], one per flow.
    Flow(Box<Flow>),
    /// To [`Request::Observe`]: so many flows were lost here because the reader was slow.
    Lost(u64),
    /// To [`Request::Observe`] without `follow`: the last flow was told.
    End,
    /// To [`Request::TableList`].
    Tables(Vec<String>),
    /// To [`Request::TableGet`].
    Table(Table),
    /// To [`Request::Metrics`].
    Metrics(String),
    /// Only the agent of another node can answer.
    Elsewhere {
        /// The node.
        node: String,
        /// What is known there only.
        why: String,
    },
    /// The question cannot be answered: what is wrong and what to ask instead.
    Error(String),
}

/// How the agent is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The agent's version.
    pub version: String,
    /// Its node.
    pub node: String,
    /// The cluster's name.
    pub cluster: String,
    /// All inputs are complete, the kernel's tables hold them, and the CNI socket answers.
    pub ready: bool,
    /// Milliseconds from the start of the process until it was ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_after_ms: Option<u64>,
    /// Seconds since the start of the process.
    pub uptime_seconds: u64,
    /// Process number.
    pub pid: u32,
    /// Inputs: complete or not, and the newest error of each.
    pub inputs: Vec<Input>,
    /// Revision of the policy that is in force.
    pub policy_revision: u64,
    /// What the kernel's tables still lack, and why; empty when all is in force.
    pub problems: Vec<String>,
    /// Local endpoints.
    pub endpoints: usize,
    /// Local endpoints that are not ready.
    pub endpoints_not_ready: usize,
    /// Pods of the local endpoints, as `namespace/name`. None where that is not known: not yet, or
    /// by an agent of a version that does not tell.
    #[serde(default)]
    pub pods: Option<BTreeMap<String, EndpointObject>>,
    /// Known identities.
    pub identities: usize,
    /// Known policies, those refused included.
    pub policies: usize,
    /// Policies that were refused. Their subjects are locked down, but for what the last good
    /// version allows where that is in force.
    pub policies_refused: usize,
    /// Refused policies whose last good version is in force.
    #[serde(default)]
    pub policies_last_good: usize,
    /// Programmed Service addresses.
    pub services: usize,
    /// This node's addresses, the router's included.
    pub addresses: Vec<IpAddr>,
    /// This node's pod networks.
    pub pod_cidrs: Vec<String>,
    /// Pod addresses in use and available, as in `3/254`, per family.
    pub ipam: Vec<String>,
    /// Nodes of the cluster that routes lead to.
    pub remote_nodes: usize,
    /// The node's L7 proxy is connected to the agent.
    #[serde(default)]
    pub l7_proxy: bool,
}

/// The `CiliumEndpoint` of a pod. It says nothing of the endpoint itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndpointObject {
    /// It says what is so.
    Current,
    /// It is not there or not up to date, and why.
    Unwritten(String),
}

/// A kind of object that the agent follows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// Kind.
    pub kind: String,
    /// The whole list was read at least once.
    pub complete: bool,
    /// Objects.
    pub objects: usize,
    /// The newest error, where the newest attempt failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Number.
    pub id: u32,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// Container id, as the runtime gave it.
    pub container_id: String,
    /// `ready`, `waiting-for-identity`, `not-ready`.
    pub state: String,
    /// Security identity; 5 (init) until the labels are known.
    pub identity: u32,
    /// Labels of the identity.
    pub labels: Vec<String>,
    /// IPv4 address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<IpAddr>,
    /// IPv6 address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<IpAddr>,
    /// Host-side interface.
    pub interface: String,
    /// Row in the kernel's table.
    pub row: u32,
    /// A policy selects it for traffic into it.
    pub ingress_enforced: bool,
    /// A policy selects it for traffic out of it.
    pub egress_enforced: bool,
    /// Revision of the policy that is in force for it.
    pub policy_revision: u64,
}

/// A security identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Number.
    pub id: u32,
    /// Labels, sorted.
    pub labels: Vec<String>,
}

/// Policies and what they mean here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyReport {
    /// Revision in force.
    pub revision: u64,
    /// Every policy object.
    pub policies: Vec<PolicyState>,
    /// Rules in force per endpoint.
    pub endpoints: Vec<EndpointPolicy>,
}

/// A policy object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyState {
    /// `Kind namespace/name`.
    pub policy: String,
    /// Accepted; else its subject is locked down in the directions that it names.
    pub valid: bool,
    /// Why it was refused: field, what is wrong, what to write instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// An earlier, accepted version is still in force beside the lockdown.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub last_good_in_force: bool,
    /// It speaks of what is inside connections, and this node's L7 proxy does not have it yet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub awaits_proxy: bool,
    /// Number of rules.
    pub rules: usize,
}

/// The rules in force for one endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointPolicy {
    /// Endpoint number.
    pub endpoint: u32,
    /// `namespace/pod`.
    pub pod: String,
    /// Security identity.
    pub identity: u32,
    /// Traffic into it.
    pub ingress: DirectionPolicy,
    /// Traffic out of it.
    pub egress: DirectionPolicy,
}

/// One direction of an endpoint's policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectionPolicy {
    /// A policy selects the endpoint in this direction; else everything is allowed.
    pub enforced: bool,
    /// Table number in the kernel.
    pub table: u32,
    /// Policies that make this direction default-deny.
    pub default_deny_by: Vec<String>,
    /// Rules in the order of their precedence.
    pub rules: Vec<RuleState>,
}

/// A rule in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleState {
    /// `allow` or `deny`.
    pub action: String,
    /// `Kind namespace/name` of the policy, or the built-in rule's name.
    pub policy: String,
    /// Field of the object.
    pub path: String,
}

/// Any table, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Name.
    pub name: String,
    /// Revision: goes up with each change.
    pub revision: u64,
    /// All that belongs in it is in it.
    pub complete: bool,
    /// Titles.
    pub columns: Vec<String>,
    /// Rows in the order of their keys.
    pub rows: Vec<Vec<String>>,
}

/// A blocking client.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the socket at `path`.
    pub fn connect(path: &Path) -> io::Result<Self> {
        UnixStream::connect(path).map(|stream| Self { stream: BufReader::new(stream) })
    }

    /// Bounds how long [`Self::next`] waits for a line.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.get_ref().set_read_timeout(timeout)
    }

    /// Asks and returns the first answer.
    pub fn request(&mut self, request: &Request) -> io::Result<Response> {
        self.send(request)?;
        self.next()?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    /// Asks; the answers come from [`Self::next`].
    pub fn send(&mut self, request: &Request) -> io::Result<()> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line)
    }

    /// The next answer; none when the agent closed the connection.
    #[expect(clippy::should_implement_trait, reason = "it fails, and the caller may go on")]
    pub fn next(&mut self) -> io::Result<Option<Response>> {
        let mut line = String::new();
        match self.stream.read_line(&mut line)? {
            0 => Ok(None),
            _ => Ok(Some(serde_json::from_str(&line)?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_one_line_of_json_with_its_name() {
        let request = Request::Observe(Observe { follow: true, ..Observe::default() });
        let line = serde_json::to_string(&request).unwrap();
        assert!(line.starts_with(r#"{"request":"observe","#), "{line}");
        assert_eq!(serde_json::from_str::<Request>(&line).unwrap(), request);
    }

    #[test]
    fn fields_that_a_caller_leaves_out_have_their_defaults() {
        let request: Request =
            serde_json::from_str(r#"{"request":"observe","filter":{"port":[80]}}"#).unwrap();
        let Request::Observe(observe) = request else { panic!("{request:?}") };
        assert_eq!(observe.filter.port, [80]);
        assert!(!observe.follow);
    }
}
