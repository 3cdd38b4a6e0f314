//! TLS that is not terminated: the server's name is read from the client's first message, which
//! then goes on as it is.
//!
//! Only the first hello is judged. A second one, after a server asked for another key share (RFC
//! 8446 section 4.1.2), must name the same server, and a client that breaks this gains nothing: it
//! talks to a server that it may talk to, and can ask that for any other name inside the encrypted
//! connection, where nobody without the server's key can look.

use std::{io, time::Duration};

use palisade_api::flow::{L7, escaped};
use palisade_policy::l7;
use tokio::{net::TcpStream, time::timeout};

use crate::{
    buffer::Buffer,
    connection,
    judge::{Application, Gate},
    log::shortened,
    net,
};

/// For the client to say whom it wants.
const HELLO_TIME: Duration = Duration::from_secs(10);
/// Longest client hello.
const MOST_HELLO: usize = 16 << 10;

/// Serves a connection whose server name has to be allowed. A mismatch resets it.
pub(crate) async fn serve(gate: &Gate, client: TcpStream) {
    let mut buffer = Buffer::default();
    let read = timeout(HELLO_TIME, read_name(&client, &mut buffer)).await;
    let name = read.ok().and_then(Result::ok).flatten();
    let allowed = |name: &str| gate.judge_name(Application::Tls, name);
    // What names nobody is allowed by no name.
    let judged = allowed(name.as_deref().unwrap_or_default());
    let server_name = name.as_deref().map(|name| shortened(escaped(name.as_bytes())));
    let Some(name) = name.filter(|_| judged.allowed) else {
        gate.record(&judged.refused(), L7::Tls { server_name, error: None });
        return net::reset(&client);
    };
    gate.record(&judged, L7::Tls { server_name: server_name.clone(), error: None });
    if let Some((judged, why)) = connection::pass(gate, client, buffer, || allowed(&name)).await {
        gate.record(&judged, L7::Tls { server_name, error: Some(why.to_owned()) });
    }
}

async fn read_name(client: &TcpStream, buffer: &mut Buffer) -> io::Result<Option<String>> {
    loop {
        match server_name(buffer.data()) {
            Ok(name) => return Ok(name),
            Err(Incomplete) if buffer.data().len() > MOST_HELLO => return Ok(None),
            Err(Incomplete) => {}
        }
        if buffer.fill(client).await? == 0 {
            return Ok(None);
        }
    }
}

/// More bytes are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incomplete;

/// The name in a TLS client hello (RFC 6066 section 3), in lower case; `None`: there is none, or
/// the bytes are no client hello.
///
/// # Errors
///
/// There are not enough bytes to tell.
pub fn server_name(bytes: &[u8]) -> Result<Option<String>, Incomplete> {
    let Some(message) = handshake(bytes)? else { return Ok(None) };
    Ok(hello_name(&message))
}

/// The first handshake message, put together from as many records as it takes.
fn handshake(bytes: &[u8]) -> Result<Option<Vec<u8>>, Incomplete> {
    const HANDSHAKE: u8 = 22;
    const CLIENT_HELLO: u8 = 1;
    const MOST_RECORD: usize = 1 << 14;
    let mut rest = bytes;
    let mut message = Vec::new();
    loop {
        if rest.first().is_some_and(|kind| *kind != HANDSHAKE)
            || rest.get(1).is_some_and(|v| *v != 3)
        {
            return Ok(None);
        }
        let (header, body) = rest.split_first_chunk::<5>().ok_or(Incomplete)?;
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if length == 0 || length > MOST_RECORD {
            return Ok(None);
        }
        message.extend_from_slice(&body[..length.min(body.len())]);
        if message.first().is_some_and(|kind| *kind != CLIENT_HELLO) {
            return Ok(None);
        }
        if let Some(([_, high, middle, low], content)) = message.split_first_chunk::<4>() {
            let wanted = usize::from(*high) << 16 | usize::from(*middle) << 8 | usize::from(*low);
            if wanted > MOST_HELLO {
                return Ok(None);
            }
            if let Some(content) = content.get(..wanted) {
                return Ok(Some(content.to_vec()));
            }
        }
        rest = body.get(length..).ok_or(Incomplete)?;
    }
}

/// Parts of a message that begin with their length.
struct Parts<'a>(&'a [u8]);

impl<'a> Parts<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (part, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(part)
    }

    fn short(&mut self) -> Option<&'a [u8]> {
        let length = usize::from(*self.take(1)?.first()?);
        self.take(length)
    }

    fn number(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    fn long(&mut self) -> Option<&'a [u8]> {
        let length = self.number()?.into();
        self.take(length)
    }
}

fn hello_name(hello: &[u8]) -> Option<String> {
    const SERVER_NAME: u16 = 0;
    const HOST_NAME: u8 = 0;
    const VERSION_AND_RANDOM: usize = 2 + 32;
    let mut parts = Parts(hello);
    parts.take(VERSION_AND_RANDOM)?;
    parts.short()?; // Session.
    parts.long()?; // Cipher suites.
    parts.short()?; // Compression methods.
    let mut extensions = Parts(parts.long()?);
    let after = parts.0;
    let mut found = None;
    while !extensions.0.is_empty() {
        let (kind, content) = (extensions.number()?, extensions.long()?);
        if kind != SERVER_NAME {
            continue;
        }
        let mut content = Parts(content);
        let mut list = Parts(content.long()?);
        let (kind, name) = (list.take(1)?, list.long()?);
        // One list with one name, once; anything else could be read in another way.
        if found.is_some() || kind != [HOST_NAME] || !list.0.is_empty() || !content.0.is_empty() {
            return None;
        }
        found = Some(name);
    }
    after.is_empty().then(|| l7::server_name(found?)).flatten()
}
