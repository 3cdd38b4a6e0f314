//! The agent's sockets.

use std::{fs, io, os::unix::fs::PermissionsExt, path::Path};

use tokio::net::UnixListener;

/// Takes the socket, which an earlier agent may have left, for the owner and the group only.
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}
