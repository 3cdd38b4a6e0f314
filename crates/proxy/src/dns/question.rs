//! Questions: which are passed on, and how the others are answered.

use std::fmt;

use super::{
    message::{Edns, HEADER, Header, Malformed, Reader, flags, number},
    name::Name,
};

/// What the proxy takes of a client in one datagram, told in answers of its own.
const UDP_SIZE: u16 = 1232;
/// Most records beside the question: EDNS, and a signature.
const MAX_ADDITIONALS: u16 = 2;

/// A response code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rcode(pub u16);

impl Rcode {
    /// There is an answer.
    pub const NO_ERROR: Self = Self(0);
    /// The question is malformed.
    pub const FORMAT_ERROR: Self = Self(1);
    /// Something went wrong that is not the client's fault.
    pub const SERVER_FAILURE: Self = Self(2);
    /// There is no such kind of question.
    pub const NOT_IMPLEMENTED: Self = Self(4);
    /// The client may not ask this.
    pub const REFUSED: Self = Self(5);
    /// There is no such version of EDNS.
    pub const BAD_VERSION: Self = Self(16);
}

impl fmt::Display for Rcode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            0 => "NOERROR",
            1 => "FORMERR",
            2 => "SERVFAIL",
            3 => "NXDOMAIN",
            4 => "NOTIMP",
            5 => "REFUSED",
            6 => "YXDOMAIN",
            7 => "YXRRSET",
            8 => "NXRRSET",
            9 => "NOTAUTH",
            10 => "NOTZONE",
            16 => "BADVERS",
            23 => "BADCOOKIE",
            other => return write!(f, "RCODE{other}"),
        })
    }
}

/// The name of a record type.
pub fn type_name(kind: u16) -> String {
    let known = match kind {
        1 => "A",
        2 => "NS",
        5 => "CNAME",
        6 => "SOA",
        12 => "PTR",
        15 => "MX",
        16 => "TXT",
        28 => "AAAA",
        33 => "SRV",
        35 => "NAPTR",
        39 => "DNAME",
        43 => "DS",
        46 => "RRSIG",
        48 => "DNSKEY",
        52 => "TLSA",
        64 => "SVCB",
        65 => "HTTPS",
        251 => "IXFR",
        252 => "AXFR",
        255 => "ANY",
        257 => "CAA",
        other => return format!("TYPE{other}"),
    };
    known.to_owned()
}

/// What came from a client.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// A question that a server can be asked, if the client may.
    Question(Question),
    /// Something that is answered at once, and how.
    Rejected(Rejected),
    /// Nothing that could be answered.
    Noise,
}

/// What is no question to pass on.
#[derive(Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Why.
    pub rcode: Rcode,
    /// The question, as far as it was understood.
    pub question: Option<(Name, u16)>,
    /// The answer.
    pub reply: Vec<u8>,
}

/// One question of one client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Name asked for.
    pub name: Name,
    /// Type asked for.
    pub kind: u16,
    /// The client's id for it.
    pub id: u16,
    flags: u16,
    /// The question as the client wrote it.
    wire: Box<[u8]>,
    /// Whether the client speaks EDNS.
    edns: bool,
}

impl Question {
    /// Reads what a client sent.
    pub fn read(message: &[u8]) -> Received {
        let Ok(header) = Reader::new(message).header() else { return Received::Noise };
        // Answering answers would let two servers talk for ever.
        if header.flags & flags::RESPONSE != 0 {
            return Received::Noise;
        }
        let reject = |rcode| Received::Rejected(rejected(header, rcode));
        if header.flags & flags::OPCODE != 0 {
            return reject(Rcode::NOT_IMPLEMENTED);
        }
        let Ok((question, version)) = read(message) else { return reject(Rcode::FORMAT_ERROR) };
        let class = u16::from_be_bytes(question.wire.last_chunk().copied().unwrap_or_default());
        if version.is_some_and(|version| version != 0) {
            return Received::Rejected(question.rejected(Rcode::BAD_VERSION));
        }
        let meta = (number::META_MIN..=number::META_MAX).contains(&question.kind);
        if meta || matches!(question.kind, 0 | number::OPT) || class != number::IN {
            return Received::Rejected(question.rejected(Rcode::REFUSED));
        }
        Received::Question(question)
    }

    /// Whether a message asks the same.
    pub(super) fn is_repeated_by(&self, reader: &mut Reader<'_>) -> Result<bool, Malformed> {
        let (name, kind, class) = (reader.name()?, reader.u16()?, reader.u16()?);
        Ok(name == self.name && kind == self.kind && class == number::IN)
    }

    /// An answer that is only a code.
    pub fn reply(&self, rcode: Rcode) -> Vec<u8> {
        let edns = self.edns || rcode.0 > flags::RCODE;
        let header = Header {
            questions: 1,
            additionals: u16::from(edns),
            ..reply_header(self.id, self.flags, rcode)
        };
        let mut reply = header.bytes().to_vec();
        reply.extend(&self.wire);
        if edns {
            reply.push(0);
            reply.extend(number::OPT.to_be_bytes());
            reply.extend(UDP_SIZE.to_be_bytes());
            reply.extend([(rcode.0 >> 4) as u8, 0, 0, 0, 0, 0]);
        }
        reply
    }

    fn rejected(self, rcode: Rcode) -> Rejected {
        let reply = self.reply(rcode);
        Rejected { rcode, question: Some((self.name, self.kind)), reply }
    }
}

fn rejected(header: Header, rcode: Rcode) -> Rejected {
    let reply = reply_header(header.id, header.flags, rcode).bytes().to_vec();
    Rejected { rcode, question: None, reply }
}

fn reply_header(id: u16, asked: u16, rcode: Rcode) -> Header {
    let kept = flags::OPCODE | flags::RECURSION_DESIRED | flags::CHECKING_DISABLED;
    let flags = flags::RESPONSE | asked & kept | rcode.0 & flags::RCODE;
    Header { id, flags, questions: 0, answers: 0, authorities: 0, additionals: 0 }
}

/// The question and the version of EDNS.
fn read(message: &[u8]) -> Result<(Question, Option<u8>), Malformed> {
    let mut reader = Reader::new(message);
    let header = reader.header()?;
    let counts = (header.questions, header.answers, header.authorities);
    if counts != (1, 0, 0)
        || header.additionals > MAX_ADDITIONALS
        || header.flags & flags::TRUNCATED != 0
    {
        return Err(Malformed);
    }
    let name = reader.name()?;
    let kind = reader.u16()?;
    reader.u16()?;
    let wire = message[HEADER..reader.position()].into();
    let mut version = None;
    for left in (0..header.additionals).rev() {
        let record = reader.record()?;
        match record.kind {
            number::OPT if version.is_none() => version = Some(Edns::read(&record)?.version),
            // A signature is the last record of a message.
            number::TSIG | number::SIG if left == 0 => {}
            _ => return Err(Malformed),
        }
    }
    if !reader.is_at_end() {
        return Err(Malformed);
    }
    let (id, flags, edns) = (header.id, header.flags, version.is_some());
    Ok((Question { name, kind, id, flags, wire, edns }, version))
}
