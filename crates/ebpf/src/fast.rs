//! The fast path: a packet of a flow that is known, alive and judged under the present revisions.
//! One lookup, two array reads, counters, out. Whatever is unusual goes to [`crate::slow`].

use aya_ebpf::{bindings::__sk_buff, helpers::generated::bpf_redirect_peer};
use palisade_abi::{
    EventKind, FlowKey4, FlowKey6, FlowValue, event_flags, flow_direction, flow_flags, protocol,
};

use crate::{
    Hook, clock, event, flow,
    flow::Side,
    maps::{ENDPOINT_ROWS, FLOWS4, FLOWS4_ANY, FLOWS6, FLOWS6_ANY},
    packet::{ACK, ETH_LEN, SYN, mapped},
};

const TC_ACT_OK: i32 = 0;

/// What the two address families do differently.
pub trait Family {
    /// Key of the family's flow tables.
    type Key;
    /// Length of the usual IP header.
    const HEADER: usize;
    /// Protocol and length from the IP header on, unless the header is unusual.
    ///
    /// # Safety
    /// `header` points at [`Family::HEADER`] readable bytes.
    unsafe fn header(header: *const u8) -> Option<(u8, u32)>;
    /// # Safety
    /// `header` points at [`Family::HEADER`] readable bytes.
    unsafe fn key(header: *const u8, ports: [u16; 2], protocol: u8) -> (Self::Key, Side);
    fn find(key: &Self::Key, tcp: bool) -> Option<*mut FlowValue>;
    /// The key of what the proxy opened in the name of that flow's opener.
    fn upstream(key: Self::Key) -> Self::Key;
    /// Source and destination of a packet.
    fn ends(key: &Self::Key, side: Side) -> (palisade_abi::Address, palisade_abi::Address);
    /// Fills addresses and ports of an event in the direction of the packet.
    fn describe(key: &Self::Key, side: Side, event: &mut palisade_abi::Event);
}

pub struct V4;
pub struct V6;

/// Reads a `T` that need not be aligned: the kernel runs this on machines that do not mind
/// (`CONFIG_HAVE_EFFICIENT_UNALIGNED_ACCESS`), and the verifier refuses the program elsewhere.
///
/// # Safety
/// `pointer` points at `size_of::<T>()` readable bytes.
#[inline(always)]
unsafe fn at<T: Copy>(pointer: *const u8, offset: usize) -> T {
    // SAFETY: the caller's.
    unsafe { *pointer.add(offset).cast::<T>() }
}

impl Family for V4 {
    type Key = FlowKey4;
    const HEADER: usize = 20;

    #[inline(always)]
    unsafe fn header(header: *const u8) -> Option<(u8, u32)> {
        // SAFETY: the caller's.
        let (version, fragment, length, protocol) = unsafe {
            (at::<u8>(header, 0), at::<u16>(header, 6), at::<u16>(header, 2), at::<u8>(header, 9))
        };
        // Options, More Fragments or an offset.
        if version != 0x45 || fragment & 0x3fff_u16.to_be() != 0 {
            return None;
        }
        Some((protocol, u32::from(u16::from_be(length))))
    }

    #[inline(always)]
    unsafe fn key(header: *const u8, ports: [u16; 2], protocol: u8) -> (FlowKey4, Side) {
        // SAFETY: the caller's.
        let (source, destination) = unsafe { (at::<u32>(header, 12), at::<u32>(header, 16)) };
        flow::key4(source.to_ne_bytes(), destination.to_ne_bytes(), ports[0], ports[1], protocol)
    }

    #[inline(always)]
    fn find(key: &FlowKey4, tcp: bool) -> Option<*mut FlowValue> {
        if tcp { FLOWS4.get_ptr_mut(key) } else { FLOWS4_ANY.get_ptr_mut(key) }
    }

    #[inline(always)]
    fn upstream(key: FlowKey4) -> FlowKey4 {
        FlowKey4 { direction: flow_direction::UPSTREAM, ..key }
    }

    #[inline(always)]
    fn ends(key: &FlowKey4, side: Side) -> (palisade_abi::Address, palisade_abi::Address) {
        match side {
            Side::Low => (mapped(key.low), mapped(key.high)),
            Side::High => (mapped(key.high), mapped(key.low)),
        }
    }

    #[inline(always)]
    fn describe(key: &FlowKey4, side: Side, event: &mut palisade_abi::Event) {
        let (low, high) = (mapped(key.low), mapped(key.high));
        describe(event, side, (low, key.low_port), (high, key.high_port));
    }
}

impl Family for V6 {
    type Key = FlowKey6;
    const HEADER: usize = 40;

    #[inline(always)]
    unsafe fn header(header: *const u8) -> Option<(u8, u32)> {
        // SAFETY: the caller's.
        let (length, protocol) = unsafe { (at::<u16>(header, 4), at::<u8>(header, 6)) };
        Some((protocol, u32::from(u16::from_be(length)) + 40))
    }

    #[inline(always)]
    unsafe fn key(header: *const u8, ports: [u16; 2], protocol: u8) -> (FlowKey6, Side) {
        // SAFETY: the caller's.
        let (source, destination) =
            unsafe { (&*header.add(8).cast::<[u8; 16]>(), &*header.add(24).cast::<[u8; 16]>()) };
        flow::key6(source, destination, ports[0], ports[1], protocol)
    }

    #[inline(always)]
    fn find(key: &FlowKey6, tcp: bool) -> Option<*mut FlowValue> {
        if tcp { FLOWS6.get_ptr_mut(key) } else { FLOWS6_ANY.get_ptr_mut(key) }
    }

    #[inline(always)]
    fn upstream(key: FlowKey6) -> FlowKey6 {
        FlowKey6 { direction: flow_direction::UPSTREAM, ..key }
    }

    #[inline(always)]
    fn ends(key: &FlowKey6, side: Side) -> (palisade_abi::Address, palisade_abi::Address) {
        match side {
            Side::Low => (key.low, key.high),
            Side::High => (key.high, key.low),
        }
    }

    #[inline(always)]
    fn describe(key: &FlowKey6, side: Side, event: &mut palisade_abi::Event) {
        event.flags |= event_flags::IPV6;
        describe(event, side, (key.low, key.low_port), (key.high, key.high_port));
    }
}

#[inline(always)]
fn describe(
    event: &mut palisade_abi::Event,
    side: Side,
    low: (palisade_abi::Address, u16),
    high: (palisade_abi::Address, u16),
) {
    let (source, destination) = match side {
        Side::Low => (low, high),
        Side::High => (high, low),
    };
    event.source = source.0;
    event.destination = destination.0;
    event.source_port = u16::from_be(source.1);
    event.destination_port = u16::from_be(destination.1);
}

/// A usual packet.
pub struct Seen<K> {
    pub key: K,
    pub side: Side,
    pub protocol: u8,
    pub tcp_flags: u8,
    /// Bytes from the IP header on.
    pub length: u32,
    pub ports: [u16; 2],
}

/// Reads a packet, unless it is unusual or opens a flow.
#[inline(always)]
pub fn look<F: Family>(skb: *mut __sk_buff) -> Option<Seen<F::Key>> {
    // SAFETY: a live context; every access below is inside what `data_end` allows, as the
    // verifier proves.
    unsafe {
        let data = (*skb).data as usize;
        let end = (*skb).data_end as usize;
        let header = data + ETH_LEN as usize;
        let l4 = header + F::HEADER;
        if l4 + 8 > end {
            return None;
        }
        let (proto, length) = F::header(header as *const u8)?;
        let tcp = proto == protocol::TCP;
        let tcp_flags = if tcp {
            if l4 + 20 > end {
                return None;
            }
            at::<u8>(l4 as *const u8, 13)
        } else if proto == protocol::UDP {
            0
        } else {
            return None;
        };
        if tcp_flags & (SYN | ACK) == SYN || length + ETH_LEN > (*skb).len {
            return None;
        }
        let ports = [at::<u16>(l4 as *const u8, 0), at::<u16>(l4 as *const u8, 2)];
        let (key, side) = F::key(header as *const u8, ports, proto);
        Some(Seen { key, side, protocol: proto, tcp_flags, length, ports })
    }
}

/// The verdict, or nothing where the slow path has to look.
#[inline(always)]
pub fn fast<F: Family>(skb: *mut __sk_buff, hook: Hook) -> Option<i32> {
    let Seen { key, side, protocol, tcp_flags, length, .. } = look::<F>(skb)?;
    let tcp = protocol == protocol::TCP;
    // SAFETY: live map values and a live context.
    unsafe {
        let flow = &mut *F::find(&key, tcp)?;
        let now = clock::now();
        if flow.flags & (flow_flags::TRANSLATED | flow_flags::PROXIED) != 0 {
            let proxied = flow.flags & flow_flags::TRANSLATED == 0;
            return proxied.then_some(crate::PROXIED);
        }
        if clock::passed(flow.expires, now) || !flow::fresh(flow) {
            return None;
        }
        let opener = flow::from_opener(flow, side);
        let (sender, receiver) = if opener {
            (flow.opener_row, flow.other_row)
        } else {
            (flow.other_row, flow.opener_row)
        };
        // The interface proves who sends (from a pod) or receives (to a pod).
        let local = if hook == Hook::FromPod { sender } else { receiver };
        if ENDPOINT_ROWS.get(local)?.ifindex != (*skb).ifindex {
            return None;
        }
        let target = if hook == Hook::FromPod && receiver >= 2 {
            ENDPOINT_ROWS.get(receiver)?.ifindex
        } else {
            0
        };
        if flow::advance(flow, opener, length, tcp, tcp_flags, now) {
            closed::<F>(flow, &key, side, opener, protocol, tcp_flags, hook);
        }
        Some(if target == 0 { TC_ACT_OK } else { bpf_redirect_peer(target, 0) as i32 })
    }
}

#[inline(always)]
fn closed<F: Family>(
    flow: &FlowValue,
    key: &F::Key,
    side: Side,
    opener: bool,
    proto: u8,
    tcp_flags: u8,
    hook: Hook,
) {
    event::emit(EventKind::Close, |event| {
        F::describe(key, side, event);
        event.protocol = proto;
        event.tcp_flags = tcp_flags;
        event.fill_flow(flow, opener, hook == Hook::FromPod);
    });
}
