//! Labels and identities of pods; the subjects of policies.

use std::{collections::BTreeMap, sync::Arc};

use palisade_abi::identity as number;
use palisade_policy::{
    identity::{PodLabels, endpoint_labels, reserved, security_labels},
    label::Labels,
    resolve::{EndpointId, EndpointInfo},
};

use super::{Dirty, Outcome, Resolver, both};
use crate::tables::{
    ObjectName, Tables,
    namespaces::Namespace,
    pods::{Endpoint, Pod, PodIdentity},
};

impl Resolver {
    /// Finds the pods that changed, or whose namespace did.
    pub(super) fn note_pods(&mut self, tables: &mut Tables, dirty: &mut Dirty) {
        for delta in tables.pods.take_changes() {
            for (pod, present) in delta
                .before
                .iter()
                .map(|pod| (pod, false))
                .chain(delta.after.iter().map(|pod| (pod, true)))
            {
                self.claim(pod, present);
                dirty.pods.insert(pod.name.clone());
                dirty.addresses.extend(&pod.addresses);
            }
        }
        for delta in tables.namespaces.take_changes() {
            let Some(namespace) = both(&delta).next() else { continue };
            let pods = tables
                .pods
                .rows_from(ObjectName::new(namespace.name.clone(), ""))
                .take_while(|pod| pod.name.namespace == namespace.name);
            dirty.pods.extend(pods.map(|pod| pod.name.clone()));
        }
    }

    fn claim(&mut self, pod: &Pod, present: bool) {
        if pod.host_network {
            return;
        }
        for address in &pod.addresses {
            let claims = self.claims.entry(*address).or_default();
            if present {
                claims.insert(pod.name.clone());
            } else {
                claims.remove(&pod.name);
            }
            if claims.is_empty() {
                self.claims.remove(address);
            }
        }
    }

    /// Finds the endpoints that changed.
    pub(super) fn note_endpoints(&mut self, tables: &mut Tables, dirty: &mut Dirty) {
        for delta in tables.endpoints.take_changes() {
            if let Some(before) = &delta.before {
                for address in before.addresses() {
                    self.local.remove(&address);
                    dirty.addresses.insert(address);
                }
                dirty.endpoints.insert(before.id);
            }
            if let Some(after) = &delta.after {
                for address in after.addresses() {
                    self.local.insert(address, after.id);
                    dirty.addresses.insert(address);
                }
                dirty.endpoints.insert(after.id);
                dirty.pods.insert(after.pod.clone());
            }
        }
    }

    /// Labels and identities of the pods to look at.
    pub(super) fn resolve_pods(
        &mut self,
        tables: &mut Tables,
        dirty: &mut Dirty,
        outcome: &mut Outcome,
    ) {
        for name in &dirty.pods {
            let labels = self.security_labels(tables, name);
            let before = tables.pod_identities.get(name).cloned();
            self.hold(name, before.as_ref().map(|row| &row.labels), labels.as_ref());
            let row = labels.map(|labels| PodIdentity {
                pod: name.clone(),
                identity: self.number(&labels),
                labels,
            });
            if let Some(pod) = tables.pods.get(name) {
                dirty.addresses.extend(&pod.addresses);
                if let Some(PodIdentity { labels, identity: None, .. }) = &row
                    && pod.node == self.scope.node
                {
                    outcome.unnumbered.push(labels.clone());
                }
            }
            match row {
                Some(row) => tables.pod_identities.put(row),
                None => tables.pod_identities.delete(name),
            }
        }
        for endpoint in tables.endpoints.rows() {
            if dirty.pods.contains(&endpoint.pod) {
                dirty.endpoints.insert(endpoint.id);
                dirty.addresses.extend(endpoint.addresses());
            }
        }
    }

    /// The number that the cluster has for labels: the lowest, should there be several.
    pub(super) fn number(&self, labels: &Labels) -> Option<u32> {
        self.numbers.get(labels)?.first().copied()
    }

    fn security_labels(&self, tables: &Tables, name: &ObjectName) -> Option<Arc<Labels>> {
        let pod = tables.pods.get(name).filter(|pod| !pod.host_network)?;
        let namespace = tables.namespaces.get(&name.namespace)?;
        let labels = security_labels(&self.pod_labels(pod, namespace));
        // Equal sets share one allocation: there are far fewer sets than pods.
        match self.holders.get_key_value(&labels).or(None) {
            Some((known, _)) => Some(known.clone()),
            None => Some(Arc::new(labels)),
        }
    }

    fn pod_labels<'a>(&'a self, pod: &'a Pod, namespace: &'a Namespace) -> PodLabels<'a> {
        PodLabels {
            namespace: &pod.name.namespace,
            namespace_labels: Some(&namespace.labels),
            pod_labels: Some(&pod.labels),
            service_account: &pod.service_account,
            cluster: &self.scope.cluster,
        }
    }

    fn hold(
        &mut self,
        pod: &ObjectName,
        before: Option<&Arc<Labels>>,
        after: Option<&Arc<Labels>>,
    ) {
        if before == after {
            return;
        }
        if let Some(before) = before
            && let Some(pods) = self.holders.get_mut(before)
        {
            pods.remove(pod);
            if pods.is_empty() {
                self.holders.remove(before);
            }
        }
        if let Some(after) = after {
            self.holders.entry(after.clone()).or_default().insert(pod.clone());
        }
    }

    /// Tells the policy engine about the endpoints to look at.
    pub(super) fn resolve_endpoints(&mut self, tables: &Tables, dirty: &Dirty) {
        for id in &dirty.endpoints {
            match tables.endpoints.get(id) {
                Some(endpoint) => {
                    let info = self.endpoint_info(tables, endpoint);
                    self.repository.upsert_endpoint(EndpointId(*id), info);
                }
                None => self.repository.remove_endpoint(EndpointId(*id)),
            }
        }
    }

    fn endpoint_info(&self, tables: &Tables, endpoint: &Endpoint) -> EndpointInfo {
        let known = identity_of(tables, endpoint).zip(tables.pods.get(&endpoint.pod));
        let namespace = tables.namespaces.get(&endpoint.pod.namespace);
        match known.zip(namespace) {
            Some(((identity, pod), namespace)) => EndpointInfo {
                identity,
                labels: endpoint_labels(&self.pod_labels(pod, namespace)),
                named_ports: pod.ports.clone(),
            },
            None => EndpointInfo {
                identity: number::INIT,
                labels: reserved(number::INIT).unwrap_or_default(),
                named_ports: Vec::new(),
            },
        }
    }
}

/// The identity of an endpoint, once the API's pod is the one that was connected and has one.
pub(super) fn identity_of(tables: &Tables, endpoint: &Endpoint) -> Option<u32> {
    let pod = tables.pods.get(&endpoint.pod)?;
    if !endpoint.uid.is_empty() && endpoint.uid != pod.runtime_uid {
        return None;
    }
    tables.pod_identities.get(&endpoint.pod)?.identity
}

/// The identity that pods claiming an address share; those on their way out give way. When it is
/// unclear whose the address is, it is nobody's.
pub(super) fn claimed_identity<'a>(
    tables: &'a Tables,
    claims: impl Iterator<Item = &'a ObjectName>,
) -> Option<(u32, &'a Arc<Pod>)> {
    let pods: Vec<_> = claims.filter_map(|name| tables.pods.get(name)).collect();
    let staying = pods.iter().filter(|pod| !pod.terminating).count();
    let mut owners: BTreeMap<Option<u32>, &Arc<Pod>> = BTreeMap::new();
    for pod in pods.iter().filter(|pod| staying == 0 || !pod.terminating) {
        let identity = tables.pod_identities.get(&pod.name).and_then(|row| row.identity);
        owners.insert(identity, pod);
    }
    match owners.pop_first() {
        Some((Some(identity), pod)) if owners.is_empty() => Some((identity, pod)),
        _ => None,
    }
}
