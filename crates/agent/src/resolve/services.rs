//! Addresses and backends of Services.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use crate::tables::{
    ObjectName, Tables,
    services::{EndpointSlice, Frontend, Service, ServiceEntry, ServicePort},
};

/// Brings the entries of Services up to date. What is gone goes first: another Service may have its
/// address by now.
pub(super) fn resolve(tables: &mut Tables, names: &BTreeSet<ObjectName>) {
    let wanted: Vec<(&ObjectName, Vec<ServiceEntry>)> = names
        .iter()
        .map(|name| {
            let service = tables.services.get(name);
            let entries = service.map(|service| entries(service, &slices_of(tables, name)));
            (name, entries.unwrap_or_default())
        })
        .collect();
    for (name, wanted) in &wanted {
        let is_gone = |row: &ServiceEntry| {
            row.service == **name && !wanted.iter().any(|entry| entry.frontend == row.frontend)
        };
        let gone: Vec<Frontend> = tables
            .service_entries
            .rows()
            .filter(|row| is_gone(row))
            .map(|row| row.frontend)
            .collect();
        for frontend in gone {
            tables.service_entries.delete(&frontend);
        }
    }
    for (name, wanted) in wanted {
        for entry in wanted {
            let owner = tables.service_entries.get(&entry.frontend).map(|row| &row.service);
            // Two Services never share an address in a sound cluster; should they, the one that was
            // first keeps it.
            if owner.is_none_or(|owner| owner == name) {
                tables.service_entries.put(entry);
            }
        }
    }
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

/// What the kernel is to hold of a Service.
pub(super) fn entries(service: &Service, slices: &[&EndpointSlice]) -> Vec<ServiceEntry> {
    let fronts = service
        .addresses
        .iter()
        .flat_map(|address| service.ports.iter().map(move |port| (*address, port)));
    fronts
        .map(|(address, port)| ServiceEntry {
            frontend: Frontend { address, port: port.port, protocol: port.protocol },
            service: service.name.clone(),
            backends: backends(address, port, slices),
            affinity: service.affinity,
        })
        .collect()
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
