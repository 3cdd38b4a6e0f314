//! The uplink: what comes in from the network must not claim an address that lives on this node.

use aya_ebpf::bindings::__sk_buff;
use palisade_abi::{Address, DropReason, EndpointKey, EventKind, ROW_NONE, event_flags};

use crate::{
    event,
    maps::ENDPOINTS,
    packet::{ETH_LEN, ETH_P_IP, ETH_P_IPV6, load, mapped},
};

const TC_ACT_OK: i32 = 0;
const TC_ACT_SHOT: i32 = 2;

#[inline(always)]
fn source(skb: *mut __sk_buff) -> Result<Option<(Address, bool)>, DropReason> {
    // SAFETY: a live context.
    match unsafe { (*skb).protocol } {
        ETH_P_IP => Ok(Some((mapped(load(skb, ETH_LEN + 12)?), false))),
        ETH_P_IPV6 => Ok(Some((load(skb, ETH_LEN + 8)?, true))),
        _ => Ok(None),
    }
}

pub fn from_net(skb: *mut __sk_buff) -> i32 {
    let (address, ipv6) = match source(skb) {
        Ok(Some(source)) => source,
        Ok(None) => return TC_ACT_OK,
        Err(_) => return TC_ACT_SHOT,
    };
    // SAFETY: not preallocated, so the value stays while this program runs.
    let Some(owner) = (unsafe { ENDPOINTS.get(&EndpointKey { address }) }) else {
        return TC_ACT_OK;
    };
    if owner.row == ROW_NONE {
        return TC_ACT_OK;
    }
    // SAFETY: a live context.
    event::count_drop(DropReason::Spoofed, unsafe { (*skb).len });
    if event::drop_budget() {
        event::emit(EventKind::Drop, |event| {
            event.source = address;
            event.reason = DropReason::Spoofed as u8;
            if ipv6 {
                event.flags |= event_flags::IPV6;
            }
        });
    }
    TC_ACT_SHOT
}
