//! Pinned tables of an agent of before: taken over where they are as these programs want them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::Path,
};

use aya::maps::MapInfo;
use aya_obj::{Map, Object, maps::PinningType};
use palisade_abi::map;

use crate::load::{LoadError, remove_pin};

/// The tables that packets fill; each can be kept or not for itself. The agent writes all others:
/// these refer to each other, so they are kept together or not at all.
const LEARNED: [&str; 13] = [
    map::EVENTS,
    // The agent's, but it refers to no other table, and with an empty one pods' own addresses leave.
    map::MASQUERADE,
    map::FLOWS4,
    map::FLOWS4_ANY,
    map::FLOWS6,
    map::FLOWS6_ANY,
    map::FLOW_COUNTS,
    map::METRICS,
    map::FRAGMENTS,
    map::MASQUERADED,
    map::MASQUERADED_TCP,
    map::SOCKETS,
    "SETTINGS",
];

/// Takes away the pins of tables that are not as `object` wants them, so that it gets new ones.
/// Programs that use the old ones go on with them. Returns whether that happened to those that the
/// agent writes, be it for an agent that ended before it had taken over: `begun` is a directory that
/// is there from before the first pin goes until then.
///
/// Only sizes, kinds and flags can be compared: a table whose entries get another meaning at the
/// same size gets another name.
pub(crate) fn make_way(object: &[u8], directory: &Path, begun: &Path) -> Result<bool, LoadError> {
    let wanted: BTreeMap<String, Map> = Object::parse(object)
        .map_err(aya::EbpfError::from)?
        .maps
        .into_iter()
        .filter(|(_, table)| table.pinning() == PinningType::ByName)
        .collect();
    let fits = |name: &String| {
        let found = MapInfo::from_pin(directory.join(name));
        wanted.get(name).is_some_and(|wanted| found.is_ok_and(|found| is_like(&found, wanted)))
    };
    let remove = |name: &String| remove_pin(&directory.join(name));
    let is_learned = |name: &String| LEARNED.contains(&name.as_str());
    let found = names(directory)
        .map_err(|source| LoadError::Bpffs { path: directory.to_owned(), source })?;
    let (learned, written): (BTreeSet<_>, BTreeSet<_>) = found.into_iter().partition(is_learned);
    learned.iter().filter(|name| !fits(name)).try_for_each(remove)?;
    let complete = wanted.keys().all(|name| is_learned(name) || written.contains(name));
    let bpffs = |source| LoadError::Bpffs { path: begun.to_owned(), source };
    let unfinished = begun.try_exists().map_err(bpffs)?;
    if (written.is_empty() && !unfinished) || (complete && written.iter().all(fits)) {
        return Ok(unfinished);
    }
    if !unfinished {
        fs::create_dir(begun).map_err(bpffs)?;
    }
    written.iter().try_for_each(remove)?;
    Ok(true)
}

fn names(directory: &Path) -> io::Result<BTreeSet<String>> {
    let entries = fs::read_dir(directory)?;
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

fn is_like(found: &MapInfo, wanted: &Map) -> bool {
    found.map_type().is_ok_and(|kind| kind as u32 == wanted.map_type())
        && found.key_size() == wanted.key_size()
        && found.value_size() == wanted.value_size()
        && found.max_entries() == wanted.max_entries()
        && found.map_flags() == wanted.map_flags()
}
