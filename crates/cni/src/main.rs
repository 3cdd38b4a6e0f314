//! The CNI plugin: standard input to the agent's socket and back.

use std::process::ExitCode;

/// Fails at once: a binary that does nothing must not look like one that did its work.
fn main() -> ExitCode {
    eprintln!("palisade-cni: not usable yet: its parts are not wired up (see the README)");
    ExitCode::FAILURE
}
