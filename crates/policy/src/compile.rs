//! Compiled policies: the tables of one group and direction, as the kernel reads them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    hash::Hash,
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use palisade_abi::{CHUNK_RULES, ChunkValue, PREFIX_ID_BIT, PREFIX_POD_BIT, identity};
use roaring::RoaringBitmap;
use serde::{Deserialize, Serialize};

use crate::{
    bitmap,
    hash::StableHasher,
    index::{Index, SelectorId},
    l7::NamePattern,
    learned::Learned,
    lookup::mask,
    model::{Action, Application, Cidr, PolicyRef},
    prefix::Prefixes,
    resolve::PeerDelta,
};

/// Protocol, leading bits of the port that count, port: as in `abi::PortKey`.
pub type PortPrefix = (u8, u8, u16);

/// Where a rule comes from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RuleInfo {
    /// What it does.
    pub action: Action,
    /// What it asks of the traffic inside.
    pub application: Application,
    /// The ports that it names.
    pub ports: NamedPorts,
    /// Where it comes from.
    pub source: RuleSource,
    /// Where else the same is said.
    pub also: Vec<RuleSource>,
}

/// Ports that a rule names, in contrast to ranges that contain them among others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NamedPorts {
    /// It names no port at all: every protocol is meant.
    pub every: bool,
    /// Protocols of which it names no port: all of the protocol is meant.
    pub protocols: BTreeSet<u8>,
    /// Protocols and ports, one by one.
    pub single: BTreeSet<(u8, u16)>,
}

impl NamedPorts {
    /// Whether the rule speaks of exactly this port.
    #[must_use]
    pub fn names(&self, protocol: u8, port: u16) -> bool {
        self.single.contains(&(protocol, port))
    }

    /// Whether the rule speaks of no port in particular.
    #[must_use]
    pub fn is_every(&self, protocol: u8) -> bool {
        self.every || self.protocols.contains(&protocol)
    }
}

/// Up to [`CHUNK_RULES`] rules: bit *n* of every bitmap is rule *n* of the chunk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// Rules for a peer without an entry.
    #[serde(with = "bitmap")]
    pub default_peers: u128,
    /// Rules for a port without an entry.
    #[serde(with = "bitmap")]
    pub default_ports: u128,
    /// Rules that deny.
    #[serde(with = "bitmap")]
    pub deny: u128,
    /// Rules that allow what the proxy agrees to.
    #[serde(with = "bitmap")]
    pub redirect: u128,
    /// Rules for an identity, or a prefix with `PREFIX_POD_BIT` or without.
    #[serde(with = "bitmap::map")]
    pub peers: BTreeMap<u32, u128>,
    /// Rules for a port prefix, those of the shorter prefixes that cover it included.
    #[serde(with = "bitmap::map")]
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
            redirect: words(self.redirect),
            port_prefixes: self.port_prefixes(),
            chunks,
        }
    }
}

/// Tables of a group of endpoints in one direction. Never without a chunk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompiledPolicy {
    /// The rules in the order of their precedence, in chunks.
    pub chunks: Vec<Arc<Chunk>>,
    /// What each rule is; rule *n* is bit `n % 128` of chunk `n / 128`.
    pub rules: Vec<RuleInfo>,
    /// Policies that close the endpoint for whatever no rule matches.
    pub default_deny_by: Vec<PolicyRef>,
    /// Names whose addresses some rule allows.
    pub fqdns: Vec<NamePattern>,
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
        self.matching(identity, prefix, protocol, port).next()
    }

    /// The numbers of all rules that match, in the order of their precedence.
    pub fn matching(
        &self,
        identity: u32,
        prefix: u32,
        protocol: u8,
        port: u16,
    ) -> impl Iterator<Item = u32> {
        (0u32..).zip(&self.chunks).flat_map(move |(n, chunk)| {
            let hit = chunk.peers_of(identity, prefix) & chunk.ports_of(protocol, port);
            bits_of(hit).map(move |bit| n * CHUNK_RULES + bit)
        })
    }

    /// Whether the rule that decides sends a connection through the proxy.
    #[must_use]
    pub fn redirects(&self, identity: u32, prefix: u32, protocol: u8, port: u16) -> bool {
        let Some(rule) = self.lookup(identity, prefix, protocol, port) else { return false };
        let chunk = self.chunks.get((rule / CHUNK_RULES) as usize);
        chunk.is_some_and(|chunk| chunk.redirect >> (rule % CHUNK_RULES) & 1 != 0)
    }

    /// Whether some rule needs the proxy.
    #[must_use]
    pub fn has_redirects(&self) -> bool {
        self.chunks.iter().any(|chunk| chunk.redirect != 0)
    }
}

/// The bits of a bitmap that are set, from the lowest.
fn bits_of(mut bitmap: u128) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let lowest = (bitmap != 0).then(|| bitmap.trailing_zeros())?;
        bitmap &= bitmap - 1;
        Some(lowest)
    })
}

/// Whom a rule matches, resolved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct BitPeers {
    pub(crate) any: bool,
    /// The unknown identity, on top of what the rest says.
    pub(crate) unknown: bool,
    pub(crate) selectors: Vec<SelectorId>,
    pub(crate) cidrs: Vec<Cidr>,
    pub(crate) fqdns: Vec<NamePattern>,
    pub(crate) identities: RoaringBitmap,
    /// Pods, each by its own address.
    pub(crate) addresses: BTreeSet<IpAddr>,
}

impl BitPeers {
    pub(crate) fn is_nobody(&self) -> bool {
        let somebody = self.any || self.unknown;
        !somebody && self.selectors.is_empty() && self.cidrs.is_empty() && self.fqdns.is_empty()
    }

    fn matches_identity(&self, id: u32, index: &Index) -> bool {
        self.any
            || self.unknown && id == identity::UNKNOWN
            || self.identities.contains(id)
            || self.selectors.iter().any(|selector| index.contains(*selector, id))
    }

    fn matches_prefix(&self, net: IpNet, pod: bool, learned: &Learned) -> bool {
        let alone = net.prefix_len() == net.max_prefix_len();
        let by_itself = match pod {
            true => self.addresses.contains(&net.addr()),
            false => learned.matches(&self.fqdns, net.addr()),
        };
        alone && by_itself
            || self.cidrs.iter().any(|cidr| (cidr.matches_pods || !pod) && covers(cidr, net))
    }
}

/// Whether the CIDR matches the addresses whose longest prefix is `net`. Every `except` has a
/// prefix of its own, so none of them lies inside `net` without being the longer one.
fn covers(cidr: &Cidr, net: IpNet) -> bool {
    cidr.net.contains(&net) && !cidr.except.iter().any(|except| except.contains(&net))
}

/// Which ports a rule matches, resolved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct BitPorts {
    pub(crate) any: bool,
    pub(crate) prefixes: BTreeSet<PortPrefix>,
    pub(crate) named: NamedPorts,
}

impl BitPorts {
    pub(crate) fn is_empty(&self) -> bool {
        !self.any && self.prefixes.is_empty()
    }

    pub(crate) fn every() -> Self {
        let named = NamedPorts { every: true, ..NamedPorts::default() };
        Self { any: true, prefixes: BTreeSet::new(), named }
    }

    pub(crate) fn add_protocol(&mut self, protocol: u8) {
        self.named.protocols.insert(protocol);
        self.add_range(protocol, 0, u16::MAX);
    }

    pub(crate) fn add_range(&mut self, protocol: u8, first: u16, last: u16) {
        if first == last {
            self.named.single.insert((protocol, first));
        }
        let (mut at, end) = (u32::from(first), u32::from(last));
        while at <= end {
            // The largest aligned block that starts here and does not reach beyond the end.
            let mut bits = at.trailing_zeros().min(16);
            while at + (1 << bits) - 1 > end {
                bits -= 1;
            }
            let (Ok(port), Ok(len)) = (u16::try_from(at), u8::try_from(16 - bits)) else { return };
            self.prefixes.insert((protocol, len, port));
            at += 1 << bits;
        }
    }
}

/// One rule, resolved: one bit of the tables.
#[derive(Clone, Debug)]
pub(crate) struct Bit {
    pub(crate) info: RuleInfo,
    pub(crate) peers: BitPeers,
    pub(crate) ports: BitPorts,
}

/// What peers of rules are looked up in.
pub(crate) struct PeerTables<'a> {
    pub(crate) index: &'a Index,
    pub(crate) prefixes: &'a Prefixes,
    /// Of the group whose rules they are.
    pub(crate) learned: &'a Learned,
}

/// Turns rules, in the order of their precedence, into tables.
pub(crate) fn compile(
    bits: &[Bit],
    default_deny_by: Vec<PolicyRef>,
    peers: &PeerTables<'_>,
) -> CompiledPolicy {
    let mut chunks: Vec<Arc<Chunk>> = bits
        .chunks(CHUNK_RULES as usize)
        .map(|bits| Arc::new(compile_chunk(bits, peers)))
        .collect();
    if chunks.is_empty() {
        chunks.push(Arc::default());
    }
    let rules = bits.iter().map(|bit| bit.info.clone()).collect();
    let fqdns = peers.learned.patterns().to_vec();
    let mut policy = CompiledPolicy { chunks, rules, default_deny_by, fqdns, hash: 0 };
    policy.hash = policy.structure_hash() ^ policy.peers_hash();
    policy
}

fn compile_chunk(bits: &[Bit], tables: &PeerTables<'_>) -> Chunk {
    let mut chunk = Chunk::default();
    for (n, bit) in bits.iter().enumerate() {
        let mask = 1u128 << n;
        if bit.info.action == Action::Deny {
            chunk.deny |= mask;
        } else if bit.info.application.needs_proxy() {
            chunk.redirect |= mask;
        }
        if bit.peers.any {
            chunk.default_peers |= mask;
        }
        if bit.ports.any {
            chunk.default_ports |= mask;
        }
        add_peers(&mut chunk.peers, mask, &bit.peers, tables);
        for prefix in &bit.ports.prefixes {
            *chunk.ports.entry(*prefix).or_default() |= mask;
        }
    }
    let default = chunk.default_peers;
    for (id, rules) in &mut chunk.peers {
        if *id < PREFIX_ID_BIT {
            *rules |= default;
        }
    }
    chunk.peers.retain(|id, rules| *id >= PREFIX_ID_BIT || *rules != default);
    inherit_ports(&mut chunk);
    chunk
}

fn add_peers(
    table: &mut BTreeMap<u32, u128>,
    mask: u128,
    peers: &BitPeers,
    tables: &PeerTables<'_>,
) {
    let PeerTables { index, prefixes, learned } = tables;
    let mut add = |id: u32| *table.entry(id).or_default() |= mask;
    for selector in &peers.selectors {
        index.matches(*selector).for_each(&mut add);
    }
    peers.identities.iter().for_each(&mut add);
    if peers.unknown {
        add(identity::UNKNOWN);
    }
    for cidr in &peers.cidrs {
        for (net, number) in prefixes.inside(cidr.net) {
            if covers(cidr, net) {
                add(number);
                if cidr.matches_pods {
                    add(number | PREFIX_POD_BIT);
                }
            }
        }
    }
    for address in &peers.addresses {
        if let Some(number) = prefixes.number(IpNet::from(*address)) {
            add(number | PREFIX_POD_BIT);
        }
    }
    for address in learned.addresses().filter(|one| learned.matches(&peers.fqdns, *one)) {
        if let Some(number) = prefixes.number(IpNet::from(address)) {
            add(number);
        }
    }
}

/// The first entry found decides: give each the rules of the shorter prefixes that cover it.
fn inherit_ports(chunk: &mut Chunk) {
    let own = std::mem::take(&mut chunk.ports);
    chunk.ports = own
        .keys()
        .map(|&(protocol, len, port)| {
            let covering = (0..=len)
                .filter_map(|shorter| own.get(&(protocol, shorter, port & mask(shorter))))
                .fold(chunk.default_ports, |all, rules| all | rules);
            ((protocol, len, port), covering)
        })
        .collect();
}

impl CompiledPolicy {
    /// The same tables with the entries of some peers computed anew, and what differs.
    pub(crate) fn with_peers(
        &self,
        ids: &BTreeSet<u32>,
        bits: &[Bit],
        tables: &PeerTables<'_>,
    ) -> (Self, Vec<PeerDelta>) {
        let mut policy = self.clone();
        let mut delta = Vec::new();
        for (n, bits) in (0u32..).zip(bits.chunks(CHUNK_RULES as usize)) {
            for &id in ids {
                let Some(chunk) = policy.chunks.get_mut(n as usize) else { continue };
                let rules = rules_of(id, bits, chunk.default_peers, tables);
                let old = chunk.peers.get(&id).copied();
                if old == rules {
                    continue;
                }
                policy.hash ^= old.map_or(0, |rules| entry_hash(n, id, rules))
                    ^ rules.map_or(0, |rules| entry_hash(n, id, rules));
                let table = &mut Arc::make_mut(chunk).peers;
                match rules {
                    Some(rules) => table.insert(id, rules),
                    None => table.remove(&id),
                };
                delta.push(PeerDelta { chunk: n, id, rules });
            }
        }
        (policy, delta)
    }

    fn structure_hash(&self) -> u64 {
        let mut hasher = StableHasher::new();
        self.rules.hash(&mut hasher);
        self.default_deny_by.hash(&mut hasher);
        self.fqdns.hash(&mut hasher);
        for chunk in &self.chunks {
            (chunk.default_peers, chunk.default_ports, chunk.deny, chunk.redirect)
                .hash(&mut hasher);
            chunk.ports.hash(&mut hasher);
        }
        hasher.finish()
    }

    /// Does not depend on the order, so that one entry's change is one step.
    fn peers_hash(&self) -> u64 {
        (0u32..).zip(&self.chunks).fold(0, |all, (n, chunk)| {
            chunk.peers.iter().fold(all, |all, (id, rules)| all ^ entry_hash(n, *id, *rules))
        })
    }
}

fn entry_hash(chunk: u32, id: u32, rules: u128) -> u64 {
    let mut hasher = StableHasher::new();
    (chunk, id, rules).hash(&mut hasher);
    hasher.finish()
}

/// The entry of one peer in one chunk.
fn rules_of(id: u32, bits: &[Bit], default: u128, tables: &PeerTables<'_>) -> Option<u128> {
    let collect = |matches: &dyn Fn(&BitPeers) -> bool| {
        bits.iter()
            .enumerate()
            .filter(|(_, bit)| matches(&bit.peers))
            .fold(0u128, |all, (n, _)| all | 1 << n)
    };
    if id < PREFIX_ID_BIT {
        let rules = collect(&|peers| peers.matches_identity(id, tables.index));
        return (rules != default).then_some(rules);
    }
    let net = tables.prefixes.net(id & !PREFIX_POD_BIT)?;
    let pod = id & PREFIX_POD_BIT != 0;
    let rules = collect(&|peers| peers.matches_prefix(net, pod, tables.learned));
    (rules != 0).then_some(rules)
}
