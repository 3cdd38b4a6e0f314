/// Port of the proxy's transparent listeners, TCP and UDP, on both loopback addresses.
pub const PROXY_PORT: u16 = 14240;

/// Marks of packets (`skb->mark`) and sockets (`SO_MARK`): which leg of a proxied flow a packet
/// belongs to.
///
/// A mark does not survive the way into another network namespace, so that no pod can set one.
pub mod mark {
    /// The bits that count; the others are somebody else's.
    pub const MASK: u32 = 0x0f00;
    /// For the proxy on this node: a rule by this mark routes it to the node itself.
    pub const TO_PROXY: u32 = 0x0200;
    /// From the proxy: the mark of all its sockets.
    pub const FROM_PROXY: u32 = 0x0400;
    /// A client's packet for the proxy, on its way from `to_pod` to `from_pod` of one interface:
    /// only where packets come in can they be given to a socket.
    pub const CLIENT_AGAIN: u32 = 0x0600;
    /// As [`CLIENT_AGAIN`], a server's.
    pub const SERVER_AGAIN: u32 = 0x0700;
    /// Of sockets only: what they connect to is left as it is, be it a Service. A pod may set this
    /// too; its packets are translated then, in place of its socket.
    pub const PAST_SERVICES: u32 = 0x0800;
}
