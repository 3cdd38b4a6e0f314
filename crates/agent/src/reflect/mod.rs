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
mod services;

use std::{fmt::Debug, time::Duration};

use futures::TryStreamExt;
use kube::{
    Api, Client, Resource,
    runtime::{WatchStreamExt, utils::Backoff, watcher},
};
use serde::de::DeserializeOwned;
use tokio::{sync::mpsc, task::JoinSet};
use tracing::{debug, warn};

use crate::{
    engine::Command,
    resources,
    tables::{Change, Intent, Row},
};

/// Seconds after which a quiet watch is renewed: a connection that died without a word is noticed
/// within this time.
pub const WATCH_SECONDS: u32 = 60;

/// Follows every kind of object that the agent needs.
pub fn follow_all(client: &Client, cluster: &str, commands: &mpsc::Sender<Command>) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let to = || commands.clone();
    tasks.spawn(follow(Api::all(client.clone()), namespaces::Reflect, to()));
    tasks.spawn(follow(Api::all(client.clone()), pods::Reflect, to()));
    tasks.spawn(follow(Api::all(client.clone()), services::Services, to()));
    tasks.spawn(follow(Api::all(client.clone()), services::Slices, to()));
    tasks.spawn(follow(Api::all(client.clone()), nodes::Nodes, to()));
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
    loop {
        let change = match stream.try_next().await {
            Ok(None) => return,
            Ok(Some(watcher::Event::Init)) => {
                listed.clear();
                continue;
            }
            Ok(Some(watcher::Event::InitApply(object))) => {
                listed.extend(parse.parse(object));
                continue;
            }
            Ok(Some(watcher::Event::InitDone)) => {
                debug!(table = P::Row::TABLE, rows = listed.len(), "listed");
                Change::Replace(std::mem::take(&mut listed))
            }
            Ok(Some(watcher::Event::Apply(object))) => {
                let key = parse.key(&object);
                parse.parse(object).map_or(Change::Delete(key), Change::Put)
            }
            Ok(Some(watcher::Event::Delete(object))) => Change::Delete(parse.key(&object)),
            Err(error) => {
                warn!(table = P::Row::TABLE, %error, "cannot follow the API; what is known stands");
                Change::Failed(error.to_string())
            }
        };
        if commands.send(Command::Intent(Box::new(parse.intent(change)))).await.is_err() {
            return;
        }
    }
}

/// How long to wait after the API server failed: from little to three seconds.
#[derive(Debug)]
struct Patience(Duration);

impl Patience {
    const FIRST: Duration = Duration::from_millis(50);
    const LAST: Duration = Duration::from_secs(3);
}

impl Default for Patience {
    fn default() -> Self {
        Self(Self::FIRST)
    }
}

impl Iterator for Patience {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let now = self.0;
        self.0 = (now * 2).min(Self::LAST);
        Some(now)
    }
}

impl Backoff for Patience {
    fn reset(&mut self) {
        self.0 = Self::FIRST;
    }
}

/// Name of a namespaced object.
fn object_name<K: Resource>(object: &K) -> crate::tables::ObjectName {
    let meta = object.meta();
    crate::tables::ObjectName::new(
        meta.namespace.clone().unwrap_or_default(),
        meta.name.clone().unwrap_or_default(),
    )
}
