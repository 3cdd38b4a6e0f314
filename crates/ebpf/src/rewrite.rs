//! Writing other addresses and ports into packets, checksums included.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM},
    helpers::generated::{
        bpf_csum_diff, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_store_bytes,
    },
};
use palisade_abi::{Address, DropReason, protocol};

use crate::packet::{ETH_LEN, Packet, unmapped};

/// Which end of a packet to rewrite.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    Source,
    Destination,
}

impl End {
    #[inline(always)]
    fn of(self, packet: &Packet) -> (Address, u16) {
        match self {
            Self::Source => (packet.source, packet.source_port),
            Self::Destination => (packet.destination, packet.destination_port),
        }
    }

    /// Of an error, and of the packet that it quotes, one end is the other one's other end.
    #[inline(always)]
    fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }

    /// Where its address is, from the start of the IP header.
    #[inline(always)]
    fn address_at(self, ipv6: bool) -> u32 {
        match (self, ipv6) {
            (Self::Source, false) => 12,
            (Self::Destination, false) => 16,
            (Self::Source, true) => 8,
            (Self::Destination, true) => 24,
        }
    }

    /// Where its port is, from the start of the transport header.
    #[inline(always)]
    fn port_at(self, protocol: u8) -> u32 {
        match (protocol, self) {
            (protocol::ICMP | protocol::ICMPV6, _) => 4,
            (_, Self::Source) => 0,
            (_, Self::Destination) => 2,
        }
    }
}

/// What an end is known by.
pub struct Name {
    pub address: Address,
    pub port: u16,
}

/// Where the checksum is, from the start of the transport header.
#[inline(always)]
fn checksum_at(protocol: u8) -> Result<u32, DropReason> {
    match protocol {
        protocol::TCP => Ok(16),
        protocol::UDP => Ok(6),
        protocol::ICMP | protocol::ICMPV6 => Ok(2),
        _ => Err(DropReason::Malformed),
    }
}

/// Writes another address and port into the packet, and into `packet`. The port of an echo message
/// is its identifier, at whichever end that is.
#[inline(never)]
pub fn rewrite(
    skb: *mut __sk_buff,
    packet: &mut Packet,
    end: End,
    address: &Address,
    port: u16,
) -> Result<(), DropReason> {
    let (old_address, old_port) = end.of(packet);
    let checksum = packet.l4 + checksum_at(packet.protocol)?;
    let flags = if packet.protocol == protocol::UDP { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
    let mut failed = 0;
    if !packet.later_fragment {
        // The checksum of ICMP alone does not cover the addresses.
        if packet.protocol != protocol::ICMP {
            let flags = flags | u64::from(BPF_F_PSEUDO_HDR);
            failed |= fix_checksum(skb, checksum, &old_address, address, packet.ipv6, flags);
        }
        let at = packet.l4 + end.port_at(packet.protocol);
        failed |= put_port(skb, checksum, at, old_port, port, flags);
    }
    failed |= put_address(skb, ETH_LEN, end, packet.ipv6, &old_address, address);
    if failed != 0 {
        return Err(DropReason::Internal);
    }
    match end {
        End::Source => (packet.source, packet.source_port) = (*address, port),
        End::Destination => (packet.destination, packet.destination_port) = (*address, port),
    }
    Ok(())
}

/// As [`rewrite`], in the packet that an ICMP error quotes, which went the other way, and in the
/// error itself where that has the same end. The checksum in the quoted transport header stays as
/// it is: it may be cut off, and nobody looks.
#[inline(never)]
pub fn rewrite_error(
    skb: *mut __sk_buff,
    error: &Packet,
    quoted: &Packet,
    end: End,
    name: &Name,
) -> Result<(), DropReason> {
    let Name { address, port } = name;
    let (old_address, old_port) = end.other().of(quoted);
    let checksum = error.l4 + 2;
    let at = quoted.l4 + end.other().port_at(quoted.protocol);
    let mut failed = put_port(skb, checksum, at, old_port, *port, 0);
    if error.ipv6 {
        failed |= fix_checksum(skb, checksum, &old_address, address, true, 0);
    }
    let inner = error.l4 + 8;
    failed |= put_address(skb, inner, end.other(), error.ipv6, &old_address, address);
    if end.of(error).0 == old_address {
        if error.ipv6 {
            let pseudo = u64::from(BPF_F_PSEUDO_HDR);
            failed |= fix_checksum(skb, checksum, &old_address, address, true, pseudo);
        }
        failed |= put_address(skb, ETH_LEN, end, error.ipv6, &old_address, address);
    }
    if failed != 0 { Err(DropReason::Internal) } else { Ok(()) }
}

/// Makes a transport checksum, at `at`, right for another address.
#[inline(always)]
fn fix_checksum(
    skb: *mut __sk_buff,
    at: u32,
    old: &Address,
    new: &Address,
    ipv6: bool,
    flags: u64,
) -> i64 {
    // SAFETY: the helpers check the offset against the packet; pointers are to live values.
    unsafe {
        if ipv6 {
            let (old, new) = (old.as_ptr().cast_mut().cast(), new.as_ptr().cast_mut().cast());
            let diff = bpf_csum_diff(old, 16, new, 16, 0);
            return bpf_l4_csum_replace(skb, at, 0, diff as u64, flags);
        }
        let (old, new) = (u32::from_ne_bytes(unmapped(old)), u32::from_ne_bytes(unmapped(new)));
        bpf_l4_csum_replace(skb, at, u64::from(old), u64::from(new), flags | 4)
    }
}

#[inline(always)]
fn put_port(skb: *mut __sk_buff, checksum: u32, at: u32, old: u16, new: u16, flags: u64) -> i64 {
    // SAFETY: the helpers check their offsets against the packet; the pointer is to a live local.
    unsafe {
        bpf_l4_csum_replace(skb, checksum, u64::from(old), u64::from(new), flags | 2)
            | bpf_skb_store_bytes(skb, at, (&raw const new).cast(), 2, 0)
    }
}

/// Writes an address into the IP header that begins at `header`.
#[inline(always)]
fn put_address(
    skb: *mut __sk_buff,
    header: u32,
    end: End,
    ipv6: bool,
    old: &Address,
    new: &Address,
) -> i64 {
    let at = header + end.address_at(ipv6);
    // SAFETY: the helpers check their offsets against the packet; pointers are to live values.
    unsafe {
        if ipv6 {
            // Where the network card summed the packet, the kernel takes the transport checksum's
            // change for one of the sum, as it is in IPv4 (`inet_proto_csum_replace_by_diff`);
            // counting the address in as well makes up for it.
            let flags = if header == ETH_LEN { u64::from(BPF_F_RECOMPUTE_CSUM) } else { 0 };
            return bpf_skb_store_bytes(skb, at, new.as_ptr().cast(), 16, flags);
        }
        let (old, new) = (unmapped(old), unmapped(new));
        let (from, to) = (u32::from_ne_bytes(old), u32::from_ne_bytes(new));
        bpf_l3_csum_replace(skb, header + 10, u64::from(from), u64::from(to), 4)
            | bpf_skb_store_bytes(skb, at, new.as_ptr().cast(), 4, 0)
    }
}
