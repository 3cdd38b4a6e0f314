//! From desired tables to the kernel's.
//!
//! A round writes in an order in which every state between two steps is as strict as the old
//! state or the new one: compiled tables aside, then what leads to new prefixes,
//! then the rows flip, then who has which address, then what is gone goes. A step that fails holds
//! up only what relies on it; what was not done stays pending, and the next round takes it up.

mod identities;
pub mod mirror;
mod nodes;
mod pods;
mod policies;
mod services;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{BuildHasher, RandomState},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use mirror::Mirror;
use palisade_abi::{EndpointRow, ROW_HOST};
use palisade_datapath::{Entry, Kernel, KernelError, Step};
use palisade_policy::{CompiledPolicy, resolve::Changes};
use policies::PolicyTables;

pub use nodes::Ways;

use crate::tables::{Tables, services::Frontend};

/// A write that the kernel refused.
pub type Refused = KernelError;

/// Writes steps and remembers them in the mirror.
pub struct Writer<'a> {
    kernel: &'a dyn Kernel,
    mirror: &'a mut Mirror,
    /// Steps that show in no table, and failed.
    owed: &'a mut BTreeSet<Owed>,
}

/// A step that leaves no trace by which the next round could see that it is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Owed {
    Row(u32),
    Shard(palisade_abi::Address),
    Flows(palisade_abi::Address),
}

impl Owed {
    fn of(step: &Step) -> Option<Self> {
        match step {
            Step::BumpRow(row) => Some(Self::Row(*row)),
            Step::BumpShard(address) => Some(Self::Shard(*address)),
            Step::FlushFlows(address) => Some(Self::Flows(*address)),
            Step::Put(_) | Step::Delete(_) => None,
        }
    }

    fn step(self) -> Step {
        match self {
            Self::Row(row) => Step::BumpRow(row),
            Self::Shard(address) => Step::BumpShard(address),
            Self::Flows(address) => Step::FlushFlows(address),
        }
    }
}

impl Writer<'_> {
    /// Performs the steps, up to the first write that fails. What has to follow writes that are
    /// done is tried again in the next round where it fails.
    fn run(&mut self, steps: &[Step]) -> Result<(), Refused> {
        let mut result = Ok(());
        for step in steps {
            match (self.kernel.apply(step), Owed::of(step)) {
                (Ok(()), _) => self.mirror.note(step),
                (Err(error), None) => return Err(error),
                (Err(error), Some(owed)) => {
                    self.owed.insert(owed);
                    result = result.and(Err(error));
                    // What follows may be all that shows that there is something to forget.
                    if matches!(owed, Owed::Flows(_)) {
                        return result;
                    }
                }
            }
        }
        result
    }

    /// Whether the kernel may still remember flows of whoever had an endpoint's addresses before:
    /// they would count as this one's.
    fn owes_flows(&self, row: &EndpointRow) -> bool {
        let ipv4 = std::net::Ipv4Addr::from(row.ipv4).to_ipv6_mapped().octets();
        [ipv4, row.ipv6].into_iter().any(|address| self.owed.contains(&Owed::Flows(address)))
    }

    fn pay(&mut self, failures: &mut Failures) {
        for owed in std::mem::take(self.owed) {
            failures.note(self.run(&[owed.step()]));
        }
    }
}

/// Writes that failed, by what the kernel said.
#[derive(Debug, Default)]
struct Failures(BTreeMap<String, usize>);

impl Failures {
    /// Whether it succeeded.
    fn note(&mut self, result: Result<(), Refused>) -> bool {
        if let Err(error) = &result {
            *self.0.entry(error.to_string()).or_default() += 1;
        }
        result.is_ok()
    }

    fn into_problems(self) -> impl Iterator<Item = String> {
        self.0.into_iter().map(|(error, count)| match count {
            1 => error,
            _ => format!("{error} ({count} writes)"),
        })
    }
}

/// What may differ between the desired tables and the kernel.
#[derive(Debug, Default)]
struct Pending {
    addresses: BTreeSet<IpAddr>,
    prefixes: BTreeSet<IpNet>,
    endpoints: BTreeSet<u32>,
    /// Endpoints that an agent before had begun to take out.
    leaving: BTreeSet<u32>,
    services: BTreeSet<Frontend>,
    /// Policy prefixes that nothing needs once all this is done.
    removed: BTreeSet<IpNet>,
    /// The policy engine waits to hear that removed prefixes are out of use.
    acknowledge: bool,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.addresses.is_empty()
            && self.prefixes.is_empty()
            && self.endpoints.is_empty()
            && self.leaving.is_empty()
            && self.services.is_empty()
    }
}

/// A version of a Service's backends that is none of before: flows in the kernel bear the versions
/// of all agents, also of Services and tables that are gone. So it is drawn: with much room ahead
/// where nothing is known, and beyond what is known else.
fn first_version(highest: Option<u32>) -> u32 {
    let drawn = RandomState::new().hash_one(()) as u32;
    highest.unwrap_or(drawn >> 1).wrapping_add(1 + (drawn & 0xffff))
}

/// How a round ended.
#[derive(Debug, Default)]
pub struct Report {
    /// What the kernel lacks and why; empty when all is in force.
    pub problems: Vec<String>,
    /// No address refers to removed prefixes any more.
    pub prefixes_settled: bool,
}

/// Makes the kernel's tables equal to the desired ones.
pub struct Reconciler {
    kernel: Arc<dyn Kernel>,
    mirror: Mirror,
    policies: PolicyTables,
    pending: Pending,
    owed: BTreeSet<Owed>,
    /// Policy prefixes that the kernel's addresses refer to.
    prefixes: BTreeMap<IpNet, u32>,
    next_version: u32,
    started: bool,
}

impl Reconciler {
    /// Reads what the kernel holds.
    ///
    /// # Errors
    /// The kernel refuses to read.
    pub fn new(kernel: Arc<dyn Kernel>) -> Result<Self, Refused> {
        let (mirror, found) = Mirror::read(kernel.dump()?);
        let tables = mirror.rows.values().flat_map(|row| [row.ingress_table, row.egress_table]);
        let policies = PolicyTables::new(found, tables.max().unwrap_or_default());
        let versions = mirror.services.values().map(|service| service.version);
        let highest = versions.chain(mirror.backends.keys().map(|(version, _)| *version)).max();
        Ok(Self {
            prefixes: mirror.policy_prefixes(),
            next_version: first_version(highest),
            kernel,
            mirror,
            policies,
            pending: Pending::default(),
            owed: BTreeSet::new(),
            started: false,
        })
    }

    /// Policy prefixes that the kernel's tables knew when the agent started.
    pub fn policy_prefixes(&self) -> &BTreeMap<IpNet, u32> {
        &self.prefixes
    }

    /// What the kernel holds.
    pub fn mirror(&self) -> &Mirror {
        &self.mirror
    }

    /// As [`Self::mirror`], for who follows what was written.
    pub fn mirror_mut(&mut self) -> &mut Mirror {
        &mut self.mirror
    }

    /// The compiled tables in use.
    pub fn live_tables(&self) -> impl Iterator<Item = (u32, &Arc<CompiledPolicy>)> {
        self.policies.live().map(|live| (live.number, &live.policy))
    }

    /// The tables of an endpoint's row: ingress, egress.
    pub fn tables_of(&self, endpoint: u32) -> Option<(u32, u32)> {
        self.mirror.rows.get(&endpoint).map(|row| (row.ingress_table, row.egress_table))
    }

    /// Whether a round would have something to do.
    pub fn is_settled(&self) -> bool {
        self.pending.is_empty() && self.owed.is_empty() && !self.policies.is_pending()
    }

    /// Whether an endpoint's packets are judged as the tables say.
    pub fn is_in_force(&self, tables: &Tables, endpoint: u32) -> bool {
        let Some(entry) = tables.policy_entries.get(&endpoint) else { return false };
        let mut groups = [entry.ingress.group(), entry.egress.group()].into_iter().flatten();
        self.pending.prefixes.is_empty()
            && !self.pending.endpoints.contains(&endpoint)
            && !groups.any(|group| self.policies.awaits(group))
    }

    /// The first of the kernel's tables that does not hold what was written for an endpoint: its
    /// row, its interface, its addresses, and the policy that its row points to.
    ///
    /// # Errors
    /// The kernel refuses to read.
    pub fn damaged_table(&self, endpoint: u32) -> Result<Option<&'static str>, Refused> {
        let Some(row) = self.mirror.rows.get(&endpoint) else {
            return Ok(Some(palisade_abi::map::ENDPOINT_ROWS));
        };
        let mut written = pods::entries(&self.mirror, endpoint, row);
        for live in self.policies.live() {
            if [row.ingress_table, row.egress_table].contains(&live.number) {
                written.extend(policies::entries(&live.policy, live.number).into_values());
            }
        }
        for entry in &written {
            if !self.kernel.holds(entry)? {
                return Ok(Some(entry.table()));
            }
        }
        Ok(None)
    }

    /// One round. All inputs are complete: what is not wanted goes.
    pub fn round(&mut self, tables: &mut Tables, changes: &Changes) -> Report {
        self.policies.note(&changes.groups);
        self.note(tables, changes);
        if !self.started {
            self.start(tables);
        }
        let pending = &mut self.pending;
        let mut writer =
            Writer { kernel: &*self.kernel, mirror: &mut self.mirror, owed: &mut self.owed };
        let mut failures = Failures::default();
        writer.pay(&mut failures);
        let mut problems =
            self.policies.write(&mut writer, &self.prefixes, &changes.prefixes_added);
        let missing = identities::lead(&mut writer, tables, pending, &mut failures);
        let missing = with_covering(missing, &self.prefixes);
        let flipped =
            pods::flip(&mut writer, tables, pending, &self.policies, &missing, &mut failures);
        identities::trail(&mut writer, tables, pending, flipped, &mut failures);
        self.policies.collect(&mut writer, flipped, &mut failures);
        let next = &mut self.next_version;
        services::write(&mut writer, tables, &mut pending.services, next, &mut failures);

        let settled = pending.addresses.is_empty()
            && pending.prefixes.is_empty()
            && pending.endpoints.is_empty();
        if settled {
            for network in std::mem::take(&mut pending.removed) {
                self.prefixes.remove(&network);
            }
        }
        problems.extend(failures.into_problems());
        Report { problems, prefixes_settled: settled && std::mem::take(&mut pending.acknowledge) }
    }

    fn note(&mut self, tables: &mut Tables, changes: &Changes) {
        let pending = &mut self.pending;
        pending.addresses.extend(keys(tables.addresses.take_changes()));
        pending.prefixes.extend(keys(tables.prefixes.take_changes()));
        pending.endpoints.extend(keys(tables.policy_entries.take_changes()));
        pending.services.extend(keys(tables.service_entries.take_changes()));
        pending.removed.extend(changes.prefixes_removed.iter().map(|(network, _)| *network));
        pending.acknowledge |= !changes.prefixes_removed.is_empty();
        // An endpoint's row also holds its identity, which its address entry tells.
        let rows = pending.addresses.iter().filter_map(|address| tables.addresses.get(address));
        pending.endpoints.extend(rows.map(|entry| entry.row).filter(|row| *row > 1));
        let replaced: BTreeSet<_> = changes.groups.iter().map(|change| change.group).collect();
        for entry in tables.policy_entries.rows() {
            let groups = [entry.ingress.group(), entry.egress.group()];
            if groups.into_iter().flatten().any(|group| replaced.contains(&group)) {
                pending.endpoints.insert(entry.endpoint);
            }
        }
        for (network, id) in &changes.prefixes_added {
            self.prefixes.insert(*network, *id);
            pending.removed.remove(network);
        }
    }

    /// The first round: everything that is wanted or there is to be looked at.
    fn start(&mut self, tables: &Tables) {
        self.started = true;
        let pending = &mut self.pending;
        pending.addresses.extend(self.mirror.addresses.keys());
        pending.prefixes.extend(self.mirror.prefixes.keys());
        pending.endpoints.extend(self.mirror.rows.keys());
        let rows = self.mirror.addresses.values().map(|value| value.row);
        let rows = rows.chain(self.mirror.interfaces.values().copied());
        let is_closed = |row: &u32| *row > ROW_HOST && !self.mirror.rows.contains_key(row);
        pending.leaving.extend(rows.filter(is_closed));
        pending.endpoints.insert(ROW_HOST);
        pending.services.extend(self.mirror.services.keys());
        for entry in tables.policy_entries.rows() {
            let Some(row) = self.mirror.rows.get(&entry.endpoint) else { continue };
            if let Some(group) = entry.ingress.group() {
                self.policies.adopt(group, row.ingress_table);
            }
            if let Some(group) = entry.egress.group() {
                self.policies.adopt(group, row.egress_table);
            }
        }
        self.policies.retire_found();
    }

    /// Forgets an endpoint at once, whatever else is known: its row drops everything, its
    /// addresses are nobody's.
    ///
    /// # Errors
    /// The kernel refuses a write.
    pub fn release(&mut self, endpoint: u32) -> Result<(), Refused> {
        let steps = pods::release(&self.mirror, endpoint);
        let owed = &mut self.owed;
        Writer { kernel: &*self.kernel, mirror: &mut self.mirror, owed }.run(&steps)
    }
}

/// An address that lacks a prefix is taken for one of the shorter prefixes around it: a table that
/// knows one of those relies on the missing one even where it says nothing of it (an exception).
fn with_covering(missing: BTreeSet<u32>, prefixes: &BTreeMap<IpNet, u32>) -> BTreeSet<u32> {
    let networks = prefixes.iter().filter(|(_, id)| missing.contains(id));
    let around = networks.flat_map(|(network, _)| {
        let covering = std::iter::successors(network.supernet(), IpNet::supernet);
        covering.filter_map(|network| prefixes.get(&network).copied())
    });
    let around: Vec<u32> = around.collect();
    missing.into_iter().chain(around).collect()
}

fn keys<R: crate::tables::Row>(deltas: Vec<crate::tables::Delta<R>>) -> Vec<R::Key> {
    deltas
        .into_iter()
        .filter_map(|delta| delta.after.or(delta.before))
        .map(|row| row.key())
        .collect()
}

/// Has every endpoint's flows judged again.
fn bump_all_rows(mirror: &Mirror) -> Vec<Step> {
    mirror.rows.keys().map(|row| Step::BumpRow(*row)).collect()
}

fn put(entry: Entry) -> Step {
    Step::Put(entry)
}
