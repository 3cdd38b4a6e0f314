//! `agnhost connect`: one connection attempt whose outcome is the exit code.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, ToSocketAddrs, UdpSocket};
use std::process::ExitCode;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

/// Transport protocols of the probes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Transport {
    Tcp,
    Udp,
    Sctp,
}

#[derive(Debug, clap::Args)]
pub(super) struct Connect {
    /// host:port
    target: String,
    /// Bound on the attempt, e.g. 1s or 500ms; 0 for none
    #[arg(long, default_value = "0s", value_parser = duration)]
    timeout: Duration,
    #[arg(long, default_value = "tcp")]
    protocol: Transport,
    /// Accepted for compatibility; one line of data is always sent over UDP only
    #[arg(long, default_value_t = false)]
    udp_data: bool,
}

impl Connect {
    /// Tries, and prints what went wrong in the one word that test suites look for.
    pub(super) fn run(&self) -> ExitCode {
        let addresses = match self.target.to_socket_addrs() {
            Ok(addresses) => addresses.collect::<Vec<_>>(),
            Err(error) => return fail(&format!("DNS: {error}")),
        };
        let Some(address) = addresses.first() else { return fail("DNS: no address") };
        match attempt(*address, self.protocol, self.timeout) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&word(&error)),
        }
    }
}

fn fail(word: &str) -> ExitCode {
    eprintln!("{word}");
    ExitCode::FAILURE
}

fn word(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => "TIMEOUT".to_owned(),
        io::ErrorKind::ConnectionRefused => "REFUSED".to_owned(),
        _ => format!("OTHER: {error}"),
    }
}

fn attempt(address: SocketAddr, transport: Transport, timeout: Duration) -> io::Result<()> {
    let timeout = if timeout.is_zero() { Duration::from_secs(3600) } else { timeout };
    match transport {
        Transport::Tcp => stream(address, Protocol::TCP, timeout),
        Transport::Sctp => stream(address, Protocol::SCTP, timeout),
        Transport::Udp => datagram(address, timeout),
    }
}

fn stream(address: SocketAddr, protocol: Protocol, timeout: Duration) -> io::Result<()> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(protocol))?;
    socket.connect_timeout(&address.into(), timeout)
}

fn datagram(address: SocketAddr, timeout: Duration) -> io::Result<()> {
    let local: SocketAddr = if address.is_ipv4() {
        (std::net::Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (std::net::Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let socket = UdpSocket::bind(local)?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(timeout))?;
    socket.send(b"hostname\n")?;
    socket.recv(&mut [0; 1024]).map(drop)
}

/// Durations as Go writes them, in the simple forms.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let amount: f64 = digits.parse().map_err(|_| format!("{text:?} is not a duration like 1s"))?;
    let unit = match &text[digits.len()..] {
        "ms" => 0.001,
        "s" | "" => 1.0,
        "m" => 60.0,
        other => return Err(format!("unknown unit {other:?}; use ms, s or m")),
    };
    Duration::try_from_secs_f64(amount * unit).map_err(|error| error.to_string())
}

/// Answers every stream connection with `line` and closes it.
pub(super) fn greet(port: u16, protocol: Protocol, line: &str) -> io::Result<()> {
    let listener = Socket::new(Domain::IPV6, Type::STREAM, Some(protocol))?;
    listener.set_only_v6(false)?;
    listener.set_reuse_address(true)?;
    listener.bind(&SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, port)).into())?;
    listener.listen(128)?;
    loop {
        // A peer that left before we looked is no reason to stop.
        let Ok((mut peer, _)) = listener.accept() else { continue };
        let line = line.to_owned();
        std::thread::spawn(move || {
            let _ = peer.write_all(line.as_bytes());
            let _ = peer.shutdown(std::net::Shutdown::Write);
            let _ = peer.set_read_timeout(Some(Duration::from_secs(5)));
            let _ = peer.read(&mut [0; 64]);
        });
    }
}

/// Answers every datagram: `echo X` with X, everything else with the host name.
pub(super) fn answer_datagrams(port: u16, hostname: &str) -> io::Result<()> {
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_only_v6(false)?;
    socket.bind(&SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, port)).into())?;
    let socket = UdpSocket::from(socket);
    let mut buffer = [0; 65_536];
    loop {
        // An ICMP error of an earlier answer shows up here; it concerns nobody else.
        let Ok((length, peer)) = socket.recv_from(&mut buffer) else { continue };
        let text = String::from_utf8_lossy(&buffer[..length]);
        let answer = text.trim().strip_prefix("echo ").unwrap_or(hostname).to_owned();
        let _ = socket.send_to(answer.as_bytes(), peer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        assert_eq!(duration("1s"), Ok(Duration::from_secs(1)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert!(duration("soon").is_err());
        assert!(duration("-1s").is_err());
    }

    #[test]
    fn a_closed_port_refuses() {
        let address: SocketAddr = "127.0.0.1:1".parse().unwrap();
        let error = attempt(address, Transport::Tcp, Duration::from_secs(1)).unwrap_err();
        assert_eq!(word(&error), "REFUSED");
    }
}
