//! What the operator counts.

use std::{
    fmt::Write,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};

/// Numbers since the start, and of the last round.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    leading: AtomicBool,
    ready: AtomicBool,
    pub(crate) nodes: AtomicU64,
    pub(crate) nodes_without_network: AtomicU64,
    pub(crate) nodes_not_ready: AtomicU64,
    pub(crate) networks_allocated: AtomicU64,
    pub(crate) identities: AtomicU64,
    pub(crate) identities_unused: AtomicU64,
    pub(crate) identities_collected: AtomicU64,
    pub(crate) errors: AtomicU64,
}

impl Metrics {
    /// This process holds the Lease.
    pub(crate) fn leading(&self) {
        self.leading.store(true, Relaxed);
    }

    /// The leader did what others wait for.
    pub(crate) fn ready(&self) {
        self.ready.store(true, Relaxed);
    }

    /// One that waits for the Lease does what it should; a leader must have done its first work.
    pub(crate) fn is_ready(&self) -> bool {
        !self.leading.load(Relaxed) || self.ready.load(Relaxed)
    }

    /// Something failed and is tried again.
    pub(crate) fn failed(&self) {
        self.errors.fetch_add(1, Relaxed);
    }

    /// In the format of Prometheus.
    pub(crate) fn text(&self) -> String {
        let gauges = [
            ("leader", u64::from(self.leading.load(Relaxed))),
            ("nodes", self.nodes.load(Relaxed)),
            ("nodes_without_pod_network", self.nodes_without_network.load(Relaxed)),
            ("nodes_not_ready", self.nodes_not_ready.load(Relaxed)),
            ("identities", self.identities.load(Relaxed)),
            ("identities_unused", self.identities_unused.load(Relaxed)),
        ];
        let counters = [
            ("pod_networks_allocated_total", self.networks_allocated.load(Relaxed)),
            ("identities_collected_total", self.identities_collected.load(Relaxed)),
            ("errors_total", self.errors.load(Relaxed)),
        ];
        let gauges = gauges.map(|(name, value)| (name, "gauge", value));
        let counters = counters.map(|(name, value)| (name, "counter", value));
        gauges.into_iter().chain(counters).fold(String::new(), |mut text, (name, kind, value)| {
            // Writing to a string never fails.
            let _ = writeln!(text, "# TYPE palisade_operator_{name} {kind}");
            let _ = writeln!(text, "palisade_operator_{name} {value}");
            text
        })
    }
}
