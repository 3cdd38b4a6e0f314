//! Processes by number.

use std::time::{Duration, Instant};
use std::{fs, io};

use rustix::process::{Pid, PidfdFlags, Signal};

/// Whether process `pid` runs, and runs a program called `name`.
pub fn is(pid: u32, name: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|line| line.split('\0').next().is_some_and(|program| program.ends_with(name)))
}

/// Asks a process to end and waits for it; ends it when it takes longer than `grace`.
pub fn end(pid: u32, grace: Duration) -> io::Result<()> {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(()) };
    // The descriptor stays with this very process, even if the number is used again.
    let process = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    for (signal, patience) in [(Signal::TERM, grace), (Signal::KILL, Duration::from_secs(5))] {
        match rustix::process::pidfd_send_signal(&process, signal) {
            Err(rustix::io::Errno::SRCH) => return Ok(()),
            other => other?,
        }
        let deadline = Instant::now() + patience;
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            let mut poll = [rustix::event::PollFd::new(&process, rustix::event::PollFlags::IN)];
            let timeout = rustix::event::Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(0),
                tv_nsec: left.subsec_nanos().into(),
            };
            if rustix::event::poll(&mut poll, Some(&timeout))? > 0 {
                return Ok(());
            }
        }
    }
    Err(io::Error::other("the process survived being killed"))
}
