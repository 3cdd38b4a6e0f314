//! Rows and interfaces of endpoints.

use std::collections::BTreeSet;

use palisade_abi::{
    EndpointKey, EndpointRow, ROW_HOST, TABLE_ALLOW_ALL, TABLE_NONE, identity as number, row_flags,
};
use palisade_datapath::{Entry, Key, Step};
use palisade_policy::resolve::GroupId;

use super::{
    Failures, Pending, Refused, Writer,
    identities::forget,
    mirror::{Mirror, address_bytes},
    policies::PolicyTables,
    put,
};
use crate::tables::{Tables, policies::Enforcement};

/// Has the rows to look at point to the tables in force; closes those of endpoints that are gone,
/// and those whose tables could not be written or rely on prefixes that are `missing`. Returns whether no row is left that
/// points to an earlier table.
///
/// The tables flip first, all of them: only then is every table in use one that knows the new
/// identities, and endpoints get theirs.
pub(super) fn flip(
    writer: &mut Writer<'_>,
    tables: &Tables,
    pending: &mut Pending,
    policies: &PolicyTables,
    missing: &BTreeSet<u32>,
    failures: &mut Failures,
) -> bool {
    let mut closed = BTreeSet::new();
    let mut table = |endpoint: u32, group: GroupId| {
        let relies = policies.relies_on(group, missing);
        let table = if relies { TABLE_NONE } else { policies.table_of(group) };
        if table == TABLE_NONE {
            closed.insert(endpoint);
        }
        table
    };
    pending.leaving.retain(|id| {
        let steps = release(writer.mirror, *id);
        !failures.note(writer.run(&steps))
    });
    let mut rows = Vec::new();
    let mut failed = pending.leaving.clone();
    for id in &pending.endpoints {
        let Some(wanted) = row(tables, &mut table, *id) else {
            let steps = release(writer.mirror, *id);
            if !failures.note(writer.run(&steps)) {
                failed.insert(*id);
            }
            continue;
        };
        let other = |known: &EndpointRow| known.ifindex != wanted.ifindex;
        if writer.mirror.rows.get(id).is_some_and(other) {
            // The row of an endpoint that nobody remembers.
            let steps = release(writer.mirror, *id);
            if !failures.note(writer.run(&steps)) {
                failed.insert(*id);
            }
        } else if let Some(known) = writer.mirror.rows.get(id) {
            let flipped = EndpointRow { identity: known.identity, ..wanted };
            if *known != flipped && !failures.note(writer.run(&[put(Entry::Row(*id, flipped))])) {
                failed.insert(*id);
            }
        }
        rows.push((*id, wanted));
    }
    let flipped = failed.is_empty();
    if flipped {
        for (id, wanted) in rows {
            if writer.owes_flows(&wanted) || !failures.note(enter(writer, id, wanted)) {
                failed.insert(id);
            }
        }
        pending.endpoints.retain(|id| failed.contains(id) || closed.contains(id));
    }
    flipped
}

/// The whole row, and the interface that leads to it.
fn enter(writer: &mut Writer<'_>, id: u32, wanted: EndpointRow) -> Result<(), Refused> {
    if writer.mirror.rows.get(&id) != Some(&wanted) {
        writer.run(&[put(Entry::Row(id, wanted))])?;
    }
    if id != ROW_HOST && writer.mirror.interfaces.get(&wanted.ifindex) != Some(&id) {
        writer.run(&[put(Entry::Interface(wanted.ifindex, id))])?;
    }
    let stale: Vec<Step> = writer
        .mirror
        .interfaces
        .iter()
        .filter(|(ifindex, row)| **row == id && **ifindex != wanted.ifindex)
        .map(|(ifindex, _)| Step::Delete(Key::Interface(*ifindex)))
        .collect();
    writer.run(&stale)
}

/// The row as it is to be; none where there is no such endpoint.
fn row(
    tables: &Tables,
    table_of: &mut impl FnMut(u32, GroupId) -> u32,
    id: u32,
) -> Option<EndpointRow> {
    if id == ROW_HOST {
        return Some(EndpointRow {
            ingress_table: TABLE_ALLOW_ALL,
            egress_table: TABLE_ALLOW_ALL,
            identity: number::HOST,
            flags: row_flags::VALID | row_flags::HOST,
            endpoint: ROW_HOST,
            ..EndpointRow::default()
        });
    }
    let endpoint = tables.endpoints.get(&id)?;
    let entry = tables.policy_entries.get(&id);
    let mut table = |direction: Option<&Enforcement>| match direction {
        None => TABLE_NONE,
        Some(Enforcement::AllowAll) => TABLE_ALLOW_ALL,
        Some(Enforcement::Enforced(group, _)) => table_of(id, *group),
    };
    let identity = endpoint
        .addresses()
        .find_map(|address| tables.addresses.get(&address))
        .map_or(number::INIT, |entry| entry.identity);
    Some(EndpointRow {
        ingress_table: table(entry.map(|entry| &entry.ingress)),
        egress_table: table(entry.map(|entry| &entry.egress)),
        revision: 0,
        ifindex: endpoint.ifindex,
        identity,
        flags: row_flags::VALID,
        endpoint: id,
        mac: endpoint.mac,
        host_mac: endpoint.host_mac,
        ipv4: endpoint.ipv4.map_or([0; 4], |ip| ip.octets()),
        ipv6: endpoint.ipv6.map_or([0; 16], |ip| ip.octets()),
        reserved: 0,
    })
}

/// What was written for an endpoint beside its policy.
pub(super) fn entries(mirror: &Mirror, id: u32, row: &EndpointRow) -> Vec<Entry> {
    let addresses = mirror.addresses.iter().filter(|(_, value)| value.row == id);
    let addresses = addresses.map(|(address, value)| {
        Entry::Endpoint(EndpointKey { address: address_bytes(*address) }, *value)
    });
    [Entry::Row(id, *row), Entry::Interface(row.ifindex, id)].into_iter().chain(addresses).collect()
}

/// The steps that forget an endpoint, as far as they are not done: nothing passes after the first.
/// What shows that there was one goes last, so that an agent which is killed in the middle is
/// followed by one that begins again.
pub(super) fn release(mirror: &Mirror, id: u32) -> Vec<Step> {
    let mut steps = Vec::new();
    if mirror.rows.contains_key(&id) {
        steps.push(put(Entry::Row(id, EndpointRow::default())));
    }
    let addresses = mirror.addresses.iter().filter(|(_, value)| value.row == id);
    let addresses = addresses.map(|(address, _)| address_bytes(*address));
    steps.extend(addresses.clone().map(Step::FlushFlows));
    let interfaces = mirror.interfaces.iter().filter(|(_, row)| **row == id);
    steps.extend(interfaces.map(|(ifindex, _)| Step::Delete(Key::Interface(*ifindex))));
    steps.extend(addresses.flat_map(|address| forget(address, false)));
    steps
}
