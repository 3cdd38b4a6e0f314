//! Asking the server: one socket for each question, in the client's name.

use std::{
    future::poll_fn,
    io, mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    task::Poll,
};

use socket2::{Protocol, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UdpSocket,
};

use super::{Answer, Question, Transport, message::with_id};
use crate::net;

/// So many wrong answers to one question are one attack.
const MAX_STRAYS: usize = 64;
/// Longest message.
const MAX_MESSAGE: usize = u16::MAX as usize;

/// Asks the server and returns the first valid answer, with the client's id in it. Waits for ever
/// where there is none.
pub(super) async fn ask(
    transport: Transport,
    own_name: Option<IpAddr>,
    server: SocketAddr,
    question: &Question,
    message: &[u8],
) -> io::Result<(Answer, Vec<u8>)> {
    let id = random_id()?;
    let message = with_id(message, id);
    let (answer, reply) = match transport {
        Transport::Udp => ask_udp(own_name, server, question, id, &message).await?,
        Transport::Tcp => ask_tcp(own_name, server, question, id, &message).await?,
    };
    Ok((answer, with_id(&reply, question.id)))
}

async fn ask_udp(
    client: Option<IpAddr>,
    server: SocketAddr,
    question: &Question,
    id: u16,
    message: &[u8],
) -> io::Result<(Answer, Vec<u8>)> {
    // The kernel chooses a random port, and hands over nothing from elsewhere than the server.
    let socket = net::transparent(server, Type::DGRAM, Protocol::UDP)?;
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    socket.bind(&SocketAddr::new(client.unwrap_or(any), 0).into())?;
    socket.connect(&server.into())?;
    let socket = UdpSocket::from_std(socket.into())?;
    socket.send(message).await?;
    let mut buffer = Vec::with_capacity(MAX_MESSAGE);
    for _ in 0..=MAX_STRAYS {
        buffer.clear();
        socket.recv_buf(&mut buffer).await?;
        let read = Answer::read(question, id, &buffer);
        // A long message takes long to read: whatever comes next waits for the next turn.
        end_turn().await;
        if let Ok(answer) = read {
            return Ok((answer, buffer));
        }
    }
    Err(io::Error::other("too many answers to other questions"))
}

async fn ask_tcp(
    client: Option<IpAddr>,
    server: SocketAddr,
    question: &Question,
    id: u16,
    message: &[u8],
) -> io::Result<(Answer, Vec<u8>)> {
    let mut stream = match client {
        Some(client) => net::connect_as(SocketAddr::new(client, 0), server).await?,
        None => net::connect_own(server).await?,
    };
    write_framed(&mut stream, message).await?;
    let length = stream.read_u16().await?;
    let mut reply = vec![0; usize::from(length)];
    stream.read_exact(&mut reply).await?;
    let answer = Answer::read(question, id, &reply)
        .map_err(|_| io::Error::other("the server answers another question"))?;
    Ok((answer, reply))
}

/// A message with its length before it, in one piece.
pub(super) async fn write_framed(
    stream: &mut (impl AsyncWriteExt + Unpin),
    message: &[u8],
) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), message].concat()).await
}

/// Ends the turn of [`super::turns`]: a set of futures stops at those that wake themselves.
async fn end_turn() {
    let mut over = false;
    poll_fn(|context| {
        if mem::replace(&mut over, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

fn random_id() -> io::Result<u16> {
    let mut bytes = [0; 2];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u16::from_ne_bytes(bytes))
}
