//! The way to the proxy: what bears the mark is delivered on this node, whatever its destination.

use std::net::IpAddr;

use palisade_abi::mark;

use super::{Netlink, NetlinkError, find_link, message};

/// Routing table of the way to the proxy; the tables of other software have other numbers.
pub(super) const TABLE: u32 = 14_240;
/// Before the rules of the main table (32766), after the node's own addresses (0).
pub(super) const PRIORITY: u32 = 100;

impl Netlink {
    /// Makes the node deliver to the proxy what bears its mark. Repeating it is harmless. `self` is
    /// the node's namespace.
    pub async fn steer_to_proxy(&self) -> Result<(), NetlinkError> {
        self.run(|socket| {
            let lo = find_link(socket, "lo")?.ok_or(NetlinkError::NoSuchLink("lo".into()))?;
            let mut calls = Vec::new();
            for unspecified in [IpAddr::from([0_u8; 4]), IpAddr::from([0_u8; 16])] {
                calls.push(message::local_route(unspecified, lo.ifindex, TABLE));
                calls.push(message::mark_rule(
                    unspecified,
                    (mark::TO_PROXY, mark::MASK),
                    TABLE,
                    PRIORITY,
                ));
            }
            socket.batch(calls)
        })
        .await
    }
}
