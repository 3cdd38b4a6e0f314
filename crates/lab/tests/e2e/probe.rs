//! Many probes from one pod at once: each has a second, and none a second try.

use std::{
    fs,
    io::{self, Read},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, Protocol as IpProtocol, Socket, Type};

use super::harness::Pod;

/// An answer that takes longer is none.
const BOUND: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Tcp,
    Udp,
    /// ICMP or ICMPv6 echo; see [`allow_echo`].
    Echo,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Connected, or echoed.
    Open,
    /// Silence, which is what policy answers with.
    Silence,
    /// Anything else: a reset, an ICMP error.
    Error,
}

/// Where a probe goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub(crate) protocol: Protocol,
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
}

/// Starts all probes from `pod` at the same time; the answers are in the order of the targets.
pub(crate) fn start(
    pod: &Pod,
    targets: Vec<Target>,
) -> std::thread::JoinHandle<io::Result<Vec<Answer>>> {
    pod.spawn(move || probe(&targets))
}

fn echo_request(to: SocketAddr) -> u8 {
    if to.is_ipv4() { 8 } else { 128 }
}

/// Lets programs in `pod` make echo requests: without this the kernel gives nobody the socket.
pub(crate) fn allow_echo(pod: &Pod) {
    pod.run(|| fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0"));
}

struct Attempt {
    socket: Socket,
    protocol: Protocol,
    answer: Option<Answer>,
}

impl Attempt {
    fn start(target: &Target) -> io::Result<Self> {
        let to = SocketAddr::new(target.address, target.port);
        let kind = match target.protocol {
            Protocol::Tcp => (Type::STREAM, IpProtocol::TCP),
            Protocol::Udp => (Type::DGRAM, IpProtocol::UDP),
            Protocol::Echo if to.is_ipv4() => (Type::DGRAM, IpProtocol::ICMPV4),
            Protocol::Echo => (Type::DGRAM, IpProtocol::ICMPV6),
        };
        let socket = Socket::new(Domain::for_address(to), kind.0, Some(kind.1))?;
        socket.set_nonblocking(true)?;
        if target.protocol == Protocol::Tcp {
            // A port of its own. Left to connect, one port may serve a pod's address and a Service
            // in front of it at once, which the datapath refuses: their answers look the same.
            let any: IpAddr = if to.is_ipv4() {
                Ipv4Addr::UNSPECIFIED.into()
            } else {
                Ipv6Addr::UNSPECIFIED.into()
            };
            socket.bind(&SocketAddr::new(any, 0).into())?;
        }
        let connected = socket.connect(&to.into());
        let under_way = |error: &io::Error| {
            error.raw_os_error() == Some(rustix::io::Errno::INPROGRESS.raw_os_error())
        };
        let mut answer = None;
        match (connected, target.protocol) {
            (Err(error), _) if !under_way(&error) => answer = Some(Answer::Error),
            (_, Protocol::Udp) => drop(socket.send(b"probe")?),
            // The kernel fills in identifier and checksum.
            (_, Protocol::Echo) => drop(socket.send(&[echo_request(to), 0, 0, 0, 0, 0, 0, 1])?),
            (_, Protocol::Tcp) => {}
        }
        Ok(Self { socket, protocol: target.protocol, answer })
    }

    fn interest(&self) -> PollFlags {
        match (self.answer, self.protocol) {
            (Some(_), _) => PollFlags::empty(),
            (None, Protocol::Tcp) => PollFlags::OUT,
            (None, Protocol::Udp | Protocol::Echo) => PollFlags::IN,
        }
    }

    fn settle(&mut self) {
        let open = match self.protocol {
            Protocol::Tcp => matches!(self.socket.take_error(), Ok(None)),
            Protocol::Udp | Protocol::Echo => (&self.socket).read(&mut [0; 16]).is_ok(),
        };
        self.answer = Some(if open { Answer::Open } else { Answer::Error });
    }
}

fn probe(targets: &[Target]) -> io::Result<Vec<Answer>> {
    let mut attempts = targets.iter().map(Attempt::start).collect::<io::Result<Vec<_>>>()?;
    let deadline = Instant::now() + BOUND;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || attempts.iter().all(|attempt| attempt.answer.is_some()) {
            return Ok(attempts
                .iter()
                .map(|attempt| attempt.answer.unwrap_or(Answer::Silence))
                .collect());
        }
        let waiting: Vec<usize> =
            (0..attempts.len()).filter(|index| attempts[*index].answer.is_none()).collect();
        let mut fds: Vec<PollFd<'_>> = waiting
            .iter()
            .map(|index| PollFd::new(&attempts[*index].socket, attempts[*index].interest()))
            .collect();
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        poll(&mut fds, Some(&timeout))?;
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        for (index, _) in waiting.into_iter().zip(ready).filter(|(_, ready)| *ready) {
            attempts[index].settle();
        }
    }
}
