//! What holds of any bytes that are read as DNS. Also run over the corpus by the tests.

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
