//! The overlay between nodes: VXLAN.

use core::mem::size_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Address;

/// The overlay's interface.
pub const OVERLAY: &str = "palisade_vxlan";
/// UDP port of the overlay.
pub const VXLAN_PORT: u16 = 8472;

/// Values of [`TunnelValue::kind`].
pub mod tunnel_kind {
    /// A network of the node's pods: it has no business outside the tunnel.
    pub const PODS: u32 = 1;
    /// An address of the node itself.
    pub const NODE: u32 = 2;
}

/// Value of `TUNNELS`: from which node alone a source in the network may come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TunnelValue {
    /// The node's end of the tunnel.
    pub node: Address,
    /// One of [`tunnel_kind`].
    pub kind: u32,
}

const _: () = assert!(size_of::<TunnelValue>() == 20);
