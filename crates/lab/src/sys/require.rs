//! What the lab needs of the machine, and how to say what is missing.

use std::path::{Path, PathBuf};

use super::mounts;

/// The kernel with tcx links.
const NEEDED_KERNEL: (u32, u32) = (6, 6);

/// Something the machine lacks.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Missing {
    /// Not root.
    #[error(
        "the lab needs root, because it creates network namespaces and loads eBPF programs: run it with sudo"
    )]
    Root,
    /// An old kernel.
    #[error("this kernel is {found}; the lab needs {}.{} or newer (tcx links of eBPF)", NEEDED_KERNEL.0, NEEDED_KERNEL.1)]
    Kernel {
        /// The running kernel.
        found: String,
    },
    /// No unified control groups.
    #[error(
        "no cgroup2 file system is mounted; mount one with: mount -t cgroup2 none /sys/fs/cgroup"
    )]
    Cgroup2,
    /// A namespace type that the kernel was built without.
    #[error("this kernel has no {0} namespaces (/proc/self/ns/{0} does not exist)")]
    Namespace(&'static str),
    /// No eBPF.
    #[error(
        "this kernel has no bpf file system (CONFIG_BPF_SYSCALL); eBPF programs cannot be pinned"
    )]
    Bpf,
    /// Something could not be read.
    #[error("cannot read {0}")]
    Unreadable(&'static str),
}

/// Checks the machine and returns the root of the unified control groups.
pub fn check() -> Result<PathBuf, Missing> {
    if !rustix::process::geteuid().is_root() {
        return Err(Missing::Root);
    }
    check_kernel(&rustix::system::uname().release().to_string_lossy())?;
    for kind in ["net", "mnt", "pid", "uts", "ipc"] {
        if !Path::new("/proc/self/ns").join(kind).exists() {
            return Err(Missing::Namespace(kind));
        }
    }
    let filesystems = std::fs::read_to_string("/proc/filesystems")
        .map_err(|_| Missing::Unreadable("/proc/filesystems"))?;
    if !filesystems.lines().any(|line| line.ends_with("\tbpf")) {
        return Err(Missing::Bpf);
    }
    mounts::cgroup2_root()
        .map_err(|_| Missing::Unreadable("/proc/self/mounts"))?
        .ok_or(Missing::Cgroup2)
}

fn check_kernel(release: &str) -> Result<(), Missing> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if found < NEEDED_KERNEL {
        return Err(Missing::Kernel { found: release.to_owned() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_kernels_are_named() {
        assert_eq!(check_kernel("6.18.44-fc-v657"), Ok(()));
        assert_eq!(check_kernel("6.6.0"), Ok(()));
        assert_eq!(check_kernel("7.0"), Ok(()));
        let error = check_kernel("6.1.0-28-amd64").unwrap_err().to_string();
        assert!(error.contains("6.1.0-28-amd64") && error.contains("6.6"), "{error}");
    }
}
