//! The life of an endpoint: attached when the CNI plugin asks for it, in force before the plugin
//! is answered, found again after a restart.

mod attach;
mod guard;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use palisade_abi::{identity, limits};
use palisade_api::cni::Attachment;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::block_in_place,
};
use tracing::{info, warn};

pub use attach::{Attach, LinkState, NodeLinks};
pub use guard::{Health, guard_uplink};

use crate::{
    cni::{EndpointError, Endpoints, NewEndpoint, Readiness},
    engine::{Command, Progress},
    publish::Publication,
    tables::{Change, Intent, ObjectName, TablesReader, pods::Endpoint},
};

/// First row of an endpoint: the lower ones are nobody's and the node's.
const FIRST_ROW: u32 = 2;
/// So long a pod's labels are waited for; after that it is connected and closed until they come.
const LABELS: Duration = Duration::from_secs(5);
/// So long the kernel's tables are waited for.
const IN_FORCE: Duration = Duration::from_secs(10);

/// When endpoints of before a restart get the new programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Succession {
    /// At once: the tables are those of before.
    AtOnce,
    /// With [`Lifecycle::attach_all`], once the new tables are filled. Until then the programs of
    /// before judge, where there are any.
    Later,
}

/// An endpoint whose programs must be attached.
#[derive(Clone, Debug)]
struct Guarded {
    attachment: Attachment,
    endpoint: Endpoint,
}

/// The endpoints of this node.
#[derive(Default)]
struct Book {
    rows: BTreeMap<u32, Guarded>,
    /// Those that come or go: their interface is down or gone, and not to be looked after.
    moving: BTreeSet<u32>,
}

impl Book {
    fn of(&self, attachment: &Attachment) -> Option<&Endpoint> {
        self.rows.values().find(|row| row.attachment == *attachment).map(|row| &row.endpoint)
    }

    fn free_row(&self) -> Option<u32> {
        (FIRST_ROW..limits::ENDPOINT_ROWS).find(|row| !self.rows.contains_key(row))
    }
}

/// Whom the life cycle tells what happens.
pub struct Outputs {
    /// The engine.
    pub commands: mpsc::Sender<Command>,
    /// What the API server is to learn.
    pub publications: mpsc::UnboundedSender<Publication>,
    /// What is wrong on this node.
    pub health: Arc<Health>,
}

/// See the module.
pub struct Lifecycle<A> {
    book: Mutex<Book>,
    attach: A,
    tables: TablesReader,
    commands: mpsc::Sender<Command>,
    progress: watch::Receiver<Progress>,
    publications: mpsc::UnboundedSender<Publication>,
    health: Arc<Health>,
}

impl<A: Attach> Lifecycle<A> {
    /// Takes up the endpoints that were recorded before a restart: attaches the programs where it
    /// is time for it, cuts off those where that fails, and completes the table of endpoints with all of them.
    ///
    /// # Errors
    /// The engine ended.
    pub async fn restore(
        attach: A,
        tables: TablesReader,
        progress: watch::Receiver<Progress>,
        outputs: Outputs,
        recorded: Vec<(NewEndpoint, u32)>,
        succession: Succession,
    ) -> Result<Self, EndpointError> {
        let Outputs { commands, publications, health } = outputs;
        let book = Mutex::default();
        let lifecycle = Self { book, attach, tables, commands, progress, publications, health };
        for (new, id) in recorded {
            let endpoint = endpoint(&new, id);
            let guarded = Guarded { attachment: new.attachment, endpoint };
            let judged = succession == Succession::Later
                && lifecycle.attach.is_judged(&guarded.endpoint.interface);
            if !judged && lifecycle.secure(&guarded).await == LinkState::Gone {
                warn!(interface = new.host.name, "the endpoint has no interface any more");
                continue;
            }
            lifecycle.book().rows.insert(id, guarded);
        }
        let rows: Vec<Endpoint> =
            lifecycle.book().rows.values().map(|row| row.endpoint.clone()).collect();
        info!(endpoints = rows.len(), "restored");
        lifecycle.change(Change::Replace(rows)).await?;
        Ok(lifecycle)
    }

    /// Removes what is left of programs on interfaces that went while no agent was there.
    pub async fn sweep(&self) {
        if let Err(error) = self.attach.sweep().await {
            warn!(error, "pins of interfaces that are gone stay");
        }
    }

    fn guarded(&self) -> Vec<Guarded> {
        let book = self.book();
        let rows = book.rows.iter().filter(|(id, _)| !book.moving.contains(id));
        rows.map(|(_, row)| row.clone()).collect()
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn change(&self, change: Change<Endpoint>) -> Result<(), EndpointError> {
        self.send(Command::Intent(Box::new(Intent::Endpoint(change)))).await
    }

    async fn send(&self, command: Command) -> Result<(), EndpointError> {
        self.commands.send(command).await.map_err(|_| stopping())
    }

    async fn wait(&self, limit: Duration, ready: impl FnMut(&Progress) -> bool) -> bool {
        let mut progress = self.progress.clone();
        let waited = tokio::time::timeout(limit, progress.wait_for(ready)).await;
        matches!(waited, Ok(Ok(_)))
    }

    fn enter(&self, new: &NewEndpoint) -> Result<Endpoint, EndpointError> {
        let mut book = self.book();
        let known = book.of(&new.attachment).map(|endpoint| endpoint.id);
        let Some(id) = known.or_else(|| book.free_row()) else {
            return Err(EndpointError::TryAgain(format!(
                "this node has its {} endpoints; none is free",
                limits::ENDPOINT_ROWS - FIRST_ROW
            )));
        };
        let endpoint = endpoint(new, id);
        let attachment = new.attachment.clone();
        book.rows.insert(id, Guarded { attachment, endpoint: endpoint.clone() });
        book.moving.insert(id);
        Ok(endpoint)
    }

    fn other_pod_said(&self, endpoint: &Endpoint) -> Option<EndpointError> {
        let tables = self.tables.read();
        let pod = tables.pods.get(&endpoint.pod)?;
        pod.host_network.then(|| {
            EndpointError::Failed(format!(
                "pod {} shares its node's network and gets no interface of its own",
                endpoint.pod
            ))
        })
    }
}

fn endpoint(new: &NewEndpoint, id: u32) -> Endpoint {
    Endpoint {
        id,
        pod: ObjectName::new(new.pod.namespace.clone(), new.pod.name.clone()),
        uid: new.pod.uid.clone().unwrap_or_default(),
        container_id: new.attachment.container_id.to_string(),
        interface: new.host.name.clone(),
        ifindex: new.host.ifindex,
        mac: new.mac,
        host_mac: new.host.mac,
        ipv4: new.addresses.ipv4,
        ipv6: new.addresses.ipv6,
    }
}

fn stopping() -> EndpointError {
    EndpointError::TryAgain("the agent is stopping".into())
}

impl<A: Attach> Endpoints for Lifecycle<A> {
    async fn add(&self, new: NewEndpoint) -> Result<u32, EndpointError> {
        if !self.progress.borrow().synced {
            return Err(EndpointError::TryAgain(
                "the agent has not read everything from the API server yet".into(),
            ));
        }
        let endpoint = self.enter(&new)?;
        let (id, ifindex) = (endpoint.id, endpoint.ifindex);
        // The engine holds the tables for as long as a round takes.
        if let Some(error) = block_in_place(|| self.other_pod_said(&endpoint)) {
            return Err(error);
        }
        self.attach.attach(&endpoint.interface).map_err(EndpointError::Failed)?;
        self.book().moving.remove(&id);
        self.change(Change::Put(endpoint)).await?;
        let in_force = |progress: &Progress| {
            progress.endpoints.get(&id).filter(|now| now.ifindex == ifindex).copied()
        };
        let named = |progress: &Progress| {
            in_force(progress).is_some_and(|now| now.identity != identity::INIT)
        };
        if self.wait(LABELS, named).await {
            return Ok(id);
        }
        if self.wait(IN_FORCE, |progress| in_force(progress).is_some()).await {
            warn!(endpoint = id, pod = %new.pod.name, "no labels yet: closed until they come");
            return Ok(id);
        }
        let problems = self.progress.borrow().problems.join("; ");
        Err(EndpointError::TryAgain(format!("the endpoint's policy is not in force: {problems}")))
    }

    async fn remove(&self, attachment: &Attachment) -> Result<(), EndpointError> {
        let Some(endpoint) = self.book().of(attachment).cloned() else { return Ok(()) };
        let id = endpoint.id;
        self.book().moving.insert(id);
        self.change(Change::Delete(id)).await?;
        if !self.wait(IN_FORCE, |progress| !progress.endpoints.contains_key(&id)).await {
            let problems = self.progress.borrow().problems.join("; ");
            return Err(EndpointError::TryAgain(format!(
                "the endpoint cannot be taken out of the kernel's tables: {problems}"
            )));
        }
        if let Err(error) = self.attach.detach(&endpoint.interface) {
            warn!(interface = endpoint.interface, error, "the pins stay");
        }
        self.health.forget(&endpoint.interface);
        let mut book = self.book();
        book.rows.remove(&id);
        book.moving.remove(&id);
        drop(book);
        let gone = Publication::EndpointGone(endpoint.pod, endpoint.container_id);
        // The publisher ends only when the agent does.
        let _ = self.publications.send(gone);
        Ok(())
    }

    async fn check(&self, attachment: &Attachment) -> Result<(), EndpointError> {
        let Some(endpoint) = self.book().of(attachment).cloned() else {
            return Err(EndpointError::Differs(format!("{attachment} is not known to the agent")));
        };
        if !self.attach.is_attached(&endpoint.interface) {
            return Err(EndpointError::Differs(format!(
                "the programs are not attached to {}",
                endpoint.interface
            )));
        }
        let (answer, answered) = oneshot::channel();
        self.send(Command::Check(endpoint.id, answer)).await?;
        answered.await.map_err(|_| stopping())?.map_err(EndpointError::Differs)
    }

    async fn readiness(&self) -> Readiness {
        let problems = self.health.problems();
        if !problems.is_empty() {
            return Readiness::Impaired(problems.join("; "));
        }
        if self.progress.borrow().synced {
            return Readiness::Ready;
        }
        let inputs = self.tables.read().inputs();
        let missing = inputs.iter().filter(|input| !input.complete);
        let error = missing.clone().find_map(|input| input.error.as_deref());
        let kinds: Vec<&str> = missing.map(|input| input.kind).collect();
        let error = error.map(|error| format!(" ({error})")).unwrap_or_default();
        let kinds = kinds.join(", ");
        Readiness::NotReady(format!("the API server has not told everything yet: {kinds}{error}"))
    }
}
