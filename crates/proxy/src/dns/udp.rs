//! Questions in datagrams: taken from one socket for each family, answered in the server's name.

use std::{
    convert::Infallible,
    io::{self, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
    sync::Arc,
    time::Instant,
};

use nix::{
    cmsg_space,
    sys::socket::{
        ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrStorage, recvmsg,
        setsockopt,
        sockopt::{Ipv4OrigDstAddr, Ipv6OrigDstAddr, RcvBufForce},
    },
};
use socket2::{Protocol, Type};
use tokio::{io::Interest, net::UdpSocket};

use super::{
    Flow, Transport, exchange,
    limits::{TOO_MANY, UnderWayOne},
    pace::{Pace, TOO_FAST},
    raw::Raw,
    record_excess,
    turns::Turns,
};
use crate::{Proxy, net};

/// Longest question that is read; real ones have no more than a name and some options.
const MAX_QUESTION: usize = 4096;
/// For the log.
const TOO_LONG: &str = "dropped: longer than a question in a datagram may be";
/// Answers up to this length are in one packet wherever they go (RFC 8200, section 5).
const SHORT: usize = 1280 - 40 - 8;
/// Room for questions that wait to be read, in bytes: what 50,000 of them a second take in a fifth
/// of a second, when this process does not get to run.
const BUFFER: usize = 4 << 20;

/// What questions come in by, and answers go out by.
pub struct Sockets {
    pub(super) asked: [std::net::UdpSocket; 2],
    pub(super) raw: Raw,
}

/// A socket for each family, on 127.0.0.1 and `::1`.
///
/// # Errors
/// The port is taken, or the process may not open transparent or raw sockets.
pub fn sockets(port: u16) -> io::Result<Sockets> {
    let open = |address: IpAddr| {
        let address = SocketAddr::new(address, port);
        let socket = net::transparent(address, Type::DGRAM, Protocol::UDP)?;
        match address {
            SocketAddr::V4(_) => setsockopt(&socket, Ipv4OrigDstAddr, &true)?,
            SocketAddr::V6(_) => setsockopt(&socket, Ipv6OrigDstAddr, &true)?,
        }
        // The kernel's usual limit (net.core.rmem_max) holds no more than a few hundred.
        setsockopt(&socket, RcvBufForce, &BUFFER)?;
        socket.bind(&address.into())?;
        Ok::<std::net::UdpSocket, io::Error>(socket.into())
    };
    let asked = [open(Ipv4Addr::LOCALHOST.into())?, open(Ipv6Addr::LOCALHOST.into())?];
    Ok(Sockets { asked, raw: Raw::open()? })
}

/// Serves a socket until the process ends.
pub(super) async fn serve(
    proxy: &Arc<Proxy>,
    socket: std::net::UdpSocket,
    raw: &Arc<Raw>,
) -> io::Result<Infallible> {
    let socket = UdpSocket::from_std(socket)?;
    let (turns, mut pace) = (Arc::new(Turns::default()), Pace::default());
    let mut buffer = vec![0; MAX_QUESTION + 1];
    loop {
        // An error belongs to one datagram, or to an answer that met nobody.
        let Ok((length, flow)) = receive(&socket, &mut buffer).await else { continue };
        let message = &buffer[..length];
        let under_way = match admit(proxy, &mut pace, flow.client.ip(), length) {
            Ok(under_way) => under_way,
            Err(why) => {
                record_excess(proxy, flow, message, why);
                continue;
            }
        };
        let question = Asked { flow, message: message.to_vec(), _held: under_way };
        let Some(questions) = turns.put(flow.client.ip(), question) else { continue };
        let (proxy, raw, turns) = (Arc::clone(proxy), Arc::clone(raw), Arc::clone(&turns));
        proxy.main.clone().spawn(async move {
            turns.serve(questions, |asked| answer(&proxy, asked, &raw)).await;
        });
    }
}

/// Whether a client may ask a question of some length now, or why not.
fn admit(
    proxy: &Proxy,
    pace: &mut Pace,
    client: IpAddr,
    length: usize,
) -> Result<UnderWayOne, &'static str> {
    if length > MAX_QUESTION {
        return Err(TOO_LONG);
    }
    if !pace.admit(client, Instant::now()) {
        return Err(TOO_FAST);
    }
    // Whoever has many under way is not even read: the questions of all wait in one queue.
    proxy.dns.limits.admit(client).ok_or(TOO_MANY)
}

/// A question, and what it holds until it is answered.
struct Asked {
    flow: Flow,
    message: Vec<u8>,
    _held: UnderWayOne,
}

async fn answer(proxy: &Arc<Proxy>, asked: Asked, raw: &Raw) {
    let Some(reply) = exchange(proxy, asked.flow, &asked.message).await else { return };
    if let Err(error) = send(asked.flow, &reply, raw) {
        tracing::debug!(%error, flow = ?asked.flow, "cannot answer");
    }
}

async fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, Flow)> {
    socket.async_io(Interest::READABLE, || receive_now(socket, buffer)).await
}

fn receive_now(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, Flow)> {
    let mut control = cmsg_space!(nix::libc::sockaddr_in6);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::empty(),
    )?;
    let client = message.address.as_ref().and_then(socket_address);
    let server = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4OrigDstAddr(address) => Some(v4(SockaddrIn::from(address))),
        ControlMessageOwned::Ipv6OrigDstAddr(address) => Some(v6(SockaddrIn6::from(address))),
        _ => None,
    });
    let unknown = || io::Error::other("a datagram from or to nowhere");
    let (client, server) = client.zip(server).ok_or_else(unknown)?;
    Ok((message.bytes, Flow { transport: Transport::Udp, client, server }))
}

fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let ipv4 = address.as_sockaddr_in().map(|address| v4(*address));
    ipv4.or_else(|| address.as_sockaddr_in6().map(|address| v6(*address)))
}

fn v4(address: SockaddrIn) -> SocketAddr {
    SocketAddr::new(address.ip().into(), address.port())
}

fn v6(address: SockaddrIn6) -> SocketAddr {
    SocketAddr::new(address.ip().into(), address.port())
}

/// Sends the answer as if the server did.
fn send(flow: Flow, reply: &[u8], raw: &Raw) -> io::Result<()> {
    // One call in place of six. Its room is everybody's: where there is none, or the way carries
    // less, the answer has a socket of its own.
    if reply.len() <= SHORT && raw.send(flow.server, flow.client, reply).is_ok() {
        return Ok(());
    }
    let socket = net::transparent(flow.server, Type::DGRAM, Protocol::UDP)?;
    // Answers of the same server may be sent at the same time.
    socket.set_reuse_address(true)?;
    match socket.bind(&flow.server.into()) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            return raw.send(flow.server, flow.client, reply);
        }
        bound => bound?,
    }
    socket.send_to(reply, &flow.client.into())?;
    Ok(())
}
