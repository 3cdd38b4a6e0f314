//! All that the agent knows and wants: *intent* tables, which only `reflect` and the endpoints'
//! life cycle write, and *desired* tables, which only `resolve` writes.

pub mod api_servers;
pub mod fqdns;
pub mod identities;
pub mod namespaces;
pub mod nodes;
pub mod pods;
pub mod policies;
pub mod secrets;
pub mod services;
mod table;

use std::{
    collections::BTreeMap,
    fmt::Display,
    net::IpAddr,
    sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use api_servers::ApiServers;
use fqdns::LearnedNames;
use identities::{AddressEntry, Identity, PrefixEntry};
use ipnet::IpNet;
use namespaces::Namespace;
use nodes::{Node, NodeSource, Route};
use palisade_abi::identity as number;
use palisade_policy::{
    identity::{host, reserved},
    label::Labels,
    model::PolicyKind,
};
use pods::{Endpoint, Pod, PodIdentity};
use policies::{PolicyEntry, PolicyObject};
use secrets::Secret;
use services::{EndpointSlice, Service, ServiceEntry};
pub use table::{Change, Delta, Row, Table};

/// Namespace and name of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl ObjectName {
    /// The object `name` in `namespace`.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl Display for ObjectName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A change of an intent table.
#[derive(Debug)]
pub enum Intent {
    /// Of [`Tables::namespaces`].
    Namespace(Change<Namespace>),
    /// Of [`Tables::pods`].
    Pod(Change<Pod>),
    /// Of [`Tables::policies`].
    Policy(PolicyKind, Change<PolicyObject>),
    /// Of [`Tables::services`].
    Service(Change<Service>),
    /// Of [`Tables::slices`].
    Slice(Change<EndpointSlice>),
    /// Of [`Tables::nodes`] or [`Tables::cilium_nodes`].
    Node(NodeSource, Change<Node>),
    /// Of [`Tables::secrets`].
    Secret(Change<Secret>),
    /// Of [`Tables::identities`].
    Identity(Change<Identity>),
    /// Of [`Tables::endpoints`].
    Endpoint(Change<Endpoint>),
    /// Of [`Tables::names`].
    Names(Change<LearnedNames>),
}

/// One table for each kind of policy object.
#[derive(Debug, Default)]
pub struct PolicyTables {
    network: Table<PolicyObject>,
    cilium: Table<PolicyObject>,
    clusterwide: Table<PolicyObject>,
}

impl PolicyTables {
    /// The table of a kind.
    pub fn of(&self, kind: PolicyKind) -> &Table<PolicyObject> {
        match kind {
            PolicyKind::NetworkPolicy => &self.network,
            PolicyKind::CiliumNetworkPolicy => &self.cilium,
            PolicyKind::CiliumClusterwideNetworkPolicy => &self.clusterwide,
        }
    }

    /// The table of a kind, to write.
    pub fn of_mut(&mut self, kind: PolicyKind) -> &mut Table<PolicyObject> {
        match kind {
            PolicyKind::NetworkPolicy => &mut self.network,
            PolicyKind::CiliumNetworkPolicy => &mut self.cilium,
            PolicyKind::CiliumClusterwideNetworkPolicy => &mut self.clusterwide,
        }
    }

    /// All tables.
    pub fn all(&self) -> [&Table<PolicyObject>; 3] {
        [&self.network, &self.cilium, &self.clusterwide]
    }

    /// The rows of all kinds.
    pub fn rows(&self) -> impl Iterator<Item = &Arc<PolicyObject>> {
        self.all().into_iter().flat_map(Table::rows)
    }
}

/// Every table.
#[derive(Debug, Default)]
pub struct Tables {
    /// Intent: namespaces.
    pub namespaces: Table<Namespace>,
    /// Intent: pods of the cluster.
    pub pods: Table<Pod>,
    /// Intent: policies.
    pub policies: PolicyTables,
    /// Intent: Services.
    pub services: Table<Service>,
    /// Intent: endpoint slices.
    pub slices: Table<EndpointSlice>,
    /// Intent: nodes, as `Node` objects tell.
    pub nodes: Table<Node>,
    /// Intent: nodes, as `CiliumNode` objects tell.
    pub cilium_nodes: Table<Node>,
    /// Intent: values for rules on HTTP headers. Not among [`Self::inputs`]: without them such
    /// rules match nothing, and all else goes on.
    pub secrets: Table<Secret>,
    /// Where these are.
    pub secrets_namespace: String,
    /// Intent: identities.
    pub identities: Table<Identity>,
    /// Intent: endpoints of this node.
    pub endpoints: Table<Endpoint>,
    /// Intent: what the endpoints learned from DNS.
    pub names: Table<LearnedNames>,
    /// Desired: labels and identities of pods.
    pub pod_identities: Table<PodIdentity>,
    /// Desired: the kernel's `ENDPOINTS`.
    pub addresses: Table<AddressEntry>,
    /// Desired: the kernel's `IPCACHE`.
    pub prefixes: Table<PrefixEntry>,
    /// Desired: policy of the endpoints.
    pub policy_entries: Table<PolicyEntry>,
    /// Desired: the kernel's `SERVICES`.
    pub service_entries: Table<ServiceEntry>,
    /// Desired: routes to other nodes' pods.
    pub routes: Table<Route>,
    /// Desired: where the API server is.
    pub api_servers: ApiServers,
}

impl Tables {
    /// Takes over a change of an intent table.
    pub fn apply(&mut self, intent: Intent) {
        match intent {
            Intent::Namespace(change) => self.namespaces.apply(change),
            Intent::Pod(change) => self.pods.apply(change),
            Intent::Policy(kind, change) => self.policies.of_mut(kind).apply(change),
            Intent::Service(change) => self.services.apply(change),
            Intent::Slice(change) => self.slices.apply(change),
            Intent::Node(NodeSource::Node, change) => self.nodes.apply(change),
            Intent::Node(NodeSource::CiliumNode, change) => self.cilium_nodes.apply(change),
            Intent::Secret(change) => self.secrets.apply(change),
            Intent::Identity(change) => self.identities.apply(change),
            Intent::Endpoint(change) => self.endpoints.apply(change),
            Intent::Names(change) => self.names.apply(change),
        }
    }

    /// The intent tables with their names: kind, complete, rows, newest error.
    pub fn inputs(&self) -> Vec<InputState> {
        let mut inputs = vec![
            InputState::of("Namespace", &self.namespaces),
            InputState::of("Pod", &self.pods),
            InputState::of("Service", &self.services),
            InputState::of("EndpointSlice", &self.slices),
            InputState::of("Node", &self.nodes),
            InputState::of("CiliumNode", &self.cilium_nodes),
            InputState::of("CiliumIdentity", &self.identities),
            InputState::of("Endpoint", &self.endpoints),
            InputState::of("LearnedNames", &self.names),
        ];
        for kind in POLICY_KINDS {
            inputs.push(InputState::of(kind.as_str(), self.policies.of(kind)));
        }
        inputs
    }

    /// Whether every intent table is complete: before, nothing may be derived from what is *not*
    /// in a table.
    pub fn inputs_complete(&self) -> bool {
        self.inputs().iter().all(|input| input.complete)
    }

    /// This node as its `Node` object tells.
    pub fn node(&self, name: &str) -> Option<&Arc<Node>> {
        self.nodes.get(&name.to_owned())
    }

    /// What the cluster knows of a node from both sources.
    pub fn node_rows(&self, name: &str) -> impl Iterator<Item = &Arc<Node>> {
        let key = name.to_owned();
        self.nodes.get(&key).into_iter().chain(self.cilium_nodes.get(&key))
    }

    /// All nodes as both sources tell.
    pub fn all_nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.nodes.rows().chain(self.cilium_nodes.rows())
    }

    /// The labels of an identity; none where nobody knows it.
    pub fn labels_of(&self, identity: u32) -> Arc<Labels> {
        match self.identities.get(&identity) {
            Some(row) => Arc::clone(&row.labels),
            None if identity == number::HOST => Arc::new(host(self.api_servers.here)),
            None => Arc::new(reserved(identity).unwrap_or_default()),
        }
    }

    /// The identity of an address, as the kernel finds it: its own, or that of the smallest network.
    pub fn identity_of(&self, address: IpAddr) -> u32 {
        if let Some(entry) = self.addresses.get(&address) {
            return entry.identity;
        }
        let networks = std::iter::successors(Some(IpNet::from(address)), IpNet::supernet);
        let mut found = networks.filter_map(|network| self.prefixes.get(&network));
        found.next().map_or(number::UNKNOWN, |entry| entry.identity)
    }

    /// The endpoint that a person means: its number, `namespace/pod`, or an address.
    pub fn find_endpoint(&self, text: &str) -> Option<&Arc<Endpoint>> {
        self.endpoints.rows().find(|endpoint| {
            endpoint.id.to_string() == text
                || endpoint.pod.to_string() == text
                || endpoint.addresses().any(|address| address.to_string() == text)
        })
    }
}

/// Every kind of policy object.
pub const POLICY_KINDS: [PolicyKind; 3] = [
    PolicyKind::NetworkPolicy,
    PolicyKind::CiliumNetworkPolicy,
    PolicyKind::CiliumClusterwideNetworkPolicy,
];

/// How an intent table is.
#[derive(Clone, Debug)]
pub struct InputState {
    /// Kind of its objects.
    pub kind: &'static str,
    /// See [`Table::is_complete`].
    pub complete: bool,
    /// Rows.
    pub rows: usize,
    /// See [`Table::error`].
    pub error: Option<String>,
}

impl InputState {
    fn of<R: Row>(kind: &'static str, table: &Table<R>) -> Self {
        let error = table.error().map(str::to_owned);
        Self { kind, complete: table.is_complete(), rows: table.len(), error }
    }
}

/// Reads tables; made by [`TablesWriter::reader`].
#[derive(Clone, Debug)]
pub struct TablesReader(Arc<RwLock<Tables>>);

impl TablesReader {
    /// The tables as they are; hold it briefly, the writer waits.
    pub fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The only writer of the tables.
#[derive(Debug, Default)]
pub struct TablesWriter(Arc<RwLock<Tables>>);

impl TablesWriter {
    /// A reader.
    pub fn reader(&self) -> TablesReader {
        TablesReader(self.0.clone())
    }

    /// The tables, to write.
    pub fn write(&mut self) -> RwLockWriteGuard<'_, Tables> {
        self.0.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The tables as they are.
    pub fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn join<'a, T: Display + 'a>(values: impl IntoIterator<Item = &'a T>) -> String {
    values.into_iter().map(T::to_string).collect::<Vec<_>>().join(",")
}

fn join_map(map: &BTreeMap<String, String>) -> String {
    map.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}
