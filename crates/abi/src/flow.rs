use core::mem::size_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{ROW_NONE, limits::ENDPOINT_ROWS};

/// Bits of [`FlowValue::flags`].
pub mod flow_flags {
    /// The end that sorts higher opened the flow.
    pub const OPENER_HIGH: u32 = 1;
    /// A reply was seen: the flow is established.
    pub const REPLIED: u32 = 2;
    /// The opener's side sent FIN.
    pub const FIN_OPENER: u32 = 4;
    /// The other side sent FIN.
    pub const FIN_OTHER: u32 = 8;
    /// RST was seen, or both FINs: only a short time left.
    pub const CLOSING: u32 = 16;
    /// The opener addresses a Service; packets are rewritten to `nat_address` and back.
    pub const TRANSLATED: u32 = 32;
    /// The flow's close event was emitted.
    pub const CLOSE_LOGGED: u32 = 64;
    /// The sender is the node itself or a remote address: no egress policy of ours applies.
    pub const OPENER_REMOTE: u32 = 128;
    /// The flow goes through the proxy: this is its leg between the client and the proxy.
    pub const PROXIED: u32 = 256;
    /// The leg between the proxy and the server; its key says [`super::flow_direction::UPSTREAM`].
    pub const UPSTREAM: u32 = 512;
    /// No flow of its own, but what keeps a flow to a Service with its backend ([`TRANSLATED`]).
    pub const KEPT: u32 = 1024;
}

/// Values of [`FlowKey4::direction`] and [`FlowKey6::direction`].
pub mod flow_direction {
    /// Protocols whose flows need no more than their ends.
    pub const NONE: u8 = 0;
    /// ICMP: `low` asks.
    pub const LOW_ASKS: u8 = 1;
    /// ICMP: `high` asks.
    pub const HIGH_ASKS: u8 = 2;
    /// From the proxy to the server, with the ends that the client's own leg has.
    pub const UPSTREAM: u8 = 3;
}

/// Key of `FLOWS4*`: the flow's ends in ascending order of (address, port), so that both
/// directions meet the same entry.
///
/// ICMP echo: the requester's port is the identifier, the other's is 0, and `direction` says
/// which end asks; an Echo Request can thus never be taken for a reply.
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
#[repr(C, align(4))]
pub struct FlowKey4 {
    /// Lower address.
    pub low: [u8; 4],
    /// Higher address.
    pub high: [u8; 4],
    /// Port of `low`.
    pub low_port: u16,
    /// Port of `high`.
    pub high_port: u16,
    /// IP protocol.
    pub protocol: u8,
    /// One of [`flow_direction`].
    pub direction: u8,
    /// Zero.
    pub reserved: u16,
}

/// Key of `FLOWS6*`; see [`FlowKey4`].
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
#[repr(C, align(4))]
pub struct FlowKey6 {
    /// Lower address.
    pub low: [u8; 16],
    /// Higher address.
    pub high: [u8; 16],
    /// Port of `low`.
    pub low_port: u16,
    /// Port of `high`.
    pub high_port: u16,
    /// IP protocol.
    pub protocol: u8,
    /// As in [`FlowKey4`].
    pub direction: u8,
    /// Zero.
    pub reserved: u16,
}

/// Value of `FLOWS*`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(8))]
pub struct FlowValue {
    /// Bits of [`flow_flags`].
    pub flags: u32,
    /// `jiffies` (its low 32 bits) after which the flow is gone.
    pub expires: u32,
    /// Row of the opener, `ROW_NONE` where it is not local.
    pub opener_row: u32,
    /// Row of the other end, `ROW_NONE` where it is not local.
    pub other_row: u32,
    /// Revision of the opener's row when its egress policy was asked; 0: not asked.
    pub opener_revision: u32,
    /// Revision of the other end's row when its ingress policy was asked; 0: not asked.
    pub other_revision: u32,
    /// Revision of the shard of the remote end's address, 0 where both ends are local. In the entry
    /// of the flow to a Service: the version of the Service's backends that had the backend last.
    pub shard_revision: u32,
    /// Shard of the remote end's address.
    pub shard: u32,
    /// Packets from the opener.
    pub packets: u64,
    /// Bytes from the opener, from the IP header on.
    pub bytes: u64,
    /// Packets from the other end.
    pub reply_packets: u64,
    /// Bytes from the other end, from the IP header on.
    pub reply_bytes: u64,
    /// Identity of the opener when it was judged.
    pub opener_identity: u32,
    /// Identity of the other end when it was judged.
    pub other_identity: u32,
    /// Translated flows: the address that is not in the key, of the Service in the entry of the
    /// real flow and of the backend in the entry of the flow to the Service.
    pub nat_address: [u8; 16],
    /// Port that goes with it.
    pub nat_port: u16,
    /// The node's port of a masqueraded flow; 0 where it has none.
    pub masquerade_port: u16,
    /// Zero.
    pub reserved2: u32,
}

impl FlowValue {
    /// The row of the endpoint to which the flow counts: who opened it, if it lives here.
    #[must_use]
    #[inline(always)]
    pub const fn payer(&self) -> u32 {
        if self.opener_row == ROW_NONE { self.other_row } else { self.opener_row }
    }
}

/// Value of `FLOW_COUNTS`: the TCP flows of a family. Who opens one adds one; the host counts anew
/// when it collects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FlowCounts {
    /// All of them.
    pub all: u64,
    /// Those of each row, see [`FlowValue::payer`].
    pub of_row: [u64; ENDPOINT_ROWS as usize],
}

impl FlowCounts {
    /// No flows.
    pub const NONE: Self = Self { all: 0, of_row: [0; ENDPOINT_ROWS as usize] };
    /// Index of those over IPv4.
    pub const IPV4: u32 = 0;
    /// Index of those over IPv6.
    pub const IPV6: u32 = 1;
}

const _: () = assert!(size_of::<FlowKey4>() == 16);
const _: () = assert!(size_of::<FlowKey6>() == 40);
const _: () = assert!(size_of::<FlowValue>() == 96);
