//! From intent to desired: which identity has which address, which tables an endpoint's policy
//! comes to, which backends a Service has.
//!
//! Every rule here is a function of the intent tables alone; the [`Resolver`] adds the indexes
//! that let a change cost what it affects. Whatever the order of events, the desired tables
//! depend only on the intent tables as they are in the end; only what stands in for a refused policy
//! is what its object said before.

mod api_servers;
mod fqdns;
mod identities;
mod last_good;
mod nodes;
mod pods;
mod policies;
mod services;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use palisade_api::routing::Routing;
use palisade_policy::{
    label::Labels,
    resolve::{Changes, Repository},
};

pub use last_good::LastGood;

use crate::tables::{
    Delta, ObjectName, Tables,
    policies::{Condition, PolicyObject},
    services::Frontend,
};

/// Who the agent works for.
#[derive(Clone, Debug)]
pub struct Scope {
    /// The node's name.
    pub node: String,
    /// The cluster's name.
    pub cluster: String,
    /// How pods of different nodes reach each other.
    pub routing: Routing,
}

/// What follows from a round besides the desired tables.
#[derive(Debug, Default)]
pub struct Outcome {
    /// What became of compiled policies.
    pub changes: Changes,
    /// Labels of this node's pods that have no number in the cluster yet.
    pub unnumbered: Vec<Arc<Labels>>,
    /// Policy objects whose status says something else than what was found.
    pub conditions: Vec<(Arc<PolicyObject>, Condition)>,
}

/// The indexes and the policy engine.
pub struct Resolver {
    scope: Scope,
    repository: Repository,
    /// Numbers that the cluster has for a set of labels.
    numbers: HashMap<Arc<Labels>, BTreeSet<u32>>,
    /// Pods that have a set of labels.
    holders: HashMap<Arc<Labels>, BTreeSet<ObjectName>>,
    /// Pods that say an address is theirs.
    claims: HashMap<IpAddr, BTreeSet<ObjectName>>,
    /// Endpoints by address.
    local: HashMap<IpAddr, u32>,
    /// Nodes by address.
    node_addresses: BTreeMap<IpAddr, String>,
    /// Services that have a frontend.
    tenants: services::Tenants,
    last_good: LastGood,
    /// All Secrets were read at least once, and nothing is in the way of hearing of changes.
    secrets_known: bool,
}

/// What a round has to look at again.
#[derive(Debug, Default)]
struct Dirty {
    pods: BTreeSet<ObjectName>,
    endpoints: BTreeSet<u32>,
    addresses: BTreeSet<IpAddr>,
    services: BTreeSet<ObjectName>,
    frontends: BTreeSet<Frontend>,
    nodes: bool,
}

impl Resolver {
    /// Knows nothing but the numbers of prefixes that the kernel already uses.
    pub fn new(scope: Scope, prefixes: impl IntoIterator<Item = (IpNet, u32)>) -> Self {
        let mut repository = Repository::new();
        repository.adopt_prefixes(prefixes);
        Self {
            scope,
            repository,
            numbers: HashMap::new(),
            holders: HashMap::new(),
            claims: HashMap::new(),
            local: HashMap::new(),
            node_addresses: BTreeMap::new(),
            tenants: services::Tenants::new(),
            last_good: LastGood::default(),
            secrets_known: false,
        }
    }

    /// Knows what stood in for refused policies before this agent began.
    #[must_use]
    pub fn with_last_good(self, last_good: LastGood) -> Self {
        Self { last_good, ..self }
    }

    /// Brings the desired tables up to the intent tables.
    pub fn resolve(&mut self, tables: &mut Tables) -> Outcome {
        let mut dirty = Dirty::default();
        let mut outcome = Outcome::default();

        self.note_nodes(tables, &mut dirty);
        self.note_identities(tables, &mut dirty, &mut outcome);
        self.note_pods(tables, &mut dirty);
        self.note_endpoints(tables, &mut dirty);
        self.note_policies(tables, &mut outcome);
        self.sweep_last_good(tables);
        self.note_services(tables, &mut dirty);
        self.note_api_servers(tables, &mut dirty);

        self.resolve_pods(tables, &mut dirty, &mut outcome);
        self.resolve_endpoints(tables, &dirty);
        self.note_names(tables, &dirty);
        let owners = self.resolve_owners(tables, &dirty);

        outcome.changes = self.repository.commit();
        self.resolve_addresses(tables, owners, outcome.changes.prefixes_changed);
        self.resolve_policies(tables, &outcome.changes);
        if dirty.nodes {
            let own = &self.scope.node;
            tables.routes.replace(match self.scope.routing {
                Routing::Native => nodes::routes(tables, own),
                Routing::Overlay => nodes::overlay_routes(tables, own),
            });
        }
        if dirty.nodes || outcome.changes.prefixes_changed || tables.prefixes.is_empty() {
            let prefixes = nodes::prefixes(tables, self.repository.prefixes());
            tables.prefixes.replace(prefixes);
        }
        self.resolve_services(tables, &dirty.frontends);
        outcome
    }

    /// No address in the kernel refers to removed prefixes any more.
    pub fn acknowledge_prefixes(&mut self) {
        self.repository.acknowledge_prefixes();
    }
}

/// The rows of a delta, the old one first.
fn both<R>(delta: &Delta<R>) -> impl Iterator<Item = &Arc<R>> {
    delta.before.iter().chain(&delta.after)
}
