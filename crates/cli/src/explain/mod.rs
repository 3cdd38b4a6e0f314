//! `palisade policy explain`: would this pass, and why?

mod elsewhere;
mod files;

use std::io::{self, BufRead};

use anyhow::{Context, Result, bail};
use palisade_api::admin::{Explain, Explanation, Inside, Request, Response, Translated};
use palisade_policy::l7::{field, target::split_url};

use crate::{
    agents::{self, mismatch},
    cli::{ExplainArgs, Global},
    exit::Exit,
    output::{self, Format, say},
};

pub(crate) fn run(global: &Global, args: &ExplainArgs) -> Result<Exit> {
    let headers = given(&args.header, io::stdin().lock())?;
    let asked = asked(args, &headers)?;
    let explanation = if args.file.is_empty() {
        let agents = agents::require(&global.socket)?;
        match agents::ask_until_known(&agents, &Request::Explain(asked))? {
            Response::Explanation(explanation) => *explanation,
            Response::Elsewhere { node, why } => {
                elsewhere::ask(global, args, &headers, &node, &why)?
            }
            _ => return Err(mismatch("of this machine")),
        }
    } else {
        files::explain(&args.file, &asked)?
    };
    match global.output {
        Format::Json => output::json(&explanation)?,
        Format::Table => print(&explanation),
    }
    Ok(if explanation.allowed { Exit::Ok } else { Exit::No })
}

/// `-` stands for what is on standard input up to an empty line: whoever writes it need not close it.
fn given(headers: &[String], mut input: impl BufRead) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for header in headers {
        if header != "-" {
            all.push(header.clone());
            continue;
        }
        let lines = input.by_ref().lines();
        let lines = lines.take_while(|line| line.as_ref().map_or(true, |line| !line.is_empty()));
        for line in lines {
            all.push(line.context("--header -: cannot read standard input")?);
        }
    }
    Ok(all)
}

fn asked(args: &ExplainArgs, headers: &[String]) -> Result<Explain> {
    let inside = match (&args.http, &args.dns, &args.server_name) {
        (Some(request), ..) => {
            let headers: Result<_> = headers.iter().map(|text| header(text)).collect();
            Some(http(request, headers?)?)
        }
        (_, Some(name), _) => Some(Inside::Dns(name.clone())),
        (.., Some(name)) => Some(Inside::Tls(name.clone())),
        _ => None,
    };
    let default = if args.dns.is_some() { "udp" } else { "tcp" };
    let protocol = match args.protocol.as_deref().unwrap_or(default).to_lowercase().as_str() {
        "udp" => 17,
        "sctp" => 132,
        "icmp" => 1,
        "icmpv6" => 58,
        _ => 6,
    };
    if args.port == 0 && matches!(protocol, 6 | 17 | 132) {
        bail!("--port 0: nobody listens there; write a number from 1 to 65535");
    }
    let (from, to) = (args.from.clone(), args.to.clone());
    Ok(Explain { from, to, protocol, port: args.port, inside })
}

/// `NAME: VALUE`. The value may be a secret, and is not told.
fn header(text: &str) -> Result<(String, String)> {
    let Some((name, value)) = text.split_once(':') else {
        bail!("--header: write a name, a colon and a value, such as 'X-Role: admin'");
    };
    if name.is_empty() || !name.bytes().all(field::is_token) {
        bail!("--header {name:?}: no header has such a name; write letters, digits and hyphens");
    }
    let value = value.trim_matches([' ', '\t']);
    if !field::is_value(value.as_bytes()) {
        bail!("--header {name:?}: its value has a control character; write one line of text");
    }
    let lower = name.to_ascii_lowercase();
    if field::is_own(&lower) && !matches!(&*lower, "host" | "connection" | "upgrade") {
        bail!(
            "--header {name:?}: no rule is asked about it, as it frames the message or goes no \
             further than the proxy; leave it out"
        );
    }
    Ok((lower, value.to_owned()))
}

/// `METHOD TARGET`; the target may be a whole URL, whose host then counts.
fn http(text: &str, headers: Vec<(String, String)>) -> Result<Inside> {
    let mut words = text.split_whitespace();
    let (Some(method), Some(target), None) = (words.next(), words.next(), words.next()) else {
        bail!("--http {text:?}: write a method and a path, such as 'PUT /v1/exhaust-port'");
    };
    if !method.bytes().all(field::is_token) {
        bail!("--http {text:?}: {method:?} is no method of HTTP");
    }
    let string = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (host, target) = match split_url(target.as_bytes()) {
        Some((host, path)) => (string(host), string(&path)),
        None if target.starts_with('/') || target == "*" || method == "CONNECT" => {
            (String::new(), target.to_owned())
        }
        None if target.get(..8).is_some_and(|s| s.eq_ignore_ascii_case("https://")) => bail!(
            "--http {text:?}: nobody sees requests inside of TLS; ask for the connection with \
             --server-name HOST, or for a request in the clear with http://HOST/PATH"
        ),
        None => {
            bail!("--http {text:?}: write a path that begins with a slash, or http://HOST/PATH")
        }
    };
    Ok(Inside::Http { method: method.to_owned(), target, host, headers })
}

fn print(explanation: &Explanation) {
    say!("{}", text(explanation).trim_end());
}

fn text(explanation: &Explanation) -> String {
    let Explanation { from, to, allowed, service, .. } = explanation;
    let Some(Translated { frontend, backends, .. }) = service else {
        return format!("{}  {from} -> {to}\n{}", word(*allowed), body(explanation, "  "));
    };
    let partly = !allowed && backends.iter().any(|backend| backend.allowed);
    let all = if partly { "PARTLY ALLOWED" } else { word(*allowed) };
    let mut text = format!("{all}  {from} -> {to} ({frontend})\n");
    if backends.is_empty() {
        text += "  it has no backend that is ready: connections are refused at once\n";
    }
    for alike in alike(backends) {
        let names: Vec<&str> = alike.iter().map(|backend| &*backend.to).collect();
        text += &format!("  {}  to {}\n", word(alike[0].allowed), names.join(", "));
        text += &body(alike[0], "    ");
    }
    text
}

/// Backends of which the same is said.
fn alike(backends: &[Explanation]) -> Vec<Vec<&Explanation>> {
    let mut groups: Vec<Vec<&Explanation>> = Vec::new();
    for backend in backends {
        let same = |group: &&mut Vec<&Explanation>| {
            group[0].allowed == backend.allowed
                && group[0].read_as == backend.read_as
                && group[0].ends == backend.ends
        };
        match groups.iter_mut().find(same) {
            Some(group) => group.push(backend),
            None => groups.push(vec![backend]),
        }
    }
    groups
}

const fn word(allowed: bool) -> &'static str {
    if allowed { "ALLOWED" } else { "DENIED" }
}

fn body(explanation: &Explanation, indent: &str) -> String {
    let mut lines = Vec::new();
    if let Some(request) = &explanation.read_as {
        lines.push(format!("the proxy reads: {request}"));
    }
    for end in &explanation.ends {
        lines.push(end.verdict.clone());
        for rule in &end.rules {
            lines.push(format!("  {:<6} {} {}", rule.action, rule.policy, rule.path));
        }
        if let Some(nearest) = &end.nearest {
            lines.push(format!("  nearest: {nearest}"));
        }
    }
    if explanation.ends.is_empty() {
        lines.push("neither end is a pod: no policy is asked".into());
    }
    lines.iter().map(|line| format!("{indent}{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backends_are_told_apart_where_they_differ() {
        let answer = |to: &str, allowed| Explanation {
            from: "default/a".into(),
            to: to.into(),
            allowed,
            read_as: None,
            ends: Vec::new(),
            service: None,
        };
        let told = |verdicts: &[bool]| {
            let backends = (1..).zip(verdicts).map(|(n, ok)| answer(&format!("p{n}:80"), *ok));
            let service = Translated {
                name: "default/s".into(),
                frontend: "10.96.0.9:80/TCP".into(),
                backends: backends.collect(),
            };
            let allowed = !verdicts.is_empty() && verdicts.iter().all(|ok| *ok);
            text(&Explanation { service: Some(service), ..answer("Service default/s", allowed) })
        };
        let first = |text: &str| text.lines().next().map(str::to_owned).unwrap_or_default();
        let to = "default/a -> Service default/s (10.96.0.9:80/TCP)";
        assert_eq!(first(&told(&[true, true])), format!("ALLOWED  {to}"));
        assert!(told(&[true, true]).contains("\n  ALLOWED  to p1:80, p2:80\n"));
        let mixed = told(&[true, false]);
        assert_eq!(first(&mixed), format!("PARTLY ALLOWED  {to}"));
        assert!(mixed.contains("  ALLOWED  to p1:80\n") && mixed.contains("  DENIED  to p2:80\n"));
        assert_eq!(first(&told(&[false])), format!("DENIED  {to}"));
        assert!(told(&[]).contains("no backend that is ready"));
    }

    #[test]
    fn headers_on_standard_input_end_with_an_empty_line() {
        let given = |headers: &[&str], input: &[u8]| {
            let headers: Vec<String> = headers.iter().map(ToString::to_string).collect();
            given(&headers, input).unwrap()
        };
        assert_eq!(given(&["a: b"], b"c: d\n"), ["a: b"]);
        assert_eq!(given(&["a: b", "-", "e: f"], b"c:d\r\n\r\nx: y"), ["a: b", "c:d", "e: f"]);
        assert_eq!(given(&["-"], b"a: b\nc: d"), ["a: b", "c: d"]);
    }

    #[test]
    fn a_header_is_a_name_and_a_value_that_is_not_told() {
        let of = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(header("X-Role:admin").unwrap(), of("x-role", "admin"));
        assert_eq!(header("x-role: \ta, b: c ").unwrap(), of("x-role", "a, b: c"));
        assert_eq!(header("X-Role:").unwrap(), of("x-role", ""));
        for name in ["host", "connection", "upgrade", "authorization"] {
            assert_eq!(header(&format!("{name}: s3cret")).unwrap(), of(name, "s3cret"));
        }
        for (wrong, says) in [
            ("s3cret", "--header: write a name, a colon and a value, such as 'X-Role: admin'"),
            (": s3cret", "--header \"\": no header has such a name"),
            ("x role: s3cret", "--header \"x role\": no header has such a name"),
            ("x: s3cret\r\ny: z", "--header \"x\": its value has a control character"),
            ("X_Role: s3cret", "--header \"X_Role\": no rule is asked about it"),
            ("Content-Length: 5", "--header \"Content-Length\": no rule is asked about it"),
            ("TE: trailers", "--header \"TE\": no rule is asked about it"),
        ] {
            let told = header(wrong).unwrap_err().to_string();
            assert!(told.starts_with(says) && !told.contains("s3cret"), "{told}");
        }
    }

    #[test]
    fn a_request_is_a_method_and_a_path_or_an_url() {
        let of = |method: &str, target: &str, host: &str| Inside::Http {
            method: method.into(),
            target: target.into(),
            host: host.into(),
            headers: Vec::new(),
        };
        let http = |text: &str| http(text, Vec::new());
        assert_eq!(http("PUT /v1/exhaust-port").unwrap(), of("PUT", "/v1/exhaust-port", ""));
        assert_eq!(http("GET http://a.io:80/x?y").unwrap(), of("GET", "/x?y", "a.io:80"));
        assert_eq!(http("GET HTTP://a.io").unwrap(), of("GET", "/", "a.io"));
        assert_eq!(http("GET http://a.io?x").unwrap(), of("GET", "/?x", "a.io"));
        assert_eq!(http("CONNECT a.io:80").unwrap(), of("CONNECT", "a.io:80", ""));
        let inside_tls = http("GET HTTPS://a.io/").unwrap_err().to_string();
        assert!(inside_tls.contains("--server-name"), "{inside_tls}");
        for wrong in ["PUT", "", "GET x", "GET /a b", "G@T /"] {
            assert!(http(wrong).is_err(), "{wrong}");
        }
    }
}
