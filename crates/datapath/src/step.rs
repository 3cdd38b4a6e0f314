//! Changes to the kernel's tables as data: a [`Plan`] is made by pure code, and one executor
//! performs it against a [`Kernel`].

use palisade_abi::{
    Address, BackendKey, BackendValue, ChunkKey, ChunkValue, EndpointKey, EndpointRow,
    EndpointValue, IpcacheKey, IpcacheValue, PeerKey, PeerValue, PortKey, PortValue, ServiceKey,
    ServiceValue, map,
};

/// A key and its value in one of the kernel's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each variant is the table of that name")]
pub enum Entry {
    Endpoint(EndpointKey, EndpointValue),
    /// Row number and row. The row's `revision` is not taken from here: the one in the kernel is
    /// kept, and bumped after the write.
    Row(u32, EndpointRow),
    /// Host-side interface index and row number.
    Interface(u32, u32),
    Ipcache(IpcacheKey, IpcacheValue),
    Chunk(ChunkKey, ChunkValue),
    Peer(PeerKey, PeerValue),
    Port(PortKey, PortValue),
    Service(ServiceKey, ServiceValue),
    Backend(BackendKey, BackendValue),
}

impl Entry {
    /// The name of its table.
    #[must_use]
    pub fn table(&self) -> &'static str {
        match self {
            Self::Endpoint(..) => map::ENDPOINTS,
            Self::Row(..) => map::ENDPOINT_ROWS,
            Self::Interface(..) => map::INTERFACES,
            Self::Ipcache(..) => map::IPCACHE,
            Self::Chunk(..) => map::CHUNKS,
            Self::Peer(..) => map::PEERS,
            Self::Port(..) => map::PORTS,
            Self::Service(..) => map::SERVICES,
            Self::Backend(..) => map::BACKENDS,
        }
    }
}

/// A key in one of the kernel's tables. Rows are never deleted, only written invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "each variant is the table of that name")]
pub enum Key {
    Endpoint(EndpointKey),
    Interface(u32),
    Ipcache(IpcacheKey),
    Chunk(ChunkKey),
    Peer(PeerKey),
    Port(PortKey),
    Service(ServiceKey),
    Backend(BackendKey),
}

/// One change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Writes an entry, new or not.
    Put(Entry),
    /// Removes an entry; one that is not there is as good as removed.
    Delete(Key),
    /// Has the flows of a local endpoint judged again.
    BumpRow(u32),
    /// Has the flows of remote addresses like this one judged again.
    BumpShard(Address),
    /// Forgets the flows of an address that was released.
    FlushFlows(Address),
}

/// Steps in the order in which they must happen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan(pub Vec<Step>);

/// A write that the kernel refused.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The table is full: nothing was changed.
    #[error("the kernel's table {table} is full")]
    Full {
        /// The table's name.
        table: &'static str,
    },
    /// Any other refusal.
    #[error("the kernel's table {table}: {message}")]
    Refused {
        /// The table's name.
        table: &'static str,
        /// What the kernel said.
        message: String,
    },
}

/// A plan that stopped: the steps before `step` are done, it and the later ones are not.
#[derive(Debug, thiserror::Error)]
#[error("step {step} of the plan failed")]
pub struct PlanError {
    /// Index of the step.
    pub step: usize,
    /// Why.
    #[source]
    pub source: KernelError,
}

/// The kernel's tables.
pub trait Kernel: Send + Sync {
    /// Performs one step, whole or not at all.
    ///
    /// # Errors
    /// The table is full, or the kernel refuses the write.
    fn apply(&self, step: &Step) -> Result<(), KernelError>;

    /// All entries there are; of the rows, those that are valid.
    ///
    /// # Errors
    /// The kernel refuses to read.
    fn dump(&self) -> Result<Vec<Entry>, KernelError>;

    /// Whether the entry is there as it is given; of a row, whatever its revision.
    ///
    /// # Errors
    /// The kernel refuses to read.
    fn holds(&self, entry: &Entry) -> Result<bool, KernelError> {
        let same = |found: &Entry| match (found, entry) {
            (Entry::Row(number, found), Entry::Row(wanted, row)) => {
                number == wanted && EndpointRow { revision: row.revision, ..*found } == *row
            }
            _ => found == entry,
        };
        Ok(self.dump()?.iter().any(same))
    }
}

/// Performs a plan.
///
/// # Errors
/// The first step that fails; later ones are not tried.
pub fn execute(kernel: &dyn Kernel, plan: &Plan) -> Result<(), PlanError> {
    for (step, action) in plan.0.iter().enumerate() {
        kernel.apply(action).map_err(|source| PlanError { step, source })?;
    }
    Ok(())
}
