//! Compiled policies in the kernel.
//!
//! A new version is written aside under a new table number; rows flip to it in one write each
//! (see `pods`); then the old version goes. A group whose tables do not fit is closed: its
//! endpoints' rows point to no table at all until they do.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use ipnet::IpNet;
use palisade_abi::{
    ChunkKey, PREFIX_ID_BIT, PREFIX_POD_BIT, PeerKey, PeerValue, PortKey, PortValue, TABLE_NONE,
};
use palisade_datapath::{Entry, Key, Step};
use palisade_policy::{
    CompiledPolicy,
    resolve::{GroupChange, GroupId, GroupUpdate},
    words,
};

use super::{
    Failures, Writer,
    mirror::{Mirror, TableEntries},
};

/// A table in the kernel and what it holds.
#[derive(Clone, Debug)]
pub(super) struct LiveTable {
    /// Number.
    pub number: u32,
    /// Content.
    pub policy: Arc<CompiledPolicy>,
}

/// A group of endpoints in one direction.
#[derive(Debug)]
struct Group {
    /// What its table is to hold.
    wanted: Arc<CompiledPolicy>,
    /// `wanted` differs from the live table only in peers that no packet carries yet.
    in_place: bool,
    live: Option<LiveTable>,
}

/// Which groups have which tables.
#[derive(Debug)]
pub(super) struct PolicyTables {
    groups: BTreeMap<GroupId, Group>,
    pending: BTreeSet<GroupId>,
    next: u32,
    /// Tables to remove once no row refers to them.
    retired: BTreeMap<u32, Vec<Key>>,
    /// Peers to remove once no address carries them.
    retired_peers: Vec<Key>,
    /// Tables from before a restart, by number.
    found: BTreeMap<u32, TableEntries>,
}

impl PolicyTables {
    /// Knows the tables that were found in the kernel.
    pub(super) fn new(found: BTreeMap<u32, TableEntries>, rows_highest: u32) -> Self {
        let highest = found.keys().copied().max().unwrap_or(1).max(rows_highest).max(1);
        Self {
            groups: BTreeMap::new(),
            pending: BTreeSet::new(),
            next: highest + 1,
            retired: BTreeMap::new(),
            retired_peers: Vec::new(),
            found,
        }
    }

    /// The table that rows of the group are to point to.
    pub(super) fn table_of(&self, group: GroupId) -> u32 {
        let live = self.groups.get(&group).and_then(|group| group.live.as_ref());
        live.map_or(TABLE_NONE, |live| live.number)
    }

    /// Takes over what became of compiled policies.
    pub(super) fn note(&mut self, changes: &[GroupChange]) {
        for change in changes {
            match &change.update {
                GroupUpdate::Removed => {
                    if let Some(group) = self.groups.remove(&change.group) {
                        self.retire(group.live);
                    }
                    self.pending.remove(&change.group);
                }
                GroupUpdate::Replaced(policy) => self.want(change.group, policy, false),
                GroupUpdate::Peers(policy, _) => self.want(change.group, policy, true),
            }
        }
    }

    fn want(&mut self, id: GroupId, policy: &Arc<CompiledPolicy>, in_place: bool) {
        let group = self.groups.entry(id).or_insert_with(|| Group {
            wanted: policy.clone(),
            in_place: false,
            live: None,
        });
        let current = !self.pending.contains(&id);
        group.in_place = in_place && group.live.is_some() && (group.in_place || current);
        group.wanted = policy.clone();
        self.pending.insert(id);
    }

    /// After a restart: takes the table that the group's rows use as the group's, if it holds
    /// exactly what is wanted.
    pub(super) fn adopt(&mut self, id: GroupId, number: u32) {
        let Some(group) = self.groups.get_mut(&id).filter(|group| group.live.is_none()) else {
            return;
        };
        if self.found.get(&number).is_some_and(|found| *found == entries(&group.wanted, number)) {
            self.found.remove(&number);
            group.live = Some(LiveTable { number, policy: group.wanted.clone() });
            self.pending.remove(&id);
        }
    }

    /// After a restart and all adoptions: the tables that nobody took are to go.
    pub(super) fn retire_found(&mut self) {
        for (number, found) in std::mem::take(&mut self.found) {
            self.retired.insert(number, found.into_keys().collect());
        }
    }

    fn retire(&mut self, table: Option<LiveTable>) {
        if let Some(table) = table {
            let keys = entries(&table.policy, table.number).into_keys();
            self.retired.entry(table.number).or_default().extend(keys);
        }
    }

    /// Writes what is pending. Nothing refers to the new tables yet when this returns, and old
    /// ones are not touched. The problems name groups that are closed because of them.
    pub(super) fn write(
        &mut self,
        writer: &mut Writer<'_>,
        old_prefixes: &BTreeMap<IpNet, u32>,
        added_prefixes: &[(IpNet, u32)],
    ) -> Vec<String> {
        let mut problems = Vec::new();
        for id in std::mem::take(&mut self.pending) {
            let Some(group) = self.groups.get_mut(&id) else { continue };
            // Keys of the live table that its compiled policy does not tell of.
            let mut extra: Vec<Key> = Vec::new();
            if group.in_place
                && let Some(live) = &mut group.live
            {
                if let Ok(gone) = update_peers(writer, live, &group.wanted) {
                    self.retired_peers.extend(gone);
                    live.policy = group.wanted.clone();
                    continue;
                }
                extra.extend(entries(&group.wanted, live.number).into_keys());
            }
            let mut inherited = Ok(());
            if let Some(live) = &group.live {
                let steps = inherit(live, old_prefixes, added_prefixes);
                extra.extend(steps.iter().filter_map(put_key));
                inherited = writer.run(&steps);
            }
            let number = self.next;
            self.next += 1;
            let written = inherited.and_then(|()| write_aside(writer, &group.wanted, number));
            let old = match written {
                Ok(()) => {
                    let policy = group.wanted.clone();
                    group.in_place = false;
                    group.live.replace(LiveTable { number, policy })
                }
                Err(error) => {
                    problems.push(format!(
                        "a policy group of {} rules is closed: {error}",
                        group.wanted.rules.len()
                    ));
                    self.pending.insert(id);
                    let partial = entries(&group.wanted, number).into_keys().collect();
                    self.retired.insert(number, partial);
                    group.live.take()
                }
            };
            if let Some(old) = &old {
                self.retired.insert(old.number, extra);
            }
            self.retire(old);
        }
        problems
    }

    /// Removes what no row and no address refers to any more. Rows may refer to any table where
    /// not all of them flipped.
    pub(super) fn collect(
        &mut self,
        writer: &mut Writer<'_>,
        flipped: bool,
        failures: &mut Failures,
    ) {
        if !flipped {
            return;
        }
        if !self.retired_peers.is_empty() {
            let carried = carried(writer.mirror);
            self.retired_peers.retain(|key| {
                let in_use = match key {
                    Key::Peer(peer) => carried.contains(&(peer.id & !PREFIX_POD_BIT)),
                    _ => false,
                };
                in_use || !failures.note(writer.run(&[Step::Delete(*key)]))
            });
        }
        self.retired.retain(|_, keys| {
            let steps: Vec<Step> = keys.iter().map(|key| Step::Delete(*key)).collect();
            !failures.note(writer.run(&steps))
        });
    }

    /// Whether the table of a group relies on one of these prefixes.
    pub(super) fn relies_on(&self, group: GroupId, prefixes: &BTreeSet<u32>) -> bool {
        if prefixes.is_empty() {
            return false;
        }
        let live = self.groups.get(&group).and_then(|group| group.live.as_ref());
        live.into_iter()
            .flat_map(|live| &live.policy.chunks)
            .any(|chunk| chunk.peers.keys().any(|id| prefixes.contains(&(id & !PREFIX_POD_BIT))))
    }

    /// Whether the group's table is not what it is to be yet.
    pub(super) fn awaits(&self, group: GroupId) -> bool {
        self.pending.contains(&group)
    }

    /// Whether something could not be written yet.
    pub(super) fn is_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// The tables in use, for naming rules of events.
    pub(super) fn live(&self) -> impl Iterator<Item = &LiveTable> {
        self.groups.values().filter_map(|group| group.live.as_ref())
    }
}

/// The identities and prefixes that packets can be found to have.
fn carried(mirror: &Mirror) -> BTreeSet<u32> {
    let addresses = mirror.addresses.values().flat_map(|value| [value.identity, value.prefix]);
    let networks = mirror.prefixes.values().flat_map(|value| [value.identity, value.prefix]);
    let rows = mirror.rows.values().map(|row| row.identity);
    addresses.chain(networks).chain(rows).collect()
}

/// Everything that a compiled policy is in the kernel, under this number.
pub(super) fn entries(policy: &CompiledPolicy, table: u32) -> TableEntries {
    let count = u32::try_from(policy.chunks.len()).unwrap_or(u32::MAX);
    let mut entries = TableEntries::new();
    for (number, chunk) in (0u32..).zip(&policy.chunks) {
        for (id, rules) in &chunk.peers {
            let key = PeerKey { table, chunk: number, id: *id };
            let value = PeerValue { rules: words(*rules) };
            entries.insert(Key::Peer(key), Entry::Peer(key, value));
        }
        for ((protocol, prefix_len, port), rules) in &chunk.ports {
            let key = PortKey {
                table,
                chunk: u16::try_from(number).unwrap_or(u16::MAX),
                prefix_len: *prefix_len,
                protocol: *protocol,
                port: *port,
                reserved: 0,
            };
            let value = PortValue { rules: words(*rules) };
            entries.insert(Key::Port(key), Entry::Port(key, value));
        }
        let key = ChunkKey { table, chunk: number };
        entries.insert(Key::Chunk(key), Entry::Chunk(key, chunk.value(count)));
    }
    entries
}

fn write_aside(
    writer: &mut Writer<'_>,
    policy: &CompiledPolicy,
    table: u32,
) -> Result<(), super::Refused> {
    let steps: Vec<Step> = entries(policy, table).into_values().map(Step::Put).collect();
    writer.run(&steps)
}

/// Writes the peers in which the live table differs; those that are too many match nothing from
/// now on where that can be said of them, and are returned, to be removed when no address carries
/// them.
fn update_peers(
    writer: &mut Writer<'_>,
    live: &LiveTable,
    wanted: &CompiledPolicy,
) -> Result<Vec<Key>, super::Refused> {
    let mut steps = Vec::new();
    let mut gone = Vec::new();
    for (number, (old, new)) in (0u32..).zip(live.policy.chunks.iter().zip(&wanted.chunks)) {
        if Arc::ptr_eq(old, new) {
            continue;
        }
        let key = |id: u32| PeerKey { table: live.number, chunk: number, id };
        for (id, rules) in &new.peers {
            if old.peers.get(id) != Some(rules) {
                let value = PeerValue { rules: words(*rules) };
                steps.push(Step::Put(Entry::Peer(key(*id), value)));
            }
        }
        for id in old.peers.keys().filter(|id| !new.peers.contains_key(id)) {
            gone.push(Key::Peer(key(*id)));
            // Addresses may carry the prefix for the sake of others' rules: of an identity that
            // would mean the default, of a prefix it means nothing.
            if id & PREFIX_ID_BIT != 0 {
                steps.push(Step::Put(Entry::Peer(key(*id), PeerValue { rules: [0; 2] })));
            }
        }
    }
    writer.run(&steps).map(|()| gone)
}

/// A table that is about to be replaced still judges while new prefixes are written to the
/// address tables. Until it goes it treats a new prefix as it treated the addresses in it: as the
/// longest old prefix around.
fn inherit(live: &LiveTable, old: &BTreeMap<IpNet, u32>, added: &[(IpNet, u32)]) -> Vec<Step> {
    let mut steps = Vec::new();
    for (network, id) in added {
        let around = std::iter::successors(network.supernet(), IpNet::supernet)
            .find_map(|network| old.get(&network));
        let Some(parent) = around else { continue };
        for (chunk, content) in (0u32..).zip(&live.policy.chunks) {
            for bit in [0, PREFIX_POD_BIT] {
                if let Some(rules) = content.peers.get(&(parent | bit)) {
                    let key = PeerKey { table: live.number, chunk, id: id | bit };
                    steps.push(Step::Put(Entry::Peer(key, PeerValue { rules: words(*rules) })));
                }
            }
        }
    }
    steps
}

fn put_key(step: &Step) -> Option<Key> {
    match step {
        Step::Put(Entry::Peer(key, _)) => Some(Key::Peer(*key)),
        _ => None,
    }
}
