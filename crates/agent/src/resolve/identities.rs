//! Numbers of identities, and which address has which.

use std::{collections::BTreeMap, net::IpAddr};

use palisade_abi::{NODE_NONE, ROW_HOST, ROW_NONE, identity as number};
use palisade_policy::resolve::PodPorts;

use super::{
    Dirty, Outcome, Resolver,
    pods::{claimed_identity, identity_of},
};
use crate::tables::{Tables, identities::AddressEntry};

impl Resolver {
    /// Takes over new, changed and deleted identities.
    pub(super) fn note_identities(
        &mut self,
        tables: &mut Tables,
        dirty: &mut Dirty,
        outcome: &mut Outcome,
    ) {
        for delta in tables.identities.take_changes() {
            if let (Some(before), None) = (&delta.before, &delta.after)
                && self.is_used_here(tables, before.id)
            {
                // Somebody deleted the object of a living identity: it keeps its meaning, and the
                // object is made again.
                tables.identities.put((**before).clone());
                outcome.unnumbered.push(before.labels.clone());
                continue;
            }
            if let Some(before) = &delta.before {
                if let Some(numbers) = self.numbers.get_mut(&before.labels) {
                    numbers.remove(&before.id);
                    if numbers.is_empty() {
                        self.numbers.remove(&before.labels);
                    }
                }
                dirty.pods.extend(self.holders.get(&before.labels).into_iter().flatten().cloned());
                if delta.after.is_none() {
                    self.repository.remove_identity(before.id);
                }
            }
            if let Some(after) = &delta.after {
                self.numbers.entry(after.labels.clone()).or_default().insert(after.id);
                dirty.pods.extend(self.holders.get(&after.labels).into_iter().flatten().cloned());
                self.repository.upsert_identity(after.id, after.labels.clone());
            }
        }
    }

    fn is_used_here(&self, tables: &Tables, identity: u32) -> bool {
        tables.endpoints.rows().any(|endpoint| identity_of(tables, endpoint) == Some(identity))
    }

    /// Says whose the addresses to look at are, and tells the policy engine about pods.
    pub(super) fn resolve_owners(
        &mut self,
        tables: &Tables,
        dirty: &Dirty,
    ) -> BTreeMap<IpAddr, Option<AddressEntry>> {
        let mut owners = BTreeMap::new();
        for address in &dirty.addresses {
            let (entry, pod) = self.owner(tables, *address);
            match pod {
                Some(pod) => self.repository.set_pod(pod),
                None => self.repository.remove_pod(*address),
            }
            owners.insert(*address, entry);
        }
        owners
    }

    fn owner(&self, tables: &Tables, address: IpAddr) -> (Option<AddressEntry>, Option<PodPorts>) {
        let entry =
            |identity, row, node| Some(AddressEntry { address, identity, prefix: 0, row, node });
        // What this node itself attached comes before what any object claims.
        if let Some(endpoint) = self.local.get(&address).and_then(|id| tables.endpoints.get(id)) {
            let identity = identity_of(tables, endpoint);
            let pod = identity.zip(tables.pods.get(&endpoint.pod)).map(|(identity, pod)| {
                PodPorts { ip: address, identity, ports: pod.ports.clone() }
            });
            return (entry(identity.unwrap_or(number::INIT), endpoint.id, NODE_NONE), pod);
        }
        let claims = self.claims.get(&address);
        match (self.node_addresses.get(&address), claims) {
            (Some(node), _) if *node == self.scope.node => {
                return (entry(number::HOST, ROW_HOST, NODE_NONE), None);
            }
            // One of the two objects lies.
            (Some(_), Some(_)) => return (entry(number::UNKNOWN, ROW_NONE, NODE_NONE), None),
            (Some(node), None) => {
                let identity = match tables.api_servers.nodes.contains(node) {
                    true => number::KUBE_APISERVER,
                    false => number::REMOTE_NODE,
                };
                return (entry(identity, ROW_NONE, node_number(node)), None);
            }
            (None, None) => return (None, None),
            (None, Some(_)) => {}
        }
        match claimed_identity(tables, claims.into_iter().flatten()) {
            Some((identity, pod)) => {
                let ports = PodPorts { ip: address, identity, ports: pod.ports.clone() };
                (entry(identity, ROW_NONE, node_number(&pod.node)), Some(ports))
            }
            None => (entry(number::UNKNOWN, ROW_NONE, NODE_NONE), None),
        }
    }

    /// Writes the rows of the addresses looked at; when policy prefixes changed, of all.
    pub(super) fn resolve_addresses(
        &self,
        tables: &mut Tables,
        owners: BTreeMap<IpAddr, Option<AddressEntry>>,
        prefixes_changed: bool,
    ) {
        if prefixes_changed {
            let entries: Vec<AddressEntry> = tables.addresses.rows().map(|row| **row).collect();
            for entry in entries {
                let prefix = self.repository.prefix_of(entry.address);
                tables.addresses.put(AddressEntry { prefix, ..entry });
            }
        }
        for (address, entry) in owners {
            match entry {
                Some(entry) => {
                    let prefix = self.repository.prefix_of(address);
                    tables.addresses.put(AddressEntry { prefix, ..entry });
                }
                None => tables.addresses.delete(&address),
            }
        }
    }
}

/// A number for a node that every agent and every later run gives it (FNV-1a); never
/// [`NODE_NONE`].
fn node_number(name: &str) -> u32 {
    let hash = name
        .bytes()
        .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    hash.max(1)
}
