use std::{io, time::Duration};

use aya::maps::{MapData, RingBuf};
use palisade_abi::Event;
use tokio::io::unix::AsyncFd;
use zerocopy::FromBytes;

/// A CPU that woke the reader does not do so again for a 64th of a second, rounded up to at most
/// two jiffies of 10 ms; what it writes meanwhile must be found without.
const QUIET: Duration = Duration::from_millis(25);

/// Reads the `EVENTS` ring. There is one reader at a time: a second one would take events away.
pub struct EventReader {
    ring: AsyncFd<RingBuf<MapData>>,
}

impl EventReader {
    pub(crate) fn new(ring: RingBuf<MapData>) -> io::Result<Self> {
        // SAFETY: the ring owns its map's descriptor for as long as it lives, and always returns
        // the same one.
        #[expect(unsafe_code, reason = "tokio cannot see that the descriptor stays the ring's")]
        let ring = unsafe { AsyncFd::register(ring)? };
        Ok(Self { ring })
    }

    /// Waits for events and hands them over in the order in which they were written.
    ///
    /// # Errors
    /// The ring cannot be polled.
    pub async fn next(&mut self, batch: &mut Vec<Event>) -> io::Result<()> {
        while batch.is_empty() {
            // A wake-up from here on counts for the next turn.
            self.ring.readable_mut().await?.clear_ready();
            tokio::time::sleep(QUIET).await;
            let ring = self.ring.get_mut();
            while let Some(record) = ring.next() {
                if let Ok(event) = Event::read_from_bytes(&record) {
                    batch.push(event);
                }
            }
        }
        Ok(())
    }
}
