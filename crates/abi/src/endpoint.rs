use core::mem::size_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// An IP address; IPv4 is IPv4-mapped.
pub type Address = [u8; 16];

/// Row of no endpoint: a remote or unknown address.
pub const ROW_NONE: u32 = 0;
/// Row of the node's own network namespace.
pub const ROW_HOST: u32 = 1;
/// Node of an address that lies on no other node.
pub const NODE_NONE: u32 = 0;

/// Bits of [`EndpointRow::flags`].
pub mod row_flags {
    /// The row describes a live endpoint; without it every packet of the row is dropped.
    pub const VALID: u32 = 1;
    /// The row is the node itself.
    pub const HOST: u32 = 2;
}

/// Key of `ENDPOINTS`: the exact address of a pod or node anywhere in the cluster.
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
pub struct EndpointKey {
    /// The address.
    pub address: Address,
}

/// Value of `ENDPOINTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct EndpointValue {
    /// Security identity.
    pub identity: u32,
    /// Longest policy prefix that covers the address (a number with [`crate::PREFIX_ID_BIT`]
    /// set), or 0.
    pub prefix: u32,
    /// Row of a local endpoint, [`ROW_HOST`] for the node's own addresses, else [`ROW_NONE`].
    pub row: u32,
    /// Node that the address lies on, for the flow log; [`NODE_NONE`] for this one.
    pub node: u32,
}

/// Value of `ENDPOINT_ROWS`: all that a packet needs of a local endpoint.
///
/// `revision` starts at 1 and is bumped after each write of what a verdict depends on: the row's
/// tables, or the content of those tables. A flow that was judged under another revision is
/// judged again.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(8))]
pub struct EndpointRow {
    /// Compiled policy for traffic to the endpoint: a table number, or one of `TABLE_*`.
    pub ingress_table: u32,
    /// Compiled policy for traffic from the endpoint.
    pub egress_table: u32,
    /// See the type.
    pub revision: u32,
    /// Host-side interface.
    pub ifindex: u32,
    /// Security identity.
    pub identity: u32,
    /// Bits of [`row_flags`].
    pub flags: u32,
    /// Endpoint number that people see (`endpoint list`).
    pub endpoint: u32,
    /// MAC address of the interface inside the endpoint.
    pub mac: [u8; 6],
    /// MAC address of the host-side interface.
    pub host_mac: [u8; 6],
    /// IPv4 address, zero when it has none.
    pub ipv4: [u8; 4],
    /// IPv6 address, zero when it has none.
    pub ipv6: [u8; 16],
    /// Zero.
    pub reserved: u32,
}

/// Key of `IPCACHE`, as `BPF_MAP_TYPE_LPM_TRIE` wants it.
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
pub struct IpcacheKey {
    /// Bits of `address` that count, in host byte order: 96 + n for an IPv4 prefix of n bits.
    pub prefix_len: u32,
    /// The network.
    pub address: Address,
}

/// Value of `IPCACHE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IpcacheValue {
    /// Security identity: a world identity, or [`crate::identity::UNKNOWN`] inside the cluster's
    /// own pod networks.
    pub identity: u32,
    /// As [`EndpointValue::prefix`].
    pub prefix: u32,
}

const _: () = assert!(size_of::<EndpointKey>() == 16);
const _: () = assert!(size_of::<EndpointValue>() == 16);
const _: () = assert!(size_of::<EndpointRow>() == 64);
const _: () = assert!(size_of::<IpcacheKey>() == 20);
const _: () = assert!(size_of::<IpcacheValue>() == 8);
