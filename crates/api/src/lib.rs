//! Messages between processes.

pub mod admin;
pub mod boot;
#[cfg(feature = "client")]
pub mod client;
pub mod cni;
#[cfg(feature = "crd")]
pub mod convert;
#[cfg(feature = "crd")]
pub mod crd;
#[cfg(feature = "crd")]
pub mod explain;
pub mod flow;
pub mod pool;
#[cfg(feature = "proxy")]
pub mod proxy;
pub mod replace;
pub mod routing;
#[cfg(feature = "crd")]
pub mod secrets;
#[cfg(feature = "crd")]
pub mod service;
pub mod settings;
