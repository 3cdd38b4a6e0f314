//! What HTTP/1 messages can be made to mean, and what the origin gets of them.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod world;

use std::{
    io::{Read, Write},
    net::Shutdown,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use palisade_api::{
    flow::L7,
    proxy::{Endpoint, Peer, Rules},
};
use palisade_policy::{
    l7::{HeaderRule, HeaderValue, HttpRule, Mismatch, Pattern, SecretRef},
    model::Application,
};
use world::{
    CLIENT4, CLIENT6, SERVER4, SERVER6, World,
    agent::{http, rules, source},
    origin::{Origin, field},
    rest, status, until,
};

const HEAD: &str = "GET /public HTTP/1.1\r\nHost: a\r\n";
/// The end of an answer to what is denied.
const DENIED: &str = "Access denied\r\n";

fn public() -> World {
    World::new(rules(1, &[http(&["GET|HEAD|POST|DELETE|OPTIONS /public(/.*)?", r"OPTIONS \*"])]))
}

/// A request that is allowed. Behind what is refused it is none.
const NEXT: &str = "GET /public/next HTTP/1.1\r\nHost: a\r\n\r\n";

/// Each is answered with one of the statuses, closed, and neither it nor what follows it reaches the
/// origin.
fn refused(cases: &[(&str, String, &[u16])]) {
    let world = public();
    let origin = Origin::ok(&world.server);
    for (name, bytes, statuses) in cases {
        let answer = world.ask((bytes.clone() + NEXT).as_bytes());
        let text = String::from_utf8_lossy(&answer);
        assert!(statuses.contains(&status(&answer)), "{name}: {text}");
        assert!(text.matches("HTTP/1.1 ").count() < 2, "{name}: {text}");
        assert_eq!(origin.text(), "", "{name}");
        assert_eq!(origin.seen().connections, 0, "{name}");
    }
}

/// A request with some header lines, and what follows the head.
fn with(lines: &str, body: &str) -> String {
    format!("POST /public HTTP/1.1\r\nHost: a\r\n{lines}\r\n{body}")
}

#[test]
fn lengths_that_are_in_doubt_are_refused() {
    let chunked = "Transfer-Encoding: chunked\r\n";
    let length = |value: &str| with(&format!("Content-Length: {value}\r\n"), "12345");
    let coding = |value: &str| with(&format!("Transfer-Encoding: {value}\r\n"), "0\r\n\r\n");
    let mut cases: Vec<(&str, String, &[u16])> = vec![
        (
            "length, then coding",
            with(&format!("Content-Length: 5\r\n{chunked}"), "0\r\n\r\n"),
            &[400],
        ),
        (
            "coding, then length",
            with(&format!("{chunked}Content-Length: 5\r\n"), "0\r\n\r\n"),
            &[400],
        ),
        ("two lengths", with("Content-Length: 5\r\nContent-Length: 6\r\n", "123456"), &[400]),
        ("one length twice", with("Content-Length: 5\r\nContent-Length: 5\r\n", "12345"), &[400]),
        ("two codings", with(&format!("{chunked}{chunked}"), "0\r\n\r\n"), &[400]),
        (
            "coding and another",
            with(&format!("{chunked}Transfer-Encoding: gzip\r\n"), "0\r\n\r\n"),
            &[400],
        ),
        (
            "coding in 1.0",
            "POST /public HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
                .into(),
            &[400],
        ),
        ("folded coding", with("Transfer-Encoding:\r\n chunked\r\n", "0\r\n\r\n"), &[400]),
        (
            "named by connection",
            with("Connection: content-length\r\nContent-Length: 5\r\n", "12345"),
            &[400],
        ),
    ];
    for value in [
        "5, 5",
        "5, 6",
        "+5",
        "-1",
        "0x5",
        "5_0",
        "5 6",
        "",
        "9223372036854775808",
        "18446744073709551621",
        "5;",
        "٥",
    ] {
        cases.push(("length", length(value), &[400]));
    }
    for value in [
        "chunked, chunked",
        "identity",
        "gzip, chunked",
        "chunked, gzip",
        "xchunked",
        "chunked;x",
        "\"chunked\"",
        "chunked\x0b",
        "chun\0ked",
        "",
        "chunked,",
        "\x0bchunked",
    ] {
        cases.push(("coding", coding(value), &[400, 501]));
    }
    refused(&cases);
}

#[test]
fn chunks_that_are_in_doubt_are_refused() {
    let world = public();
    let origin = Origin::ok(&world.server);
    for body in [
        "0x5\r\n12345\r\n0\r\n\r\n",
        "5 \r\n12345\r\n0\r\n\r\n",
        " 5\r\n12345\r\n0\r\n\r\n",
        "+5\r\n12345\r\n0\r\n\r\n",
        "00000000000000005\r\n12345\r\n0\r\n\r\n",
        "10000000000000005\r\n12345\r\n0\r\n\r\n",
        "\r\n12345\r\n0\r\n\r\n",
        "5;a\nb\r\n12345\r\n0\r\n\r\n",
        "5\n12345\r\n0\r\n\r\n",
        "5\r\n12345\n0\r\n\r\n",
        "5\r\n1234567\r\n0\r\n\r\n",
        "5\r\n12345\r\n0\r\nX\r\n\r\n",
        "0\r\nX",
        "0\n\r\n",
        "5\r\n12345\r\n0\r\n X: y\r\n\r\n",
        "5\r\n12345\r\n0\r\nX : y\r\n\r\n",
        "0\r\nX: y\n\r\n",
        "5\r12345\r\n0\r\n\r\n",
        "g\r\n\r\n",
        "-5\r\n12345\r\n0\r\n\r\n",
    ] {
        let bytes = with("Transfer-Encoding: chunked\r\n", body) + NEXT;
        let answer = world.ask(bytes.as_bytes());
        let text = String::from_utf8_lossy(&answer);
        assert!([0, 400].contains(&status(&answer)), "{body:?}: {text}");
        assert!(text.matches("HTTP/1.1 ").count() < 2, "{body:?}: {text}");
        // A request that was begun is not completed.
        let seen = origin.text();
        assert!(!seen.ends_with("0\r\n\r\n") && !seen.contains("next"), "{body:?}: {seen}");
        origin.forget();
    }
    let long = format!("5;{}\r\n12345\r\n0\r\n\r\n", "x".repeat(5000));
    assert_eq!(status(&world.ask(with("Transfer-Encoding: chunked\r\n", &long).as_bytes())), 400);
}

#[test]
fn bodies_are_framed_anew() {
    let world = public();
    let origin = Origin::ok(&world.server);
    let body = "5;ext=\"a\"\r\n12345\r\n0005\r\n67890\r\n0;x\r\nHost: evil\r\nContent-Length: 3\r\n\
                Authorization: evil\r\nX-Role: admin\r\nTE: trailers\r\nTransfer-Encoding: gzip\r\n\r\n";
    let answer = world.ask(with("transfer-encoding: \t chunked\t \r\n", body).as_bytes());
    assert_eq!(status(&answer), 200);
    let seen = origin.text();
    assert_eq!(
        seen,
        "POST /public HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n\
         5\r\n12345\r\n5\r\n67890\r\n0\r\n\r\n",
    );
    origin.forget();
    for method in ["GET", "HEAD", "DELETE", "POST"] {
        let bytes = format!("{method} /public HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc");
        assert_eq!(status(&world.ask(bytes.as_bytes())), 200, "{method}");
        let wanted =
            format!("{method} /public HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc");
        assert_eq!(origin.text(), wanted);
        origin.forget();
    }
    // The rest of a body is no request, and what is too short is none either.
    let answer = world.ask(b"POST /public HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET /public/2 HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(String::from_utf8_lossy(&answer).matches("200 OK").count(), 2);
    origin.forget();
    let answer = world.ask(b"POST /public HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\nabc");
    assert_eq!(status(&answer), 0);
}

#[test]
fn what_is_no_header_field_is_refused() {
    let line = |line: &str| format!("{HEAD}{line}\r\n\r\n");
    let mut cases: Vec<(&str, String, &[u16])> = Vec::new();
    for bad in [
        "Name : v",
        "Name\t: v",
        "",
        ": v",
        ":",
        "novalue",
        "N(me: v",
        "Näme: v",
        "X: a\r\n b",
        "X: a\r\n\tb",
        "Host: b",
        "X: a\rb",
        "X: a\0b",
        "X: a\x01b",
        "X: a\x7fb",
        "X: a\x1fb",
        "X: a\r\r\nY: b",
        "X: a\nY: b",
        "X: a\r\n\nY: b",
    ] {
        if !bad.is_empty() {
            cases.push((bad, line(bad), &[400]));
        }
    }
    let controls = (0..0x20).chain([0x7f]).filter(|byte| *byte != b'\t').map(char::from);
    let controls: Vec<String> = controls.map(|control| format!("X: a{control}b")).collect();
    for control in &controls {
        cases.push((control, line(control), &[400]));
    }
    cases.push(("leading space", "GET /public HTTP/1.1\r\n Host: a\r\n\r\n".into(), &[400]));
    cases.push(("folded host", "GET /public HTTP/1.1\r\nHost:\r\n a\r\n\r\n".into(), &[400]));
    cases.push(("bare LF", "GET /public HTTP/1.1\nHost: a\n\n".into(), &[400]));
    cases.push(("bare LF at the end", format!("{HEAD}\n"), &[400]));
    cases.push(("bare CR", "GET /public HTTP/1.1\rHost: a\r\r".into(), &[0, 400]));
    cases.push(("connection is no list", line("Connection: a b"), &[400]));
    cases.push(("connection names host", line("Connection: close, Host"), &[400]));
    cases.push(("expectation", line("Expect: 200-ok"), &[417]));
    refused(&cases);
}

#[test]
fn first_lines_are_three_words() {
    let line = |line: &str| format!("{line}\r\nHost: a\r\n\r\n");
    let mut cases: Vec<(&str, String, &[u16])> = Vec::new();
    for bad in [
        "GET  /public HTTP/1.1",
        "GET\t/public HTTP/1.1",
        "GET /public\tHTTP/1.1",
        "GET /public",
        "GET /public HTTP/1.10",
        "GET /public http/1.1",
        "GET /public HTTP/1.1 x",
        "GET /public HTTP/1.1 ",
        " GET /public HTTP/1.1",
        "GET /pub lic HTTP/1.1",
        "GET /public  HTTP/1.1",
        "G(T /public HTTP/1.1",
        "\r\n\r\nGET /public HTTP/1.1",
        "GET HTTP/1.1",
        "GET /public HTTP/1",
        "GET /public HTTP/11",
    ] {
        cases.push((bad, line(bad), &[400, 505]));
    }
    let controls: Vec<_> = (0..0x20).chain([0x7f]).map(char::from).collect();
    let in_target: Vec<_> = controls.iter().map(|c| format!("GET /public/{c} HTTP/1.1")).collect();
    cases.extend(in_target.iter().map(|bad| (bad.as_str(), line(bad), &[400][..])));
    cases.push(("HTTP/2.0", line("GET /public HTTP/2.0"), &[505]));
    cases.push(("HTTP/1.2", line("GET /public HTTP/1.2"), &[505]));
    cases.push(("HTTP/0.9", "GET /public\r\n".into(), &[0, 400]));
    cases.push((
        "long method",
        line(&format!("{} /public HTTP/1.1", "G".repeat(300))),
        &[400, 501],
    ));
    cases.push(("CONNECT", line("CONNECT a:80 HTTP/1.1"), &[405]));
    cases.push(("CONNECT with a path", line("CONNECT /public HTTP/1.1"), &[405]));
    cases.push(("CONNECT with a URL", line("CONNECT http://a/public HTTP/1.1"), &[405]));
    cases.push(("CONNECT without host", "CONNECT a:80 HTTP/1.1\r\n\r\n".into(), &[400, 405]));
    refused(&cases);
    let world = public();
    let origin = Origin::ok(&world.server);
    let answer = world.ask(format!("\r\n{HEAD}\r\n").as_bytes());
    assert_eq!(status(&answer), 200, "one empty line before is fine");
    for method in ["get", "GETX", "PUT", "TRACE", "Get"] {
        origin.forget();
        let head =
            format!("{method} /public HTTP/1.1\r\nHost: a\r\nX-HTTP-Method-Override: GET\r\n\r\n");
        let answer = String::from_utf8(world.ask(head.as_bytes())).unwrap();
        assert!(
            answer.starts_with(
                "HTTP/1.1 403 Forbidden\r\ncontent-length: 15\r\ncontent-type: text/plain\r\ndate: "
            ),
            "{answer}"
        );
        assert!(answer.ends_with("\r\nserver: envoy\r\n\r\nAccess denied\r\n"), "{answer}");
        assert_eq!(origin.seen().connections, 0, "{method}");
    }
}

#[test]
fn what_is_not_http_reaches_nobody() {
    let world = public();
    let origin = Origin::ok(&world.server);
    let hello: &[u8] = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";
    let random: Vec<u8> =
        (0..400u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for bytes in
        [hello, b"SSH-2.0-OpenSSH_9.7\r\n", b"EHLO x\r\n", &random, b"\0\0\0\0", b"\r\n\r\n\r\n"]
    {
        let answer = world.ask(bytes);
        assert!([0, 400].contains(&status(&answer)), "{}", String::from_utf8_lossy(&answer));
        // Without the client ending the stream, too.
        let mut stream = world.connect(SERVER4);
        stream.write_all(bytes).unwrap();
        rest(&mut stream);
    }
    assert_eq!(origin.seen().connections, 0);
}

#[test]
fn paths_are_judged_and_forwarded_in_one_form() {
    let world = public();
    let origin = Origin::ok(&world.server);
    for (target, wanted) in [
        ("/public/../admin", Err(403)),
        ("/public/./../admin", Err(403)),
        ("/public/%2e%2e/admin", Err(403)),
        ("/public/.%2E/admin", Err(403)),
        ("/public%2f..%2fadmin", Err(400)),
        ("/public/..%5cadmin", Err(400)),
        (r"/public\..\admin", Err(400)),
        ("/public%5c", Err(400)),
        ("/public%2F", Err(400)),
        ("//admin", Err(403)),
        ("///admin", Err(403)),
        ("/public//../admin", Err(403)),
        ("/admin/", Err(403)),
        ("/admin/.", Err(403)),
        ("/public/..;/admin", Err(400)),
        ("/admin;x", Err(400)),
        ("/public;a=b/..;/admin", Err(400)),
        ("/%3b", Err(400)),
        ("/public/%3B", Err(400)),
        ("/%61dmin", Err(403)),
        ("/%2561dmin", Err(403)),
        ("/public/%2561", Ok("/public/%2561")),
        ("/%70ublic", Ok("/public")),
        ("/public/%00", Err(400)),
        ("/public/%0d%0a", Err(400)),
        ("/public/%zz", Err(400)),
        ("/public/%2", Err(400)),
        ("/public/%", Err(400)),
        ("/public/%c0%ae", Err(400)),
        ("/public/%ff", Err(400)),
        ("/public/%u002e", Err(400)),
        ("/public/／", Err(400)),
        ("/public/\u{80}", Err(400)),
        ("/PUBLIC", Err(403)),
        ("/public.", Err(403)),
        ("/public%20", Err(403)),
        ("/public%09", Err(400)),
        ("/publicx", Err(403)),
        ("/public/?x=/../admin", Ok("/public/?x=/../admin")),
        ("/public/..?x", Err(403)),
        ("/?x=/public", Err(403)),
        ("/public/?", Ok("/public/?")),
        ("/public/?%00", Ok("/public/?%00")),
        ("/public?", Err(403)),
        ("/public?#", Err(400)),
        ("/admin#", Err(400)),
        ("/public#/../admin", Err(400)),
        ("/public/a/../b/./c//d", Ok("/public/b/c/d")),
        ("/public/%e2%82%ac", Ok("/public/%E2%82%AC")),
        ("/../../public", Ok("/public")),
        ("/public/...", Ok("/public/...")),
        ("/public/a%2e", Ok("/public/a.")),
        ("http://a/public", Ok("/public")),
        ("HTTP://A/public", Ok("/public")),
        ("http://a", Err(403)),
        ("http://a?/public", Err(403)),
        ("http://other/public", Err(400)),
        ("https://a/public", Err(400)),
        ("http://a@evil/public", Err(400)),
        ("http://evil@a/public", Err(400)),
        ("http://a:80/public", Err(400)),
        ("http://a#/public", Err(400)),
        ("http:///public", Err(400)),
        ("*", Err(400)),
        ("a:80", Err(400)),
        ("public", Err(400)),
        ("ftp://a/public", Err(400)),
        ("?/public", Err(400)),
        ("/public/\"", Err(400)),
        ("/public/<", Err(400)),
    ] {
        origin.forget();
        let answer = world.ask(format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes());
        match wanted {
            Ok(path) => {
                assert_eq!(status(&answer), 200, "{target}");
                assert_eq!(
                    origin.text(),
                    format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n"),
                    "{target}"
                );
            }
            Err(refused) => {
                assert_eq!(status(&answer), refused, "{target}");
                assert_eq!(origin.seen().connections, 0, "{target}");
            }
        }
    }
    origin.forget();
    assert_eq!(status(&world.ask(b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n")), 200);
    assert_eq!(origin.text(), "OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n");
}

/// Matching takes a time that grows with the path and the rules, whatever they are.
#[test]
fn many_and_awkward_rules() {
    let mut patterns: Vec<String> = (0..10_000).map(|n| format!("GET /api/v{n}/item")).collect();
    patterns.extend(["GET /(a*)*b", "GET /(a|aa)+c", "GET /(.*)(.*)(.*)(.*)xyz"].map(String::from));
    let patterns: Vec<_> = patterns.iter().map(String::as_str).collect();
    let world = World::new(rules(1, &[http(&patterns)]));
    let origin = Origin::ok(&world.server);
    let long = "a".repeat(30_000);
    // The first request waits until the rules are made ready.
    assert_eq!(status(&world.ask(b"GET /other HTTP/1.1\r\nHost: a\r\n\r\n")), 403);
    for (target, wanted) in [
        ("/api/v0/item", 200),
        ("/api/v9999/item", 200),
        ("/api/v10000/item", 403),
        ("/api/v9999/itemx", 403),
        (&format!("/{long}"), 403),
        (&format!("/{long}b"), 200),
        (&format!("/{long}d"), 403),
    ] {
        let begun = Instant::now();
        let answer = world.ask(format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes());
        assert_eq!(status(&answer), wanted, "{target:.40}");
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?} for {target:.40}", begun.elapsed());
    }
    assert_eq!(origin.seen().connections, 3);
}

/// A rule that is too large to compile allows nothing and takes nothing from the others of its table,
/// but what it might change is denied.
#[test]
fn a_rule_that_does_not_compile_is_left_out() {
    let too_large = |text: &str| Some(Pattern::try_from(text.to_owned()).unwrap());
    let of_path = |path| HttpRule { path, ..HttpRule::default() };
    let good = of_path(Some(Pattern::new("/public").unwrap()));
    let bad = of_path(too_large("/secret|/[a-z]{9999}"));
    let header = |value: &str, mismatch| HeaderRule {
        name: "x".into(),
        value: Some(HeaderValue::Text(value.into())),
        mismatch,
    };
    let broken = |mismatch| HttpRule {
        host: too_large("[a-z]{9999}"),
        headers: vec![header("1", mismatch)],
        ..HttpRule::default()
    };
    let (editing, removing) = (broken(Mismatch::Replace), broken(Mismatch::Delete));
    let world = public();
    let origin = Origin::ok(&world.server);
    let one = |rule: &HttpRule| Application::Http(vec![rule.clone()]);
    let tables = [
        (vec![one(&bad)], 403, 403),
        (vec![one(&good)], 200, 200),
        (vec![Application::Http(vec![bad.clone(), good.clone()])], 200, 200),
        (vec![one(&good), one(&bad)], 200, 200),
        (vec![one(&bad), one(&good)], 200, 200),
        (vec![one(&good), one(&editing)], 403, 200),
        (vec![one(&good), one(&removing)], 200, 200),
    ];
    for (version, (table, bare, with_header)) in (2..).zip(&tables) {
        world.agent.put(rules(version, table));
        for server in [SERVER4, SERVER6] {
            for (request, wanted) in [
                (format!("{HEAD}\r\n"), *bare),
                (format!("{HEAD}X: 1\r\n\r\n"), *with_header),
                ("GET /secret HTTP/1.1\r\nHost: a\r\nX: 1\r\n\r\n".to_owned(), 403),
            ] {
                let mut stream = world.connect(server);
                stream.write_all(request.as_bytes()).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
                assert_eq!(status(&rest(&mut stream)), wanted, "{version} {server} {request}");
            }
        }
    }
    assert!(origin.text().contains("/public") && !origin.text().contains("/secret"));
    // The client's policy adds what the server's might remove.
    let adding = HttpRule { headers: vec![header("2", Mismatch::Add)], ..good.clone() };
    for (version, table, wanted) in
        [(20, vec![one(&good)], 200), (21, vec![one(&good), one(&removing)], 403)]
    {
        world.agent.put(both_ends(version, &[one(&adding)], &table));
        for server in [SERVER4, SERVER6] {
            let mut stream = world.connect(server);
            stream.write_all(format!("{HEAD}\r\n").as_bytes()).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            assert_eq!(status(&rest(&mut stream)), wanted, "{version} {server}");
        }
    }
}

/// Rules of the client's end and of the server's.
fn both_ends(version: u64, egress: &[Application], ingress: &[Application]) -> Rules {
    let mut both = rules(version, ingress);
    let client = Endpoint { id: 8, identity: 301, ingress: None, egress: Some(3) };
    both.endpoints.extend([(CLIENT4, client), (CLIENT6, client)]);
    both.tables.insert(3, Arc::clone(&rules(version, egress).tables[&2]));
    let server = Peer { identity: 300, prefix: 0, host: false };
    both.addresses.extend([(SERVER4, server), (SERVER6, server)]);
    both
}

/// The server's end is asked about the request that the server would get.
#[test]
fn what_one_end_changes_the_other_judges() {
    let rule = |value: &str, mismatch| {
        let value = Some(HeaderValue::Text(value.into()));
        let header = HeaderRule { name: "x-role".into(), value, mismatch };
        [Application::Http(vec![HttpRule { headers: vec![header], ..HttpRule::default() }])]
    };
    let demanded = rule("user", Mismatch::Fail);
    let world = public();
    let origin = Origin::ok(&world.server);
    for (version, (egress, role, wanted)) in (2..).zip([
        (rule("admin", Mismatch::Replace), "user", 403),
        (rule("admin", Mismatch::Add), "user", 403),
        (rule("admin", Mismatch::Delete), "user", 403),
        (rule("admin", Mismatch::Log), "user", 200),
        (rule("user", Mismatch::Replace), "admin", 200),
        (rule("user", Mismatch::Add), "admin", 403),
    ]) {
        origin.forget();
        world.agent.put(both_ends(version, &egress, &demanded));
        let answer = world.ask(format!("{HEAD}X-Role: {role}\r\n\r\n").as_bytes());
        assert_eq!(status(&answer), wanted, "{egress:?}");
        match wanted {
            200 => assert_eq!(field(&origin.text(), "x-role"), Some("user"), "{egress:?}"),
            _ => assert_eq!(origin.text(), "", "{egress:?}"),
        }
    }
}

/// Rules that no policy makes, from an agent that does not look: what they would write makes more
/// than one request of one, or another one.
#[test]
fn what_would_write_more_than_a_header_passes_nothing() {
    const SMUGGLED: &str = "1\r\n\r\nPUT /admin HTTP/1.1\r\nHost: d\r\nx: y";
    let world = public();
    let origin = Origin::ok(&world.server);
    let editing = [Mismatch::Add, Mismatch::Replace];
    let cases = [
        ("x", SMUGGLED),
        ("x", "1\n"),
        ("x", "1\r"),
        ("x", "1\0"),
        ("x: 1\r\ny", "1"),
        ("transfer-encoding", "chunked"),
        ("content-length", "1"),
        ("connection", "x-role"),
        ("upgrade", "websocket"),
        ("host", "b"),
        ("x_role", "admin"),
    ];
    let cases = cases.into_iter().flat_map(|case| editing.map(|mismatch| (case, mismatch)));
    for (version, ((name, value), mismatch)) in (2..).zip(cases) {
        let secret = SecretRef { namespace: "x".into(), name: "s".into(), key: None };
        for wanted in [HeaderValue::Text(value.into()), HeaderValue::Secret(secret.clone())] {
            let header = HeaderRule { name: name.into(), value: Some(wanted), mismatch };
            let rule = HttpRule { headers: vec![header], ..HttpRule::default() };
            let mut all = rules(version, &[Application::Http(vec![rule])]);
            all.secrets = [(secret.clone(), value.to_owned())].into_iter().collect();
            world.agent.put(all);
            for request in [
                format!("{HEAD}\r\n"),
                "POST /public HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n".to_owned(),
            ] {
                let answer = world.ask(request.as_bytes());
                assert_eq!(status(&answer), 403, "{name}: {value:?} {mismatch:?}");
            }
        }
    }
    assert_eq!(origin.text(), "");
    let record = world.agent.record(|record| match &record.l7 {
        L7::Http(seen) => seen.error.as_deref().is_some_and(|error| error.contains("header")),
        _ => false,
    });
    assert!(!record.allowed);
}

#[test]
fn there_is_one_host() {
    let world = public();
    let origin = Origin::ok(&world.server);
    for (lines, wanted) in [
        ("", None),
        ("Host: a\r\nHost: a\r\n", None),
        ("Host:\r\n", None),
        ("Host: a, b\r\n", None),
        ("Host: a b\r\n", None),
        ("Host: a:99999\r\n", None),
        ("Host: a:\r\n", None),
        ("Host: a:+80\r\n", None),
        ("Host: a/b\r\n", None),
        ("Host: x@a\r\n", None),
        ("Host: [::1\r\n", None),
        ("Host: ::1\r\n", None),
        ("Host: [zz]\r\n", None),
        ("Host: a..b\r\n", None),
        ("Host: a%2eb\r\n", None),
        ("Host: \u{e4}\r\n", None),
        ("Host: 1.2.3\r\n", None),
        ("Host: [::1]x\r\n", None),
        ("Host: ok:80\r\n", Some("ok:80")),
        ("Host: ok.\r\n", Some("ok")),
        ("Host: OK\r\n", Some("ok")),
        ("Host: [::1]\r\n", Some("[::1]")),
        ("Host: [0::01]:8080\r\n", Some("[::1]:8080")),
        ("Host: ok \r\n", Some("ok")),
        ("Host:\tok\t\r\n", Some("ok")),
        ("Host: 10.0.0.1\r\n", Some("10.0.0.1")),
        ("Host: a_b.c\r\n", Some("a_b.c")),
    ] {
        origin.forget();
        let answer = world.ask(format!("GET /public HTTP/1.1\r\n{lines}\r\n").as_bytes());
        match wanted {
            Some(host) => {
                assert_eq!(status(&answer), 200, "{lines:?}");
                assert_eq!(field(&origin.text(), "host"), Some(host), "{lines:?}");
            }
            None => {
                assert_eq!(status(&answer), 400, "{lines:?}");
                assert_eq!(origin.seen().connections, 0, "{lines:?}");
            }
        }
    }
}

#[test]
fn only_what_was_judged_goes_further() {
    let world = public();
    let origin = Origin::ok(&world.server);
    let lines = "Connection: keep-alive, X-Role\r\nX-Role: admin\r\nX_Role: admin\r\nKeep-Alive: 5\r\n\
                 TE: trailers\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\nProxy-Connection: x\r\n\
                 Trailer: X\r\nAccept:  */* \t\r\nX-Twice: 1\r\nX-Twice: 2\r\nX-Bytes: \u{fc}\r\n";
    let answer = world.ask(format!("{HEAD}{lines}\r\n").as_bytes());
    assert_eq!(status(&answer), 200);
    assert_eq!(
        origin.text(),
        "GET /public HTTP/1.1\r\nhost: a\r\naccept: */*\r\nx-twice: 1\r\nx-twice: 2\r\n\
         x-bytes: \u{fc}\r\n\r\n"
    );
}

#[test]
fn each_request_of_a_pipeline_is_judged() {
    let world = public();
    let origin = Origin::ok(&world.server);
    let request = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n");
    let pipeline = request("/public/1") + &request("/admin/2") + &request("/public/3");
    let check = |answer: &str| {
        let statuses: Vec<_> = answer.matches("HTTP/1.1 ").collect();
        assert_eq!(statuses.len(), 3, "{answer}");
        let (first, others) = answer.split_at(answer.find("403").unwrap());
        assert!(first.contains("200 OK") && others.contains("200 OK"), "{answer}");
        let seen = origin.text();
        assert_eq!(seen.matches("GET ").count(), 2, "{seen}");
        assert!(seen.find("/public/1").unwrap() < seen.find("/public/3").unwrap(), "{seen}");
        assert_eq!(origin.seen().connections, 1);
    };
    check(&String::from_utf8(world.ask(pipeline.as_bytes())).unwrap());
    origin.forget();
    let mut stream = world.connect(SERVER4);
    for byte in pipeline.as_bytes() {
        stream.write_all(&[*byte]).unwrap();
    }
    stream.shutdown(Shutdown::Write).unwrap();
    check(&String::from_utf8(rest(&mut stream)).unwrap());
}

/// Whatever an old client says of its connection: it ends with the first answer.
#[test]
fn an_old_client_is_answered_once() {
    let world = public();
    let origin = Origin::ok(&world.server);
    for connection in ["", "Connection: keep-alive\r\n"] {
        for (path, wanted, arrived) in [("/public", 200, 1), ("/admin", 403, 0)] {
            origin.forget();
            let request = format!("GET {path} HTTP/1.0\r\nHost: a\r\n{connection}\r\n");
            let next = "GET /public/next HTTP/1.0\r\nHost: a\r\n\r\n";
            let answer = world.ask((request + next).as_bytes());
            let text = String::from_utf8_lossy(&answer);
            assert_eq!(status(&answer), wanted, "{text}");
            assert_eq!(text.matches("HTTP/1.1 ").count(), 1, "{text}");
            assert!(text.contains("connection: close\r\n"), "{text}");
            assert_eq!(origin.text().matches("GET ").count(), arrived, "{}", origin.text());
            assert!(!origin.text().contains("next"));
        }
    }
}

#[test]
fn a_denied_body_is_no_request() {
    let world = public();
    let origin = Origin::ok(&world.server);
    let inner = "GET /public HTTP/1.1\r\nHost: a\r\n\r\n";
    let post = format!(
        "POST /admin HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{inner}",
        inner.len()
    );
    let answer = String::from_utf8(world.ask(post.as_bytes())).unwrap();
    assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
    // One whose length is not known, or is too long to wait for, ends the connection.
    let chunked = format!(
        "POST /admin HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{inner}"
    );
    let long = format!("POST /admin HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n{inner}");
    let expects = format!(
        "POST /admin HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n{inner}"
    );
    for bytes in [chunked, long, expects] {
        let answer = String::from_utf8(world.ask(bytes.as_bytes())).unwrap();
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
        assert!(answer.contains("403") && answer.contains("connection: close"), "{answer}");
    }
    assert_eq!(origin.seen().connections, 0);
}

#[test]
fn who_expects_is_told_to_continue_by_the_server() {
    let world = public();
    let _origin = Origin::new(&world.server, |head, stream| {
        assert_eq!(field(head, "expect"), Some("100-continue"));
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").is_ok()
    });
    // This origin reads whole requests only, so the client sends without being told.
    let mut stream = world.connect(SERVER4);
    stream.write_all(b"POST /public HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\nContent-Length: 2\r\n\r\nok").unwrap();
    assert!(until(&mut stream, "\r\n\r\n").starts_with("HTTP/1.1 200"));

    let early = Origin::on(&world.server, 81, |_, _| true);
    let mut stream = world.connect_to((SERVER4, 81).into());
    stream.write_all(b"POST /public HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n").unwrap();
    early.wait(|seen| seen.bytes.ends_with(b"\r\n\r\n"));
}

#[test]
fn an_early_answer_ends_the_connection() {
    let world = public();
    let origin = world.server.run(|| std::net::TcpListener::bind("[::]:80").unwrap());
    let mut stream = world.connect(SERVER4);
    stream.write_all(b"POST /public HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 36\r\n\r\n").unwrap();
    let (mut server, _) = origin.accept().unwrap();
    until(&mut server, "\r\n\r\n");
    server
        .write_all(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n",
        )
        .unwrap();
    assert_eq!(until(&mut stream, "\r\n\r\n"), "HTTP/1.1 100 Continue\r\n\r\n");
    let last = until(&mut stream, "\r\n\r\n");
    assert!(last.contains("413") && last.contains("connection: close"), "{last}");
    // The body comes all the same.
    _ = stream.write_all(b"GET /public HTTP/1.1\r\nHost: a\r\n\r\n");
    assert_eq!(rest(&mut stream), b"");
    assert_eq!(rest(&mut server), b"");
}

#[test]
fn answers_that_are_in_doubt_are_no_answers() {
    let ok = "HTTP/1.1 200 OK\r\n";
    let bad = [
        format!("{ok}content-length: 2\r\ntransfer-encoding: chunked\r\n\r\nok"),
        format!("{ok}transfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n0\r\n\r\n"),
        format!("{ok}content-length: 2\r\ncontent-length: 3\r\n\r\nok"),
        format!("{ok}transfer-encoding: gzip\r\n\r\nok"),
        format!("{ok}content-length: +2\r\n\r\nok"),
        format!("{ok}X : y\r\ncontent-length: 2\r\n\r\nok"),
        format!("{ok}X: y\r\n z\r\ncontent-length: 2\r\n\r\nok"),
        format!("{ok}X: y\ncontent-length: 2\r\n\r\nok"),
        format!("{ok}X: {}\r\ncontent-length: 2\r\n\r\nok", "y".repeat(70_000)),
        format!("{ok}{}\r\n", "X: y\r\n".repeat(10_000)),
        "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".into(),
        "HTTP/1.1 20O OK\r\ncontent-length: 2\r\n\r\nok".into(),
        "HTTP/1.1 2000 OK\r\ncontent-length: 2\r\n\r\nok".into(),
        "HTTP/2.0 200 OK\r\ncontent-length: 2\r\n\r\nok".into(),
        "HTTP/1.1 99 OK\r\ncontent-length: 2\r\n\r\nok".into(),
        "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nraw"
            .into(),
        "hello\r\n\r\n".into(),
    ];
    let world = public();
    for (port, answer) in (8000..).zip(bad) {
        let answer: &'static str = answer.leak();
        let _origin = Origin::saying(&world.server, port, answer.as_bytes());
        let mut stream = world.connect_to((SERVER4, port).into());
        stream.write_all(format!("{HEAD}\r\n").as_bytes()).unwrap();
        let got = rest(&mut stream);
        assert_eq!(status(&got), 502, "{answer:.80}: {}", String::from_utf8_lossy(&got));
    }
    let flood: &'static str = "HTTP/1.1 103 Early Hints\r\n\r\n".repeat(1000).leak();
    let _origin = Origin::saying(&world.server, 7000, flood.as_bytes());
    let mut stream = world.connect_to((SERVER4, 7000).into());
    stream.write_all(format!("{HEAD}\r\n").as_bytes()).unwrap();
    let got = String::from_utf8(rest(&mut stream)).unwrap();
    assert!(got.matches("103").count() < 20 && got.contains("502"), "{got}");
}

#[test]
fn what_follows_an_answer_reaches_nobody() {
    let world = public();
    for (port, answer) in [
        (
            9001,
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison",
        ),
        (9002, "HTTP/1.1 204 No Content\r\ncontent-length: 6\r\n\r\npoison"),
        (9003, "HTTP/1.1 304 Not Modified\r\ncontent-length: 6\r\n\r\npoison"),
        (9004, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\npoison"),
    ] {
        let _origin = Origin::on(&world.server, port, move |_, stream| {
            stream.write_all(answer.as_bytes()).is_ok()
        });
        let mut stream = world.connect_to((SERVER4, port).into());
        stream.write_all(format!("{HEAD}\r\n{HEAD}\r\n").as_bytes()).unwrap();
        let got = String::from_utf8(rest(&mut stream)).unwrap();
        assert!(!got.contains("poison"), "{got}");
        assert_eq!(got.matches("HTTP/1.1 ").count(), 1, "{got}");
    }
    let _origin = Origin::on(&world.server, 9005, |_, stream| {
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison").is_ok()
    });
    let mut stream = world.connect_to((SERVER4, 9005).into());
    stream.write_all(b"HEAD /public HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let got = String::from_utf8(rest(&mut stream)).unwrap();
    assert_eq!(got, "HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n");
}

/// What a server says when nobody asked is no answer to what is asked next.
#[test]
fn what_a_server_says_unasked_ends_the_connection() {
    let world = public();
    let listener = world.server.run(|| std::net::TcpListener::bind("[::]:80").unwrap());
    let mut client = world.connect(SERVER4);
    client.write_all(format!("{HEAD}\r\n").as_bytes()).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    until(&mut server, "\r\n\r\n");
    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
    server.write_all(answer).unwrap();
    until(&mut client, "ok");
    server.write_all(answer).unwrap();
    assert_eq!(rest(&mut client), b"");
}

#[test]
fn answers_keep_their_bodies_in_every_framing() {
    let world = public();
    for (port, answer) in [
        (9001, "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"),
        (
            9002,
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3;x\r\nllo\r\n0\r\nX-Sum: 1\r\nHost: evil\r\n\r\n",
        ),
        (9003, "HTTP/1.1 200 OK\r\n\r\nhello"),
        (9004, "HTTP/1.0 200 OK\r\n\r\nhello"),
    ] {
        let _origin = Origin::saying(&world.server, port, answer.as_bytes());
        for (version, end) in [("1.1", "hello"), ("1.0", "\r\n\r\nhello")] {
            let mut stream = world.connect_to((SERVER4, port).into());
            stream
                .write_all(format!("GET /public HTTP/{version}\r\nHost: a\r\n\r\n").as_bytes())
                .unwrap();
            let got = String::from_utf8(rest(&mut stream)).unwrap();
            let body = got
                .replace("\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\nx-sum: 1\r\n\r\n", "hello")
                .replace("\r\n5\r\nhello\r\n0\r\n\r\n", "hello");
            assert!(body.ends_with(end), "{port} {version}: {got}");
            assert!(!got.contains("evil"), "{got}");
        }
    }
    // A body that breaks off does not look whole.
    let _origin = Origin::saying(
        &world.server,
        9005,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
    );
    let mut stream = world.connect_to((SERVER4, 9005).into());
    stream.write_all(format!("{HEAD}\r\n").as_bytes()).unwrap();
    assert!(!rest(&mut stream).ends_with(b"0\r\n\r\n"));
}

#[test]
fn a_server_that_is_not_there() {
    let world = public();
    let mut stream = world.connect_to((SERVER4, 4444).into());
    stream.write_all(format!("{HEAD}\r\n").as_bytes()).unwrap();
    let got = until(&mut stream, "connection failure");
    assert!(got.starts_with("HTTP/1.1 503 Service Unavailable\r\n"), "{got}");
    // The connection is still good.
    stream.write_all(b"GET /admin HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    assert!(until(&mut stream, DENIED).starts_with("HTTP/1.1 403"));
    let origin = Origin::on(&world.server, 4445, |_, _| false);
    let mut stream = world.connect_to((SERVER4, 4445).into());
    stream.write_all(b"POST /public HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx").unwrap();
    assert!(until(&mut stream, "connection failure").starts_with("HTTP/1.1 503"));
    assert_eq!(origin.seen().connections, 1, "nothing is tried again");
}

const UPGRADE: &str = "GET /public HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n";

#[test]
fn a_websocket_opens_once_the_server_agrees() {
    let world = public();
    let server = world.server.run(|| std::net::TcpListener::bind("[::]:80").unwrap());
    let mut client = world.connect(SERVER4);
    client.write_all(format!("{UPGRADE}early").as_bytes()).unwrap();
    let (mut server, _) = server.accept().unwrap();
    let head = until(&mut server, "\r\n\r\n");
    assert!(head.contains("upgrade: websocket\r\nconnection: upgrade\r\n"), "{head}");
    server.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(server.read(&mut [0]).is_err(), "early bytes wait");
    server.set_read_timeout(Some(world::WAIT)).unwrap();
    server.write_all(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Accept: y\r\n\r\nhi").unwrap();
    let answer = until(&mut client, "\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    assert_eq!(until(&mut client, "hi"), "hi");
    assert_eq!(until(&mut server, "early"), "early");
    client.write_all(b"there").unwrap();
    until(&mut server, "there");
    // A policy that closes it cuts it.
    let begun = Instant::now();
    world.agent.put(rules(2, &[http(&["GET /other"])]));
    assert_eq!(rest(&mut client), b"");
    assert_eq!(rest(&mut server), b"");
    assert!(begun.elapsed() < Duration::from_secs(1));
    let end = cut(&world).ingress.unwrap();
    assert!(!end.allowed && end.rule.is_none(), "no rule allows it any more");
}

/// Rules may ask whether a request asks for a websocket; what asks for something else does not.
#[test]
fn rules_tell_websockets_apart() {
    let value = Some(HeaderValue::Text("websocket".into()));
    let header = HeaderRule { name: "upgrade".into(), value, mismatch: Mismatch::Fail };
    let rule = HttpRule { headers: vec![header], ..HttpRule::default() };
    let world = World::new(rules(1, &[Application::Http(vec![rule])]));
    let origin = Origin::ok(&world.server);
    for (request, wanted) in [
        (UPGRADE.to_owned(), 200),
        (UPGRADE.replace("websocket", "WebSocket"), 200),
        (UPGRADE.replace("websocket", "h2c"), 403),
        (UPGRADE.replace("Connection: Upgrade", "Connection: close"), 403),
        (UPGRADE.replace("GET", "DELETE"), 403),
        (format!("{HEAD}\r\n"), 403),
    ] {
        origin.forget();
        assert_eq!(status(&world.ask(request.as_bytes())), wanted, "{request}");
        assert_eq!(origin.text().contains("upgrade: websocket\r\n"), wanted == 200, "{request}");
    }
}

#[test]
fn what_follows_a_refused_upgrade_is_judged() {
    let world = public();
    let origin = Origin::ok(&world.server);
    let answer = world.ask(format!("{UPGRADE}GET /admin HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes());
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.contains("200 OK") && answer.ends_with(DENIED), "{answer}");
    assert!(!origin.text().contains("admin"));
    // A body goes with its request, to the server that was asked, in the version that was judged.
    origin.forget();
    let bytes = with(
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\nContent-Length: 24\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    );
    assert_eq!(status(&world.ask(bytes.as_bytes())), 200);
    assert!(
        origin.text().starts_with("POST /public HTTP/1.1\r\nhost: a\r\ncontent-length: 24\r\n\r\n")
    );
    for upgrade in ["h2c", "foo", "h2c, foo"] {
        origin.forget();
        let bytes = format!(
            "{HEAD}Connection: Upgrade, HTTP2-Settings\r\nUpgrade: {upgrade}\r\nHTTP2-Settings: AAA\r\n\r\n"
        );
        assert_eq!(status(&world.ask(bytes.as_bytes())), 200);
        assert_eq!(origin.text(), "GET /public HTTP/1.1\r\nhost: a\r\n\r\n");
    }
}

#[test]
fn limits_hold() {
    let fields = format!("{HEAD}{}\r\n", "X: y\r\n".repeat(10_000));
    let large = format!("{HEAD}X: {}\r\n\r\n", "y".repeat(1 << 20));
    let uri = format!("GET /public/{} HTTP/1.1\r\nHost: a\r\n\r\n", "y".repeat(64 << 10));
    refused(&[
        ("10,000 fields", fields, &[431]),
        ("a long field", large, &[431]),
        ("a long target", uri, &[414]),
        (
            "a long host",
            format!("GET /public HTTP/1.1\r\nHost: {}\r\n\r\n", "a".repeat(1 << 20)),
            &[431],
        ),
    ]);
    let world = public();
    let origin = Origin::ok(&world.server);
    let length = 100 << 20;
    let mut stream = world.connect(SERVER4);
    stream
        .write_all(
            format!("POST /public HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n")
                .as_bytes(),
        )
        .unwrap();
    let before = world.proxy.memory();
    let part = vec![b'x'; 1 << 20];
    for _ in 0..100 {
        stream.write_all(&part).unwrap();
    }
    assert!(until(&mut stream, "ok").starts_with("HTTP/1.1 200"));
    let after = world.proxy.memory();
    assert!(after < before + (4 << 10), "{before} KiB, then {after} KiB");
    assert!(origin.seen().bytes.len() > length);
}

/// What is packed stays so: nobody can make the proxy unpack much of little.
#[test]
fn packed_bodies_pass_as_they_are() {
    let world = public();
    let bomb = world::bomb();
    let packed = bomb.clone();
    let origin = Origin::new(&world.server, move |head, stream| {
        let length = packed.len();
        let coding = field(head, "content-encoding").unwrap();
        let answer = format!(
            "HTTP/1.1 200 OK\r\ncontent-encoding: {coding}\r\ncontent-length: {length}\r\n\r\n"
        );
        stream.write_all(&[answer.as_bytes(), &packed].concat()).is_ok()
    });
    let before = world.proxy.memory();
    for coding in ["gzip", "gzip, gzip"] {
        origin.forget();
        let mut stream = world.connect(SERVER4);
        let head =
            with(&format!("Content-Encoding: {coding}\r\nContent-Length: {}\r\n", bomb.len()), "");
        stream.write_all(&[head.as_bytes(), &bomb].concat()).unwrap();
        let answer = until(&mut stream, "\r\n\r\n");
        assert!(answer.contains(&format!("\r\ncontent-encoding: {coding}\r\n")), "{answer}");
        let mut body = vec![0; bomb.len()];
        stream.read_exact(&mut body).unwrap();
        assert!(body == bomb, "the answer is not as the server sent it");
        let seen = origin.seen();
        assert!(seen.text().contains(&format!("\r\ncontent-encoding: {coding}\r\n")));
        assert!(seen.bytes.ends_with(&bomb), "the request is not as the client sent it");
    }
    let after = world.proxy.memory();
    assert!(after < before + (4 << 10), "{before} KiB, then {after} KiB");
}

/// It is HTTP like any other: its trailers are a part of the body.
#[test]
fn grpc_web() {
    let world = World::new(rules(1, &[http(&["POST /pkg.Svc/Method"])]));
    const ANSWER: &[u8] = b"\0\0\0\0\x02ok\x80\0\0\0\x0fgrpc-status:0\r\n";
    let origin = Origin::new(&world.server, |_, stream| {
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/grpc-web+proto\r\ncontent-length: {}\r\n\r\n",
            ANSWER.len()
        );
        stream.write_all(&[head.as_bytes(), ANSWER].concat()).is_ok()
    });
    let call = |method: &str| {
        let head = format!(
            "POST /pkg.Svc/{method} HTTP/1.1\r\nHost: a\r\nContent-Type: application/grpc-web+proto\r\n\
             X-Grpc-Web: 1\r\nContent-Length: 7\r\n\r\n\0\0\0\0\x02hi"
        );
        world.ask(head.as_bytes())
    };
    let answer = call("Method");
    assert!(status(&answer) == 200 && answer.ends_with(ANSWER));
    assert!(
        origin.text().ends_with("\r\n\r\n\0\0\0\0\x02hi")
            && origin.text().contains("\r\nx-grpc-web: 1\r\n")
    );
    for method in ["method", "Method/", "Other", "Method%2f", "../pkg.Svc/Other"] {
        origin.forget();
        let answer = call(method);
        assert!([400, 403].contains(&status(&answer)), "{method}");
        assert_eq!(origin.seen().connections, 0, "{method}");
    }
}

#[test]
fn who_is_slow_is_let_go() {
    let world = public();
    let origin = Origin::ok(&world.server);
    let mut slow = world.connect(SERVER4);
    let mut silent = world.connect(SERVER4);
    let begun = Instant::now();
    slow.write_all(b"GET /pub").unwrap();
    // What might become HTTP/2 has no more time than what cannot.
    let mut hesitant = world.connect(SERVER4);
    hesitant.write_all(b"P").unwrap();
    let other = thread::scope(|scope| {
        let other = scope.spawn(|| world.ask(format!("{HEAD}\r\n").as_bytes()));
        other.join().unwrap()
    });
    assert_eq!(status(&other), 200);
    thread::sleep(Duration::from_secs(6));
    hesitant.write_all(b"OST /pub").unwrap();
    for stream in [&mut slow, &mut hesitant] {
        assert!([0, 408].contains(&status(&rest(stream))));
    }
    assert_eq!(rest(&mut silent), b"");
    assert!(begun.elapsed() < Duration::from_secs(12));
    assert_eq!(origin.seen().connections, 1);
}

#[test]
fn the_server_sees_the_client() {
    let world = public();
    let origin = Origin::ok(&world.server);
    for (server, client) in [(SERVER4, CLIENT4), (SERVER6, CLIENT6)] {
        origin.forget();
        let mut stream = world.connect(server);
        let own = stream.local_addr().unwrap();
        stream
            .write_all(format!("{HEAD}\r\nGET /admin HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes())
            .unwrap();
        let answer = until(&mut stream, DENIED);
        assert!(answer.contains("200 OK") && answer.contains("403"), "{answer}");
        assert_eq!(own.ip(), client);
        assert_eq!(origin.seen().peers, [own]);
    }
}

#[test]
fn requests_are_recorded_with_the_rule() {
    let world = public();
    let _origin = Origin::ok(&world.server);
    world.ask(
        b"GET /public/x?token=s3cret&y=1 HTTP/1.1\r\nHost: A\r\nAuthorization: s3cret\r\n\r\n",
    );
    world.ask(b"GET /admin HTTP/1.1\r\nHost: a\r\n\r\n");
    world.ask(b"GET /public/%zz?token=s3cret HTTP/1.1\r\nHost: a\r\n\r\n");
    let of = |wanted: u16| {
        world
            .agent
            .record(|record| matches!(&record.l7, L7::Http(http) if http.status == Some(wanted)))
    };
    let allowed = of(200);
    let ingress = allowed.ingress.clone().unwrap();
    assert!(allowed.allowed && ingress.allowed && allowed.egress.is_none());
    assert_eq!(ingress.rule.as_deref(), Some(&source(0)));
    assert_eq!((allowed.client.ip(), allowed.server), (CLIENT4, (SERVER4, 80).into()));
    let L7::Http(seen) = allowed.l7 else { panic!() };
    assert_eq!(seen.method, "GET");
    assert_eq!(seen.url, "http://a/public/x?token=[redacted]&y=1");
    assert!(seen.latency_ns > 0 && seen.error.is_none());
    let denied = of(403);
    assert!(!denied.allowed && denied.ingress.unwrap().rule.is_none());
    let refused = of(400);
    let L7::Http(seen) = refused.l7 else { panic!() };
    assert_eq!((&*seen.method, &*seen.url), ("GET", "http://a/public/%zz?token=[redacted]"));
    assert!(!refused.allowed && seen.error.is_some());
}

/// What is told of a request that was under way when the rules changed.
fn cut(world: &World) -> palisade_api::proxy::AccessRecord {
    let is_cut = |http: &palisade_api::flow::Http| {
        http.error.as_ref().is_some_and(|error| error.starts_with("cut by a change of policy"))
    };
    let cut = world.agent.record(|record| matches!(&record.l7, L7::Http(http) if is_cut(http)));
    assert!(!cut.allowed);
    cut
}

#[test]
fn each_request_is_judged_by_the_newest_rules() {
    let mut world = public();
    let origin = Origin::ok(&world.server);
    let mut stream = world.connect(SERVER4);
    stream.write_all(format!("{HEAD}\r\n").as_bytes()).unwrap();
    assert!(until(&mut stream, "ok").contains("200"));
    world.agent.put(rules(2, &[http(&["GET /other"])]));
    stream.write_all(format!("{HEAD}\r\n").as_bytes()).unwrap();
    assert!(until(&mut stream, DENIED).contains("403"));
    // A new process starts under the last rules, without an agent.
    world.restart();
    let begun = Instant::now();
    let answer = loop {
        let answer = world.ask(format!("{HEAD}\r\n").as_bytes());
        if status(&answer) != 0 || begun.elapsed() > world::WAIT {
            break answer;
        }
    };
    assert_eq!(status(&answer), 403);
    assert_eq!(origin.text().matches("GET").count(), 1);
}

#[test]
fn a_long_answer_ends_with_the_permission() {
    let world = public();
    let server = world.server.run(|| std::net::TcpListener::bind("[::]:80").unwrap());
    let mut client = world.connect(SERVER4);
    client.write_all(format!("{HEAD}\r\n").as_bytes()).unwrap();
    let (mut server, _) = server.accept().unwrap();
    until(&mut server, "\r\n\r\n");
    server.write_all(b"HTTP/1.1 200 OK\r\n\r\nfirst").unwrap();
    until(&mut client, "first\r\n");
    let begun = Instant::now();
    world.agent.put(rules(2, &[]));
    assert!(!rest(&mut client).ends_with(b"0\r\n\r\n"));
    assert_eq!(rest(&mut server), b"");
    assert!(begun.elapsed() < Duration::from_secs(1));
    let L7::Http(seen) = cut(&world).l7 else { panic!() };
    assert_eq!((seen.status, &*seen.method), (None, "GET"));
}
