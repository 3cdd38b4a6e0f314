//! Services, their endpoint slices, and what the kernel is to hold of them.

use std::net::{IpAddr, SocketAddr};

use palisade_api::service::Addresses;

use super::{ObjectName, Row, join};

/// A Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Namespace and name.
    pub name: ObjectName,
    /// Its addresses; it need not be the one that is reached at those that are lent.
    pub addresses: Addresses,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// Seconds that a client sticks to a backend, where it does.
    pub affinity: Option<u32>,
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Name; endpoint slices refer to it. Empty for the only port.
    pub name: String,
    /// IP protocol number.
    pub protocol: u8,
    /// Number.
    pub port: u16,
}

impl std::fmt::Display for ServicePort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.port, crate::names::protocol(self.protocol))
    }
}

impl Row for Service {
    type Key = ObjectName;
    const TABLE: &'static str = "services";
    const COLUMNS: &'static [&'static str] = &["NAMESPACE", "NAME", "ADDRESSES", "LENT", "PORTS"];

    fn key(&self) -> ObjectName {
        self.name.clone()
    }

    fn columns(&self) -> Vec<String> {
        vec![
            self.name.namespace.clone(),
            self.name.name.clone(),
            join(&self.addresses.own),
            join(&self.addresses.lent),
            join(&self.ports),
        ]
    }
}

/// A part of a Service's backends, all of one address family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Namespace and name.
    pub name: ObjectName,
    /// Name of the Service, in the same namespace.
    pub service: String,
    /// A controller of the cluster's wrote it.
    pub by_controller: bool,
    /// Ports, already numbers.
    pub ports: Vec<ServicePort>,
    /// Backends.
    pub backends: Vec<SliceBackend>,
}

/// A backend of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceBackend {
    /// Address.
    pub address: IpAddr,
    /// Takes new connections.
    pub ready: bool,
    /// Still answers, though it may be terminating.
    pub serving: bool,
}

impl Row for EndpointSlice {
    type Key = ObjectName;
    const TABLE: &'static str = "endpoint-slices";
    const COLUMNS: &'static [&'static str] = &["NAMESPACE", "NAME", "SERVICE", "BACKENDS"];

    fn key(&self) -> ObjectName {
        self.name.clone()
    }

    fn columns(&self) -> Vec<String> {
        let backends = self.backends.iter().map(|backend| backend.address.to_string());
        vec![
            self.name.namespace.clone(),
            self.name.name.clone(),
            self.service.clone(),
            backends.collect::<Vec<_>>().join(","),
        ]
    }
}

/// Address, port and protocol that clients connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Frontend {
    /// Address.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
    /// IP protocol number.
    pub protocol: u8,
}

impl std::fmt::Display for Frontend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let address = SocketAddr::new(self.address, self.port);
        write!(f, "{address}/{}", crate::names::protocol(self.protocol))
    }
}

/// What the kernel is to hold of a Service's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceEntry {
    /// What clients connect to.
    pub frontend: Frontend,
    /// The Service.
    pub service: ObjectName,
    /// Backends in the order of their addresses; none: connections are refused.
    pub backends: Vec<SocketAddr>,
    /// As [`Service::affinity`].
    pub affinity: Option<u32>,
}

impl Row for ServiceEntry {
    type Key = Frontend;
    const TABLE: &'static str = "service-entries";
    const COLUMNS: &'static [&'static str] = &["FRONTEND", "SERVICE", "BACKENDS"];

    fn key(&self) -> Frontend {
        self.frontend
    }

    fn columns(&self) -> Vec<String> {
        vec![self.frontend.to_string(), self.service.to_string(), join(&self.backends)]
    }
}
