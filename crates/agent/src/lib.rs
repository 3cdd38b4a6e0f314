//! The node agent: API objects to tables to the kernel. See `app` for the wiring.

pub mod admin;
pub mod app;
pub mod cni;
pub mod endpoints;
pub mod engine;
pub mod fqdn;
pub mod ipam;
pub mod masquerade;
mod memory;
mod names;
pub mod observer;
pub mod overlay;
pub mod proxy;
pub mod publish;
pub mod reconcile;
pub mod reflect;
pub mod resolve;
mod resources;
mod sockets;
pub mod tables;
