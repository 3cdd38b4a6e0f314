//! The whole of it: real clusters, real `kubectl`, real sockets inside real pods.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

mod cilium;
mod cni;
mod connectivity;
mod containers;
mod dns;
mod flows;
mod fqdn;
mod gate;
mod guard;
mod harness;
mod http;
mod install;
mod kill;
mod l7;
mod lifecycle;
mod masquerade;
mod matrices;
mod names;
mod nodes;
mod operator;
mod overlay;
mod probe;
mod refusals;
mod restart;
mod services;
mod silence;
mod status;
mod storm;
mod tls;
mod traffic;
mod upgrade;
mod visibility;
