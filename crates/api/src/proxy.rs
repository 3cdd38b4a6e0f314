//! What the agent and the L7 proxy tell each other on `RUN_DIR/proxy.sock`.
//!
//! The agent listens, the proxy connects. Each message is a frame: its length in four bytes, big
//! endian, then JSON; or postcard (<https://postcard.jamesmunns.com>) for what the proxy says, which
//! tells of each request. Each side begins with [`Hello`]; then the agent sends a snapshot of the
//! rules, and deltas as they change. The proxy acknowledges each version once every judgement that
//! begins from then on is made under it.

mod wire;

use std::{
    collections::BTreeMap,
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
pub const VERSION: u32 = 4;
/// Most records in a message.
pub const MOST_RECORDS: usize = 1024;
/// Bytes of records after which a message takes no more.
const MUCH_OF_RECORDS: usize = 1 << 20;
/// Bytes of a record; one whose texts are cut and whose lists are as long as they may be has fewer.
const MOST_OF_RECORD: usize = 32 << 10;
/// Names of headers in a record.
pub const MOST_NAMES: usize = 64;
/// Addresses of an answer of DNS.
pub const MOST_ADDRESSES: usize = 1000;
/// Rules that the records of a message may name.
const MOST_RULES: usize = 2 * MOST_RECORDS;

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
        /// Lower case, without the trailing dot, what is no letter, digit, hyphen or underscore as
        /// `\NNN`.
        #[serde(deserialize_with = "wire::name")]
        name: String,
        /// What the client would hear; at most [`MOST_ADDRESSES`].
        #[serde(deserialize_with = "wire::few::<_, _, MOST_ADDRESSES>")]
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

/// What happened, as a message holds it: one record after the other. Many name the same few rules:
/// each is written and read once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Records {
    #[serde(deserialize_with = "wire::few::<_, _, MOST_RULES>")]
    rules: Vec<Arc<RuleSource>>,
    count: usize,
    /// Of postcard: each an [`AccessRecord`] whose rules are places in `rules`.
    #[serde(with = "wire::bytes")]
    records: Vec<u8>,
    /// How many more there were since the last message, that nobody kept.
    pub lost: u64,
}

impl Records {
    /// How many there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.count
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether the next record belongs in another message.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        self.count == MOST_RECORDS || self.records.len() >= MUCH_OF_RECORDS
    }

    /// Adds a record after the others.
    ///
    /// # Errors
    ///
    /// The serializer's, or the record is too long; nothing is added.
    pub fn push(&mut self, record: AccessRecord) -> io::Result<()> {
        let Self { rules, records, count, .. } = self;
        let (known, end) = (rules.len(), records.len());
        let place = |rule: Arc<RuleSource>| {
            let known = rules.iter().position(|other| Arc::ptr_eq(other, &rule));
            Some(known.unwrap_or_else(|| {
                rules.push(rule);
                rules.len() - 1
            }))
        };
        let placed = record.try_map(place).ok_or_else(unnamed)?;
        let written = wire::append(&placed, records).and_then(|()| match records.len() - end {
            0..=MOST_OF_RECORD => Ok(()),
            long => Err(io::Error::other(format!("a record of {long} bytes"))),
        });
        match written {
            Ok(()) => *count += 1,
            Err(_) => {
                rules.truncate(known);
                records.truncate(end);
            }
        }
        written
    }

    /// The records, up to one that cannot be read; those of the same rule share it.
    ///
    /// # Errors
    ///
    /// Of an item: it is no record, or names a rule that the message does not hold; or bytes are
    /// left after the last one, or after as many as a message may have.
    pub fn into_records(self) -> impl Iterator<Item = io::Result<AccessRecord>> {
        let Self { rules, count, records, .. } = self;
        let (mut left, mut at) = (count.min(MOST_RECORDS), 0);
        std::iter::from_fn(move || {
            let rest = &records[at..];
            let begun = std::mem::replace(&mut at, records.len());
            if left == 0 {
                return (!rest.is_empty()).then(|| Err(io::Error::other("more than its records")));
            }
            match read_record(rest, &rules) {
                Ok((record, length)) => {
                    left -= 1;
                    at = begun + length;
                    Some(Ok(record))
                }
                // Where the next one begins is not known.
                Err(error) => {
                    left = 0;
                    Some(Err(error))
                }
            }
        })
    }
}

fn unnamed() -> io::Error {
    io::Error::other("a record names a rule that is not with it")
}

/// The first record, and its length.
fn read_record(bytes: &[u8], rules: &[Arc<RuleSource>]) -> io::Result<(AccessRecord, usize)> {
    let bytes = &bytes[..bytes.len().min(MOST_OF_RECORD)];
    let read = postcard::take_from_bytes::<AccessRecord<usize>>(bytes);
    let (record, rest) = read.map_err(io::Error::other)?;
    let named = record.try_map(|place| rules.get(place).cloned());
    Ok((named.ok_or_else(unnamed)?, bytes.len() - rest.len()))
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
    /// Bytes of the longest frame.
    const LONGEST: usize;
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
    ($($message:ty: $longest:expr),+) => {$(
        impl Message for $message {
            const LONGEST: usize = $longest;

            fn write(&self, frame: &mut Vec<u8>) -> io::Result<()> {
                Ok(serde_json::to_writer(frame, self)?)
            }

            fn read(body: &[u8]) -> io::Result<Self> {
                Ok(serde_json::from_slice(body)?)
            }
        }
    )+};
}

in_json!(Hello: 1 << 10, ToProxy: 64 << 20);

impl Message for FromProxy {
    /// Who speaks to everybody may be made to say anything: what the agent takes for it is bounded.
    const LONGEST: usize = 4 << 20;

    fn write(&self, frame: &mut Vec<u8>) -> io::Result<()> {
        wire::append(self, frame)
    }

    fn read(body: &[u8]) -> io::Result<Self> {
        postcard::from_bytes(body).map_err(io::Error::other)
    }
}

/// A message as a frame.
///
/// # Errors
///
/// The message is longer than [`Message::LONGEST`].
pub fn encode<T: Message>(message: &T) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; 4];
    message.write(&mut frame)?;
    let length = frame.len() - 4;
    let prefix = u32::try_from(length).map_err(io::Error::other)?;
    frame[..4].copy_from_slice(&prefix.to_be_bytes());
    body_length::<T>(prefix)?;
    Ok(frame)
}

/// The length of a frame's body, of the four bytes that begin it.
///
/// # Errors
///
/// The frame is too long for such a message.
pub fn body_length<T: Message>(prefix: u32) -> io::Result<usize> {
    let (length, longest) = (prefix as usize, T::LONGEST);
    if length > longest {
        return Err(io::Error::other(format!("a frame of {length} bytes; at most {longest}")));
    }
    Ok(length)
}

/// Takes a frame apart: the message and the bytes that it took, `None` while it is not complete.
///
/// # Errors
///
/// The frame is too long, or holds no message.
pub fn decode<T: Message>(bytes: &[u8]) -> io::Result<Option<(T, usize)>> {
    let Some((prefix, rest)) = bytes.split_first_chunk::<4>() else { return Ok(None) };
    let length = body_length::<T>(u32::from_be_bytes(*prefix))?;
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
        got.into_records().collect::<io::Result<_>>().unwrap()
    }

    fn of(records: Vec<AccessRecord>) -> Records {
        let mut all = Records::default();
        for record in records {
            all.push(record).unwrap();
        }
        all
    }

    /// A proxy in the wrong hands says what it likes.
    #[test]
    fn what_a_message_holds_is_bounded() {
        let rule = Arc::new(RuleSource::NoDefaultDeny);
        let rules = |count| Records { rules: vec![Arc::clone(&rule); count], ..Records::default() };
        let read = |records| {
            let mut body = Vec::new();
            FromProxy::Records(records).write(&mut body).unwrap();
            FromProxy::read(&body)
        };
        assert!(read(rules(MOST_RULES)).is_ok());
        assert!(read(rules(MOST_RULES + 1)).is_err());

        let mut many = Records::default();
        for _ in 0..=MOST_RECORDS {
            assert_eq!(many.is_full(), many.len() == MOST_RECORDS);
            many.push(record(None)).unwrap();
        }
        let read: Vec<_> = many.into_records().collect();
        assert_eq!(read.len(), MOST_RECORDS + 1);
        assert!(read[MOST_RECORDS].is_err());

        // As long as one that is written may be, and one that is not.
        let of_text = |length| {
            let l7 = L7::Stream { error: "x".repeat(length) };
            AccessRecord { l7, ..record(Some(&rule)) }
        };
        let mut few = Records::default();
        few.push(of_text(MOST_OF_RECORD)).unwrap_err();
        assert_eq!(few, Records::default());
        while !few.is_full() {
            few.push(of_text(MOST_OF_RECORD - 100)).unwrap();
        }
        assert!(few.len() < MOST_RECORDS / 10, "{}", few.len());
        let frame = encode(&FromProxy::Records(few.clone())).unwrap();
        assert!(frame.len() < FromProxy::LONGEST / 2);
        assert_eq!(passed_on(few.clone()).len(), few.len());
        assert!(body_length::<FromProxy>(4 << 20).is_ok());
        assert!(body_length::<FromProxy>((4 << 20) + 1).is_err());
    }

    #[test]
    fn what_a_list_holds_is_bounded() {
        for (names, addresses, fine) in [
            (MOST_NAMES, MOST_ADDRESSES, true),
            (MOST_NAMES + 1, 0, false),
            (0, MOST_ADDRESSES + 1, false),
        ] {
            let dns = format!(
                r#"{{"dns": {{"query": "a", "qtype": "A", "rcode": null, "latency_ns": 1,
                    "addresses": {}}}}}"#,
                serde_json::to_string(&vec![IpAddr::from([0; 16]); addresses]).unwrap()
            );
            let http = format!(
                r#"{{"http": {{"method": "A", "url": "", "version": "", "status": null,
                    "latency_ns": 1, "mismatches": {}}}}}"#,
                serde_json::to_string(&vec!["x"; names]).unwrap()
            );
            let all = [dns, http]
                .map(|l7| AccessRecord { l7: serde_json::from_str(&l7).unwrap(), ..record(None) });
            let read: io::Result<Vec<_>> = of(all.into()).into_records().collect();
            assert_eq!(read.is_ok(), fine, "{names} names, {addresses} addresses");
        }
        let learn = |name: &str, addresses: usize| {
            let addresses = vec![IpAddr::from([0; 16]); addresses];
            let client = IpAddr::from([0; 16]);
            let learn = FromProxy::Learn { id: 1, client, name: name.into(), addresses, ttl: 1 };
            let mut body = Vec::new();
            learn.write(&mut body).unwrap();
            FromProxy::read(&body).is_ok()
        };
        assert!(learn(&"x".repeat(1020), MOST_ADDRESSES));
        assert!(!learn(&"x".repeat(1021), 0) && !learn("x", MOST_ADDRESSES + 1));
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
        let of_l7 = |l7| AccessRecord { l7: serde_json::from_str(l7).unwrap(), ..record(None) };
        let records: Vec<_> = l7.into_iter().map(of_l7).collect();
        assert_eq!(passed_on(of(records.clone())), records);
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
        let sent = Records { lost: 3, ..of(records.clone()) };
        assert_eq!((sent.rules.len(), sent.len(), sent.lost), (2, 4, 3));
        let got = passed_on(sent);
        assert_eq!(got, records);
        let rule = |n: usize| got[n].egress.as_ref().unwrap().rule.as_ref().unwrap();
        assert!(Arc::ptr_eq(rule(0), rule(3)));
    }

    #[test]
    fn what_cannot_be_read_ends_the_records() {
        let rule = Arc::new(RuleSource::NoDefaultDeny);
        let sent = of(vec![record(None), record(Some(&rule)), record(None)]);
        let whole = sent.records.clone();
        let cut = |length| Records { records: whole[..length].into(), ..sent.clone() };
        let longer = Records { records: [&*whole, &[0]].concat(), ..sent.clone() };
        for (records, good, why) in [
            (Records { rules: Vec::new(), ..sent.clone() }, 1, "rule"),
            (cut(whole.len() - 1), 2, ""),
            (cut(0), 0, ""),
            (longer, 3, "more than its records"),
        ] {
            let read: Vec<_> = records.into_records().collect();
            assert_eq!(read.len(), good + 1, "{read:?}");
            assert!(read[..good].iter().all(Result::is_ok), "{read:?}");
            let error = read[good].as_ref().unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
