//! The verdict of one compiled policy: see `palisade_abi`'s policy tables for the algorithm.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_loop;
use palisade_abi::{
    CHUNK_RULES, ChunkKey, ChunkValue, DropReason, MAX_CHUNKS, PREFIX_POD_BIT, PeerKey, PortKey,
    RULE_NONE, TABLE_ALLOW_ALL, TABLE_NONE, identity,
};

use crate::maps::{CHUNKS, PEERS, PORTS};

/// A question to a table, and which rule answered it.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Query {
    pub table: u32,
    /// Identity of the peer.
    pub identity: u32,
    /// Longest policy prefix of the peer's address, 0 for none.
    pub prefix: u32,
    pub rule: u32,
    /// Destination port or ICMP type, host byte order.
    pub port: u16,
    pub protocol: u8,
}

/// An answer of [`judge`]: let the flow pass.
pub const ALLOW: u32 = 0;
/// An answer of [`judge`]: let the flow pass through the proxy. No [`DropReason`] has this number.
pub const REDIRECT: u32 = 256;

/// The walk over a table's chunks.
#[repr(C)]
struct Walk {
    query: Query,
    /// As of [`judge`].
    answer: u32,
    denied: u32,
}

/// [`ALLOW`], [`REDIRECT`], or the number of a [`DropReason`], of which `denied` is the one for
/// default deny and deny rules.
#[inline(always)]
pub fn judge(query: &mut Query, denied: DropReason) -> u32 {
    let asked = u32::from(query.protocol) << 16 | u32::from(query.port);
    let answer = policy_judge(query.table, query.identity, query.prefix, asked, denied as u32);
    query.rule = (answer >> 32) as u32;
    answer as u32
}

/// [`judge`], with the protocol above the port in one argument and the rule above the answer in
/// the result.
///
/// The name is exported, which makes it a global function: the verifier walks it once, for any
/// arguments, and not again for each way that leads to it (Linux 5.6).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn policy_judge(table: u32, identity: u32, prefix: u32, asked: u32, denied: u32) -> u64 {
    let answer = |rule: u32, answer: u32| u64::from(rule) << 32 | u64::from(answer);
    if table == TABLE_ALLOW_ALL {
        return answer(RULE_NONE, ALLOW);
    }
    if table == TABLE_NONE {
        return answer(RULE_NONE, DropReason::PolicyMissing as u32);
    }
    let query = Query {
        table,
        identity,
        prefix,
        rule: RULE_NONE,
        port: asked as u16,
        protocol: (asked >> 16) as u8,
    };
    let mut walk = Walk { query, answer: denied, denied };
    // `bpf_loop` (Linux 5.17): the verifier walks the callback until it learns nothing new, where
    // it would walk every turn of a plain loop.
    // SAFETY: the callback has the signature that the helper documents, and the walk outlives it.
    unsafe {
        bpf_loop(MAX_CHUNKS, ask_chunk as *mut c_void, (&raw mut walk).cast(), 0);
    }
    answer(walk.query.rule, walk.answer)
}

const NEXT: i64 = 0;
const STOP: i64 = 1;

extern "C" fn ask_chunk(index: u64, walk: *mut Walk) -> i64 {
    // SAFETY: `judge`'s own, handed through by the helper.
    let walk = unsafe { &mut *walk };
    let chunk = index as u32;
    let key = ChunkKey { table: walk.query.table, chunk };
    // SAFETY: not preallocated, so the value stays while this program runs.
    let Some(head) = (unsafe { CHUNKS.get(&key) }) else {
        walk.answer = DropReason::PolicyMissing as u32;
        return STOP;
    };
    let peers = peer_rules(&walk.query, chunk, head);
    if peers[0] | peers[1] != 0 {
        let ports = port_rules(&walk.query, chunk, head);
        let low = peers[0] & ports[0];
        let high = peers[1] & ports[1];
        if low | high != 0 {
            let (word, hit) = if low != 0 { (0, low) } else { (1, high) };
            let first = hit & hit.wrapping_neg();
            walk.query.rule = chunk * CHUNK_RULES + word * 64 + hit.trailing_zeros();
            walk.answer = if first & head.deny[word as usize] != 0 {
                walk.denied
            } else if first & head.redirect[word as usize] != 0 {
                REDIRECT
            } else {
                ALLOW
            };
            return STOP;
        }
    }
    if chunk + 1 >= head.chunks { STOP } else { NEXT }
}

#[inline(always)]
fn peer_rules(query: &Query, chunk: u32, head: &ChunkValue) -> [u64; 2] {
    let key = PeerKey { table: query.table, chunk, id: query.identity };
    // SAFETY: as in `ask_chunk`.
    let mut rules = unsafe { PEERS.get(&key) }.map_or(head.default_peers, |peer| peer.rules);
    if query.prefix != 0 {
        let kind = if identity::is_world(query.identity) { 0 } else { PREFIX_POD_BIT };
        let key = PeerKey { table: query.table, chunk, id: query.prefix | kind };
        // SAFETY: as in `ask_chunk`.
        if let Some(prefix) = unsafe { PEERS.get(&key) } {
            rules[0] |= prefix.rules[0];
            rules[1] |= prefix.rules[1];
        }
    }
    rules
}

/// The walk over the prefix lengths of a chunk's ports, from the longest to the shortest.
#[repr(C)]
struct PortWalk {
    key: PortKey,
    port: u32,
    lengths: u32,
    rules: [u64; 2],
}

#[inline(always)]
fn port_rules(query: &Query, chunk: u32, head: &ChunkValue) -> [u64; 2] {
    let mut walk = PortWalk {
        key: PortKey {
            table: query.table,
            chunk: chunk as u16,
            prefix_len: 0,
            protocol: query.protocol,
            port: 0,
            reserved: 0,
        },
        port: u32::from(query.port),
        lengths: head.port_prefixes,
        rules: head.default_ports,
    };
    // SAFETY: as in `judge`.
    unsafe {
        bpf_loop(PORT_BITS + 1, ask_port as *mut c_void, (&raw mut walk).cast(), 0);
    }
    walk.rules
}

const PORT_BITS: u32 = 16;

extern "C" fn ask_port(index: u64, walk: *mut PortWalk) -> i64 {
    // SAFETY: `port_rules`' own, handed through by the helper.
    let walk = unsafe { &mut *walk };
    let skipped = index as u32 & 31;
    let bit = (1 << PORT_BITS) >> skipped;
    // What is left of the mask once the longer prefixes are done.
    let left = walk.lengths & (bit | (bit - 1));
    if left == 0 {
        return STOP;
    }
    if left & bit == 0 {
        return NEXT;
    }
    walk.key.prefix_len = (PORT_BITS - skipped) as u8;
    walk.key.port = (walk.port & (0xffff << skipped)) as u16;
    // SAFETY: as in `ask_chunk`.
    match unsafe { PORTS.get(&walk.key) } {
        Some(port) => {
            walk.rules = port.rules;
            STOP
        }
        None => NEXT,
    }
}
