//! The database file behind a store, which may run out of room and come back.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde_json::Value;

use super::{Key, Write};

const OBJECTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("objects");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const REVISION: &str = "revision";

/// A database file.
pub(super) struct Disk {
    path: PathBuf,
    /// `None` after a failed write: the database refuses everything from then on, and must be
    /// opened anew.
    open: Option<Database>,
}

/// What a file holds.
pub(super) struct Contents {
    pub(super) revision: u64,
    pub(super) objects: Vec<(Key, Arc<Value>)>,
}

impl Disk {
    /// Opens or creates the file at `path` and reads it.
    pub(super) fn open(path: &Path) -> anyhow::Result<(Self, Contents)> {
        let database = Database::create(path)?;
        let write = database.begin_write()?;
        write.open_table(OBJECTS)?;
        write.open_table(META)?;
        write.commit()?;
        let mut objects = Vec::new();
        for row in database.begin_read()?.open_table(OBJECTS)?.iter()? {
            let (key, bytes) = row?;
            let key = Key::decode(key.value())
                .ok_or_else(|| anyhow::anyhow!("{} holds a malformed key", path.display()))?;
            objects.push((key, Arc::new(serde_json::from_slice(bytes.value())?)));
        }
        let revision = revision(&database)?.unwrap_or(1);
        let disk = Self { path: path.to_owned(), open: Some(database) };
        Ok((disk, Contents { revision, objects }))
    }

    /// A value kept beside the objects.
    pub(super) fn meta(&self, name: &str) -> anyhow::Result<Option<Vec<u8>>> {
        let Some(database) = &self.open else { return Ok(None) };
        let read = database.begin_read()?;
        Ok(read.open_table(META)?.get(name)?.map(|bytes| bytes.value().to_vec()))
    }

    /// Keeps a value beside the objects.
    pub(super) fn set_meta(&mut self, name: &str, value: &[u8]) -> anyhow::Result<()> {
        self.attempt(|database| {
            let write = database.begin_write()?;
            write.open_table(META)?.insert(name, value)?;
            Ok(write.commit()?)
        })
    }

    /// Writes changes that lead from one revision to another.
    pub(super) fn write(
        &mut self,
        writes: &[Write],
        (from, to): (u64, u64),
        all: impl Iterator<Item = (Key, Arc<Value>)>,
    ) -> anyhow::Result<()> {
        self.attempt(|database| {
            // A write that failed may have reached the file all the same. Nobody was told of it.
            let astray = revision(database)?.is_some_and(|found| found != from);
            let transaction = database.begin_write()?;
            {
                let mut objects = transaction.open_table(OBJECTS)?;
                if astray {
                    objects.retain(|_, _| false)?;
                    for (key, value) in all {
                        objects.insert(key.encode().as_str(), &*serde_json::to_vec(&*value)?)?;
                    }
                }
                for write in writes {
                    let key = write.key.encode();
                    match &write.new {
                        Some(value) => {
                            objects.insert(key.as_str(), &*serde_json::to_vec(&**value)?)?
                        }
                        None => objects.remove(key.as_str())?,
                    };
                }
                let mut meta = transaction.open_table(META)?;
                meta.insert(REVISION, to.to_be_bytes().as_slice())?;
            }
            Ok(transaction.commit()?)
        })
    }

    /// Does something with the open database; after a failure it is opened anew.
    fn attempt(
        &mut self,
        work: impl FnOnce(&Database) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let outcome = match self.open.take().map_or_else(|| Database::open(&self.path), Ok) {
            Ok(database) => work(&database).map(|()| database),
            Err(error) => Err(error.into()),
        };
        let database = outcome.with_context(|| {
            format!(
                "the change could not be written to {} and was not made; see that there is room \
                 and try again",
                self.path.display()
            )
        })?;
        self.open = Some(database);
        Ok(())
    }
}

fn revision(database: &Database) -> anyhow::Result<Option<u64>> {
    let read = database.begin_read()?;
    let Some(bytes) = read.open_table(META)?.get(REVISION)? else { return Ok(None) };
    Ok(Some(u64::from_be_bytes(bytes.value().try_into()?)))
}
