//! Messages between processes.

pub mod admin;
pub mod flow;
