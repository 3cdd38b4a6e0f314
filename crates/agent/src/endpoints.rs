//! The life of an endpoint: attached when the CNI plugin asks for it, in force before the plugin
//! is answered, found again after a restart.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use palisade_abi::{identity, limits};
use palisade_api::cni::Attachment;
use palisade_datapath::Datapath;
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

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

/// What a program can be attached to: the data path, or in tests nothing.
pub trait Attach: Send + Sync + 'static {
    /// Attaches the pod programs to an interface; repeating it is harmless.
    ///
    /// # Errors
    /// What the kernel says.
    fn attach(&self, interface: &str) -> Result<(), String>;
    /// Removes them.
    ///
    /// # Errors
    /// What the kernel says.
    fn detach(&self, interface: &str) -> Result<(), String>;
    /// Whether they are there.
    fn is_attached(&self, interface: &str) -> bool;
}

impl Attach for Datapath {
    fn attach(&self, interface: &str) -> Result<(), String> {
        self.attach_endpoint(interface).map_err(|error| chain(&error))
    }

    fn detach(&self, interface: &str) -> Result<(), String> {
        self.detach_endpoint(interface).map_err(|error| chain(&error))
    }

    fn is_attached(&self, interface: &str) -> bool {
        Self::is_attached(self, interface)
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// The endpoints of this node by attachment.
#[derive(Default)]
struct Book {
    rows: BTreeMap<u32, (Attachment, Endpoint)>,
}

impl Book {
    fn of(&self, attachment: &Attachment) -> Option<&Endpoint> {
        self.rows.values().find(|(known, _)| known == attachment).map(|(_, endpoint)| endpoint)
    }

    fn free_row(&self) -> Option<u32> {
        (FIRST_ROW..limits::ENDPOINT_ROWS).find(|row| !self.rows.contains_key(row))
    }
}

/// See the module.
pub struct Lifecycle<A> {
    book: Mutex<Book>,
    attach: Arc<A>,
    tables: TablesReader,
    commands: mpsc::Sender<Command>,
    progress: watch::Receiver<Progress>,
    publications: mpsc::UnboundedSender<Publication>,
}

impl<A: Attach> Lifecycle<A> {
    /// Takes up the endpoints that were recorded before a restart: attaches programs that are
    /// missing, and completes the table of endpoints with them.
    ///
    /// # Errors
    /// The engine ended.
    pub async fn restore(
        attach: Arc<A>,
        tables: TablesReader,
        commands: mpsc::Sender<Command>,
        progress: watch::Receiver<Progress>,
        publications: mpsc::UnboundedSender<Publication>,
        recorded: Vec<(NewEndpoint, u32)>,
    ) -> Result<Self, EndpointError> {
        let mut book = Book::default();
        for (new, id) in recorded {
            if let Err(error) = attach.attach(&new.host.name) {
                warn!(interface = new.host.name, error, "the endpoint has no interface any more");
                continue;
            }
            let endpoint = endpoint(&new, id);
            book.rows.insert(id, (new.attachment, endpoint));
        }
        info!(endpoints = book.rows.len(), "restored");
        let rows = book.rows.values().map(|(_, endpoint)| endpoint.clone()).collect();
        let lifecycle =
            Self { book: Mutex::new(book), attach, tables, commands, progress, publications };
        lifecycle.send(Change::Replace(rows)).await?;
        Ok(lifecycle)
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn send(&self, change: Change<Endpoint>) -> Result<(), EndpointError> {
        let command = Command::Intent(Box::new(Intent::Endpoint(change)));
        self.commands
            .send(command)
            .await
            .map_err(|_| EndpointError::TryAgain("the agent is stopping".into()))
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
        book.rows.insert(id, (new.attachment.clone(), endpoint.clone()));
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

impl<A: Attach> Endpoints for Lifecycle<A> {
    async fn add(&self, new: NewEndpoint) -> Result<u32, EndpointError> {
        if !self.progress.borrow().synced {
            return Err(EndpointError::TryAgain(
                "the agent has not read everything from the API server yet".into(),
            ));
        }
        let endpoint = self.enter(&new)?;
        let (id, ifindex) = (endpoint.id, endpoint.ifindex);
        if let Some(error) = self.other_pod_said(&endpoint) {
            return Err(error);
        }
        self.attach.attach(&endpoint.interface).map_err(EndpointError::Failed)?;
        self.send(Change::Put(endpoint)).await?;
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
        self.send(Change::Delete(id)).await?;
        if !self.wait(IN_FORCE, |progress| !progress.endpoints.contains_key(&id)).await {
            let problems = self.progress.borrow().problems.join("; ");
            return Err(EndpointError::TryAgain(format!(
                "the endpoint cannot be taken out of the kernel's tables: {problems}"
            )));
        }
        if let Err(error) = self.attach.detach(&endpoint.interface) {
            warn!(interface = endpoint.interface, error, "the pins stay");
        }
        self.book().rows.remove(&id);
        let gone = Publication::EndpointGone(endpoint.pod, endpoint.uid);
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
        let progress = self.progress.clone();
        let known = progress.borrow().endpoints.contains_key(&endpoint.id);
        match known || !progress.borrow().synced {
            true => Ok(()),
            false => Err(EndpointError::Differs(format!(
                "the row of endpoint {} is not in force",
                endpoint.id
            ))),
        }
    }

    async fn readiness(&self) -> Readiness {
        if self.progress.borrow().synced {
            return Readiness::Ready;
        }
        let inputs = self.tables.read().inputs();
        let missing: Vec<&str> =
            inputs.iter().filter(|input| !input.complete).map(|input| input.kind).collect();
        Readiness::NotReady(format!("waiting for the API server: {}", missing.join(", ")))
    }
}
