//! What the agent and the L7 proxy tell each other on `RUN_DIR/proxy.sock`.
//!
//! The agent listens, the proxy connects. Each message is a frame: its length in four bytes, big
//! endian, then JSON. Each side begins with [`Hello`]; then the agent sends a snapshot of the rules,
//! and deltas as they change. The proxy acknowledges each version once every judgement that begins
//! from then on is made under it.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use palisade_policy::{CompiledPolicy, RuleSource, l7::Secrets};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::flow::L7;

/// Name of the socket in the run directory.
pub const SOCKET: &str = "proxy.sock";
/// User and group that the proxy runs as. Nothing belongs to them but its own directory and the
/// socket.
pub const USER: u32 = 14240;
/// Version of these messages.
pub const VERSION: u32 = 1;
/// Longest frame.
pub const MAX_FRAME: usize = 64 << 20;

/// The first message each way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`]; a side that gets another one closes the connection.
    pub version: u32,
}

/// What the agent says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToProxy {
    /// The rules, whole.
    Snapshot(Rules),
    /// What changed since the version before.
    Delta(RulesDelta),
    /// The kernel lets the client reach what it learned.
    Learned {
        /// Of the [`FromProxy::Learn`].
        id: u64,
    },
    /// The client must not get the answer.
    LearnRefused {
        /// Of the [`FromProxy::Learn`].
        id: u64,
    },
}

/// What the proxy says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromProxy {
    /// Whatever is judged from now on is judged under this version.
    Ack {
        /// Of the rules.
        version: u64,
    },
    /// A client is about to hear the addresses of a name.
    Learn {
        /// Comes back in the answer.
        id: u64,
        /// Who asked.
        client: IpAddr,
        /// Lower case, without the trailing dot.
        name: String,
        /// What the client would hear.
        addresses: Vec<IpAddr>,
        /// Seconds for which it holds.
        ttl: u32,
    },
    /// What happened.
    Records {
        /// In the order of their ends.
        records: Vec<AccessRecord>,
        /// How many more there were since the last message, that nobody kept.
        lost: u64,
    },
}

/// The number of a table, as the kernel's.
pub type TableId = u32;

/// All that the proxy judges by.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// Grows with each change.
    pub version: u64,
    /// Pods of this node, by each of their addresses.
    pub endpoints: BTreeMap<IpAddr, Endpoint>,
    /// Compiled policies.
    pub tables: BTreeMap<TableId, Arc<CompiledPolicy>>,
    /// Pods and nodes of the cluster.
    pub addresses: BTreeMap<IpAddr, Peer>,
    /// Networks: the longest one that contains an address tells what it is.
    pub networks: BTreeMap<IpNet, Peer>,
    /// Values for the header rules.
    pub secrets: Secrets,
}

/// A pod of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Its number.
    pub id: u32,
    /// Security identity.
    pub identity: u32,
    /// Table of what it may receive; none: everything.
    pub ingress: Option<TableId>,
    /// Table of what it may send; none: everything.
    pub egress: Option<TableId>,
}

/// What an address is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Security identity.
    pub identity: u32,
    /// Number of the longest policy prefix, 0: none.
    pub prefix: u32,
    /// An address of this very node.
    #[serde(default)]
    pub host: bool,
}

/// The difference between two [`Rules`]; `None` takes an entry away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RulesDelta {
    /// Version that it applies to.
    pub from: u64,
    /// Version that it makes.
    pub version: u64,
    /// As [`Rules::endpoints`].
    pub endpoints: BTreeMap<IpAddr, Option<Endpoint>>,
    /// As [`Rules::tables`].
    pub tables: BTreeMap<TableId, Option<Arc<CompiledPolicy>>>,
    /// As [`Rules::addresses`].
    pub addresses: BTreeMap<IpAddr, Option<Peer>>,
    /// As [`Rules::networks`].
    pub networks: BTreeMap<IpNet, Option<Peer>>,
    /// All of them, where one changed.
    pub secrets: Option<Secrets>,
}

/// The delta is for other rules than those at hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the delta applies to version {from}, the rules have version {have}; send a snapshot")]
pub struct WrongVersion {
    /// What the delta applies to.
    pub from: u64,
    /// What is there.
    pub have: u64,
}

impl RulesDelta {
    /// What makes `new` of `old`.
    #[must_use]
    pub fn between(old: &Rules, new: &Rules) -> Self {
        Self {
            from: old.version,
            version: new.version,
            endpoints: changed(&old.endpoints, &new.endpoints),
            tables: changed(&old.tables, &new.tables),
            addresses: changed(&old.addresses, &new.addresses),
            networks: changed(&old.networks, &new.networks),
            secrets: (old.secrets != new.secrets).then(|| new.secrets.clone()),
        }
    }
}

impl Rules {
    /// Takes a delta in.
    ///
    /// # Errors
    ///
    /// The delta is for another version; nothing is changed.
    pub fn apply(&mut self, delta: RulesDelta) -> Result<(), WrongVersion> {
        if delta.from != self.version {
            return Err(WrongVersion { from: delta.from, have: self.version });
        }
        self.version = delta.version;
        change(&mut self.endpoints, delta.endpoints);
        change(&mut self.tables, delta.tables);
        change(&mut self.addresses, delta.addresses);
        change(&mut self.networks, delta.networks);
        if let Some(secrets) = delta.secrets {
            self.secrets = secrets;
        }
        Ok(())
    }
}

fn changed<K: Ord + Clone, V: PartialEq + Clone>(
    old: &BTreeMap<K, V>,
    new: &BTreeMap<K, V>,
) -> BTreeMap<K, Option<V>> {
    let gone = old.keys().filter(|key| !new.contains_key(key)).map(|key| (key.clone(), None));
    let come = new
        .iter()
        .filter(|(key, value)| old.get(key) != Some(value))
        .map(|(key, value)| (key.clone(), Some(value.clone())));
    gone.chain(come).collect()
}

fn change<K: Ord, V>(map: &mut BTreeMap<K, V>, changes: BTreeMap<K, Option<V>>) {
    for (key, value) in changes {
        match value {
            Some(value) => map.insert(key, value),
            None => map.remove(&key),
        };
    }
}

/// One exchange that the proxy judged: a request with its answer, or the refusal of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessRecord {
    /// When it was judged: nanoseconds since 1970, UTC.
    pub time: u64,
    /// IP protocol.
    pub protocol: u8,
    /// Who asked.
    pub client: SocketAddr,
    /// Who was asked.
    pub server: SocketAddr,
    /// Whether it went on to the server.
    pub allowed: bool,
    /// What the client's egress policy said; none where the client is no pod of this node, or no
    /// policy selects it.
    pub egress: Option<EndRecord>,
    /// What the server's ingress policy said; none where the server is no pod of this node, or no
    /// policy selects it.
    pub ingress: Option<EndRecord>,
    /// What was asked and answered.
    pub l7: L7,
}

/// What one end's policy said to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndRecord {
    /// Whether it agreed.
    pub allowed: bool,
    /// The rule that decided; none: none of the rules matched.
    pub rule: Option<Arc<RuleSource>>,
}

/// A message as a frame.
///
/// # Errors
///
/// The message is longer than [`MAX_FRAME`].
pub fn encode<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, message)?;
    let length = frame.len() - 4;
    let prefix = u32::try_from(length).ok().filter(|_| length <= MAX_FRAME).ok_or_else(|| {
        io::Error::other(format!("a message of {length} bytes; at most {MAX_FRAME} fit a frame"))
    })?;
    frame[..4].copy_from_slice(&prefix.to_be_bytes());
    Ok(frame)
}

/// Takes a frame apart: the message and the bytes that it took, `None` while it is not complete.
///
/// # Errors
///
/// The frame is too long, or holds no message.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<Option<(T, usize)>> {
    let Some((prefix, rest)) = bytes.split_first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_be_bytes(*prefix) as usize;
    if length > MAX_FRAME {
        return Err(io::Error::other(format!("a frame of {length} bytes; at most {MAX_FRAME}")));
    }
    let Some(body) = rest.get(..length) else { return Ok(None) };
    Ok(Some((serde_json::from_slice(body)?, 4 + length)))
}
