//! The kernel's events as flows: named, kept for a while, and handed to whoever follows.

mod filter;
mod record;

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

pub use filter::matches;
use palisade_abi::Event;
use palisade_api::{flow::Flow, proxy::Records};
use palisade_datapath::EventReader;
pub use record::Namer;
pub(crate) use record::rule_name;
use tokio::sync::broadcast;
use tracing::warn;

/// Flows that are kept.
const KEPT: usize = 4096;
/// Flows that a reader may be behind before it loses some, counted.
const BEHIND: usize = 1024;

/// Keeps flows and hands them on.
pub struct Observer {
    kept: Mutex<VecDeque<Arc<Flow>>>,
    followers: broadcast::Sender<Arc<Flow>>,
    namer: Namer,
}

impl Observer {
    /// An observer that has seen nothing yet.
    pub fn new(namer: Namer) -> Self {
        Self { kept: Mutex::default(), followers: broadcast::channel(BEHIND).0, namer }
    }

    /// Takes over events.
    pub fn record(&self, events: &[Event]) {
        self.keep(self.namer.name_all(events));
    }

    /// Takes over what the L7 proxy saw.
    ///
    /// # Errors
    ///
    /// The message holds something else; nothing of it is kept.
    pub fn record_requests(&self, records: Records) -> io::Result<()> {
        if records.lost > 0 {
            warn!(lost = records.lost, "records of the L7 proxy were lost");
        }
        self.keep(self.namer.name_requests(records.into_records())?);
        Ok(())
    }

    fn keep(&self, flows: Vec<Arc<Flow>>) {
        let mut kept = self.kept();
        for flow in flows {
            if kept.len() == KEPT {
                kept.pop_front();
            }
            kept.push_back(flow.clone());
            // Nobody follows.
            let _ = self.followers.send(flow);
        }
    }

    /// The flows that are kept, the oldest first, and those to come.
    pub fn follow(&self) -> (Vec<Arc<Flow>>, broadcast::Receiver<Arc<Flow>>) {
        let kept = self.kept();
        (kept.iter().cloned().collect(), self.followers.subscribe())
    }

    fn kept(&self) -> MutexGuard<'_, VecDeque<Arc<Flow>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the kernel's ring until it fails.
    pub async fn run(self: Arc<Self>, mut events: EventReader) {
        let mut batch = Vec::new();
        loop {
            if let Err(error) = events.next(&mut batch).await {
                warn!(%error, "the kernel's events cannot be read any more");
                return;
            }
            self.record(&batch);
            batch.clear();
        }
    }
}
