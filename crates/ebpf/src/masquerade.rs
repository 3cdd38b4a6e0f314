//! Pods reach what is outside the cluster with their node's address, and answers reach the pods: on
//! the uplink, and nowhere else. Whatever judges, follows and tells of a flow sees the pod's own.
//!
//! A flow's port on the node is in the flow's entry. `MASQUERADED_TCP` and `MASQUERADED` say whose a
//! port is, as long as that flow lives; after that they say nothing, and the port is anybody's.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{__sk_buff, BPF_NOEXIST},
    helpers::generated::{bpf_get_prandom_u32, bpf_loop, bpf_sk_release},
    macros::map,
    maps::{PerCpuArray, lpm_trie::Key as Prefix},
};
use palisade_abi::{
    Address, DropReason, EndpointKey, EventKind, FlowValue, MASQUERADE_FIRST_PORT, MasqueradeKey,
    MasqueradeSettings, MasqueradeValue, ROW_NONE, VXLAN_PORT, event_flags, flow_direction,
    identity, protocol,
};

use crate::{
    clock, event,
    fast::{self, look},
    flow::{self, Key},
    lookup::{Tuple4, Tuple6, find_tcp, find_udp},
    maps::{ENDPOINTS, IPCACHE, MASQUERADE, MASQUERADED, MASQUERADED_TCP},
    net,
    packet::{self, ACK, ETH_LEN, Kind, Packet, SYN, load, mapped},
    rewrite::{End, Name, rewrite, rewrite_error},
};

const TC_ACT_OK: i32 = 0;
const TC_ACT_SHOT: i32 = 2;
/// How many ports are drawn before a flow is given up: with nine of ten ports taken, one flow in a
/// thousand.
const DRAWS: u32 = 96;

/// Working memory, as in [`crate::slow`].
#[repr(C)]
struct Scratch {
    packet: Packet,
    /// What an ICMP error quotes.
    quoted: Packet,
    /// A packet as it is between the pod and the remote end.
    inside: Packet,
    key: Key,
}

#[map]
static MASQUERADE_SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

#[inline(always)]
fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: programs of one CPU do not interrupt each other in tc, so this is the one user of
    // the slot; all fields are plain data that may be zero.
    MASQUERADE_SCRATCH.get_ptr_mut(0).map(|scratch| unsafe { &mut *scratch })
}

/// The settings, where they ask for it.
#[inline(always)]
fn settings() -> Option<&'static MasqueradeSettings> {
    MASQUERADE.get(0).filter(|settings| settings.enabled != 0)
}

/// The node's address of the family of `address`.
#[inline(always)]
fn own(settings: &MasqueradeSettings, address: &Address) -> Address {
    if address[..12] == mapped([0; 4])[..12] { settings.ipv4 } else { settings.ipv6 }
}

#[inline(always)]
fn is_own(address: &Address) -> bool {
    settings().is_some_and(|settings| *address == own(settings, address))
}

#[inline(always)]
fn is_ours(port: u16) -> bool {
    u16::from_be(port) >= MASQUERADE_FIRST_PORT
}

#[inline(always)]
fn is_local_pod(address: &Address) -> bool {
    // SAFETY: not preallocated, so the value stays while this program runs.
    unsafe { ENDPOINTS.get(&EndpointKey { address: *address }) }
        .is_some_and(|owner| flow::endpoint_row(owner.row) != ROW_NONE)
}

#[inline(always)]
fn is_outside(address: &Address) -> bool {
    // SAFETY: as above.
    if unsafe { ENDPOINTS.get(&EndpointKey { address: *address }) }.is_some() {
        return false;
    }
    let found = IPCACHE.get(&Prefix::new(128, *address));
    found.is_none_or(|value| identity::is_world(value.identity))
}

/// What leaves by the uplink; `sent` by the proxy.
#[inline(always)]
pub fn leave(skb: *mut __sk_buff, sent: bool) -> i32 {
    let Some(settings) = settings() else { return TC_ACT_OK };
    let Ok(Some((source, ipv6))) = net::source(skb) else { return TC_ACT_OK };
    // The node's own errors may quote what was on its way to a pod.
    let concerns =
        if source == own(settings, &source) { is_icmp(skb, ipv6) } else { is_local_pod(&source) };
    if !concerns {
        return TC_ACT_OK;
    }
    masquerade_leave(skb, u32::from(sent), u32::from(ipv6))
}

#[inline(always)]
fn is_icmp(skb: *mut __sk_buff, ipv6: bool) -> bool {
    let (at, expected) = if ipv6 { (6, protocol::ICMPV6) } else { (9, protocol::ICMP) };
    load(skb, ETH_LEN + at) == Ok(expected)
}

/// What a pod of this node or the node itself sent. A global function, which the verifier walks
/// once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn masquerade_leave(skb: *mut __sk_buff, sent: u32, ipv6: u32) -> i32 {
    let Some(s) = scratch() else { return TC_ACT_SHOT };
    let done = packet::read(skb, &mut s.packet, ETH_LEN, ipv6 != 0, false)
        .and_then(|()| hide(skb, s, sent != 0));
    match done {
        Ok(()) => TC_ACT_OK,
        Err(_) if is_own(&s.packet.source) => TC_ACT_OK,
        Err(reason) => refuse(skb, &s.packet, reason),
    }
}

#[inline(always)]
fn hide(skb: *mut __sk_buff, s: &mut Scratch, sent: bool) -> Result<(), DropReason> {
    if s.packet.kind == Kind::IcmpError {
        return hide_error(skb, s);
    }
    if is_own(&s.packet.source) {
        return Ok(());
    }
    let side = s.key.set(&s.packet);
    let mut direction = flow_direction::NONE;
    let mut found = None;
    if sent {
        s.key.set_upstream();
        direction = flow_direction::UPSTREAM;
        found = living(&s.key);
    }
    if found.is_none() {
        s.key.set(&s.packet);
        direction = flow_direction::NONE;
        found = living(&s.key);
    }
    let Some(flow) = found else { return without_flow(&s.packet.destination) };
    // SAFETY: a live map value.
    let flow = unsafe { &mut *flow };
    // Who was called answers as who was called.
    if !flow::from_opener(flow, side) || !identity::is_world(flow.other_identity) {
        return Ok(());
    }
    if !is_translatable(s.packet.protocol) || is_envelope(&s.packet) {
        return Err(DropReason::NotMasqueraded);
    }
    let owner = MasqueradeValue {
        address: s.packet.source,
        port: s.packet.source_port,
        direction,
        reserved: 0,
    };
    let key = MasqueradeKey {
        remote: s.packet.destination,
        remote_port: s.packet.destination_port,
        port: flow.masquerade_port,
        protocol: s.packet.protocol,
        reserved: [0; 3],
    };
    let claim = Claim { key, owner, ipv6: u32::from(s.packet.ipv6) };
    let mut search = Search { skb, claim, outcome: TAKEN };
    if search.claim.key.port != 0 {
        search.outcome = masquerade_claim(skb, &search.claim);
    }
    if search.outcome == TAKEN {
        // SAFETY: the callback has the signature that the helper documents, and the search
        // outlives it.
        unsafe { bpf_loop(DRAWS, draw_port as *mut c_void, (&raw mut search).cast(), 0) };
    }
    let port = search.claim.key.port;
    match search.outcome {
        CLAIMED => flow.masquerade_port = port,
        FULL => return Err(DropReason::MasqueradeTableFull),
        _ => return Err(DropReason::NotMasqueraded),
    }
    show(skb, s, port)
}

#[inline(always)]
fn is_translatable(protocol: u8) -> bool {
    matches!(protocol, protocol::TCP | protocol::UDP | protocol::ICMP | protocol::ICMPV6)
}

/// An envelope of the overlay. Under the node's name a pod could speak for all pods of the node, to
/// any that listens at an address which is not known to be a node's.
#[inline(always)]
fn is_envelope(packet: &Packet) -> bool {
    packet.protocol == protocol::UDP && u16::from_be(packet.destination_port) == VXLAN_PORT
}

/// A packet that no flow covers stays inside the cluster.
#[inline(always)]
fn without_flow(destination: &Address) -> Result<(), DropReason> {
    if is_outside(destination) { Err(DropReason::NotMasqueraded) } else { Ok(()) }
}

/// Gives the packet the node's address and this port.
#[inline(always)]
fn show(skb: *mut __sk_buff, s: &mut Scratch, port: u16) -> Result<(), DropReason> {
    let settings = settings().ok_or(DropReason::NotMasqueraded)?;
    let address = own(settings, &s.packet.source);
    if address == [0; 16] {
        return Err(DropReason::NotMasqueraded);
    }
    rewrite(skb, &mut s.packet, End::Source, &address, port)
}

/// An error about what a pod was sent, by the pod or by its node.
#[inline(always)]
fn hide_error(skb: *mut __sk_buff, s: &mut Scratch) -> Result<(), DropReason> {
    quoted(skb, s)?;
    // It is for whoever sent what it quotes, or else about nothing that is known.
    if s.quoted.source != s.packet.destination {
        return without_flow(&s.packet.destination);
    }
    let side = s.key.set(&s.quoted);
    let Some(flow) = living(&s.key) else { return without_flow(&s.packet.destination) };
    // SAFETY: a live map value.
    let flow = unsafe { &*flow };
    if flow::from_opener(flow, side) || !identity::is_world(flow.other_identity) {
        return Ok(());
    }
    let settings = settings().ok_or(DropReason::NotMasqueraded)?;
    let address = own(settings, &s.packet.source);
    let source = &s.packet.source;
    if flow.masquerade_port == 0 || (*source != s.quoted.destination && *source != address) {
        return Err(DropReason::NotMasqueraded);
    }
    let name = Name { address, port: flow.masquerade_port };
    rewrite_error(skb, &s.packet, &s.quoted, End::Source, &name)
}

#[inline(always)]
fn quoted(skb: *mut __sk_buff, s: &mut Scratch) -> Result<(), DropReason> {
    let offset = s.packet.l4 + 8;
    let version: u8 = load(skb, offset)?;
    if (version >> 4 == 6) != s.packet.ipv6 {
        return Err(DropReason::Malformed);
    }
    let ipv6 = s.packet.ipv6;
    packet::read(skb, &mut s.quoted, offset, ipv6, true)
}

#[inline(never)]
fn living(key: &Key) -> Option<*mut FlowValue> {
    let found = key.find()?;
    // SAFETY: a live map value.
    let expires = unsafe { (*found).expires };
    if clock::passed(expires, clock::now()) { None } else { Some(found) }
}

/// A port that a flow would have.
#[repr(C)]
struct Claim {
    key: MasqueradeKey,
    owner: MasqueradeValue,
    ipv6: u32,
}

/// The search for a port, on the stack: `bpf_loop` hands on nothing else.
#[repr(C)]
struct Search {
    skb: *mut __sk_buff,
    claim: Claim,
    outcome: u32,
}

const NEXT: i64 = 0;
const STOP: i64 = 1;

extern "C" fn draw_port(_: u64, search: *mut Search) -> i64 {
    // SAFETY: `hide`'s own, handed through by the helper.
    let search = unsafe { &mut *search };
    // SAFETY: the helper takes nothing and cannot fail.
    let random = unsafe { bpf_get_prandom_u32() } as u16;
    let port = MASQUERADE_FIRST_PORT | random;
    if is_left_to_others(&search.claim.owner.address, port) {
        return NEXT;
    }
    search.claim.key.port = port.to_be();
    search.outcome = masquerade_claim(search.skb, &search.claim);
    if search.outcome == TAKEN { NEXT } else { STOP }
}

/// A quarter of the ports, another one for each pod: no pod takes all that lead to a remote end.
#[inline(always)]
fn is_left_to_others(pod: &Address, port: u16) -> bool {
    let [.., a, b, c, d] = *pod;
    let mixed = u32::from_be_bytes([a, b, c, d]) ^ u32::from(port).wrapping_mul(0x9e37_79b9);
    // The finaliser of MurmurHash3: pods with neighbouring addresses have unlike quarters.
    let mixed = (mixed ^ (mixed >> 16)).wrapping_mul(0x85eb_ca6b);
    let mixed = (mixed ^ (mixed >> 13)).wrapping_mul(0xc2b2_ae35);
    (mixed ^ (mixed >> 16)) >> 30 == 0
}

/// Answers of [`masquerade_claim`]. Of 0 and 1 the compiler would make numbers for `bpf_loop`, of
/// which the verifier then does not see that they are nothing else.
const CLAIMED: u32 = 2;
const TAKEN: u32 = 3;
const FULL: u32 = 4;

/// Whether the port is the flow's now. A global function, which the verifier walks once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn masquerade_claim(skb: *mut __sk_buff, claim: *const Claim) -> u32 {
    // SAFETY: the verifier wants the pointer checked, and knows the size of what it points at.
    let Some(claim) = (unsafe { claim.as_ref() }) else { return TAKEN };
    let Some(s) = scratch() else { return TAKEN };
    if let Some(holder) = holder(&claim.key) {
        if holder == claim.owner {
            return CLAIMED;
        }
        if belongs_to(&claim.key, &holder, claim.ipv6 != 0, s).is_some() {
            return TAKEN;
        }
        forget(&claim.key);
    }
    // The node's sockets have none of these ports, but for what asked for one, or was there before
    // they were reserved.
    if is_nodes(skb, &claim.key, claim.ipv6 != 0) {
        return TAKEN;
    }
    match enter(&claim.key, &claim.owner) {
        Ok(()) => CLAIMED,
        Err(EXISTS) => TAKEN,
        Err(_) => FULL,
    }
}

/// `-EEXIST`: somebody else was faster.
const EXISTS: i32 = -17;

#[inline(always)]
fn holder(key: &MasqueradeKey) -> Option<MasqueradeValue> {
    // SAFETY: the value is copied out at once; of the one table it stays while this program runs,
    // and of the other half of two values names no flow that lives, or one that is spared.
    let found = unsafe {
        if key.protocol == protocol::TCP { MASQUERADED_TCP.get(key) } else { MASQUERADED.get(key) }
    };
    found.copied()
}

#[inline(always)]
fn forget(key: &MasqueradeKey) {
    // Who else forgot it meanwhile did the same.
    let _ = match key.protocol {
        protocol::TCP => MASQUERADED_TCP.remove(key),
        _ => MASQUERADED.remove(key),
    };
}

#[inline(always)]
fn enter(key: &MasqueradeKey, owner: &MasqueradeValue) -> Result<(), i32> {
    let new = u64::from(BPF_NOEXIST);
    match key.protocol {
        protocol::TCP => MASQUERADED_TCP.insert(key, owner, new),
        _ => MASQUERADED.insert(key, owner, new),
    }
}

/// Whether answers at this port are for a socket of the node.
#[inline(always)]
fn is_nodes(skb: *mut __sk_buff, key: &MasqueradeKey, ipv6: bool) -> bool {
    let Some(settings) = settings() else { return false };
    let own = own(settings, &key.remote);
    let ports = [key.remote_port, key.port];
    if ipv6 {
        has_socket(skb, key.protocol, &Tuple6::new(&key.remote, &own, ports))
    } else {
        has_socket(skb, key.protocol, &Tuple4::new(&key.remote, &own, ports))
    }
}

#[inline(always)]
fn has_socket<T>(skb: *mut __sk_buff, protocol: u8, tuple: &T) -> bool {
    let socket = match protocol {
        protocol::TCP => find_tcp(skb, tuple),
        protocol::UDP => find_udp(skb, tuple),
        _ => return false,
    };
    if socket.is_null() {
        return false;
    }
    // SAFETY: just looked up, and not used any more.
    unsafe { bpf_sk_release(socket.cast()) };
    true
}

/// The living flow whose port it is; `s.inside` is the answer in it then.
#[inline(never)]
fn belongs_to(
    key: &MasqueradeKey,
    owner: &MasqueradeValue,
    ipv6: bool,
    s: &mut Scratch,
) -> Option<*mut FlowValue> {
    s.inside.source = key.remote;
    s.inside.source_port = key.remote_port;
    s.inside.destination = owner.address;
    s.inside.destination_port = owner.port;
    s.inside.protocol = key.protocol;
    s.inside.ipv6 = ipv6;
    s.inside.kind = match key.protocol {
        protocol::ICMP | protocol::ICMPV6 => Kind::EchoReply,
        _ => Kind::Plain,
    };
    s.key.set(&s.inside);
    if owner.direction == flow_direction::UPSTREAM {
        s.key.set_upstream();
    }
    living(&s.key)
}

/// What arrives at the uplink: what answers a pod goes on to it, all else stays as it is.
#[inline(always)]
pub fn arrive(skb: *mut __sk_buff, ipv6: bool) -> i32 {
    let Some(settings) = settings() else { return TC_ACT_OK };
    let destination =
        if ipv6 { load(skb, ETH_LEN + 24) } else { load(skb, ETH_LEN + 16).map(mapped) };
    if !destination.is_ok_and(|destination| destination == own(settings, &destination)) {
        return TC_ACT_OK;
    }
    // The usual packet to the node itself, an envelope above all, is seen at a glance.
    let port = if ipv6 {
        look::<fast::V6>(skb).map(|seen| seen.ports[1])
    } else {
        look::<fast::V4>(skb).map(|seen| seen.ports[1])
    };
    if port.is_some_and(|port| !is_ours(port)) {
        return TC_ACT_OK;
    }
    masquerade_arrive(skb, u32::from(ipv6))
}

/// A global function, which the verifier walks once.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn masquerade_arrive(skb: *mut __sk_buff, ipv6: u32) -> i32 {
    let Some(s) = scratch() else { return TC_ACT_SHOT };
    if packet::read(skb, &mut s.packet, ETH_LEN, ipv6 != 0, false).is_err() {
        return TC_ACT_OK;
    }
    match reveal(skb, s) {
        Ok(()) => TC_ACT_OK,
        Err(reason) => refuse(skb, &s.packet, reason),
    }
}

#[inline(always)]
fn reveal(skb: *mut __sk_buff, s: &mut Scratch) -> Result<(), DropReason> {
    let error = s.packet.kind == Kind::IcmpError;
    let key = match s.packet.kind {
        // Nobody opens anything here.
        Kind::Plain if s.packet.tcp_flags & (SYN | ACK) == SYN => return Ok(()),
        Kind::Plain | Kind::EchoReply => MasqueradeKey {
            remote: s.packet.source,
            remote_port: s.packet.source_port,
            port: s.packet.destination_port,
            protocol: s.packet.protocol,
            reserved: [0; 3],
        },
        Kind::IcmpError => {
            if quoted(skb, s).is_err() || s.quoted.source != s.packet.destination {
                return Ok(());
            }
            MasqueradeKey {
                remote: s.quoted.destination,
                remote_port: s.quoted.destination_port,
                port: s.quoted.source_port,
                protocol: s.quoted.protocol,
                reserved: [0; 3],
            }
        }
        Kind::EchoRequest | Kind::IcmpOther => return Ok(()),
    };
    if !is_ours(key.port) {
        return Ok(());
    }
    let Some(owner) = holder(&key) else { return Ok(()) };
    if belongs_to(&key, &owner, s.packet.ipv6, s).is_none() {
        return Ok(());
    }
    let (address, port) = (owner.address, owner.port);
    if error {
        return rewrite_error(skb, &s.packet, &s.quoted, End::Destination, &Name { address, port });
    }
    rewrite(skb, &mut s.packet, End::Destination, &address, port)
}

#[inline(always)]
fn refuse(skb: *mut __sk_buff, packet: &Packet, reason: DropReason) -> i32 {
    // SAFETY: a live context.
    event::count_drop(reason, unsafe { (*skb).len });
    if event::drop_budget() {
        event::emit(EventKind::Drop, |event| {
            event.source = packet.source;
            event.destination = packet.destination;
            event.source_port = u16::from_be(packet.source_port);
            event.destination_port = u16::from_be(packet.destination_port);
            event.protocol = packet.protocol;
            event.reason = reason as u8;
            if packet.ipv6 {
                event.flags |= event_flags::IPV6;
            }
        });
    }
    TC_ACT_SHOT
}
