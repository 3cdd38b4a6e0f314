//! `down`: ends the daemon, then removes everything a lab may have left, whole or not.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use std::{fs, io};

use anyhow::Context;
use rustix::mount::UnmountFlags;

use super::{Undo, report};
use crate::layout::{FABRIC_NETNS, Layout, MAX_NODES, NETNS_DIR, NodePlan, POD_NETNS_PREFIX};
use crate::sys::{cgroup, netns, pids, require};

/// The daemon gets so long to end by itself.
const GRACE: Duration = Duration::from_secs(20);

/// Takes the lab down.
pub fn down(json: bool) -> anyhow::Result<ExitCode> {
    let cgroups = require::check()?;
    let layout = Layout::default();
    let daemon = report::running(&layout)?;
    if daemon.is_none() && !leftovers(&layout, &cgroups) {
        say(json, "No lab is running.");
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(pid) = daemon {
        pids::end(pid, GRACE).context("cannot end the lab's daemon")?;
    }
    clean(&layout, &cgroups)?;
    say(json, "The lab is down.");
    Ok(ExitCode::SUCCESS)
}

fn say(json: bool, text: &str) {
    if json {
        println!("{}", serde_json::json!({"running": false}));
    } else {
        println!("{text}");
    }
}

/// The control group of all labs.
pub(super) fn cgroup_base(cgroups: &Path) -> std::path::PathBuf {
    cgroups.join("palisade")
}

/// Whether anything of a lab is there.
pub(super) fn leftovers(layout: &Layout, cgroups: &Path) -> bool {
    layout.run_dir().exists()
        || cgroup_base(cgroups).exists()
        || layout.bpffs_base().exists()
        || !namespaces().unwrap_or_default().is_empty()
}

/// The network namespaces that are a lab's: no others are ever touched.
fn namespaces() -> io::Result<Vec<String>> {
    let mut names = netns::list(POD_NETNS_PREFIX)?;
    names.extend(NodePlan::all(MAX_NODES).iter().map(NodePlan::netns));
    names.push(FABRIC_NETNS.to_owned());
    names.retain(|name| netns::path(name).exists());
    Ok(names)
}

/// Removes everything of a lab whose daemon has ended. Goes on after an error, so that as much as
/// possible is gone; the first error is told.
pub(super) fn clean(layout: &Layout, cgroups: &Path) -> anyhow::Result<()> {
    let undo: Undo = fs::read(layout.undo_file())
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default();
    let mut first = Ok(());
    let mut step = |what: &str, result: io::Result<()>| {
        if let (Err(error), true) = (result, first.is_ok()) {
            first = Err(anyhow::Error::new(error).context(format!("cannot remove {what}")));
        }
    };
    // Pods and agents live in these groups, and end with them.
    step("the control groups", cgroup::remove(&cgroup_base(cgroups)));
    step("the pinned eBPF objects", remove_dir(&layout.bpffs_base()));
    if undo.bpffs {
        step("the bpf file system", unmount(layout.bpffs_root()));
    }
    for name in namespaces()? {
        step(&format!("network namespace {name}"), netns::remove(&name));
    }
    let unused = fs::read_dir(NETNS_DIR).is_ok_and(|mut entries| entries.next().is_none());
    if undo.netns_mount && unused {
        step(NETNS_DIR, unmount(Path::new(NETNS_DIR)));
    }
    if undo.netns_dir && unused {
        let _ = fs::remove_dir(NETNS_DIR);
    }
    step("the run directory", remove_dir(layout.run_dir()));
    if let Some(parent) = layout.run_dir().parent() {
        // Other parts of Palisade may use it.
        let _ = fs::remove_dir(parent);
    }
    first
}

fn remove_dir(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn unmount(path: &Path) -> io::Result<()> {
    match rustix::mount::unmount(path, UnmountFlags::DETACH) {
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) | Ok(()) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
