//! Kernels for tests: one that only remembers, and one that fails on demand.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use palisade_abi::{Address, EndpointRow, row_flags};

use crate::step::{Entry, Kernel, KernelError, Key, Step};

/// What a [`FakeKernel`] holds.
#[derive(Clone, Debug, Default)]
pub struct FakeTables {
    /// Every table but the rows.
    pub entries: BTreeMap<Key, Entry>,
    /// Rows by number.
    pub rows: BTreeMap<u32, EndpointRow>,
    /// Addresses whose shard was bumped, in order.
    pub bumped: Vec<Address>,
    /// Addresses whose flows were forgotten, in order.
    pub flushed: Vec<Address>,
}

/// A kernel in memory.
#[derive(Debug, Default)]
pub struct FakeKernel {
    tables: Mutex<FakeTables>,
}

impl FakeKernel {
    /// The tables as they are now.
    pub fn tables(&self) -> MutexGuard<'_, FakeTables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key_of(entry: &Entry) -> Option<Key> {
    Some(match entry {
        Entry::Endpoint(key, _) => Key::Endpoint(*key),
        Entry::Row(..) => return None,
        Entry::Interface(key, _) => Key::Interface(*key),
        Entry::Ipcache(key, _) => Key::Ipcache(*key),
        Entry::Chunk(key, _) => Key::Chunk(*key),
        Entry::Peer(key, _) => Key::Peer(*key),
        Entry::Port(key, _) => Key::Port(*key),
        Entry::Service(key, _) => Key::Service(*key),
        Entry::Backend(key, _) => Key::Backend(*key),
    })
}

impl Kernel for FakeKernel {
    fn apply(&self, step: &Step) -> Result<(), KernelError> {
        let mut tables = self.tables();
        match step {
            Step::Put(Entry::Row(number, row)) => {
                let revision = tables.rows.get(number).map_or(0, |row| row.revision) + 1;
                tables.rows.insert(*number, EndpointRow { revision, ..*row });
            }
            Step::Put(entry) => {
                if let Some(key) = key_of(entry) {
                    tables.entries.insert(key, *entry);
                }
            }
            Step::Delete(key) => {
                tables.entries.remove(key);
            }
            Step::BumpRow(number) => {
                tables.rows.entry(*number).or_default().revision += 1;
            }
            Step::BumpShard(address) => tables.bumped.push(*address),
            Step::FlushFlows(address) => tables.flushed.push(*address),
        }
        Ok(())
    }

    fn dump(&self) -> Result<Vec<Entry>, KernelError> {
        let tables = self.tables();
        let rows = tables
            .rows
            .iter()
            .filter(|(_, row)| row.flags & row_flags::VALID != 0)
            .map(|(number, row)| Entry::Row(*number, *row));
        Ok(tables.entries.values().copied().chain(rows).collect())
    }
}

/// A kernel whose writes begin to fail after a number of steps.
#[derive(Debug)]
pub struct FaultyKernel {
    kernel: FakeKernel,
    remaining: AtomicUsize,
}

impl FaultyKernel {
    /// Performs `steps` steps, then refuses.
    #[must_use]
    pub fn failing_after(kernel: FakeKernel, steps: usize) -> Self {
        Self { kernel, remaining: AtomicUsize::new(steps) }
    }

    /// Heals, or sets when to fail next.
    pub fn allow(&self, steps: usize) {
        self.remaining.store(steps, Ordering::SeqCst);
    }

    /// What was written.
    #[must_use]
    pub fn inner(&self) -> &FakeKernel {
        &self.kernel
    }
}

impl Kernel for FaultyKernel {
    fn apply(&self, step: &Step) -> Result<(), KernelError> {
        let allowed = self
            .remaining
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |steps| steps.checked_sub(1));
        if allowed.is_err() {
            return Err(KernelError::Full { table: "faulty" });
        }
        self.kernel.apply(step)
    }

    fn dump(&self) -> Result<Vec<Entry>, KernelError> {
        self.kernel.dump()
    }
}
