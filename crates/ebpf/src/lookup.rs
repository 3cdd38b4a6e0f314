//! The node's own sockets, by what they would be sent.

use core::mem::size_of;

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_CURRENT_NETNS, bpf_sock, bpf_sock_tuple},
    helpers::generated::{bpf_sk_lookup_udp, bpf_skc_lookup_tcp},
};
use palisade_abi::Address;

use crate::packet::unmapped;

/// `struct bpf_sock_tuple` of a family: the sender first, as the receiving socket sees it.
#[repr(C)]
pub struct Tuple4 {
    pub source: [u8; 4],
    pub destination: [u8; 4],
    pub ports: [u16; 2],
}

/// See [`Tuple4`].
#[repr(C)]
pub struct Tuple6 {
    pub source: [u8; 16],
    pub destination: [u8; 16],
    pub ports: [u16; 2],
}

impl Tuple4 {
    #[inline(always)]
    pub fn new(source: &Address, destination: &Address, ports: [u16; 2]) -> Self {
        Self { source: unmapped(source), destination: unmapped(destination), ports }
    }
}

impl Tuple6 {
    #[inline(always)]
    pub fn new(source: &Address, destination: &Address, ports: [u16; 2]) -> Self {
        Self { source: *source, destination: *destination, ports }
    }
}

/// `BPF_F_CURRENT_NETNS` is the 32-bit −1 in the bindings; the helpers want it in 64.
const HERE: u64 = BPF_F_CURRENT_NETNS as i64 as u64;

/// Who gets the segment: a connection, be it one that begins or has ended, or a listener. To be
/// released.
#[inline(always)]
pub fn find_tcp<T>(skb: *mut __sk_buff, tuple: &T) -> *mut bpf_sock {
    let tuple: *mut bpf_sock_tuple = (&raw const *tuple).cast_mut().cast();
    // SAFETY: a live context and tuple.
    unsafe { bpf_skc_lookup_tcp(skb.cast(), tuple, size_of::<T>() as u32, HERE, 0) }
}

/// Who gets the datagram. To be released.
#[inline(always)]
pub fn find_udp<T>(skb: *mut __sk_buff, tuple: &T) -> *mut bpf_sock {
    let tuple: *mut bpf_sock_tuple = (&raw const *tuple).cast_mut().cast();
    // SAFETY: a live context and tuple.
    unsafe { bpf_sk_lookup_udp(skb.cast(), tuple, size_of::<T>() as u32, HERE, 0) }
}
