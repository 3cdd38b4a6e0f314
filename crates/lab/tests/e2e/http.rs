//! An origin that remembers every byte it gets, and a client that says exactly what it is told.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use super::harness::Pod;

/// No answer within this is no answer.
const ANSWER: Duration = Duration::from_secs(2);

/// A server of HTTP/1.1 in a pod, as trusting as a server can be.
#[derive(Clone, Default)]
pub(crate) struct Origin {
    bytes: Arc<AtomicU64>,
    heads: Arc<Mutex<Vec<(IpAddr, String)>>>,
}

impl Origin {
    pub(crate) fn start(pod: &Pod, port: u16) -> Self {
        let at = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
        let listener = pod.run(move || TcpListener::bind(at));
        let origin = Self::default();
        let served = origin.clone();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let served = served.clone();
                // A client that goes away is no concern of the origin.
                thread::spawn(move || served.serve(stream));
            }
        });
        origin
    }

    /// Bytes that arrived so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// The requests since the last call: from whom, and the request line.
    pub(crate) fn take(&self) -> Vec<(IpAddr, String)> {
        std::mem::take(&mut *self.heads.lock().unwrap())
    }

    fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        let peer = stream.peer_addr()?.ip().to_canonical();
        let mut received = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let end = loop {
                if let Some(at) = received.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                    break at + 4;
                }
                let length = stream.read(&mut buffer)?;
                if length == 0 {
                    return Ok(());
                }
                self.bytes.fetch_add(u64::try_from(length).unwrap(), Relaxed);
                received.extend_from_slice(&buffer[..length]);
            };
            let head: Vec<u8> = received.drain(..end).collect();
            let head = String::from_utf8_lossy(&head).into_owned();
            let line = head.lines().next().unwrap_or_default().to_owned();
            self.heads.lock().unwrap().push((peer, line));
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nhello\n")?;
        }
    }
}

/// A connection that stays open.
pub(crate) struct Client {
    stream: TcpStream,
    received: Vec<u8>,
}

impl Client {
    pub(crate) fn connect(pod: &Pod, to: SocketAddr) -> io::Result<Self> {
        let connect = move || {
            let stream = TcpStream::connect_timeout(&to, ANSWER)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(ANSWER))?;
            stream.set_write_timeout(Some(ANSWER))?;
            Ok(stream)
        };
        let stream = pod.spawn(connect).join().unwrap()?;
        Ok(Self { stream, received: Vec::new() })
    }

    /// Asks and waits for the answer's status.
    pub(crate) fn ask(&mut self, method: &str, target: &str) -> io::Result<u16> {
        self.ask_with(method, target, "")
    }

    /// As [`Self::ask`], with more header lines.
    pub(crate) fn ask_with(
        &mut self,
        method: &str,
        target: &str,
        headers: &str,
    ) -> io::Result<u16> {
        let request = format!("{method} {target} HTTP/1.1\r\nhost: origin\r\n{headers}\r\n");
        self.stream.write_all(request.as_bytes())?;
        self.status()
    }

    /// Sends bytes as they are; what came back until the other end closed.
    pub(crate) fn say(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut answer = Vec::new();
        if self.stream.write_all(bytes).is_ok() {
            // A reset ends it as well as a close.
            let _ = self.stream.read_to_end(&mut answer);
        }
        answer
    }

    /// Ends the connection at once, with what it has not delivered.
    pub(crate) fn abort(self) {
        socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO)).unwrap();
    }

    fn status(&mut self) -> io::Result<u16> {
        loop {
            if let Some((status, length)) = answer(&self.received) {
                self.received.drain(..length);
                return Ok(status);
            }
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                length => self.received.extend_from_slice(&buffer[..length]),
            }
        }
    }
}

/// The status of a whole answer and how long that is.
pub(super) fn answer(bytes: &[u8]) -> Option<(u16, usize)> {
    let end = bytes.windows(4).position(|bytes| bytes == b"\r\n\r\n")? + 4;
    let head = std::str::from_utf8(&bytes[..end]).ok()?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let body = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    });
    let whole = end + body.unwrap_or(0);
    (bytes.len() >= whole).then_some((status, whole))
}
