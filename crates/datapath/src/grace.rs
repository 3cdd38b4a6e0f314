//! Short waits for RCU grace periods.
//!
//! The kernel waits for one under the lock of all links whenever a tcx program is attached
//! (`tcx_entry_sync` in `kernel/bpf/tcx.c`): some 10 ms each, one pod after the other. Expedited
//! they take some 100 µs. That costs an interrupt on every busy CPU, as the grace periods do that
//! the kernel expedites by itself when it registers an interface (`synchronize_net`).

use std::{fs::File, io, os::unix::fs::FileExt};

use rustix::fs::{FlockOperation, flock};

const SWITCH: &str = "/sys/kernel/rcu_expedited";

/// While it lives, grace periods of this machine are expedited; then the switch is as it was.
pub(crate) struct Expedited {
    switch: File,
    before: Vec<u8>,
}

impl Expedited {
    /// None where the switch cannot be used: everything works without, only slower.
    pub(crate) fn begin() -> Option<Self> {
        Self::turn_on().ok()
    }

    fn turn_on() -> io::Result<Self> {
        let switch = File::options().read(true).write(true).open(SWITCH)?;
        // Several agents may share the machine; each must put back what it found.
        flock(&switch, FlockOperation::LockExclusive)?;
        let mut before = vec![0; 16];
        let length = switch.read_at(&mut before, 0)?;
        before.truncate(length);
        switch.write_at(b"1", 0)?;
        Ok(Self { switch, before })
    }
}

impl Drop for Expedited {
    fn drop(&mut self) {
        // Nobody can be told, and nothing depends on it.
        let _ = self.switch.write_at(&self.before, 0);
    }
}
