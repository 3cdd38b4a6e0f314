//! The subset of `agnhost` that network tests use.

use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use hyper::{Request, StatusCode, body::Incoming};
use socket2::Protocol;

use super::connect::{Connect, answer_datagrams, greet};
use super::http::{Answer, serve};

#[derive(Debug, Parser)]
#[command(name = "agnhost", about = "The built-in subset of agnhost")]
enum Command {
    /// Try one connection: exit code 0, or 1 with TIMEOUT, REFUSED, DNS or OTHER
    Connect(Connect),
    /// HTTP and UDP server that answers hostname, echo, clientip, healthz, shutdown
    Netexec {
        #[arg(long, default_value_t = 8080)]
        http_port: u16,
        #[arg(long, default_value_t = 8081)]
        udp_port: u16,
        /// 0 for none
        #[arg(long, default_value_t = 0)]
        sctp_port: u16,
    },
    /// Answers with the pod's name
    ServeHostname {
        #[arg(long)]
        tcp: bool,
        #[arg(long)]
        udp: bool,
        #[arg(long)]
        sctp: bool,
        #[arg(long, num_args = 0..=1, default_value_t = true, default_missing_value = "true", action = clap::ArgAction::Set)]
        http: bool,
        #[arg(long, default_value_t = 9376)]
        port: u16,
        #[arg(long)]
        close: bool,
    },
    /// Serves the value of each SERVE_PORT_<n>, SERVE_UDP_PORT_<n>, SERVE_SCTP_PORT_<n> variable
    Porter {
        #[arg(long)]
        json: bool,
    },
    /// Does nothing until it is ended
    Pause,
}

pub(super) fn run(arguments: &[String]) -> anyhow::Result<ExitCode> {
    let name = std::iter::once("agnhost".to_owned());
    let arguments = if arguments.is_empty() { &["pause".to_owned()] } else { arguments };
    match Command::try_parse_from(name.chain(arguments.iter().cloned())) {
        Ok(Command::Connect(connect)) => Ok(connect.run()),
        Ok(Command::Netexec { http_port, udp_port, sctp_port }) => {
            let mut servers = vec![Server::Udp(udp_port), Server::Http(http_port)];
            if sctp_port != 0 {
                servers.push(Server::Sctp(sctp_port, super::hostname()));
            }
            serve_all(servers)
        }
        Ok(Command::ServeHostname { tcp, udp, sctp, http, port, close: _ }) => {
            let hostname = format!("{}\n", super::hostname());
            let mut servers = Vec::new();
            if tcp {
                servers.push(Server::Tcp(port, hostname.clone()));
            } else if http && !udp && !sctp {
                servers.push(Server::Http(port));
            }
            if udp {
                servers.push(Server::Udp(port));
            }
            if sctp {
                servers.push(Server::Sctp(port, hostname));
            }
            serve_all(servers)
        }
        Ok(Command::Porter { json: _ }) => serve_all(porter(std::env::vars())),
        Ok(Command::Pause) => super::pause(),
        Err(error) => {
            error.print()?;
            Ok(ExitCode::from(2))
        }
    }
}

/// One listening port.
#[derive(Debug, PartialEq, Eq)]
enum Server {
    Http(u16),
    /// HTTP that answers every path with the same text.
    Text(u16, String),
    Tcp(u16, String),
    Udp(u16),
    Sctp(u16, String),
}

impl Server {
    fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Http(port) => Ok(super::runtime()?.block_on(serve(port, http))?),
            Self::Text(port, text) => {
                Ok(super::runtime()?.block_on(serve(port, move |_, _| Answer::text(&text)))?)
            }
            Self::Tcp(port, line) => Ok(greet(port, Protocol::TCP, &line)?),
            Self::Udp(port) => Ok(answer_datagrams(port, &super::hostname())?),
            Self::Sctp(port, line) => greet(port, Protocol::SCTP, &line)
                .context("SCTP: does this kernel have the sctp module?"),
        }
    }
}

/// Every server on a thread of its own; the first that fails ends the program.
fn serve_all(servers: Vec<Server>) -> anyhow::Result<ExitCode> {
    let (ended, end) = std::sync::mpsc::channel();
    for server in servers {
        let ended = ended.clone();
        std::thread::spawn(move || {
            let name = format!("{server:?}");
            let _ = ended.send(server.run().with_context(|| format!("cannot serve {name}")));
        });
    }
    drop(ended);
    match end.recv() {
        Ok(result) => result.map(|()| ExitCode::SUCCESS),
        Err(_) => anyhow::bail!("nothing to serve"),
    }
}

fn porter(variables: impl Iterator<Item = (String, String)>) -> Vec<Server> {
    variables
        .filter_map(|(name, value)| {
            let name = name.strip_prefix("SERVE_")?;
            if let Some(port) = name.strip_prefix("SCTP_PORT_") {
                return Some(Server::Sctp(port.parse().ok()?, value));
            }
            if let Some(port) = name.strip_prefix("UDP_PORT_") {
                return Some(Server::Udp(port.parse().ok()?));
            }
            Some(Server::Text(name.strip_prefix("PORT_")?.parse().ok()?, value))
        })
        .collect()
}

fn http(request: &Request<Incoming>, peer: SocketAddr) -> Answer {
    let query = request.uri().query().unwrap_or_default();
    match request.uri().path() {
        "/" => Answer::text(format!("NOW: {}\n", jiff::Timestamp::now())),
        "/hostname" | "/hostName" => Answer::text(super::hostname()),
        "/clientip" => {
            Answer::text(SocketAddr::new(peer.ip().to_canonical(), peer.port()).to_string())
        }
        "/echo" => Answer::text(query.strip_prefix("msg=").unwrap_or_default()),
        "/healthz" | "/readyz" => Answer::text("ok"),
        "/shutdown" | "/exit" => {
            let code = query.strip_prefix("code=").and_then(|code| code.parse().ok()).unwrap_or(0);
            Answer { exit: Some(code), ..Answer::text("") }
        }
        path => Answer::text(format!("no such path: {path}\n")).status(StatusCode::NOT_FOUND),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn porter_reads_the_environment() {
        let variables = [
            ("SERVE_PORT_80", "a"),
            ("SERVE_SCTP_PORT_81", "b"),
            ("SERVE_UDP_PORT_82", "c"),
            ("SERVE_PORT_none", "d"),
            ("HOME", "/"),
        ];
        let servers = porter(variables.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())));
        assert_eq!(
            servers,
            [Server::Text(80, "a".into()), Server::Sctp(81, "b".into()), Server::Udp(82)]
        );
    }
}
