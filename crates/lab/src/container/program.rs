//! Finding a program in a container's search path.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use super::{DEFAULT_PATH, Process};

/// A command for `process`, looked up inside the present root file system.
pub(super) fn command(process: &Process) -> anyhow::Result<Command> {
    let Some((name, arguments)) = process.argv.split_first() else {
        bail!("no command specified");
    };
    let directory = if process.directory.is_empty() { "/" } else { &process.directory };
    std::env::set_current_dir(directory)
        .with_context(|| format!("cannot change to working directory {directory:?}"))?;
    let path = process.env.iter().find(|(key, _)| key == "PATH").map_or(DEFAULT_PATH, |(_, v)| v);
    let mut command = Command::new(find(name, path)?);
    command.args(arguments).env_clear().envs(process.env.iter().map(|(k, v)| (k, v)));
    Ok(command)
}

/// Resolves `name` as a shell would; the messages are those of the usual runtimes.
fn find(name: &str, search: &str) -> anyhow::Result<PathBuf> {
    if name.contains('/') {
        let path = PathBuf::from(name);
        if !path.exists() {
            bail!("exec: {name:?}: stat {name}: no such file or directory");
        }
        if !executable(&path) {
            bail!("exec: {name:?}: permission denied");
        }
        return Ok(path);
    }
    search
        .split(':')
        .map(|directory| Path::new(directory).join(name))
        .find(|path| executable(path))
        .with_context(|| format!("exec: {name:?}: executable file not found in $PATH"))
}

fn executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_along_the_path() {
        assert_eq!(find("sh", "/nonexistent:/bin").unwrap(), PathBuf::from("/bin/sh"));
        let missing = find("no-such-program", "/bin").unwrap_err().to_string();
        assert!(missing.contains("executable file not found in $PATH"), "{missing}");
        let absolute = find("/no/such", "/bin").unwrap_err().to_string();
        assert!(absolute.contains("no such file or directory"), "{absolute}");
        assert!(find("/etc/passwd", "/bin").unwrap_err().to_string().contains("permission denied"));
    }
}
