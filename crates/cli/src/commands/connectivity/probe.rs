//! One question: does this client get through to that server?

use std::{fmt, net::IpAddr};

use anyhow::Result;

use super::place::Place;

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum From {
    Client1,
    /// Has the label `other: client` and the service account `client2`.
    Client2,
}

/// Who is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum To {
    /// A server, by its name and one of its addresses.
    Pod(&'static str, IpAddr),
    /// The Service of both servers, by one of its addresses.
    Service(IpAddr),
    /// The Service, by its name.
    Name,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Port {
    /// TCP 8080, called `http`.
    Http,
    /// TCP 8082, called `other`.
    Other,
    /// UDP 8081.
    Udp,
    /// A path at TCP 8080.
    Get(&'static str),
}

/// Which questions a test asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Whether there is a connection.
    Connect,
    /// Whether a request is answered.
    Http,
}

impl Kind {
    pub(super) const fn ports(self) -> &'static [Port] {
        match self {
            Self::Connect => &[Port::Http, Port::Other, Port::Udp],
            Self::Http => &[Port::Get("/hostname"), Port::Get("/clientip")],
        }
    }
}

/// A question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Probe {
    pub(super) from: From,
    pub(super) to: To,
    pub(super) port: Port,
}

/// The answer.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    Reached,
    /// Why not, in the client's words.
    Missed(String),
}

impl From {
    pub(super) const fn pod(self) -> &'static str {
        match self {
            Self::Client1 => "client1",
            Self::Client2 => "client2",
        }
    }
}

impl Port {
    const fn number(self) -> u16 {
        match self {
            Self::Http | Self::Get(_) => 8080,
            Self::Other => 8082,
            Self::Udp => 8081,
        }
    }
}

impl Probe {
    /// Asks once.
    pub(super) async fn run(&self, place: &Place) -> Result<Outcome> {
        let host = match &self.to {
            To::Pod(_, IpAddr::V6(address)) | To::Service(IpAddr::V6(address)) => {
                format!("[{address}]")
            }
            To::Pod(_, address) | To::Service(address) => address.to_string(),
            // The dot at the end keeps resolvers from asking for longer names first.
            To::Name => format!("echo.{}.svc.cluster.local.", place.namespace()),
        };
        let target = format!("{host}:{}", self.port.number());
        let command: Vec<String> = match self.port {
            Port::Get(path) => {
                let url = format!("http://{target}{path}");
                let flags = ["--silent", "--fail", "--show-error", "--globoff", "--noproxy", "*"];
                let limits = ["--connect-timeout", "1", "--max-time", "2", "--output", "/dev/null"];
                ["curl"]
                    .iter()
                    .chain(&flags)
                    .chain(&limits)
                    .map(|&it| it.to_owned())
                    .chain([url])
                    .collect()
            }
            Port::Http | Port::Other | Port::Udp => {
                let protocol = if self.port == Port::Udp { "udp" } else { "tcp" };
                let protocol = format!("--protocol={protocol}");
                let words = ["/agnhost", "connect", "--timeout=1s", &protocol, &target];
                words.map(str::to_owned).to_vec()
            }
        };
        let (success, said) = place.exec(self.from.pod(), command).await?;
        Ok(if success { Outcome::Reached } else { Outcome::Missed(said) })
    }
}

/// What came of a question.
pub(super) struct Answer {
    pub(super) probe: Probe,
    /// Whether it must get through.
    pub(super) must: bool,
    pub(super) got: Outcome,
    /// It had been as it must be before.
    pub(super) was_right: bool,
}

impl Answer {
    pub(super) const fn reached(&self) -> bool {
        matches!(self.got, Outcome::Reached)
    }

    pub(super) const fn is_right(&self) -> bool {
        self.must == self.reached()
    }

    /// For people who look for the reason.
    pub(super) fn complaint(&self) -> String {
        let late = if self.was_right { ", after it was right" } else { "" };
        match &self.got {
            Outcome::Reached => format!("{}: got through, and must not{late}", self.probe),
            Outcome::Missed(why) => {
                format!("{}: did not get through ({why}), and must{late}", self.probe)
            }
        }
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} → {}, {}", self.from.pod(), self.to, self.port)
    }
}

impl fmt::Display for To {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(name, address) => write!(f, "{name} ({address})"),
            Self::Service(address) => write!(f, "service echo ({address})"),
            Self::Name => write!(f, "service echo (by name)"),
        }
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Get(path) => write!(f, "GET {path}"),
            Self::Udp => write!(f, "UDP {}", self.number()),
            Self::Http | Self::Other => write!(f, "TCP {}", self.number()),
        }
    }
}
