//! From the API server to intent tables. Objects are parsed at this edge and dropped; what goes
//! on is the model.
//!
//! A watcher lists, then watches; after an outage or a `410 Gone` it lists again, and the new
//! list replaces what was known. Between, what was known stands.

pub(crate) mod identities;
mod namespaces;
mod nodes;
mod pods;
mod policies;
mod secrets;
mod services;

use std::{
    fmt::Debug,
    time::{Duration, Instant},
};

use futures::TryStreamExt;
use kube::{
    Api, Client, Resource,
    runtime::{WatchStreamExt, utils::Backoff, watcher},
};
use palisade_api::client::WATCH_SECONDS;
use serde::de::DeserializeOwned;
use tokio::{sync::mpsc, task::JoinSet, time::timeout};
use tracing::{debug, info, warn};

use crate::{
    engine::Command,
    resources,
    tables::{Change, Intent, Row},
};

/// The one namespace whose Secrets policies may refer to: the agent needs no rights on others.
pub const SECRETS_NAMESPACE: &str = "palisade-secrets";

/// Follows every kind of object that the agent needs.
pub fn follow_all(client: &Client, cluster: &str, commands: &mpsc::Sender<Command>) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let to = || commands.clone();
    tasks.spawn(follow(Api::all(client.clone()), namespaces::Reflect, to()));
    tasks.spawn(follow(Api::all(client.clone()), pods::Reflect, to()));
    tasks.spawn(follow(Api::all(client.clone()), services::Services, to()));
    tasks.spawn(follow(Api::all(client.clone()), services::Slices, to()));
    tasks.spawn(follow(Api::all(client.clone()), nodes::Nodes, to()));
    let secrets = Api::namespaced(client.clone(), SECRETS_NAMESPACE);
    tasks.spawn(follow(secrets, secrets::Reflect, to()));
    let dynamic = |kind: &str| Api::all_with(client.clone(), &resources::cilium(kind));
    tasks.spawn(follow(dynamic("CiliumNode"), nodes::CiliumNodes, to()));
    tasks.spawn(follow(dynamic("CiliumIdentity"), identities::Reflect, to()));
    for kind in crate::tables::POLICY_KINDS {
        let api = Api::all_with(client.clone(), &resources::policy(kind));
        tasks.spawn(follow(api, policies::Reflect { kind, cluster: cluster.to_owned() }, to()));
    }
    tasks
}

/// How objects of a kind become rows.
trait Parse: Send + 'static {
    /// Kind of object.
    ///
    /// Those of `cilium.io` and all policies are read as plain JSON: one malformed object must not
    /// keep the others from being read.
    type Object: Resource + Clone + DeserializeOwned + Debug + Send + 'static;
    /// What they become.
    type Row: Row;

    /// The key of the row that the object becomes.
    fn key(&self, object: &Self::Object) -> <Self::Row as Row>::Key;
    /// The row; none for an object that does not matter here.
    fn parse(&self, object: Self::Object) -> Option<Self::Row>;
    /// The change of the right table.
    fn intent(&self, change: Change<Self::Row>) -> Intent;
}

async fn follow<P: Parse>(api: Api<P::Object>, parse: P, commands: mpsc::Sender<Command>) {
    let config = watcher::Config::default().timeout(WATCH_SECONDS);
    let stream = watcher(api, config).backoff(Patience::default());
    let mut stream = std::pin::pin!(stream);
    let mut listed = Vec::new();
    let mut failing: Option<String> = None;
    loop {
        let calm = if failing.is_some() { Patience::CALM } else { Duration::MAX };
        let change = match timeout(calm, stream.try_next()).await {
            // A watch that is taken up where it broke off does not say so.
            Err(_) => {
                failing = None;
                info!(table = P::Row::TABLE, "following the API again");
                Change::Recovered
            }
            Ok(Ok(None)) => return,
            Ok(Ok(Some(watcher::Event::Init))) => {
                listed.clear();
                continue;
            }
            Ok(Ok(Some(watcher::Event::InitApply(object)))) => {
                listed.extend(parse.parse(object));
                continue;
            }
            Ok(Ok(Some(watcher::Event::InitDone))) => {
                debug!(table = P::Row::TABLE, rows = listed.len(), "listed");
                if failing.take().is_some() {
                    info!(table = P::Row::TABLE, "following the API again");
                }
                Change::Replace(std::mem::take(&mut listed))
            }
            Ok(Ok(Some(watcher::Event::Apply(object)))) => {
                let key = parse.key(&object);
                parse.parse(object).map_or(Change::Delete(key), Change::Put)
            }
            Ok(Ok(Some(watcher::Event::Delete(object)))) => Change::Delete(parse.key(&object)),
            Ok(Err(error)) => {
                let error = error.to_string();
                if failing.as_ref() != Some(&error) {
                    let table = P::Row::TABLE;
                    warn!(table, error, "cannot follow the API; what is known stands");
                }
                failing = Some(error.clone());
                Change::Failed(error)
            }
        };
        if commands.send(Command::Intent(Box::new(parse.intent(change)))).await.is_err() {
            return;
        }
    }
}

/// How long to wait after the API server failed: from little to three seconds.
///
/// The stream calls it a success when it merely begins to list, so what counts as one is time
/// without a failure.
#[derive(Debug)]
struct Patience {
    pause: Duration,
    failed: Option<Instant>,
}

impl Patience {
    const FIRST: Duration = Duration::from_millis(50);
    const LAST: Duration = Duration::from_secs(3);
    /// So long without a failure, and all is well again: longer than an attempt to connect and the
    /// pause before it.
    const CALM: Duration = Duration::from_secs(15);

    fn after(&mut self, now: Instant) -> Duration {
        if self.failed.is_none_or(|failed| now - failed > Self::CALM) {
            self.pause = Self::FIRST;
        }
        self.failed = Some(now);
        let pause = self.pause;
        self.pause = (pause * 2).min(Self::LAST);
        pause
    }
}

impl Default for Patience {
    fn default() -> Self {
        Self { pause: Self::FIRST, failed: None }
    }
}

impl Iterator for Patience {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(self.after(Instant::now()))
    }
}

impl Backoff for Patience {
    fn reset(&mut self) {}
}

/// Name of a namespaced object.
fn object_name<K: Resource>(object: &K) -> crate::tables::ObjectName {
    let meta = object.meta();
    crate::tables::ObjectName::new(
        meta.namespace.clone().unwrap_or_default(),
        meta.name.clone().unwrap_or_default(),
    )
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn patience_grows_until_all_is_calm() {
        let mut patience = Patience::default();
        let begun = Instant::now();
        let mut now = begun;
        let pauses: Vec<Duration> = std::iter::repeat_with(|| {
            patience.reset();
            let pause = patience.after(now);
            now += pause;
            pause
        })
        .take(9)
        .collect();
        let millis: Vec<u128> = pauses.iter().map(Duration::as_millis).collect();
        assert_eq!(millis, [50, 100, 200, 400, 800, 1600, 3000, 3000, 3000]);
        assert_eq!(patience.after(now + Patience::CALM * 2), Patience::FIRST);
    }

    /// A server that is away must not be hammered by every agent.
    #[tokio::test]
    async fn a_server_that_fails_is_asked_less_and_less() {
        let server = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = server.local_addr().expect("an address");
        let url = format!("http://{address}").parse().expect("a URL");
        let client = Client::try_from(kube::Config::new(url)).expect("a client");
        let (commands, mut queue) = mpsc::channel(64);
        let following = tokio::spawn(follow(Api::all(client), namespaces::Reflect, commands));
        let mut asked = Vec::new();
        for _ in 0..6 {
            drop(server.accept().await.expect("a request"));
            asked.push(Instant::now());
            assert!(matches!(queue.recv().await, Some(Command::Intent(_))), "the failure is told");
        }
        following.abort();
        assert!(asked[5] - asked[4] >= Duration::from_millis(700), "{asked:?}");
    }
}
