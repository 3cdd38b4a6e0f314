//! Frames of HTTP/2, for what no library sends.

use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
};

use palisade_proxy::http::PREFACE;

use super::{SERVER4, WAIT, World};

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const PRIORITY: u8 = 2;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Fields as literals that are not indexed.
pub(crate) fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            assert!(text.len() < 127);
            block.push(text.len() as u8);
            block.extend(text.as_bytes());
        }
    }
    block
}

pub(crate) const GET: [(&str, &str); 4] =
    [(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", "/public")];

/// A raw connection whose settings are exchanged.
pub(crate) fn raw(world: &World) -> TcpStream {
    let mut stream = world.connect(SERVER4);
    stream.write_all(PREFACE).unwrap();
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).unwrap();
    stream.write_all(&frame(SETTINGS, 1, 0, &[])).unwrap();
    stream
}

/// The next frame: kind, stream, payload. `None`: the connection ended, which silence is not.
pub(crate) fn next(stream: &mut TcpStream) -> Option<(u8, u32, Vec<u8>)> {
    let mut head = [0; 9];
    read(stream, &mut head)?;
    let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
    read(stream, &mut payload)?;
    Some((head[3], u32::from_be_bytes(head[5..].try_into().unwrap()), payload))
}

fn read(stream: &mut TcpStream, into: &mut [u8]) -> Option<()> {
    match stream.read_exact(into) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => panic!("nothing within {WAIT:?}"),
        read => read.ok(),
    }
}

/// The next frame that tells what became of a request.
pub(crate) fn outcome(stream: &mut TcpStream) -> Option<(u8, u32, Vec<u8>)> {
    std::iter::from_fn(|| next(stream))
        .find(|(kind, ..)| [HEADERS, RST_STREAM, GOAWAY].contains(kind))
}
