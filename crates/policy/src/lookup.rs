//! The kernel's lookups, step by step.

use palisade_abi::{PREFIX_POD_BIT, identity};

use crate::compile::Chunk;

impl Chunk {
    /// Rules that match a peer.
    pub(crate) fn peers_of(&self, id: u32, prefix: u32) -> u128 {
        let of_identity = self.peers.get(&id).copied().unwrap_or(self.default_peers);
        let key = match prefix {
            0 => return of_identity,
            plain if identity::is_world(id) => plain,
            plain => plain | PREFIX_POD_BIT,
        };
        of_identity | self.peers.get(&key).copied().unwrap_or(0)
    }

    /// Rules that match a protocol and port.
    pub(crate) fn ports_of(&self, protocol: u8, port: u16) -> u128 {
        (0..=16u8)
            .rev()
            .find_map(|len| self.ports.get(&(protocol, len, port & mask(len))))
            .copied()
            .unwrap_or(self.default_ports)
    }
}

/// The leading bits of a port.
pub(crate) fn mask(len: u8) -> u16 {
    u16::MAX.checked_shl(u32::from(16 - len)).unwrap_or(0)
}
