//! Network policy as a pure library: objects in, tables out. No I/O, no clock, no async.
//!
//! | module | question it answers |
//! |---|---|
//! | [`label`], [`identity`] | who is a peer? |
//! | [`selector`] | whom does a rule speak of? |
//! | [`model`] | what does a policy say, whatever object it was written as? |
//! | [`l7`] | what do its rules ask of the traffic inside a connection? |
//! | [`resolve`] | which tables does the kernel need, and what changed? |
//! | [`evaluate`] | is this packet allowed? (naively, the yardstick for the tables) |
//! | [`explain`] | why? |

#[cfg(any(test, feature = "arbitrary"))]
pub mod arbitrary;
mod bitmap;
mod compile;
pub mod evaluate;
pub mod explain;
mod hash;
pub mod identity;
mod index;
pub mod l7;
pub mod label;
mod learned;
mod lookup;
pub mod model;
mod pods;
mod prefix;
pub mod resolve;
pub mod selector;

pub use compile::{Chunk, CompiledPolicy, NamedPorts, PortPrefix, RuleInfo, RuleSource, words};
pub use prefix::is_ipv4_mapped;
