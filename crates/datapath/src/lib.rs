//! Kernel datapath.

pub mod netlink;
