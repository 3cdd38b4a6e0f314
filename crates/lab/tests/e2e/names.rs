//! A name server in a pod that says what it is told to, and a client that asks it.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use palisade_lab::dns::wire::{Answer, Data, Incoming, Name, Query, Record, number, read_query};

use super::harness::Pod;

pub(crate) const PATIENCE: Duration = Duration::from_secs(2);

/// The names that a server was asked for.
pub(crate) type Asked = Arc<Mutex<Vec<String>>>;

/// Serves names over UDP and TCP: each has the addresses that the list says, for a minute.
pub(crate) fn serve_names(pod: &Pod, names: Vec<(&'static str, IpAddr)>) -> Asked {
    serve(pod, 60, move |asked| {
        let known = names.iter().filter(|(name, _)| asked == *name);
        known.map(|(_, address)| *address).collect()
    })
}

/// Serves the addresses that each name has, and keeps what was asked for. A name without any does
/// not exist.
pub(crate) fn serve(
    pod: &Pod,
    ttl: u32,
    addresses: impl Fn(&str) -> Vec<IpAddr> + Send + Sync + 'static,
) -> Asked {
    let at = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 53));
    let (udp, tcp) = pod.run(move || Ok((UdpSocket::bind(at)?, TcpListener::bind(at)?)));
    let asked = Asked::default();
    let log = asked.clone();
    let answer = move |query: &Query| {
        let name = query.name.key();
        log.lock().unwrap().push(name.clone());
        let known = addresses(&name);
        if known.is_empty() {
            return Answer::code(number::NAME_ERROR);
        }
        let data = known.into_iter().map(|address| match address {
            IpAddr::V4(address) => Data::A(address),
            IpAddr::V6(address) => Data::Aaaa(address),
        });
        let records = data.filter(|data| data.kind() == query.kind);
        let record = |data| Record { name: query.name.clone(), ttl, data };
        Answer { answers: records.map(record).collect(), ..Answer::default() }
    };
    let answer = Arc::new(answer);
    let of_stream = answer.clone();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = udp.recv_from(&mut buffer) {
            if let Incoming::Query(query) = read_query(&buffer[..length]) {
                udp.send_to(&query.datagram(&answer(&query)), from).unwrap();
            }
        }
    });
    thread::spawn(move || {
        for mut stream in tcp.incoming().map_while(Result::ok) {
            let Ok(packet) = read_message(&mut stream) else { continue };
            if let Incoming::Query(query) = read_query(&packet) {
                write_message(&mut stream, &query.stream(&of_stream(&query))).unwrap();
            }
        }
    });
    asked
}

fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut message).map(|()| message)
}

fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).unwrap().to_be_bytes();
    stream.write_all(&[&length[..], message].concat())
}

/// A question for the addresses of a name, of the server's family.
pub(crate) fn question(server: IpAddr, name: &str) -> Query {
    let kind = if server.is_ipv4() { number::A } else { number::AAAA };
    Query::new(0x1234, Name::parse(name).unwrap(), kind)
}

/// A socket in the namespace of this thread, connected to a server.
pub(crate) fn socket(server: SocketAddr) -> io::Result<UdpSocket> {
    let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(server)?;
    Ok(socket)
}

/// The answer to what is sent through the socket.
pub(crate) fn ask(socket: &UdpSocket, message: &[u8]) -> io::Result<Vec<u8>> {
    socket.send(message)?;
    let mut buffer = vec![0; 1500];
    let length = socket.recv(&mut buffer)?;
    buffer.truncate(length);
    Ok(buffer)
}

/// The code of the answer and the addresses in it; nothing where none came.
pub(crate) fn look_up(
    from: &Pod,
    server: IpAddr,
    name: &str,
    tcp: bool,
) -> Option<(u8, Vec<String>)> {
    let query = question(server, name);
    let message = query.message();
    let server = SocketAddr::new(server, 53);
    let asked = from.spawn(move || {
        if tcp {
            let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            write_message(&mut stream, &message)?;
            return read_message(&mut stream);
        }
        ask(&socket(server)?, &message)
    });
    let answer = query.read_answer(&asked.join().unwrap().ok()?)?;
    let addresses = answer.answers.iter().map(|record| record.data.to_string());
    Some((answer.code, addresses.collect()))
}
