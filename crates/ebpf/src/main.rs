//! Palisade's eBPF programs. Entry points only; what they do is in the modules.
//!
//! A pod's veth has `from_pod` at the ingress and `to_pod` at the egress of its host side; the
//! uplink has `from_net` and `to_net`, or with an overlay `from_underlay` and `to_net`, and the
//! overlay's interface `from_overlay` and `to_net`; the node's cgroup has the socket programs. One loaded program serves
//! every pod: which one it is follows from the interface.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod clock;
mod event;
mod fast;
mod flow;
mod guard;
mod lookup;
mod maps;
mod masquerade;
mod net;
mod pace;
mod packet;
mod policy;
mod proxied;
mod proxy;
mod refuse;
mod rewrite;
mod service;
mod slow;
mod socket;

use aya_ebpf::{
    EbpfContext,
    bindings::__sk_buff,
    macros::{cgroup_sock_addr, classifier},
    programs::{SockAddrContext, TcContext},
};
use packet::{ETH_P_IP, ETH_P_IPV6};
use socket::Layout;

/// Where a packet was met.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Hook {
    /// It leaves an endpoint.
    FromPod,
    /// It enters an endpoint from the node's stack.
    ToPod,
    /// It leaves the node.
    ToNet,
}

#[classifier]
pub fn from_pod(context: TcContext) -> i32 {
    pod(context.as_ptr().cast(), Hook::FromPod)
}

#[classifier]
pub fn to_pod(context: TcContext) -> i32 {
    pod(context.as_ptr().cast(), Hook::ToPod)
}

/// `TC_ACT_UNSPEC`: no program of ours returns it to the kernel.
const UNDECIDED: i32 = -1;
/// No action: the flow goes through the proxy.
const PROXIED: i32 = -2;

// Functions of their own: their stack is free again when the slow path needs it.
#[inline(never)]
fn fast_ipv4(skb: *mut __sk_buff, hook: Hook) -> i32 {
    fast::fast::<fast::V4>(skb, hook).unwrap_or(UNDECIDED)
}

#[inline(never)]
fn fast_ipv6(skb: *mut __sk_buff, hook: Hook) -> i32 {
    fast::fast::<fast::V6>(skb, hook).unwrap_or(UNDECIDED)
}

#[inline(always)]
fn pod(skb: *mut __sk_buff, hook: Hook) -> i32 {
    // SAFETY: a live context.
    let verdict = match unsafe { (*skb).protocol } {
        ETH_P_IP => fast_ipv4(skb, hook),
        ETH_P_IPV6 => fast_ipv6(skb, hook),
        _ => UNDECIDED,
    };
    let verdict = if verdict == PROXIED { proxied(skb, hook) } else { verdict };
    if verdict == UNDECIDED { slow::slow(skb, hook) } else { verdict }
}

#[inline(never)]
fn proxied_ipv4(skb: *mut __sk_buff, hook: Hook) -> i32 {
    proxied::proxied::<fast::V4>(skb, hook, false).unwrap_or(UNDECIDED)
}

#[inline(never)]
fn proxied_ipv6(skb: *mut __sk_buff, hook: Hook) -> i32 {
    proxied::proxied::<fast::V6>(skb, hook, true).unwrap_or(UNDECIDED)
}

#[inline(always)]
fn proxied(skb: *mut __sk_buff, hook: Hook) -> i32 {
    // SAFETY: a live context.
    match unsafe { (*skb).protocol } {
        ETH_P_IP => proxied_ipv4(skb, hook),
        ETH_P_IPV6 => proxied_ipv6(skb, hook),
        _ => UNDECIDED,
    }
}

#[classifier]
pub fn from_net(context: TcContext) -> i32 {
    net::from_net(context.as_ptr().cast())
}

#[classifier]
pub fn from_underlay(context: TcContext) -> i32 {
    net::from_underlay(context.as_ptr().cast())
}

#[classifier]
pub fn from_overlay(context: TcContext) -> i32 {
    net::from_overlay(context.as_ptr().cast())
}

#[classifier]
pub fn to_net(context: TcContext) -> i32 {
    let skb = context.as_ptr().cast();
    let sent = proxy::sent(skb);
    if sent {
        let verdict = proxied(skb, Hook::ToNet);
        let verdict = if verdict == UNDECIDED { slow::slow(skb, Hook::ToNet) } else { verdict };
        // From the overlay it goes on to the uplink in an envelope, which is the node's own.
        proxy::unmark(skb);
        if verdict != slow::TC_ACT_OK {
            return verdict;
        }
    }
    masquerade::leave(skb, sent)
}

#[classifier]
pub fn clock_probe(context: TcContext) -> i32 {
    clock::report(context.as_ptr().cast())
}

#[cgroup_sock_addr(connect4)]
pub fn connect4(context: SockAddrContext) -> i32 {
    socket::forward(&context, Layout::V4)
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(context: SockAddrContext) -> i32 {
    socket::forward(&context, Layout::V6)
}

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(context: SockAddrContext) -> i32 {
    socket::forward(&context, Layout::V4)
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(context: SockAddrContext) -> i32 {
    socket::forward(&context, Layout::V6)
}

#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(context: SockAddrContext) -> i32 {
    socket::reverse(&context, Layout::V4)
}

#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(context: SockAddrContext) -> i32 {
    socket::reverse(&context, Layout::V6)
}

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(context: SockAddrContext) -> i32 {
    socket::reverse(&context, Layout::V4)
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(context: SockAddrContext) -> i32 {
    socket::reverse(&context, Layout::V6)
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: the verifier proves that no program gets here.
    unsafe { core::hint::unreachable_unchecked() }
}

/// The kernel lends the helpers that we use to GPL-compatible programs only; of our two licences it
/// knows this one.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
