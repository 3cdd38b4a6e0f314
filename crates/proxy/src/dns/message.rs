//! Reading messages. What the standards do not allow is an error, and every message is read in a
//! time that its size bounds.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::name::{Labels, Name};

/// Bytes of a header.
pub(super) const HEADER: usize = 12;
/// Most pointers that one name may follow.
const MAX_POINTERS: usize = 32;
/// Most labels that are read in one message. Pointers let few bytes stand for many labels.
const MAX_LABELS: usize = 1 << 15;

/// Numbers of the standards, by their names there.
pub(super) mod number {
    pub(crate) const A: u16 = 1;
    pub(crate) const CNAME: u16 = 5;
    pub(crate) const SIG: u16 = 24;
    pub(crate) const AAAA: u16 = 28;
    pub(crate) const DNAME: u16 = 39;
    pub(crate) const OPT: u16 = 41;
    /// The first of the types that are no types of records: TKEY.
    pub(crate) const META_MIN: u16 = 249;
    pub(crate) const TSIG: u16 = 250;
    /// The last of them: ANY.
    pub(crate) const META_MAX: u16 = 255;
    pub(crate) const IN: u16 = 1;
}

/// A message that is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// Bits of the second word of a header.
pub(super) mod flags {
    pub(crate) const RESPONSE: u16 = 0x8000;
    pub(crate) const OPCODE: u16 = 0x7800;
    pub(crate) const TRUNCATED: u16 = 0x0200;
    pub(crate) const RECURSION_DESIRED: u16 = 0x0100;
    pub(crate) const CHECKING_DISABLED: u16 = 0x0010;
    pub(crate) const RCODE: u16 = 0x000f;
}

/// The header of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub id: u16,
    pub flags: u16,
    pub questions: u16,
    pub answers: u16,
    pub authorities: u16,
    pub additionals: u16,
}

impl Header {
    pub(super) fn bytes(self) -> [u8; HEADER] {
        let words =
            [self.id, self.flags, self.questions, self.answers, self.authorities, self.additionals];
        let mut bytes = [0; HEADER];
        for (pair, word) in bytes.chunks_exact_mut(2).zip(words) {
            pair.copy_from_slice(&word.to_be_bytes());
        }
        bytes
    }
}

/// A record. Its data is looked at by those who know what it means.
pub(super) struct Record<'a> {
    pub owner: Name,
    pub kind: u16,
    pub class: u16,
    pub ttl: u32,
    pub data: &'a [u8],
    /// Where the data begins in the message.
    at: usize,
}

impl Record<'_> {
    /// The address in an A or AAAA record of the Internet.
    pub(super) fn address(&self) -> Result<Option<IpAddr>, Malformed> {
        match self.kind {
            _ if self.class != number::IN => Ok(None),
            number::A => {
                let octets: [u8; 4] = self.data.try_into().map_err(|_| Malformed)?;
                Ok(Some(Ipv4Addr::from(octets).into()))
            }
            number::AAAA => {
                let octets: [u8; 16] = self.data.try_into().map_err(|_| Malformed)?;
                Ok(Some(Ipv6Addr::from(octets).into()))
            }
            _ => Ok(None),
        }
    }
}

/// Reads a message from its beginning to its end.
pub(super) struct Reader<'a> {
    message: &'a [u8],
    at: usize,
    labels_left: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(message: &'a [u8]) -> Self {
        Self { message, at: 0, labels_left: MAX_LABELS }
    }

    /// How far the message was read.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// Whether the message was read to its end.
    pub(super) fn is_at_end(&self) -> bool {
        self.at == self.message.len()
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let taken = self.message[self.at..].get(..length).ok_or(Malformed)?;
        self.at += length;
        Ok(taken)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Malformed> {
        let bytes = self.take(2)?.try_into().map_err(|_| Malformed)?;
        Ok(u16::from_be_bytes(bytes))
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        let bytes = self.take(4)?.try_into().map_err(|_| Malformed)?;
        Ok(u32::from_be_bytes(bytes))
    }

    pub(super) fn header(&mut self) -> Result<Header, Malformed> {
        Ok(Header {
            id: self.u16()?,
            flags: self.u16()?,
            questions: self.u16()?,
            answers: self.u16()?,
            authorities: self.u16()?,
            additionals: self.u16()?,
        })
    }

    /// A name. Pointers lead to before what was read of it so far, so they cannot run in circles.
    pub(super) fn name(&mut self) -> Result<Name, Malformed> {
        let mut labels = Labels::default();
        let mut pointers = 0;
        // Where the run of labels began that is being read, and where reading goes on afterwards.
        let mut run = self.at;
        let mut end = None;
        loop {
            let length = self.take(1)?[0];
            match length {
                0 => break,
                1..=63 => {
                    self.labels_left = self.labels_left.checked_sub(1).ok_or(Malformed)?;
                    if !labels.push(self.take(usize::from(length))?) {
                        return Err(Malformed);
                    }
                }
                0xc0.. => {
                    let low = self.take(1)?[0];
                    let target = usize::from(length & 0x3f) << 8 | usize::from(low);
                    pointers += 1;
                    if !(HEADER..run).contains(&target) || pointers > MAX_POINTERS {
                        return Err(Malformed);
                    }
                    end.get_or_insert(self.at);
                    (self.at, run) = (target, target);
                }
                _ => return Err(Malformed),
            }
        }
        self.at = end.unwrap_or(self.at);
        Ok(labels.finish())
    }

    pub(super) fn record(&mut self) -> Result<Record<'a>, Malformed> {
        let owner = self.name()?;
        let (kind, class, ttl) = (self.u16()?, self.u16()?, self.u32()?);
        let length = self.u16()?;
        let at = self.at;
        let data = self.take(usize::from(length))?;
        Ok(Record { owner, kind, class, ttl, data, at })
    }

    /// The name that is all of a record's data.
    pub(super) fn name_in(&mut self, record: &Record<'a>) -> Result<Name, Malformed> {
        let after = std::mem::replace(&mut self.at, record.at);
        let name = self.name()?;
        let whole = self.at == record.at + record.data.len();
        self.at = after;
        if whole { Ok(name) } else { Err(Malformed) }
    }
}

/// What an OPT record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Edns {
    pub version: u8,
    pub extended_rcode: u8,
}

impl Edns {
    /// Reads an OPT record: the root's, with whole options.
    pub(super) fn read(record: &Record<'_>) -> Result<Self, Malformed> {
        let is_root = record.owner.labels().next().is_none();
        let mut options = record.data;
        while let Some((head, rest)) = options.split_first_chunk::<4>() {
            let length = usize::from(u16::from_be_bytes([head[2], head[3]]));
            options = rest.get(length..).ok_or(Malformed)?;
        }
        if !is_root || !options.is_empty() {
            return Err(Malformed);
        }
        let [extended_rcode, version, ..] = record.ttl.to_be_bytes();
        Ok(Self { version, extended_rcode })
    }
}

/// The message under another id.
pub(super) fn with_id(message: &[u8], id: u16) -> Vec<u8> {
    let mut message = message.to_vec();
    if let Some(bytes) = message.first_chunk_mut() {
        *bytes = id.to_be_bytes();
    }
    message
}
