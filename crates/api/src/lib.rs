//! Messages between processes.

pub mod admin;
pub mod cni;
#[cfg(feature = "crd")]
pub mod convert;
#[cfg(feature = "crd")]
pub mod crd;
pub mod flow;
