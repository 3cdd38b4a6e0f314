//! `ENDPOINTS` and `IPCACHE`.
//!
//! What makes a prefix longer is written before rows flip to tables that know the new prefix, what
//! makes it shorter after: both the old and the new tables then see each address under a prefix
//! that they know. Who has an address is written after the flip: a table that is replaced need
//! not know the new identity, and what it does not know it cannot deny.

use std::collections::{BTreeSet, HashMap};

use ipnet::IpNet;
use palisade_abi::{
    EndpointKey, EndpointValue, IpcacheValue, PREFIX_ID_BIT,
    identity::{CLUSTER_MIN, UNKNOWN},
};
use palisade_datapath::{Entry, Key, Step};

use super::{
    Failures, Pending, Refused, Writer, bump_all_rows,
    mirror::{Mirror, address_bytes, ipcache_key},
    put,
};
use crate::tables::{
    Tables,
    identities::{AddressEntry, PrefixEntry},
};

/// Makes prefixes longer, before the rows flip. Returns the prefixes that some address should have
/// and has not: no row may flip to a table that relies on them.
pub(super) fn lead(
    writer: &mut Writer<'_>,
    tables: &Tables,
    pending: &Pending,
    failures: &mut Failures,
) -> BTreeSet<u32> {
    let mut missing = BTreeSet::new();
    let mut lengths = None;
    let mut wrote_prefix = false;
    for network in &pending.prefixes {
        let Some(entry) = tables.prefixes.get(network) else { continue };
        let wanted = prefix_value(entry);
        let known = writer.mirror.prefixes.get(network).copied();
        if known == Some(wanted) {
            continue;
        }
        // A network that lost its own prefix keeps it until no table needs it.
        let keeps = known.filter(|known| {
            let lengths = lengths.get_or_insert_with(|| Lengths::read(writer.mirror, tables));
            lengths.is_longer(known.prefix, wanted.prefix)
        });
        let prefix = keeps.map_or(wanted.prefix, |known| known.prefix);
        let value = IpcacheValue { prefix, ..wanted };
        if !failures.note(writer.run(&[put(Entry::Ipcache(ipcache_key(*network), value))])) {
            missing.insert(wanted.prefix);
        }
        wrote_prefix = true;
    }
    if wrote_prefix {
        let steps = bump_all_rows(writer.mirror);
        failures.note(writer.run(&steps));
    }
    for address in &pending.addresses {
        let Some(entry) = tables.addresses.get(address) else { continue };
        let Some(known) = writer.mirror.addresses.get(address).copied() else { continue };
        if known.prefix == entry.prefix {
            continue;
        }
        let lengths = lengths.get_or_insert_with(|| Lengths::read(writer.mirror, tables));
        if lengths.is_longer(known.prefix, entry.prefix) {
            continue;
        }
        // Nothing denies an identity that is no more.
        let gone =
            known.identity >= CLUSTER_MIN && tables.identities.get(&known.identity).is_none();
        let identity = if gone { UNKNOWN } else { known.identity };
        let value = EndpointValue { prefix: entry.prefix, identity, ..known };
        if !failures.note(write_address(writer, entry, value)) {
            missing.insert(entry.prefix);
        }
    }
    missing
}

/// Writes the rest, after the rows flipped; where they did not, only what is gone goes. What could
/// not be written stays pending.
pub(super) fn trail(
    writer: &mut Writer<'_>,
    tables: &Tables,
    pending: &mut Pending,
    flipped: bool,
    failures: &mut Failures,
) {
    // First what makes room.
    pending.addresses.retain(|address| {
        if tables.addresses.get(address).is_some() {
            return true;
        }
        let Some(known) = writer.mirror.addresses.get(address) else { return false };
        let local = known.row != palisade_abi::ROW_NONE;
        let steps = forget(address_bytes(*address), local);
        !failures.note(writer.run(&steps))
    });
    if !flipped {
        return;
    }
    pending.addresses.retain(|address| match tables.addresses.get(address) {
        Some(entry) => !failures.note(write_address(writer, entry, address_value(entry))),
        None => true,
    });
    let mut wrote_prefix = false;
    pending.prefixes.retain(|network| {
        let step = match tables.prefixes.get(network).map(|entry| prefix_value(entry)) {
            Some(wanted) if writer.mirror.prefixes.get(network) == Some(&wanted) => return false,
            Some(wanted) => put(Entry::Ipcache(ipcache_key(*network), wanted)),
            None if !writer.mirror.prefixes.contains_key(network) => return false,
            None => Step::Delete(Key::Ipcache(ipcache_key(*network))),
        };
        wrote_prefix = true;
        !failures.note(writer.run(&[step]))
    });
    if wrote_prefix {
        let steps = bump_all_rows(writer.mirror);
        failures.note(writer.run(&steps));
    }
}

/// The steps that make an address nobody's.
pub(super) fn forget(address: palisade_abi::Address, local: bool) -> Vec<Step> {
    let mut steps =
        vec![Step::Delete(Key::Endpoint(EndpointKey { address })), Step::BumpShard(address)];
    if local {
        steps.push(Step::FlushFlows(address));
    }
    steps
}

fn write_address(
    writer: &mut Writer<'_>,
    entry: &AddressEntry,
    wanted: EndpointValue,
) -> Result<(), Refused> {
    if writer.mirror.addresses.get(&entry.address) == Some(&wanted) {
        return Ok(());
    }
    let address = address_bytes(entry.address);
    writer.run(&[put(Entry::Endpoint(EndpointKey { address }, wanted)), Step::BumpShard(address)])
}

fn address_value(entry: &AddressEntry) -> EndpointValue {
    EndpointValue {
        identity: entry.identity,
        prefix: entry.prefix,
        row: entry.row,
        node: entry.node,
    }
}

fn prefix_value(entry: &PrefixEntry) -> IpcacheValue {
    IpcacheValue { identity: entry.identity, prefix: entry.prefix }
}

/// Lengths of the networks that prefix numbers stand for. Reading them takes as long as there are
/// networks, so it is done once for all questions of a round.
struct Lengths {
    known: HashMap<u32, u8>,
    wanted: HashMap<u32, u8>,
}

impl Lengths {
    fn read(mirror: &Mirror, tables: &Tables) -> Self {
        let known = mirror.prefixes.iter().map(|(network, value)| (value.prefix, network));
        let wanted = tables.prefixes.rows().map(|entry| (entry.prefix, &entry.network));
        Self { known: shortest(known), wanted: shortest(wanted) }
    }

    /// Whether the prefix in the kernel stands for a longer network than the desired one.
    fn is_longer(&self, known: u32, wanted: u32) -> bool {
        known != wanted && self.known.get(&known) > self.wanted.get(&wanted)
    }
}

/// A network inside that of a number bears the number as well; the shortest is the one meant.
fn shortest<'a>(networks: impl Iterator<Item = (u32, &'a IpNet)>) -> HashMap<u32, u8> {
    let mut lengths = HashMap::new();
    for (prefix, network) in networks.filter(|(prefix, _)| prefix & PREFIX_ID_BIT != 0) {
        let length = lengths.entry(prefix).or_insert(network.prefix_len());
        *length = network.prefix_len().min(*length);
    }
    lengths
}
