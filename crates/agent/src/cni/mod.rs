//! The server side of the CNI plugin: interfaces, addresses and their records.

mod attachments;
mod endpoints;
mod server;
mod store;
#[cfg(test)]
mod tests;

pub use attachments::{Attachments, Restored, Settings, host_ifname};
pub use endpoints::{Addresses, EndpointError, Endpoints, HostLink, NewEndpoint, Readiness};
pub use server::serve;
pub use store::{Phase, Record};
