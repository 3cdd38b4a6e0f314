//! Service translation: which backend, and rewriting packets whose socket was not seen by the
//! hooks in [`crate::socket`].

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    helpers::generated::{
        bpf_csum_diff, bpf_get_prandom_u32, bpf_l3_csum_replace, bpf_l4_csum_replace,
        bpf_skb_store_bytes,
    },
};
use palisade_abi::{Address, BackendKey, BackendValue, DropReason, ServiceKey, protocol};

use crate::{
    maps::{BACKENDS, SERVICES},
    packet::{ETH_LEN, Packet, unmapped},
};

/// What stands behind a Service address.
pub enum Choice {
    /// Not a Service.
    NoService,
    /// A Service without backends.
    NoBackend,
    Backend(BackendValue),
}

/// A version may go between the look at the Service and the look at its backend. The Service then
/// names the next one already, and twice in a row that does not happen to anybody.
const ATTEMPTS: u32 = 2;

#[inline(always)]
pub fn choose(address: &Address, port: u16, protocol: u8) -> Choice {
    let key = ServiceKey { address: *address, port, protocol, reserved: 0 };
    for _ in 0..ATTEMPTS {
        // SAFETY: not preallocated, so the value stays while this program runs.
        let Some(service) = (unsafe { SERVICES.get(&key) }) else { return Choice::NoService };
        if service.backends == 0 {
            return Choice::NoBackend;
        }
        // SAFETY: the helper takes nothing and cannot fail.
        let index = unsafe { bpf_get_prandom_u32() } % service.backends;
        // SAFETY: as above.
        if let Some(backend) =
            unsafe { BACKENDS.get(&BackendKey { version: service.version, index }) }
        {
            return Choice::Backend(*backend);
        }
    }
    Choice::NoBackend
}

/// Which end of a packet to rewrite.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum End {
    Source,
    Destination,
}

/// Writes another address and port into the packet, checksums included, and into `packet`.
#[inline(never)]
pub fn rewrite(
    skb: *mut __sk_buff,
    packet: &mut Packet,
    end: End,
    address: &Address,
    port: u16,
) -> Result<(), DropReason> {
    let (old_address, old_port) = match end {
        End::Source => (packet.source, packet.source_port),
        End::Destination => (packet.destination, packet.destination_port),
    };
    let checksum = match packet.protocol {
        protocol::TCP => 16,
        protocol::UDP => 6,
        _ => return Err(DropReason::Malformed),
    };
    let flags = if packet.protocol == protocol::UDP { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
    let mut failed = 0;
    // SAFETY: the helpers check their offsets against the packet; pointers are to live locals.
    unsafe {
        if !packet.later_fragment {
            let offset = packet.l4 + checksum;
            let pseudo = flags | u64::from(BPF_F_PSEUDO_HDR);
            if packet.ipv6 {
                let diff = bpf_csum_diff(
                    (&raw const old_address).cast_mut().cast(),
                    16,
                    address.as_ptr().cast_mut().cast(),
                    16,
                    0,
                );
                failed |= bpf_l4_csum_replace(skb, offset, 0, diff as u64, pseudo);
            } else {
                let (from, to) = (unmapped(&old_address), unmapped(address));
                failed |= bpf_l4_csum_replace(
                    skb,
                    offset,
                    u64::from(u32::from_ne_bytes(from)),
                    u64::from(u32::from_ne_bytes(to)),
                    pseudo | 4,
                );
            }
            failed |=
                bpf_l4_csum_replace(skb, offset, u64::from(old_port), u64::from(port), flags | 2);
            let at = packet.l4 + if end == End::Source { 0 } else { 2 };
            failed |= bpf_skb_store_bytes(skb, at, (&raw const port).cast(), 2, 0);
        }
        if packet.ipv6 {
            let at = ETH_LEN + if end == End::Source { 8 } else { 24 };
            failed |= bpf_skb_store_bytes(skb, at, address.as_ptr().cast(), 16, 0);
        } else {
            let (from, to) = (unmapped(&old_address), unmapped(address));
            failed |= bpf_l3_csum_replace(
                skb,
                ETH_LEN + 10,
                u64::from(u32::from_ne_bytes(from)),
                u64::from(u32::from_ne_bytes(to)),
                4,
            );
            let at = ETH_LEN + if end == End::Source { 12 } else { 16 };
            failed |= bpf_skb_store_bytes(skb, at, (&raw const to).cast(), 4, 0);
        }
    }
    if failed != 0 {
        return Err(DropReason::Internal);
    }
    match end {
        End::Source => (packet.source, packet.source_port) = (*address, port),
        End::Destination => (packet.destination, packet.destination_port) = (*address, port),
    }
    Ok(())
}
