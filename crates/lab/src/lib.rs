//! A whole Kubernetes cluster on one machine: API server, controllers, pod runner, nodes, DNS.

pub mod apiserver;
pub mod bench;
pub mod builtin;
pub mod container;
pub mod controllers;
pub mod daemon;
pub mod dns;
pub mod fabric;
pub mod layout;
pub mod nodes;
pub mod runner;
pub mod runtime;
pub mod sys;
