//! All objects, one global revision, and the recent history that watches read.
//!
//! Everything lives in memory; with a data directory every transaction is also written to an
//! embedded database before it becomes visible, and read back at start.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde_json::Value;
use tokio::sync::watch;

use super::error::ApiError;

/// Changes kept per kind of object; a watch that is further behind gets 410 and lists again.
const HISTORY: usize = 4096;

const OBJECTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("objects");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");

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
    /// Changes up to this revision are no longer (or never were) in `history`.
    floor: u64,
    wake: watch::Sender<u64>,
}

impl Kind {
    fn new(floor: u64) -> Self {
        Self {
            objects: BTreeMap::new(),
            history: VecDeque::new(),
            floor,
            wake: watch::channel(floor).0,
        }
    }

    fn record(&mut self, change: Change) {
        if self.history.len() == HISTORY
            && let Some(dropped) = self.history.pop_front()
        {
            self.floor = dropped.revision;
        }
        let revision = change.revision;
        self.history.push_back(Arc::new(change));
        self.wake.send_replace(revision);
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
    database: Option<Database>,
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
        Self { state: Mutex::new(state), database: None }
    }

    /// A store kept in the database file at `path`.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let database = Database::create(path)?;
        let write = database.begin_write()?;
        write.open_table(OBJECTS)?;
        write.open_table(META)?;
        write.commit()?;
        let mut revision = 1;
        let mut loaded = Vec::new();
        let read = database.begin_read()?;
        if let Some(bytes) = read.open_table(META)?.get("revision")? {
            revision = u64::from_be_bytes(bytes.value().try_into()?);
        }
        for row in read.open_table(OBJECTS)?.iter()? {
            let (key, bytes) = row?;
            let key = Key::decode(key.value())
                .ok_or_else(|| anyhow::anyhow!("{} holds a malformed key", path.display()))?;
            loaded.push((key, Arc::new(serde_json::from_slice(bytes.value())?)));
        }
        let mut state = State { revision, start: revision, kinds: HashMap::new() };
        for (key, value) in loaded {
            state.kind(&key.resource).objects.insert((key.namespace, key.name), value);
        }
        Ok(Self { state: Mutex::new(state), database: Some(database) })
    }

    /// A value kept beside the objects (certificates); `None` if absent or in memory.
    pub fn meta(&self, name: &str) -> anyhow::Result<Option<Vec<u8>>> {
        let Some(database) = &self.database else { return Ok(None) };
        let read = database.begin_read()?;
        Ok(read.open_table(META)?.get(name)?.map(|bytes| bytes.value().to_vec()))
    }

    /// Keeps a value beside the objects; does nothing in memory.
    pub fn set_meta(&self, name: &str, value: &[u8]) -> anyhow::Result<()> {
        let Some(database) = &self.database else { return Ok(()) };
        let write = database.begin_write()?;
        write.open_table(META)?.insert(name, value)?;
        write.commit()?;
        Ok(())
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
        if !writes.is_empty() {
            self.persist(&writes, revision).map_err(ApiError::internal)?;
            state.commit(writes);
        }
        Ok(answer)
    }

    fn persist(&self, writes: &[Write], revision: u64) -> anyhow::Result<()> {
        let Some(database) = &self.database else { return Ok(()) };
        let transaction = database.begin_write()?;
        {
            let mut objects = transaction.open_table(OBJECTS)?;
            for write in writes {
                match &write.new {
                    Some(value) => objects
                        .insert(write.key.encode().as_str(), &*serde_json::to_vec(&**value)?)?,
                    None => objects.remove(write.key.encode().as_str())?,
                };
            }
            transaction.open_table(META)?.insert("revision", revision.to_be_bytes().as_slice())?;
        }
        transaction.commit()?;
        Ok(())
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
mod tests {
    use serde_json::json;

    use super::*;

    fn put(store: &Store, name: &str) -> u64 {
        let key = Key::new("/pods", "default", name);
        store
            .transact(|transaction| {
                transaction.put(key, json!({"metadata": {"name": name}}));
                Ok(())
            })
            .unwrap();
        store.revision()
    }

    #[test]
    fn changes_after_a_revision_come_in_order() {
        let store = Store::in_memory();
        let first = put(&store, "a");
        put(&store, "b");
        put(&store, "a");
        let changes = store.changes("/pods", first).unwrap();
        assert_eq!(changes.len(), 2);
        assert!(changes[0].old.is_none());
        assert!(changes[1].old.is_some());
    }

    #[test]
    fn old_revisions_expire() {
        let store = Store::in_memory();
        let first = put(&store, "a");
        for _ in 0..HISTORY {
            put(&store, "a");
        }
        assert!(store.changes("/pods", first).is_ok());
        put(&store, "a");
        assert_eq!(store.changes("/pods", first).unwrap_err().reason, "Expired");
    }

    #[test]
    fn a_failed_transaction_leaves_nothing() {
        let store = Store::in_memory();
        let before = store.revision();
        let answer: Result<(), _> = store.transact(|transaction| {
            transaction.put(Key::new("/pods", "default", "a"), json!({"metadata": {}}));
            Err(ApiError::bad_request("no"))
        });
        assert!(answer.is_err());
        assert_eq!(store.revision(), before);
        assert!(store.list("/pods", None).objects.is_empty());
    }

    #[test]
    fn a_database_brings_objects_and_revision_back() {
        let path = std::env::temp_dir().join(format!("palisade-store-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let revision = put(&Store::open(&path).unwrap(), "a");
        let store = Store::open(&path).unwrap();
        assert_eq!(store.revision(), revision);
        assert_eq!(store.list("/pods", Some("default")).objects.len(), 1);
        assert_eq!(store.changes("/pods", revision - 1).unwrap_err().code, 410);
        std::fs::remove_file(&path).unwrap();
    }
}
