//! A line on the terminal while something takes longer than a second.

use std::{
    io::{self, IsTerminal, Write},
    sync::mpsc::{self, RecvTimeoutError, Sender},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

const FIRST: Duration = Duration::from_secs(1);
const EVERY: Duration = Duration::from_millis(250);

/// Shows what is going on until it is dropped; nothing where standard error is no terminal.
pub(crate) struct Progress {
    stop: Option<Sender<()>>,
    painter: Option<JoinHandle<()>>,
}

impl Progress {
    /// Starts; `doing` is like "waiting for the agents".
    pub(crate) fn start(doing: &str) -> Self {
        if !io::stderr().is_terminal() {
            return Self { stop: None, painter: None };
        }
        let (stop, stopped) = mpsc::channel();
        let doing = doing.to_owned();
        let painter = thread::spawn(move || {
            let begun = Instant::now();
            let mut wait = FIRST;
            while stopped.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                wait = EVERY;
                let mut err = io::stderr().lock();
                // A terminal that went away is no reason to stop the work itself.
                let _ = write!(err, "\r\x1b[K{doing}… {:.0} s", begun.elapsed().as_secs_f32());
                let _ = err.flush();
            }
            if wait == EVERY {
                let _ = write!(io::stderr().lock(), "\r\x1b[K");
            }
        });
        Self { stop: Some(stop), painter: Some(painter) }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(painter) = self.painter.take() {
            let _ = painter.join();
        }
    }
}
