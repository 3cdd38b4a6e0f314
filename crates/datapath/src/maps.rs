//! The pinned maps, typed.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap as Assigned},
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
};

use aya::{
    Ebpf,
    maps::{Array, HashMap, LpmTrie, MapData, MapError, PerCpuArray, lpm_trie::Key as LpmKey},
};
use palisade_abi::{
    Address, BackendKey, BackendValue, ChunkKey, ChunkValue, DropReason, EndpointKey, EndpointRow,
    EndpointValue, Event, EventKind, FlowCounts, FlowKey4, FlowKey6, FlowValue, IpcacheKey,
    IpcacheValue, METRICS_LEN, MasqueradeKey, MasqueradeSettings, MasqueradeValue, MetricsValue,
    PeerKey, PeerValue, PortKey, PortValue, ServiceKey, ServiceValue, TunnelValue, event_flags,
    flow_flags, limits, map, metric_index, row_flags,
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
    flow_counts: Array<MapData, Wire<FlowCounts>>,
    masquerade: Array<MapData, Wire<MasqueradeSettings>>,
    masqueraded: Hash<MasqueradeKey, MasqueradeValue>,
    /// Ports that no flow had when flows were collected last, and whose they were.
    idle: Assigned<MasqueradeKey, MasqueradeValue>,
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
            flow_counts: take(object, map::FLOW_COUNTS)?,
            masquerade: take(object, map::MASQUERADE)?,
            masqueraded: take(object, map::MASQUERADED_TCP)?,
            idle: Assigned::new(),
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

    /// Has every flow judged again, by the tables as they are. Who wrote them before may have died
    /// after a change and before the revision of what it concerns was bumped: whoever finds the change
    /// made would not bump it either.
    pub(crate) fn judge_again(&self) -> Result<(), MapError> {
        let mut tables = self.lock();
        (1..limits::ENDPOINT_ROWS).try_for_each(|row| tables.bump_row(row))?;
        (0..limits::SHARDS).try_for_each(|shard| tables.bump_shard(shard))
    }

    /// Removes the TCP flows that expired before `now` (low 32 bits of the jiffies), and brings what
    /// follows from flows in line: how many each endpoint has, and whose which ports are.
    pub(crate) fn collect_flows(&self, now: u32, time: u64) -> Result<FlowStats, MapError> {
        let mut tables = self.lock();
        let mut found = Found::new(now, time);
        let before = tables.flow_counts.get(&FlowCounts::IPV4, 0)?;
        collect(&mut tables.flows4[0], &mut found);
        tables.recount(FlowCounts::IPV4, &before, &mut found)?;
        let before = tables.flow_counts.get(&FlowCounts::IPV6, 0)?;
        collect(&mut tables.flows6[0], &mut found);
        tables.recount(FlowCounts::IPV6, &before, &mut found)?;
        tables.free_ports(&found.ports);
        Ok(found.stats)
    }

    /// Enters the ports of masqueraded TCP flows that are not known, as those of flows that an agent
    /// of another version left.
    pub(crate) fn recall_ports(&self, now: u32) -> Result<(), MapError> {
        let mut tables = self.lock();
        let mut ports = Assigned::new();
        living(&tables.flows4[0], now).for_each(|(key, flow)| note_port(&key, &flow, &mut ports));
        living(&tables.flows6[0], now).for_each(|(key, flow)| note_port(&key, &flow, &mut ports));
        for (key, owner) in ports {
            match tables.masqueraded.insert(Wire(key), Wire(owner), BPF_NOEXIST) {
                Err(error) if errno(&error) != Some(libc::EEXIST) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// The pairs of addresses that have a flow that does not expire before `now` (low 32 bits of
    /// the jiffies), the lower address first.
    pub(crate) fn live_pairs(&self, now: u32) -> BTreeSet<(IpAddr, IpAddr)> {
        let tables = self.lock();
        let mut pairs = BTreeSet::new();
        for flows in &tables.flows4 {
            let ends = |(key, _): (FlowKey4, _)| (IpAddr::from(key.low), IpAddr::from(key.high));
            pairs.extend(living(flows, now).map(ends));
        }
        for flows in &tables.flows6 {
            let ends = |(key, _): (FlowKey6, _)| (IpAddr::from(key.low), IpAddr::from(key.high));
            pairs.extend(living(flows, now).map(ends));
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

/// `BPF_NOEXIST`: what is there stays.
const BPF_NOEXIST: u64 = 1;

fn mapped(ipv4: [u8; 4]) -> Address {
    std::net::Ipv4Addr::from(ipv4).to_ipv6_mapped().octets()
}

fn unmapped(address: Address) -> [u8; 4] {
    let [.., a, b, c, d] = address;
    [a, b, c, d]
}

/// An end of a flow; the port as the kernel has it.
type End = (Address, u16);

/// What the keys of both families say.
trait FlowKey: zerocopy::FromBytes + zerocopy::IntoBytes + zerocopy::Immutable + Copy {
    const IPV6: bool;
    /// Of a TCP or UDP flow between two ends, the lower of them first.
    fn of(ends: [End; 2], protocol: u8) -> Self;
    /// The lower end first.
    fn ends(&self) -> [End; 2];
    fn protocol(&self) -> u8;
    fn direction(&self) -> u8;
}

impl FlowKey for FlowKey4 {
    const IPV6: bool = false;

    fn of([(low, low_port), (high, high_port)]: [End; 2], protocol: u8) -> Self {
        let [low, high] = [low, high].map(unmapped);
        Self { low, high, low_port, high_port, protocol, direction: 0, reserved: 0 }
    }

    fn ends(&self) -> [End; 2] {
        [(mapped(self.low), self.low_port), (mapped(self.high), self.high_port)]
    }

    fn protocol(&self) -> u8 {
        self.protocol
    }

    fn direction(&self) -> u8 {
        self.direction
    }
}

impl FlowKey for FlowKey6 {
    const IPV6: bool = true;

    fn of([(low, low_port), (high, high_port)]: [End; 2], protocol: u8) -> Self {
        Self { low, high, low_port, high_port, protocol, direction: 0, reserved: 0 }
    }

    fn ends(&self) -> [End; 2] {
        [(self.low, self.low_port), (self.high, self.high_port)]
    }

    fn protocol(&self) -> u8 {
        self.protocol
    }

    fn direction(&self) -> u8 {
        self.direction
    }
}

/// Who opened the flow, and the other end.
fn opener_first(key: &impl FlowKey, flow: &FlowValue) -> [End; 2] {
    let [low, high] = key.ends();
    if flow.flags & flow_flags::OPENER_HIGH != 0 { [high, low] } else { [low, high] }
}

/// The flow's port on the node, if it has one.
fn note_port(
    key: &impl FlowKey,
    flow: &FlowValue,
    ports: &mut Assigned<MasqueradeKey, MasqueradeValue>,
) {
    if flow.masquerade_port == 0 {
        return;
    }
    let [(address, port), (remote, remote_port)] = opener_first(key, flow);
    let (protocol, direction) = (key.protocol(), key.direction());
    let node = flow.masquerade_port;
    ports.insert(
        MasqueradeKey { remote, remote_port, port: node, protocol, reserved: [0; 3] },
        MasqueradeValue { address, port, direction, reserved: 0 },
    );
}

fn close_event<K: FlowKey>(key: &K, flow: &FlowValue, time: u64) -> Event {
    let [source, destination] = opener_first(key, flow);
    let mut event: Event = zerocopy::FromZeros::new_zeroed();
    event.time = time;
    event.kind = EventKind::Close as u8;
    event.protocol = key.protocol();
    (event.source, event.source_port) = (source.0, u16::from_be(source.1));
    (event.destination, event.destination_port) = (destination.0, u16::from_be(destination.1));
    if K::IPV6 {
        event.flags |= event_flags::IPV6;
    }
    event.fill_flow(flow, true, true);
    event
}

fn has_expired(flow: &FlowValue, now: u32) -> bool {
    flow.expires.wrapping_sub(now).cast_signed() < 0
}

fn living<K: FlowKey + 'static>(
    flows: &Hash<K, FlowValue>,
    now: u32,
) -> impl Iterator<Item = (K, FlowValue)> {
    let flows = flows.iter().flatten().map(|(Wire(key), Wire(flow))| (key, flow));
    flows.filter(move |(_, flow)| !has_expired(flow, now))
}

/// What a collection comes across.
struct Found {
    now: u32,
    time: u64,
    stats: FlowStats,
    /// Living flows of the family.
    counts: FlowCounts,
    ports: Assigned<MasqueradeKey, MasqueradeValue>,
}

impl Found {
    fn new(now: u32, time: u64) -> Self {
        let (stats, counts) = (FlowStats::default(), FlowCounts::NONE);
        Self { now, time, stats, counts, ports: Assigned::new() }
    }

    fn note(&mut self, key: &impl FlowKey, flow: &FlowValue) {
        self.stats.live += 1;
        self.counts.all += 1;
        if let Some(count) = self.counts.of_row.get_mut(flow.payer() as usize) {
            *count += 1;
        }
        note_port(key, flow, &mut self.ports);
    }
}

fn collect<K: FlowKey + 'static>(flows: &mut Hash<K, FlowValue>, found: &mut Found) {
    let now = found.now;
    let mut gone = Vec::new();
    for (key, Wire(flow)) in flows.iter().flatten() {
        if has_expired(&flow, now) {
            gone.push((key, flow));
        } else {
            found.note(&key.0, &flow);
        }
    }
    for (key, flow) in gone {
        // A packet may have revived it since.
        if let Ok(Wire(flow)) = flows.get(&key, 0)
            && !has_expired(&flow, now)
        {
            found.note(&key.0, &flow);
            continue;
        }
        if flows.remove(&key).is_err() {
            continue;
        }
        release(flows, &key.0, &flow);
        let hidden = flow_flags::CLOSE_LOGGED | flow_flags::KEPT | flow_flags::UPSTREAM;
        if flow.flags & hidden == 0 {
            found.stats.closed.push(close_event(&key.0, &flow, found.time));
        }
    }
}

/// The entry that keeps a flow with its backend goes with the flow: it is of no use any more, and
/// the client's port is free for any backend.
fn release<K: FlowKey + 'static>(flows: &mut Hash<K, FlowValue>, key: &K, flow: &FlowValue) {
    if flow.flags & (flow_flags::TRANSLATED | flow_flags::KEPT) != flow_flags::TRANSLATED {
        return;
    }
    let [client, backend] = opener_first(key, flow);
    let mut ends = [client, (flow.nat_address, flow.nat_port)];
    ends.sort_by_key(|(address, port)| (*address, u16::from_be(*port)));
    let kept = Wire(K::of(ends, key.protocol()));
    let Ok(Wire(found)) = flows.get(&kept, 0) else { return };
    // The port may be in use again.
    let in_use = flows.get(&Wire(*key), 0).is_ok();
    let same = (found.nat_address, found.nat_port) == backend;
    if found.flags & flow_flags::KEPT != 0 && same && !in_use {
        // It is as good as gone if it cannot be removed: it expires.
        let _ = flows.remove(&kept);
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
    /// Flows that were opened since `before` may or may not be among those that were `found`: they
    /// count in any case, until the next time.
    fn recount(
        &mut self,
        family: u32,
        Wire(before): &Wire<FlowCounts>,
        found: &mut Found,
    ) -> Result<(), MapError> {
        let Wire(mut counts) = self.flow_counts.get(&family, 0)?;
        let found = std::mem::replace(&mut found.counts, FlowCounts::NONE);
        let settle = |count: &mut u64, before: u64, found: u64| {
            *count = count.saturating_sub(before) + found;
        };
        settle(&mut counts.all, before.all, found.all);
        for ((count, before), found) in
            counts.of_row.iter_mut().zip(before.of_row).zip(found.of_row)
        {
            settle(count, before, found);
        }
        self.flow_counts.set(family, Wire(counts), 0)
    }

    /// Frees the ports of flows that are no more. A flow may be younger than the look at flows, or
    /// have escaped it: only who is missed twice at the same port is gone.
    fn free_ports(&mut self, used: &Assigned<MasqueradeKey, MasqueradeValue>) {
        let known = self.masqueraded.keys().flatten().map(|Wire(key)| key);
        let unused: Vec<_> = known.filter(|key| !used.contains_key(key)).collect();
        let owner = |key: &MasqueradeKey| self.masqueraded.get(&Wire(*key), 0).ok();
        let idle: Assigned<_, _> = unused
            .into_iter()
            .filter_map(|key| owner(&key).map(|Wire(owner)| (key, owner)))
            .collect();
        for (key, owner) in &idle {
            if self.idle.get(key) == Some(owner) {
                // What is gone is free.
                let _ = self.masqueraded.remove(&Wire(*key));
            }
        }
        self.idle = idle;
    }

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

    fn bump_shard(&mut self, shard: u32) -> Result<(), MapError> {
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
    let keys = flows.keys().collect::<Result<Vec<_>, _>>()?;
    for key in keys.into_iter().filter(|key| matches(&key.0)) {
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
            Step::BumpShard(address) => tables.bump_shard(shard_of(address)),
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
