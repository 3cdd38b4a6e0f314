//! Masquerading: pods reach what is outside the cluster with their node's address.

use core::mem::size_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Address;

/// First of the ports and ICMP identifiers that masqueraded flows have on the node; they reach to
/// the last one there is. These are the upper half of those that Linux gives to sockets by itself,
/// and the IANA's dynamic ones (RFC 6335, section 6). The node's own sockets get none of them: see
/// `net.ipv4.ip_local_reserved_ports`.
pub const MASQUERADE_FIRST_PORT: u16 = 0xc000;

/// Value of `MASQUERADE`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct MasqueradeSettings {
    /// The node's IPv4 address on the uplink; zero where it has none.
    pub ipv4: Address,
    /// The node's IPv6 address on the uplink; zero where it has none.
    pub ipv6: Address,
    /// 1: masquerade.
    pub enabled: u32,
}

/// Key of `MASQUERADED` and `MASQUERADED_TCP`: what comes back to the node's address, as it comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MasqueradeKey {
    /// Who was asked.
    pub remote: Address,
    /// Its port; 0 with ICMP.
    pub remote_port: u16,
    /// The node's port, or the ICMP identifier.
    pub port: u16,
    /// IP protocol.
    pub protocol: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// Value of `MASQUERADED` and `MASQUERADED_TCP`: the pod that asked. It counts only as long as its
/// flow lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MasqueradeValue {
    /// The pod's address.
    pub address: Address,
    /// The pod's port, or the ICMP identifier.
    pub port: u16,
    /// One of [`crate::flow_direction`], as in the key of the flow.
    pub direction: u8,
    /// Zero.
    pub reserved: u8,
}

const _: () = assert!(size_of::<MasqueradeSettings>() == 36);
const _: () = assert!(size_of::<MasqueradeKey>() == 24);
const _: () = assert!(size_of::<MasqueradeValue>() == 20);
