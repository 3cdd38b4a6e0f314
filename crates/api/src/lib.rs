//! Messages between processes.

pub mod admin;
pub mod cni;
pub mod flow;
