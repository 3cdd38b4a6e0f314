//! DNS messages for tests, right and wrong ones.
#![allow(dead_code, reason = "no test uses all of it")]

use std::net::IpAddr;

pub(crate) const A: u16 = 1;
pub(crate) const CNAME: u16 = 5;
pub(crate) const AAAA: u16 = 28;
pub(crate) const DNAME: u16 = 39;
pub(crate) const OPT: u16 = 41;
pub(crate) const RESPONSE: u16 = 0x8180;
pub(crate) const TRUNCATED: u16 = 0x0200;

/// A message in pieces.
#[derive(Clone, Debug, Default)]
pub(crate) struct Message {
    pub(crate) id: u16,
    pub(crate) flags: u16,
    pub(crate) questions: Vec<Vec<u8>>,
    pub(crate) answers: Vec<Vec<u8>>,
    pub(crate) authorities: Vec<Vec<u8>>,
    pub(crate) additionals: Vec<Vec<u8>>,
}

impl Message {
    /// A question as resolvers of programs ask it.
    pub(crate) fn query(id: u16, name: &str, kind: u16) -> Self {
        let questions = vec![question(name, kind)];
        Self { id, flags: 0x0100, questions, ..Self::default() }
    }

    /// The empty answer to a question.
    pub(crate) fn answer_to(query: &[u8]) -> Self {
        let end = 12 + query[12..].iter().position(|byte| *byte == 0).unwrap() + 5;
        Self {
            id: u16::from_be_bytes([query[0], query[1]]),
            flags: RESPONSE,
            questions: vec![query[12..end].to_vec()],
            ..Self::default()
        }
    }

    pub(crate) fn answer(mut self, record: Vec<u8>) -> Self {
        self.answers.push(record);
        self
    }

    pub(crate) fn authority(mut self, record: Vec<u8>) -> Self {
        self.authorities.push(record);
        self
    }

    pub(crate) fn additional(mut self, record: Vec<u8>) -> Self {
        self.additionals.push(record);
        self
    }

    pub(crate) fn flags(mut self, flags: u16) -> Self {
        self.flags = flags;
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let sections = [&self.questions, &self.answers, &self.authorities, &self.additionals];
        let mut out = [self.id.to_be_bytes(), self.flags.to_be_bytes()].concat();
        for section in sections {
            out.extend((section.len() as u16).to_be_bytes());
        }
        out.extend(sections.into_iter().flatten().flatten());
        out
    }
}

/// A name without compression.
pub(crate) fn name(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for label in text.split('.').filter(|label| !label.is_empty()) {
        out.push(label.len() as u8);
        out.extend(label.as_bytes());
    }
    out.push(0);
    out
}

pub(crate) fn question(text: &str, kind: u16) -> Vec<u8> {
    [name(text), kind.to_be_bytes().to_vec(), vec![0, 1]].concat()
}

/// A record whose owner is given as bytes.
pub(crate) fn raw(owner: &[u8], kind: u16, class: u16, ttl: u32, data: &[u8]) -> Vec<u8> {
    let mut out = owner.to_vec();
    out.extend(kind.to_be_bytes());
    out.extend(class.to_be_bytes());
    out.extend(ttl.to_be_bytes());
    out.extend((data.len() as u16).to_be_bytes());
    out.extend(data);
    out
}

pub(crate) fn address(owner: &str, ttl: u32, address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => raw(&name(owner), A, 1, ttl, &address.octets()),
        IpAddr::V6(address) => raw(&name(owner), AAAA, 1, ttl, &address.octets()),
    }
}

pub(crate) fn cname(owner: &str, ttl: u32, target: &str) -> Vec<u8> {
    raw(&name(owner), CNAME, 1, ttl, &name(target))
}

pub(crate) fn dname(owner: &str, ttl: u32, target: &str) -> Vec<u8> {
    raw(&name(owner), DNAME, 1, ttl, &name(target))
}

/// An OPT record.
pub(crate) fn opt(size: u16, version: u8, options: &[u8]) -> Vec<u8> {
    raw(&[0], OPT, size, u32::from(version) << 16, options)
}

/// An option for [`opt`].
pub(crate) fn option(code: u16, data: &[u8]) -> Vec<u8> {
    [&code.to_be_bytes(), &(data.len() as u16).to_be_bytes(), data].concat()
}
