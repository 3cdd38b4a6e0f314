//! The work that is done over each path, one after the other.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::thread::{CpuSet, sched_setaffinity};
use serde::Serialize;
use socket2::{Domain, Socket, Type};

use super::paths::{Path, Port, Variant};
use crate::sys::netns;

/// How long one kind of work goes on over one path.
const SLICE: Duration = Duration::from_millis(600);
/// A server that nobody calls any more looks this often whether it is over.
const PATIENCE: Duration = Duration::from_millis(100);
/// An answer that takes longer is lost.
const ANSWER: Duration = Duration::from_secs(2);
/// Bytes of a datagram, and of a write on a stream.
const DATAGRAM: usize = 64;
const CHUNK: usize = 128 << 10;

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Work {
    /// A byte there and one back on one TCP connection, both ends on one core.
    RequestResponse,
    /// As [`Self::RequestResponse`], on a new connection each time.
    ConnectRequestClose,
    /// UDP datagrams of 64 bytes that arrive, both ends on one core.
    Datagrams,
    /// One TCP stream, a core for each end.
    Stream,
}

impl Work {
    pub(super) const ALL: [Self; 4] =
        [Self::RequestResponse, Self::ConnectRequestClose, Self::Datagrams, Self::Stream];

    /// Cores of the client and the server. On different ones the wake-ups of an idle core would
    /// hide what the path costs; a stream is not waiting.
    fn cores(self) -> [usize; 2] {
        match self {
            Self::Stream if cores() > 1 => [0, 1],
            _ => [0, 0],
        }
    }
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// What came of some work.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Measured {
    pub(super) variant: Variant,
    pub(super) work: Work,
    /// Units (round trips, connections, datagrams, bytes) a second.
    pub(super) rate: f64,
}

/// Every kind of work over every path; the order changes from round to round, so that what drifts
/// on the machine hits all alike.
pub(super) fn round(paths: &[(Variant, Path)], number: u16) -> Result<Vec<Measured>> {
    let mut all = Vec::new();
    for work in Work::ALL {
        let mut order: Vec<_> = paths.iter().collect();
        order.rotate_left(usize::from(number) % paths.len());
        if number.is_multiple_of(2) {
            order.reverse();
        }
        for (variant, path) in order {
            let done = run(work, path).with_context(|| format!("{work:?} over {variant:?}"))?;
            all.push(Measured { variant: *variant, work, rate: done.rate() });
        }
    }
    Ok(all)
}

/// Units of work that were done, and in what time.
pub(super) struct Done {
    pub(super) units: u64,
    pub(super) time: Duration,
}

impl Done {
    fn rate(&self) -> f64 {
        self.units as f64 / self.time.as_secs_f64()
    }
}

/// Does one kind of work over `path` for a while.
pub(super) fn run(work: Work, path: &Path) -> Result<Done> {
    let [client_core, server_core] = work.cores();
    let over = Arc::new(AtomicBool::new(false));
    let to = SocketAddr::new(path.address, Port::NUMBER);
    let server = serve(work, path, to, server_core, over.clone())?;
    let client = netns::run_in(&path.client, move || {
        pin(client_core)?;
        ask(work, to)
    });
    over.store(true, Relaxed);
    let served =
        server.join().map_err(|_| io::Error::other("a server of the bench panicked"))??;
    let asked = client?;
    Ok(match work {
        // What counts is what arrives.
        Work::Datagrams | Work::Stream => Done { units: served, ..asked },
        _ => asked,
    })
}

/// Starts a server; it gives how many units it received.
fn serve(
    work: Work,
    path: &Path,
    at: SocketAddr,
    core: usize,
    over: Arc<AtomicBool>,
) -> io::Result<JoinHandle<io::Result<u64>>> {
    if work == Work::Datagrams {
        let socket = netns::run_in(&path.server, move || UdpSocket::bind(at))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        return Ok(thread::spawn(move || {
            pin(core)?;
            count_datagrams(&socket, &over)
        }));
    }
    let listener = netns::run_in(&path.server, move || listen(at))?;
    Ok(thread::spawn(move || {
        pin(core)?;
        accept(work, &listener, &over)
    }))
}

/// A listener that gives up waiting from time to time, and binds beside connections that linger.
fn listen(at: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.bind(&at.into())?;
    socket.listen(1024)?;
    Ok(socket.into())
}

fn accept(work: Work, listener: &TcpListener, over: &AtomicBool) -> io::Result<u64> {
    let mut units = 0;
    while !over.load(Relaxed) {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if waited(&error) => continue,
            Err(error) => return Err(error),
        };
        // Otherwise it has the listener's.
        stream.set_read_timeout(Some(ANSWER))?;
        units += match work {
            Work::Stream => drain(stream)?,
            _ => echo(stream)?,
        };
    }
    Ok(units)
}

fn waited(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn echo(mut stream: TcpStream) -> io::Result<u64> {
    stream.set_nodelay(true)?;
    let mut byte = [0];
    let mut units = 0;
    while stream.read(&mut byte)? == 1 {
        stream.write_all(&byte)?;
        units += 1;
    }
    Ok(units)
}

fn drain(mut stream: TcpStream) -> io::Result<u64> {
    let mut buffer = vec![0; CHUNK];
    let mut bytes = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(bytes),
            length => bytes += length as u64,
        }
    }
}

fn count_datagrams(socket: &UdpSocket, over: &AtomicBool) -> io::Result<u64> {
    let mut buffer = [0; DATAGRAM];
    let mut datagrams = 0;
    loop {
        match socket.recv(&mut buffer) {
            Ok(_) => datagrams += 1,
            Err(error) if waited(&error) && over.load(Relaxed) => return Ok(datagrams),
            Err(error) if waited(&error) => {}
            Err(error) => return Err(error),
        }
    }
}

fn ask(work: Work, to: SocketAddr) -> io::Result<Done> {
    match work {
        Work::RequestResponse => {
            let mut stream = connect(to)?;
            repeat(|| exchange(&mut stream).map(|()| 1))
        }
        Work::ConnectRequestClose => {
            // Otherwise the ports of closed connections run out and their search is measured.
            std::fs::write("/proc/sys/net/ipv4/tcp_tw_reuse", "1")?;
            std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "1024 65535")?;
            repeat(|| exchange(&mut connect(to)?).map(|()| 1))
        }
        Work::Datagrams => {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(to)?;
            repeat(|| socket.send(&[0; DATAGRAM]).map(|_| 1))
        }
        Work::Stream => {
            let mut stream = connect(to)?;
            let chunk = vec![0; CHUNK];
            repeat(|| stream.write(&chunk).map(|length| length as u64))
        }
    }
}

fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, ANSWER)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ANSWER))?;
    Ok(stream)
}

fn exchange(stream: &mut TcpStream) -> io::Result<()> {
    let mut byte = [1];
    stream.write_all(&byte)?;
    stream.read_exact(&mut byte)
}

fn repeat(mut once: impl FnMut() -> io::Result<u64>) -> io::Result<Done> {
    let begun = Instant::now();
    let mut units = 0;
    while begun.elapsed() < SLICE {
        units += once()?;
    }
    Ok(Done { units, time: begun.elapsed() })
}

fn pin(core: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(core);
    Ok(sched_setaffinity(None, &set)?)
}
