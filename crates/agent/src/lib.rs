//! agent library.

pub mod cni;
