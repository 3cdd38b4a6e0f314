//! Handing packets to the proxy: each is given to one of its sockets, or dropped. The mark makes
//! the node's stack deliver it although its destination is elsewhere.
//!
//! Who else listens at the proxy's port, or at the port that a client asks for, gets nothing: a
//! socket of the proxy is known by its mark, which takes `CAP_NET_ADMIN` to set.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_INGRESS, bpf_sock},
    helpers::generated::{
        bpf_l4_csum_replace, bpf_redirect, bpf_sk_assign, bpf_sk_fullsock, bpf_sk_release,
        bpf_skb_change_type, bpf_skb_store_bytes,
    },
};
use palisade_abi::{
    DropReason, PROXY_PORT,
    mark::{CLIENT_AGAIN, FROM_PROXY, MASK, SERVER_AGAIN, TO_PROXY},
    protocol,
};

use crate::{
    lookup::{Tuple4, Tuple6, find_tcp, find_udp},
    packet::{ACK, Kind, Packet, SYN, load},
};

const TC_ACT_OK: i32 = 0;
/// `skb->pkt_type` of what is for this machine (linux/if_packet.h).
const PACKET_HOST: u32 = 0;
/// States of a TCP socket (net/tcp_states.h).
const TCP_TIME_WAIT: u32 = 6;
const TCP_LISTEN: u32 = 10;

/// Which of the proxy's two connections a packet is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Leg {
    /// The one that a client opened.
    Client,
    /// The one that the proxy opened to a server.
    Server,
}

#[inline(always)]
fn mark(skb: *mut __sk_buff) -> u32 {
    // SAFETY: a live context.
    unsafe { (*skb).mark & MASK }
}

#[inline(always)]
fn set_mark(skb: *mut __sk_buff, value: u32) {
    // SAFETY: a live context, of which tc programs may write the mark.
    unsafe { (*skb).mark = (*skb).mark & !MASK | value }
}

/// Whether a socket of the proxy sent the packet. Only an egress can tell.
#[inline(always)]
pub fn sent(skb: *mut __sk_buff) -> bool {
    mark(skb) == FROM_PROXY
}

/// The packet was judged as the proxy's.
#[inline(always)]
pub fn unmark(skb: *mut __sk_buff) {
    set_mark(skb, 0);
}

/// What `to_pod` sent round to the ingress of its interface.
#[inline(always)]
pub fn again(skb: *mut __sk_buff) -> Option<Leg> {
    match mark(skb) {
        CLIENT_AGAIN => Some(Leg::Client),
        SERVER_AGAIN => Some(Leg::Server),
        _ => None,
    }
}

/// Sends the packet round to the ingress of its interface.
#[inline(always)]
pub fn send_round(skb: *mut __sk_buff, leg: Leg) -> i32 {
    set_mark(skb, if leg == Leg::Client { CLIENT_AGAIN } else { SERVER_AGAIN });
    // SAFETY: a live context; the helper checks the interface.
    unsafe { bpf_redirect((*skb).ifindex, u64::from(BPF_F_INGRESS)) as i32 }
}

/// Gives the packet to the proxy. At an ingress only.
#[inline(always)]
pub fn give(skb: *mut __sk_buff, packet: &Packet, leg: Leg) -> Result<i32, DropReason> {
    match proxy_give(skb, packet, leg as u32) {
        0 => Ok(TC_ACT_OK),
        reason if reason == DropReason::ProxyGone as u32 => Err(DropReason::ProxyGone),
        reason if reason == DropReason::Internal as u32 => Err(DropReason::Internal),
        _ => Err(DropReason::ProxyBypassed),
    }
}

/// [`give`], as a global function, which the verifier walks once: 0, or the number of the reason
/// not to.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn proxy_give(skb: *mut __sk_buff, packet: *const Packet, leg: u32) -> u32 {
    // SAFETY: the verifier wants the pointer checked, and knows the size of what it points at.
    let Some(packet) = (unsafe { packet.as_ref() }) else { return DropReason::Internal as u32 };
    let leg = if leg == Leg::Client as u32 { Leg::Client } else { Leg::Server };
    let Packet { source, destination, .. } = packet;
    let ports = [packet.source_port, packet.destination_port];
    let done = if packet.ipv6 {
        hand_over(skb, packet, leg, Tuple6::new(source, destination, ports), LISTENER6)
    } else {
        hand_over(skb, packet, leg, Tuple4::new(source, destination, ports), LISTENER4)
    };
    match done {
        Ok(()) => 0,
        Err(reason) => reason as u32,
    }
}

#[inline(always)]
fn hand_over<T>(
    skb: *mut __sk_buff,
    packet: &Packet,
    leg: Leg,
    tuple: T,
    listener: T,
) -> Result<(), DropReason> {
    // A datagram loses its socket when it is put together, and might find a stranger's.
    if packet.more_fragments || packet.later_fragment {
        return Err(DropReason::ProxyBypassed);
    }
    match (packet.kind, packet.protocol) {
        // The stack finds the socket of the packet that an error quotes.
        (Kind::IcmpError, _) => {}
        (_, protocol::TCP) => tcp(skb, packet, &tuple, &listener)?,
        (_, protocol::UDP) => udp(skb, if leg == Leg::Client { &listener } else { &tuple })?,
        _ => return Err(DropReason::ProxyBypassed),
    }
    set_mark(skb, TO_PROXY);
    // SAFETY: a live context. What was sent round is addressed to the pod still.
    unsafe { bpf_skb_change_type(skb, PACKET_HOST) };
    Ok(())
}

const LISTENER4: Tuple4 =
    Tuple4 { source: [0; 4], destination: [127, 0, 0, 1], ports: [0, PROXY_PORT.to_be()] };
const LISTENER6: Tuple6 = Tuple6 {
    source: [0; 16],
    destination: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    ports: [0, PROXY_PORT.to_be()],
};

/// Whether the socket is not the proxy's. Small sockets (of a connection that begins or has ended)
/// bear no mark; theirs was checked when they were full ones or by their listener.
///
/// # Safety
/// `socket` was looked up and not yet released.
#[inline(always)]
unsafe fn is_foreign(socket: *mut bpf_sock) -> bool {
    // SAFETY: the caller's.
    unsafe {
        let full = bpf_sk_fullsock(socket);
        !full.is_null() && (*full).mark & MASK != FROM_PROXY
    }
}

/// Assigns the socket if it is the proxy's, and releases it.
///
/// # Safety
/// `socket` was looked up and not yet released.
#[inline(always)]
unsafe fn assign(skb: *mut __sk_buff, socket: *mut bpf_sock) -> Result<(), DropReason> {
    let socket_pointer: *mut c_void = socket.cast();
    // SAFETY: the caller's.
    unsafe {
        let failed = is_foreign(socket) || bpf_sk_assign(skb.cast(), socket_pointer, 0) != 0;
        bpf_sk_release(socket_pointer);
        if failed { Err(DropReason::ProxyGone) } else { Ok(()) }
    }
}

/// The connection's own socket, else the listener: it takes SYNs, and the acknowledgements of SYN
/// cookies, and resets the rest.
#[inline(always)]
fn tcp<T>(skb: *mut __sk_buff, packet: &Packet, tuple: &T, listener: &T) -> Result<(), DropReason> {
    let socket = find_tcp(skb, tuple);
    if !socket.is_null() {
        // SAFETY: a live socket; every way out releases it.
        unsafe {
            let state = (*socket).state;
            let reused = state == TCP_TIME_WAIT && packet.tcp_flags & (SYN | ACK) == SYN;
            if reused && !becomes_stray(skb, packet) {
                bpf_sk_release(socket.cast());
                return Err(DropReason::Internal);
            }
            if state != TCP_LISTEN {
                return assign(skb, socket);
            }
            bpf_sk_release(socket.cast());
        }
    }
    let socket = find_tcp(skb, listener);
    if socket.is_null() {
        return Err(DropReason::ProxyGone);
    }
    // SAFETY: just looked up.
    unsafe { assign(skb, socket) }
}

#[inline(always)]
fn udp<T>(skb: *mut __sk_buff, tuple: &T) -> Result<(), DropReason> {
    let socket = find_udp(skb, tuple);
    if socket.is_null() {
        return Err(DropReason::ProxyGone);
    }
    // SAFETY: just looked up.
    unsafe { assign(skb, socket) }
}

/// A client uses a port again whose last connection still waits here for stray packets. The stack
/// would look for a listener at the original destination, and take any. Without its SYN the packet
/// is a stray one itself: it is answered with an acknowledgement, which makes the client reset what
/// waits (RFC 9293, section 3.5.2) and ask again.
#[inline(always)]
fn becomes_stray(skb: *mut __sk_buff, packet: &Packet) -> bool {
    // Header length and flags share a word of the checksum.
    let at = packet.l4 + 12;
    let Ok(old) = load::<[u8; 2]>(skb, at) else { return false };
    let new = [old[0], old[1] & !SYN | ACK];
    // SAFETY: the helpers check their offsets against the packet.
    unsafe {
        bpf_l4_csum_replace(
            skb,
            packet.l4 + 16,
            u64::from(u16::from_ne_bytes(old)),
            u64::from(u16::from_ne_bytes(new)),
            2,
        ) == 0
            && bpf_skb_store_bytes(skb, at, new.as_ptr().cast(), 2, 0) == 0
    }
}
