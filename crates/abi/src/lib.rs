//! Everything that the eBPF programs and the host agree on: map keys and values, event records,
//! drop reasons and limits.
//!
//! Pinned maps outlive a binary, so a layout here is a wire format: every type is `repr(C)`,
//! free of padding (zerocopy refuses it otherwise), its size is asserted, and the whole layout is
//! compared with a committed snapshot in the tests. Addresses and ports are in network byte order
//! unless a field says otherwise; an IPv4 address in a 16-byte field is IPv4-mapped
//! (`::ffff:a.b.c.d`, RFC 4291 section 2.5.5.2).
#![no_std]

mod drop_reason;
mod endpoint;
mod event;
mod flow;
mod fragment;
pub mod limits;
mod masquerade;
mod metrics;
mod policy;
mod proxy;
mod service;
mod tunnel;

pub use drop_reason::DropReason;
pub use endpoint::{
    Address, EndpointKey, EndpointRow, EndpointValue, IpcacheKey, IpcacheValue, NODE_NONE,
    ROW_HOST, ROW_NONE, row_flags,
};
pub use event::{Event, EventKind, event_flags};
pub use flow::{FlowCounts, FlowKey4, FlowKey6, FlowValue, flow_direction, flow_flags};
pub use fragment::{FragmentKey, FragmentValue};
pub use masquerade::{MASQUERADE_FIRST_PORT, MasqueradeKey, MasqueradeSettings, MasqueradeValue};
pub use metrics::{METRICS_LEN, MetricsValue, metric_index};
pub use policy::{
    CHUNK_RULES, ChunkKey, ChunkValue, MAX_CHUNKS, PREFIX_ID_BIT, PREFIX_POD_BIT, PeerKey,
    PeerValue, PortKey, PortValue, RULE_NONE, TABLE_ALLOW_ALL, TABLE_NONE, identity, protocol,
};
pub use proxy::{PROXY_PORT, mark};
pub use service::{
    BackendKey, BackendValue, ServiceKey, ServiceValue, SocketKey, SocketValue, service_flags,
};
pub use tunnel::{OVERLAY, TunnelValue, VXLAN_PORT, tunnel_kind};

/// Marks routes and rules as ours; see `/etc/iproute2/rt_protos` for the numbers that others use.
pub const ROUTE_PROTOCOL: u8 = 80;

/// Names of the pinned maps: the file names in a node's bpffs directory.
pub mod map {
    /// [`crate::EndpointKey`] → [`crate::EndpointValue`], hash.
    pub const ENDPOINTS: &str = "ENDPOINTS";
    /// Row number → [`crate::EndpointRow`], array.
    pub const ENDPOINT_ROWS: &str = "ENDPOINT_ROWS";
    /// Host-side interface index (`u32`) → row number (`u32`), hash.
    pub const INTERFACES: &str = "INTERFACES";
    /// [`crate::IpcacheKey`] → [`crate::IpcacheValue`], LPM trie.
    pub const IPCACHE: &str = "IPCACHE";
    /// [`crate::IpcacheKey`] → [`crate::TunnelValue`], LPM trie.
    pub const TUNNELS: &str = "TUNNELS";
    /// Shard number (`u32`) → revision (`u32`), array: one shard per slice of remote addresses.
    pub const SHARDS: &str = "SHARDS";
    /// [`crate::ChunkKey`] → [`crate::ChunkValue`], hash.
    pub const CHUNKS: &str = "CHUNKS";
    /// [`crate::PeerKey`] → [`crate::PeerValue`], hash.
    pub const PEERS: &str = "PEERS";
    /// [`crate::PortKey`] → [`crate::PortValue`], hash.
    pub const PORTS: &str = "PORTS";
    /// [`crate::FlowKey4`] → [`crate::FlowValue`], TCP over IPv4, hash.
    pub const FLOWS4: &str = "FLOWS4";
    /// [`crate::FlowKey6`] → [`crate::FlowValue`], TCP over IPv6, hash.
    pub const FLOWS6: &str = "FLOWS6";
    /// [`crate::FlowCounts`] of each family, array.
    pub const FLOW_COUNTS: &str = "FLOW_COUNTS";
    /// [`crate::FlowKey4`] → [`crate::FlowValue`], every other protocol over IPv4, LRU hash.
    pub const FLOWS4_ANY: &str = "FLOWS4_ANY";
    /// [`crate::FlowKey6`] → [`crate::FlowValue`], every other protocol over IPv6, LRU hash.
    pub const FLOWS6_ANY: &str = "FLOWS6_ANY";
    /// [`crate::ServiceKey`] → [`crate::ServiceValue`], hash.
    pub const SERVICES: &str = "SERVICES";
    /// [`crate::BackendKey`] → [`crate::BackendValue`], hash.
    pub const BACKENDS: &str = "BACKENDS";
    /// [`crate::SocketKey`] → [`crate::SocketValue`], LRU hash.
    pub const SOCKETS: &str = "SOCKETS";
    /// [`crate::FragmentKey`] → [`crate::FragmentValue`], LRU hash.
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// Index 0: [`crate::MasqueradeSettings`], array.
    pub const MASQUERADE: &str = "MASQUERADE";
    /// [`crate::MasqueradeKey`] → [`crate::MasqueradeValue`], TCP, hash.
    pub const MASQUERADED_TCP: &str = "MASQUERADED_TCP";
    /// [`crate::MasqueradeKey`] → [`crate::MasqueradeValue`], every other protocol, LRU hash.
    pub const MASQUERADED: &str = "MASQUERADED";
    /// [`crate::metric_index`] → [`crate::MetricsValue`], per-CPU array.
    pub const METRICS: &str = "METRICS";
    /// [`crate::Event`] records, ring buffer.
    pub const EVENTS: &str = "EVENTS";
}
