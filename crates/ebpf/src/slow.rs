//! The slow path: every packet that [`crate::fast`] does not know. Guards against spoofing,
//! translates services, judges both ends' policies and remembers the verdict.
//!
//! `?` carries the reason of a drop out; there is one way to forward, at the very end.

use aya_ebpf::{
    bindings::__sk_buff, helpers::generated::bpf_redirect_peer, macros::map, maps::PerCpuArray,
};
use palisade_abi::{
    Address, DropReason, EndpointKey, EndpointRow, EventKind, FlowValue, ROW_NONE, RULE_NONE,
    ServiceValue, event_flags, flow_flags, identity, metric_index, protocol, row_flags,
};

use crate::{
    Hook, clock, event, flow,
    flow::{Key, Side},
    guard,
    guard::Ruling,
    maps::{ENDPOINT_ROWS, ENDPOINTS, INTERFACES, IPCACHE},
    pace, packet,
    packet::{ACK, ETH_LEN, ETH_P_ARP, ETH_P_IP, ETH_P_IPV6, Kind, Packet, SYN, load, unmapped},
    policy,
    policy::Query,
    proxy,
    proxy::Leg,
    refuse,
    rewrite::{End, rewrite},
    service,
    service::Choice,
};

pub const TC_ACT_OK: i32 = 0;
const TC_ACT_SHOT: i32 = 2;

/// Who stands behind an address.
#[derive(Clone, Copy)]
#[repr(C)]
struct Peer {
    identity: u32,
    prefix: u32,
    row: u32,
    /// Of the row, before anything was read of it; 0 without an endpoint of this node.
    revision: u32,
}

/// Working memory: the stack (512 bytes, `MAX_BPF_STACK`) is too small for it.
#[repr(C)]
pub struct Scratch {
    packet: Packet,
    quoted: Packet,
    source: Peer,
    destination: Peer,
    /// What the Service was, for a packet that was translated.
    service: Address,
    service_port: u16,
    translated: bool,
    /// The proxy sent it.
    from_proxy: bool,
    /// It belongs to what the proxy opened.
    upstream: bool,
    /// Policy wants the proxy between the ends.
    redirected: bool,
    /// It goes to an endpoint, and is not from a socket of the node.
    forwarded: bool,
    /// The flow goes through the proxy.
    proxied: bool,
    /// The packet is of a flow that lives.
    covered: bool,
    quiet: bool,
    rejudged: bool,
    reply: bool,
    side: Side,
    hook: Hook,
    /// The endpoint at the hook, where there is one.
    own: Peer,
    source_shard: Shard,
    destination_shard: Shard,
    key: Key,
    egress: Query,
    ingress: Query,
    flow: FlowValue,
}

/// The slice of remote addresses that an address is in, and its revision before anything was
/// looked up.
#[derive(Clone, Copy)]
#[repr(C)]
struct Shard {
    number: u32,
    revision: u32,
}

impl Shard {
    #[inline(always)]
    fn of(address: &Address) -> Self {
        let number = flow::shard_of(address);
        Self { number, revision: flow::shard_revision(number) }
    }
}

#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

#[inline(never)]
pub fn slow(skb: *mut __sk_buff, hook: Hook) -> i32 {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else { return TC_ACT_SHOT };
    // SAFETY: programs of one CPU do not interrupt each other in tc, so this is the one user of
    // the slot; all fields are plain data that may be zero.
    let s = unsafe {
        core::ptr::write_bytes(scratch, 0, 1);
        &mut *scratch
    };
    s.hook = hook;
    s.from_proxy = hook != Hook::FromPod && proxy::sent(skb);
    match decide(skb, s) {
        Ok(action) => action,
        Err(reason) => {
            // SAFETY: a live context.
            event::count_drop(reason, unsafe { (*skb).len });
            if !s.quiet && event::drop_budget() {
                record(EventKind::Drop, s, reason as u8);
            }
            tell(skb, s, reason).unwrap_or(TC_ACT_SHOT)
        }
    }
}

/// Tells the sender where waiting is no use to it.
#[inline(always)]
fn tell(skb: *mut __sk_buff, s: &mut Scratch, reason: DropReason) -> Result<i32, DropReason> {
    match reason {
        DropReason::NoBackend => {}
        DropReason::TranslationCollision if s.hook == Hook::FromPod && opens_tcp(&s.packet) => {
            if s.translated {
                let (address, port) = (s.service, s.service_port);
                rewrite(skb, &mut s.packet, End::Destination, &address, port)?;
            }
        }
        _ => return Err(reason),
    }
    refuse::answer(skb, &s.packet)
}

#[inline(always)]
fn opens_tcp(packet: &Packet) -> bool {
    packet.protocol == protocol::TCP && packet.tcp_flags & (SYN | ACK) == SYN
}

#[inline(always)]
fn decide(skb: *mut __sk_buff, s: &mut Scratch) -> Result<i32, DropReason> {
    if s.hook == Hook::FromPod
        && let Some(leg) = proxy::again(skb)
    {
        read(skb, s)?;
        return proxy::give(skb, &s.packet, leg);
    }
    if s.hook == Hook::ToNet {
        read(skb, s)?;
    } else if at_pod(skb, s)? {
        return Ok(TC_ACT_OK);
    }
    judge(skb, s)
}

#[inline(always)]
fn read(skb: *mut __sk_buff, s: &mut Scratch) -> Result<(), DropReason> {
    // SAFETY: a live context.
    match unsafe { (*skb).protocol } {
        ETH_P_IP => packet::read(skb, &mut s.packet, ETH_LEN, false, false),
        ETH_P_IPV6 => packet::read(skb, &mut s.packet, ETH_LEN, true, false),
        _ => Err(DropReason::ForbiddenProtocol),
    }
}

/// Reads a packet at an endpoint, guards it, and names the backend that it goes to if it leaves for
/// a Service. True: upkeep of the link, which passes without judgement.
#[inline(never)]
fn at_pod(skb: *mut __sk_buff, s: &mut Scratch) -> Result<bool, DropReason> {
    let hook = s.hook;
    // SAFETY: a live context.
    let (ifindex, ethertype) = unsafe { ((*skb).ifindex, (*skb).protocol) };
    // SAFETY: a row number is one word; whatever it says is checked against the row.
    let own = *unsafe { INTERFACES.get(&ifindex) }.ok_or(DropReason::UnknownEndpoint)?;
    let row = ENDPOINT_ROWS.get(own).ok_or(DropReason::UnknownEndpoint)?;
    if row.flags & row_flags::VALID == 0 {
        return Err(DropReason::PolicyMissing);
    }
    if row.ifindex != ifindex {
        return Err(DropReason::UnknownEndpoint);
    }
    if hook == Hook::FromPod {
        guard::source_mac(skb, row)?;
    }
    if ethertype == ETH_P_ARP {
        if hook == Hook::FromPod {
            guard::arp(skb, row)?;
        }
        return Ok(true);
    }
    read(skb, s)?;
    if hook == Hook::FromPod {
        if leaving(skb, s, row)? {
            return Ok(true);
        }
    } else {
        if guard::icmpv6_to(&s.packet) {
            return Ok(true);
        }
        if !owns(row, &s.packet.destination, s.packet.ipv6) {
            s.quiet = guard::is_group_or_link(&s.packet);
            return Err(DropReason::UnknownEndpoint);
        }
    }
    s.own.row = own;
    (s.own.revision, s.own.identity) = known_as(row);
    if hook == Hook::FromPod {
        translate(skb, s)?;
    }
    Ok(false)
}

/// A row's revision, and the identity of that revision or a newer one.
#[inline(always)]
fn known_as(row: &EndpointRow) -> (u32, u32) {
    // SAFETY: live map values; the order in which they are read counts.
    unsafe { ((&raw const row.revision).read_volatile(), (&raw const row.identity).read_volatile()) }
}

#[inline(always)]
fn owns(row: &EndpointRow, address: &Address, ipv6: bool) -> bool {
    if ipv6 {
        return *address == row.ipv6 && row.ipv6 != [0; 16];
    }
    unmapped(address) == row.ipv4 && row.ipv4 != [0; 4]
}

/// Guards on what leaves an endpoint. True: upkeep of the link, which passes without judgement.
#[inline(never)]
fn leaving(skb: *mut __sk_buff, s: &mut Scratch, row: &EndpointRow) -> Result<bool, DropReason> {
    if s.packet.ipv6 && !owns(row, &s.packet.source, true) {
        return match guard::icmpv6_from(skb, &s.packet, row)? {
            Ruling::Pass => Ok(true),
            Ruling::Judge => Err(DropReason::Spoofed),
            Ruling::DropQuietly => {
                s.quiet = s.packet.source[0] == 0xfe || s.packet.source == [0; 16];
                Err(DropReason::Spoofed)
            }
        };
    }
    if s.packet.ipv6 && s.packet.protocol == protocol::ICMPV6 {
        match guard::icmpv6_from(skb, &s.packet, row)? {
            Ruling::Judge => {}
            Ruling::Pass => return Ok(true),
            Ruling::DropQuietly => {
                s.quiet = true;
                return Err(DropReason::ForbiddenProtocol);
            }
        }
    }
    if !owns(row, &s.packet.source, s.packet.ipv6) {
        return Err(DropReason::Spoofed);
    }
    if guard::is_group_or_link(&s.packet) {
        s.quiet = true;
        return Err(DropReason::ForbiddenProtocol);
    }
    Ok(false)
}

#[inline(always)]
fn judge(skb: *mut __sk_buff, s: &mut Scratch) -> Result<i32, DropReason> {
    // Revisions first, then what they stand for: a change in between makes the entry stale, never
    // wrongly fresh.
    s.source_shard = Shard::of(&s.packet.source);
    s.destination_shard = Shard::of(&s.packet.destination);
    find_peer(&s.packet.source, &mut s.source);
    find_peer(&s.packet.destination, &mut s.destination);
    let own = s.own;
    if own.row != ROW_NONE {
        let me = if s.hook == Hook::FromPod { &mut s.source } else { &mut s.destination };
        (me.row, me.revision, me.identity) = (own.row, own.revision, own.identity);
    }
    s.forwarded = s.hook == Hook::ToPod && !has_socket(skb);

    if s.packet.kind == Kind::IcmpError {
        match related(skb, s)? {
            Relation::Flow => return deliver(s),
            Relation::Proxy => return to_proxy(skb, s, Leg::Server),
            Relation::None => s.packet.kind = Kind::IcmpOther,
        }
    }

    s.side = s.key.set(&s.packet);
    let opening = opens_tcp(&s.packet);
    let known = entry(s, opening)?;
    if s.covered {
        let flow = known.ok_or(DropReason::NoFlow)?;
        // SAFETY: a live map value; concurrent writers only move counters and timers.
        follow(skb, s, unsafe { &mut *flow })?;
        return go_on(skb, s);
    }
    // Only a SYN opens a TCP flow, and an answer opens nothing. A late packet of the far end would
    // otherwise open a flow of its own, and what policy denies would return in it as a reply.
    let late = s.packet.protocol == protocol::TCP && !opening;
    if late || s.packet.kind == Kind::EchoReply {
        return Err(DropReason::NoFlow);
    }
    open(s, known)?;
    go_on(skb, s)
}

/// Whoever comes through the node under its address is nobody that is known: others translate those
/// who call a port of the node to the node's own address.
#[inline(always)]
fn know_host(s: &mut Scratch) {
    if s.forwarded && s.source.identity == identity::HOST {
        s.source.identity = identity::UNKNOWN;
    }
}

/// Whether a socket of the node sent it. What the node forwards has none.
#[inline(always)]
fn has_socket(skb: *mut __sk_buff) -> bool {
    // SAFETY: a live context; the socket is not looked into.
    !unsafe { (*skb).__bindgen_anon_2.sk }.is_null()
}

/// The entry of the packet's flow, whose key `s` then has, and in `s.covered` whether it lives and
/// the packet is of it.
///
/// A proxied flow has two: the proxy may speak to the server from the client's own address and
/// port. What the proxy sends is of its own flow unless it answers a client, and nobody but the
/// proxy answers a proxied client.
#[inline(never)]
fn entry(s: &mut Scratch, opening: bool) -> Result<Option<*mut FlowValue>, DropReason> {
    let known = s.key.find();
    let mut answered = false;
    if let Some(known) = known {
        // SAFETY: a live map value; concurrent writers only move counters and timers.
        let flow = unsafe { &*known };
        let own = flow.flags & flow_flags::KEPT == 0;
        let alive = own && !clock::passed(flow.expires, clock::now());
        let established = flow.flags & (flow_flags::REPLIED | flow_flags::CLOSING);
        if alive
            && opening
            && !s.from_proxy
            && established == flow_flags::REPLIED
            && collides(s, flow)
        {
            return Err(DropReason::TranslationCollision);
        }
        s.covered = alive && !opening && !reopens(s, flow);
        answered =
            s.covered && flow.flags & flow_flags::PROXIED != 0 && !flow::from_opener(flow, s.side);
    }
    let may_answer_proxy = !s.covered && !opening && has_ports(&s.packet);
    if s.from_proxy == answered && (s.from_proxy || !may_answer_proxy) {
        return Ok(known);
    }
    s.key.set_upstream();
    let upstream = s.key.find();
    s.covered = !opening && covers_proxy(s, upstream);
    s.upstream = s.covered || s.from_proxy;
    if s.upstream {
        return Ok(upstream);
    }
    if answered {
        return Err(DropReason::ProxyBypassed);
    }
    s.key.set(&s.packet);
    Ok(known)
}

/// Whether it is of a protocol that the proxy speaks.
#[inline(always)]
fn has_ports(packet: &Packet) -> bool {
    matches!(packet.protocol, protocol::TCP | protocol::UDP)
}

/// Whether the packet belongs to a living flow of the proxy's, in the direction that its sender
/// must have.
#[inline(always)]
fn covers_proxy(s: &Scratch, upstream: Option<*mut FlowValue>) -> bool {
    let Some(upstream) = upstream else { return false };
    // SAFETY: a live map value.
    let flow = unsafe { &*upstream };
    !clock::passed(flow.expires, clock::now()) && flow::from_opener(flow, s.side) == s.from_proxy
}

/// Where a packet goes that passes.
#[inline(always)]
fn go_on(skb: *mut __sk_buff, s: &Scratch) -> Result<i32, DropReason> {
    if s.from_proxy {
        return Ok(TC_ACT_OK);
    }
    if s.upstream {
        return to_proxy(skb, s, Leg::Server);
    }
    if s.proxied { to_proxy(skb, s, Leg::Client) } else { deliver(s) }
}

/// On to the proxy of this node. Only an ingress can give a packet to a socket.
#[inline(always)]
fn to_proxy(skb: *mut __sk_buff, s: &Scratch, leg: Leg) -> Result<i32, DropReason> {
    if s.hook == Hook::FromPod {
        let asks = leg == Leg::Client && s.packet.protocol == protocol::UDP;
        if asks && !pace::admit(s.own.row) {
            return Err(DropReason::TooManyQuestions);
        }
        return proxy::give(skb, &s.packet, leg);
    }
    Ok(proxy::send_round(skb, leg))
}

/// A packet of a flow that is alive.
#[inline(never)]
fn follow(skb: *mut __sk_buff, s: &mut Scratch, flow: &mut FlowValue) -> Result<(), DropReason> {
    let now = clock::now();
    let opener = flow::from_opener(flow, s.side);
    s.reply = !opener;
    if collides(s, flow) {
        return Err(DropReason::TranslationCollision);
    }
    if !flow::fresh(flow) {
        s.rejudged = true;
        // A denied flow stays in the table until it expires: its packets keep being judged as what
        // they are, and it goes on if policy allows it again.
        rejudge(s, opener, flow)?;
        event::count(metric_index::FLOWS_REJUDGED, 0);
    }
    s.proxied = flow.flags & flow_flags::PROXIED != 0;
    let tcp = s.packet.protocol == protocol::TCP;
    let length = s.packet.length;
    if flow::advance(flow, opener, length, tcp, s.packet.tcp_flags, now) && !s.upstream {
        s.flow = *flow;
        closed(s, opener);
    }
    if !opener && flow.flags & flow_flags::TRANSLATED != 0 {
        let (address, port) = (flow.nat_address, flow.nat_port);
        let backend = (s.packet.source, s.packet.source_port);
        rewrite(skb, &mut s.packet, End::Source, &address, port)?;
        if !tcp {
            keep(s, &backend, now);
        }
    }
    Ok(())
}

/// What a backend answered, now in the name of its Service, keeps the flow with it if it is with it
/// still: a client that mostly listens may say nothing for long. That of TCP says at least what it
/// heard.
#[inline(always)]
fn keep(s: &mut Scratch, backend: &(Address, u16), now: u32) {
    s.key.set(&s.packet);
    let Some(flow) = s.key.find() else { return };
    // SAFETY: a live map value.
    let flow = unsafe { &mut *flow };
    let own = flow.flags & flow_flags::KEPT != 0 && (flow.nat_address, flow.nat_port) == *backend;
    if own && !clock::passed(flow.expires, now) {
        renew(flow, flow::translation_lifetime(false, false), now);
    }
}

/// It lives at least so many seconds from now on.
#[inline(always)]
fn renew(flow: &mut FlowValue, lifetime: u32, now: u32) {
    let renewed = now.wrapping_add(clock::seconds(lifetime));
    if clock::passed(flow.expires, renewed) {
        flow.expires = renewed;
    }
}

/// Whether the opener reaches the same end by another name than it did when the flow began: by
/// another Service, or with a Service where there was none, or the other way round.
#[inline(always)]
fn collides(s: &Scratch, flow: &FlowValue) -> bool {
    let translated = flow.flags & flow_flags::TRANSLATED != 0;
    if s.translated {
        return !translated || flow.nat_address != s.service || flow.nat_port != s.service_port;
    }
    translated && flow::from_opener(flow, s.side)
}

/// A port that is used again under another name begins a new flow. TCP says so with a SYN, which is
/// refused while the other use lives: its answers could not be told apart.
#[inline(always)]
fn reopens(s: &Scratch, flow: &FlowValue) -> bool {
    s.packet.protocol != protocol::TCP && collides(s, flow)
}

/// Judges a flow again, always as its opener opened it.
#[inline(always)]
fn rejudge(s: &mut Scratch, from_opener: bool, flow: &mut FlowValue) -> Result<(), DropReason> {
    if from_opener {
        know_host(s);
    } else if s.destination.identity == identity::HOST {
        // An answer does not show who it is for.
        s.destination.identity = flow.opener_identity;
    }
    let (opener, other, port) = if from_opener {
        (s.source, s.destination, u16::from_be(s.packet.destination_port))
    } else {
        (s.destination, s.source, u16::from_be(s.packet.source_port))
    };
    let remote_shard = flow.shard;
    let shard_revision = match remote_shard {
        _ if flow.shard_revision == 0 => 0,
        number if number == s.source_shard.number => s.source_shard.revision,
        number if number == s.destination_shard.number => s.destination_shard.revision,
        _ => flow::NO_SHARD_REVISION,
    };
    verdict(s, from_opener, question_port(&s.packet, port))?;
    // An end that moved between rows is another flow's business: its rows no longer agree.
    if flow.opener_row != flow::endpoint_row(opener.row)
        || flow.other_row != flow::endpoint_row(other.row)
    {
        return Err(DropReason::NoFlow);
    }
    if s.redirected && flow.flags & (flow_flags::PROXIED | flow_flags::UPSTREAM) == 0 {
        // The proxy knows nothing of the connection: its client has to open another.
        if s.packet.protocol != protocol::UDP || !from_opener {
            return Err(DropReason::ProxyBypassed);
        }
        flow.flags |= flow_flags::PROXIED;
    }
    flow.opener_identity = opener.identity;
    flow.other_identity = other.identity;
    flow.shard_revision = shard_revision;
    flow.opener_revision = opener.revision;
    flow.other_revision = other.revision;
    Ok(())
}

/// What the policy is asked for: the port, or for ICMP the type of the message that opened.
#[inline(always)]
fn question_port(packet: &Packet, port: u16) -> u16 {
    match (packet.kind, packet.ipv6) {
        (Kind::Plain, _) => port,
        (Kind::EchoRequest | Kind::EchoReply, false) => 8,
        (Kind::EchoRequest | Kind::EchoReply, true) => 128,
        (Kind::IcmpError | Kind::IcmpOther, _) => u16::from(packet.icmp_type),
    }
}

/// Asks the opener's egress policy and the other end's ingress policy, where they are local.
#[inline(never)]
fn verdict(s: &mut Scratch, from_opener: bool, port: u16) -> Result<(), DropReason> {
    let (opener, other) =
        if from_opener { (s.source, s.destination) } else { (s.destination, s.source) };
    s.egress.rule = RULE_NONE;
    s.ingress.rule = RULE_NONE;
    s.redirected = false;
    if flow::endpoint_row(opener.row) != ROW_NONE {
        let row = valid_row(opener.row)?;
        s.egress.table = row.egress_table;
        s.redirected =
            ask(&mut s.egress, &other, s.packet.protocol, port, DropReason::EgressDenied)?;
    }
    if flow::endpoint_row(other.row) != ROW_NONE {
        let row = valid_row(other.row)?;
        s.ingress.table = row.ingress_table;
        s.redirected |=
            ask(&mut s.ingress, &opener, s.packet.protocol, port, DropReason::IngressDenied)?;
    }
    if s.redirected && !has_ports(&s.packet) {
        return Err(DropReason::ProxyBypassed);
    }
    Ok(())
}

#[inline(always)]
fn valid_row(row: u32) -> Result<&'static EndpointRow, DropReason> {
    let row = ENDPOINT_ROWS.get(row).ok_or(DropReason::PolicyMissing)?;
    if row.flags & row_flags::VALID == 0 {
        return Err(DropReason::PolicyMissing);
    }
    Ok(row)
}

/// Whether the policy wants the proxy in between.
#[inline(always)]
fn ask(
    query: &mut Query,
    peer: &Peer,
    protocol: u8,
    port: u16,
    denied: DropReason,
) -> Result<bool, DropReason> {
    query.identity = peer.identity;
    query.prefix = peer.prefix;
    query.protocol = protocol;
    query.port = port;
    match policy::judge(query, denied) {
        policy::ALLOW => Ok(false),
        policy::REDIRECT => Ok(true),
        reason if reason == DropReason::PolicyMissing as u32 => Err(DropReason::PolicyMissing),
        _ => Err(denied),
    }
}

/// A packet that no living flow covers: judged, and remembered where it can have answers.
#[inline(never)]
fn open(s: &mut Scratch, known: Option<*mut FlowValue>) -> Result<(), DropReason> {
    let now = clock::now();
    know_host(s);
    let port = question_port(&s.packet, u16::from_be(s.packet.destination_port));
    verdict(s, true, port)?;
    let (source, destination) = (s.source, s.destination);
    event::count(metric_index::SLOW_PATH, s.packet.length);
    let tcp = s.packet.protocol == protocol::TCP;
    if s.packet.kind == Kind::IcmpOther {
        return Ok(());
    }
    let (source_row, destination_row) =
        (flow::endpoint_row(source.row), flow::endpoint_row(destination.row));
    let (shard, shard_revision) = match (source_row, destination_row) {
        (ROW_NONE, _) => (s.source_shard.number, s.source_shard.revision),
        (_, ROW_NONE) => (s.destination_shard.number, s.destination_shard.revision),
        _ => (0, 0),
    };
    let mut flags = if s.side == Side::High { flow_flags::OPENER_HIGH } else { 0 };
    if s.translated {
        flags |= flow_flags::TRANSLATED;
    }
    if s.upstream {
        flags |= flow_flags::UPSTREAM;
    } else if s.redirected {
        flags |= flow_flags::PROXIED;
        s.proxied = true;
    }
    s.flow = FlowValue {
        flags,
        opener_row: source_row,
        other_row: destination_row,
        opener_revision: source.revision,
        other_revision: destination.revision,
        shard_revision,
        shard,
        opener_identity: source.identity,
        other_identity: destination.identity,
        nat_address: s.service,
        nat_port: s.service_port,
        // SAFETY: a live map value.
        masquerade_port: known.map_or(0, |known| unsafe { (*known).masquerade_port }),
        ..FlowValue::default()
    };
    let retransmitted = is_retransmission(known, flags, now);
    flow::advance(&mut s.flow, true, s.packet.length, tcp, s.packet.tcp_flags, now);
    s.key.enter(&s.flow, known.is_none())?;
    // What the proxy opens is told by what its client opened.
    if !retransmitted && !s.upstream {
        event::count(metric_index::FLOWS_CREATED, 0);
        record(EventKind::Open, s, 0);
    }
    Ok(())
}

/// The same end opens again what was never answered: a SYN sent twice.
#[inline(always)]
fn is_retransmission(known: Option<*mut FlowValue>, flags: u32, now: u32) -> bool {
    let Some(known) = known else { return false };
    // SAFETY: a live map value.
    let known = unsafe { &*known };
    known.flags == flags && !clock::passed(known.expires, now)
}

/// What an ICMP error is about.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Relation {
    /// Nothing that lives here, or its sender has no say in it.
    None,
    /// A flow between two ends.
    Flow,
    /// A connection of the proxy.
    Proxy,
}

/// Whether an ICMP error is about a flow that lives, sent by an end of it or by a router.
#[inline(never)]
fn related(skb: *mut __sk_buff, s: &mut Scratch) -> Result<Relation, DropReason> {
    let version: u8 = load(skb, s.packet.l4 + 8)?;
    let ipv6 = version >> 4 == 6;
    if ipv6 != s.packet.ipv6 {
        return Err(DropReason::Malformed);
    }
    let offset = s.packet.l4 + 8;
    packet::read(skb, &mut s.quoted, offset, ipv6, true)?;
    // The error goes to whoever sent the quoted packet.
    if s.quoted.source != s.packet.destination {
        return Ok(Relation::None);
    }
    let from_end = s.quoted.destination == s.packet.source;
    let from_pod = s.hook == Hook::FromPod || s.source.identity >= identity::CLUSTER_MIN;
    if from_pod && !from_end {
        return Ok(Relation::None);
    }
    s.key.set(&s.quoted);
    match relation(&s.key) {
        Relation::None if has_ports(&s.quoted) => {
            s.key.set_upstream();
            Ok(relation(&s.key))
        }
        relation => Ok(relation),
    }
}

#[inline(always)]
fn relation(key: &Key) -> Relation {
    let Some(flow) = key.find() else { return Relation::None };
    // SAFETY: a live map value.
    let flow = unsafe { &*flow };
    let kept = flow.flags & flow_flags::KEPT != 0;
    if kept || clock::passed(flow.expires, clock::now()) || !flow::fresh(flow) {
        return Relation::None;
    }
    if flow.flags & (flow_flags::PROXIED | flow_flags::UPSTREAM) != 0 {
        return Relation::Proxy;
    }
    Relation::Flow
}

/// Sends a packet to a Service address on to a backend.
#[inline(never)]
fn translate(skb: *mut __sk_buff, s: &mut Scratch) -> Result<(), DropReason> {
    if !matches!(s.packet.protocol, protocol::TCP | protocol::UDP) {
        return Ok(());
    }
    let port = s.packet.destination_port;
    let protocol = s.packet.protocol;
    let side = s.key.set(&s.packet);
    let Some(service) = service::find(&s.packet.destination, port, protocol) else {
        return Ok(());
    };
    let now = clock::now();
    let opening = opens_tcp(&s.packet);
    let tcp = protocol == protocol::TCP;
    let (address, port) = match kept(&s.key, service, opening, now) {
        Some(backend) => backend,
        // Begun with whom the address was before it became the Service's, if it was begun at all.
        None if tcp && !opening => return Ok(()),
        None => {
            let (address, port) = match service::choose(&s.packet.destination, port, protocol) {
                Choice::NoService => return Ok(()),
                Choice::NoBackend => return Err(DropReason::NoBackend),
                Choice::Backend(backend) => (backend.address, backend.port),
            };
            s.flow = FlowValue {
                flags: flow_flags::TRANSLATED
                    | flow_flags::KEPT
                    | if side == Side::High { flow_flags::OPENER_HIGH } else { 0 },
                opener_row: s.own.row,
                shard_revision: service.version,
                nat_address: address,
                nat_port: port,
                ..FlowValue::default()
            };
            flow::advance(&mut s.flow, true, 0, tcp, 0, now);
            s.key.enter(&s.flow, s.key.find().is_none())?;
            (address, port)
        }
    };
    s.service = s.packet.destination;
    s.service_port = s.packet.destination_port;
    s.translated = true;
    rewrite(skb, &mut s.packet, End::Destination, &address, port)
}

/// The backend that a flow began with. A TCP connection stays with it, whatever backends the Service
/// has by now; what opens one, and each datagram, goes to it only as long as the Service has it: its
/// port may be used again long after a backend went without a word.
#[inline(always)]
fn kept(key: &Key, service: &ServiceValue, opening: bool, now: u32) -> Option<(Address, u16)> {
    // SAFETY: a live map value.
    let flow = unsafe { &mut *key.find()? };
    if flow.flags & flow_flags::TRANSLATED == 0 || clock::passed(flow.expires, now) {
        return None;
    }
    if (opening || !key.tcp()) && flow.shard_revision != service.version {
        if !service::has(service, &flow.nat_address, flow.nat_port) {
            return None;
        }
        flow.shard_revision = service.version;
    }
    renew(flow, flow::translation_lifetime(key.tcp(), opening), now);
    Some((flow.nat_address, flow.nat_port))
}

#[inline(never)]
fn find_peer(address: &Address, peer: &mut Peer) {
    // SAFETY: not preallocated, so the value stays while this program runs.
    if let Some(value) = unsafe { ENDPOINTS.get(&EndpointKey { address: *address }) } {
        peer.row = value.row;
        peer.prefix = value.prefix;
        (peer.revision, peer.identity) = (0, value.identity);
        if flow::endpoint_row(value.row) != ROW_NONE
            && let Some(row) = ENDPOINT_ROWS.get(value.row)
        {
            // The row is what the local policy was compiled for.
            (peer.revision, peer.identity) = known_as(row);
        }
        return;
    }
    (peer.row, peer.revision) = (ROW_NONE, 0);
    let key = aya_ebpf::maps::lpm_trie::Key::new(128, *address);
    match IPCACHE.get(&key) {
        Some(value) => (peer.identity, peer.prefix) = (value.identity, value.prefix),
        None => (peer.identity, peer.prefix) = (identity::UNKNOWN, 0),
    }
}

/// Forwards: into the endpoint of this node that the packet is for, else into the node's stack.
#[inline(always)]
fn deliver(s: &Scratch) -> Result<i32, DropReason> {
    if s.hook == Hook::ToPod || flow::endpoint_row(s.destination.row) == ROW_NONE {
        return Ok(TC_ACT_OK);
    }
    let row = valid_row(s.destination.row)?;
    if !owns(row, &s.packet.destination, s.packet.ipv6) {
        return Err(DropReason::UnknownEndpoint);
    }
    // SAFETY: the helper checks the interface.
    Ok(unsafe { bpf_redirect_peer(row.ifindex, 0) } as i32)
}

#[inline(always)]
fn closed(s: &mut Scratch, opener: bool) {
    event::emit(EventKind::Close, |event| {
        describe(event, s);
        event.fill_flow(&s.flow, opener, s.hook == Hook::FromPod);
    });
}

#[inline(always)]
fn describe(event: &mut palisade_abi::Event, s: &Scratch) {
    event.source = s.packet.source;
    event.destination = s.packet.destination;
    event.protocol = s.packet.protocol;
    event.tcp_flags = s.packet.tcp_flags;
    match s.packet.kind {
        Kind::Plain => {
            event.source_port = u16::from_be(s.packet.source_port);
            event.destination_port = u16::from_be(s.packet.destination_port);
        }
        _ => event.destination_port = u16::from(s.packet.icmp_type),
    }
    if s.packet.ipv6 {
        event.flags |= event_flags::IPV6;
    }
}

#[inline(never)]
fn record(kind: EventKind, s: &mut Scratch, reason: u8) {
    event::emit(kind, |event| {
        describe(event, s);
        event.reason = reason;
        event.source_identity = s.source.identity;
        event.destination_identity = s.destination.identity;
        event.source_row = flow::endpoint_row(s.source.row);
        event.destination_row = flow::endpoint_row(s.destination.row);
        event.egress_table = s.egress.table;
        event.egress_rule = s.egress.rule;
        event.ingress_table = s.ingress.table;
        event.ingress_rule = s.ingress.rule;
        if s.hook == Hook::FromPod {
            event.flags |= event_flags::EGRESS;
        }
        if s.reply {
            event.flags |= event_flags::REPLY;
        }
        if s.rejudged {
            event.flags |= event_flags::REJUDGED;
        }
        if s.proxied {
            event.flags |= event_flags::PROXIED;
        }
    });
}
