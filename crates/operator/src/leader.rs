//! Who works: the holder of a Lease.
//!
//! Clocks of machines are not compared. A candidate takes a Lease over that it has seen unchanged
//! for its whole duration by its own clock; the holder stops when it could not renew for less than
//! that.

use std::time::Duration;

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{Api, Client, api::PostParams};
use palisade_api::client::{chain, retry_after};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, warn};

const NAME: &str = "palisade-operator";
/// A Lease that nobody renewed for so long is free.
const DURATION: Duration = Duration::from_secs(15);
/// A holder that could not renew for so long stops.
const DEADLINE: Duration = Duration::from_secs(10);
/// Between two attempts.
const PERIOD: Duration = Duration::from_secs(2);

/// A candidate.
pub(crate) struct Elector {
    api: Api<Lease>,
    identity: String,
}

/// The time during which this process leads.
pub(crate) struct Term {
    /// Until when the Lease is certainly held.
    until: watch::Receiver<Instant>,
    renewal: JoinHandle<()>,
}

/// Whether the term still lasts.
#[derive(Clone)]
pub(crate) struct Watch(watch::Receiver<Instant>);

impl Watch {
    /// Asked before every write that two leaders must not both do.
    pub(crate) fn leads(&self) -> bool {
        Instant::now() < *self.0.borrow()
    }

    /// Of a leader that nobody follows for long.
    #[cfg(test)]
    pub(crate) fn lasting() -> Self {
        Self(watch::channel(Instant::now() + DURATION).1)
    }
}

impl Term {
    pub(crate) fn watch(&self) -> Watch {
        Watch(self.until.clone())
    }

    /// What comes of the work; none if the term is over before, which ends the work, too.
    pub(crate) async fn during<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            // The renewal ends by itself only where it failed for too long.
            _ = &mut self.renewal => None,
            outcome = work => Some(outcome),
        }
    }
}

impl Drop for Term {
    fn drop(&mut self) {
        self.renewal.abort();
    }
}

impl Elector {
    pub(crate) fn new(client: Client, namespace: &str, identity: &str) -> Self {
        Self { api: Api::namespaced(client, namespace), identity: identity.to_owned() }
    }

    /// Waits until the Lease is this candidate's.
    pub(crate) async fn wait(&self) -> Term {
        // The version of the Lease that was seen last, and since when.
        let mut seen: Option<(String, Instant)> = None;
        loop {
            let (begun, mut pause) = (Instant::now(), PERIOD);
            match timeout(DEADLINE, self.try_acquire(&mut seen)).await {
                Ok(Ok(true)) => return self.begin(begun),
                Ok(Ok(false)) => debug!("another one leads"),
                Ok(Err(error)) => {
                    warn!(error = chain(&error), "cannot ask for the Lease");
                    pause = pause.max(retry_after(&error));
                }
                Err(_) => warn!("the API server does not answer"),
            }
            sleep(pause).await;
        }
    }

    fn begin(&self, begun: Instant) -> Term {
        let (sender, until) = watch::channel(begun + DEADLINE);
        let elector = Self { api: self.api.clone(), identity: self.identity.clone() };
        let renewal = tokio::spawn(async move { elector.renew(sender).await });
        Term { until, renewal }
    }

    async fn try_acquire(&self, seen: &mut Option<(String, Instant)>) -> kube::Result<bool> {
        let Some(lease) = self.api.get_opt(NAME).await? else {
            return settle(self.api.create(&PostParams::default(), &self.lease(None)).await);
        };
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        let holder = holder(&lease).to_owned();
        if holder.is_empty() || holder == self.identity {
            return self.take(&lease).await;
        }
        match seen {
            Some((known, since)) if *known == version => {
                if since.elapsed() < duration(&lease) {
                    return Ok(false);
                }
                self.take(&lease).await
            }
            _ => {
                *seen = Some((version, Instant::now()));
                Ok(false)
            }
        }
    }

    /// Replaces exactly the version that was read: of two candidates one succeeds.
    async fn take(&self, lease: &Lease) -> kube::Result<bool> {
        let wanted = self.lease(Some(lease));
        settle(self.api.replace(NAME, &PostParams::default(), &wanted).await)
    }

    /// Renews until it is not this process's any more, or may not be.
    async fn renew(&self, until: watch::Sender<Instant>) {
        let left = || until.borrow().saturating_duration_since(Instant::now());
        let mut pause = PERIOD;
        loop {
            sleep(pause.min(left())).await;
            // A refusal that comes at once would be asked for again and again.
            if left().is_zero() {
                return;
            }
            let begun = Instant::now();
            pause = PERIOD;
            match timeout(left(), self.renew_once()).await {
                Ok(Ok(true)) => {
                    until.send_replace(begun + DEADLINE);
                }
                Ok(Ok(false)) => {
                    until.send_replace(begun);
                    return;
                }
                Ok(Err(error)) => {
                    warn!(error = chain(&error), "cannot renew the Lease");
                    pause = pause.max(retry_after(&error));
                }
                Err(_) => return,
            }
        }
    }

    async fn renew_once(&self) -> kube::Result<bool> {
        match self.api.get_opt(NAME).await? {
            Some(lease) if holder(&lease) == self.identity => self.take(&lease).await,
            _ => Ok(false),
        }
    }

    /// Gives the Lease back, so that another one need not wait.
    pub(crate) async fn release(&self) {
        let release = async {
            let Some(mut lease) = self.api.get_opt(NAME).await? else { return Ok(()) };
            if holder(&lease) != self.identity {
                return Ok(());
            }
            if let Some(spec) = &mut lease.spec {
                spec.holder_identity = Some(String::new());
            }
            self.api.replace(NAME, &PostParams::default(), &lease).await.map(drop)
        };
        let outcome: kube::Result<()> = timeout(PERIOD, release).await.unwrap_or(Ok(()));
        if let Err(error) = outcome {
            debug!(error = chain(&error), "the Lease is not given back; it runs out");
        }
    }

    fn lease(&self, before: Option<&Lease>) -> Lease {
        let spec = before.and_then(|lease| lease.spec.as_ref());
        let continued = before.is_some_and(|lease| holder(lease) == self.identity);
        let now = MicroTime(Timestamp::now());
        let transitions = spec.and_then(|spec| spec.lease_transitions).unwrap_or_default();
        let acquired = spec.and_then(|spec| spec.acquire_time.clone()).filter(|_| continued);
        Lease {
            metadata: before.map_or_else(
                || ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() },
                |lease| lease.metadata.clone(),
            ),
            spec: Some(LeaseSpec {
                holder_identity: Some(self.identity.clone()),
                lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
                acquire_time: Some(acquired.unwrap_or_else(|| now.clone())),
                renew_time: Some(now),
                lease_transitions: Some(if continued { transitions } else { transitions + 1 }),
                ..LeaseSpec::default()
            }),
        }
    }
}

/// Whether an attempt succeeded; a conflict says that another one did.
fn settle(outcome: kube::Result<Lease>) -> kube::Result<bool> {
    match outcome {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}

fn holder(lease: &Lease) -> &str {
    let spec = lease.spec.as_ref();
    spec.and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default()
}

/// How long the holder asked for.
fn duration(lease: &Lease) -> Duration {
    let seconds = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds);
    let seconds = seconds.and_then(|seconds| u64::try_from(seconds).ok());
    seconds.map_or(DURATION, Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use std::io;

    use kube::client::Body;

    use super::*;

    fn term(renewal: JoinHandle<()>) -> Term {
        Term { until: watch::channel(Instant::now()).1, renewal }
    }

    /// As where the API server's port is closed.
    #[tokio::test]
    async fn a_leader_that_is_refused_at_once_stops_in_time() {
        let refuse = tower::service_fn(|_: hyper::Request<Body>| async {
            Err::<hyper::Response<Body>, _>(io::Error::from(io::ErrorKind::ConnectionRefused))
        });
        let elector = Elector::new(Client::new(refuse, "default"), "default", "this one");
        let (sender, _until) = watch::channel(Instant::now() + Duration::from_millis(50));
        timeout(DEADLINE, elector.renew(sender)).await.expect("it stops");
    }

    #[tokio::test]
    async fn work_that_never_ends_ends_with_the_term() {
        let mut lost = term(tokio::spawn(async {}));
        let outcome = timeout(DEADLINE, lost.during(std::future::pending::<()>())).await;
        assert_eq!(outcome, Ok(None));
        let mut lasting = term(tokio::spawn(std::future::pending()));
        assert_eq!(lasting.during(async { 1 }).await, Some(1));
    }
}
