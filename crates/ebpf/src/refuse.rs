//! Refuses in the name of a Service without backends, so that its clients fail at once instead of
//! waiting for an answer: a reset for TCP (RFC 9293, section 3.5.2), "port unreachable" for UDP
//! (RFC 792; RFC 4443, section 3.1). TCP would heed the latter too, but not while `connect` still
//! runs, which is when it comes.
//!
//! The packet itself becomes the answer: it gets the length of one, and every byte behind the link
//! header is written anew.

use aya_ebpf::{
    bindings::__sk_buff,
    helpers::generated::{
        bpf_csum_diff, bpf_redirect_peer, bpf_skb_change_tail, bpf_skb_store_bytes,
    },
};
use palisade_abi::{DropReason, protocol};

use crate::packet::{ACK, ETH_LEN, Packet, RST, load};

const HOP_LIMIT: u8 = 64;
const IPV4: usize = 20;
const IPV6: usize = 40;
const TCP: usize = 20;
const ICMP: usize = 8;
/// What of a datagram tells its socket: both ports and more.
const QUOTED: usize = 8;

/// The helper that sums bytes takes them in words.
#[repr(C, align(4))]
struct Answer<const N: usize>([u8; N]);

/// Sends the answer back into the endpoint that the packet came from. Fragments and packets with
/// options or extension headers get none.
#[inline(never)]
pub fn answer(skb: *mut __sk_buff, packet: &Packet) -> Result<i32, DropReason> {
    let header = if packet.ipv6 { IPV6 } else { IPV4 };
    if packet.l4 != ETH_LEN + header as u32 || packet.more_fragments || packet.later_fragment {
        return Err(DropReason::NoBackend);
    }
    match (packet.ipv6, packet.protocol) {
        (false, protocol::TCP) => reset_ipv4(skb)?,
        (true, protocol::TCP) => reset_ipv6(skb)?,
        (false, protocol::UDP) => unreachable_ipv4(skb)?,
        (true, protocol::UDP) => unreachable_ipv6(skb)?,
        _ => return Err(DropReason::NoBackend),
    }
    // SAFETY: a live context; the helper checks the interface.
    Ok(unsafe { bpf_redirect_peer((*skb).ifindex, 0) } as i32)
}

#[inline(never)]
fn reset_ipv4(skb: *mut __sk_buff) -> Result<(), DropReason> {
    const LENGTH: usize = IPV4 + TCP;
    let original: [u8; LENGTH] = load(skb, ETH_LEN)?;
    let mut answer = from_ipv4::<LENGTH>(&original, protocol::TCP);
    reset(&mut answer.0[IPV4..], &original[IPV4..]);
    let sum = checksum(answer.0[12..].as_ptr(), LENGTH - 12, pseudo(TCP, protocol::TCP));
    answer.0[IPV4 + 16..IPV4 + 18].copy_from_slice(&sum);
    replace(skb, &answer.0)
}

#[inline(never)]
fn reset_ipv6(skb: *mut __sk_buff) -> Result<(), DropReason> {
    const LENGTH: usize = IPV6 + TCP;
    let original: [u8; LENGTH] = load(skb, ETH_LEN)?;
    let mut answer = from_ipv6::<LENGTH>(&original, protocol::TCP);
    reset(&mut answer.0[IPV6..], &original[IPV6..]);
    let sum = checksum(answer.0[8..].as_ptr(), LENGTH - 8, pseudo(TCP, protocol::TCP));
    answer.0[IPV6 + 16..IPV6 + 18].copy_from_slice(&sum);
    replace(skb, &answer.0)
}

#[inline(never)]
fn unreachable_ipv4(skb: *mut __sk_buff) -> Result<(), DropReason> {
    const QUOTE: usize = IPV4 + QUOTED;
    const LENGTH: usize = IPV4 + ICMP + QUOTE;
    let original: [u8; QUOTE] = load(skb, ETH_LEN)?;
    let mut answer = from_ipv4::<LENGTH>(&original, protocol::ICMP);
    // Type and code.
    answer.0[IPV4] = 3;
    answer.0[IPV4 + 1] = 3;
    answer.0[IPV4 + ICMP..].copy_from_slice(&original);
    let sum = checksum(answer.0[IPV4..].as_ptr(), LENGTH - IPV4, 0);
    answer.0[IPV4 + 2..IPV4 + 4].copy_from_slice(&sum);
    replace(skb, &answer.0)
}

#[inline(never)]
fn unreachable_ipv6(skb: *mut __sk_buff) -> Result<(), DropReason> {
    const QUOTE: usize = IPV6 + QUOTED;
    const LENGTH: usize = IPV6 + ICMP + QUOTE;
    let original: [u8; QUOTE] = load(skb, ETH_LEN)?;
    let mut answer = from_ipv6::<LENGTH>(&original, protocol::ICMPV6);
    // Type and code.
    answer.0[IPV6] = 1;
    answer.0[IPV6 + 1] = 4;
    answer.0[IPV6 + ICMP..].copy_from_slice(&original);
    let seed = pseudo(LENGTH - IPV6, protocol::ICMPV6);
    let sum = checksum(answer.0[8..].as_ptr(), LENGTH - 8, seed);
    answer.0[IPV6 + 2..IPV6 + 4].copy_from_slice(&sum);
    replace(skb, &answer.0)
}

/// An answer with its IP header: from whom `original` was for, to whom it came from.
#[inline(always)]
fn from_ipv4<const N: usize>(original: &[u8], protocol: u8) -> Answer<N> {
    let mut answer = Answer([0; N]);
    answer.0[0] = 0x45;
    answer.0[3] = N as u8;
    answer.0[8] = HOP_LIMIT;
    answer.0[9] = protocol;
    answer.0[12..16].copy_from_slice(&original[16..20]);
    answer.0[16..20].copy_from_slice(&original[12..16]);
    let sum = checksum(answer.0.as_ptr(), IPV4, 0);
    answer.0[10..12].copy_from_slice(&sum);
    answer
}

/// As [`from_ipv4`].
#[inline(always)]
fn from_ipv6<const N: usize>(original: &[u8], protocol: u8) -> Answer<N> {
    let mut answer = Answer([0; N]);
    answer.0[0] = 0x60;
    answer.0[5] = (N - IPV6) as u8;
    answer.0[6] = protocol;
    answer.0[7] = HOP_LIMIT;
    answer.0[8..24].copy_from_slice(&original[24..40]);
    answer.0[24..40].copy_from_slice(&original[8..24]);
    answer
}

/// A TCP header without its checksum: a reset of what `original` belongs to.
#[inline(always)]
fn reset(header: &mut [u8], original: &[u8]) {
    header[0..2].copy_from_slice(&original[2..4]);
    header[2..4].copy_from_slice(&original[0..2]);
    header[12] = (TCP as u8 / 4) << 4;
    if original[13] & ACK != 0 {
        header[4..8].copy_from_slice(&original[8..12]);
        header[13] = RST;
        return;
    }
    let sequence = u32::from_be_bytes([original[4], original[5], original[6], original[7]]);
    header[8..12].copy_from_slice(&sequence.wrapping_add(1).to_be_bytes());
    header[13] = RST | ACK;
}

/// What the pseudo-header (RFC 9293, section 3.1; RFC 8200, section 8.1) adds to the addresses.
#[inline(always)]
fn pseudo(length: usize, protocol: u8) -> u32 {
    (length as u32 + u32::from(protocol)).to_be()
}

/// The Internet checksum (RFC 1071) as it is written into a packet.
#[inline(always)]
fn checksum(bytes: *const u8, length: usize, seed: u32) -> [u8; 2] {
    // SAFETY: the callers point at so many bytes of a local.
    let sum = unsafe {
        bpf_csum_diff(core::ptr::null_mut(), 0, bytes.cast_mut().cast(), length as u32, seed)
    } as u64 as u32;
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    (!(sum as u16)).to_ne_bytes()
}

#[inline(always)]
fn replace(skb: *mut __sk_buff, bytes: &[u8]) -> Result<(), DropReason> {
    let length = bytes.len() as u32;
    // SAFETY: a live context; the helpers check lengths and offsets against the packet.
    let failed = unsafe {
        bpf_skb_change_tail(skb, ETH_LEN + length, 0) != 0
            || bpf_skb_store_bytes(skb, ETH_LEN, bytes.as_ptr().cast(), length, 0) != 0
    };
    if failed { Err(DropReason::Internal) } else { Ok(()) }
}
