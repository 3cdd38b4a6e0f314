//! Programs stay attached, whoever detaches them; a pod whose programs cannot be attached is cut
//! off rather than let through.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use palisade_api::client::chain;
use palisade_datapath::{Datapath, Side};
use tracing::{error, info, warn};

use super::{Attach, Guarded, Lifecycle, LinkState};
use crate::cni::alias_of;

/// How often the programs are looked at. The kernel has no event for a program that goes.
const LOOK: Duration = Duration::from_secs(5);
/// The same while something is wrong.
const RETRY: Duration = Duration::from_secs(1);

/// What is wrong on this node, by interface or what else it is about.
#[derive(Debug, Default)]
pub struct Health {
    problems: Mutex<BTreeMap<String, String>>,
    reattached: AtomicU64,
}

impl Health {
    /// What is wrong now.
    pub fn problems(&self) -> Vec<String> {
        self.lock().values().cloned().collect()
    }

    /// Whether something is wrong with an interface's programs.
    pub fn has_problem(&self, interface: &str) -> bool {
        self.lock().contains_key(interface)
    }

    /// How often programs were missing at run time and were attached again.
    pub fn reattached(&self) -> u64 {
        self.reattached.load(Ordering::Relaxed)
    }

    fn count_reattached(&self, interface: &str) {
        self.reattached.fetch_add(1, Ordering::Relaxed);
        warn!(interface, "somebody detached the programs; they are attached again");
    }

    /// Something is wrong.
    pub fn set(&self, about: &str, problem: String) {
        let known = self.lock().insert(about.to_owned(), problem.clone());
        if known.as_ref() != Some(&problem) {
            error!(about, "{problem}");
        }
    }

    /// Nothing is wrong, or no longer.
    pub fn clear(&self, about: &str) {
        if self.forget(about) {
            info!(about, "what was wrong is mended");
        }
    }

    /// The interface is gone.
    pub(super) fn forget(&self, interface: &str) -> bool {
        self.lock().remove(interface).is_some()
    }

    fn pause(&self) -> Duration {
        if self.lock().is_empty() { LOOK } else { RETRY }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<A: Attach> Lifecycle<A> {
    /// Looks after the programs for ever.
    pub async fn guard(self: Arc<Self>) {
        loop {
            tokio::time::sleep(self.health.pause()).await;
            self.look_at_programs().await;
        }
    }

    /// Attaches what is missing; cuts off what cannot be attached.
    pub async fn look_at_programs(&self) {
        for guarded in self.guarded() {
            let interface = &guarded.endpoint.interface;
            let attached = self.attach.is_attached(interface);
            if attached && !self.health.has_problem(interface) {
                continue;
            }
            if self.secure(&guarded).await == LinkState::Left && !attached {
                self.health.count_reattached(interface);
            }
        }
    }

    /// Attaches all programs, in place of those of before.
    pub async fn attach_all(&self) {
        for guarded in self.guarded() {
            self.secure(&guarded).await;
        }
    }

    /// Attaches the programs, or else takes the interface down. Returns how the interface is then.
    pub(super) async fn secure(&self, guarded: &Guarded) -> LinkState {
        let Guarded { attachment, endpoint } = guarded;
        let interface = &endpoint.interface;
        let attached = self.attach.attach(interface);
        let link = self.attach.link(endpoint).await;
        if link == Ok(LinkState::Gone) {
            self.health.forget(interface);
            return LinkState::Gone;
        }
        let result = match (&attached, &link) {
            (Ok(()), Ok(LinkState::Closed)) => {
                self.attach.reopen(endpoint, alias_of(attachment)).await
            }
            (Ok(()), Err(error)) => Err(error.clone()),
            (Ok(()), Ok(_)) => Ok(()),
            (Err(_), _) => self.attach.close(endpoint).await,
        };
        let pod = &endpoint.pod;
        let problem = match (attached, result) {
            (Ok(()), Ok(())) => {
                self.health.clear(interface);
                return LinkState::Left;
            }
            (Ok(()), Err(error)) => {
                format!("{interface} of pod {pod} cannot be brought up: {error}")
            }
            (Err(error), Ok(())) => format!(
                "pod {pod} is cut off: its programs cannot be attached to {interface}: {error}"
            ),
            (Err(error), Err(down)) => format!(
                "nothing judges the packets of pod {pod}: programs cannot be attached to \
                 {interface} ({error}), and it cannot be taken down ({down})"
            ),
        };
        self.health.set(interface, problem);
        LinkState::Closed
    }
}

/// Looks after the programs on the uplink for ever. The uplink stays up whatever happens: without
/// its program the pods' own programs still judge every packet, but somebody outside can pretend
/// to be a pod of this node.
pub async fn guard_uplink(
    datapath: Arc<Datapath>,
    uplink: String,
    side: Side,
    health: Arc<Health>,
) {
    loop {
        tokio::time::sleep(health.pause()).await;
        if datapath.is_side_attached(&uplink, side) {
            health.clear(&uplink);
            continue;
        }
        match datapath.attach(&uplink, side) {
            Ok(()) => {
                health.clear(&uplink);
                health.count_reattached(&uplink);
            }
            Err(error) => health.set(
                &uplink,
                format!("forged packets are not kept out at {uplink}: {}", chain(&error)),
            ),
        }
    }
}
