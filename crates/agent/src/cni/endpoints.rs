//! What the CNI server needs from the rest of the agent.

use std::future::Future;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use palisade_api::cni::{Attachment, Code, Failure, Pod};
use serde::{Deserialize, Serialize};

/// A pod's interface whose veth pair exists, both ends down and without addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEndpoint {
    /// Container and interface.
    pub attachment: Attachment,
    /// The pod it belongs to.
    pub pod: Pod,
    /// The interface on the node's side, to which programs are attached.
    pub host: HostLink,
    /// MAC address of the pod's side.
    pub mac: [u8; 6],
    /// The addresses the pod will have.
    pub addresses: Addresses,
    /// The pod's network namespace.
    pub netns: PathBuf,
}

/// The node's side of a pod's veth pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostLink {
    /// Its name, `lxc…`.
    pub name: String,
    /// Its number in the node's network namespace.
    pub ifindex: u32,
    /// Its MAC address.
    pub mac: [u8; 6],
}

/// The addresses of one pod: at least one family is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Addresses {
    /// Its IPv4 address.
    pub ipv4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub ipv6: Option<Ipv6Addr>,
}

/// Why an endpoint could not be programmed. The attachment is then undone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// The runtime shall retry: the pod's labels are not known yet, the API server is away.
    #[error("{0}")]
    TryAgain(String),
    /// The pod does not exist (any more), so there is nothing to connect.
    #[error("{0}")]
    UnknownPod(String),
    /// The programs or the tables of the endpoint are not as they must be.
    #[error("{0}")]
    Differs(String),
    /// The kernel refused.
    #[error("{0}")]
    Failed(String),
}

impl From<EndpointError> for Failure {
    fn from(error: EndpointError) -> Self {
        let code = match &error {
            EndpointError::TryAgain(_) => Code::TryAgain,
            EndpointError::UnknownPod(_) => Code::UnknownContainer,
            EndpointError::Differs(_) => Code::Differs,
            EndpointError::Failed(_) => Code::Failed,
        };
        Failure::new(code, error.to_string())
    }
}

/// Can pods be connected?
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// Yes.
    Ready,
    /// No (CNI code 50), and this is why.
    NotReady(String),
    /// No, and existing pods suffer (CNI code 51).
    Impaired(String),
}

/// The agent as the CNI server sees it.
///
/// The server makes the veth pair, calls [`add`](Self::add), and only then gives the pod its
/// addresses and brings both ends up: no packet passes before the endpoint's policy is in force.
/// Calls for one container never overlap; calls for different containers run in parallel.
pub trait Endpoints: Send + Sync + 'static {
    /// Waits (bounded) for the pod object and its labels, allocates the identity, attaches the
    /// programs to `endpoint.host` and programs row and policy. Returns once they are in force,
    /// with the endpoint's number on this node, which is recorded and given back on restart.
    /// An endpoint that could not be finished must leave nothing behind; `remove` is called
    /// nevertheless.
    fn add(&self, endpoint: NewEndpoint)
    -> impl Future<Output = Result<u32, EndpointError>> + Send;

    /// Forgets an endpoint: rows, tables, programs, flows of its addresses. The veth pair is
    /// gone already, so nothing is ever open. Unknown endpoints succeed.
    fn remove(
        &self,
        attachment: &Attachment,
    ) -> impl Future<Output = Result<(), EndpointError>> + Send;

    /// Are the endpoint's programs attached and its rows and policy in force?
    fn check(
        &self,
        attachment: &Attachment,
    ) -> impl Future<Output = Result<(), EndpointError>> + Send;

    /// Could an endpoint be added now? Free addresses are the server's own affair.
    fn readiness(&self) -> impl Future<Output = Readiness> + Send;
}
