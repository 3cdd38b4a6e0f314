//! The flow cache: one entry for both directions of a flow, which holds the verdicts of both its
//! ends together with the revisions that they were made under.

use core::arch::asm;

use palisade_abi::{
    Address, DropReason, FlowCounts, FlowKey4, FlowKey6, FlowValue, ROW_NONE, flow_direction,
    flow_flags, limits, protocol,
};

use crate::{
    clock,
    maps::{ENDPOINT_ROWS, FLOW_COUNTS, FLOWS4, FLOWS4_ANY, FLOWS6, FLOWS6_ANY, SHARDS},
    packet::{FIN, Kind, Packet, RST, unmapped},
};

/// Lifetimes in seconds.
mod lifetime {
    /// TCP until the first reply.
    pub const SYN: u32 = 60;
    /// TCP between its segments, as long as the kernel's own keep-alive default.
    pub const ESTABLISHED: u32 = 8000;
    /// TCP after RST or both FINs: time for what is still under way.
    pub const CLOSING: u32 = 10;
    /// Other protocols until the first reply.
    pub const UNREPLIED: u32 = 30;
    /// Other protocols between packets.
    pub const REPLIED: u32 = 120;
}

/// Lifetime in seconds of the entry that keeps a flow with its backend, from each packet of the
/// client's on, and with UDP of the backend's.
#[inline(always)]
pub fn translation_lifetime(tcp: bool, opening: bool) -> u32 {
    match (tcp, opening) {
        (true, true) => lifetime::SYN,
        (true, false) => lifetime::ESTABLISHED,
        (false, _) => lifetime::REPLIED,
    }
}

/// Which end of the key the source of the packet is.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Side {
    Low,
    High,
}

#[inline(always)]
pub fn key4(
    source: [u8; 4],
    destination: [u8; 4],
    source_port: u16,
    destination_port: u16,
    protocol: u8,
) -> (FlowKey4, Side) {
    let low_first = (u32::from_be_bytes(source), u16::from_be(source_port))
        <= (u32::from_be_bytes(destination), u16::from_be(destination_port));
    let key = if low_first {
        FlowKey4 {
            low: source,
            high: destination,
            low_port: source_port,
            high_port: destination_port,
            protocol,
            direction: 0,
            reserved: 0,
        }
    } else {
        FlowKey4 {
            low: destination,
            high: source,
            low_port: destination_port,
            high_port: source_port,
            protocol,
            direction: 0,
            reserved: 0,
        }
    };
    (key, if low_first { Side::Low } else { Side::High })
}

#[inline(always)]
pub fn halves(address: &Address) -> (u64, u64) {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *address;
    (u64::from_be_bytes([a, b, c, d, e, f, g, h]), u64::from_be_bytes([i, j, k, l, m, n, o, p]))
}

#[inline(always)]
pub fn key6(
    source: &Address,
    destination: &Address,
    source_port: u16,
    destination_port: u16,
    protocol: u8,
) -> (FlowKey6, Side) {
    let (source_high, source_low) = halves(source);
    let (destination_high, destination_low) = halves(destination);
    let low_first = (source_high, source_low, u16::from_be(source_port))
        <= (destination_high, destination_low, u16::from_be(destination_port));
    let key = if low_first {
        FlowKey6 {
            low: *source,
            high: *destination,
            low_port: source_port,
            high_port: destination_port,
            protocol,
            direction: 0,
            reserved: 0,
        }
    } else {
        FlowKey6 {
            low: *destination,
            high: *source,
            low_port: destination_port,
            high_port: source_port,
            protocol,
            direction: 0,
            reserved: 0,
        }
    };
    (key, if low_first { Side::Low } else { Side::High })
}

#[inline(always)]
fn direction(kind: Kind, side: Side) -> u8 {
    match (kind, side) {
        (Kind::EchoRequest, Side::Low) | (Kind::EchoReply, Side::High) => 1,
        (Kind::EchoRequest, Side::High) | (Kind::EchoReply, Side::Low) => 2,
        _ => 0,
    }
}

/// A packet's key in the table of its family and protocol.
#[repr(C)]
pub struct Key {
    v4: FlowKey4,
    v6: FlowKey6,
    ipv6: bool,
    tcp: bool,
}

impl Key {
    /// Becomes the key of `packet`.
    #[inline(never)]
    pub fn set(&mut self, packet: &Packet) -> Side {
        self.ipv6 = packet.ipv6;
        self.tcp = packet.protocol == protocol::TCP;
        let (source_port, destination_port) = (packet.source_port, packet.destination_port);
        if packet.ipv6 {
            let (source, destination) = (&packet.source, &packet.destination);
            let (key, side) =
                key6(source, destination, source_port, destination_port, packet.protocol);
            self.v6 = key;
            self.v6.direction = direction(packet.kind, side);
            return side;
        }
        let (source, destination) = (unmapped(&packet.source), unmapped(&packet.destination));
        let (key, side) = key4(source, destination, source_port, destination_port, packet.protocol);
        self.v4 = key;
        self.v4.direction = direction(packet.kind, side);
        side
    }

    /// Becomes the key of what the proxy opened in the name of that flow's opener.
    #[inline(always)]
    pub fn set_upstream(&mut self) {
        if self.ipv6 {
            self.v6.direction = flow_direction::UPSTREAM;
        } else {
            self.v4.direction = flow_direction::UPSTREAM;
        }
    }

    /// Whether it is a TCP flow's.
    #[inline(always)]
    pub fn tcp(&self) -> bool {
        self.tcp
    }

    #[inline(never)]
    pub fn find(&self) -> Option<*mut FlowValue> {
        match (self.ipv6, self.tcp) {
            (false, true) => FLOWS4.get_ptr_mut(&self.v4),
            (false, false) => FLOWS4_ANY.get_ptr_mut(&self.v4),
            (true, true) => FLOWS6.get_ptr_mut(&self.v6),
            (true, false) => FLOWS6_ANY.get_ptr_mut(&self.v6),
        }
    }

    /// Enters a flow. One that is new, not in the place of another, counts to its endpoint, unless
    /// it is of those that give way by themselves (LRU).
    #[inline(never)]
    pub fn enter(&self, value: &FlowValue, new: bool) -> Result<(), DropReason> {
        let [all, own] = self.counts(value.payer()).ok_or(DropReason::Internal)?;
        let counts = new && self.tcp;
        let per_free = match value.opener_row {
            ROW_NONE => limits::FLOWS_TCP_FROM_ELSEWHERE_PER_FREE,
            _ => limits::FLOWS_TCP_PER_FREE,
        };
        // SAFETY: live map values; a few flows too many at the same time do not matter.
        let (all_now, own_now) = unsafe { (all.read_volatile(), own.read_volatile()) };
        let free = u64::from(limits::FLOWS_TCP).saturating_sub(all_now);
        if counts && own_now >= per_free * free {
            return Err(DropReason::TooManyFlows);
        }
        self.insert(value).map_err(|_| DropReason::FlowTableFull)?;
        if counts {
            // SAFETY: live map values.
            unsafe {
                add_one(all);
                add_one(own);
            }
        }
        Ok(())
    }

    /// How many TCP flows of the family there are, in all and of a row.
    #[inline(always)]
    fn counts(&self, row: u32) -> Option<[*mut u64; 2]> {
        const { assert!(limits::ENDPOINT_ROWS.is_power_of_two()) };
        let family = if self.ipv6 { FlowCounts::IPV6 } else { FlowCounts::IPV4 };
        let counts = FLOW_COUNTS.get_ptr_mut(family)?;
        // All rows are below; the verifier does not see it from a comparison.
        let row = row & (limits::ENDPOINT_ROWS - 1);
        // SAFETY: a live map value.
        Some(unsafe { [&raw mut (*counts).all, &raw mut (*counts).of_row[row as usize]] })
    }

    #[inline(always)]
    fn insert(&self, value: &FlowValue) -> Result<(), i32> {
        match (self.ipv6, self.tcp) {
            (false, true) => FLOWS4.insert(&self.v4, value, 0),
            (false, false) => FLOWS4_ANY.insert(&self.v4, value, 0),
            (true, true) => FLOWS6.insert(&self.v6, value, 0),
            (true, false) => FLOWS6_ANY.insert(&self.v6, value, 0),
        }
    }
}

/// Adds one, whoever else does so meanwhile. Rust has no atomic types for this target.
///
/// # Safety
/// `count` points at a live value.
#[inline(always)]
unsafe fn add_one(count: *mut u64) {
    // SAFETY: the caller's.
    unsafe { asm!("lock *(u64 *)({} + 0) += {}", in(reg) count, in(reg) 1_u64, options(nostack)) };
}

#[inline(always)]
pub fn from_opener(flow: &FlowValue, side: Side) -> bool {
    (flow.flags & flow_flags::OPENER_HIGH != 0) == (side == Side::High)
}

#[inline(always)]
fn row_revision(row: u32) -> u32 {
    ENDPOINT_ROWS.get(row).map_or(0, |row| row.revision)
}

/// Whether nothing that the flow's verdicts depend on has changed since they were made. Row 0
/// keeps revision 0, so an end without a row always agrees; an end whose policy was never asked
/// holds 0 where its row has 1 or more, and never does.
#[inline(always)]
pub fn fresh(flow: &FlowValue) -> bool {
    row_revision(flow.opener_row) == flow.opener_revision
        && row_revision(flow.other_row) == flow.other_revision
        && (flow.shard_revision == 0 || shard_revision(flow.shard) == flow.shard_revision)
}

/// Of no shard at any time: a flow that holds it is judged again.
pub const NO_SHARD_REVISION: u32 = 0x8000_0000;

/// Never 0, which stands for "no shard".
#[inline(always)]
pub fn shard_revision(shard: u32) -> u32 {
    SHARDS.get(shard).map_or(1, |revision| revision.wrapping_add(1) | 0x8000_0000)
}

/// The shard of a remote address. The host's side computes the same.
#[inline(always)]
pub fn shard_of(address: &Address) -> u32 {
    let (high, low) = halves(address);
    let mixed = (high ^ low.rotate_left(17)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 40) as u32 & (limits::SHARDS - 1)
}

/// Counts a packet and moves the flow's state. True: the flow just closed.
#[inline(always)]
pub fn advance(
    flow: &mut FlowValue,
    opener: bool,
    length: u32,
    tcp: bool,
    tcp_flags: u8,
    now: u32,
) -> bool {
    if opener {
        flow.packets += 1;
        flow.bytes += u64::from(length);
    } else {
        flow.reply_packets += 1;
        flow.reply_bytes += u64::from(length);
        if flow.flags & flow_flags::REPLIED == 0 {
            flow.flags |= flow_flags::REPLIED;
        }
    }
    if tcp && tcp_flags & (FIN | RST) != 0 {
        return close(flow, opener, tcp_flags, now);
    }
    if flow.flags & flow_flags::CLOSING == 0 {
        flow.expires = now.wrapping_add(lifetime(flow.flags, tcp));
    }
    false
}

#[inline(always)]
fn lifetime(flags: u32, tcp: bool) -> u32 {
    let replied = flags & flow_flags::REPLIED != 0;
    clock::seconds(match (tcp, replied) {
        (true, true) => lifetime::ESTABLISHED,
        (true, false) => lifetime::SYN,
        (false, true) => lifetime::REPLIED,
        (false, false) => lifetime::UNREPLIED,
    })
}

#[inline(always)]
fn close(flow: &mut FlowValue, opener: bool, tcp_flags: u8, now: u32) -> bool {
    flow.flags |= if opener { flow_flags::FIN_OPENER } else { flow_flags::FIN_OTHER };
    let both = flow_flags::FIN_OPENER | flow_flags::FIN_OTHER;
    if tcp_flags & RST == 0 && flow.flags & both != both {
        return false;
    }
    if flow.flags & flow_flags::CLOSING == 0 {
        flow.flags |= flow_flags::CLOSING;
        flow.expires = now.wrapping_add(clock::seconds(lifetime::CLOSING));
    }
    let logged = flow.flags & flow_flags::CLOSE_LOGGED != 0;
    flow.flags |= flow_flags::CLOSE_LOGGED;
    !logged
}

/// The row in a flow: only a local endpoint's counts, the node's own does not.
#[inline(always)]
pub fn endpoint_row(row: u32) -> u32 {
    if row >= 2 { row } else { ROW_NONE }
}
