//! A name server that says what it is told to, and keeps what it was asked.
#![allow(dead_code, reason = "no test uses all of it")]

use std::{
    collections::HashMap,
    io::{Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{Arc, Condvar, Mutex},
    thread,
};

use socket2::SockRef;

use crate::world::{Namespace, SERVER4, SERVER6, WAIT};

/// A question that came.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) message: Vec<u8>,
    pub(crate) peer: SocketAddr,
    pub(crate) tcp: bool,
}

impl Asked {
    /// The name as it was written.
    pub(crate) fn name(&self) -> String {
        let mut labels = Vec::new();
        let mut rest = &self.message[12..];
        while let [length, tail @ ..] = rest
            && *length > 0
        {
            let (label, tail) = tail.split_at(usize::from(*length));
            labels.push(String::from_utf8_lossy(label).into_owned());
            rest = tail;
        }
        labels.join(".")
    }
}

/// What is said, and how.
pub(crate) enum Say {
    /// As it should be.
    Answer(Vec<u8>),
    /// From another socket of the server.
    From(SocketAddr, Vec<u8>),
    /// Once so many questions came.
    After(usize, Vec<u8>),
}

pub(crate) type Script = dyn Fn(&Asked) -> Vec<Say> + Send + Sync;

pub(crate) struct NameServer {
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    asked: Mutex<Vec<Asked>>,
    changed: Condvar,
}

impl State {
    fn wait(&self, count: usize) -> Vec<Asked> {
        let asked = self.asked.lock().unwrap();
        let (asked, late) =
            self.changed.wait_timeout_while(asked, WAIT, |asked| asked.len() < count).unwrap();
        assert!(!late.timed_out(), "the server was asked {} times", asked.len());
        asked.clone()
    }

    fn note(&self, asked: Asked) {
        self.asked.lock().unwrap().push(asked);
        self.changed.notify_all();
    }
}

impl NameServer {
    pub(crate) fn new(
        namespace: &Namespace,
        script: impl Fn(&Asked) -> Vec<Say> + Send + Sync + 'static,
    ) -> Self {
        let state: Arc<State> = Arc::default();
        let (shared, script): (_, Arc<Script>) = (Arc::clone(&state), Arc::new(script));
        namespace.run(move || {
            for address in [SERVER4, SERVER6] {
                let udp = UdpSocket::bind((address, 53)).unwrap();
                // It does not always run when it is asked a lot.
                SockRef::from(&udp).set_recv_buffer_size(1 << 20).unwrap();
                let (state, script) = (Arc::clone(&shared), Arc::clone(&script));
                thread::spawn(move || serve_udp(udp, &state, &script));
            }
            let tcp = TcpListener::bind((IpAddr::from(Ipv6Addr::UNSPECIFIED), 53)).unwrap();
            thread::spawn(move || {
                for stream in tcp.incoming() {
                    let (state, script) = (Arc::clone(&shared), Arc::clone(&script));
                    thread::spawn(move || serve_tcp(stream.unwrap(), &state, &script));
                }
            });
        });
        Self { state }
    }

    /// What was asked so far.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.state.asked.lock().unwrap().clone()
    }

    /// Waits until so many questions came.
    pub(crate) fn wait(&self, count: usize) -> Vec<Asked> {
        self.state.wait(count)
    }
}

fn serve_udp(socket: UdpSocket, state: &Arc<State>, script: &Arc<Script>) {
    let socket = Arc::new(socket);
    let mut others: HashMap<SocketAddr, UdpSocket> = HashMap::new();
    let mut buffer = [0; 65536];
    while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
        let asked = Asked { message: buffer[..length].to_vec(), peer, tcp: false };
        state.note(asked.clone());
        for say in script(&asked) {
            match say {
                Say::Answer(bytes) => _ = socket.send_to(&bytes, peer).unwrap(),
                Say::From(from, bytes) => {
                    let other =
                        others.entry(from).or_insert_with(|| UdpSocket::bind(from).unwrap());
                    other.send_to(&bytes, peer).unwrap();
                }
                Say::After(count, bytes) => {
                    let (state, socket) = (Arc::clone(state), Arc::clone(&socket));
                    thread::spawn(move || {
                        state.wait(count);
                        socket.send_to(&bytes, peer).unwrap();
                    });
                }
            }
        }
    }
}

fn serve_tcp(mut stream: TcpStream, state: &Arc<State>, script: &Arc<Script>) {
    let peer = stream.peer_addr().unwrap();
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    while let Some(message) = framed(&mut stream) {
        let asked = Asked { message, peer, tcp: true };
        state.note(asked.clone());
        for say in script(&asked) {
            let bytes = match say {
                Say::Answer(bytes) => bytes,
                Say::After(count, bytes) => {
                    state.wait(count);
                    bytes
                }
                Say::From(..) => panic!("a stream has one end"),
            };
            _ = stream.write_all(&frame(&bytes));
        }
    }
}

/// The next message of a stream.
pub(crate) fn framed(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).ok()?;
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut message).ok()?;
    Some(message)
}

/// A message with its length before it.
pub(crate) fn frame(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u16).to_be_bytes(), message].concat()
}
