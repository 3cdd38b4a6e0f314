//! Sockets that speak in the names of others: listeners that take connections meant for any
//! address, and connections that bear the client's own.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    time::Duration,
};

use palisade_abi::mark;
use socket2::{Domain, Protocol, SockAddr, Socket, TcpKeepalive, Type};
use tokio::{
    net::{TcpSocket, TcpStream},
    time::timeout,
};

const BACKLOG: i32 = 4096;
/// For a server to take a connection.
pub(crate) const CONNECT_TIME: Duration = Duration::from_secs(5);
const PROBE_AFTER: Duration = Duration::from_secs(120);
const PROBE_EVERY: Duration = Duration::from_secs(30);

/// A listener for each family.
///
/// # Errors
///
/// The port is taken, or the process may not open transparent sockets.
pub fn listeners(port: u16) -> io::Result<[TcpListener; 2]> {
    let listen = |address: IpAddr| {
        let address = SocketAddr::new(address, port);
        let socket = transparent(address, Type::STREAM, Protocol::TCP)?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok::<TcpListener, io::Error>(socket.into())
    };
    Ok([listen(Ipv4Addr::LOCALHOST.into())?, listen(Ipv6Addr::LOCALHOST.into())?])
}

/// A socket that may take any address, in the family of the one given.
///
/// # Errors
///
/// The process lacks `CAP_NET_ADMIN`.
pub fn transparent(address: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind.nonblocking(), Some(protocol))?;
    match address {
        SocketAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
        SocketAddr::V6(_) => {
            socket.set_only_v6(true)?;
            socket.set_ip_transparent_v6(true)?;
        }
    }
    socket.set_mark(mark::FROM_PROXY)?;
    Ok(socket)
}

/// Connects to the server in the client's name: from its address, and from its port where that is
/// free.
///
/// # Errors
///
/// As `connect` has it, or the server says nothing for long.
pub async fn connect_as(client: SocketAddr, server: SocketAddr) -> io::Result<TcpStream> {
    match connect_from(Some(client), server).await {
        Err(error) if is_taken(&error) => {
            connect_from(Some(SocketAddr::new(client.ip(), 0)), server).await
        }
        result => result,
    }
}

/// Connects to the server in the node's own name.
///
/// # Errors
///
/// As [`connect_as`].
pub async fn connect_own(server: SocketAddr) -> io::Result<TcpStream> {
    connect_from(None, server).await
}

async fn connect_from(local: Option<SocketAddr>, server: SocketAddr) -> io::Result<TcpStream> {
    let socket = transparent(server, Type::STREAM, Protocol::TCP)?;
    socket.set_tcp_nodelay(true)?;
    if let Some(local) = local {
        // The client's own connection to the proxy has the same addresses and the same port.
        socket.set_reuse_address(true)?;
        socket.bind(&SockAddr::from(local))?;
    }
    let connected = TcpSocket::from_std_stream(socket.into()).connect(server);
    let stream = timeout(CONNECT_TIME, connected).await??;
    keep_alive(&stream);
    Ok(stream)
}

/// Lets the kernel find out when a peer is gone without a word.
pub fn keep_alive(stream: &TcpStream) {
    let every = TcpKeepalive::new().with_time(PROBE_AFTER).with_interval(PROBE_EVERY);
    _ = socket2::SockRef::from(stream).set_tcp_keepalive(&every);
}

/// The port is in use: found by `bind`, or by `connect` where the four numbers are.
fn is_taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

/// Ends a connection with a reset, so that nobody takes the end for an orderly one.
pub fn reset(stream: &TcpStream) {
    _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
}
