//! Reading packets. [`Headers`] is the quick look at the usual packet, straight from the packet's
//! linear part; [`read`] takes everything else (options, extension headers, fragments, ICMP) with
//! `bpf_skb_load_bytes`, which also reaches beyond the linear part.

use core::mem::{MaybeUninit, size_of};

use aya_ebpf::{bindings::__sk_buff, helpers::generated::bpf_skb_load_bytes};
use palisade_abi::{Address, DropReason, FragmentKey, FragmentValue, protocol};

use crate::maps::FRAGMENTS;

pub const ETH_LEN: u32 = 14;
/// Values of `skb->protocol`, which is in network byte order.
pub const ETH_P_IP: u32 = (0x0800_u16).to_be() as u32;
pub const ETH_P_IPV6: u32 = (0x86dd_u16).to_be() as u32;
pub const ETH_P_ARP: u32 = (0x0806_u16).to_be() as u32;

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

const IPPROTO_HOPOPTS: u8 = 0;
const IPPROTO_ROUTING: u8 = 43;
const IPPROTO_FRAGMENT: u8 = 44;
const IPPROTO_DSTOPTS: u8 = 60;

/// What a packet is, apart from its addresses and ports.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// May open a flow or belong to one.
    Plain,
    /// An ICMP echo request.
    EchoRequest,
    /// An ICMP echo reply: only ever part of a flow.
    EchoReply,
    /// An ICMP error about a flow.
    IcmpError,
    /// Another ICMP message: judged by itself.
    IcmpOther,
}

/// The facts of a packet that the slow path works with.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Packet {
    pub source: Address,
    pub destination: Address,
    /// Network byte order; echo messages: the identifier on the requester's side.
    pub source_port: u16,
    pub destination_port: u16,
    /// Bytes from the IP header on.
    pub length: u32,
    /// Offset of the transport header from the start of the frame.
    pub l4: u32,
    pub protocol: u8,
    pub tcp_flags: u8,
    pub icmp_type: u8,
    pub kind: Kind,
    pub ipv6: bool,
    /// A fragment that is not the first: it has no transport header.
    pub later_fragment: bool,
    pub more_fragments: bool,
    pub hop_limit: u8,
    pub fragment_id: u32,
}

/// Reads `T` at `offset` of the frame.
#[inline(always)]
pub fn load<T: Copy>(skb: *mut __sk_buff, offset: u32) -> Result<T, DropReason> {
    let mut value = MaybeUninit::<T>::uninit();
    // SAFETY: the helper fills `size_of::<T>()` bytes or fails; every `T` here is plain integers
    // and byte arrays, for which any bytes are a value.
    unsafe {
        if bpf_skb_load_bytes(
            skb.cast_const().cast(),
            offset,
            value.as_mut_ptr().cast(),
            size_of::<T>() as u32,
        ) != 0
        {
            return Err(DropReason::Malformed);
        }
        Ok(value.assume_init())
    }
}

#[inline(always)]
pub fn mapped(ipv4: [u8; 4]) -> Address {
    let [a, b, c, d] = ipv4;
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

#[inline(always)]
pub fn unmapped(address: &Address) -> [u8; 4] {
    [address[12], address[13], address[14], address[15]]
}

#[inline(always)]
fn be16(bytes: [u8; 2]) -> u16 {
    u16::from_be_bytes(bytes)
}

/// Reads the IP and transport headers that start at `offset`.
///
/// `inner` reads the packet that an ICMP error quotes: its transport header may be cut after
/// eight bytes and its length is not to be believed.
///
/// A function of its own, with its result in memory: the verifier then forgets which way through
/// the headers it came, and what follows is walked once.
#[inline(never)]
pub fn read(
    skb: *mut __sk_buff,
    packet: &mut Packet,
    offset: u32,
    ipv6: bool,
    inner: bool,
) -> Result<(), DropReason> {
    packet.ipv6 = ipv6;
    packet.later_fragment = false;
    packet.more_fragments = false;
    packet.tcp_flags = 0;
    packet.icmp_type = 0;
    packet.source_port = 0;
    packet.destination_port = 0;
    packet.kind = Kind::Plain;
    packet.fragment_id = 0;
    if ipv6 {
        read_ipv6(skb, packet, offset)?
    } else {
        read_ipv4(skb, packet, offset)?
    }
    if !inner {
        // SAFETY: a live context.
        let frame = unsafe { (*skb).len };
        if packet.l4 > frame || packet.length.wrapping_add(offset) > frame {
            return Err(DropReason::Malformed);
        }
    }
    if packet.later_fragment {
        return later_fragment(packet);
    }
    read_transport(skb, packet, inner)?;
    if packet.more_fragments && !inner {
        remember_fragment(packet);
    }
    Ok(())
}

#[inline(always)]
fn read_ipv4(skb: *mut __sk_buff, packet: &mut Packet, offset: u32) -> Result<(), DropReason> {
    let header: [u8; 20] = load(skb, offset)?;
    let header_len = u32::from(header[0] & 0x0f) * 4;
    if header[0] >> 4 != 4 || header_len < 20 {
        return Err(DropReason::Malformed);
    }
    packet.length = u32::from(be16([header[2], header[3]]));
    if packet.length < header_len {
        return Err(DropReason::Malformed);
    }
    let fragment = be16([header[6], header[7]]);
    packet.later_fragment = fragment & 0x1fff != 0;
    packet.more_fragments = fragment & 0x2000 != 0;
    packet.fragment_id = u32::from(be16([header[4], header[5]]));
    packet.hop_limit = header[8];
    packet.protocol = header[9];
    packet.source = mapped([header[12], header[13], header[14], header[15]]);
    packet.destination = mapped([header[16], header[17], header[18], header[19]]);
    packet.l4 = offset + header_len;
    Ok(())
}

#[inline(always)]
fn read_ipv6(skb: *mut __sk_buff, packet: &mut Packet, offset: u32) -> Result<(), DropReason> {
    let first: [u8; 8] = load(skb, offset)?;
    if first[0] >> 4 != 6 {
        return Err(DropReason::Malformed);
    }
    packet.length = 40 + u32::from(be16([first[4], first[5]]));
    packet.hop_limit = first[7];
    packet.source = load(skb, offset + 8)?;
    packet.destination = load(skb, offset + 24)?;
    let mut next = first[6];
    let mut l4 = offset + 40;
    // A chain longer than this is no packet that anybody needs.
    for _ in 0..5 {
        match next {
            IPPROTO_HOPOPTS | IPPROTO_DSTOPTS => {
                let option: [u8; 2] = load(skb, l4)?;
                next = option[0];
                l4 += (u32::from(option[1]) + 1) * 8;
            }
            IPPROTO_FRAGMENT => {
                let header: [u8; 8] = load(skb, l4)?;
                next = header[0];
                let bits = be16([header[2], header[3]]);
                packet.later_fragment = bits & 0xfff8 != 0;
                packet.more_fragments = bits & 1 != 0;
                packet.fragment_id =
                    u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
                l4 += 8;
                if packet.later_fragment {
                    break;
                }
            }
            // A source route could carry a packet past its judged destination (RFC 5095).
            IPPROTO_ROUTING => return Err(DropReason::ForbiddenProtocol),
            _ => break,
        }
    }
    // Whoever receives it walks on, to a protocol that nobody here has seen.
    let goes_on =
        matches!(next, IPPROTO_HOPOPTS | IPPROTO_DSTOPTS | IPPROTO_FRAGMENT | IPPROTO_ROUTING);
    if goes_on && !packet.later_fragment {
        return Err(DropReason::Malformed);
    }
    packet.protocol = next;
    packet.l4 = l4;
    Ok(())
}

#[inline(always)]
fn read_transport(skb: *mut __sk_buff, packet: &mut Packet, inner: bool) -> Result<(), DropReason> {
    match packet.protocol {
        protocol::TCP => {
            let ports: [u16; 2] = load(skb, packet.l4)?;
            packet.source_port = ports[0];
            packet.destination_port = ports[1];
            if !inner {
                // A first fragment too short for its flags is the tiny fragment attack (RFC 1858).
                packet.tcp_flags = load(skb, packet.l4 + 13)?;
            }
        }
        protocol::UDP | protocol::SCTP => {
            let ports: [u16; 2] = load(skb, packet.l4)?;
            packet.source_port = ports[0];
            packet.destination_port = ports[1];
        }
        protocol::ICMP if !packet.ipv6 => read_icmp(skb, packet, 8, 0, is_icmp_error)?,
        protocol::ICMPV6 if packet.ipv6 => read_icmp(skb, packet, 128, 129, is_icmpv6_error)?,
        _ => {}
    }
    Ok(())
}

fn is_icmp_error(kind: u8) -> bool {
    matches!(kind, 3 | 11 | 12)
}

fn is_icmpv6_error(kind: u8) -> bool {
    matches!(kind, 1..=4)
}

#[inline(always)]
fn read_icmp(
    skb: *mut __sk_buff,
    packet: &mut Packet,
    request: u8,
    reply: u8,
    is_error: impl Fn(u8) -> bool,
) -> Result<(), DropReason> {
    let header: [u8; 8] = load(skb, packet.l4)?;
    packet.icmp_type = header[0];
    let id = u16::from_ne_bytes([header[4], header[5]]);
    if header[0] == request {
        packet.kind = Kind::EchoRequest;
        packet.source_port = id;
    } else if header[0] == reply {
        packet.kind = Kind::EchoReply;
        packet.destination_port = id;
    } else if is_error(header[0]) {
        packet.kind = Kind::IcmpError;
    } else {
        packet.kind = Kind::IcmpOther;
    }
    Ok(())
}

#[inline(always)]
fn fragment_key(packet: &Packet) -> FragmentKey {
    FragmentKey {
        source: packet.source,
        destination: packet.destination,
        id: packet.fragment_id,
        protocol: u32::from(packet.protocol),
    }
}

/// Later fragments have the ports of the first one, or go nowhere.
#[inline(always)]
fn later_fragment(packet: &mut Packet) -> Result<(), DropReason> {
    let key = fragment_key(packet);
    // SAFETY: the value is copied out at once; a torn pair of ports names no flow that exists, or
    // one that the same sender may use anyway.
    let Some(first) = (unsafe { FRAGMENTS.get(&key) }) else {
        return Err(DropReason::FragmentWithoutFirst);
    };
    packet.source_port = first.source_port;
    packet.destination_port = first.destination_port;
    if matches!(packet.protocol, protocol::ICMP | protocol::ICMPV6) {
        // Which side asks is all that the first fragment told: see `remember_fragment`.
        packet.kind = if packet.source_port != 0 { Kind::EchoRequest } else { Kind::EchoReply };
    }
    Ok(())
}

#[inline(always)]
fn remember_fragment(packet: &Packet) {
    if matches!(packet.kind, Kind::IcmpError | Kind::IcmpOther) {
        return;
    }
    let key = fragment_key(packet);
    let value = FragmentValue {
        source_port: packet.source_port,
        destination_port: packet.destination_port,
    };
    // A full table evicts the oldest datagram; its later fragments are dropped.
    let _ = FRAGMENTS.insert(&key, &value, 0);
}
