//! `nslookup`, for machines that have none.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};

use crate::dns::wire::{Answer, Name, Query, number};
use crate::dns::zone::reverse;

const TIMEOUT: Duration = Duration::from_secs(2);
const ATTEMPTS: usize = 2;

struct Resolver {
    server: IpAddr,
    search: Vec<String>,
    ndots: usize,
    timeout: Duration,
    attempts: usize,
}

pub(super) fn run(arguments: &[String]) -> anyhow::Result<ExitCode> {
    let (options, names): (Vec<_>, Vec<_>) =
        arguments.iter().partition(|argument| argument.starts_with('-'));
    let Some(name) = names.first() else {
        bail!(
            "usage: nslookup [-type=A|AAAA|SRV|PTR|TXT|CNAME|SOA] [-timeout=SECONDS] [-retry=COUNT] NAME [SERVER]"
        )
    };
    let mut resolver = Resolver::read(&std::fs::read_to_string("/etc/resolv.conf")?)?;
    if let Some(server) = names.get(1) {
        resolver.server =
            server.parse().with_context(|| format!("{server:?} is not the address of a server"))?;
    }
    let value =
        |name| options.iter().find_map(|option| option.trim_start_matches('-').strip_prefix(name));
    if let Some(seconds) = value("timeout=") {
        resolver.timeout = Duration::from_secs(seconds.parse().context("-timeout")?);
    }
    if let Some(attempts) = value("retry=") {
        resolver.attempts = attempts.parse().context("-retry")?;
    }
    let kinds = match ["type=", "querytype=", "q="].into_iter().find_map(value) {
        Some(kind) => vec![kind_number(kind)?],
        None if name.parse::<IpAddr>().is_ok() => vec![number::PTR],
        None => vec![number::A, number::AAAA],
    };
    println!("Server:\t\t{0}\nAddress:\t{0}#53\n", resolver.server);
    let mut failure = None;
    let mut found = false;
    for kind in kinds {
        let answer = resolver.look_up(name, kind)?;
        for record in &answer.answers {
            println!("Name:\t{}\nAnswer:\t{}", record.name, record.data);
            found = true;
        }
        if answer.code != number::NO_ERROR {
            failure = Some(code_name(answer.code));
        }
    }
    match failure {
        _ if found => Ok(ExitCode::SUCCESS),
        Some(failure) => {
            println!("** server can't find {name}: {failure}");
            Ok(ExitCode::FAILURE)
        }
        None => {
            println!("*** Can't find {name}: No answer");
            Ok(ExitCode::FAILURE)
        }
    }
}

fn kind_number(kind: &str) -> anyhow::Result<u16> {
    Ok(match kind.to_ascii_uppercase().as_str() {
        "A" => number::A,
        "AAAA" => number::AAAA,
        "SRV" => number::SRV,
        "PTR" => number::PTR,
        "TXT" => number::TXT,
        "CNAME" => number::CNAME,
        "SOA" => number::SOA,
        "NS" => number::NS,
        "ANY" => number::ANY,
        other => bail!("unknown record type {other:?}"),
    })
}

fn code_name(code: u8) -> String {
    match code {
        number::NAME_ERROR => "NXDOMAIN".to_owned(),
        number::SERVER_FAILURE => "SERVFAIL".to_owned(),
        number::REFUSED => "REFUSED".to_owned(),
        other => format!("response code {other}"),
    }
}

impl Resolver {
    fn read(configuration: &str) -> anyhow::Result<Self> {
        let mut resolver = Self {
            server: [127, 0, 0, 1].into(),
            search: Vec::new(),
            ndots: 1,
            timeout: TIMEOUT,
            attempts: ATTEMPTS,
        };
        let mut server = None;
        for line in configuration.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") if server.is_none() => {
                    server = words.next().and_then(|word| word.parse().ok());
                }
                Some("search") => resolver.search = words.map(str::to_owned).collect(),
                Some("options") => {
                    let ndots = words.find_map(|word| word.strip_prefix("ndots:")?.parse().ok());
                    resolver.ndots = ndots.unwrap_or(resolver.ndots);
                }
                _ => {}
            }
        }
        resolver.server = server.unwrap_or(resolver.server);
        Ok(resolver)
    }

    /// The names to try, in order.
    fn candidates(&self, name: &str) -> Vec<String> {
        if let Ok(address) = name.parse::<IpAddr>() {
            return vec![reverse(address)];
        }
        if name.ends_with('.') {
            return vec![name.to_owned()];
        }
        let searched = self.search.iter().map(|domain| format!("{name}.{domain}"));
        let mut candidates: Vec<_> = searched.collect();
        let absolute_first = name.matches('.').count() >= self.ndots;
        candidates.insert(if absolute_first { 0 } else { candidates.len() }, name.to_owned());
        candidates
    }

    fn look_up(&self, name: &str, kind: u16) -> anyhow::Result<Answer> {
        let mut last = None;
        for candidate in self.candidates(name) {
            let Some(parsed) = Name::parse(&candidate) else { continue };
            let answer = self.ask(parsed, kind)?;
            if !answer.answers.is_empty() {
                return Ok(answer);
            }
            // A name that exists without this type says more than one that does not exist.
            if last.as_ref().is_none_or(|last: &Answer| last.code != number::NO_ERROR) {
                last = Some(answer);
            }
        }
        last.with_context(|| format!("{name:?} is not a valid name"))
    }

    fn ask(&self, name: Name, kind: u16) -> anyhow::Result<Answer> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let query = Query::new(now.subsec_nanos() as u16, name, kind);
        let local = if self.server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(local)?;
        socket.connect(SocketAddr::new(self.server, 53))?;
        socket.set_read_timeout(Some(self.timeout))?;
        let mut buffer = [0; 4096];
        for _ in 0..self.attempts {
            socket.send(&query.message())?;
            if let Ok(length) = socket.recv(&mut buffer)
                && let Some(answer) = query.read_answer(&buffer[..length])
            {
                return Ok(answer);
            }
        }
        bail!(";; connection timed out; no servers could be reached ({} said nothing)", self.server)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn search_list_as_in_pods() {
        let resolver = Resolver::read(
            "nameserver 10.96.0.10\nsearch default.svc.cluster.local svc.cluster.local\noptions ndots:5\n",
        )
        .unwrap();
        assert_eq!(resolver.server.to_string(), "10.96.0.10");
        assert_eq!(
            resolver.candidates("deathstar"),
            ["deathstar.default.svc.cluster.local", "deathstar.svc.cluster.local", "deathstar"]
        );
        assert_eq!(resolver.candidates("a.b."), ["a.b."]);
    }
}
