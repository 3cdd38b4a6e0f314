//! The incremental engine: events in, changed tables out.
//!
//! # What the writer of the kernel's tables must know
//! * Feed a pod ([`Repository::set_pod`]) and its identity before any packet can carry it: never
//!   put an identity into `ENDPOINTS` that this repository does not know; write 0 (unknown).
//! * Write the tables of a [`Changes`] first, then new prefixes to `IPCACHE` and `ENDPOINTS`.
//!   A prefix that is no longer used stays in the tables until
//!   [`Repository::acknowledge_prefixes`] says that no address refers to it any more.
//! * After a restart, [`Repository::adopt_prefixes`] goes first, so that a number means the same
//!   network as in the tables that the kernel still uses.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;

use crate::{
    compile::CompiledPolicy,
    label::Labels,
    model::{Direction, NamedPort, Policy, PolicyRef},
};

/// Number of a local endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointId(pub u32);

/// Number of a group: the endpoints that the same rules select, in one direction. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub u32);

/// What is known of a local endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointInfo {
    /// Security identity. With `INIT` the endpoint is closed both ways, whatever policies say.
    pub identity: u32,
    /// Labels that subjects are matched with, see [`crate::identity::endpoint_labels`].
    pub labels: Labels,
    /// Ports that it declares.
    pub named_ports: Vec<NamedPort>,
}

/// What is known of a pod anywhere in the cluster, for rules with named ports. Pods in a node's
/// own network namespace are left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPorts {
    /// One of its addresses.
    pub ip: IpAddr,
    /// Security identity.
    pub identity: u32,
    /// Ports that it declares; none is worth saying too.
    pub ports: Vec<NamedPort>,
}

/// Policy of an endpoint in one direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupDirection {
    /// No policy selects it: everything passes.
    AllowAll,
    /// The tables of its group.
    Enforced(GroupId, Arc<CompiledPolicy>),
}

/// Policy of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointPolicy {
    /// For traffic to it.
    pub ingress: GroupDirection,
    /// For traffic from it.
    pub egress: GroupDirection,
}

/// One entry of [`crate::Chunk::peers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerDelta {
    /// Chunk.
    pub chunk: u32,
    /// Identity or prefix number.
    pub id: u32,
    /// Its bitmap now; `None`: no entry any more.
    pub rules: Option<u128>,
}

/// What became of a group's tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupUpdate {
    /// A new group, or all of an old one's tables are new: write aside, then flip.
    Replaced(Arc<CompiledPolicy>),
    /// Only these peers differ, and no packet can carry them yet, or any more: write in place.
    Peers(Arc<CompiledPolicy>, Vec<PeerDelta>),
    /// No endpoint is in the group any more.
    Removed,
}

/// A change of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupChange {
    /// The group.
    pub group: GroupId,
    /// Its direction.
    pub direction: Direction,
    /// What became of it.
    pub update: GroupUpdate,
}

/// A group that has more rules than fit: closed altogether.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{direction} of {} endpoints is closed: {rules} rules select them, at most {limit} fit; \
     merge rules or split the workload (policies: {})",
    endpoints.len(),
    policies.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
)]
pub struct TooManyRules {
    /// The group.
    pub group: GroupId,
    /// Its direction.
    pub direction: Direction,
    /// Its endpoints.
    pub endpoints: Vec<EndpointId>,
    /// How many rules it has.
    pub rules: usize,
    /// How many it may have.
    pub limit: usize,
    /// The policies that select it.
    pub policies: Vec<PolicyRef>,
}

/// What changed since the last commit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Groups, the removed ones last.
    pub groups: Vec<GroupChange>,
    /// Endpoints that are new, in another group, or whose group's tables were replaced.
    pub endpoints: Vec<(EndpointId, EndpointPolicy)>,
    /// Whether [`Repository::prefixes`] gives another answer now.
    pub prefixes_changed: bool,
    /// Prefixes that are new.
    pub prefixes_added: Vec<(IpNet, u32)>,
    /// Prefixes that are no longer used.
    pub prefixes_removed: Vec<(IpNet, u32)>,
    /// Groups that could not be compiled and are closed; all of them, the old ones too.
    pub errors: Vec<TooManyRules>,
}

/// The engine. Methods note events; [`Repository::commit`] says what follows from them.
#[derive(Debug, Default)]
pub struct Repository {}

#[expect(
    unused_variables,
    clippy::needless_pass_by_value,
    clippy::unused_self,
    reason = "signatures first"
)]
impl Repository {
    /// Knows the reserved identities and nothing else.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Numbers of prefixes that the kernel's tables use, from before a restart.
    pub fn adopt_prefixes(&mut self, prefixes: impl IntoIterator<Item = (IpNet, u32)>) {}

    /// A policy is new or was changed.
    pub fn upsert_policy(&mut self, policy: Policy) {}

    /// A policy is gone.
    pub fn remove_policy(&mut self, id: &PolicyRef) {}

    /// An identity is new, or its labels were changed.
    pub fn upsert_identity(&mut self, identity: u32, labels: Labels) {}

    /// An identity is gone; no address carries it any more.
    pub fn remove_identity(&mut self, identity: u32) {}

    /// A local endpoint is new or was changed.
    pub fn upsert_endpoint(&mut self, id: EndpointId, info: EndpointInfo) {}

    /// A local endpoint is gone.
    pub fn remove_endpoint(&mut self, id: EndpointId) {}

    /// A pod, here or on another node, is new or was changed.
    pub fn set_pod(&mut self, pod: PodPorts) {}

    /// A pod's address is gone.
    pub fn remove_pod(&mut self, ip: IpAddr) {}

    /// What follows from the events since the last commit.
    pub fn commit(&mut self) -> Changes {
        Changes::default()
    }

    /// No address refers to prefixes any more that the last commit called removed.
    pub fn acknowledge_prefixes(&mut self) {}

    /// The prefixes in use and their numbers.
    pub fn prefixes(&self) -> impl Iterator<Item = (IpNet, u32)> + '_ {
        std::iter::empty()
    }

    /// The number of the longest prefix that covers an address, 0 if none does.
    #[must_use]
    pub fn prefix_of(&self, address: IpAddr) -> u32 {
        0
    }

    /// The policy of an endpoint as of the last commit.
    #[must_use]
    pub fn endpoint_policy(&self, id: EndpointId) -> Option<EndpointPolicy> {
        None
    }

    /// The labels of an identity.
    #[must_use]
    pub fn identity(&self, identity: u32) -> Option<&Labels> {
        None
    }

    /// The policies, in order.
    pub fn policies(&self) -> impl Iterator<Item = &Policy> + '_ {
        std::iter::empty()
    }
}
