//! HTTP: what a message says, and how it is said again.
//!
//! HTTP/1 is read and written by our own code, HTTP/2 by the `h2` crate. The libraries for HTTP/1
//! are made for servers and clients, which may be kind to what is ambiguous; a judge may not, and
//! a strict reader in front of a kind one would be two readers that can differ. One strict reader,
//! one writer, and a body that is framed anew are less code than the guards would be, and leave
//! nothing that the server could see and the judge could not. What reads the frames of HTTP/2 before
//! the crate does ends connections and streams, and nothing of what it reads is judged: where the
//! two differed, less would pass. HTTP/2 stays HTTP/2 towards the server: nothing is translated
//! between versions.

mod activity;
mod alarm;
pub mod body;
pub mod frames;
mod hpack;
mod one;
pub mod reply;
pub mod request;
pub mod response;
pub mod syntax;
#[cfg(test)]
mod tests;
pub mod two;

use std::{io, time::Duration};

pub use palisade_policy::l7::target;
use tokio::{
    net::TcpStream,
    time::{Instant, timeout_at},
};

use self::syntax::Malformed;
use crate::{buffer::Buffer, judge::Gate, net, shares::Share};

/// From the first byte of a head to its last; for the first one, from when the connection began.
const HEAD_TIME: Duration = Duration::from_secs(10);
/// A head that takes longer.
const LATE: Malformed = Malformed { status: 408, why: "the head took too long" };
/// Interim answers to one request.
const MOST_INTERIM: usize = 8;
const MANY_INTERIM: Malformed = Malformed::bad("too many interim answers");
/// Without a byte either way.
const IDLE_TIME: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 300 });

/// Told of a request that the server may have, and whose client hears no answer.
const UNHEARD: &str = "the client went away, or fell silent, before it was answered";

/// A head up to this length is in memory as long as its connection needs it.
const SHORT_HEAD: usize = 8 << 10;
/// Longer ones in memory, of all connections: 256 MiB where each is as long as one may be, and as
/// much again for what is made of each that is judged.
pub(crate) const MOST_LONG_HEADS: usize = 4096;

/// Room for a head of which this much is there, until it is dropped; a short one needs none.
fn room_for(gate: &Gate, length: usize) -> Result<Option<Share>, Malformed> {
    const NONE: Malformed = Malformed { status: 503, why: "there are too many long heads" };
    match length > SHORT_HEAD {
        true => gate.long_head().ok_or(NONE).map(Some),
        false => Ok(None),
    }
}

/// What every connection over HTTP/2 begins with (RFC 9113 section 3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Serves a connection on which HTTP must be spoken.
pub(crate) async fn serve(gate: &Gate, client: TcpStream) {
    let mut buffer = Buffer::default();
    let deadline = Instant::now() + HEAD_TIME;
    match timeout_at(deadline, is_two(&client, &mut buffer)).await {
        Ok(Ok(true)) => two::serve(gate, client, buffer, deadline).await,
        Ok(Ok(false)) => one::serve(gate, client, buffer, deadline).await,
        // Whoever says nothing, or goes away, asked for nothing.
        _ => net::reset(&client),
    }
}

/// Whether the client speaks HTTP/2, as soon as that is certain.
async fn is_two(client: &TcpStream, buffer: &mut Buffer) -> io::Result<bool> {
    loop {
        let data = buffer.data();
        let common = data.len().min(PREFACE.len());
        if data[..common] != PREFACE[..common] {
            return Ok(false);
        }
        if common == PREFACE.len() {
            return Ok(true);
        }
        if buffer.fill(client).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// Fields that trailers must not carry: they frame, route or authorise a message, which was judged
/// without them.
fn may_trail(name: &str) -> bool {
    let vital = matches!(
        name,
        "authorization"
            | "cache-control"
            | "content-encoding"
            | "content-length"
            | "content-range"
            | "content-type"
            | "cookie"
            | "expect"
            | "host"
            | "max-forwards"
            | "proxy-authorization"
            | "set-cookie"
            | "trailer"
    );
    !vital && !request::is_hop(name)
}
