//! Answers: which belong to a question, and which addresses they give its name.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use super::{
    message::{Edns, Header, Malformed, Reader, flags, number},
    name::Name,
    question::{Question, Rcode},
};

/// Most aliases between a name and its addresses.
const MAX_CHAIN: usize = 16;
/// Most addresses that a name has room for.
pub const MAX_ADDRESSES: usize = palisade_api::proxy::MOST_ADDRESSES;
/// From here on a TTL counts as negative, that is as none (RFC 2181, section 8).
const TTL_LIMIT: u32 = 1 << 31;

/// The answer to a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Response code, that of EDNS included.
    pub rcode: Rcode,
    /// More of it is to be had over TCP. Nothing is learned from a part.
    pub truncated: bool,
    /// Addresses of the name that was asked for.
    pub addresses: Vec<IpAddr>,
    /// There are more of them, which are not listed.
    pub excess: bool,
    /// Seconds for which all of them hold.
    pub ttl: u32,
}

/// Why a message is not the answer to a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stray {
    /// It answers something else, or nothing.
    Other,
    /// It cannot be read.
    Malformed,
}

impl From<Malformed> for Stray {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

impl Answer {
    /// Reads the answer to a question that was asked under this id.
    ///
    /// # Errors
    /// The message is not the answer to the question.
    pub fn read(question: &Question, id: u16, message: &[u8]) -> Result<Self, Stray> {
        let mut reader = Reader::new(message);
        let header = reader.header()?;
        let kind = header.flags & (flags::RESPONSE | flags::OPCODE);
        if header.id != id || kind != flags::RESPONSE {
            return Err(Stray::Other);
        }
        let mut answer = Self {
            rcode: Rcode(header.flags & flags::RCODE),
            truncated: header.flags & flags::TRUNCATED != 0,
            addresses: Vec::new(),
            excess: false,
            ttl: 0,
        };
        if is_bare_error(&header, answer.rcode) && reader.is_at_end() {
            return Ok(answer);
        }
        if header.questions != 1 || !question.is_repeated_by(&mut reader)? {
            return Err(Stray::Other);
        }
        if answer.truncated {
            return Ok(answer);
        }
        let records = Records::read(&mut reader, header.answers)?;
        answer.rcode.0 |= rest(&mut reader, &header)?;
        if answer.rcode == Rcode::NO_ERROR {
            records.resolve(&question.name, &mut answer);
        }
        Ok(answer)
    }
}

/// A server that does not understand a question at all need not repeat it.
fn is_bare_error(header: &Header, rcode: Rcode) -> bool {
    let counts = [header.questions, header.answers, header.authorities, header.additionals];
    matches!(rcode, Rcode::FORMAT_ERROR | Rcode::NOT_IMPLEMENTED) && counts == [0; 4]
}

/// Reads what is behind the answers, of which nothing is learned. Returns the upper bits of the
/// response code.
fn rest(reader: &mut Reader<'_>, header: &Header) -> Result<u16, Malformed> {
    for _ in 0..header.authorities {
        reader.record()?;
    }
    let mut edns = None;
    for _ in 0..header.additionals {
        let record = reader.record()?;
        if record.kind != number::OPT {
            continue;
        }
        if edns.replace(Edns::read(&record)?).is_some() {
            return Err(Malformed);
        }
    }
    if !reader.is_at_end() {
        return Err(Malformed);
    }
    Ok(edns.map_or(0, |edns| u16::from(edns.extended_rcode) << 4))
}

/// What the answers say of a name.
#[derive(Default)]
struct Owned {
    addresses: Vec<(IpAddr, u32)>,
    alias: Option<(Name, u32)>,
}

/// The answers that lead to addresses.
#[derive(Default)]
struct Records {
    owners: HashMap<Name, Owned>,
    /// Subtrees that are another's: the old end, the new one, the TTL.
    subtrees: Vec<(Name, Name, u32)>,
}

impl Records {
    fn read(reader: &mut Reader<'_>, count: u16) -> Result<Self, Malformed> {
        let mut records = Self::default();
        for _ in 0..count {
            let record = reader.record()?;
            let ttl = if record.ttl < TTL_LIMIT { record.ttl } else { 0 };
            if let Some(address) = record.address()? {
                records.owners.entry(record.owner).or_default().addresses.push((address, ttl));
                continue;
            }
            match (record.class, record.kind) {
                (number::IN, number::CNAME) => {
                    let target = reader.name_in(&record)?;
                    let owned = records.owners.entry(record.owner).or_default();
                    owned.alias.get_or_insert((target, ttl));
                }
                (number::IN, number::DNAME) if records.subtrees.len() < MAX_CHAIN => {
                    let target = reader.name_in(&record)?;
                    records.subtrees.push((record.owner, target, ttl));
                }
                _ => {}
            }
        }
        Ok(records)
    }

    /// Finds the addresses of a name and of what it is an alias of, and the least TTL on the way.
    fn resolve(&self, name: &Name, answer: &mut Answer) {
        let found = &mut answer.addresses;
        let mut seen = HashSet::new();
        let mut least = u32::MAX;
        let mut name = name.clone();
        for _ in 0..=MAX_CHAIN {
            if let Some(owned) = self.owners.get(&name) {
                for (address, ttl) in &owned.addresses {
                    least = least.min(*ttl);
                    if !seen.insert(*address) {
                        continue;
                    }
                    match found.len() < MAX_ADDRESSES {
                        true => found.push(*address),
                        false => answer.excess = true,
                    }
                }
            }
            let Some((next, ttl)) = self.next(&name) else { break };
            least = least.min(ttl);
            name = next;
        }
        answer.ttl = if found.is_empty() { 0 } else { least };
    }

    /// What the name is an alias of.
    fn next(&self, name: &Name) -> Option<(Name, u32)> {
        if let Some(alias) = self.owners.get(name).and_then(|owned| owned.alias.clone()) {
            return Some(alias);
        }
        self.subtrees.iter().find_map(|(old, new, ttl)| Some((name.redirected(old, new)?, *ttl)))
    }
}
