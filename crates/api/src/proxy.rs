//! What the agent and the L7 proxy tell each other on `RUN_DIR/proxy.sock`.
//!
//! The agent listens, the proxy connects. Each message is a frame: its length in four bytes, big
//! endian, then JSON; or postcard (<https://postcard.jamesmunns.com>) for what the proxy says, which
//! tells of each request. Each side begins with [`Hello`]; then the agent sends a snapshot of the
//! rules, and deltas as they change. The proxy acknowledges each version once every judgement that
//! begins from then on is made under it.

mod wire;

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use palisade_policy::{CompiledPolicy, RuleSource, l7::Secrets};
use serde::{Deserialize, Serialize};

use crate::flow::L7;

/// Name of the socket in the run directory.
pub const SOCKET: &str = "proxy.sock";
/// User and group that the proxy runs as. Nothing belongs to them but its own directory and the
/// socket.
pub const USER: u32 = 14240;
/// Version of these messages.
pub const VERSION: u32 = 3;
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
    Records(Records),
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

/// What happened, as a message holds it. Many records name the same few rules: each is written and
/// read once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Records {
    rules: Vec<Arc<RuleSource>>,
    records: Vec<AccessRecord<usize>>,
    /// How many more there were since the last message, that nobody kept.
    pub lost: u64,
}

impl Records {
    /// Of records in the order of their ends.
    #[must_use]
    pub fn new(records: Vec<AccessRecord>, lost: u64) -> Self {
        let mut rules = Vec::new();
        let mut places = HashMap::new();
        let mut place = |rule: Arc<RuleSource>| {
            *places.entry(Arc::as_ptr(&rule)).or_insert_with(|| {
                rules.push(rule);
                rules.len() - 1
            })
        };
        let placed = |record: AccessRecord| record.try_map(|rule| Some(place(rule)));
        let records = records.into_iter().filter_map(placed).collect();
        Self { rules, records, lost }
    }

    /// The records; those of the same rule share it.
    ///
    /// # Errors
    ///
    /// A record names a rule that the message does not hold.
    pub fn into_records(self) -> io::Result<Vec<AccessRecord>> {
        let Self { rules, records, .. } = self;
        let named = |record: AccessRecord<usize>| record.try_map(|place| rules.get(place).cloned());
        let records: Option<_> = records.into_iter().map(named).collect();
        records.ok_or_else(|| io::Error::other("a record names a rule that is not with it"))
    }
}

/// One exchange that the proxy judged: a request with its answer, or the refusal of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessRecord<R = Arc<RuleSource>> {
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
    pub egress: Option<EndRecord<R>>,
    /// What the server's ingress policy said; none where the server is no pod of this node, or no
    /// policy selects it.
    pub ingress: Option<EndRecord<R>>,
    /// What was asked and answered.
    #[serde(with = "wire::L7")]
    pub l7: L7,
}

/// What one end's policy said to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndRecord<R = Arc<RuleSource>> {
    /// Whether it agreed.
    pub allowed: bool,
    /// The rule that decided; none: none of the rules matched.
    pub rule: Option<R>,
}

impl<R> AccessRecord<R> {
    /// With rules named in another way, unless one has no such name.
    fn try_map<S>(self, mut name: impl FnMut(R) -> Option<S>) -> Option<AccessRecord<S>> {
        let mut end = |end: Option<EndRecord<R>>| {
            let Some(EndRecord { allowed, rule }) = end else { return Some(None) };
            let Some(rule) = rule else { return Some(Some(EndRecord { allowed, rule: None })) };
            Some(Some(EndRecord { allowed, rule: Some(name(rule)?) }))
        };
        let (egress, ingress) = (end(self.egress)?, end(self.ingress)?);
        let Self { time, protocol, client, server, allowed, l7, .. } = self;
        Some(AccessRecord { time, protocol, client, server, allowed, egress, ingress, l7 })
    }
}

/// A message, and how a frame holds it.
pub trait Message: Sized {
    /// Adds it to a frame.
    ///
    /// # Errors
    ///
    /// The serializer's.
    fn write(&self, frame: &mut Vec<u8>) -> io::Result<()>;
    /// Reads the body of a frame.
    ///
    /// # Errors
    ///
    /// It is no such message.
    fn read(body: &[u8]) -> io::Result<Self>;
}

macro_rules! in_json {
    ($($message:ty),+) => {$(
        impl Message for $message {
            fn write(&self, frame: &mut Vec<u8>) -> io::Result<()> {
                Ok(serde_json::to_writer(frame, self)?)
            }

            fn read(body: &[u8]) -> io::Result<Self> {
                Ok(serde_json::from_slice(body)?)
            }
        }
    )+};
}

in_json!(Hello, ToProxy);

impl Message for FromProxy {
    fn write(&self, frame: &mut Vec<u8>) -> io::Result<()> {
        *frame = postcard::to_extend(self, std::mem::take(frame)).map_err(io::Error::other)?;
        Ok(())
    }

    fn read(body: &[u8]) -> io::Result<Self> {
        postcard::from_bytes(body).map_err(io::Error::other)
    }
}

/// A message as a frame.
///
/// # Errors
///
/// The message is longer than [`MAX_FRAME`].
pub fn encode(message: &impl Message) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; 4];
    message.write(&mut frame)?;
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
pub fn decode<T: Message>(bytes: &[u8]) -> io::Result<Option<(T, usize)>> {
    let Some((prefix, rest)) = bytes.split_first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_be_bytes(*prefix) as usize;
    if length > MAX_FRAME {
        return Err(io::Error::other(format!("a frame of {length} bytes; at most {MAX_FRAME}")));
    }
    let Some(body) = rest.get(..length) else { return Ok(None) };
    Ok(Some((T::read(body)?, 4 + length)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(rule: Option<&Arc<RuleSource>>) -> AccessRecord {
        let address = ([10, 0, 0, 1], 80).into();
        AccessRecord {
            time: 0,
            protocol: 6,
            client: address,
            server: address,
            allowed: false,
            egress: rule.map(|rule| EndRecord { allowed: true, rule: Some(Arc::clone(rule)) }),
            ingress: Some(EndRecord { allowed: false, rule: None }),
            l7: L7::Stream { error: String::new() },
        }
    }

    fn passed_on(sent: Records) -> Vec<AccessRecord> {
        let frame = encode(&FromProxy::Records(sent)).unwrap();
        let Ok(Some((FromProxy::Records(got), length))) = decode(&frame) else { unreachable!() };
        assert_eq!(length, frame.len());
        got.into_records().unwrap()
    }

    /// Whatever is left out where people read it.
    #[test]
    fn what_the_proxy_saw_is_read_as_it_was_written() {
        let l7 = [
            r#"{"http": {"method": "GET", "url": "http://a/", "version": "HTTP/2", "status": null,
                "latency_ns": 1}}"#,
            r#"{"http": {"method": "", "url": "", "version": "", "status": 403, "grpc_status": 7,
                "latency_ns": 0, "mismatches": ["x"], "error": "e"}}"#,
            r#"{"dns": {"query": "a", "qtype": "A", "rcode": null, "latency_ns": 1}}"#,
            r#"{"dns": {"query": "a", "qtype": "AAAA", "rcode": "NOERROR", "addresses":
                ["10.0.0.1", "fd00::1"], "ttl": 5, "latency_ns": 1, "error": "e"}}"#,
            r#"{"tls": {"server_name": null}}"#,
            r#"{"tls": {"server_name": "a", "error": "e"}}"#,
            r#"{"stream": {"error": "e"}}"#,
        ];
        let of = |l7| AccessRecord { l7: serde_json::from_str(l7).unwrap(), ..record(None) };
        let records: Vec<_> = l7.into_iter().map(of).collect();
        assert_eq!(passed_on(Records::new(records.clone(), 0)), records);
        for length in 1..8 {
            let frame = encode(&FromProxy::Ack { version: u64::MAX }).unwrap();
            let body = &frame[4..];
            assert!(FromProxy::read(&body[..body.len() - length]).is_err(), "{length}");
        }
    }

    #[test]
    fn records_of_one_rule_share_it() {
        let rules = [Arc::new(RuleSource::NoDefaultDeny), Arc::new(RuleSource::AllowLocalhost)];
        let records: Vec<_> =
            [Some(0), Some(1), None, Some(0)].map(|n| record(n.map(|n: usize| &rules[n]))).into();
        let sent = Records::new(records.clone(), 3);
        assert_eq!((sent.rules.len(), sent.lost), (2, 3));
        let got = passed_on(sent);
        assert_eq!(got, records);
        let rule = |n: usize| got[n].egress.as_ref().unwrap().rule.as_ref().unwrap();
        assert!(Arc::ptr_eq(rule(0), rule(3)));
    }

    #[test]
    fn a_rule_that_is_not_with_the_records_is_told_of() {
        let sent = Records::new(vec![record(Some(&Arc::new(RuleSource::NoDefaultDeny)))], 0);
        let error = Records { rules: Vec::new(), ..sent }.into_records().unwrap_err();
        assert!(error.to_string().contains("rule"), "{error}");
    }
}
