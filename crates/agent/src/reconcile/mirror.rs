//! What the kernel's tables hold, as far as the agent wrote or read it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use palisade_abi::{
    Address, BackendKey, BackendValue, EndpointKey, EndpointRow, EndpointValue, IpcacheKey,
    IpcacheValue, PREFIX_ID_BIT, ServiceKey, ServiceValue,
};
use palisade_datapath::{Entry, Key, Step};

use crate::tables::services::Frontend;

/// The address as the kernel's tables have it.
pub fn address_bytes(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// Reads [`address_bytes`].
pub fn address_from(bytes: &Address) -> IpAddr {
    let v6 = Ipv6Addr::from(*bytes);
    v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
}

/// The network as the kernel's table has it.
pub fn ipcache_key(network: IpNet) -> IpcacheKey {
    let base = if matches!(network, IpNet::V4(_)) { 96 } else { 0 };
    IpcacheKey {
        prefix_len: base + u32::from(network.prefix_len()),
        address: address_bytes(network.network()),
    }
}

/// Reads [`ipcache_key`].
pub fn network_from(key: &IpcacheKey) -> Option<IpNet> {
    let length = u8::try_from(key.prefix_len).ok()?;
    match (address_from(&key.address), length.checked_sub(96)) {
        (IpAddr::V4(address), Some(length)) => Ipv4Net::new(address, length).ok().map(IpNet::V4),
        (address, _) => Ipv6Net::new(to_v6(address), length).ok().map(IpNet::V6),
    }
}

fn to_v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

/// The Service address as the kernel's table has it.
pub fn service_key(frontend: Frontend) -> ServiceKey {
    ServiceKey {
        address: address_bytes(frontend.address),
        port: frontend.port.to_be(),
        protocol: frontend.protocol,
        reserved: 0,
    }
}

/// Reads [`service_key`].
pub fn frontend_from(key: &ServiceKey) -> Frontend {
    Frontend {
        address: address_from(&key.address),
        port: u16::from_be(key.port),
        protocol: key.protocol,
    }
}

/// The backend as the kernel's table has it.
pub fn backend_value(backend: SocketAddr) -> BackendValue {
    BackendValue { address: address_bytes(backend.ip()), port: backend.port().to_be(), reserved: 0 }
}

/// The tables that are compared with what is wanted. The compiled policies' entries are not among
/// them: they are many, and `policies` knows which compiled policy each table holds.
#[derive(Debug, Default)]
pub struct Mirror {
    /// `ENDPOINTS`.
    pub addresses: BTreeMap<IpAddr, EndpointValue>,
    /// Valid rows of `ENDPOINT_ROWS`, without their revisions.
    pub rows: BTreeMap<u32, EndpointRow>,
    /// `INTERFACES`.
    pub interfaces: BTreeMap<u32, u32>,
    /// `IPCACHE`.
    pub prefixes: BTreeMap<IpNet, IpcacheValue>,
    /// `SERVICES`.
    pub services: BTreeMap<Frontend, ServiceValue>,
    /// `BACKENDS`.
    pub backends: BTreeMap<(u32, u32), BackendValue>,
    touched: Touched,
}

/// Addresses and networks whose entries were written.
#[derive(Debug, Default)]
pub struct Touched {
    /// Of `ENDPOINTS`.
    pub addresses: BTreeSet<IpAddr>,
    /// Of `IPCACHE`.
    pub networks: BTreeSet<IpNet>,
}

/// Entries of one compiled table.
pub type TableEntries = BTreeMap<Key, Entry>;

impl Mirror {
    /// Sorts a dump: the mirror, and the entries of each compiled table.
    pub fn read(dump: Vec<Entry>) -> (Self, BTreeMap<u32, TableEntries>) {
        let mut mirror = Self::default();
        let mut compiled: BTreeMap<u32, TableEntries> = BTreeMap::new();
        for entry in dump {
            let (table, key) = match &entry {
                Entry::Chunk(key, _) => (key.table, Key::Chunk(*key)),
                Entry::Peer(key, _) => (key.table, Key::Peer(*key)),
                Entry::Port(key, _) => (key.table, Key::Port(*key)),
                _ => {
                    mirror.note(&Step::Put(entry));
                    continue;
                }
            };
            compiled.entry(table).or_default().insert(key, entry);
        }
        (mirror, compiled)
    }

    /// What was written since the last call.
    pub fn take_touched(&mut self) -> Touched {
        std::mem::take(&mut self.touched)
    }

    /// Takes over a step that was performed.
    pub fn note(&mut self, step: &Step) {
        match step {
            Step::Put(entry) => self.put(entry),
            Step::Delete(key) => self.delete(key),
            Step::BumpRow(_) | Step::BumpShard(_) | Step::FlushFlows(_) => {}
        }
    }

    fn put(&mut self, entry: &Entry) {
        match entry {
            Entry::Endpoint(key, value) => {
                let address = address_from(&key.address);
                self.touched.addresses.insert(address);
                self.addresses.insert(address, *value);
            }
            Entry::Row(number, row) if row.flags & palisade_abi::row_flags::VALID == 0 => {
                self.rows.remove(number);
            }
            Entry::Row(number, row) => {
                self.rows.insert(*number, EndpointRow { revision: 0, ..*row });
            }
            Entry::Interface(ifindex, row) => {
                self.interfaces.insert(*ifindex, *row);
            }
            Entry::Ipcache(key, value) => {
                if let Some(network) = network_from(key) {
                    self.touched.networks.insert(network);
                    self.prefixes.insert(network, *value);
                }
            }
            Entry::Service(key, value) => {
                self.services.insert(frontend_from(key), *value);
            }
            Entry::Backend(key, value) => {
                self.backends.insert((key.version, key.index), *value);
            }
            Entry::Chunk(..) | Entry::Peer(..) | Entry::Port(..) => {}
        }
    }

    fn delete(&mut self, key: &Key) {
        match key {
            Key::Endpoint(EndpointKey { address }) => {
                let address = address_from(address);
                self.touched.addresses.insert(address);
                self.addresses.remove(&address);
            }
            Key::Interface(ifindex) => {
                self.interfaces.remove(ifindex);
            }
            Key::Ipcache(key) => {
                if let Some(network) = network_from(key) {
                    self.touched.networks.insert(network);
                    self.prefixes.remove(&network);
                }
            }
            Key::Service(key) => {
                self.services.remove(&frontend_from(key));
            }
            Key::Backend(BackendKey { version, index }) => {
                self.backends.remove(&(*version, *index));
            }
            Key::Chunk(_) | Key::Peer(_) | Key::Port(_) => {}
        }
    }

    /// The policy prefixes in the kernel: a number's own network is the widest that carries it.
    pub fn policy_prefixes(&self) -> BTreeMap<IpNet, u32> {
        let mut widest: BTreeMap<u32, IpNet> = BTreeMap::new();
        for (network, value) in &self.prefixes {
            if value.prefix & PREFIX_ID_BIT == 0 {
                continue;
            }
            let known = widest.entry(value.prefix).or_insert(*network);
            if network.prefix_len() < known.prefix_len() {
                *known = *network;
            }
        }
        widest.into_iter().map(|(id, network)| (network, id)).collect()
    }
}
