//! DNS messages: reading queries, writing answers, and the little more that a client needs.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

/// Record types and codes by number, as far as this server knows them.
pub mod number {
    #![expect(missing_docs, reason = "the names are those of the DNS standards")]
    pub const A: u16 = 1;
    pub const NS: u16 = 2;
    pub const CNAME: u16 = 5;
    pub const SOA: u16 = 6;
    pub const PTR: u16 = 12;
    pub const TXT: u16 = 16;
    pub const AAAA: u16 = 28;
    pub const SRV: u16 = 33;
    pub const OPT: u16 = 41;
    pub const ANY: u16 = 255;
    pub const CLASS_IN: u16 = 1;
    pub const NO_ERROR: u8 = 0;
    pub const FORMAT_ERROR: u8 = 1;
    pub const SERVER_FAILURE: u8 = 2;
    pub const NAME_ERROR: u8 = 3;
    pub const NOT_IMPLEMENTED: u8 = 4;
    pub const REFUSED: u8 = 5;
    pub const BAD_VERSION: u8 = 16;
}

const HEADER: usize = 12;
const MAX_NAME: usize = 255;
/// What a client without EDNS takes.
const PLAIN_UDP: usize = 512;
/// What this server sends at most in one datagram.
const MAX_UDP: usize = 1232;

/// A name: labels without the root, in the case they came in.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Name(Vec<String>);

impl Name {
    /// Parses `a.b.c` or `a.b.c.`.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.strip_suffix('.').unwrap_or(text);
        if text.is_empty() {
            return Some(Self::default());
        }
        let labels: Vec<_> = text.split('.').map(str::to_owned).collect();
        let length: usize = labels.iter().map(|label| label.len() + 1).sum::<usize>() + 1;
        let fits = labels.iter().all(|label| (1..=63).contains(&label.len()));
        (fits && length <= MAX_NAME).then_some(Self(labels))
    }

    /// Lower case, dots between labels, none at the end.
    pub fn key(&self) -> String {
        self.0.join(".").to_ascii_lowercase()
    }

    fn write(&self, out: &mut Vec<u8>) {
        for label in &self.0 {
            out.push(u8::try_from(label.len()).unwrap_or(0));
            out.extend(label.as_bytes());
        }
        out.push(0);
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.", self.0.join("."))
    }
}

/// The data of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    /// IPv4 address.
    A(Ipv4Addr),
    /// IPv6 address.
    Aaaa(Ipv6Addr),
    /// Alias.
    Cname(Name),
    /// Name of an address.
    Ptr(Name),
    /// A service's port and the name of its host.
    Srv {
        /// Port.
        port: u16,
        /// Host.
        target: Name,
    },
    /// Text.
    Txt(String),
    /// Name server.
    Ns(Name),
    /// Start of a zone of authority.
    Soa {
        /// Primary server.
        primary: Name,
        /// Version.
        serial: u32,
    },
    /// A type this program does not know.
    Other(u16),
}

impl Data {
    /// The record type.
    pub fn kind(&self) -> u16 {
        match self {
            Self::A(_) => number::A,
            Self::Aaaa(_) => number::AAAA,
            Self::Cname(_) => number::CNAME,
            Self::Ptr(_) => number::PTR,
            Self::Srv { .. } => number::SRV,
            Self::Txt(_) => number::TXT,
            Self::Ns(_) => number::NS,
            Self::Soa { .. } => number::SOA,
            Self::Other(kind) => *kind,
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::A(address) => out.extend(address.octets()),
            Self::Aaaa(address) => out.extend(address.octets()),
            Self::Cname(name) | Self::Ptr(name) | Self::Ns(name) => name.write(out),
            Self::Srv { port, target } => {
                for number in [0, 100, *port] {
                    out.extend(u16::to_be_bytes(number));
                }
                target.write(out);
            }
            Self::Txt(text) => {
                let bytes = &text.as_bytes()[..text.len().min(255)];
                out.push(u8::try_from(bytes.len()).unwrap_or(255));
                out.extend(bytes);
            }
            Self::Soa { primary, serial } => {
                primary.write(out);
                Name(std::iter::once("hostmaster".to_owned()).chain(primary.0.clone()).collect())
                    .write(out);
                for number in [*serial, 7200, 1800, 86400, super::TTL] {
                    out.extend(number.to_be_bytes());
                }
            }
            Self::Other(_) => {}
        }
    }
}

impl fmt::Display for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::A(address) => write!(f, "{address}"),
            Self::Aaaa(address) => write!(f, "{address}"),
            Self::Cname(name) | Self::Ptr(name) | Self::Ns(name) => write!(f, "{name}"),
            Self::Srv { port, target } => write!(f, "0 100 {port} {target}"),
            Self::Txt(text) => write!(f, "{text:?}"),
            Self::Soa { primary, serial } => write!(f, "{primary} {serial}"),
            Self::Other(kind) => write!(f, "TYPE{kind}"),
        }
    }
}

/// A record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Owner.
    pub name: Name,
    /// Seconds it may be kept.
    pub ttl: u32,
    /// Data.
    pub data: Data,
}

/// A question that was understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    id: u16,
    recursion_desired: bool,
    /// Name asked for.
    pub name: Name,
    /// Type asked for.
    pub kind: u16,
    class: u16,
    edns: Option<Edns>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Edns {
    size: usize,
    version: u8,
}

/// What an answer says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Answer {
    /// Response code.
    pub code: u8,
    /// This server is the authority.
    pub authoritative: bool,
    /// Answers.
    pub answers: Vec<Record>,
    /// Authority section.
    pub authority: Vec<Record>,
    /// Additional section.
    pub additional: Vec<Record>,
}

impl Answer {
    /// An answer that is only a code.
    pub fn code(code: u8) -> Self {
        Self { code, ..Self::default() }
    }
}

/// What came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incoming {
    /// A question.
    Query(Query),
    /// Something to be answered with this message, without further thought.
    Reject(Vec<u8>),
    /// Not to be answered at all.
    Ignore,
}

/// Reads a query.
pub fn read_query(packet: &[u8]) -> Incoming {
    let Some(header) = packet.get(..HEADER) else { return Incoming::Ignore };
    let flags = header[2];
    if flags & 0x80 != 0 {
        return Incoming::Ignore;
    }
    if flags & 0x78 != 0 {
        return Incoming::Reject(bare(header, number::NOT_IMPLEMENTED));
    }
    match parse_query(packet) {
        Some(query) => Incoming::Query(query),
        None => Incoming::Reject(bare(header, number::FORMAT_ERROR)),
    }
}

fn bare(header: &[u8], code: u8) -> Vec<u8> {
    let mut out = vec![header[0], header[1], 0x80 | (header[2] & 0x79), code];
    out.resize(HEADER, 0);
    out
}

fn parse_query(packet: &[u8]) -> Option<Query> {
    let mut reader = Reader { packet, at: 0 };
    let id = reader.u16()?;
    let flags = reader.u16()?;
    let (questions, answers, authority, additional) =
        (reader.u16()?, reader.u16()?, reader.u16()?, reader.u16()?);
    if questions != 1 || answers != 0 || authority != 0 || additional > 4 {
        return None;
    }
    let name = reader.name()?;
    let kind = reader.u16()?;
    let class = reader.u16()?;
    let mut edns = None;
    for _ in 0..additional {
        let owner = reader.name()?;
        let kind = reader.u16()?;
        let size = reader.u16()?;
        let extended = reader.take(4)?;
        let length = reader.u16()?;
        reader.take(usize::from(length))?;
        if kind == number::OPT {
            if edns.is_some() || owner != Name::default() {
                return None;
            }
            edns = Some(Edns { size: usize::from(size), version: extended[1] });
        }
    }
    Some(Query { id, recursion_desired: flags & 0x0100 != 0, name, kind, class, edns })
}

impl Query {
    /// A question of our own.
    pub fn new(id: u16, name: Name, kind: u16) -> Self {
        let edns = Some(Edns { size: MAX_UDP, version: 0 });
        Self { id, recursion_desired: true, name, kind, class: number::CLASS_IN, edns }
    }

    /// Whether the question is of the Internet class.
    pub fn is_internet(&self) -> bool {
        self.class == number::CLASS_IN || self.class == number::ANY
    }

    /// Whether the client speaks a version of EDNS that this server does not.
    pub fn has_bad_version(&self) -> bool {
        self.edns.is_some_and(|edns| edns.version != 0)
    }

    /// The question as a message.
    pub fn message(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        out.extend(self.id.to_be_bytes());
        out.extend([u8::from(self.recursion_desired), 0]);
        for count in [1, 0, 0, u16::from(self.edns.is_some())] {
            out.extend(u16::to_be_bytes(count));
        }
        self.write_question(&mut out);
        self.write_edns(&mut out, 0);
        out
    }

    /// The answer as a message for UDP; too long ones are cut, and marked so.
    pub fn datagram(&self, answer: &Answer) -> Vec<u8> {
        let limit = self.edns.map_or(PLAIN_UDP, |edns| edns.size.clamp(PLAIN_UDP, MAX_UDP));
        let whole = self.stream(answer);
        if whole.len() <= limit {
            return whole;
        }
        let trimmed = Answer { additional: Vec::new(), ..answer.clone() };
        let without_additional = self.stream(&trimmed);
        if without_additional.len() <= limit {
            return without_additional;
        }
        let mut cut =
            self.stream(&Answer { answers: Vec::new(), authority: Vec::new(), ..trimmed });
        cut[2] |= 0x02;
        cut
    }

    /// The answer as a message for TCP.
    pub fn stream(&self, answer: &Answer) -> Vec<u8> {
        let mut out = Vec::with_capacity(256);
        out.extend(self.id.to_be_bytes());
        let authoritative = if answer.authoritative { 0x04 } else { 0 };
        out.push(0x80 | authoritative | u8::from(self.recursion_desired));
        out.push(0x80 | (answer.code & 0x0f));
        let edns = usize::from(self.edns.is_some());
        for count in
            [1, answer.answers.len(), answer.authority.len(), answer.additional.len() + edns]
        {
            out.extend(u16::try_from(count).unwrap_or(u16::MAX).to_be_bytes());
        }
        self.write_question(&mut out);
        let records = answer.answers.iter().chain(&answer.authority).chain(&answer.additional);
        for record in records {
            self.write_record(&mut out, record);
        }
        self.write_edns(&mut out, answer.code >> 4);
        out
    }

    fn write_question(&self, out: &mut Vec<u8>) {
        self.name.write(out);
        out.extend(self.kind.to_be_bytes());
        out.extend(self.class.to_be_bytes());
    }

    fn write_record(&self, out: &mut Vec<u8>, record: &Record) {
        if record.name == self.name {
            // The question's name always stands right behind the header.
            out.extend([0xc0, HEADER as u8]);
        } else {
            record.name.write(out);
        }
        out.extend(record.data.kind().to_be_bytes());
        out.extend(number::CLASS_IN.to_be_bytes());
        out.extend(record.ttl.to_be_bytes());
        let mut data = Vec::new();
        record.data.write(&mut data);
        out.extend(u16::try_from(data.len()).unwrap_or(u16::MAX).to_be_bytes());
        out.extend(data);
    }

    fn write_edns(&self, out: &mut Vec<u8>, extended_code: u8) {
        if self.edns.is_none() {
            return;
        }
        out.push(0);
        out.extend(number::OPT.to_be_bytes());
        out.extend((MAX_UDP as u16).to_be_bytes());
        out.extend([extended_code, 0, 0, 0, 0, 0]);
    }

    /// Reads the answer to this question; `None` if it is none.
    pub fn read_answer(&self, packet: &[u8]) -> Option<Answer> {
        let mut reader = Reader { packet, at: 0 };
        if reader.u16()? != self.id {
            return None;
        }
        let flags = reader.u16()?;
        let counts = [reader.u16()?, reader.u16()?, reader.u16()?, reader.u16()?];
        if flags & 0x8000 == 0 || counts[0] != 1 {
            return None;
        }
        let (name, kind, _) = (reader.name()?, reader.u16()?, reader.u16()?);
        if name.key() != self.name.key() || kind != self.kind {
            return None;
        }
        let mut answer = Answer {
            code: (flags & 0x0f) as u8,
            authoritative: flags & 0x0400 != 0,
            ..Answer::default()
        };
        for _ in 0..counts[1] {
            answer.answers.push(reader.record()?);
        }
        for _ in 0..counts[2] {
            answer.authority.push(reader.record()?);
        }
        Some(answer)
    }
}

struct Reader<'a> {
    packet: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let taken = self.packet.get(self.at..self.at.checked_add(length)?)?;
        self.at += length;
        Some(taken)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    fn name(&mut self) -> Option<Name> {
        let mut labels = Vec::new();
        let mut total = 1;
        let mut at = self.at;
        let mut end = None;
        loop {
            let length = usize::from(*self.packet.get(at)?);
            match length {
                0 => break at += 1,
                1..=63 => {
                    let label = self.packet.get(at + 1..at + 1 + length)?;
                    total += length + 1;
                    // Labels with dots or bytes beyond ASCII name nothing in a cluster; refusing
                    // them here keeps text and wire forms interchangeable.
                    let plain = label.iter().all(|b| b.is_ascii_graphic() && *b != b'.');
                    if total > MAX_NAME || !plain {
                        return None;
                    }
                    labels.push(String::from_utf8(label.to_vec()).ok()?);
                    at += 1 + length;
                }
                _ if length & 0xc0 == 0xc0 => {
                    let low = usize::from(*self.packet.get(at + 1)?);
                    let target = (length & 0x3f) << 8 | low;
                    // Pointers lead backwards only, so they always end.
                    if target >= at {
                        return None;
                    }
                    end.get_or_insert(at + 2);
                    at = target;
                }
                _ => return None,
            }
        }
        self.at = end.unwrap_or(at);
        Some(Name(labels))
    }

    fn record(&mut self) -> Option<Record> {
        let name = self.name()?;
        let kind = self.u16()?;
        let _class = self.u16()?;
        let ttl = self.u32()?;
        let length = usize::from(self.u16()?);
        let end = self.at.checked_add(length)?;
        let data = match kind {
            number::A => Data::A(<[u8; 4]>::try_from(self.take(4)?).ok()?.into()),
            number::AAAA => Data::Aaaa(<[u8; 16]>::try_from(self.take(16)?).ok()?.into()),
            number::CNAME => Data::Cname(self.name()?),
            number::PTR => Data::Ptr(self.name()?),
            number::NS => Data::Ns(self.name()?),
            number::SRV => {
                self.take(4)?;
                Data::Srv { port: self.u16()?, target: self.name()? }
            }
            number::TXT => {
                let length = usize::from(*self.take(1)?.first()?);
                Data::Txt(String::from_utf8_lossy(self.take(length)?).into_owned())
            }
            kind => Data::Other(kind),
        };
        self.at = end;
        (end <= self.packet.len()).then_some(Record { name, ttl, data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn received(query: &Query) -> Query {
        match read_query(&query.message()) {
            Incoming::Query(query) => query,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn round_trip() {
        let asked = Query::new(7, name("DeathStar.default.svc.cluster.local"), number::A);
        let got = received(&asked);
        assert_eq!(got, asked);
        let records = [
            Data::A(Ipv4Addr::new(10, 96, 0, 7)),
            Data::Aaaa(Ipv6Addr::LOCALHOST),
            Data::Cname(name("other.example")),
            Data::Srv { port: 80, target: name("x.y") },
            Data::Ptr(name("p.q")),
            Data::Txt("1.1.0".into()),
        ];
        let answer = Answer {
            code: 0,
            authoritative: true,
            answers: records.map(|data| Record { name: asked.name.clone(), ttl: 5, data }).to_vec(),
            ..Answer::default()
        };
        assert_eq!(asked.read_answer(&got.stream(&answer)), Some(answer));
    }

    #[test]
    fn long_answers_are_cut_and_say_so() {
        let mut query = Query::new(7, name("a.b"), number::A);
        let answers = (0..200_u8)
            .map(|i| Record {
                name: query.name.clone(),
                ttl: 5,
                data: Data::A(Ipv4Addr::new(10, 0, 0, i)),
            })
            .collect();
        let answer = Answer { answers, ..Answer::default() };
        let cut = query.datagram(&answer);
        assert!(cut.len() <= MAX_UDP && cut[2] & 0x02 != 0);
        query.edns = None;
        assert!(query.datagram(&answer).len() <= PLAIN_UDP);
        assert!(query.stream(&answer).len() > MAX_UDP);
    }

    #[test]
    fn hostile_bytes_are_refused() {
        // A pointer to itself.
        let mut packet = Query::new(7, Name::default(), number::A).message();
        packet.splice(HEADER..=HEADER, [0xc0, HEADER as u8]);
        assert!(matches!(read_query(&packet), Incoming::Reject(_)));
        // Counts that lie, and messages cut anywhere.
        let message = Query::new(7, name("a.b"), number::A).message();
        for length in 0..message.len() {
            assert!(!matches!(read_query(&message[..length]), Incoming::Query(_)), "{length}");
        }
        // Answers are not answered.
        let mut reply = message.clone();
        reply[2] |= 0x80;
        assert_eq!(read_query(&reply), Incoming::Ignore);
        // Other operations are not implemented.
        let mut update = message;
        update[2] |= 0x28;
        let Incoming::Reject(rejected) = read_query(&update) else { panic!() };
        assert_eq!(rejected[3], number::NOT_IMPLEMENTED);
    }

    #[test]
    fn long_names_are_no_names() {
        assert!(Name::parse(&"a".repeat(64)).is_none());
        assert!(Name::parse(&vec!["abcdefg"; 40].join(".")).is_none());
        assert!(Name::parse("a..b").is_none());
    }
}
