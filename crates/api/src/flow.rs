//! Flow records: what the observer tells of a connection that was opened, ended or refused.

use std::{borrow::Cow, fmt::Write, net::IpAddr, sync::Arc};

use jiff::Timestamp;
use serde::{Deserialize, Serialize, Serializer};

/// One record, always in the direction of the packet that caused it. Names are shared by the records
/// that bear them: there is one for each end of each connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// When the packet was judged: RFC 3339, UTC, with nanoseconds.
    #[serde(serialize_with = "with_nanoseconds")]
    pub time: Timestamp,
    /// Node that judged it.
    pub node: Arc<str>,
    /// What happened.
    pub kind: FlowKind,
    /// Whether the packet went on.
    pub verdict: Verdict,
    /// Why it was dropped, in the words of `palisade_abi::DropReason`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drop_reason: Option<Cow<'static, str>>,
    /// Where it was judged: where it left a pod, or where it entered one.
    pub direction: Direction,
    /// The packet went from the server to the client.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reply: bool,
    /// The flow had been allowed before and was judged again after a change.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rejudged: bool,
    /// Protocol name (`TCP`, `ICMPv6`), or its number where it has no name here.
    pub protocol: Cow<'static, str>,
    /// TCP flags of the packet, as in `SYN,ACK`; empty for other protocols.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub tcp_flags: String,
    /// Sender.
    pub source: FlowEnd,
    /// Receiver.
    pub destination: FlowEnd,
    /// What the sender's egress policy said; none where it was not asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Arc<Judgement>>,
    /// What the receiver's ingress policy said; none where it was not asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<Arc<Judgement>>,
    /// Final counters of a flow that ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counters: Option<Counters>,
    /// What was asked inside the connection, and answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub l7: Option<L7>,
}

/// Errors: the serializer's.
fn with_nanoseconds<S: Serializer>(time: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{time:.9}"))
}

fn is_empty(labels: &[String]) -> bool {
    labels.is_empty()
}

/// What the L7 proxy saw. Text that came from the network is escaped ([`escaped`]), and what is
/// known to be a credential is left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum L7 {
    /// A request over HTTP.
    Http(Http),
    /// A question to a name server.
    Dns(Dns),
    /// The name in a TLS client hello.
    Tls {
        /// Server name, where there was one.
        server_name: Option<String>,
        /// Why the connection ended that the proxy had let pass.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// A connection whose content nobody asked about.
    Stream {
        /// Why it ended, or did not begin.
        error: String,
    },
}

impl L7 {
    /// Name of the protocol, as people write it.
    #[must_use]
    pub const fn protocol(&self) -> &'static str {
        match self {
            Self::Http(_) => "HTTP",
            Self::Dns(_) => "DNS",
            Self::Tls { .. } => "TLS",
            Self::Stream { .. } => "TCP",
        }
    }
}

/// A request over HTTP, and the answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Http {
    /// Method; empty where it could not be read.
    pub method: Cow<'static, str>,
    /// `http://host/path?query` as it was judged; of a request that was refused unread, as much as
    /// could be told of it.
    pub url: String,
    /// `HTTP/1.1`, `HTTP/2`.
    pub version: Cow<'static, str>,
    /// Status of the answer: the server's, or the proxy's own; none: there was no answer.
    pub status: Option<u16>,
    /// What the proxy answered to a call of gRPC in the server's place; `status` says that it is an
    /// answer at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grpc_status: Option<u16>,
    /// From the end of the request's head to the end of the answer's.
    pub latency_ns: u64,
    /// Headers that are not as a rule with another action than to deny wants them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mismatches: Vec<String>,
    /// Why the proxy answered in the server's place, or ended what it had let pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A question to a name server, and the answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Name, lower case.
    pub query: String,
    /// Type, such as `AAAA`.
    pub qtype: String,
    /// Response code, such as `NXDOMAIN`; none: there was no answer.
    pub rcode: Option<String>,
    /// Addresses in the answer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// Seconds for which they hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<u32>,
    /// From the question to the answer.
    pub latency_ns: u64,
    /// Why there was no answer, or not the server's, where the code does not tell it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Text from the network as one printable word: whatever is not a visible ASCII character becomes
/// `\xNN`, and so do quotes and backslashes.
#[must_use]
pub fn escaped(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for part in bytes.split_inclusive(|byte| !is_plain(*byte)) {
        let odd = part.last().filter(|byte| !is_plain(**byte));
        let plain = &part[..part.len() - usize::from(odd.is_some())];
        text.push_str(std::str::from_utf8(plain).unwrap_or_default());
        if let Some(odd) = odd {
            _ = write!(text, "\\x{odd:02x}");
        }
    }
    text
}

const fn is_plain(byte: u8) -> bool {
    byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\')
}

/// As [`escaped`]; most text has nothing to escape.
#[must_use]
pub fn escaped_text(text: String) -> String {
    if text.bytes().all(is_plain) { text } else { escaped(text.as_bytes()) }
}

/// Methods and versions of HTTP that most requests have.
const WORDS: [&str; 10] =
    ["GET", "POST", "PUT", "DELETE", "HEAD", "PATCH", "OPTIONS", "HTTP/1.1", "HTTP/2", "HTTP/1.0"];

/// A method or a version of HTTP. The usual ones take no memory: each record has one of each.
#[must_use]
pub fn word(text: &str) -> Cow<'static, str> {
    match WORDS.into_iter().find(|word| *word == text) {
        Some(word) => word.into(),
        None => text.to_owned().into(),
    }
}

/// What a [`Flow`] tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowKind {
    /// A flow began.
    Open,
    /// A flow ended.
    Close,
    /// A packet was dropped.
    Drop,
    /// A request was judged inside a connection, and answered by the server or the proxy.
    Request,
}

/// Whether the packet, or the request, went on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verdict {
    /// It did.
    Forwarded,
    /// It did not.
    Dropped,
    /// It went to the L7 proxy, which judges what is asked for inside.
    Redirected,
}

impl Verdict {
    /// The word that people see.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Forwarded => "FORWARDED",
            Self::Dropped => "DROPPED",
            Self::Redirected => "REDIRECTED",
        }
    }
}

/// Seen from the pod at which the packet was judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Into a pod.
    Ingress,
    /// Out of a pod.
    Egress,
}

/// One end of a flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowEnd {
    /// Address.
    pub address: IpAddr,
    /// Port; of ICMP the message type. 0 for protocols without ports.
    pub port: u16,
    /// Security identity.
    pub identity: u32,
    /// Labels of the identity, as in `k8s:app=web` or `reserved:world-ipv4`.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub labels: Arc<[String]>,
    /// Namespace of the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<Arc<str>>,
    /// Name of the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Arc<str>>,
    /// Node of the address, where it is a node's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Arc<str>>,
    /// Endpoint number of a pod on the observing node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<u32>,
}

impl FlowEnd {
    /// A name for people: `namespace/pod`, the node's name, the reserved identity, else the
    /// address.
    #[must_use]
    pub fn name(&self) -> String {
        match (&self.namespace, &self.pod, &self.node) {
            (Some(namespace), Some(pod), _) => format!("{namespace}/{pod}"),
            (_, _, Some(node)) => node.to_string(),
            _ => self.address.to_string(),
        }
    }
}

/// What one policy said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judgement {
    /// Allowed or denied, and on what ground.
    pub outcome: Outcome,
    /// The rule that decided, where one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<RuleName>,
    /// Default deny: the policies that select the pod in this direction, as `Kind namespace/name`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub default_deny_by: Vec<String>,
}

impl Judgement {
    /// That names neither a rule nor policies.
    #[must_use]
    pub const fn plain(outcome: Outcome) -> Self {
        Self { outcome, rule: None, default_deny_by: Vec::new() }
    }
}

/// The ground of a [`Judgement`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// No policy selects the pod in this direction.
    NoPolicy,
    /// A rule allowed it.
    AllowedByRule,
    /// A rule denied it.
    DeniedByRule,
    /// Policies select the pod and none of their rules allows it.
    DefaultDeny,
    /// The rule is no longer known: the policy changed since.
    Unknown,
}

/// A rule of a policy object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleName {
    /// `Kind namespace/name` of the policy object, or the built-in rule's name
    /// (`allow-localhost-ingress`).
    pub policy: String,
    /// Field of the object, as in `spec.ingress[0]`; empty for built-in rules.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub path: String,
}

/// Packets and bytes of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Packets from the opener.
    pub packets: u64,
    /// Bytes from the opener.
    pub bytes: u64,
    /// Packets from the other end.
    pub reply_packets: u64,
    /// Bytes from the other end.
    pub reply_bytes: u64,
}
