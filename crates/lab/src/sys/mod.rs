//! The few things the lab asks of the kernel: namespaces, control groups, mounts.

pub mod cgroup;
pub mod mounts;
pub mod netns;
pub mod pids;
pub mod require;
