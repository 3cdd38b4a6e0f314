//! Which start of the machine this is: what the kernel holds does not outlive it, and what is recorded
//! of that counts no longer either.

use std::{fs, io};

/// Another one after each start of the machine (random(4)).
///
/// # Errors
/// The kernel does not say it.
pub fn id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}
