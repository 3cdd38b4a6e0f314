//! All objects, one global revision, and the recent history that watches read.
//!
//! Everything lives in memory; with a data directory every transaction is also written to an
//! embedded database before it becomes visible, and read back at start.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::watch;

use self::disk::Disk;
use super::error::ApiError;

mod disk;

/// Changes kept per kind of object; a watch that is further behind gets 410 and lists again.
const HISTORY: usize = 4096;
/// And no more bytes than about this, however large the objects are.
const HISTORY_BYTES: usize = 32 << 20;
/// Larger objects are refused, as etcd would.
const OBJECT_BYTES: usize = 1536 << 10;

/// Where an object lives: `resource` is `group/plural`, namespace is empty for cluster objects.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// `group/plural`.
    pub resource: Arc<str>,
    /// Namespace, or empty.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl Key {
    /// A key.
    pub fn new(resource: &str, namespace: &str, name: &str) -> Self {
        Self { resource: resource.into(), namespace: namespace.into(), name: name.into() }
    }

    fn encode(&self) -> String {
        format!("{}\0{}\0{}", self.resource, self.namespace, self.name)
    }

    fn decode(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, '\0');
        Some(Self::new(parts.next()?, parts.next()?, parts.next()?))
    }
}

/// A change of one object.
#[derive(Debug)]
pub struct Change {
    /// The revision that it made.
    pub revision: u64,
    /// The object's namespace.
    pub namespace: String,
    /// The object before; `None` when it was created.
    pub old: Option<Arc<Value>>,
    /// The object after; `None` when it was deleted.
    pub new: Option<Arc<Value>>,
    /// For a deletion, the last state with the deletion's revision.
    pub last: Option<Arc<Value>>,
}

struct Kind {
    objects: BTreeMap<(String, String), Arc<Value>>,
    history: VecDeque<Arc<Change>>,
    /// About how many bytes the history holds.
    weight: usize,
    /// Changes up to this revision are no longer (or never were) in `history`.
    floor: u64,
    wake: watch::Sender<u64>,
}

impl Kind {
    fn new(floor: u64) -> Self {
        Self {
            objects: BTreeMap::new(),
            history: VecDeque::new(),
            weight: 0,
            floor,
            wake: watch::channel(floor).0,
        }
    }

    fn record(&mut self, change: Change) {
        let revision = change.revision;
        self.weight += change.weight();
        self.history.push_back(Arc::new(change));
        while self.history.len() > HISTORY
            || (self.weight > HISTORY_BYTES && self.history.len() > 1)
        {
            let Some(dropped) = self.history.pop_front() else { break };
            self.weight -= dropped.weight();
            self.floor = dropped.revision;
        }
        self.wake.send_replace(revision);
    }
}

impl Change {
    /// What this change alone keeps alive: `new` is the next one's `old`.
    fn weight(&self) -> usize {
        self.old.as_deref().map_or(0, weight) + self.last.as_deref().map_or(0, weight)
    }
}

/// Whether etcd would refuse it.
fn is_too_large(value: &Value) -> bool {
    // A value takes more room here than its text does; only that of few has to be written for this.
    weight(value) > OBJECT_BYTES && value.to_string().len() > OBJECT_BYTES
}

/// About how many bytes a value takes.
fn weight(value: &Value) -> usize {
    let own = size_of::<Value>();
    own + match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(weight).sum(),
        Value::Object(fields) => {
            fields.iter().map(|(name, value)| own + name.len() + weight(value)).sum()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
    }
}

struct State {
    revision: u64,
    /// Revision at which this process began; nothing older is in any history.
    start: u64,
    kinds: HashMap<Arc<str>, Kind>,
}

/// The store.
pub struct Store {
    state: Mutex<State>,
    /// Locked after the state.
    disk: Option<Mutex<Disk>>,
}

/// Objects at one revision.
pub struct Snapshot {
    /// The store's revision when the list was taken.
    pub revision: u64,
    /// In order of namespace and name.
    pub objects: Vec<Arc<Value>>,
}

impl Store {
    /// A store that forgets everything with the process.
    pub fn in_memory() -> Self {
        let start = initial_revision();
        let state = State { revision: start, start, kinds: HashMap::new() };
        Self { state: Mutex::new(state), disk: None }
    }

    /// A store kept in the database file at `path`.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let (disk, contents) = Disk::open(path)?;
        let revision = contents.revision;
        let mut state = State { revision, start: revision, kinds: HashMap::new() };
        for (key, value) in contents.objects {
            state.kind(&key.resource).objects.insert((key.namespace, key.name), value);
        }
        Ok(Self { state: Mutex::new(state), disk: Some(Mutex::new(disk)) })
    }

    fn disk(&self) -> Option<MutexGuard<'_, Disk>> {
        Some(self.disk.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A value kept beside the objects (certificates); `None` if absent or in memory.
    pub fn meta(&self, name: &str) -> anyhow::Result<Option<Vec<u8>>> {
        self.disk().map_or(Ok(None), |disk| disk.meta(name))
    }

    /// Keeps a value beside the objects; does nothing in memory.
    pub fn set_meta(&self, name: &str, value: &[u8]) -> anyhow::Result<()> {
        self.disk().map_or(Ok(()), |mut disk| disk.set_meta(name, value))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in a transaction leaves the state as it was: writes happen at commit only.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The newest revision.
    pub fn revision(&self) -> u64 {
        self.lock().revision
    }

    /// One object.
    pub fn get(&self, key: &Key) -> Option<Arc<Value>> {
        self.lock().get(key)
    }

    /// The objects of a kind, in one namespace or in all.
    pub fn list(&self, resource: &str, namespace: Option<&str>) -> Snapshot {
        let state = self.lock();
        Snapshot { revision: state.revision, objects: state.list(resource, namespace) }
    }

    /// Changes of a kind after `cursor`, or 410 if some of them are no longer kept.
    pub fn changes(&self, resource: &str, cursor: u64) -> Result<Vec<Arc<Change>>, ApiError> {
        let mut state = self.lock();
        let start = state.start;
        let kind = state.kind(resource);
        let floor = kind.floor.max(start);
        if cursor < floor {
            return Err(ApiError::expired(cursor, floor));
        }
        let from = kind.history.partition_point(|change| change.revision <= cursor);
        Ok(kind.history.range(from..).cloned().collect())
    }

    /// Wakes when a kind changes.
    pub fn subscribe(&self, resource: &str) -> watch::Receiver<u64> {
        self.lock().kind(resource).wake.subscribe()
    }

    /// Reads and writes atomically: `body` sees a stable state, and what it puts and deletes
    /// becomes visible (and durable) only if it returns `Ok`.
    pub fn transact<T>(
        &self,
        body: impl FnOnce(&mut Transaction<'_>) -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        let mut state = self.lock();
        let mut transaction =
            Transaction { revision: state.revision, state: &state, writes: Vec::new() };
        let answer = body(&mut transaction)?;
        let (writes, revision) = (transaction.writes, transaction.revision);
        if writes.iter().filter_map(|write| write.new.as_deref()).any(is_too_large) {
            return Err(ApiError::too_large_to_keep());
        }
        if !writes.is_empty() {
            if let Some(mut disk) = self.disk() {
                let revisions = (state.revision, revision);
                disk.write(&writes, revisions, state.all()).map_err(|error| {
                    tracing::warn!("{error:#}");
                    ApiError::internal(format!("{error:#}"))
                })?;
            }
            state.commit(writes);
        }
        Ok(answer)
    }
}

/// Counts on from the clock, so that a revision of an earlier run is always older than the
/// oldest that this one knows, and its watcher is told to list again.
fn initial_revision() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(1, |now| now.as_secs())
}

impl State {
    fn kind(&mut self, resource: &str) -> &mut Kind {
        let start = self.start;
        self.kinds.entry(resource.into()).or_insert_with(|| Kind::new(start))
    }

    fn all(&self) -> impl Iterator<Item = (Key, Arc<Value>)> {
        self.kinds.iter().flat_map(|(resource, kind)| {
            kind.objects.iter().map(|((namespace, name), value)| {
                let (namespace, name) = (namespace.clone(), name.clone());
                (Key { resource: resource.clone(), namespace, name }, value.clone())
            })
        })
    }

    fn get(&self, key: &Key) -> Option<Arc<Value>> {
        let objects = &self.kinds.get(&key.resource)?.objects;
        objects.get(&(key.namespace.clone(), key.name.clone())).cloned()
    }

    fn list(&self, resource: &str, namespace: Option<&str>) -> Vec<Arc<Value>> {
        let Some(kind) = self.kinds.get(resource) else { return Vec::new() };
        let Some(namespace) = namespace else { return kind.objects.values().cloned().collect() };
        kind.objects
            .range((namespace.to_owned(), String::new())..)
            .take_while(|((found, _), _)| found == namespace)
            .map(|(_, value)| value.clone())
            .collect()
    }

    fn commit(&mut self, writes: Vec<Write>) {
        for write in writes {
            self.revision = self.revision.max(write.revision);
            let kind = self.kind(&write.key.resource);
            let place = (write.key.namespace.clone(), write.key.name);
            let old = match &write.new {
                Some(value) => kind.objects.insert(place, value.clone()),
                None => kind.objects.remove(&place),
            };
            kind.record(Change {
                revision: write.revision,
                namespace: write.key.namespace,
                old,
                new: write.new,
                last: write.last,
            });
        }
    }
}

struct Write {
    key: Key,
    revision: u64,
    new: Option<Arc<Value>>,
    last: Option<Arc<Value>>,
}

/// An atomic unit of reads and writes.
pub struct Transaction<'a> {
    state: &'a State,
    revision: u64,
    writes: Vec<Write>,
}

impl Transaction<'_> {
    /// One object, as this transaction has left it.
    pub fn get(&self, key: &Key) -> Option<Arc<Value>> {
        match self.writes.iter().rev().find(|write| write.key == *key) {
            Some(write) => write.new.clone(),
            None => self.state.get(key),
        }
    }

    /// The objects of a kind as they were before this transaction.
    pub fn list(&self, resource: &str, namespace: Option<&str>) -> Vec<Arc<Value>> {
        self.state.list(resource, namespace)
    }

    /// Creates or replaces an object and stamps it with its revision.
    pub fn put(&mut self, key: Key, mut value: Value) -> Arc<Value> {
        let revision = self.next(&mut value);
        let value = Arc::new(value);
        self.writes.push(Write { key, revision, new: Some(value.clone()), last: None });
        value
    }

    /// Deletes an object; `last` is its final state. Returns it with the deletion's revision.
    pub fn delete(&mut self, key: Key, mut last: Value) -> Arc<Value> {
        let revision = self.next(&mut last);
        let last = Arc::new(last);
        self.writes.push(Write { key, revision, new: None, last: Some(last.clone()) });
        last
    }

    fn next(&mut self, value: &mut Value) -> u64 {
        self.revision += 1;
        value["metadata"]["resourceVersion"] = self.revision.to_string().into();
        self.revision
    }
}

#[cfg(test)]
mod tests;
