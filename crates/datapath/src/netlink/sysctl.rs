//! Kernel settings of the calling thread's network namespace.

use std::fs;
use std::io;

use super::NetlinkError;

/// Reads a setting; nothing where the kernel lacks it.
pub(super) fn get(name: &str) -> Result<Option<String>, NetlinkError> {
    let path = path(name);
    match fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(NetlinkError::Sysctl { path, source }),
        Ok(value) => Ok(Some(value.trim().to_owned())),
    }
}

fn path(name: &str) -> String {
    format!("/proc/sys/net/{name}")
}

/// Writes a setting unless it has the value already: some writes take the kernel's global lock.
/// A family that the kernel lacks has no settings, and needs none.
pub(super) fn set(name: &str, value: &str) -> Result<(), NetlinkError> {
    match get(name) {
        Ok(None) => return Ok(()),
        Ok(Some(present)) if present == value => return Ok(()),
        _ => {}
    }
    let path = path(name);
    fs::write(&path, value).map_err(|source| NetlinkError::Sysctl { path, source })
}
