//! Rows and interfaces of endpoints.

use palisade_abi::{
    EndpointRow, ROW_HOST, TABLE_ALLOW_ALL, TABLE_NONE, identity as number, row_flags,
};
use palisade_datapath::{Entry, Key, Step};

use super::{
    Pending, Refused, Writer,
    identities::forget,
    mirror::{Mirror, address_bytes},
    policies::PolicyTables,
    put,
};
use crate::tables::{Tables, policies::Enforcement};

/// Has the rows to look at point to the tables in force; closes those of endpoints that are gone.
pub(super) fn flip(
    writer: &mut Writer<'_>,
    tables: &Tables,
    pending: &Pending,
    policies: &PolicyTables,
) -> Result<(), Refused> {
    for id in &pending.endpoints {
        let Some(wanted) = row(tables, policies, *id) else {
            let steps = release(writer.mirror, *id);
            writer.run(&steps)?;
            continue;
        };
        if writer.mirror.rows.get(id) != Some(&wanted) {
            writer.run(&[put(Entry::Row(*id, wanted))])?;
        }
        if *id != ROW_HOST && writer.mirror.interfaces.get(&wanted.ifindex) != Some(id) {
            writer.run(&[put(Entry::Interface(wanted.ifindex, *id))])?;
        }
        let stale: Vec<Step> = writer
            .mirror
            .interfaces
            .iter()
            .filter(|(ifindex, row)| *row == id && **ifindex != wanted.ifindex)
            .map(|(ifindex, _)| Step::Delete(Key::Interface(*ifindex)))
            .collect();
        writer.run(&stale)?;
    }
    Ok(())
}

/// The row as it is to be; none where there is no such endpoint.
fn row(tables: &Tables, policies: &PolicyTables, id: u32) -> Option<EndpointRow> {
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
    let table = |direction: Option<&Enforcement>| match direction {
        None => TABLE_NONE,
        Some(Enforcement::AllowAll) => TABLE_ALLOW_ALL,
        Some(Enforcement::Enforced(group, _)) => policies.table_of(*group),
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

/// The steps that forget an endpoint: nothing passes after the first one.
pub(super) fn release(mirror: &Mirror, id: u32) -> Vec<Step> {
    let Some(row) = mirror.rows.get(&id) else { return Vec::new() };
    let mut steps = vec![put(Entry::Row(id, EndpointRow::default()))];
    let interfaces = mirror.interfaces.iter().filter(|(_, row)| **row == id);
    steps.extend(interfaces.map(|(ifindex, _)| Step::Delete(Key::Interface(*ifindex))));
    for address in Mirror::row_addresses(row) {
        if mirror.addresses.get(&address).is_some_and(|value| value.row == id) {
            steps.extend(forget(address_bytes(address), true));
        }
    }
    steps
}
