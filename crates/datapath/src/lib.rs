//! The kernel's side of a node: loads, attaches and pins the eBPF programs, writes their tables,
//! and sets up links and routes.
//!
//! Everything that changes a table goes through [`Plan`]s, so that the agent's logic can be run
//! against a [`fake::FakeKernel`] without any privilege.

mod events;
pub mod fake;
mod grace;
mod load;
mod maps;
pub mod netlink;
mod pins;
mod step;
mod wire;

pub use events::EventReader;
pub use load::{Config, Datapath, LoadError, Side};
pub use maps::{FlowStats, Metrics};
pub use step::{Entry, Kernel, KernelError, Key, Plan, PlanError, Step, execute};
