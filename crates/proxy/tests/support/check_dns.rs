//! What holds of any bytes that are read as DNS. Also run over the corpus by the tests.

use std::{collections::BTreeSet, net::IpAddr};

use crate::dns::{Answer, MAX_ADDRESSES, Question, Rcode, Received};

/// The first two bytes say how much of the rest is a question; what follows may be its answer.
pub(crate) fn check(data: &[u8]) {
    let Some((length, rest)) = data.split_first_chunk::<2>() else { return };
    let length = usize::from(u16::from_be_bytes(*length)).min(rest.len());
    let (asked, answered) = rest.split_at(length);
    let question = match Question::read(asked) {
        Received::Noise => return,
        Received::Rejected(rejected) => return check_reply(asked, &rejected.reply),
        Received::Question(question) => question,
    };
    check_name(&question.name.text());
    check_reply(asked, &question.reply(Rcode::REFUSED));
    // What the proxy says to a question is an answer to it.
    let refused = Answer::read(&question, question.id, &question.reply(Rcode::REFUSED)).unwrap();
    assert_eq!(refused.rcode, Rcode::REFUSED);
    let id = answered.first_chunk().map_or(0, |id| u16::from_be_bytes(*id));
    let Ok(answer) = Answer::read(&question, id, answered) else { return };
    assert!(answer.addresses.len() <= MAX_ADDRESSES);
    let learns = !answer.addresses.is_empty();
    assert!(!learns || (answer.rcode == Rcode::NO_ERROR && !answer.truncated));
    assert!(learns || answer.ttl == 0);
    assert!(answer.ttl < 1 << 31);
    let asked: Labels = question.name.labels().map(<[u8]>::to_vec).collect();
    if let Some(owned) = owned(&asked, answered) {
        let may = |learned: &IpAddr| {
            owned.iter().any(|(address, ttl)| address == learned && answer.ttl <= *ttl)
        };
        assert!(answer.addresses.iter().all(may), "{owned:?} are all there are");
    }
    assert!(Answer::read(&question, id.wrapping_add(1), answered).is_err());
}

fn check_reply(asked: &[u8], reply: &[u8]) {
    assert_eq!(asked[..2], reply[..2]);
    assert!(reply[2] & 0x80 != 0 && reply.len() <= asked.len() + 11);
    assert_eq!(Question::read(reply), Received::Noise);
}

fn check_name(text: &str) {
    let plain =
        |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_.\\".contains(&byte);
    assert!(text.bytes().all(plain), "{text}");
    assert!(text.is_empty() || text.split('.').all(|label| !label.is_empty()), "{text}");
}

/// A name, in lower case.
type Labels = Vec<Vec<u8>>;

/// A record of an answer, read slowly.
struct Record {
    owner: Labels,
    kind: u16,
    ttl: u32,
    data: usize,
    length: usize,
}

/// The addresses of a name and of what it may be an alias of, by a reading as simple as can be;
/// `None` if that takes too long.
fn owned(name: &Labels, message: &[u8]) -> Option<Vec<(IpAddr, u32)>> {
    const MOST: usize = 1000;
    let records = records(message)?;
    let mut names = BTreeSet::from([name.clone()]);
    for _ in 0..=16 {
        for name in names.clone() {
            names.extend(records.iter().filter_map(|record| alias(message, record, &name)));
        }
        if names.len() > MOST {
            return None;
        }
    }
    let of_names = records.iter().filter(|record| names.contains(&record.owner));
    Some(of_names.filter_map(|record| Some((address(message, record)?, record.ttl))).collect())
}

fn records(message: &[u8]) -> Option<Vec<Record>> {
    const INTERNET: u16 = 1;
    let count = word(message, 6)?;
    let (_, question) = name(message, 12)?;
    let mut at = question + 4;
    let mut records = Vec::new();
    for _ in 0..count {
        let (owner, fixed) = name(message, at)?;
        let (kind, class, length) =
            (word(message, fixed)?, word(message, fixed + 2)?, word(message, fixed + 8)?.into());
        let ttl = u32::from(word(message, fixed + 4)?) << 16 | u32::from(word(message, fixed + 6)?);
        let data = fixed + 10;
        at = data + length;
        if class == INTERNET {
            records.push(Record { owner, kind, ttl, data, length });
        }
    }
    Some(records)
}

/// What the record makes of a name.
fn alias(message: &[u8], record: &Record, of: &Labels) -> Option<Labels> {
    const CNAME: u16 = 5;
    const DNAME: u16 = 39;
    match record.kind {
        CNAME if record.owner == *of => Some(name(message, record.data)?.0),
        DNAME if of.len() > record.owner.len() && of.ends_with(&record.owner) => {
            let kept = &of[..of.len() - record.owner.len()];
            let alias = [kept, &name(message, record.data)?.0].concat();
            (alias.iter().map(|label| label.len() + 1).sum::<usize>() < 255).then_some(alias)
        }
        _ => None,
    }
}

fn address(message: &[u8], record: &Record) -> Option<IpAddr> {
    let data = message.get(record.data..record.data + record.length)?;
    match record.kind {
        1 => Some(<[u8; 4]>::try_from(data).ok()?.into()),
        28 => Some(<[u8; 16]>::try_from(data).ok()?.into()),
        _ => None,
    }
}

fn word(message: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(message.get(at..at + 2)?.try_into().ok()?))
}

/// The name at a place, and where it ends there.
fn name(message: &[u8], mut at: usize) -> Option<(Labels, usize)> {
    const MOST_STEPS: usize = 200;
    let (mut labels, mut end) = (Vec::new(), None);
    for _ in 0..MOST_STEPS {
        let length = usize::from(*message.get(at)?);
        match length {
            0 => return Some((labels, end.unwrap_or(at + 1))),
            0xc0.. => {
                end.get_or_insert(at + 2);
                at = usize::from(word(message, at)? & 0x3fff);
            }
            _ => {
                labels.push(message.get(at + 1..=at + length)?.to_ascii_lowercase());
                at += 1 + length;
            }
        }
    }
    None
}
