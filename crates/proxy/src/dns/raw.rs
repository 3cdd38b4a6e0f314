//! Answers that need no socket of their own: packets that are written here from their first byte.
//! So are short ones, and those for whose address another process of the node has taken the port,
//! as a name server of the node itself does.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use palisade_abi::{mark, protocol};
use socket2::{Domain, Protocol, Socket, Type};

/// `IPPROTO_RAW`: what is sent begins with its own IP header, and nothing is received.
const RAW: i32 = 255;
const HOPS: u8 = 64;

/// A socket for each family.
pub(super) struct Raw {
    v4: Socket,
    v6: Socket,
}

impl Raw {
    /// Takes `CAP_NET_RAW`.
    pub(super) fn open() -> io::Result<Self> {
        let open = |domain| {
            let socket = Socket::new(domain, Type::RAW.nonblocking(), Some(Protocol::from(RAW)))?;
            socket.set_mark(mark::FROM_PROXY)?;
            Ok::<Socket, io::Error>(socket)
        };
        Ok(Self { v4: open(Domain::IPV4)?, v6: open(Domain::IPV6)? })
    }

    /// Sends a datagram as if the server did. One that needs fragments does not go.
    pub(super) fn send(
        &self,
        server: SocketAddr,
        client: SocketAddr,
        data: &[u8],
    ) -> io::Result<()> {
        let packet = packet(server, client, data).map_err(io::Error::other)?;
        let socket = if server.is_ipv4() { &self.v4 } else { &self.v6 };
        socket.send_to(&packet, &SocketAddr::new(client.ip(), 0).into())?;
        Ok(())
    }
}

/// Errors: too long, or of two families.
fn packet(from: SocketAddr, to: SocketAddr, data: &[u8]) -> Result<Vec<u8>, &'static str> {
    const UDP: usize = 8;
    let length = u16::try_from(UDP + data.len()).map_err(|_| "too long for a datagram")?;
    let (source, destination) = (octets(from.ip()), octets(to.ip()));
    let mut packet = match (from, to) {
        (SocketAddr::V4(_), SocketAddr::V4(_)) => {
            let whole = length.checked_add(20).ok_or("too long for a packet")?.to_be_bytes();
            // The kernel fills in the identification and the checksum.
            vec![0x45, 0, whole[0], whole[1], 0, 0, 0, 0, HOPS, protocol::UDP, 0, 0]
        }
        (SocketAddr::V6(_), SocketAddr::V6(_)) => {
            let length = length.to_be_bytes();
            vec![0x60, 0, 0, 0, length[0], length[1], protocol::UDP, HOPS]
        }
        _ => return Err("of two families"),
    };
    let mut udp =
        [from.port().to_be_bytes(), to.port().to_be_bytes(), length.to_be_bytes()].concat();
    udp.extend([0; 2]);
    udp.extend(data);
    let pseudo = [&source[..], &destination, &[0, protocol::UDP], &length.to_be_bytes()].concat();
    let sum = checksum([&pseudo, &udp]).to_be_bytes();
    udp[6..8].copy_from_slice(&sum);
    packet.extend(source);
    packet.extend(destination);
    packet.extend(udp);
    Ok(packet)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().into(),
        IpAddr::V6(address) => address.octets().into(),
    }
}

/// The Internet checksum of parts of which only the last may have an odd length; 0 means that there
/// is none, and stands as its other form.
fn checksum(parts: [&[u8]; 2]) -> u16 {
    let words = parts.into_iter().flat_map(|part| part.chunks(2));
    let sum = words.fold(0u32, |sum, word| {
        sum + u32::from(u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)]))
    });
    let folded = (sum >> 16) + (sum & 0xffff);
    match !((folded >> 16) + folded) as u16 {
        0 => 0xffff,
        sum => sum,
    }
}
