//! A server and a load that spend as little as they can themselves.

use std::{
    convert::Infallible,
    fmt, io,
    net::SocketAddr,
    path::Path,
    pin::Pin,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full};
use hyper::{Request, Response, client, server, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinSet,
};

use super::nginx;
use crate::sys::netns;

/// How long one measurement goes on.
pub(super) const SLICE: Duration = Duration::from_millis(1000);
pub(super) const BODY: &[u8] = b"hello, world";
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\nhello, world";
const QUESTION: &[u8] =
    b"GET /public/index.html HTTP/1.1\r\nhost: server\r\nuser-agent: bench\r\n\r\n";
/// Streams of HTTP/2 that share a connection.
const STREAMS: usize = 8;

/// A version of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    Http1,
    Http2,
    /// HTTP/1.1 between a server and a client of others.
    Wrk,
}

/// Requests over so many connections, all the time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) protocol: Protocol,
    pub(super) connections: usize,
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Http1 => "HTTP/1.1",
            Protocol::Http2 => "HTTP/2",
            Protocol::Wrk => "HTTP/1.1 from wrk to nginx",
        };
        let plural = if self.connections == 1 { "" } else { "s" };
        write!(f, "{protocol}, {} connection{plural}", self.connections)
    }
}

/// What a load did.
pub(super) struct Done {
    pub(super) requests: u64,
    pub(super) median_latency: Duration,
}

/// A server that ends with this value.
pub(super) struct Server {
    over: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Server {
    pub(super) fn start(netns: &Path, at: SocketAddr) -> io::Result<Self> {
        let listener = netns::run_in(netns, move || std::net::TcpListener::bind(at))?;
        listener.set_nonblocking(true)?;
        let (over, ended) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            runtime()?.block_on(async {
                let listener = TcpListener::from_std(listener)?;
                tokio::select! {
                    result = accept(&listener) => result,
                    _ = ended => Ok(()),
                }
            })
        });
        Ok(Self { over: Some(over), thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.over.take());
        // What a server of the bench died of shows in what its clients say.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

async fn accept(listener: &TcpListener) -> io::Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(serve(stream));
    }
}

async fn serve(mut stream: TcpStream) -> io::Result<()> {
    let mut first = [0; 3];
    if stream.peek(&mut first).await? == first.len() && first == *b"PRI" {
        let answer = service_fn(|_| async {
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(BODY))))
        });
        let mut connection = server::conn::http2::Builder::new(TokioExecutor::new());
        // A proxy may put all clients' streams on one connection.
        return connection
            .max_concurrent_streams(None)
            .serve_connection(TokioIo::new(stream), answer)
            .await
            .map_err(io::Error::other);
    }
    let mut buffer = [0; 4096];
    let mut filled = 0;
    loop {
        let length = stream.read(&mut buffer[filled..]).await?;
        if length == 0 {
            return Ok(());
        }
        filled += length;
        if buffer[..filled].ends_with(b"\r\n\r\n") {
            stream.write_all(ANSWER).await?;
            filled = 0;
        }
    }
}

/// The latencies of what one connection asks.
type Asking = Pin<Box<dyn Future<Output = io::Result<Vec<Duration>>> + Send>>;

impl Load {
    /// Asks `to` for a while; runs where its thread is.
    pub(super) fn run(self, to: SocketAddr) -> io::Result<Done> {
        let ask: fn(SocketAddr, Instant) -> Asking = match self.protocol {
            Protocol::Http1 => |to, end| Box::pin(ask_http1(to, end)),
            Protocol::Http2 => |to, end| Box::pin(ask_http2(to, end)),
            Protocol::Wrk => return nginx::ask(to, self.connections).map_err(io::Error::other),
        };
        runtime()?.block_on(async {
            let end = Instant::now() + SLICE;
            let mut clients: JoinSet<_> =
                std::iter::repeat_with(|| ask(to, end)).take(self.connections).collect();
            let mut latencies = Vec::new();
            while let Some(client) = clients.join_next().await {
                latencies.extend(client.map_err(io::Error::other)??);
            }
            latencies.sort_unstable();
            let median_latency = latencies.get(latencies.len() / 2).copied().unwrap_or_default();
            Ok(Done { requests: latencies.len() as u64, median_latency })
        })
    }
}

async fn ask_http1(to: SocketAddr, end: Instant) -> io::Result<Vec<Duration>> {
    let mut stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let mut latencies = Vec::new();
    let mut buffer = [0; 4096];
    while Instant::now() < end {
        let begun = Instant::now();
        stream.write_all(QUESTION).await?;
        let mut filled = 0;
        while !buffer[..filled].ends_with(BODY) {
            let length = stream.read(&mut buffer[filled..]).await?;
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            filled += length;
        }
        if !buffer.starts_with(b"HTTP/1.1 200") {
            return Err(io::Error::other(String::from_utf8_lossy(&buffer[..filled])));
        }
        latencies.push(begun.elapsed());
    }
    Ok(latencies)
}

async fn ask_http2(to: SocketAddr, end: Instant) -> io::Result<Vec<Duration>> {
    let stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) =
        client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
    tokio::spawn(connection);
    let mut streams = JoinSet::new();
    for _ in 0..STREAMS {
        let mut sender = sender.clone();
        streams.spawn(async move {
            let mut latencies = Vec::new();
            while Instant::now() < end {
                let begun = Instant::now();
                let request = Request::get("http://server/public/index.html")
                    .body(Empty::<Bytes>::new())
                    .map_err(io::Error::other)?;
                let answer = sender.send_request(request).await.map_err(io::Error::other)?;
                let status = answer.status();
                let body = answer.into_body().collect().await.map_err(io::Error::other)?;
                if status != 200 {
                    let body = body.to_bytes();
                    return Err(io::Error::other(format!("{status}: {}", body.escape_ascii())));
                }
                latencies.push(begun.elapsed());
            }
            Ok(latencies)
        });
    }
    let mut latencies = Vec::new();
    while let Some(stream) = streams.join_next().await {
        latencies.extend(stream.map_err(io::Error::other)??);
    }
    Ok(latencies)
}
