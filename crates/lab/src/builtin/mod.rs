//! Programs that images stand for: they run inside containers, from this very binary.

mod agnhost;
mod connect;
mod deathstar;
mod http;
mod nslookup;

use std::process::ExitCode;

/// Tools put at the end of every container's search path, for machines that lack them.
pub const TOOLS: [&str; 2] = ["nslookup", "agnhost"];
/// Programs that images have in their root directory.
pub const ROOT_PROGRAMS: [&str; 2] = ["agnhost", "pause"];

/// Runs the program `name`, if there is one.
pub fn run(name: &str, arguments: &[String]) -> Option<anyhow::Result<ExitCode>> {
    Some(match name {
        "deathstar" => deathstar::run(arguments),
        "agnhost" => agnhost::run(arguments),
        "pause" => pause(),
        "nslookup" => nslookup::run(arguments),
        "dns" => crate::dns::run(arguments),
        _ => return None,
    })
}

/// Sleeps until somebody ends it.
fn pause() -> anyhow::Result<ExitCode> {
    loop {
        std::thread::park();
    }
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// The pod's name.
fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
