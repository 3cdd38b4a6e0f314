//! Services: the backends of a new version, then one write that points to it, then the old
//! version goes.

use std::{collections::BTreeSet, net::SocketAddr};

use palisade_abi::{BackendKey, ServiceValue, service_flags};
use palisade_datapath::{Entry, Key, Step};

use super::{
    Failures, Refused, Writer,
    mirror::{Mirror, backend_value, service_key},
    put,
};
use crate::tables::{
    Tables,
    services::{Frontend, ServiceEntry},
};

/// Writes the Service addresses to look at; those that fail stay pending.
pub(super) fn write(
    writer: &mut Writer<'_>,
    tables: &Tables,
    pending: &mut BTreeSet<Frontend>,
    next_version: &mut u32,
    failures: &mut Failures,
) {
    // First what makes room.
    let (wanted, gone) = std::mem::take(pending)
        .into_iter()
        .partition::<BTreeSet<_>, _>(|frontend| tables.service_entries.get(frontend).is_some());
    for frontend in gone.into_iter().chain(wanted) {
        let written = match tables.service_entries.get(&frontend) {
            Some(entry) => write_one(writer, entry, next_version),
            None => remove(writer, frontend),
        };
        if !failures.note(written) {
            pending.insert(frontend);
        }
    }
    failures.note(collect(writer));
}

fn write_one(
    writer: &mut Writer<'_>,
    entry: &ServiceEntry,
    next_version: &mut u32,
) -> Result<(), Refused> {
    let flags = if entry.affinity.is_some() { service_flags::AFFINITY } else { 0 };
    let wanted = |version| ServiceValue {
        version,
        backends: u32::try_from(entry.backends.len()).unwrap_or(u32::MAX),
        flags,
        affinity_seconds: entry.affinity.unwrap_or_default(),
    };
    let known = writer.mirror.services.get(&entry.frontend).copied();
    if let Some(known) = known
        && known == wanted(known.version)
        && same_backends(writer.mirror, known.version, &entry.backends)
    {
        return Ok(());
    }
    let version = *next_version;
    *next_version = next_version.wrapping_add(1);
    let mut steps: Vec<Step> = (0u32..)
        .zip(&entry.backends)
        .map(|(index, backend)| {
            put(Entry::Backend(BackendKey { version, index }, backend_value(*backend)))
        })
        .collect();
    steps.push(put(Entry::Service(service_key(entry.frontend), wanted(version))));
    writer.run(&steps)?;
    match known {
        Some(known) => {
            let steps = backends_of(writer.mirror, known.version);
            writer.run(&steps)
        }
        None => Ok(()),
    }
}

fn remove(writer: &mut Writer<'_>, frontend: Frontend) -> Result<(), Refused> {
    let Some(known) = writer.mirror.services.get(&frontend).copied() else { return Ok(()) };
    let mut steps = vec![Step::Delete(Key::Service(service_key(frontend)))];
    steps.extend(backends_of(writer.mirror, known.version));
    writer.run(&steps)
}

/// Removes backends that no Service points to: left by a write that failed, or by a kill between
/// two writes.
fn collect(writer: &mut Writer<'_>) -> Result<(), Refused> {
    let used: BTreeSet<u32> = writer.mirror.services.values().map(|value| value.version).collect();
    let orphans: Vec<Step> = writer
        .mirror
        .backends
        .keys()
        .filter(|(version, _)| !used.contains(version))
        .map(|(version, index)| {
            Step::Delete(Key::Backend(BackendKey { version: *version, index: *index }))
        })
        .collect();
    writer.run(&orphans)
}

fn same_backends(mirror: &Mirror, version: u32, backends: &[SocketAddr]) -> bool {
    (0u32..).zip(backends).all(|(index, backend)| {
        mirror.backends.get(&(version, index)) == Some(&backend_value(*backend))
    })
}

fn backends_of(mirror: &Mirror, version: u32) -> Vec<Step> {
    mirror
        .backends
        .range((version, 0)..=(version, u32::MAX))
        .map(|((version, index), _)| {
            Step::Delete(Key::Backend(BackendKey { version: *version, index: *index }))
        })
        .collect()
}
