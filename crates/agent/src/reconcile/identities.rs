//! `ENDPOINTS` and `IPCACHE`.
//!
//! What makes a prefix longer is written before rows flip to tables that know the new prefix, what
//! makes it shorter after: both the old and the new tables then see each address under a prefix
//! that they know.

use palisade_abi::{EndpointKey, EndpointValue, IpcacheValue, PREFIX_ID_BIT};
use palisade_datapath::{Entry, Key, Step};

use super::{
    Pending, Refused, Writer, bump_all_rows,
    mirror::{Mirror, address_bytes, ipcache_key},
    put,
};
use crate::tables::{
    Tables,
    identities::{AddressEntry, PrefixEntry},
};

/// Writes what is new or has changed, before the rows flip.
pub(super) fn lead(
    writer: &mut Writer<'_>,
    tables: &Tables,
    pending: &Pending,
) -> Result<(), Refused> {
    let mut wrote_prefix = false;
    for network in &pending.prefixes {
        let Some(entry) = tables.prefixes.get(network) else { continue };
        let wanted = prefix_value(entry);
        let known = writer.mirror.prefixes.get(network);
        if known != Some(&wanted) {
            // A network that lost its own prefix keeps it until no table needs it.
            let keeps = known.is_some_and(|known| {
                length(writer.mirror, known.prefix) > length_of(tables, wanted.prefix)
            });
            let prefix = known.filter(|_| keeps).map_or(wanted.prefix, |known| known.prefix);
            let value = IpcacheValue { prefix, ..wanted };
            writer.run(&[put(Entry::Ipcache(ipcache_key(*network), value))])?;
            wrote_prefix = true;
        }
    }
    if wrote_prefix {
        let steps = bump_all_rows(writer.mirror);
        writer.run(&steps)?;
    }
    for address in &pending.addresses {
        let Some(entry) = tables.addresses.get(address) else { continue };
        let wanted = address_value(entry);
        let known = writer.mirror.addresses.get(address).copied();
        let keeps = known.is_some_and(|known| {
            length(writer.mirror, known.prefix) > length_of(tables, wanted.prefix)
        });
        let prefix = known.filter(|_| keeps).map_or(wanted.prefix, |known| known.prefix);
        write_address(writer, entry, EndpointValue { prefix, ..wanted })?;
    }
    Ok(())
}

/// Writes the rest, after the rows flipped.
pub(super) fn trail(
    writer: &mut Writer<'_>,
    tables: &Tables,
    pending: &Pending,
) -> Result<(), Refused> {
    for address in &pending.addresses {
        match tables.addresses.get(address) {
            Some(entry) => write_address(writer, entry, address_value(entry))?,
            None => {
                let Some(known) = writer.mirror.addresses.get(address) else { continue };
                let local = known.row != palisade_abi::ROW_NONE;
                let steps = forget(address_bytes(*address), local);
                writer.run(&steps)?;
            }
        }
    }
    let mut wrote_prefix = false;
    for network in &pending.prefixes {
        let step = match tables.prefixes.get(network).map(|entry| prefix_value(entry)) {
            Some(wanted) if writer.mirror.prefixes.get(network) == Some(&wanted) => continue,
            Some(wanted) => put(Entry::Ipcache(ipcache_key(*network), wanted)),
            None if !writer.mirror.prefixes.contains_key(network) => continue,
            None => Step::Delete(Key::Ipcache(ipcache_key(*network))),
        };
        writer.run(&[step])?;
        wrote_prefix = true;
    }
    if wrote_prefix {
        let steps = bump_all_rows(writer.mirror);
        writer.run(&steps)?;
    }
    Ok(())
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

/// Length of the network that a prefix number in the kernel stands for.
fn length(mirror: &Mirror, prefix: u32) -> Option<u8> {
    if prefix & PREFIX_ID_BIT == 0 {
        return None;
    }
    let networks = mirror.prefixes.iter().filter(|(_, value)| value.prefix == prefix);
    networks.map(|(network, _)| network.prefix_len()).min()
}

/// Length of the network that a desired prefix number stands for.
fn length_of(tables: &Tables, prefix: u32) -> Option<u8> {
    if prefix & PREFIX_ID_BIT == 0 {
        return None;
    }
    let entries = tables.prefixes.rows().filter(|entry| entry.prefix == prefix);
    entries.map(|entry| entry.network.prefix_len()).min()
}
