//! The pinned maps, typed.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
};

use aya::{
    Ebpf,
    maps::{Array, HashMap, LpmTrie, MapData, MapError, PerCpuArray, lpm_trie::Key as LpmKey},
};
use palisade_abi::{
    Address, BackendKey, BackendValue, ChunkKey, ChunkValue, DropReason, EndpointKey, EndpointRow,
    EndpointValue, Event, EventKind, FlowKey4, FlowKey6, FlowValue, IpcacheKey, IpcacheValue,
    METRICS_LEN, MasqueradeSettings, MetricsValue, PeerKey, PeerValue, PortKey, PortValue,
    ServiceKey, ServiceValue, TunnelValue, event_flags, flow_flags, limits, map, metric_index,
    row_flags,
};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::{
    load::LoadError,
    step::{Entry, Kernel, KernelError, Key, Step},
    wire::Wire,
};

type Hash<K, V> = HashMap<MapData, Wire<K>, Wire<V>>;

struct Tables {
    endpoints: Hash<EndpointKey, EndpointValue>,
    rows: Array<MapData, Wire<EndpointRow>>,
    interfaces: Hash<u32, u32>,
    ipcache: LpmTrie<MapData, Address, Wire<IpcacheValue>>,
    tunnels: LpmTrie<MapData, Address, Wire<TunnelValue>>,
    shards: Array<MapData, u32>,
    chunks: Hash<ChunkKey, ChunkValue>,
    peers: Hash<PeerKey, PeerValue>,
    ports: Hash<PortKey, PortValue>,
    services: Hash<ServiceKey, ServiceValue>,
    backends: Hash<BackendKey, BackendValue>,
    flows4: [Hash<FlowKey4, FlowValue>; 2],
    flows6: [Hash<FlowKey6, FlowValue>; 2],
    masquerade: Array<MapData, Wire<MasqueradeSettings>>,
    metrics: PerCpuArray<MapData, Wire<MetricsValue>>,
}

/// The kernel's tables, for any number of threads.
pub(crate) struct Maps {
    tables: Mutex<Tables>,
}

/// What a collection of flows found.
#[derive(Debug, Default)]
pub struct FlowStats {
    /// Flows that live, TCP.
    pub live: usize,
    /// Flows that had expired and were removed, as close events.
    pub closed: Vec<Event>,
}

/// Sums of the `METRICS` slots over all CPUs.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    slots: Vec<MetricsValue>,
}

impl Metrics {
    /// Packets and bytes dropped for a reason.
    #[must_use]
    pub fn drops(&self, reason: DropReason) -> MetricsValue {
        self.slot(reason as u32)
    }

    /// One of [`metric_index`].
    #[must_use]
    pub fn slot(&self, index: u32) -> MetricsValue {
        self.slots.get(index as usize).copied().unwrap_or_default()
    }

    /// Events that were lost because nobody read them in time.
    #[must_use]
    pub fn events_lost(&self) -> u64 {
        self.slot(metric_index::EVENTS_LOST).packets
    }
}

fn take<T>(object: &mut Ebpf, name: &'static str) -> Result<T, LoadError>
where
    T: TryFrom<aya::maps::Map, Error = MapError>,
{
    let map = object.take_map(name).ok_or(LoadError::Missing { name })?;
    T::try_from(map).map_err(|source| LoadError::Map { name, source })
}

impl Maps {
    pub(crate) fn take(object: &mut Ebpf) -> Result<Self, LoadError> {
        let tables = Tables {
            endpoints: take(object, map::ENDPOINTS)?,
            rows: take(object, map::ENDPOINT_ROWS)?,
            interfaces: take(object, map::INTERFACES)?,
            ipcache: take(object, map::IPCACHE)?,
            tunnels: take(object, map::TUNNELS)?,
            shards: take(object, map::SHARDS)?,
            chunks: take(object, map::CHUNKS)?,
            peers: take(object, map::PEERS)?,
            ports: take(object, map::PORTS)?,
            services: take(object, map::SERVICES)?,
            backends: take(object, map::BACKENDS)?,
            flows4: [take(object, map::FLOWS4)?, take(object, map::FLOWS4_ANY)?],
            flows6: [take(object, map::FLOWS6)?, take(object, map::FLOWS6_ANY)?],
            masquerade: take(object, map::MASQUERADE)?,
            metrics: take(object, map::METRICS)?,
        };
        Ok(Self { tables: Mutex::new(tables) })
    }

    fn lock(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the revisions of tables that are new begin where none of before is met: flows that were
    /// judged by other tables are still there. Row 0, which stands for ends without one, keeps 0.
    pub(crate) fn begin_revisions(&self) -> Result<(), MapError> {
        let mut start = [0; size_of::<u32>()];
        getrandom(&mut start, GetRandomFlags::empty())
            .map_err(|error| MapError::IoError(error.into()))?;
        let revision = u32::from_ne_bytes(start).max(1);
        let mut tables = self.lock();
        for row in 1..limits::ENDPOINT_ROWS {
            tables.rows.set(row, Wire(EndpointRow { revision, ..EndpointRow::default() }), 0)?;
        }
        (0..limits::SHARDS).try_for_each(|shard| tables.shards.set(shard, revision, 0))
    }

    /// Removes the TCP flows that expired before `now` (low 32 bits of the jiffies).
    pub(crate) fn collect_flows(&self, now: u32, time: u64) -> FlowStats {
        let mut tables = self.lock();
        let mut stats = FlowStats::default();
        collect(&mut tables.flows4[0], now, &mut stats, |key, value| {
            close_event(ends4(key), value, time)
        });
        collect(&mut tables.flows6[0], now, &mut stats, |key, value| {
            close_event((key.low, key.low_port, key.high, key.high_port, key.protocol), value, time)
        });
        stats
    }

    /// The pairs of addresses that have a flow that does not expire before `now` (low 32 bits of
    /// the jiffies), the lower address first.
    pub(crate) fn live_pairs(&self, now: u32) -> BTreeSet<(IpAddr, IpAddr)> {
        let tables = self.lock();
        let is_live = |flow: &FlowValue| flow.expires.wrapping_sub(now).cast_signed() >= 0;
        let mut pairs = BTreeSet::new();
        for (Wire(key), Wire(flow)) in tables.flows4.iter().flat_map(|flows| flows.iter()).flatten()
        {
            if is_live(&flow) {
                pairs.insert((IpAddr::from(key.low), IpAddr::from(key.high)));
            }
        }
        for (Wire(key), Wire(flow)) in tables.flows6.iter().flat_map(|flows| flows.iter()).flatten()
        {
            if is_live(&flow) {
                pairs.insert((IpAddr::from(key.low), IpAddr::from(key.high)));
            }
        }
        pairs
    }

    /// What is not wanted goes first.
    pub(crate) fn set_tunnels(
        &self,
        wanted: &BTreeMap<IpcacheKey, TunnelValue>,
    ) -> Result<(), MapError> {
        let tunnels = &mut self.lock().tunnels;
        let mut known = BTreeMap::new();
        for item in tunnels.iter() {
            let (key, Wire(value)) = item?;
            known.insert(IpcacheKey { prefix_len: key.prefix_len(), address: key.data() }, value);
        }
        for key in known.keys().filter(|key| !wanted.contains_key(key)) {
            tunnels.remove(&LpmKey::new(key.prefix_len, key.address))?;
        }
        for (key, value) in wanted.iter().filter(|(key, value)| known.get(key) != Some(value)) {
            tunnels.insert(&LpmKey::new(key.prefix_len, key.address), Wire(*value), 0)?;
        }
        Ok(())
    }

    /// Written only where it changes: packets read it meanwhile.
    pub(crate) fn set_masquerade(&self, wanted: &MasqueradeSettings) -> Result<(), MapError> {
        let map = &mut self.lock().masquerade;
        if map.get(&0, 0)?.0 == *wanted {
            return Ok(());
        }
        map.set(0, Wire(*wanted), 0)
    }

    pub(crate) fn metrics(&self) -> Result<Metrics, MapError> {
        let tables = self.lock();
        let mut slots = Vec::with_capacity(METRICS_LEN as usize);
        for index in 0..METRICS_LEN {
            let sum = tables.metrics.get(&index, 0)?.iter().fold(
                MetricsValue::default(),
                |sum, Wire(value)| MetricsValue {
                    packets: sum.packets + value.packets,
                    bytes: sum.bytes + value.bytes,
                },
            );
            slots.push(sum);
        }
        Ok(Metrics { slots })
    }
}

type Ends = (Address, u16, Address, u16, u8);

fn mapped(ipv4: [u8; 4]) -> Address {
    std::net::Ipv4Addr::from(ipv4).to_ipv6_mapped().octets()
}

fn ends4(key: &FlowKey4) -> Ends {
    (mapped(key.low), key.low_port, mapped(key.high), key.high_port, key.protocol)
}

fn close_event(
    (low, low_port, high, high_port, protocol): Ends,
    flow: &FlowValue,
    time: u64,
) -> Event {
    let (low, high) = ((low, u16::from_be(low_port)), (high, u16::from_be(high_port)));
    let opener_high = flow.flags & flow_flags::OPENER_HIGH != 0;
    let (source, destination) = if opener_high { (high, low) } else { (low, high) };
    let mut event: Event = zerocopy::FromZeros::new_zeroed();
    event.time = time;
    event.kind = EventKind::Close as u8;
    event.protocol = protocol;
    (event.source, event.source_port) = source;
    (event.destination, event.destination_port) = destination;
    if source.0[..12] != mapped([0; 4])[..12] {
        event.flags |= event_flags::IPV6;
    }
    event.fill_flow(flow, true, true);
    event
}

fn collect<K>(
    flows: &mut Hash<K, FlowValue>,
    now: u32,
    stats: &mut FlowStats,
    close: impl Fn(&K, &FlowValue) -> Event,
) where
    K: zerocopy::FromBytes + zerocopy::IntoBytes + zerocopy::Immutable + Copy + 'static,
{
    let expired = |flow: &FlowValue| flow.expires.wrapping_sub(now).cast_signed() < 0;
    let mut gone = Vec::new();
    for (key, Wire(flow)) in flows.iter().flatten() {
        if expired(&flow) {
            gone.push((key, flow));
        } else {
            stats.live += 1;
        }
    }
    for (key, flow) in gone {
        // A packet may have revived it since.
        let revived = flows.get(&key, 0).is_ok_and(|Wire(flow)| !expired(&flow));
        if revived || flows.remove(&key).is_err() {
            continue;
        }
        let hidden = flow_flags::CLOSE_LOGGED | flow_flags::TRANSLATED | flow_flags::UPSTREAM;
        if flow.flags & hidden == 0 {
            stats.closed.push(close(&key.0, &flow));
        }
    }
}

/// The shard of a remote address; `flow::shard_of` of the eBPF programs is the same function.
fn shard_of(address: &Address) -> u32 {
    let value = u128::from_be_bytes(*address);
    let (high, low) = ((value >> 64) as u64, value as u64);
    let mixed = (high ^ low.rotate_left(17)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 40) as u32 & (limits::SHARDS - 1)
}

impl Tables {
    fn put_row(&mut self, number: u32, row: &EndpointRow) -> Result<(), MapError> {
        let revision = self.rows.get(&number, 0)?.0.revision;
        // Content first, then the revision: whoever reads the new revision reads the new content.
        self.rows.set(number, Wire(EndpointRow { revision, ..*row }), 0)?;
        let bumped = revision.wrapping_add(1).max(1);
        self.rows.set(number, Wire(EndpointRow { revision: bumped, ..*row }), 0)
    }

    fn bump_row(&mut self, number: u32) -> Result<(), MapError> {
        let Wire(row) = self.rows.get(&number, 0)?;
        let revision = row.revision.wrapping_add(1).max(1);
        self.rows.set(number, Wire(EndpointRow { revision, ..row }), 0)
    }

    fn bump_shard(&mut self, address: &Address) -> Result<(), MapError> {
        let shard = shard_of(address);
        let revision = self.shards.get(&shard, 0)?;
        self.shards.set(shard, revision.wrapping_add(1), 0)
    }

    fn flush_flows(&mut self, address: &Address) -> Result<(), MapError> {
        let ipv4 = std::net::Ipv6Addr::from(*address).to_ipv4_mapped().map(|ipv4| ipv4.octets());
        if let Some(ipv4) = ipv4 {
            for flows in &mut self.flows4 {
                flush(flows, |key| key.low == ipv4 || key.high == ipv4)?;
            }
            return Ok(());
        }
        for flows in &mut self.flows6 {
            flush(flows, |key| key.low == *address || key.high == *address)?;
        }
        Ok(())
    }

    fn put(&mut self, entry: &Entry) -> Result<(), MapError> {
        match entry {
            Entry::Endpoint(key, value) => self.endpoints.insert(Wire(*key), Wire(*value), 0),
            Entry::Row(number, row) => self.put_row(*number, row),
            Entry::Interface(key, value) => self.interfaces.insert(Wire(*key), Wire(*value), 0),
            Entry::Ipcache(key, value) => {
                self.ipcache.insert(&LpmKey::new(key.prefix_len, key.address), Wire(*value), 0)
            }
            Entry::Chunk(key, value) => self.chunks.insert(Wire(*key), Wire(*value), 0),
            Entry::Peer(key, value) => self.peers.insert(Wire(*key), Wire(*value), 0),
            Entry::Port(key, value) => self.ports.insert(Wire(*key), Wire(*value), 0),
            Entry::Service(key, value) => self.services.insert(Wire(*key), Wire(*value), 0),
            Entry::Backend(key, value) => self.backends.insert(Wire(*key), Wire(*value), 0),
        }
    }

    fn holds(&self, entry: &Entry) -> Result<bool, MapError> {
        match entry {
            Entry::Endpoint(key, value) => is(&self.endpoints, key, value),
            Entry::Row(number, row) => {
                let Wire(found) = self.rows.get(number, 0)?;
                Ok(EndpointRow { revision: row.revision, ..found } == *row)
            }
            Entry::Interface(key, value) => is(&self.interfaces, key, value),
            Entry::Ipcache(key, value) => {
                let found = self.ipcache.get(&LpmKey::new(key.prefix_len, key.address), 0)?;
                Ok(found.0 == *value)
            }
            Entry::Chunk(key, value) => is(&self.chunks, key, value),
            Entry::Peer(key, value) => is(&self.peers, key, value),
            Entry::Port(key, value) => is(&self.ports, key, value),
            Entry::Service(key, value) => is(&self.services, key, value),
            Entry::Backend(key, value) => is(&self.backends, key, value),
        }
    }

    fn delete(&mut self, key: &Key) -> Result<(), MapError> {
        let removed = match key {
            Key::Endpoint(key) => self.endpoints.remove(&Wire(*key)),
            Key::Interface(key) => self.interfaces.remove(&Wire(*key)),
            Key::Ipcache(key) => self.ipcache.remove(&LpmKey::new(key.prefix_len, key.address)),
            Key::Chunk(key) => self.chunks.remove(&Wire(*key)),
            Key::Peer(key) => self.peers.remove(&Wire(*key)),
            Key::Port(key) => self.ports.remove(&Wire(*key)),
            Key::Service(key) => self.services.remove(&Wire(*key)),
            Key::Backend(key) => self.backends.remove(&Wire(*key)),
        };
        match removed {
            Err(error) if is_missing(&error) => Ok(()),
            other => other,
        }
    }
}

fn flush<K>(flows: &mut Hash<K, FlowValue>, matches: impl Fn(&K) -> bool) -> Result<(), MapError>
where
    K: zerocopy::FromBytes + zerocopy::IntoBytes + zerocopy::Immutable + Copy + 'static,
{
    let keys: Vec<_> = flows.keys().flatten().filter(|key| matches(&key.0)).collect();
    for key in keys {
        match flows.remove(&key) {
            Err(error) if !is_missing(&error) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn errno(error: &MapError) -> Option<i32> {
    match error {
        MapError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    }
}

fn is_missing(error: &MapError) -> bool {
    matches!(error, MapError::KeyNotFound | MapError::ElementNotFound)
        || errno(error) == Some(libc::ENOENT)
}

fn table_of(step: &Step) -> &'static str {
    match step {
        Step::Put(entry) => entry.table(),
        Step::Delete(Key::Endpoint(_)) => map::ENDPOINTS,
        Step::BumpRow(_) => map::ENDPOINT_ROWS,
        Step::Delete(Key::Interface(_)) => map::INTERFACES,
        Step::Delete(Key::Ipcache(_)) => map::IPCACHE,
        Step::Delete(Key::Chunk(_)) => map::CHUNKS,
        Step::Delete(Key::Peer(_)) => map::PEERS,
        Step::Delete(Key::Port(_)) => map::PORTS,
        Step::Delete(Key::Service(_)) => map::SERVICES,
        Step::Delete(Key::Backend(_)) => map::BACKENDS,
        Step::BumpShard(_) => map::SHARDS,
        Step::FlushFlows(_) => map::FLOWS4,
    }
}

impl Kernel for Maps {
    fn apply(&self, step: &Step) -> Result<(), KernelError> {
        let mut tables = self.lock();
        let done = match step {
            Step::Put(entry) => tables.put(entry),
            Step::Delete(key) => tables.delete(key),
            Step::BumpRow(number) => tables.bump_row(*number),
            Step::BumpShard(address) => tables.bump_shard(address),
            Step::FlushFlows(address) => tables.flush_flows(address),
        };
        done.map_err(|error| {
            let table = table_of(step);
            match errno(&error) {
                Some(libc::E2BIG | libc::ENOSPC) => KernelError::Full { table },
                _ => KernelError::Refused { table, message: describe(&error) },
            }
        })
    }

    fn dump(&self) -> Result<Vec<Entry>, KernelError> {
        let tables = self.lock();
        let mut entries = Vec::new();
        dump_hash(&tables.endpoints, map::ENDPOINTS, &mut entries, Entry::Endpoint)?;
        dump_hash(&tables.interfaces, map::INTERFACES, &mut entries, Entry::Interface)?;
        dump_hash(&tables.chunks, map::CHUNKS, &mut entries, Entry::Chunk)?;
        dump_hash(&tables.peers, map::PEERS, &mut entries, Entry::Peer)?;
        dump_hash(&tables.ports, map::PORTS, &mut entries, Entry::Port)?;
        dump_hash(&tables.services, map::SERVICES, &mut entries, Entry::Service)?;
        dump_hash(&tables.backends, map::BACKENDS, &mut entries, Entry::Backend)?;
        for item in tables.ipcache.iter() {
            let (key, Wire(value)) = item.map_err(refused(map::IPCACHE))?;
            let key = IpcacheKey { prefix_len: key.prefix_len(), address: key.data() };
            entries.push(Entry::Ipcache(key, value));
        }
        for number in 0..limits::ENDPOINT_ROWS {
            let Wire(row) = tables.rows.get(&number, 0).map_err(refused(map::ENDPOINT_ROWS))?;
            if row.flags & row_flags::VALID != 0 {
                entries.push(Entry::Row(number, row));
            }
        }
        Ok(entries)
    }

    fn holds(&self, entry: &Entry) -> Result<bool, KernelError> {
        match self.lock().holds(entry) {
            Err(error) if is_missing(&error) => Ok(false),
            other => other.map_err(refused(entry.table())),
        }
    }
}

fn is<K, V>(table: &Hash<K, V>, key: &K, value: &V) -> Result<bool, MapError>
where
    K: zerocopy::FromBytes + zerocopy::IntoBytes + zerocopy::Immutable + Copy + 'static,
    V: zerocopy::FromBytes + zerocopy::IntoBytes + zerocopy::Immutable + Copy + PartialEq + 'static,
{
    table.get(&Wire(*key), 0).map(|Wire(found)| found == *value)
}

fn dump_hash<K, V>(
    table: &Hash<K, V>,
    name: &'static str,
    entries: &mut Vec<Entry>,
    entry: impl Fn(K, V) -> Entry,
) -> Result<(), KernelError>
where
    K: zerocopy::FromBytes + zerocopy::IntoBytes + zerocopy::Immutable + Copy + 'static,
    V: zerocopy::FromBytes + zerocopy::IntoBytes + zerocopy::Immutable + Copy + 'static,
{
    for item in table.iter() {
        let (Wire(key), Wire(value)) = item.map_err(refused(name))?;
        entries.push(entry(key, value));
    }
    Ok(())
}

fn refused(table: &'static str) -> impl Fn(MapError) -> KernelError {
    move |error| KernelError::Refused { table, message: describe(&error) }
}

/// The whole chain: aya keeps the kernel's word in the source.
fn describe(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        message.push_str(": ");
        message.push_str(&error.to_string());
        source = error.source();
    }
    message
}
