//! Demonstrations: a cluster of their own, real `kubectl` commands, and a verdict on each answer.

mod lab;
mod machine;
mod script;
pub(crate) mod starwars;
