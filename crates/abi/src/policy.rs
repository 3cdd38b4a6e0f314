//! A compiled policy: for one group of endpoints and one direction, rules in the order of their
//! precedence, cut into chunks of [`CHUNK_RULES`]. In a chunk, bit *n* of every bitmap stands for
//! rule *n*. A peer has a bitmap of the rules that match it, a port has one too; the verdict is
//! the lowest bit set in both, and the bitmaps `deny` and `redirect` say which kind of rule it is. No bit set in
//! any chunk: default deny.

use core::mem::size_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A row's table before it was ever programmed: drop with `PolicyMissing`.
pub const TABLE_NONE: u32 = 0;
/// No policy selects the endpoint in this direction: allow.
pub const TABLE_ALLOW_ALL: u32 = 1;

/// Rules in a chunk.
pub const CHUNK_RULES: u32 = 128;
/// Chunks of a table. A group with more rules is refused and locked down.
pub const MAX_CHUNKS: u32 = 32;
/// Rule number of a verdict that no rule made (default deny, or no policy at all).
pub const RULE_NONE: u32 = u32::MAX;

/// Set in the numbers of policy prefixes, which share the space of [`PeerKey::id`] with
/// identities.
pub const PREFIX_ID_BIT: u32 = 1 << 24;
/// Added to a prefix number when the address is a pod's, a node's or unknown: the rules of
/// `NetworkPolicy` `ipBlock` match such addresses, those of `cilium.io` CIDRs do not.
pub const PREFIX_POD_BIT: u32 = 1 << 25;

/// Reserved identities (numbers as in `cilium.io/v2`).
pub mod identity {
    /// Not known (yet): matched by the rules for anybody and by every deny rule.
    pub const UNKNOWN: u32 = 0;
    /// The node that the endpoint runs on.
    pub const HOST: u32 = 1;
    /// Outside the cluster, single-stack.
    pub const WORLD: u32 = 2;
    /// Pods that another plugin runs.
    pub const UNMANAGED: u32 = 3;
    /// Health probes.
    pub const HEALTH: u32 = 4;
    /// An endpoint whose labels are not known yet.
    pub const INIT: u32 = 5;
    /// Another node of the cluster.
    pub const REMOTE_NODE: u32 = 6;
    /// Another node of the cluster, which the API server runs on.
    pub const KUBE_APISERVER: u32 = 7;
    /// An ingress proxy.
    pub const INGRESS: u32 = 8;
    /// Outside the cluster, IPv4.
    pub const WORLD_IPV4: u32 = 9;
    /// Outside the cluster, IPv6.
    pub const WORLD_IPV6: u32 = 10;
    /// Lowest number of an identity that is allocated in the cluster.
    pub const CLUSTER_MIN: u32 = 256;
    /// Highest number of an identity that is allocated in the cluster.
    pub const CLUSTER_MAX: u32 = 65_535;

    /// Whether the identity is one of the world's.
    #[must_use]
    pub const fn is_world(identity: u32) -> bool {
        matches!(identity, WORLD | WORLD_IPV4 | WORLD_IPV6)
    }
}

/// IP protocol numbers that have ports or types here (IANA).
pub mod protocol {
    /// ICMP: the "port" is the message type.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// ICMPv6: the "port" is the message type.
    pub const ICMPV6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// Key of `CHUNKS`.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(C)]
pub struct ChunkKey {
    /// Table, 2 or more.
    pub table: u32,
    /// Chunk, counted from 0.
    pub chunk: u32,
}

/// Value of `CHUNKS`. Bitmaps are two words, the lower bits first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ChunkValue {
    /// Rules that match a peer without an entry of its own.
    pub default_peers: [u64; 2],
    /// Rules that match a protocol and port without an entry of its own.
    pub default_ports: [u64; 2],
    /// Rules that deny.
    pub deny: [u64; 2],
    /// Rules that allow what the proxy agrees to.
    pub redirect: [u64; 2],
    /// Bit *n* (0..=15): some port entry of the chunk has a prefix of *n* bits. Bit 16: some port
    /// entry is a whole port. Looked up from the longest to the shortest; the first entry found
    /// holds the rules of the shorter ones too.
    pub port_prefixes: u32,
    /// Chunks of the whole table.
    pub chunks: u32,
}

/// Key of `PEERS`.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(C)]
pub struct PeerKey {
    /// Table.
    pub table: u32,
    /// Chunk.
    pub chunk: u32,
    /// Identity, or prefix number (with [`PREFIX_POD_BIT`] or without).
    pub id: u32,
}

/// Value of `PEERS`: the rules that match the peer, all of them. A peer's bitmap is that of its
/// identity (the chunk's default where it has none) OR that of its prefix (nothing where it has
/// none).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PeerValue {
    /// Bitmap.
    pub rules: [u64; 2],
}

/// Key of `PORTS`.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(C)]
pub struct PortKey {
    /// Table.
    pub table: u32,
    /// Chunk.
    pub chunk: u16,
    /// Leading bits of `port` that count, 0 to 16; the rest of `port` is zero.
    pub prefix_len: u8,
    /// IP protocol.
    pub protocol: u8,
    /// Destination port, or ICMP type, in host byte order.
    pub port: u16,
    /// Zero.
    pub reserved: u16,
}

/// Value of `PORTS`: the rules that match the protocol and port, all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PortValue {
    /// Bitmap.
    pub rules: [u64; 2],
}

const _: () = assert!(size_of::<ChunkKey>() == 8);
const _: () = assert!(size_of::<ChunkValue>() == 72);
const _: () = assert!(size_of::<PeerKey>() == 12);
const _: () = assert!(size_of::<PeerValue>() == 16);
const _: () = assert!(size_of::<PortKey>() == 12);
const _: () = assert!(size_of::<PortValue>() == 16);
