//! Services. A Service's backends are numbered under a *version*; a change writes the backends of
//! a new version, then points the Service at it in one write, then removes the old version.

use core::mem::size_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Address;

/// Bits of [`ServiceValue::flags`].
pub mod service_flags {
    /// Session affinity by client address.
    pub const AFFINITY: u32 = 1;
}

/// Key of `SERVICES`.
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
pub struct ServiceKey {
    /// Service address.
    pub address: Address,
    /// Port, network byte order.
    pub port: u16,
    /// IP protocol.
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

/// Value of `SERVICES`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ServiceValue {
    /// Version of the backends.
    pub version: u32,
    /// Number of backends; with 0 connections are refused.
    pub backends: u32,
    /// Bits of [`service_flags`].
    pub flags: u32,
    /// Seconds that an affinity lasts.
    pub affinity_seconds: u32,
}

/// Key of `BACKENDS`.
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
pub struct BackendKey {
    /// Version, see [`ServiceValue::version`].
    pub version: u32,
    /// Number of the backend, counted from 0 in ascending order of addresses and ports: they are
    /// searched.
    pub index: u32,
}

/// Value of `BACKENDS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BackendValue {
    /// Address.
    pub address: Address,
    /// Port, network byte order.
    pub port: u16,
    /// Zero.
    pub reserved: u16,
}

/// Key of `SOCKETS`: a socket and the backend that it talks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct SocketKey {
    /// Socket cookie (`bpf_get_socket_cookie`).
    pub cookie: u64,
    /// Backend address.
    pub address: Address,
    /// Backend port, network byte order.
    pub port: u16,
    /// Zero.
    pub reserved: [u16; 3],
}

/// Value of `SOCKETS`: the Service that the socket asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SocketValue {
    /// Service address.
    pub address: Address,
    /// Service port, network byte order.
    pub port: u16,
    /// Zero.
    pub reserved: u16,
}

const _: () = assert!(size_of::<ServiceKey>() == 20);
const _: () = assert!(size_of::<ServiceValue>() == 16);
const _: () = assert!(size_of::<BackendKey>() == 8);
const _: () = assert!(size_of::<BackendValue>() == 20);
const _: () = assert!(size_of::<SocketKey>() == 32);
const _: () = assert!(size_of::<SocketValue>() == 20);
