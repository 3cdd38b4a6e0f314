use std::io;

use aya::maps::{MapData, RingBuf};
use palisade_abi::Event;
use tokio::io::unix::AsyncFd;
use zerocopy::FromBytes;

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
        loop {
            let mut guard = self.ring.readable_mut().await?;
            let ring = guard.get_inner_mut();
            while let Some(record) = ring.next() {
                if let Ok(event) = Event::read_from_bytes(&record) {
                    batch.push(event);
                }
            }
            guard.clear_ready();
            if !batch.is_empty() {
                return Ok(());
            }
        }
    }
}
