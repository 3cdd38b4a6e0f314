//! A whole Kubernetes cluster on one machine: API server, controllers, pod runner, nodes, DNS.

pub mod apiserver;
pub mod runtime;
