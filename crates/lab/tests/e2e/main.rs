//! The whole of it: real clusters, real `kubectl`, real sockets inside real pods.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

mod cilium;
mod cni;
mod containers;
mod dns;
mod flows;
mod guard;
mod harness;
mod kill;
mod matrices;
mod probe;
mod services;
mod traffic;
