//! Policies as people wrote them, and the tables that they come to.

use std::sync::Arc;

use palisade_policy::{
    CompiledPolicy,
    model::{Policy, PolicyRef},
    resolve::GroupId,
};

use super::{Row, join};

/// A policy object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyObject {
    /// Its name.
    pub id: PolicyRef,
    /// The object's uid.
    pub uid: String,
    /// Generation of its spec.
    pub generation: i64,
    /// What it says.
    pub content: PolicyContent,
    /// What the object's status says of it, where it says anything.
    pub reported: Option<Condition>,
}

/// What a policy object says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PolicyContent {
    /// All of it is understood.
    Accepted(Arc<Policy>),
    /// Something in it is wrong or not supported.
    Refused {
        /// What, where, and what to write instead.
        message: String,
        /// Closes its subjects in the directions that it names.
        lockdown: Policy,
    },
}

/// What was found of a policy object: the reason of its condition `Valid`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// It is in force as it stands.
    Accepted,
    /// It is in force, and a header rule of it refers to a Secret that is not there.
    SecretMissing,
    /// It closes its subjects.
    Refused,
}

impl Finding {
    /// Status of the condition.
    pub const fn is_valid(self) -> bool {
        matches!(self, Self::Accepted)
    }

    /// The reason, in the API's way of writing.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "Accepted",
            Self::SecretMissing => "SecretMissing",
            Self::Refused => "Refused",
        }
    }

    /// The finding with this reason.
    pub fn read(reason: &str) -> Option<Self> {
        let all = [Self::Accepted, Self::SecretMissing, Self::Refused];
        all.into_iter().find(|finding| finding.as_str() == reason)
    }
}

/// The condition `Valid` of a policy object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// Status and reason.
    pub finding: Finding,
    /// For people.
    pub message: String,
    /// Generation that it speaks of, where it says so.
    pub generation: Option<i64>,
}

impl Row for PolicyObject {
    type Key = PolicyRef;
    const TABLE: &'static str = "policies";
    const COLUMNS: &'static [&'static str] = &["POLICY", "GENERATION", "VALID", "RULES", "MESSAGE"];

    fn key(&self) -> PolicyRef {
        self.id.clone()
    }

    fn columns(&self) -> Vec<String> {
        let (valid, rules, message) = match &self.content {
            PolicyContent::Accepted(policy) => ("true", policy.rules.len(), String::new()),
            PolicyContent::Refused { message, lockdown } => {
                ("false", lockdown.rules.len(), message.clone())
            }
        };
        let generation = self.generation.to_string();
        vec![self.id.to_string(), generation, valid.into(), rules.to_string(), message]
    }
}

/// The policy of a local endpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct PolicyEntry {
    /// Endpoint.
    pub endpoint: u32,
    /// Traffic into it.
    pub ingress: Enforcement,
    /// Traffic out of it.
    pub egress: Enforcement,
}

/// What applies to one direction of an endpoint.
#[derive(Clone, Debug)]
pub enum Enforcement {
    /// No policy selects it.
    AllowAll,
    /// The tables of this group.
    Enforced(GroupId, Arc<CompiledPolicy>),
}

impl PartialEq for Enforcement {
    /// Compiled policies are shared: the same one is the same allocation.
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::AllowAll, Self::AllowAll) => true,
            (Self::Enforced(a, x), Self::Enforced(b, y)) => a == b && Arc::ptr_eq(x, y),
            _ => false,
        }
    }
}

impl Enforcement {
    /// The compiled policy, where there is one.
    pub fn policy(&self) -> Option<&Arc<CompiledPolicy>> {
        match self {
            Self::AllowAll => None,
            Self::Enforced(_, policy) => Some(policy),
        }
    }

    /// The group, where there is one.
    pub fn group(&self) -> Option<GroupId> {
        match self {
            Self::AllowAll => None,
            Self::Enforced(group, _) => Some(*group),
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::AllowAll => "allow-all".into(),
            Self::Enforced(_, policy) => {
                format!("{} rules, by {}", policy.rules.len(), join(&policy.default_deny_by))
            }
        }
    }
}

impl Row for PolicyEntry {
    type Key = u32;
    const TABLE: &'static str = "policy-entries";
    const COLUMNS: &'static [&'static str] = &["ENDPOINT", "INGRESS", "EGRESS"];

    fn key(&self) -> u32 {
        self.endpoint
    }

    fn columns(&self) -> Vec<String> {
        vec![self.endpoint.to_string(), self.ingress.describe(), self.egress.describe()]
    }
}
