//! The loop: drain the queue, resolve, reconcile, say what is in force.
//!
//! It runs on a thread of its own and does nothing but this, so that the time from an event to the
//! kernel is the time of the work itself. It has no timers; only a round that failed is repeated
//! after a pause.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use palisade_policy::{
    CompiledPolicy,
    l7::Secrets,
    model::{Policy, PolicyRef},
};
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot, watch},
};
use tracing::{info, warn};

use crate::{
    proxy::ProxyLink,
    publish::Publication,
    reconcile::{Reconciler, Report},
    resolve::{Outcome, Resolver},
    tables::{
        Change, Intent, Tables, TablesWriter,
        nodes::Surroundings,
        policies::{Condition, Finding, PolicyObject},
        secrets,
    },
};

/// So many events at most are taken over in one round.
const BATCH: usize = 4096;
/// So many replaced tables are remembered, for events that were on their way.
const REMEMBERED: usize = 256;
/// Pause after a round that failed: at first, and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

/// What the engine is told.
#[derive(Debug)]
pub enum Command {
    /// An intent table changes.
    Intent(Box<Intent>),
    /// Try again what failed.
    Retry,
    /// Compare what the kernel holds of an endpoint with what was written.
    Check(u32, oneshot::Sender<Result<(), String>>),
}

/// What is in force.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// All inputs were complete, and the kernel holds what follows from them.
    pub synced: bool,
    /// All inputs were complete, and the kernel was told what follows from them. What it refused is
    /// closed.
    pub told: bool,
    /// Goes up with each change of policy that is in force.
    pub revision: u64,
    /// Endpoints whose rows are in force.
    pub endpoints: BTreeMap<u32, InForce>,
    /// Learned names in force: their generation by endpoint.
    pub names: BTreeMap<u32, u64>,
    /// What the kernel lacks, and why.
    pub problems: Vec<String>,
    /// Compiled policies by table number, some that were replaced included.
    pub compiled: Arc<BTreeMap<u32, Arc<CompiledPolicy>>>,
    /// Earlier, accepted versions in force of policies that are refused now.
    pub last_good: Arc<BTreeMap<PolicyRef, Arc<Policy>>>,
    /// Policies that are not in force before the L7 proxy has them.
    pub awaiting_proxy: BTreeSet<PolicyRef>,
}

/// An endpoint in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InForce {
    /// Identity.
    pub identity: u32,
    /// Host-side interface.
    pub ifindex: u32,
    /// Table for traffic into it.
    pub ingress_table: u32,
    /// Table for traffic out of it.
    pub egress_table: u32,
    /// Revision of the policy.
    pub revision: u64,
}

/// Where the engine tells what follows.
#[derive(Debug)]
pub struct Outputs {
    /// What is in force.
    pub progress: watch::Sender<Progress>,
    /// The ways to other nodes that are wanted.
    pub surroundings: watch::Sender<Surroundings>,
    /// What the API server is to learn.
    pub publications: mpsc::UnboundedSender<Publication>,
    /// What the L7 proxy judges by.
    pub proxy: Arc<ProxyLink>,
    /// Whether a round is under way.
    pub rounds: Arc<Rounds>,
}

/// Lets others wait for the end of the round that is under way: what the tables say then is in
/// force, in the proxy too.
#[derive(Debug, Default)]
pub struct Rounds(Mutex<()>);

impl Rounds {
    fn begin(&self) -> MutexGuard<'_, ()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something while no round is under way; blocks until then.
    pub fn between<T>(&self, work: impl FnOnce() -> T) -> T {
        let _no_round = self.begin();
        work()
    }
}

/// See the module.
pub struct Engine {
    tables: TablesWriter,
    resolver: Resolver,
    reconciler: Reconciler,
    outputs: Outputs,
    remembered: VecDeque<(u32, Arc<CompiledPolicy>)>,
    synced: bool,
    revision: u64,
    pause: Duration,
    /// Policies whose condition is not told before the L7 proxy has them.
    untold: BTreeSet<PolicyRef>,
}

impl Engine {
    /// An engine that has seen no event yet.
    pub fn new(
        tables: TablesWriter,
        resolver: Resolver,
        reconciler: Reconciler,
        outputs: Outputs,
    ) -> Self {
        Self {
            tables,
            resolver,
            reconciler,
            outputs,
            remembered: VecDeque::new(),
            synced: false,
            revision: 0,
            pause: PAUSE.0,
            untold: BTreeSet::new(),
        }
    }

    /// Runs until nobody can send any more. `retry` is where the engine asks itself to try again.
    pub fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        retry: mpsc::WeakSender<Command>,
        runtime: &Handle,
    ) {
        let mut batch = Vec::new();
        while commands.blocking_recv_many(&mut batch, BATCH) > 0 {
            let mut intents = Vec::new();
            let mut checks = Vec::new();
            for command in batch.drain(..) {
                match command {
                    Command::Intent(intent) => intents.push(*intent),
                    Command::Retry => {}
                    Command::Check(endpoint, answer) => checks.push((endpoint, answer)),
                }
            }
            let all_in_force = self.round(intents);
            for (endpoint, answer) in checks {
                // Who asked may have given up waiting.
                let _ = answer.send(self.check(endpoint));
            }
            if all_in_force {
                self.pause = PAUSE.0;
                continue;
            }
            let (retry, pause) = (retry.clone(), self.pause);
            self.pause = (pause * 2).min(PAUSE.1);
            runtime.spawn(async move {
                tokio::time::sleep(pause).await;
                if let Some(retry) = retry.upgrade() {
                    // The engine ended: nothing is left to try.
                    let _ = retry.send(Command::Retry).await;
                }
            });
        }
    }

    /// One round; whether all that is wanted is in force after it.
    pub fn round(&mut self, intents: Vec<Intent>) -> bool {
        if self.synced {
            return self.steady_round(intents);
        }
        let released = self.early_releases(&intents);
        let mut tables = self.tables.write();
        for intent in intents {
            tables.apply(intent);
        }
        let complete = tables.inputs_complete();
        drop(tables);
        if complete {
            // From here on what is in no table is not wanted.
            self.synced = true;
            info!("all inputs are complete");
            return self.steady_round(Vec::new());
        }
        self.outputs.progress.send_modify(|progress| {
            for id in &released {
                progress.endpoints.remove(id);
            }
        });
        true
    }

    /// Before the inputs are complete the kernel keeps what it holds; only an endpoint that goes
    /// is taken out.
    fn early_releases(&mut self, intents: &[Intent]) -> Vec<u32> {
        let mut released = Vec::new();
        for intent in intents {
            let Intent::Endpoint(Change::Delete(id)) = intent else { continue };
            match self.reconciler.release(*id) {
                Ok(()) => released.push(*id),
                Err(error) => warn!(endpoint = id, %error, "cannot release the endpoint yet"),
            }
        }
        released
    }

    fn check(&self, endpoint: u32) -> Result<(), String> {
        match self.reconciler.damaged_table(endpoint) {
            Ok(None) => Ok(()),
            Ok(Some(table)) => Err(format!(
                "the kernel's table {table} does not hold what the agent wrote for endpoint \
                 {endpoint}; restart the agent to have it written again"
            )),
            Err(error) => Err(format!("endpoint {endpoint} cannot be compared: {error}")),
        }
    }

    fn steady_round(&mut self, intents: Vec<Intent>) -> bool {
        let rounds = self.outputs.rounds.clone();
        let _round = rounds.begin();
        let mut tables = self.tables.write();
        for intent in intents {
            tables.apply(intent);
        }
        let mut outcome = self.resolver.resolve(&mut tables);
        let report = self.reconciler.round(&mut tables, &outcome.changes);
        if report.prefixes_settled {
            self.resolver.acknowledge_prefixes();
        }
        let problems = outcome.changes.errors.iter().map(ToString::to_string);
        let mut problems: Vec<String> = problems.chain(report.problems.iter().cloned()).collect();
        let changed_policy = !outcome.changes.groups.is_empty();
        let conditions = std::mem::take(&mut outcome.conditions);
        problems.extend(secrets::unreadable(&tables));
        let secrets = secrets::values(&tables.secrets);
        drop(tables);
        // Not under the tables' lock: who hears the proxy's answer may be waiting for it.
        problems.extend(self.tell_proxy(&secrets));
        self.revision += u64::from(changed_policy);
        for problem in &report.problems {
            warn!(%problem, "not everything is in force");
        }
        let awaiting_proxy = self.outputs.proxy.lacking();
        self.tell_conditions(conditions, &awaiting_proxy);
        self.tell(&outcome, &report, problems, awaiting_proxy);
        report.problems.is_empty()
    }

    /// Of a policy that the proxy does not have yet it is not said that it is accepted: that is
    /// told, if it still holds, in the round after the proxy has it.
    fn tell_conditions(
        &mut self,
        mut conditions: Vec<(Arc<PolicyObject>, Condition)>,
        awaiting_proxy: &BTreeSet<PolicyRef>,
    ) {
        for (policy, _) in &conditions {
            self.untold.remove(&policy.id);
        }
        let due: Vec<PolicyRef> = self.untold.difference(awaiting_proxy).cloned().collect();
        let tables = self.tables.read();
        for id in due {
            self.untold.remove(&id);
            conditions.extend(Resolver::condition(&tables, &id));
        }
        drop(tables);
        for (policy, condition) in conditions {
            if condition.finding == Finding::Accepted && awaiting_proxy.contains(&policy.id) {
                self.untold.insert(policy.id.clone());
                continue;
            }
            self.publish(Publication::Condition(policy, condition));
        }
    }

    /// The kernel first: what it hands to a proxy that does not know yet what to do with it is
    /// denied. What the proxy lacks is not a reason to try again; it says when it has it.
    fn tell_proxy(&mut self, secrets: &Secrets) -> Option<String> {
        let live = self.reconciler.live_tables().map(|(n, policy)| (n, policy.clone())).collect();
        self.outputs.proxy.update(self.reconciler.mirror_mut(), live, secrets)
    }

    fn tell(
        &mut self,
        outcome: &Outcome,
        report: &Report,
        problems: Vec<String>,
        awaiting_proxy: BTreeSet<PolicyRef>,
    ) {
        self.remember();
        let tables = self.tables.read();
        let endpoints = self.endpoints(&tables);
        let learned = tables.names.rows();
        let learned = learned.filter(|row| self.reconciler.is_in_force(&tables, row.endpoint));
        let names = learned.map(|row| (row.endpoint, row.generation)).collect();
        let before = self.outputs.progress.borrow().endpoints.clone();
        for endpoint in tables.endpoints.rows() {
            let now = endpoints.get(&endpoint.id);
            if now.is_some()
                && now != before.get(&endpoint.id)
                && let Some(state) = Publication::endpoint(&tables, endpoint)
            {
                self.publish(state);
            }
        }
        for labels in &outcome.unnumbered {
            self.publish(Publication::Identity(labels.clone()));
        }
        let routes = tables.routes.rows().map(|route| (**route).clone()).collect();
        let now = Surroundings { own: self.resolver.own_node(&tables), routes };
        self.outputs.surroundings.send_if_modified(|known| {
            let changed = *known != now;
            *known = now;
            changed
        });
        let last_good = tables.policies.rows().filter_map(|object| {
            Some((object.id.clone(), self.resolver.last_good(object)?.clone()))
        });
        let last_good = Arc::new(last_good.collect());
        drop(tables);
        let compiled = Arc::new(self.remembered.iter().cloned().collect());
        let synced = report.problems.is_empty();
        let revision = self.revision;
        self.outputs.progress.send_modify(|progress| {
            progress.synced |= synced;
            *progress = Progress {
                synced: progress.synced,
                told: true,
                revision,
                endpoints,
                names,
                problems,
                compiled,
                last_good,
                awaiting_proxy,
            };
        });
    }

    fn remember(&mut self) {
        let live: BTreeMap<u32, Arc<CompiledPolicy>> =
            self.reconciler.live_tables().map(|(n, policy)| (n, policy.clone())).collect();
        self.remembered.retain(|(number, _)| !live.contains_key(number));
        let excess = self.remembered.len().saturating_sub(REMEMBERED);
        self.remembered.drain(..excess);
        self.remembered.extend(live);
    }

    fn endpoints(&self, tables: &Tables) -> BTreeMap<u32, InForce> {
        let before = self.outputs.progress.borrow();
        let rows = tables.endpoints.rows().filter_map(|endpoint| {
            let row = self.reconciler.mirror().rows.get(&endpoint.id)?;
            let mut now = InForce {
                identity: row.identity,
                ifindex: row.ifindex,
                ingress_table: row.ingress_table,
                egress_table: row.egress_table,
                revision: self.revision,
            };
            if let Some(before) = before.endpoints.get(&endpoint.id)
                && (InForce { revision: before.revision, ..now }) == *before
            {
                now.revision = before.revision;
            }
            let wanted = endpoint.addresses().all(|address| {
                let entry = tables.addresses.get(&address);
                let known = self.reconciler.mirror().addresses.get(&address);
                entry.zip(known).is_some_and(|(entry, known)| {
                    known.row == endpoint.id && known.identity == entry.identity
                })
            });
            let was = before.endpoints.get(&endpoint.id);
            let is_new = was.is_none_or(|was| was.identity != now.identity);
            let known = !is_new || self.outputs.proxy.knows(endpoint.id);
            (wanted && known && row.ifindex == endpoint.ifindex).then_some((endpoint.id, now))
        });
        rows.collect()
    }

    fn publish(&self, publication: Publication) {
        // The publisher ends only when the agent does.
        let _ = self.outputs.publications.send(publication);
    }

    /// What the kernel holds, for tests.
    pub fn reconciler(&self) -> &Reconciler {
        &self.reconciler
    }
}
