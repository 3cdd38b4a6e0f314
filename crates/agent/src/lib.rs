//! The node agent: API objects to tables to the kernel. See `app` for the wiring.

pub mod cni;
pub mod ipam;
mod names;
pub mod reconcile;
pub mod resolve;
pub mod tables;
