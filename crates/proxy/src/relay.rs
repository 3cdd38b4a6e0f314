//! Bytes both ways, with no more of them in memory than a buffer each way.

use std::io;

use tokio::net::TcpStream;

use crate::buffer::{Buffer, write_all};

/// A connection, and what was read of it already.
pub(crate) type End<'a> = (&'a TcpStream, &'a mut Buffer);

/// Relays until both sides have ended. The end of one is handed on as such. There is no limit to
/// how long they say nothing: the sockets find out themselves when a peer is gone
/// ([`crate::net::keep_alive`]).
///
/// # Errors
///
/// A side is broken.
pub(crate) async fn run(one: End<'_>, other: End<'_>) -> io::Result<()> {
    let (one_stream, other_stream) = (one.0, other.0);
    tokio::try_join!(copy(one, other_stream), copy(other, one_stream)).map(|_| ())
}

async fn copy((from, buffer): End<'_>, to: &TcpStream) -> io::Result<()> {
    loop {
        write_all(to, buffer.data()).await?;
        buffer.consume(buffer.data().len());
        if buffer.fill(from).await? == 0 {
            return socket2::SockRef::from(to).shutdown(std::net::Shutdown::Write);
        }
    }
}
