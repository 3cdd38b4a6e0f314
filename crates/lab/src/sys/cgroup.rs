//! Control groups of nodes and pods.

use std::path::Path;
use std::time::{Duration, Instant};
use std::{fs, io};

/// Creates a control group; one that exists is fine.
pub fn create(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)
}

/// Moves this process into a control group.
pub fn join(path: &Path) -> io::Result<()> {
    fs::write(path.join("cgroup.procs"), "0")
}

/// Whether any process lives in the control group or below it.
pub fn populated(path: &Path) -> io::Result<bool> {
    let events = match fs::read_to_string(path.join("cgroup.events")) {
        Ok(events) => events,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    Ok(events.lines().any(|line| line == "populated 1"))
}

/// Kills every process in the control group and removes it; a group that is gone is no error.
pub fn remove(path: &Path) -> io::Result<()> {
    if !path.exists() {
        return Ok(());
    }
    fs::write(path.join("cgroup.kill"), "1")?;
    let deadline = Instant::now() + Duration::from_secs(5);
    while populated(path)? {
        if Instant::now() > deadline {
            return Err(io::Error::other(format!(
                "processes in {} survived being killed",
                path.display()
            )));
        }
        // The kernel offers only poll(2) here; killed processes leave within a millisecond or two.
        std::thread::sleep(Duration::from_millis(2));
    }
    remove_tree(path)
}

/// A control group goes away by `rmdir`, its children first.
fn remove_tree(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
