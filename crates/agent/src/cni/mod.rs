//! The server side of the CNI plugin: interfaces, addresses and their records.

mod attachments;
mod endpoints;
mod server;
mod store;
#[cfg(test)]
mod tests;

pub use attachments::{Attachments, Restored, Settings, alias_of, host_ifname, recorded};
pub use endpoints::{Addresses, EndpointError, Endpoints, HostLink, NewEndpoint, Readiness};
pub use server::Server;
pub use store::{Phase, Record};
