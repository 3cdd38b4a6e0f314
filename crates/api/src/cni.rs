//! What the CNI plugin and the agent say to each other: one request and one response per
//! connection, each a big-endian `u32` length and that many bytes of JSON.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// A frame may not be longer: a GC of a few thousand attachments fits many times over.
pub const MAX_FRAME: usize = 4 << 20;

/// So many deletions may wait for an absent agent; more is an error the runtime retries.
pub const MAX_QUEUED_DELETIONS: usize = 4096;

/// Where deletions wait while the agent is away: beside its socket.
pub fn deletion_queue(socket: &Path) -> PathBuf {
    socket.parent().unwrap_or(Path::new("/")).join("cni-deletions")
}

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {value:?} {problem}")]
pub struct InvalidName {
    what: &'static str,
    value: String,
    problem: &'static str,
}

/// A container ID as the CNI specification allows it; safe as a part of a file name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerId(String);

impl ContainerId {
    /// Longer IDs do not fit into a file name beside the interface name.
    pub const MAX_LEN: usize = 200;

    /// The ID as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for ContainerId {
    type Error = InvalidName;

    fn try_from(value: String) -> Result<Self, InvalidName> {
        let later = |b: &u8| b.is_ascii_alphanumeric() || b"_.-".contains(b);
        let problem = match value.as_bytes() {
            [] => "is empty",
            [first, ..] if !first.is_ascii_alphanumeric() => "must start with a letter or a digit",
            bytes if bytes.len() > Self::MAX_LEN => "is longer than 200 characters",
            bytes if !bytes.iter().all(later) => {
                "may only contain letters, digits, `_`, `.` and `-`"
            }
            _ => return Ok(Self(value)),
        };
        Err(InvalidName { what: "container ID", value, problem })
    }
}

impl From<ContainerId> for String {
    fn from(id: ContainerId) -> Self {
        id.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of the interface inside the pod, as Linux and the CNI specification allow it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IfName(String);

impl IfName {
    /// Linux keeps 16 bytes, the last of them zero.
    pub const MAX_LEN: usize = 15;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for IfName {
    type Error = InvalidName;

    fn try_from(value: String) -> Result<Self, InvalidName> {
        let forbidden = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
        let problem = match value.as_str() {
            "" => "is empty",
            "." | ".." => "is a path, not a name",
            "lo" => "is the loopback interface, which every pod already has",
            "all" | "default" => "is reserved by the kernel's settings of interfaces",
            name if name.len() > Self::MAX_LEN => "is longer than 15 bytes",
            name if name.contains(forbidden) => {
                "may not contain `/`, `:`, blanks or control characters"
            }
            _ => return Ok(Self(value)),
        };
        Err(InvalidName { what: "interface name", value, problem })
    }
}

impl From<IfName> for String {
    fn from(name: IfName) -> Self {
        name.0
    }
}

impl fmt::Display for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The key of one attachment: a container and the interface in it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Attachment {
    /// The sandbox, from `CNI_CONTAINERID`.
    #[serde(rename = "containerID")]
    pub container_id: ContainerId,
    /// The interface in the sandbox, from `CNI_IFNAME`.
    pub ifname: IfName,
}

impl Attachment {
    /// A file name that no other attachment has: an ID never contains `@`.
    pub fn file_name(&self) -> String {
        format!("{}@{}.json", self.container_id, self.ifname)
    }
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "interface {} of container {}", self.ifname, self.container_id)
    }
}

/// The pod that a sandbox belongs to, from `CNI_ARGS`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Pod {
    /// `K8S_POD_NAMESPACE`.
    pub namespace: String,
    /// `K8S_POD_NAME`.
    pub name: String,
    /// `K8S_POD_UID`; old runtimes do not give it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// So long the plugin waits for the answer, in milliseconds.
    pub patience_ms: u64,
    /// What to do.
    pub operation: Operation,
}

/// What the plugin asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "UPPERCASE")]
pub enum Operation {
    /// Connect a pod. Answered by [`Response::Attached`] once its policy is in force.
    Add(Add),
    /// Disconnect a pod; unknown attachments succeed.
    Del(Attachment),
    /// Compare an earlier answer with reality.
    Check(Check),
    /// Remove every attachment of the network that is not listed.
    Gc(Gc),
    /// Could a pod be connected now?
    Status,
}

/// See [`Operation::Add`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Add {
    /// Container and interface.
    pub attachment: Attachment,
    /// The `name` of the network configuration; GC is limited to it.
    pub network: String,
    /// Path of the pod's network namespace.
    pub netns: PathBuf,
    /// The pod.
    pub pod: Pod,
}

/// See [`Operation::Check`]: what `prevResult` says about our interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Container and interface.
    pub attachment: Attachment,
    /// Path of the pod's network namespace.
    pub netns: PathBuf,
    /// The MAC address that the interface must have, if given.
    pub mac: Option<String>,
    /// The addresses that the interface must have.
    pub addresses: Vec<IpNet>,
    /// The routes that the namespace must have.
    pub routes: Vec<Route>,
}

/// See [`Operation::Gc`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gc {
    /// The `name` of the network configuration.
    pub network: String,
    /// What stays.
    pub valid: Vec<Attachment>,
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "camelCase")]
pub enum Response {
    /// The answer to ADD.
    Attached(Attached),
    /// The answer to everything else that succeeded.
    Done,
    /// It did not succeed.
    Failed(Failure),
}

/// A finished attachment: what the CNI result is made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// The interface on the node's side.
    pub host: Interface,
    /// The interface in the pod.
    pub pod: Interface,
    /// The pod's addresses, each with its gateway.
    pub addresses: Vec<Address>,
    /// The pod's routes.
    pub routes: Vec<Route>,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its MAC address, as `02:00:00:00:00:01`.
    pub mac: String,
    /// Its largest packet.
    pub mtu: u32,
}

/// An address of the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The address and its prefix.
    pub address: IpNet,
    /// The router it uses.
    pub gateway: IpAddr,
}

/// A route in the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Route {
    /// Where it leads.
    pub dst: IpNet,
    /// The next hop, if there is one.
    pub gw: Option<IpAddr>,
}

/// The error codes of the CNI specification that palisade uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "u32", from = "u32")]
pub enum Code {
    /// 1: the CNI version, or a verb in that version, is not supported.
    IncompatibleVersion,
    /// 3: the container or its namespace is gone; nothing to clean up.
    UnknownContainer,
    /// 4: an environment variable is missing or wrong.
    InvalidEnvironment,
    /// 5: reading or writing failed.
    Io,
    /// 6: the input is not JSON of the expected shape.
    InvalidJson,
    /// 7: the network configuration is wrong.
    InvalidConfig,
    /// 11: it may work later.
    TryAgain,
    /// 50: no pod can be connected now.
    NotAvailable,
    /// 51: no pod can be connected now, and existing ones are impaired.
    LimitedConnectivity,
    /// 100: the interface or the address exists already.
    AlreadyExists,
    /// 101: CHECK found a difference.
    Differs,
    /// 102: the kernel or the agent failed.
    Failed,
    /// A code from a newer agent.
    Other(u32),
}

impl From<Code> for u32 {
    fn from(code: Code) -> Self {
        match code {
            Code::IncompatibleVersion => 1,
            Code::UnknownContainer => 3,
            Code::InvalidEnvironment => 4,
            Code::Io => 5,
            Code::InvalidJson => 6,
            Code::InvalidConfig => 7,
            Code::TryAgain => 11,
            Code::NotAvailable => 50,
            Code::LimitedConnectivity => 51,
            Code::AlreadyExists => 100,
            Code::Differs => 101,
            Code::Failed => 102,
            Code::Other(code) => code,
        }
    }
}

impl From<u32> for Code {
    fn from(code: u32) -> Self {
        match code {
            1 => Code::IncompatibleVersion,
            3 => Code::UnknownContainer,
            4 => Code::InvalidEnvironment,
            5 => Code::Io,
            6 => Code::InvalidJson,
            7 => Code::InvalidConfig,
            11 => Code::TryAgain,
            50 => Code::NotAvailable,
            51 => Code::LimitedConnectivity,
            100 => Code::AlreadyExists,
            101 => Code::Differs,
            102 => Code::Failed,
            code => Code::Other(code),
        }
    }
}

/// An error as the runtime prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The kind of error.
    pub code: Code,
    /// What is wrong, with the name of the thing it is about.
    pub message: String,
    /// More about it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl Failure {
    /// An error without details.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: String::new() }
    }
}

/// A message as it goes over the socket.
pub fn encode<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, message)?;
    let len = check_length(frame.len() - 4)?;
    frame[..4].copy_from_slice(&len.to_be_bytes());
    Ok(frame)
}

/// The length that a frame's first four bytes announce.
pub fn decode_length(header: [u8; 4]) -> io::Result<usize> {
    let len = u32::from_be_bytes(header) as usize;
    check_length(len)?;
    Ok(len)
}

/// Writes one message.
pub fn write<T: Serialize>(writer: &mut impl Write, message: &T) -> io::Result<()> {
    writer.write_all(&encode(message)?)
}

/// Reads one message.
pub fn read<T: DeserializeOwned>(reader: &mut impl Read) -> io::Result<T> {
    let mut header = [0; 4];
    reader.read_exact(&mut header)?;
    let mut body = vec![0; decode_length(header)?];
    reader.read_exact(&mut body)?;
    Ok(serde_json::from_slice(&body)?)
}

fn check_length(len: usize) -> io::Result<u32> {
    match u32::try_from(len) {
        Ok(short) if len <= MAX_FRAME => Ok(short),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a message of {len} bytes exceeds the limit of {MAX_FRAME}"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(value: &str) -> Result<ContainerId, InvalidName> {
        ContainerId::try_from(value.to_owned())
    }

    fn ifname(value: &str) -> Result<IfName, InvalidName> {
        IfName::try_from(value.to_owned())
    }

    #[test]
    fn container_ids_are_safe_file_names() {
        for good in ["a", "0", "abc_d.e-f", &"f".repeat(200)] {
            assert!(id(good).is_ok(), "{good}");
        }
        for bad in ["", "../x", ".x", "-x", "a/b", "a@b", "a\0b", "ä", "a b", &"f".repeat(201)] {
            assert!(id(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn interface_names_fit_the_kernel() {
        for good in ["eth0", "net1.5", "abcdefghijklmno"] {
            assert!(ifname(good).is_ok(), "{good}");
        }
        let bad = ["", "lo", "a/b", "a:b", "a b", ".", "..", "a\0", "abcdefghijklmnop", "all"];
        for bad in bad {
            assert!(ifname(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_are_checked_when_they_arrive() {
        let text = r#"{"command":"DEL","containerID":"../x","ifname":"eth0"}"#;
        let error = serde_json::from_str::<Operation>(text).expect_err("must be refused");
        assert!(error.to_string().contains("must start with a letter"), "{error}");
    }

    #[test]
    fn messages_survive_the_socket() {
        let failure = Failure::new(Code::TryAgain, "no free address");
        let frame = encode(&Response::Failed(failure.clone())).expect("encode");
        let back: Response = read(&mut frame.as_slice()).expect("read");
        assert_eq!(back, Response::Failed(failure));
    }

    #[test]
    fn an_announced_giant_is_refused_before_it_is_allocated() {
        assert!(decode_length(u32::MAX.to_be_bytes()).is_err());
    }
}
