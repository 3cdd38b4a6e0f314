//! What comes in from the network must not claim an address that lives on this node. With an
//! overlay, pods of other nodes come out of the tunnel only, and each from its own node only.

use core::mem::{MaybeUninit, size_of};

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_TUNINFO_IPV6, bpf_tunnel_key},
    helpers::generated::{bpf_skb_change_type, bpf_skb_get_tunnel_key},
    maps::lpm_trie::Key,
};
use palisade_abi::{
    Address, DropReason, EndpointKey, EventKind, ROW_NONE, TunnelValue, event_flags, tunnel_kind,
};

use crate::{
    event,
    maps::{ENDPOINTS, TUNNELS},
    masquerade,
    packet::{ETH_LEN, ETH_P_IP, ETH_P_IPV6, load, mapped},
};

const TC_ACT_OK: i32 = 0;
const TC_ACT_SHOT: i32 = 2;
/// `skb->pkt_type` of what is for this machine (linux/if_packet.h).
const PACKET_HOST: u32 = 0;

#[inline(always)]
pub fn source(skb: *mut __sk_buff) -> Result<Option<(Address, bool)>, DropReason> {
    // SAFETY: a live context.
    match unsafe { (*skb).protocol } {
        ETH_P_IP => Ok(Some((mapped(load(skb, ETH_LEN + 12)?), false))),
        ETH_P_IPV6 => Ok(Some((load(skb, ETH_LEN + 8)?, true))),
        _ => Ok(None),
    }
}

/// Whether an endpoint of this node or the node itself has the address.
#[inline(always)]
fn lives_here(address: &Address) -> bool {
    // SAFETY: not preallocated, so the value stays while this program runs.
    unsafe { ENDPOINTS.get(&EndpointKey { address: *address }) }
        .is_some_and(|owner| owner.row != ROW_NONE)
}

#[inline(always)]
fn refuse(skb: *mut __sk_buff, address: &Address, ipv6: bool, reason: DropReason) -> i32 {
    // SAFETY: a live context.
    event::count_drop(reason, unsafe { (*skb).len });
    if event::drop_budget() {
        event::emit(EventKind::Drop, |event| {
            event.source = *address;
            event.reason = reason as u8;
            if ipv6 {
                event.flags |= event_flags::IPV6;
            }
        });
    }
    TC_ACT_SHOT
}

/// The uplink.
pub fn from_net(skb: *mut __sk_buff) -> i32 {
    let (address, ipv6) = match source(skb) {
        Ok(Some(source)) => source,
        Ok(None) => return TC_ACT_OK,
        Err(_) => return TC_ACT_SHOT,
    };
    if lives_here(&address) {
        return refuse(skb, &address, ipv6, DropReason::Spoofed);
    }
    masquerade::arrive(skb, ipv6)
}

#[inline(always)]
fn tunnel(address: &Address) -> Option<TunnelValue> {
    TUNNELS.get(&Key::new(128, *address)).copied()
}

/// The uplink below an overlay.
pub fn from_underlay(skb: *mut __sk_buff) -> i32 {
    let (address, ipv6) = match source(skb) {
        Ok(Some(source)) => source,
        Ok(None) => return TC_ACT_OK,
        Err(_) => return TC_ACT_SHOT,
    };
    let is_pod = || tunnel(&address).is_some_and(|tunnel| tunnel.kind == tunnel_kind::PODS);
    if lives_here(&address) || is_pod() {
        return refuse(skb, &address, ipv6, DropReason::Spoofed);
    }
    masquerade::arrive(skb, ipv6)
}

/// The tunnel's end. The envelope says who sent; nothing in it says who that may speak for.
pub fn from_overlay(skb: *mut __sk_buff) -> i32 {
    let Ok(Some((address, ipv6))) = source(skb) else {
        // SAFETY: a live context.
        event::count_drop(DropReason::ForbiddenProtocol, unsafe { (*skb).len });
        return TC_ACT_SHOT;
    };
    let own_node = tunnel(&address).map(|tunnel| tunnel.node);
    if lives_here(&address) || own_node.is_none() || own_node != sender(skb) {
        return refuse(skb, &address, ipv6, DropReason::Spoofed);
    }
    let destination =
        if ipv6 { load(skb, ETH_LEN + 24) } else { load(skb, ETH_LEN + 16).map(mapped) };
    // Nobody is sent on to somewhere else.
    if !destination.is_ok_and(|destination| lives_here(&destination)) {
        return refuse(skb, &address, ipv6, DropReason::UnknownEndpoint);
    }
    // Nodes do not learn each other's MAC addresses; the frame is for whom the packet is for.
    // SAFETY: a live context.
    unsafe { bpf_skb_change_type(skb, PACKET_HOST) };
    TC_ACT_OK
}

/// Who sent the envelope.
#[inline(always)]
fn sender(skb: *mut __sk_buff) -> Option<Address> {
    let mut key = MaybeUninit::<bpf_tunnel_key>::zeroed();
    let size = size_of::<bpf_tunnel_key>() as u32;
    // SAFETY: a live context; the helper fills the key or fails, and which part of the union it
    // filled follows from the flag.
    unsafe {
        if bpf_skb_get_tunnel_key(skb, key.as_mut_ptr(), size, 0) == 0 {
            let ipv4 = key.assume_init_ref().__bindgen_anon_1.remote_ipv4;
            return Some(mapped(ipv4.to_be_bytes()));
        }
        if bpf_skb_get_tunnel_key(skb, key.as_mut_ptr(), size, u64::from(BPF_F_TUNINFO_IPV6)) != 0 {
            return None;
        }
        let words = key.assume_init_ref().__bindgen_anon_1.remote_ipv6;
        Some(core::mem::transmute::<[u32; 4], Address>(words))
    }
}
