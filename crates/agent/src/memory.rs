//! What the process keeps of the memory that it used.

use std::time::Duration;

const EVERY: Duration = Duration::from_secs(60);

/// Gives back to the kernel what is free by now, at once and from time to time. The allocator would
/// keep what starting and large changes take: whole lists of objects, programs on their way to the
/// verifier.
pub(crate) async fn give_back() {
    let mut times = tokio::time::interval(EVERY);
    loop {
        times.tick().await;
        trim();
    }
}

/// The C library of static and of usual builds is glibc; others keep less.
#[cfg(target_env = "gnu")]
fn trim() {
    #[expect(unsafe_code, reason = "the allocator has no other interface")]
    // SAFETY: nothing that is in use moves, and the allocator takes its own locks (malloc_trim(3)).
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(not(target_env = "gnu"))]
fn trim() {}
