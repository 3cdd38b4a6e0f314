use core::mem::size_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Address;

/// What an [`Event`] tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EventKind {
    /// A flow was allowed and entered the table.
    Open = 1,
    /// A flow ended; the counters are final.
    Close = 2,
    /// A packet was dropped.
    Drop = 3,
}

impl EventKind {
    /// The kind with this number.
    #[must_use]
    pub const fn from_u8(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Open),
            2 => Some(Self::Close),
            3 => Some(Self::Drop),
            _ => None,
        }
    }
}

/// Bits of [`Event::flags`].
pub mod event_flags {
    /// Judged where the packet left an endpoint (`from_pod`); else where it entered one.
    pub const EGRESS: u8 = 1;
    /// The packet goes from the other end to the opener.
    pub const REPLY: u8 = 2;
    /// The flow had been allowed before and was judged again.
    pub const REJUDGED: u8 = 4;
    /// Addresses are IPv6.
    pub const IPV6: u8 = 8;
    /// The flow goes through the proxy.
    pub const PROXIED: u8 = 16;
}

/// One record of the `EVENTS` ring: always in the direction of the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Event {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub time: u64,
    /// Source.
    pub source: Address,
    /// Destination.
    pub destination: Address,
    /// Source port or ICMP type, host byte order.
    pub source_port: u16,
    /// Destination port or ICMP type, host byte order.
    pub destination_port: u16,
    /// IP protocol.
    pub protocol: u8,
    /// [`EventKind`].
    pub kind: u8,
    /// [`crate::DropReason`] of a drop, else 0.
    pub reason: u8,
    /// Bits of [`event_flags`].
    pub flags: u8,
    /// Identity of the source.
    pub source_identity: u32,
    /// Identity of the destination.
    pub destination_identity: u32,
    /// Row of the source, or `ROW_NONE`.
    pub source_row: u32,
    /// Row of the destination, or `ROW_NONE`.
    pub destination_row: u32,
    /// Table that judged the sender's egress, 0 where none was asked.
    pub egress_table: u32,
    /// Rule in it (chunk × 128 + bit), or `RULE_NONE`.
    pub egress_rule: u32,
    /// Table that judged the receiver's ingress, 0 where none was asked.
    pub ingress_table: u32,
    /// Rule in it, or `RULE_NONE`.
    pub ingress_rule: u32,
    /// TCP flags of the packet.
    pub tcp_flags: u8,
    /// Zero.
    pub reserved: [u8; 7],
    /// Packets from the opener (Close).
    pub packets: u64,
    /// Bytes from the opener (Close).
    pub bytes: u64,
    /// Packets from the other end (Close).
    pub reply_packets: u64,
    /// Bytes from the other end (Close).
    pub reply_bytes: u64,
}

const _: () = assert!(size_of::<Event>() == 120);

impl Event {
    /// Fills what a flow knows of its ends, in the direction of the packet.
    #[inline(always)]
    pub fn fill_flow(&mut self, flow: &crate::FlowValue, from_opener: bool, egress: bool) {
        let opener = (flow.opener_identity, flow.opener_row);
        let other = (flow.other_identity, flow.other_row);
        let (source, destination) = if from_opener { (opener, other) } else { (other, opener) };
        (self.source_identity, self.source_row) = source;
        (self.destination_identity, self.destination_row) = destination;
        self.packets = flow.packets;
        self.bytes = flow.bytes;
        self.reply_packets = flow.reply_packets;
        self.reply_bytes = flow.reply_bytes;
        if !from_opener {
            self.flags |= event_flags::REPLY;
        }
        if egress {
            self.flags |= event_flags::EGRESS;
        }
        if flow.flags & crate::flow_flags::PROXIED != 0 {
            self.flags |= event_flags::PROXIED;
        }
    }
}
