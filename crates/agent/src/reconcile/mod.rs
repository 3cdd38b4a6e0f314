//! From desired tables to the kernel's.
//!
//! A round writes in an order in which every state between two steps is as strict as the old
//! state or the new one: compiled tables aside, then what leads to new prefixes and identities,
//! then the rows flip, then what is gone goes. A step that fails ends the round; what was not
//! done stays pending, and the next round takes it up.

mod identities;
pub mod mirror;
mod nodes;
mod pods;
mod policies;
mod services;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use mirror::Mirror;
use palisade_datapath::{Entry, Kernel, KernelError, Step};
use palisade_policy::{CompiledPolicy, resolve::Changes};
use policies::PolicyTables;

pub use nodes::RouteKeeper;

use crate::tables::{Tables, services::Frontend};

/// A write that the kernel refused.
pub type Refused = KernelError;

/// Writes steps and remembers them in the mirror.
pub struct Writer<'a> {
    kernel: &'a dyn Kernel,
    mirror: &'a mut Mirror,
}

impl Writer<'_> {
    /// Performs the steps, up to the first one that fails.
    fn run(&mut self, steps: &[Step]) -> Result<(), Refused> {
        for step in steps {
            self.kernel.apply(step)?;
            self.mirror.note(step);
        }
        Ok(())
    }
}

/// What may differ between the desired tables and the kernel.
#[derive(Debug, Default)]
struct Pending {
    addresses: BTreeSet<IpAddr>,
    prefixes: BTreeSet<IpNet>,
    endpoints: BTreeSet<u32>,
    services: BTreeSet<Frontend>,
    /// The policy engine waits to hear that removed prefixes are out of use.
    acknowledge: bool,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.addresses.is_empty()
            && self.prefixes.is_empty()
            && self.endpoints.is_empty()
            && self.services.is_empty()
    }
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
            next_version: highest.unwrap_or_default() + 1,
            kernel,
            mirror,
            policies,
            pending: Pending::default(),
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
        self.pending.is_empty() && !self.policies.is_pending()
    }

    /// One round. All inputs are complete: what is not wanted goes.
    pub fn round(&mut self, tables: &mut Tables, changes: &Changes) -> Report {
        self.policies.note(&changes.groups);
        self.note(tables, changes);
        if !self.started {
            self.start(tables);
        }
        let mut report = Report::default();
        let mut writer = Writer { kernel: &*self.kernel, mirror: &mut self.mirror };
        report.problems = self.policies.write(&mut writer, &self.prefixes, &changes.prefixes_added);
        if let Err(error) = self.finish(tables) {
            report.problems.push(error.to_string());
            return report;
        }
        for (network, _) in &changes.prefixes_removed {
            self.prefixes.remove(network);
        }
        report.prefixes_settled = std::mem::take(&mut self.pending.acknowledge);
        report
    }

    fn finish(&mut self, tables: &Tables) -> Result<(), Refused> {
        let mut writer = Writer { kernel: &*self.kernel, mirror: &mut self.mirror };
        identities::lead(&mut writer, tables, &self.pending)?;
        pods::flip(&mut writer, tables, &self.pending, &self.policies)?;
        identities::trail(&mut writer, tables, &self.pending)?;
        self.pending.addresses.clear();
        self.pending.prefixes.clear();
        self.pending.endpoints.clear();
        self.policies.collect(&mut writer)?;
        services::write(&mut writer, tables, &mut self.pending.services, &mut self.next_version)
    }

    fn note(&mut self, tables: &mut Tables, changes: &Changes) {
        let pending = &mut self.pending;
        pending.addresses.extend(keys(tables.addresses.take_changes()));
        pending.prefixes.extend(keys(tables.prefixes.take_changes()));
        pending.endpoints.extend(keys(tables.policy_entries.take_changes()));
        pending.services.extend(keys(tables.service_entries.take_changes()));
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
        }
    }

    /// The first round: everything that is wanted or there is to be looked at.
    fn start(&mut self, tables: &Tables) {
        self.started = true;
        let pending = &mut self.pending;
        pending.addresses.extend(self.mirror.addresses.keys());
        pending.prefixes.extend(self.mirror.prefixes.keys());
        pending.endpoints.extend(self.mirror.rows.keys());
        pending.endpoints.insert(palisade_abi::ROW_HOST);
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
        Writer { kernel: &*self.kernel, mirror: &mut self.mirror }.run(&steps)
    }
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
