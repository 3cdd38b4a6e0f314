//! Programs of others that are measured with or beside, where they are installed.

use std::{
    io,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

use crate::sys::netns;

const SOON: Duration = Duration::from_secs(10);

/// Where a program is on the search path.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|file| file.is_file())
}

/// A server that runs; it ends with this value.
pub(super) struct Program(Child);

impl Program {
    /// Starts a command in a network namespace; returns once it listens at the address.
    pub(super) fn start(netns: &Path, mut command: Command, at: SocketAddr) -> Result<Self> {
        let name = command.get_program().to_owned();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let program = Self(netns::run_in(netns, move || command.spawn())?);
        let begun = Instant::now();
        while begun.elapsed() < SOON {
            if netns::run_in(netns, move || TcpStream::connect(at).map(drop)).is_ok() {
                return Ok(program);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        bail!("{} was started and does not listen", name.display())
    }

    pub(super) fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // One that ended by itself is as good.
        let _: io::Result<()> = self.0.kill();
        let _ = self.0.wait();
    }
}
