//! Service translation where a socket connects or sends: the packets then carry the backend's
//! address from the start, and nothing is rewritten later. `recvmsg` and `getpeername` turn the
//! backend's address back into the one that the program asked for.

use aya_ebpf::{
    helpers::generated::{bpf_get_socket_cookie, bpf_set_retval},
    programs::SockAddrContext,
};
use palisade_abi::{
    Address, SocketKey, SocketValue,
    mark::{MASK, PAST_SERVICES},
};

use crate::{
    maps::SOCKETS,
    packet::{mapped, unmapped},
    service::{self, Choice},
};

/// The system call goes on.
const PROCEED: i32 = 1;
/// The system call fails with what `bpf_set_retval` said.
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;

/// How a hook's context holds the address.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    V4,
    V6,
}

#[inline(always)]
fn address(context: &SockAddrContext, layout: Layout) -> Address {
    // SAFETY: a live context; each field is read as the verifier wants it, one word at a time.
    unsafe {
        let raw = context.sock_addr;
        if layout == Layout::V4 {
            return mapped((*raw).user_ip4.to_ne_bytes());
        }
        let words = [
            core::ptr::read_volatile(&raw const (*raw).user_ip6[0]),
            core::ptr::read_volatile(&raw const (*raw).user_ip6[1]),
            core::ptr::read_volatile(&raw const (*raw).user_ip6[2]),
            core::ptr::read_volatile(&raw const (*raw).user_ip6[3]),
        ];
        core::mem::transmute::<[u32; 4], Address>(words)
    }
}

#[inline(always)]
fn set_address(context: &SockAddrContext, layout: Layout, address: &Address, port: u16) {
    // SAFETY: as in `address`.
    unsafe {
        let raw = context.sock_addr;
        if layout == Layout::V4 {
            (*raw).user_ip4 = u32::from_ne_bytes(unmapped(address));
        } else {
            let words = core::mem::transmute::<Address, [u32; 4]>(*address);
            core::ptr::write_volatile(&raw mut (*raw).user_ip6[0], words[0]);
            core::ptr::write_volatile(&raw mut (*raw).user_ip6[1], words[1]);
            core::ptr::write_volatile(&raw mut (*raw).user_ip6[2], words[2]);
            core::ptr::write_volatile(&raw mut (*raw).user_ip6[3], words[3]);
        }
        (*raw).user_port = u32::from(port);
    }
}

#[inline(always)]
fn mark(context: &SockAddrContext) -> u32 {
    // SAFETY: a live context, and there is no such call without a socket.
    unsafe { (*(*context.sock_addr).__bindgen_anon_1.sk).mark & MASK }
}

/// `connect` and `sendmsg`: Service address → backend.
#[inline(always)]
pub fn forward(context: &SockAddrContext, layout: Layout) -> i32 {
    if mark(context) == PAST_SERVICES {
        return PROCEED;
    }
    // SAFETY: a live context.
    let (port, protocol) =
        unsafe { ((*context.sock_addr).user_port as u16, (*context.sock_addr).protocol as u8) };
    let asked = address(context, layout);
    let backend = match service::choose(&asked, port, protocol) {
        Choice::NoService => return PROCEED,
        Choice::NoBackend => {
            // SAFETY: the helper only takes a number.
            unsafe { bpf_set_retval(-ECONNREFUSED) };
            return REFUSE;
        }
        Choice::Backend(backend) => backend,
    };
    let key = SocketKey {
        // SAFETY: a live context.
        cookie: unsafe { bpf_get_socket_cookie(context.sock_addr.cast()) },
        address: backend.address,
        port: backend.port,
        reserved: [0; 3],
    };
    let value = SocketValue { address: asked, port, reserved: 0 };
    if SOCKETS.insert(&key, &value, 0).is_err() {
        // Without the entry answers would bear a stranger's address: the per-packet translation
        // takes this socket instead.
        return PROCEED;
    }
    set_address(context, layout, &backend.address, backend.port);
    PROCEED
}

/// `recvmsg` and `getpeername`: backend → Service address.
#[inline(always)]
pub fn reverse(context: &SockAddrContext, layout: Layout) -> i32 {
    let key = SocketKey {
        // SAFETY: a live context.
        cookie: unsafe { bpf_get_socket_cookie(context.sock_addr.cast()) },
        address: address(context, layout),
        // SAFETY: a live context.
        port: unsafe { (*context.sock_addr).user_port as u16 },
        reserved: [0; 3],
    };
    // SAFETY: copied out at once. An entry reused meanwhile can only name another Service address
    // in an answer that this socket asked for.
    if let Some(value) = unsafe { SOCKETS.get(&key) } {
        let (address, port) = (value.address, value.port);
        set_address(context, layout, &address, port);
    }
    PROCEED
}
