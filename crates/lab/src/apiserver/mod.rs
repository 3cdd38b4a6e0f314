//! An embedded Kubernetes API server: one generic, schema-driven handler for every kind.

pub mod error;
pub mod store;
