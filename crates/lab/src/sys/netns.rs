//! Named network namespaces, as `ip netns` keeps them.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::layout::NETNS_DIR;

/// The path of the network namespace `name`.
pub fn path(name: &str) -> PathBuf {
    Path::new(NETNS_DIR).join(name)
}

/// Creates the network namespace `name` with its loopback interface up.
pub fn create(name: &str) -> io::Result<PathBuf> {
    prepare_directory()?;
    let path = path(name);
    File::options().write(true).create_new(true).open(&path)?;
    let made = on_thread({
        let path = path.clone();
        move || {
            unshare(UnshareFlags::NEWNET)?;
            rustix::mount::mount_bind("/proc/thread-self/ns/net", &path)?;
            Ok(())
        }
    });
    if made.is_err() {
        let _ = fs::remove_file(&path);
    }
    made.map(|()| path)
}

/// Removes the network namespace `name`; one that is already gone is no error.
pub fn remove(name: &str) -> io::Result<()> {
    let path = path(name);
    match rustix::mount::unmount(&path, UnmountFlags::DETACH) {
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The names of the network namespaces that begin with `prefix`.
pub fn list(prefix: &str) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(NETNS_DIR) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names = Vec::new();
    for entry in entries {
        if let Ok(name) = entry?.file_name().into_string()
            && name.starts_with(prefix)
        {
            names.push(name);
        }
    }
    Ok(names)
}

/// Moves this thread into the network namespace at `path`.
pub fn enter(path: &Path) -> io::Result<()> {
    enter_fd(&OwnedFd::from(File::open(path)?))
}

/// Moves this thread into the network namespace `fd`.
pub fn enter_fd(fd: &impl AsFd) -> io::Result<()> {
    Ok(move_into_link_name_space(fd.as_fd(), Some(LinkNameSpaceType::Network))?)
}

/// Runs `work` on a thread of its own inside the network namespace at `path`.
pub fn run_in<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let path = path.to_owned();
    on_thread(move || {
        enter(&path)?;
        work()
    })
}

/// Namespaces belong to threads; a changed thread must never go back to a pool.
fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    std::thread::Builder::new()
        .name("netns".into())
        .spawn(work)?
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("a thread in a network namespace panicked")))
}

/// Leaves the namespaces named by `flags` for new ones.
#[expect(deprecated, reason = "deprecated for CLONE_FILES only, which no caller passes")]
pub fn unshare(flags: UnshareFlags) -> io::Result<()> {
    debug_assert!(!flags.contains(UnshareFlags::FILES));
    Ok(rustix::thread::unshare(flags)?)
}

/// `/run/netns` must be a shared mount, so that namespaces can be removed while other mount
/// namespaces still see them; `ip netns` makes it one in the same way.
fn prepare_directory() -> io::Result<()> {
    fs::create_dir_all(NETNS_DIR)?;
    let shared = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
    if rustix::mount::mount_change(NETNS_DIR, shared).is_ok() {
        return Ok(());
    }
    rustix::mount::mount_bind_recursive(NETNS_DIR, NETNS_DIR)?;
    Ok(rustix::mount::mount_change(NETNS_DIR, shared)?)
}
