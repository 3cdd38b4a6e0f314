//! The maps, pinned by name in the node's bpffs directory so that they outlive the agent.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf},
};
use palisade_abi::{
    Address, BackendKey, BackendValue, ChunkKey, ChunkValue, EndpointKey, EndpointRow,
    EndpointValue, FlowCounts, FlowKey4, FlowKey6, FlowValue, FragmentKey, FragmentValue,
    IpcacheValue, METRICS_LEN, MasqueradeKey, MasqueradeSettings, MasqueradeValue, MetricsValue,
    PeerKey, PeerValue, PortKey, PortValue, ServiceKey, ServiceValue, SocketKey, SocketValue,
    TunnelValue, limits,
};

// Policy and service tables change while packets read them. Without preallocation an element that
// was replaced lives on until its readers are done (RCU); a preallocated one would be reused at
// once, and a reader could see half of two values.
#[map]
pub static ENDPOINTS: HashMap<EndpointKey, EndpointValue> =
    HashMap::pinned(limits::ENDPOINTS, BPF_F_NO_PREALLOC);
#[map]
pub static ENDPOINT_ROWS: Array<EndpointRow> = Array::pinned(limits::ENDPOINT_ROWS, 0);
#[map]
pub static INTERFACES: HashMap<u32, u32> = HashMap::pinned(limits::ENDPOINT_ROWS, 0);
#[map]
pub static IPCACHE: LpmTrie<Address, IpcacheValue> =
    LpmTrie::pinned(limits::IPCACHE, BPF_F_NO_PREALLOC);
#[map]
pub static TUNNELS: LpmTrie<Address, TunnelValue> =
    LpmTrie::pinned(limits::TUNNELS, BPF_F_NO_PREALLOC);
#[map]
pub static SHARDS: Array<u32> = Array::pinned(limits::SHARDS, 0);
#[map]
pub static CHUNKS: HashMap<ChunkKey, ChunkValue> =
    HashMap::pinned(limits::CHUNKS, BPF_F_NO_PREALLOC);
#[map]
pub static PEERS: HashMap<PeerKey, PeerValue> = HashMap::pinned(limits::PEERS, BPF_F_NO_PREALLOC);
#[map]
pub static PORTS: HashMap<PortKey, PortValue> = HashMap::pinned(limits::PORTS, BPF_F_NO_PREALLOC);

// TCP: preallocated, so that an insert is cheap and a flood cannot evict live flows; the agent
// collects what expired. Everything else has no end to wait for: LRU.
#[map]
pub static FLOWS4: HashMap<FlowKey4, FlowValue> = HashMap::pinned(limits::FLOWS_TCP, 0);
#[map]
pub static FLOWS6: HashMap<FlowKey6, FlowValue> = HashMap::pinned(limits::FLOWS_TCP, 0);
/// So that no few endpoints fill them.
#[map]
pub static FLOW_COUNTS: Array<FlowCounts> = Array::pinned(2, 0);
#[map]
pub static FLOWS4_ANY: LruHashMap<FlowKey4, FlowValue> = LruHashMap::pinned(limits::FLOWS_ANY, 0);
#[map]
pub static FLOWS6_ANY: LruHashMap<FlowKey6, FlowValue> = LruHashMap::pinned(limits::FLOWS_ANY, 0);
#[map]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentValue> =
    LruHashMap::pinned(limits::FRAGMENTS, 0);

#[map]
pub static SERVICES: HashMap<ServiceKey, ServiceValue> =
    HashMap::pinned(limits::SERVICES, BPF_F_NO_PREALLOC);
#[map]
pub static BACKENDS: HashMap<BackendKey, BackendValue> =
    HashMap::pinned(limits::BACKENDS, BPF_F_NO_PREALLOC);
#[map]
pub static SOCKETS: LruHashMap<SocketKey, SocketValue> = LruHashMap::pinned(limits::SOCKETS, 0);

#[map]
pub static MASQUERADE: Array<MasqueradeSettings> = Array::pinned(1, 0);
// As with flows: nobody's flood takes a TCP connection its port, and the agent collects. Most nodes
// need a small part of it, so nothing is allocated before.
#[map]
pub static MASQUERADED_TCP: HashMap<MasqueradeKey, MasqueradeValue> =
    HashMap::pinned(limits::MASQUERADED_TCP, BPF_F_NO_PREALLOC);
/// A full table evicts the port that was used last; its flow gets another, or the same one again.
#[map]
pub static MASQUERADED: LruHashMap<MasqueradeKey, MasqueradeValue> =
    LruHashMap::pinned(limits::MASQUERADED, 0);

#[map]
pub static METRICS: PerCpuArray<MetricsValue> = PerCpuArray::pinned(METRICS_LEN, 0);
#[map]
pub static EVENTS: RingBuf = RingBuf::pinned(limits::EVENTS_BYTES, 0);
/// Index 0: the kernel's timer frequency (`CONFIG_HZ`), written by the loader.
#[map]
pub static SETTINGS: Array<u32> = Array::pinned(1, 0);
