//! Sizes of the kernel's tables. A full table never opens anything: see each map's writer.

/// Local endpoints of a node, the reserved rows included.
pub const ENDPOINT_ROWS: u32 = 4096;
/// Pod and node addresses of the whole cluster.
pub const ENDPOINTS: u32 = 131_072;
/// CIDR prefixes that policies or the cluster's own networks name.
pub const IPCACHE: u32 = 131_072;
/// Networks and addresses of other nodes, with an overlay.
pub const TUNNELS: u32 = 65_536;
/// Slices of remote addresses with a revision of their own. A power of two.
pub const SHARDS: u32 = 4096;
/// Chunks of compiled rules over all groups, directions and versions.
pub const CHUNKS: u32 = 16_384;
/// Peer bitmaps over all chunks.
pub const PEERS: u32 = 1_048_576;
/// Port bitmaps over all chunks.
pub const PORTS: u32 = 262_144;
/// TCP flows per family.
pub const FLOWS_TCP: u32 = 131_072;
/// TCP flows that one endpoint can have for each of its family that is free: alone it fills three
/// quarters of the table, the next one three quarters of the rest, so that no few endpoints fill it.
pub const FLOWS_TCP_PER_FREE: u64 = 3;
/// With so many no more are opened to it from elsewhere, which fill half of the table at most: the
/// rest is for those that it opens itself.
pub const FLOWS_TCP_FROM_ELSEWHERE_PER_FREE: u64 = 1;
/// Flows of other protocols per family.
pub const FLOWS_ANY: u32 = 65_536;
/// Service addresses (frontend address, port and protocol).
pub const SERVICES: u32 = 65_536;
/// Backends over all services and versions.
pub const BACKENDS: u32 = 262_144;
/// Nanoseconds for each datagram that an endpoint sends to a name server through the proxy: it may
/// send 5,000 a second, a third of what one core of the proxy answers.
pub const QUESTION_NANOS: u64 = 200_000;
/// As many it may send at once, after some time without any.
pub const QUESTIONS_AT_ONCE: u64 = 1000;
/// Sockets whose peer was translated.
pub const SOCKETS: u32 = 131_072;
/// Fragmented datagrams in flight.
pub const FRAGMENTS: u32 = 8192;
/// Ports of masqueraded TCP flows: one for each flow that there can be.
pub const MASQUERADED_TCP: u32 = 2 * FLOWS_TCP;
/// Ports of masqueraded flows of other protocols.
pub const MASQUERADED: u32 = 2 * FLOWS_ANY;
/// Bytes of the event ring.
pub const EVENTS_BYTES: u32 = 2 << 20;
