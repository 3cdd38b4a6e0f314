//! Waiting for one child while forwarding signals to it and reaping everybody else's.

use std::process::{Child, ExitCode};

use anyhow::Context;
use futures::StreamExt;
use futures::stream::SelectAll;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use tokio::signal::unix::{SignalKind, signal};

/// Signals that mean something to a container's command.
const FORWARDED: [Signal; 6] =
    [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT, Signal::USR1, Signal::USR2];

/// Waits for `child` to end and gives its exit code (128 + signal number after a signal).
pub(super) fn until_exit(child: &Child) -> anyhow::Result<ExitCode> {
    let pid = Pid::from_child(child);
    // One thread only: a process that unshared its pid namespace cannot create more.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(wait(pid))
}

async fn wait(pid: Pid) -> anyhow::Result<ExitCode> {
    let mut children = signal(SignalKind::child()).context("cannot watch for exits")?;
    let mut signals = SelectAll::new();
    for which in FORWARDED {
        let mut stream = signal(SignalKind::from_raw(which.as_raw()))?;
        signals.push(
            futures::stream::poll_fn(move |cx| stream.poll_recv(cx)).map(move |()| which).boxed(),
        );
    }
    loop {
        if let Some(code) = reap(pid)? {
            return Ok(ExitCode::from(code));
        }
        tokio::select! {
            _ = children.recv() => {}
            Some(which) = signals.next() => {
                // It may have ended in this very moment; the next round sees that.
                let _ = rustix::process::kill_process(pid, which);
            }
        }
    }
}

/// Collects everything that has ended; the exit code of `main`, if it is among them.
fn reap(main: Pid) -> anyhow::Result<Option<u8>> {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) if pid == main => return Ok(Some(code(status))),
            Ok(Some(_)) => {}
            Ok(None) => return Ok(None),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for a child"),
        }
    }
}

fn code(status: WaitStatus) -> u8 {
    let code = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 255,
    };
    u8::try_from(code).unwrap_or(255)
}
