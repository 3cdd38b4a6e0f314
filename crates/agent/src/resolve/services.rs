//! Frontends of Services and the backends behind them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use palisade_api::service::Tenure;

use super::{Dirty, Resolver, both};
use crate::tables::{
    ObjectName, Tables,
    services::{EndpointSlice, Frontend, Service, ServiceEntry, ServicePort},
};

/// The Services that have a frontend: the first of them is reached there.
pub(super) type Tenants = BTreeMap<Frontend, BTreeSet<(Tenure, ObjectName)>>;

impl Resolver {
    /// Takes over Services and their slices.
    pub(super) fn note_services(&mut self, tables: &mut Tables, dirty: &mut Dirty) {
        for delta in tables.services.take_changes() {
            dirty.services.extend(both(&delta).map(|service| service.name.clone()));
            for (frontend, tenant) in delta.before.iter().flat_map(|service| tenures(service)) {
                dirty.frontends.insert(frontend);
                self.move_out(frontend, &tenant);
            }
            for (frontend, tenant) in delta.after.iter().flat_map(|service| tenures(service)) {
                dirty.frontends.insert(frontend);
                self.tenants.entry(frontend).or_default().insert(tenant);
            }
        }
        for delta in tables.slices.take_changes() {
            for slice in both(&delta) {
                let name = ObjectName::new(slice.name.namespace.clone(), slice.service.clone());
                let service = tables.services.get(&name);
                let frontends = service.into_iter().flat_map(|service| tenures(service));
                dirty.frontends.extend(frontends.map(|(frontend, _)| frontend));
                dirty.services.insert(name);
            }
        }
    }

    fn move_out(&mut self, frontend: Frontend, tenant: &(Tenure, ObjectName)) {
        let Some(tenants) = self.tenants.get_mut(&frontend) else { return };
        tenants.remove(tenant);
        if tenants.is_empty() {
            self.tenants.remove(&frontend);
        }
    }

    /// Brings the entries of frontends up to date.
    pub(super) fn resolve_services(&self, tables: &mut Tables, frontends: &BTreeSet<Frontend>) {
        let mut of_service = BTreeMap::<_, Vec<_>>::new();
        for frontend in frontends {
            match self.tenants.get(frontend).and_then(BTreeSet::first) {
                Some((_, service)) => of_service.entry(service).or_default().push(*frontend),
                None => tables.service_entries.delete(frontend),
            }
        }
        for (name, frontends) in of_service {
            let Some(service) = tables.services.get(name).cloned() else { continue };
            let entries = entries(&service, &slices_of(tables, name), &frontends);
            for entry in entries {
                tables.service_entries.put(entry);
            }
        }
    }
}

/// The frontends that a Service has, alone or with others.
fn tenures(service: &Service) -> impl Iterator<Item = (Frontend, (Tenure, ObjectName))> {
    let of_address = move |(address, tenure)| {
        service.ports.iter().map(move |port| {
            let frontend = Frontend { address, port: port.port, protocol: port.protocol };
            (frontend, (tenure, service.name.clone()))
        })
    };
    service.addresses.iter().flat_map(of_address)
}

pub(super) fn slices_of<'a>(tables: &'a Tables, service: &ObjectName) -> Vec<&'a EndpointSlice> {
    tables
        .slices
        .rows_from(ObjectName::new(service.namespace.clone(), ""))
        .take_while(|slice| slice.name.namespace == service.namespace)
        .filter(|slice| slice.service == service.name)
        .map(AsRef::as_ref)
        .collect()
}

/// What the kernel is to hold of a Service at these of its frontends.
fn entries(
    service: &Service,
    slices: &[&EndpointSlice],
    frontends: &[Frontend],
) -> Vec<ServiceEntry> {
    let entry = |frontend: &Frontend| {
        let Frontend { address, port, protocol } = *frontend;
        let mut ports = service.ports.iter();
        let port = ports.find(|one| (one.port, one.protocol) == (port, protocol))?;
        Some(ServiceEntry {
            frontend: *frontend,
            service: service.name.clone(),
            backends: backends(address, port, slices),
            affinity: service.affinity,
        })
    };
    frontends.iter().filter_map(entry).collect()
}

/// The ready backends of the address's family; when there is none, those that still serve.
fn backends(address: IpAddr, port: &ServicePort, slices: &[&EndpointSlice]) -> Vec<SocketAddr> {
    let mut ready = BTreeSet::new();
    let mut serving = BTreeSet::new();
    for slice in slices {
        let target = slice
            .ports
            .iter()
            .find(|candidate| candidate.name == port.name && candidate.protocol == port.protocol);
        let Some(target) = target else { continue };
        let family = |backend: &IpAddr| backend.is_ipv4() == address.is_ipv4();
        for backend in slice.backends.iter().filter(|backend| family(&backend.address)) {
            let socket = SocketAddr::new(backend.address, target.port);
            if backend.ready {
                ready.insert(socket);
            } else if backend.serving {
                serving.insert(socket);
            }
        }
    }
    let chosen = if ready.is_empty() { serving } else { ready };
    chosen.into_iter().collect()
}
