//! The root file system of a container: the machine's programs and libraries, read-only, and
//! everything else fresh and its own.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::Context;
use rustix::fs::{CWD, FileType};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};

use super::{ContainerSpec, Volume};
use crate::builtin;

/// Directories of the machine that containers see, read-only.
const SHARED: [&str; 8] = ["/usr", "/opt", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"];
/// Directories that every container has for itself.
const FRESH: [&str; 9] =
    ["tmp", "run", "root", "home", "var/tmp", "var/lib", "var/log", "mnt", "srv"];
/// Names in `/etc` that no container gets to see.
const SECRET: [&str; 6] = ["shadow", "shadow-", "gshadow", "gshadow-", "sudoers", "ssh"];
/// Device nodes.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

/// Puts the root file system together and moves into it.
pub(super) fn enter(spec: &ContainerSpec) -> anyhow::Result<()> {
    let root = &spec.root;
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .context("cannot make mounts private")?;
    let no_flags = MountFlags::NOSUID;
    rustix::mount::mount("tmpfs", root, "tmpfs", no_flags, Some(c"mode=0755,size=256m"))
        .context("cannot mount the root file system")?;
    for path in SHARED {
        share(Path::new(path), root)?;
    }
    for path in FRESH {
        fs::create_dir_all(root.join(path))?;
    }
    for path in ["tmp", "var/tmp"] {
        fs::set_permissions(root.join(path), std::os::unix::fs::PermissionsExt::from_mode(0o1777))?;
    }
    symlink("../run", root.join("var/run"))?;
    lab(root)?;
    etc(root, &spec.etc)?;
    devices(root)?;
    kernel_views(root)?;
    let volumes = spec
        .volumes
        .iter()
        .map(|volume| Ok((detach(volume)?, volume)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    pivot(root)?;
    for (tree, volume) in volumes {
        attach(&tree, volume)
            .with_context(|| format!("cannot mount the volume at {}", volume.target.display()))?;
    }
    if spec.read_only {
        let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID;
        rustix::mount::mount_remount("/", flags, "")
            .context("cannot make the root file system read-only")?;
    }
    Ok(())
}

/// Shows one top-level directory of the machine; symbolic links stay links.
fn share(path: &Path, root: &Path) -> anyhow::Result<()> {
    let Ok(data) = path.symlink_metadata() else { return Ok(()) };
    let target = root.join(path.strip_prefix("/")?);
    if data.is_symlink() {
        symlink(fs::read_link(path)?, target)?;
        return Ok(());
    }
    fs::create_dir_all(&target)?;
    bind_read_only(path, &target)
}

/// This program and the names under which it acts as a tool.
fn lab(root: &Path) -> anyhow::Result<()> {
    let own = root.join(".palisade");
    fs::create_dir_all(own.join("bin"))?;
    File::create(own.join("lab"))?;
    bind_read_only(&program()?, &own.join("lab"))
        .context("cannot show palisade-lab in the container; if it was removed, restart the lab")?;
    for name in builtin::TOOLS {
        symlink(super::LAB_IN_CONTAINER, own.join("bin").join(name))?;
    }
    for name in builtin::ROOT_PROGRAMS {
        symlink(super::LAB_IN_CONTAINER, root.join(name))?;
    }
    Ok(())
}

/// This program's path. One that was rebuilt while it ran lies there all the same.
fn program() -> anyhow::Result<PathBuf> {
    let path = fs::read_link("/proc/self/exe")?;
    Ok(path
        .to_str()
        .and_then(|path| path.strip_suffix(" (deleted)"))
        .map_or(path.clone(), PathBuf::from))
}

/// A writable `/etc` of links to the machine's files, with the pod's own files in place of some.
fn etc(root: &Path, own: &[(String, String)]) -> anyhow::Result<()> {
    let machine = root.join(".palisade/etc");
    let etc = root.join("etc");
    fs::create_dir_all(&machine)?;
    fs::create_dir_all(&etc)?;
    for (name, content) in own {
        fs::write(etc.join(name), content)?;
    }
    for entry in fs::read_dir("/etc")? {
        let entry = entry?;
        let name = entry.file_name();
        let target = etc.join(&name);
        if target.symlink_metadata().is_ok() || SECRET.iter().any(|secret| name == *secret) {
            continue;
        }
        if entry.file_type()?.is_symlink() {
            symlink(fs::read_link(entry.path())?, target)?;
        } else {
            symlink(Path::new("/.palisade/etc").join(&name), target)?;
        }
    }
    bind_read_only(Path::new("/etc"), &machine)?;
    for secret in SECRET {
        hide(&machine.join(secret))?;
    }
    Ok(())
}

/// Covers a path with nothing.
fn hide(path: &Path) -> anyhow::Result<()> {
    let Ok(data) = path.metadata() else { return Ok(()) };
    if data.is_dir() {
        rustix::mount::mount("tmpfs", path, "tmpfs", MountFlags::RDONLY, None)?;
    } else {
        rustix::mount::mount_bind("/dev/null", path)?;
    }
    Ok(())
}

fn devices(root: &Path) -> anyhow::Result<()> {
    let dev = root.join("dev");
    fs::create_dir_all(dev.join("pts"))?;
    fs::create_dir_all(dev.join("shm"))?;
    for name in DEVICES {
        File::create(dev.join(name))?;
        rustix::mount::mount_bind(Path::new("/dev").join(name), dev.join(name))
            .with_context(|| format!("cannot show /dev/{name}"))?;
    }
    // Terminals of `exec` are opened by the daemon, so containers share the machine's instance.
    rustix::mount::mount_bind("/dev/pts", dev.join("pts")).context("cannot show /dev/pts")?;
    rustix::mount::mount(
        "tmpfs",
        dev.join("shm"),
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        Some(c"mode=1777,size=64m"),
    )?;
    for (target, link) in [
        ("/proc/self/fd", "fd"),
        ("/proc/self/fd/0", "stdin"),
        ("/proc/self/fd/1", "stdout"),
        ("/proc/self/fd/2", "stderr"),
        ("pts/ptmx", "ptmx"),
    ] {
        symlink(target, dev.join(link))?;
    }
    Ok(())
}

fn kernel_views(root: &Path) -> anyhow::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    fs::create_dir_all(root.join("proc"))?;
    fs::create_dir_all(root.join("sys"))?;
    rustix::mount::mount("proc", root.join("proc"), "proc", flags, None)
        .context("cannot mount /proc")?;
    rustix::mount::mount("sysfs", root.join("sys"), "sysfs", flags | MountFlags::RDONLY, None)
        .context("cannot mount /sys")
}

/// A volume as a mount without a place. Its place is looked up only inside the container, so that
/// no link of the container can lead to a path of the machine.
fn detach(volume: &Volume) -> anyhow::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    rustix::mount::open_tree(CWD, &volume.source, flags)
        .with_context(|| format!("cannot open volume {}", volume.source.display()))
}

fn attach(tree: &OwnedFd, volume: &Volume) -> anyhow::Result<()> {
    let target = &volume.target;
    let kind = rustix::fs::fstat(tree).map(|data| FileType::from_raw_mode(data.st_mode))?;
    if kind == FileType::Directory {
        fs::create_dir_all(target)?;
    } else {
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        if !target.exists() {
            File::create(target)?;
        }
    }
    let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    rustix::mount::move_mount(tree, "", CWD, target, empty)?;
    if volume.read_only {
        rustix::mount::mount_remount(target, MountFlags::BIND | MountFlags::RDONLY, "")?;
    }
    Ok(())
}

fn bind_read_only(source: &Path, target: &Path) -> anyhow::Result<()> {
    rustix::mount::mount_bind(source, target)
        .with_context(|| format!("cannot show {} in the container", source.display()))?;
    rustix::mount::mount_remount(target, MountFlags::BIND | MountFlags::RDONLY, "")
        .with_context(|| format!("cannot make {} read-only", target.display()))
}

fn pivot(root: &Path) -> anyhow::Result<()> {
    std::env::set_current_dir(root)?;
    rustix::process::pivot_root(".", ".").context("cannot change the root file system")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)
        .context("cannot leave the machine's file systems")?;
    std::env::set_current_dir("/")?;
    Ok(())
}
