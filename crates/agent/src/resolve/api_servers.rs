//! What the entity `kube-apiserver` is: the addresses that the Service `default/kubernetes` leads
//! to. Those of a node make the whole node one, as it may speak from any address of its own.
//!
//! Only administrators, the API server and Kubernetes' own controllers may write endpoint slices;
//! what the controllers write follows Services and pods, which others may write, and does not count.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use palisade_abi::identity as number;
use palisade_policy::identity;

use super::{Dirty, Resolver, services::slices_of};
use crate::tables::{
    ObjectName, Tables,
    api_servers::{ApiServers, names_entity},
    policies::PolicyObject,
};

fn service() -> ObjectName {
    ObjectName::new("default", "kubernetes")
}

impl Resolver {
    /// Takes over where the API server is; after nodes, Services and policies.
    pub(super) fn note_api_servers(&mut self, tables: &mut Tables, dirty: &mut Dirty) {
        if !dirty.nodes && !dirty.services.contains(&service()) {
            return;
        }
        let found = find(tables, &self.scope.node);
        if found == tables.api_servers {
            return;
        }
        let before = std::mem::replace(&mut tables.api_servers, found);
        let now = &tables.api_servers;
        let moved = |node: &String| before.nodes.contains(node) != now.nodes.contains(node);
        let of_moved = self.node_addresses.iter().filter(|(_, node)| moved(node));
        dirty.addresses.extend(of_moved.map(|(address, _)| *address));
        self.repository.upsert_identity(number::HOST, identity::host(now.here));
        if before.outside != now.outside {
            dirty.endpoints.extend(tables.endpoints.rows().map(|endpoint| endpoint.id));
            self.spell_out_again(tables);
        }
    }

    fn spell_out_again(&mut self, tables: &Tables) {
        let objects: Vec<Arc<PolicyObject>> = tables.policies.rows().cloned().collect();
        for object in objects {
            let policy = self.policy_in_force(&object);
            if names_entity(&policy) {
                self.upsert_policy(tables, policy);
            }
        }
    }
}

fn find(tables: &Tables, own: &str) -> ApiServers {
    let slices = slices_of(tables, &service());
    let backends =
        slices.into_iter().filter(|slice| !slice.by_controller).flat_map(|slice| &slice.backends);
    // A `CiliumNode` is an agent's writing, and must not make its node more than it is.
    let nodes: BTreeMap<IpAddr, &String> = tables
        .nodes
        .rows()
        .flat_map(|node| node.own_addresses().map(move |address| (address, &node.name)))
        .collect();
    let (mut on, mut outside) = (BTreeSet::new(), BTreeSet::new());
    for backend in backends {
        match nodes.get(&backend.address) {
            Some(node) => _ = on.insert((*node).clone()),
            None => _ = outside.insert(backend.address),
        }
    }
    ApiServers { here: on.contains(own), nodes: on, outside }
}
