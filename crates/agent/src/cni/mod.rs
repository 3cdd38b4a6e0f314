//! The server side of the CNI plugin: interfaces, addresses and their records.

mod endpoints;

pub use endpoints::{Addresses, EndpointError, Endpoints, HostLink, NewEndpoint, Readiness};
