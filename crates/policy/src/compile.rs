//! Compiled policies: the tables of one group and direction, as the kernel reads them.

use std::{collections::BTreeMap, fmt, sync::Arc};

use palisade_abi::{CHUNK_RULES, ChunkValue};

use crate::model::{Action, PolicyRef};

/// Protocol, leading bits of the port that count, port: as in `abi::PortKey`.
pub type PortPrefix = (u8, u8, u16);

/// Where a rule comes from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RuleSource {
    /// A policy says so, at this place.
    Policy {
        /// The policy.
        policy: PolicyRef,
        /// The place, such as `spec.ingress[0]`.
        path: String,
    },
    /// A node always reaches the pods that it runs.
    AllowLocalhost,
    /// Policies select the endpoint, and none of them closes it.
    NoDefaultDeny,
}

impl fmt::Display for RuleSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy { policy, path } => write!(f, "{policy} {path}"),
            Self::AllowLocalhost => f.write_str("a node reaches its own pods"),
            Self::NoDefaultDeny => f.write_str("no selecting policy asks for default deny"),
        }
    }
}

/// One rule of a compiled policy.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RuleInfo {
    /// What it does.
    pub action: Action,
    /// Where it comes from.
    pub source: RuleSource,
    /// Where else the same is said.
    pub also: Vec<RuleSource>,
}

/// Up to [`CHUNK_RULES`] rules: bit *n* of every bitmap is rule *n* of the chunk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// Rules for a peer without an entry.
    pub default_peers: u128,
    /// Rules for a port without an entry.
    pub default_ports: u128,
    /// Rules that deny.
    pub deny: u128,
    /// Rules for an identity, or a prefix with `PREFIX_POD_BIT` or without.
    pub peers: BTreeMap<u32, u128>,
    /// Rules for a port prefix, those of the shorter prefixes that cover it included.
    pub ports: BTreeMap<PortPrefix, u128>,
}

/// A bitmap as the kernel's two words, the lower bits first.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "the halves of the bitmap are what is wanted")]
pub const fn words(bitmap: u128) -> [u64; 2] {
    [bitmap as u64, (bitmap >> 64) as u64]
}

impl Chunk {
    /// Which lengths the prefixes in [`Chunk::ports`] have, one bit each.
    #[must_use]
    pub fn port_prefixes(&self) -> u32 {
        self.ports.keys().fold(0, |lengths, (_, len, _)| lengths | 1 << len)
    }

    /// The kernel's record of the chunk, in a table of `chunks` of them.
    #[must_use]
    pub fn value(&self, chunks: u32) -> ChunkValue {
        ChunkValue {
            default_peers: words(self.default_peers),
            default_ports: words(self.default_ports),
            deny: words(self.deny),
            port_prefixes: self.port_prefixes(),
            chunks,
        }
    }
}

/// Tables of a group of endpoints in one direction. Never without a chunk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CompiledPolicy {
    /// The rules in the order of their precedence, in chunks.
    pub chunks: Vec<Arc<Chunk>>,
    /// What each rule is; rule *n* is bit `n % 128` of chunk `n / 128`.
    pub rules: Vec<RuleInfo>,
    /// Policies that close the endpoint for whatever no rule matches.
    pub default_deny_by: Vec<PolicyRef>,
    /// Equal if, and nearly only if, all of the above is. The same in every process.
    pub hash: u64,
}

impl CompiledPolicy {
    /// The rule with a number, as the kernel reports it (`chunk * 128 + bit`).
    #[must_use]
    pub fn rule(&self, number: u32) -> Option<&RuleInfo> {
        self.rules.get(usize::try_from(number).ok()?)
    }

    /// What the kernel finds for a peer (its identity and the number of its policy prefix, 0 if
    /// none), a protocol and a port: the number of the rule that decides, `None` by default.
    #[must_use]
    pub fn lookup(&self, identity: u32, prefix: u32, protocol: u8, port: u16) -> Option<u32> {
        (0u32..).zip(&self.chunks).find_map(|(n, chunk)| {
            let hit = chunk.peers_of(identity, prefix) & chunk.ports_of(protocol, port);
            (hit != 0).then(|| n * CHUNK_RULES + hit.trailing_zeros())
        })
    }
}
