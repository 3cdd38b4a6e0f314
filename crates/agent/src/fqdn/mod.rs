//! What pods learned from DNS: which addresses a name had when a pod asked for it, for as long as
//! that holds.
//!
//! The proxy asks before it releases an answer ([`Names::learn`]); the agent agrees once the
//! kernel judges the pod's packets to the addresses by the rules for the name. An address goes
//! [`cache::GRACE`] after its TTL, or later: not while the pod has a live flow with it, and only
//! when they are looked at, every few seconds.
//!
//! What was learned is on disk before an answer is released, and is the first thing that the
//! policy engine hears of after a restart: nothing is taken back because of it. What is forgotten
//! does not wait for the disk, and neither does an agent that starts.

pub mod cache;
mod journal;

use std::{collections::BTreeSet, io, net::IpAddr, path::Path, sync::Arc, time::Duration};

use palisade_datapath::Datapath;
use palisade_policy::l7::may_learn;
use tokio::sync::{Mutex, mpsc, watch};
use tracing::{info, warn};

use crate::{
    endpoints::Health,
    engine::{Command, Progress},
    tables::{Change, Intent, Tables, TablesReader, fqdns::LearnedNames},
};
use cache::{Cache, Owner};
use journal::Journal;

/// Name of the file in the state directory.
const FILE: &str = "learned-names";
/// What health speaks of where it cannot be written.
const ABOUT: &str = "learned names";
/// How often what expired is looked for. Flows end without an event, too.
const LOOK: Duration = Duration::from_secs(5);
/// The kernel has this long to be told; the proxy does not wait longer.
const IN_FORCE: Duration = Duration::from_secs(2);

/// Why a client must not get an answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotLearned {
    /// Nobody of this node has the address.
    #[error("{0} is no pod of this node")]
    NoPod(IpAddr),
    /// The kernel does not hold it yet.
    #[error("the addresses are not in force: {0}")]
    NotInForce(String),
    /// Nobody knows which flows are live.
    #[error("the flows cannot be read: {0}")]
    Flows(String),
    /// It could not be kept for a restart.
    #[error("the learned names cannot be written: {0}")]
    Disk(String),
    /// Too much was learned.
    #[error("there is no room for more learned addresses")]
    NoRoom,
    /// The agent is stopping.
    #[error("the agent is stopping")]
    Stopping,
}

/// Who has live flows with whom.
pub trait Flows: Send + Sync {
    /// Pairs of addresses with a live flow between them, the lower address first.
    ///
    /// # Errors
    /// That cannot be found out.
    fn live_pairs(&self) -> Result<BTreeSet<(IpAddr, IpAddr)>, String>;
}

impl Flows for Datapath {
    fn live_pairs(&self) -> Result<BTreeSet<(IpAddr, IpAddr)>, String> {
        tokio::task::block_in_place(|| Self::live_pairs(self)).map_err(|error| error.to_string())
    }
}

/// See the module.
pub struct Names {
    known: Mutex<Known>,
    tables: TablesReader,
    commands: mpsc::Sender<Command>,
    progress: watch::Receiver<Progress>,
    health: Arc<Health>,
}

struct Known {
    cache: Cache,
    journal: Journal,
    /// The file says more than is known, and has to be written anew.
    outdated: bool,
}

impl Names {
    /// Takes up what was learned before a restart, and completes the table of names with it: the
    /// engine changes nothing before. The file may still have what was closed while the disk was
    /// full: whose time is over counts only where a flow leads there. Which pod's, a look tells once
    /// the pods are known.
    ///
    /// # Errors
    /// Nobody knows when the machine started, or the engine ended.
    pub async fn restore(
        state_dir: &Path,
        tables: TablesReader,
        commands: mpsc::Sender<Command>,
        progress: watch::Receiver<Progress>,
        health: Arc<Health>,
        flows: &dyn Flows,
    ) -> io::Result<Self> {
        let (journal, mut cache) = Journal::open(state_dir.join(FILE))?;
        expire_unused(&mut cache, now(), flows);
        info!(addresses = cache.len(), "restored learned names");
        let rows = cache.endpoints().filter_map(|endpoint| cache.row(endpoint)).collect();
        let known = Mutex::new(Known { cache, journal, outdated: true });
        let names = Self { known, tables, commands, progress, health };
        // Without room it is written by a later look.
        _ = names.write(&mut *names.known.lock().await);
        names.send(Change::Replace(rows)).await.map_err(io::Error::other)?;
        Ok(names)
    }

    /// Returns once the client may reach what it is about to be told of a name, by the rules for
    /// the name. Addresses that no name may open are left out.
    ///
    /// # Errors
    /// The client must not be told.
    pub async fn learn(
        &self,
        client: IpAddr,
        name: &str,
        addresses: &[IpAddr],
        ttl: u32,
    ) -> Result<(), NotLearned> {
        let (owner, addresses) = {
            let tables = self.tables.read();
            let owner = owner_of(&tables, client).ok_or(NotLearned::NoPod(client))?;
            let outside = addresses.iter().copied().filter(|address| is_outside(&tables, *address));
            (owner, outside.collect::<Vec<IpAddr>>())
        };
        if addresses.is_empty() {
            return Ok(());
        }
        let expiry = cache::expiry(now(), ttl);
        let endpoint = owner.endpoint;
        let generation = {
            let mut known = self.known.lock().await;
            let Known { cache, journal, outdated } = &mut *known;
            // First the file: what it does not have is still to be learned when it is told again.
            self.written(journal.append(&owner, name, &addresses, expiry))?;
            let changed = cache.learn(&owner, name, addresses.iter().copied(), expiry);
            *outdated |= journal.is_long(cache);
            let Some(row) = cache.row(endpoint) else { return Ok(()) };
            let generation = row.generation;
            if changed {
                // Under the lock, so that a row never overtakes a newer one.
                self.send(Change::Put(row)).await?;
            }
            if !cache.holds(endpoint, name, &addresses) {
                return Err(NotLearned::NoRoom);
            }
            generation
        };
        self.wait(endpoint, generation).await
    }

    async fn wait(&self, endpoint: u32, generation: u64) -> Result<(), NotLearned> {
        let mut progress = self.progress.clone();
        let in_force = |progress: &Progress| {
            progress.names.get(&endpoint).is_some_and(|now| *now >= generation)
        };
        match tokio::time::timeout(IN_FORCE, progress.wait_for(in_force)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(NotLearned::Stopping),
            Err(_) => Err(NotLearned::NotInForce(self.progress.borrow().problems.join("; "))),
        }
    }

    async fn send(&self, change: Change<LearnedNames>) -> Result<(), NotLearned> {
        let command = Command::Intent(Box::new(Intent::Names(change)));
        self.commands.send(command).await.map_err(|_| NotLearned::Stopping)
    }

    /// Has what expired forgotten, for ever.
    pub async fn keep(self: Arc<Self>, flows: Arc<dyn Flows>) {
        let mut look = tokio::time::interval(LOOK);
        loop {
            look.tick().await;
            match self.expire(now(), &*flows).await {
                Ok(()) => {}
                Err(NotLearned::Stopping) => return,
                Err(error) => warn!(%error, "learned names are looked at again soon"),
            }
        }
    }

    /// Forgets what expired and is not in use, and the pods that are gone; writes the file anew
    /// where it says more than that.
    ///
    /// # Errors
    /// The flows cannot be read, and nothing changed; or the engine ended; or what was forgotten
    /// cannot be written, and is by the next look that can.
    pub async fn expire(&self, now: u64, flows: &dyn Flows) -> Result<(), NotLearned> {
        // Before the pods are known nobody can tell whose flows are live.
        if !self.tables.read().endpoints.is_complete() {
            return Ok(());
        }
        let mut known = self.known.lock().await;
        let Known { cache, outdated, .. } = &mut *known;
        let in_use = self.in_use(cache.expired(now), flows)?;
        let gone = self.gone(cache);
        for endpoint in &gone {
            cache.forget(*endpoint);
        }
        let changed = cache.expire(now, &in_use);
        *outdated |= !gone.is_empty() || !changed.is_empty();
        // First the kernel: a full disk keeps nothing open. Whoever starts by the file of before
        // closes it again, by its times.
        for endpoint in gone {
            self.send(Change::Delete(endpoint)).await?;
        }
        for row in changed.into_iter().filter_map(|endpoint| cache.row(endpoint)) {
            self.send(Change::Put(row)).await?;
        }
        match known.outdated {
            true => self.write(&mut known),
            false => Ok(()),
        }
    }

    /// Makes the file say what is known.
    fn write(&self, known: &mut Known) -> Result<(), NotLearned> {
        let written = known.journal.rewrite(&known.cache);
        known.outdated = written.is_err();
        self.written(written)
    }

    /// Tells whether the disk takes what is learned.
    fn written(&self, written: io::Result<()>) -> Result<(), NotLearned> {
        let Err(error) = written else {
            self.health.clear(ABOUT);
            return Ok(());
        };
        let why = error.kind();
        let held = "answers of DNS that open new addresses are held back";
        self.health.set(ABOUT, format!("{ABOUT} cannot be written ({why}): {held}"));
        Err(NotLearned::Disk(error.to_string()))
    }

    /// The endpoints whose pods are no more.
    fn gone(&self, cache: &Cache) -> Vec<u32> {
        let tables = self.tables.read();
        let is_gone = |endpoint: &u32| {
            let now = tables.endpoints.get(endpoint).map(|endpoint| &endpoint.container_id);
            now != cache.container(*endpoint)
        };
        cache.endpoints().filter(is_gone).collect()
    }

    /// Those of the expired addresses that their pods have live flows with.
    fn in_use(
        &self,
        expired: BTreeSet<(u32, IpAddr)>,
        flows: &dyn Flows,
    ) -> Result<BTreeSet<(u32, IpAddr)>, NotLearned> {
        if expired.is_empty() {
            return Ok(expired);
        }
        let pairs = flows.live_pairs().map_err(NotLearned::Flows)?;
        let tables = self.tables.read();
        let is_in_use = |(endpoint, address): &(u32, IpAddr)| {
            let endpoint = tables.endpoints.get(endpoint);
            let mut own = endpoint.into_iter().flat_map(|endpoint| endpoint.addresses());
            own.any(|own| pairs.contains(&(own.min(*address), own.max(*address))))
        };
        Ok(expired.into_iter().filter(is_in_use).collect())
    }
}

/// Forgets what expired and nobody at all has a live flow with.
fn expire_unused(cache: &mut Cache, now: u64, flows: &dyn Flows) {
    let mut expired = cache.expired(now);
    if expired.is_empty() {
        return;
    }
    let pairs = match flows.live_pairs() {
        Ok(pairs) => pairs,
        Err(error) => {
            return warn!(error, "expired names stay for now: the flows cannot be read");
        }
    };
    let used: BTreeSet<IpAddr> = pairs.into_iter().flat_map(<[IpAddr; 2]>::from).collect();
    expired.retain(|(_, address)| used.contains(address));
    cache.expire(now, &expired);
}

fn owner_of(tables: &Tables, client: IpAddr) -> Option<Owner> {
    let is_client = |own: IpAddr| own == client;
    let endpoint = tables.endpoints.rows().find(|row| row.addresses().any(is_client))?;
    Some(Owner { endpoint: endpoint.id, container: endpoint.container_id.clone() })
}

/// Whether a name may open an address: what belongs to the cluster has an identity of its own.
fn is_outside(tables: &Tables, address: IpAddr) -> bool {
    let in_pods = || {
        let mut networks = tables.all_nodes().flat_map(|node| &node.pod_cidrs);
        networks.any(|network| network.prefix_len() > 0 && network.contains(&address))
    };
    // What a load balancer lends is outside: where it leads into the cluster, it is the pods there
    // that are judged, and a name opens only what does not.
    let is_service = || tables.services.rows().any(|row| row.addresses.own.contains(&address));
    may_learn(address)
        && tables.addresses.get(&address).is_none()
        && !tables.api_servers.outside.contains(&address)
        && !in_pods()
        && !is_service()
}

/// Seconds since the machine started, sleep included.
fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or_default()
}

#[cfg(test)]
mod tests;
