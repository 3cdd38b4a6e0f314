//! One question: does this one get through to that one?

use std::{fmt, net::IpAddr};

use super::place::Place;

/// A node, as the clients see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Node {
    /// Both clients run on it.
    Own,
    Other,
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum From {
    Client1,
    /// Has the label `other: client` and the service account `client2`.
    Client2,
    /// The node itself: a pod on its network.
    Node(Node),
}

/// Who is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum To {
    /// The server that runs there, by one of its addresses.
    Pod(Node, IpAddr),
    /// The Service of both servers, by one of its addresses.
    Service(IpAddr),
    /// The node itself, by one of its addresses.
    Node(Node, IpAddr),
    /// Somebody outside the cluster, by address.
    Outside(IpAddr),
    /// Whoever has the name.
    Name(Name),
}

/// Names that clients ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Name {
    /// The Service of both servers.
    Echo,
    /// The Service of the API server.
    Kubernetes,
    /// Somebody outside the cluster.
    Outside,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// A connection.
    Tcp(u16),
    /// An answer to a datagram.
    Udp(u16),
    /// A path at TCP 8080.
    Get(&'static str),
    /// An answer to an ICMP echo request.
    Ping,
    /// The addresses that a name stands for.
    Lookup,
}

/// The servers' ports; their names are `http`, `other` and `udp`.
pub(super) const HTTP: What = What::Tcp(8080);
pub(super) const OTHER: What = What::Tcp(8082);
pub(super) const UDP: What = What::Udp(8081);

/// A question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Probe {
    pub(super) from: From,
    pub(super) to: To,
    pub(super) what: What,
}

/// The answer.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    Reached,
    /// Why not, in the words of whoever asked.
    Missed(String),
    /// Nobody knows, as the question was not asked.
    Unasked(String),
}

impl From {
    pub(super) const fn pod(self) -> &'static str {
        match self {
            Self::Client1 => "client1",
            Self::Client2 => "client2",
            Self::Node(node) => node.pod(),
        }
    }
}

impl Node {
    /// The pod on the node's network.
    pub(super) const fn pod(self) -> &'static str {
        match self {
            Self::Own => "host-same-node",
            Self::Other => "host-other-node",
        }
    }

    /// The server on the node.
    pub(super) const fn server(self) -> &'static str {
        match self {
            Self::Own => "echo-same-node",
            Self::Other => "echo-other-node",
        }
    }
}

impl To {
    pub(super) const fn is_ipv4(self) -> bool {
        matches!(
            self,
            Self::Pod(_, IpAddr::V4(_))
                | Self::Service(IpAddr::V4(_))
                | Self::Node(_, IpAddr::V4(_))
                | Self::Outside(IpAddr::V4(_))
        )
    }

    /// As programs want it; addresses before a port in brackets where they need them.
    fn host(self, place: &Place, before_port: bool) -> String {
        match self {
            Self::Name(name) => place.name(name),
            Self::Pod(_, address)
            | Self::Service(address)
            | Self::Node(_, address)
            | Self::Outside(address) => match address {
                IpAddr::V6(address) if before_port => format!("[{address}]"),
                _ => address.to_string(),
            },
        }
    }
}

impl What {
    /// What to run in order to ask.
    fn command(self, to: To, place: &Place) -> Vec<String> {
        let host = |before_port| to.host(place, before_port);
        let connect = |protocol: &str, port| {
            let (protocol, target) =
                (format!("--protocol={protocol}"), format!("{}:{port}", host(true)));
            words(&["/agnhost", "connect", "--timeout=1s", &protocol, &target])
        };
        match self {
            Self::Tcp(port) => connect("tcp", port),
            Self::Udp(port) => connect("udp", port),
            Self::Get(path) => {
                let url = format!("http://{}:8080{path}", host(true));
                let flags = ["curl", "--silent", "--fail", "--show-error", "--globoff"];
                let limits = ["--noproxy", "*", "--connect-timeout", "1", "--max-time", "2"];
                words(&[&flags[..], &limits, &["--output", "/dev/null", &url]].concat())
            }
            Self::Ping => words(&["ping", "-c", "1", "-W", "1", &host(false)]),
            Self::Lookup => words(&["nslookup", "-timeout=1", "-retry=1", &host(false)]),
        }
    }

    /// Whether a program that failed says that nobody answered, or not as it should have. What else
    /// it may say, such as that it is not there, is no answer to the question.
    fn is_answer(self, said: &str) -> bool {
        let begins = |starts: &[&str]| starts.iter().any(|start| said.starts_with(start));
        let contains = |parts: &[&str]| parts.iter().any(|part| said.contains(part));
        match self {
            Self::Tcp(_) | Self::Udp(_) => {
                begins(&["TIMEOUT", "DNS", "REFUSED", "OTHER", "UNKNOWN"])
            }
            // No name, no connection, an error as the answer, no answer in time, an end before it.
            Self::Get(_) => begins(&[
                "curl: (6)",
                "curl: (7)",
                "curl: (22)",
                "curl: (28)",
                "curl: (52)",
                "curl: (56)",
            ]),
            Self::Ping => contains(&["packet loss", "unreachable"]),
            Self::Lookup => contains(&["an't find", "no servers could be reached"]),
        }
    }

    /// Whether what is said of a failure is that nobody answered, which is how policies deny. That
    /// somebody refused means that the question arrived.
    fn is_silence(self, said: &str) -> bool {
        let begins = |starts: &[&str]| starts.iter().any(|start| said.starts_with(start));
        match self {
            // A name cannot be looked up where that is denied.
            Self::Tcp(_) | Self::Udp(_) => begins(&["TIMEOUT", "DNS"]),
            Self::Get(_) => begins(&["curl: (6)", "curl: (28)"]),
            Self::Ping => said.contains("packet loss"),
            Self::Lookup => said.contains("no servers could be reached"),
        }
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

impl Probe {
    /// Asks, and tries once more where it could not be asked.
    pub(super) async fn run(&self, place: &Place) -> Outcome {
        match self.ask(place).await {
            Outcome::Unasked(_) => self.ask(place).await,
            outcome => outcome,
        }
    }

    async fn ask(&self, place: &Place) -> Outcome {
        let command = self.what.command(self.to, place);
        match place.exec(self.from.pod(), command).await {
            Ok((true, _)) => Outcome::Reached,
            Ok((false, said)) if self.what.is_answer(&said) => Outcome::Missed(said),
            Ok((false, said)) => Outcome::Unasked(said),
            Err(error) => Outcome::Unasked(format!("{error:#}")),
        }
    }
}

/// What came of a question.
pub(super) struct Answer {
    pub(super) probe: Probe,
    /// Whether it must get through.
    pub(super) must: bool,
    /// What must be heard where it must not get through, if that is not silence.
    pub(super) refusal: Option<&'static str>,
    pub(super) got: Outcome,
    /// It had been as it must be before.
    pub(super) was_right: bool,
}

/// What an answer comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finding {
    Allowed,
    Denied,
    /// Got through, and must not.
    Leaked,
    /// Did not get through, and must.
    Lost,
    /// Was not asked, or denied in another way than it must be.
    Error,
}

impl Answer {
    pub(super) fn finding(&self) -> Finding {
        match &self.got {
            Outcome::Reached if self.must => Finding::Allowed,
            Outcome::Reached => Finding::Leaked,
            Outcome::Missed(_) if self.must => Finding::Lost,
            Outcome::Missed(said) if self.is_denial(said) => Finding::Denied,
            Outcome::Missed(_) | Outcome::Unasked(_) => Finding::Error,
        }
    }

    fn is_denial(&self, said: &str) -> bool {
        match self.refusal {
            Some(refusal) => said.contains(refusal),
            None => self.probe.what.is_silence(said),
        }
    }

    pub(super) fn is_right(&self) -> bool {
        matches!(self.finding(), Finding::Allowed | Finding::Denied)
    }

    /// For people who look for the reason.
    pub(super) fn complaint(&self) -> String {
        let Self { probe, must, .. } = self;
        let late = if self.was_right { ", after it was right" } else { "" };
        match &self.got {
            Outcome::Reached => format!("{probe}: got through, and must not{late}"),
            Outcome::Missed(why) if *must => {
                format!("{probe}: did not get through ({why}), and must{late}")
            }
            Outcome::Missed(why) => {
                let refusal = self.refusal.unwrap_or("silence");
                format!("{probe}: was denied ({why}), and must be with {refusal}{late}")
            }
            Outcome::Unasked(why) => format!("{probe}: could not be asked ({why}){late}"),
        }
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} → {}, {}", self.from.pod(), self.to, self.what)
    }
}

impl fmt::Display for To {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(node, address) => write!(f, "{} ({address})", node.server()),
            Self::Service(address) => write!(f, "service echo ({address})"),
            Self::Node(Node::Own, address) => write!(f, "own node ({address})"),
            Self::Node(Node::Other, address) => write!(f, "other node ({address})"),
            Self::Outside(address) => write!(f, "world ({address})"),
            Self::Name(Name::Echo) => write!(f, "service echo (by name)"),
            Self::Name(Name::Kubernetes) => write!(f, "service kubernetes (by name)"),
            Self::Name(Name::Outside) => write!(f, "world (by name)"),
        }
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(port) => write!(f, "TCP {port}"),
            Self::Udp(port) => write!(f, "UDP {port}"),
            Self::Get(path) => write!(f, "GET {path}"),
            Self::Ping => write!(f, "ICMP echo"),
            Self::Lookup => write!(f, "DNS"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_answer_is_not_taken_for_a_denial() {
        let answers = [
            (HTTP, "TIMEOUT"),
            (UDP, "REFUSED: read: connection refused"),
            (What::Get("/"), "curl: (22) The requested URL returned error: 403"),
            (What::Ping, "1 packets transmitted, 0 packets received, 100% packet loss"),
            (What::Lookup, "** server can't find echo: REFUSED"),
            (What::Lookup, ";; connection timed out; no servers could be reached"),
        ];
        for (what, said) in answers {
            assert!(what.is_answer(said), "{said}");
        }
        let others = [
            (HTTP, "unknown flag: --protocol"),
            (UDP, ""),
            (What::Get("/"), "curl: (2) no such option"),
            (What::Ping, "ping: permission denied (are you root?)"),
            (What::Lookup, "sh: nslookup: not found"),
        ];
        for (what, said) in others {
            assert!(!what.is_answer(said), "{said}");
        }
    }

    #[test]
    fn a_denial_has_the_words_that_it_must_have() {
        let to = To::Name(Name::Echo);
        let answer = |must, refusal, got| Answer {
            probe: Probe { from: From::Client1, to, what: What::Lookup },
            must,
            refusal,
            got,
            was_right: false,
        };
        let missed = || Outcome::Missed("can't find it: REFUSED".into());
        let silent = || Outcome::Missed("no servers could be reached".into());
        let unasked = || Outcome::Unasked("no answer in time".into());
        for (must, refusal, got, finding) in [
            (true, Some("REFUSED"), Outcome::Reached, Finding::Allowed),
            (false, Some("REFUSED"), Outcome::Reached, Finding::Leaked),
            (true, Some("REFUSED"), missed(), Finding::Lost),
            (false, Some("REFUSED"), missed(), Finding::Denied),
            (false, Some("403"), missed(), Finding::Error),
            (false, None, missed(), Finding::Error),
            (false, None, silent(), Finding::Denied),
            (false, None, unasked(), Finding::Error),
            (true, None, unasked(), Finding::Error),
        ] {
            assert_eq!(answer(must, refusal, got).finding(), finding, "{must} {refusal:?}");
        }
    }
}
