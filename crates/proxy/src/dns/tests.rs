use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use proptest::prelude::*;

use super::*;

#[path = "../../tests/support/dns_message.rs"]
mod build;
use build::*;

const ID: u16 = 0x1234;
const UPSTREAM_ID: u16 = 0x4321;

fn asked(message: &[u8]) -> Question {
    match Question::read(message) {
        Received::Question(question) => question,
        other => panic!("no question: {other:?}"),
    }
}

fn asks(name: &str) -> Question {
    asked(&Message::query(ID, name, A).bytes())
}

fn rcode(message: &[u8]) -> Option<u16> {
    match Question::read(message) {
        Received::Rejected(rejected) => Some(rejected.rcode.0),
        Received::Question(_) => Some(0),
        Received::Noise => None,
    }
}

fn answer_to(name: &str) -> Message {
    let query = message::with_id(&Message::query(ID, name, A).bytes(), UPSTREAM_ID);
    Message::answer_to(&query)
}

fn read(name: &str, answer: &Message) -> Result<Answer, Stray> {
    Answer::read(&asks(name), UPSTREAM_ID, &answer.bytes())
}

fn learned(name: &str, answer: &Message) -> (Vec<String>, u32) {
    let answer = read(name, answer).unwrap();
    (answer.addresses.iter().map(ToString::to_string).collect(), answer.ttl)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// The message with other counts in its header.
fn counts(mut message: Vec<u8>, counts: [u16; 4]) -> Vec<u8> {
    let bytes: Vec<u8> = counts.iter().flat_map(|count| count.to_be_bytes()).collect();
    message[4..12].copy_from_slice(&bytes);
    message
}

/// A question whose name is these bytes.
fn odd_name(name: &[u8]) -> Vec<u8> {
    let question = [name, &[0, 1, 0, 1]].concat();
    Message { questions: vec![question], ..Message::query(ID, "x", A) }.bytes()
}

/// A name of `hops` pointers, each to the one before; the first one to a label behind `start`.
fn chain_of_pointers(start: usize, hops: usize) -> Vec<u8> {
    let mut bytes = vec![1, b'a', 0];
    let mut target = start;
    for _ in 0..hops {
        let at = start + bytes.len();
        bytes.extend((0xc000 | target as u16).to_be_bytes());
        target = at;
    }
    bytes
}

fn within_a_millisecond(what: &str, message: &[u8]) -> Result<Answer, Stray> {
    let question = asks("api.example.com");
    let best = (0..5).map(|_| {
        let begun = Instant::now();
        let read = (Question::read(message), Answer::read(&question, UPSTREAM_ID, message));
        (begun.elapsed(), read.1)
    });
    let (time, answer) = best.min_by_key(|(time, _)| *time).unwrap();
    // Code that is not optimised may take longer.
    let limit = if cfg!(debug_assertions) { 200 } else { 1 };
    assert!(time < Duration::from_millis(limit), "{what}: {time:?}");
    answer
}

#[test]
fn malformed_messages() {
    let long = "a".repeat(63);
    let rows: &[(&str, Vec<u8>)] = &[
        ("pointer to itself", odd_name(&[0xc0, 12])),
        ("pointer forward", odd_name(&[0xc0, 14, 1, b'a', 0])),
        ("pointer into the header", odd_name(&[0xc0, 4])),
        ("pointer to its own labels", odd_name(&[1, b'a', 0xc0, 12])),
        ("label of 64 bytes", odd_name(&[&[64][..], &[b'a'; 64], &[0]].concat())),
        ("label of a kind nobody knows", odd_name(&[0x80, 1, 0])),
        ("name of 256 bytes", odd_name(&name(&[&*long, &long, &long, &"a".repeat(62)].join(".")))),
        ("name without end", Message::query(ID, "x", A).bytes()[..14].to_vec()),
        ("a header and nothing", Message::default().bytes()),
        ("65535 questions", counts(Message::query(ID, "x", A).bytes(), [u16::MAX; 4])),
        (
            "65535 additional records",
            counts(Message::query(ID, "x", A).bytes(), [1, 0, 0, u16::MAX]),
        ),
        ("bytes behind the end", [Message::query(ID, "x", A).bytes(), vec![0]].concat()),
        ("truncated", Message::query(ID, "x", A).flags(TRUNCATED).bytes()),
        (
            "an answer in a question",
            Message::query(ID, "x", A).answer(address("x", 1, ip("10.0.0.1"))).bytes(),
        ),
        (
            "an authority in a question",
            Message::query(ID, "x", A).authority(cname("x", 1, "y")).bytes(),
        ),
        (
            "a record of another kind behind it",
            Message::query(ID, "x", A).additional(cname("x", 1, "y")).bytes(),
        ),
    ];
    for (what, message) in rows {
        assert_eq!(rcode(message), Some(1), "{what}");
    }
    assert_eq!(Question::read(&[0; 11]), Received::Noise);
    assert_eq!(Question::read(&[]), Received::Noise);
}

#[test]
fn malformed_answers() {
    let base = answer_to("api.example.com");
    let with = |record: Vec<u8>| base.clone().answer(record).bytes();
    let end = base.bytes().len();
    let a = address("api.example.com", 60, ip("93.184.216.34"));
    let mut overlong = with(a.clone());
    let at = overlong.len() - 5;
    overlong[at] = 200;
    let rows: &[(&str, Vec<u8>)] = &[
        ("data beyond the end", overlong),
        ("pointer to itself", with(raw(&(0xc000 | end as u16).to_be_bytes(), A, 1, 1, &[1; 4]))),
        ("127 pointers", {
            let chain = chain_of_pointers(end, 127);
            let last = (0xc000 | (end + chain.len() - 2) as u16).to_be_bytes();
            let hidden = raw(&chain, 99, 1, 1, &[]);
            // The chain is a name by itself first; then somebody points to its last pointer.
            let mut message = base.clone().answer(hidden).bytes();
            message.extend(raw(&last, A, 1, 1, &[1; 4]));
            counts(message, [1, 2, 0, 0])
        }),
        ("an address of three bytes", with(raw(&name("api.example.com"), A, 1, 1, &[1; 3]))),
        ("an address of five bytes", with(raw(&name("api.example.com"), AAAA, 1, 1, &[1; 5]))),
        ("an alias with bytes behind it", with(raw(&name("a"), CNAME, 1, 1, &[1, b'b', 0, 0]))),
        ("65535 answers", counts(with(a.clone()), [1, u16::MAX, 0, 0])),
        ("65535 of everything", counts(with(a.clone()), [1, 1, u16::MAX, u16::MAX])),
        ("bytes behind the end", [with(a.clone()), vec![0]].concat()),
        (
            "two OPT records",
            base.clone().additional(opt(512, 0, &[])).additional(opt(512, 0, &[])).bytes(),
        ),
        ("half an option", base.clone().additional(opt(512, 0, &[0, 10, 0, 8, 1])).bytes()),
    ];
    for (what, message) in rows {
        assert_eq!(within_a_millisecond(what, message), Err(Stray::Malformed), "{what}");
    }
}

#[test]
fn big_messages_take_no_time() {
    // A name of 126 labels, and as many records that point to it as fit.
    let long = vec!["a"; 126].join(".");
    let mut message = answer_to("api.example.com");
    let at = message.bytes().len() as u16;
    message = message.answer(raw(&name(&long), A, 1, 1, &[1; 4]));
    let pointing = raw(&(0xc000 | at).to_be_bytes(), A, 1, 1, &[1; 4]);
    while message.answers.len() < 4000 {
        message = message.answer(pointing.clone());
    }
    let answer = within_a_millisecond("long names", &message.bytes());
    assert_eq!(answer, Err(Stray::Malformed));
    // What a real server may send in the largest message is read.
    let mut message = answer_to("api.example.com");
    for n in 0..4000u32 {
        message = message.answer(raw(&[0xc0, 12], A, 1, 60, &(0x5db8_0000 + n).to_be_bytes()));
    }
    let answer = within_a_millisecond("many addresses", &message.bytes()).unwrap();
    assert_eq!(answer.addresses.len(), MAX_ADDRESSES);
    assert!(answer.excess);
}

#[test]
fn questions_that_are_not_passed_on() {
    let query = || Message::query(ID, "api.example.com", A);
    let two = Message {
        questions: vec![question("api.example.com", A), question("evil.org", A)],
        ..query()
    };
    let none = Message { questions: vec![], ..query() };
    let class = |class: u8| {
        let question = [name("api.example.com"), vec![0, 1, 0, class]].concat();
        Message { questions: vec![question], ..query() }.bytes()
    };
    let rows: &[(&str, Vec<u8>, Option<u16>)] = &[
        ("no question", none.bytes(), Some(1)),
        ("two questions", two.bytes(), Some(1)),
        ("an answer", query().flags(0x8100).bytes(), None),
        ("an inverse query", query().flags(0x0800).bytes(), Some(4)),
        ("NOTIFY", query().flags(4 << 11).bytes(), Some(4)),
        ("UPDATE", query().flags(5 << 11).bytes(), Some(4)),
        ("IXFR", Message::query(ID, "example.com", 251).bytes(), Some(5)),
        ("AXFR", Message::query(ID, "example.com", 252).bytes(), Some(5)),
        ("ANY", Message::query(ID, "example.com", 255).bytes(), Some(5)),
        ("TKEY", Message::query(ID, "example.com", 249).bytes(), Some(5)),
        ("OPT", Message::query(ID, "example.com", OPT).bytes(), Some(5)),
        ("class CHAOS", class(3), Some(5)),
        ("class ANY", class(255), Some(5)),
        ("a plain one", query().bytes(), Some(0)),
        ("HTTPS", Message::query(ID, "example.com", 65).bytes(), Some(0)),
    ];
    for (what, message, expected) in rows {
        assert_eq!(rcode(message), *expected, "{what}");
    }
}

#[test]
fn edns() {
    let query = || Message::query(ID, "api.example.com", A);
    let with = |record: Vec<u8>| query().additional(record).bytes();
    let options = [
        option(10, &[7; 8]),
        option(8, &[0, 1, 24, 0, 10, 0, 0]),
        option(12, &[0; 128]),
        option(65001, b"x"),
    ];
    let rows: &[(&str, Vec<u8>, u16)] = &[
        ("size 0", with(opt(0, 0, &[])), 0),
        ("size 65535", with(opt(u16::MAX, 0, &[])), 0),
        ("cookie, client subnet, padding, unknown", with(opt(1232, 0, &options.concat())), 0),
        ("version 1", with(opt(1232, 1, &[])), 16),
        ("two", query().additional(opt(1232, 0, &[])).additional(opt(1232, 0, &[])).bytes(), 1),
        (
            "two, the second of version 1",
            query().additional(opt(1232, 0, &[])).additional(opt(1232, 1, &[])).bytes(),
            1,
        ),
        ("of a name", with(raw(&name("x"), OPT, 1232, 0, &[])), 1),
        ("half an option", with(opt(1232, 0, &[0, 10, 0, 8, 1])), 1),
        (
            "a signature at the end",
            query()
                .additional(opt(1232, 0, &[]))
                .additional(raw(&name("key"), 250, 255, 0, &[]))
                .bytes(),
            0,
        ),
        (
            "a signature before the end",
            query()
                .additional(raw(&name("key"), 250, 255, 0, &[]))
                .additional(opt(1232, 0, &[]))
                .bytes(),
            1,
        ),
    ];
    for (what, message, expected) in rows {
        assert_eq!(rcode(message), Some(*expected), "{what}");
    }
}

#[test]
fn replies_keep_the_question() {
    let plain = Message::query(ID, "aPi.ExAmPlE.cOm", A);
    let reply = asked(&plain.bytes()).reply(Rcode::REFUSED);
    let expected = Message { flags: 0x8105, ..plain.clone() };
    assert_eq!(reply, expected.bytes());

    let edns = plain.clone().additional(opt(4096, 0, &option(10, &[7; 8])));
    let reply = asked(&edns.bytes()).reply(Rcode::SERVER_FAILURE);
    let expected = Message { flags: 0x8102, ..plain.clone() }.additional(opt(1232, 0, &[]));
    assert_eq!(reply, expected.bytes());

    let version = plain.clone().additional(opt(4096, 1, &[]));
    let Received::Rejected(rejected) = Question::read(&version.bytes()) else { panic!() };
    let bad = raw(&[0], OPT, 1232, 1 << 24, &[]);
    let expected = Message { flags: 0x8100, ..plain }.additional(bad);
    assert_eq!(rejected.reply, expected.bytes());
}

#[test]
fn names_in_questions() {
    assert_eq!(asks("aPi.ExAmPlE.cOm").name.text(), "api.example.com");
    assert_eq!(asks("").name.text(), "");
    let text = |name: &[u8]| asked(&odd_name(name)).name.text();
    assert_eq!(text(b"\x0bapi.example\x03com\0"), "api\\046example.com");
    assert_eq!(text(b"\x04ap\0i\x07example\x03com\0"), "ap\\000i.example.com");
    // A Cyrillic letter that looks like the Latin one.
    assert_eq!(text("\u{4}\u{430}pi\u{7}example\u{3}com\0".as_bytes()), "\\208\\176pi.example.com");
}

#[test]
fn strays() {
    let good =
        answer_to("api.example.com").answer(address("api.example.com", 60, ip("93.184.216.34")));
    assert!(read("api.example.com", &good).is_ok());
    let other_type = Message { questions: vec![question("api.example.com", AAAA)], ..good.clone() };
    let other_name = Message { questions: vec![question("api.example.org", A)], ..good.clone() };
    let other_class = Message {
        questions: vec![[name("api.example.com"), vec![0, 1, 0, 3]].concat()],
        ..good.clone()
    };
    let rows = [
        ("another id", Message { id: UPSTREAM_ID ^ 1, ..good.clone() }),
        ("the client's id", Message { id: ID, ..good.clone() }),
        ("a question", Message { flags: 0x0100, ..good.clone() }),
        ("another opcode", Message { flags: RESPONSE | 4 << 11, ..good.clone() }),
        ("another type", other_type),
        ("another name", other_name),
        ("another class", other_class),
        ("no question", Message { questions: vec![], ..good.clone() }),
        (
            "two questions",
            Message { questions: [&*good.questions, &good.questions].concat(), ..good.clone() },
        ),
        (
            "no question, and refused",
            Message { id: UPSTREAM_ID, flags: RESPONSE | 5, ..Message::default() },
        ),
    ];
    for (what, message) in rows {
        assert_eq!(read("api.example.com", &message), Err(Stray::Other), "{what}");
    }
    let bare = Message { id: UPSTREAM_ID, flags: RESPONSE | 1, ..Message::default() };
    assert_eq!(read("api.example.com", &bare).unwrap().rcode, Rcode::FORMAT_ERROR);
}

#[test]
fn the_case_of_the_question_does_not_matter_in_the_answer() {
    let answer =
        answer_to("api.EXAMPLE.com").answer(address("API.example.COM", 60, ip("93.184.216.34")));
    assert_eq!(learned("aPi.ExAmPlE.cOm", &answer), (vec!["93.184.216.34".into()], 60));
}

#[test]
fn only_the_name_and_its_aliases_own_addresses() {
    let answer = answer_to("api.example.com")
        .answer(address("other.example.com", 60, ip("192.0.2.1")))
        .answer(address("example.com", 60, ip("192.0.2.2")))
        .answer(address("x.api.example.com", 60, ip("192.0.2.3")))
        .answer(address("api.example.com", 60, ip("93.184.216.34")))
        .authority(address("api.example.com", 60, ip("192.0.2.4")))
        .additional(address("api.example.com", 60, ip("192.0.2.5")));
    assert_eq!(learned("api.example.com", &answer), (vec!["93.184.216.34".into()], 60));
    let other_class = answer_to("api.example.com").answer(raw(
        &name("api.example.com"),
        A,
        3,
        60,
        &[192, 0, 2, 1],
    ));
    assert_eq!(learned("api.example.com", &other_class), (vec![], 0));
}

#[test]
fn aliases() {
    let end = || address("z.org", 50, ip("93.184.216.34"));
    let found = |ttl| (vec!["93.184.216.34".to_owned()], ttl);
    let chain = |length: usize| {
        let names: Vec<String> = (1..length).map(|n| format!("n{n}.org")).collect();
        let names: Vec<&str> = ["api.example.com"]
            .into_iter()
            .chain(names.iter().map(String::as_str))
            .chain(["z.org"])
            .collect();
        names.windows(2).fold(answer_to("api.example.com"), |answer, pair| {
            answer.answer(cname(pair[0], 100, pair[1]))
        })
    };
    assert_eq!(learned("api.example.com", &chain(1).answer(end())), found(50));
    assert_eq!(learned("api.example.com", &chain(16).answer(end())), found(50));
    assert_eq!(learned("api.example.com", &chain(17).answer(end())), (vec![], 0));

    let short =
        answer_to("api.example.com").answer(cname("api.example.com", 7, "Z.org")).answer(end());
    assert_eq!(learned("api.example.com", &short), found(7));

    let mut backwards = chain(5).answer(end());
    backwards.answers.reverse();
    assert_eq!(learned("api.example.com", &backwards), found(50));

    let broken = answer_to("api.example.com").answer(cname("other.org", 7, "z.org")).answer(end());
    assert_eq!(learned("api.example.com", &broken), (vec![], 0));

    let ring = answer_to("api.example.com")
        .answer(cname("api.example.com", 9, "b.org"))
        .answer(cname("b.org", 8, "api.example.com"))
        .answer(address("b.org", 60, ip("192.0.2.1")));
    assert_eq!(learned("api.example.com", &ring), (vec!["192.0.2.1".into()], 8));

    let subtree = answer_to("a.api.example.com")
        .answer(dname("example.com", 9, "z.org"))
        .answer(address("a.api.z.org", 60, ip("192.0.2.1")))
        .answer(address("z.org", 60, ip("192.0.2.2")));
    assert_eq!(learned("a.api.example.com", &subtree), (vec!["192.0.2.1".into()], 9));
    // DNAME says nothing of the name itself.
    let own = answer_to("example.com").answer(dname("example.com", 9, "z.org")).answer(end());
    assert_eq!(learned("example.com", &own), (vec![], 0));
}

#[test]
fn times() {
    let ttl = |ttls: &[u32]| {
        let answer = (1..).zip(ttls).fold(answer_to("x.org"), |answer, (n, ttl)| {
            answer.answer(address("x.org", *ttl, ip(&format!("192.0.2.{n}"))))
        });
        learned("x.org", &answer).1
    };
    assert_eq!(ttl(&[0]), 0);
    assert_eq!(ttl(&[1]), 1);
    assert_eq!(ttl(&[300, 20, 60]), 20);
    assert_eq!(ttl(&[(1 << 31) - 1]), (1 << 31) - 1);
    assert_eq!(ttl(&[1 << 31]), 0);
    assert_eq!(ttl(&[u32::MAX]), 0);
}

#[test]
fn nothing_is_learned_from_a_part_or_a_refusal() {
    let good = answer_to("x.org").answer(address("x.org", 60, ip("192.0.2.1")));
    let truncated = good.clone().flags(RESPONSE | TRUNCATED);
    let answer = read("x.org", &truncated).unwrap();
    assert!(answer.truncated && answer.addresses.is_empty());
    let missing = good.clone().flags(RESPONSE | 3);
    assert_eq!(learned("x.org", &missing), (vec![], 0));
    let extended = good.additional(raw(&[0], OPT, 1232, 1 << 24, &[]));
    let answer = read("x.org", &extended).unwrap();
    assert_eq!((answer.rcode, answer.addresses), (Rcode(16), vec![]));
}

fn label() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9_-]{1,12}"
}

fn domain() -> impl Strategy<Value = String> {
    prop::collection::vec(label(), 1..5).prop_map(|labels| labels.join("."))
}

proptest! {
    #[test]
    fn any_bytes_are_read(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let _ = Question::read(&bytes);
        let _ = Answer::read(&asks("x.org"), UPSTREAM_ID, &bytes);
    }

    /// Bytes that differ little from a message get further.
    #[test]
    fn spoiled_answers_are_read(spoils in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let good = answer_to("x.org")
            .answer(cname("x.org", 5, "y.org"))
            .answer(address("y.org", 60, ip("192.0.2.1")))
            .additional(opt(1232, 0, &option(10, &[1; 8])));
        let mut bytes = good.bytes();
        for (at, value) in spoils {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(answer) = Answer::read(&asks("x.org"), UPSTREAM_ID, &bytes) {
            prop_assert!(answer.addresses.len() <= MAX_ADDRESSES);
        }
        let _ = Question::read(&bytes);
    }

    /// What is judged is what a server reads: the same letters, whatever their case.
    #[test]
    fn names_are_read_as_they_are_written(domain in domain(), kind in 1u16..249) {
        prop_assume!(kind != OPT);
        let question = asked(&Message::query(ID, &domain, kind).bytes());
        prop_assert_eq!(question.name.text(), domain.to_ascii_lowercase());
        prop_assert_eq!(question.kind, kind);
    }

    /// However the records of a chain are ordered, and whatever else is there, the same is learned.
    #[test]
    fn order_and_strangers_do_not_matter(
        (records, strangers) in (2usize..10).prop_flat_map(|length| {
            let chain: Vec<Vec<u8>> = (0..length)
                .map(|n| cname(&format!("n{n}.org"), 100, &format!("n{}.org", n + 1)))
                .chain([address(&format!("n{length}.org"), 30, ip("192.0.2.1"))])
                .collect();
            (Just(chain).prop_shuffle(), prop::collection::vec(domain(), 0..5))
        }),
    ) {
        let mut answer = answer_to("n0.org");
        for stranger in strangers {
            answer = answer.answer(address(&format!("stranger.{stranger}"), 1, ip("198.51.100.1")));
        }
        for record in records {
            answer = answer.answer(record);
        }
        prop_assert_eq!(learned("n0.org", &answer), (vec!["192.0.2.1".to_owned()], 30));
    }
}
