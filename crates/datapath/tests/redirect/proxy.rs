//! A proxy in a few lines: it copies, and remembers what it saw.

use std::{
    io::{self, Read, Write},
    mem::{size_of, zeroed},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::{Arc, Mutex},
    thread,
};

use palisade_abi::{PROXY_PORT, mark::FROM_PROXY};

use crate::world::Place;

/// Client, original destination, and whether the client's own port was free.
pub(crate) type Seen = (SocketAddr, SocketAddr, bool);

#[derive(Default)]
struct State {
    seen: Mutex<Vec<Seen>>,
    /// Everything that ends with the proxy.
    open: Mutex<Vec<TcpStream>>,
    /// Close the client's connection before the client does.
    closes_first: bool,
}

pub(crate) struct Proxy {
    state: Arc<State>,
    listeners: Vec<OwnedFd>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Proxy {
    pub(crate) fn start(node: &Place) -> Self {
        Self::start_with(node, false)
    }

    pub(crate) fn start_with(node: &Place, closes_first: bool) -> Self {
        node.run(move || {
            let state = Arc::new(State { closes_first, ..State::default() });
            let mut proxy = Self { state, listeners: Vec::new(), threads: Vec::new() };
            for ipv6 in [false, true] {
                let loopback: IpAddr =
                    if ipv6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
                let address = SocketAddr::new(loopback, PROXY_PORT);
                let tcp = socket(libc::SOCK_STREAM, ipv6);
                // What it accepts has the servers' ports, at which others listen on the node.
                set(&tcp, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
                bind(&tcp, address).unwrap();
                // SAFETY: a socket of this thread.
                assert_eq!(unsafe { libc::listen(tcp.as_raw_fd(), 64) }, 0);
                let udp = socket(libc::SOCK_DGRAM, ipv6);
                let (level, name) = original_destination(ipv6);
                set(&udp, level, name, 1);
                bind(&udp, address).unwrap();
                let listener = TcpListener::from(tcp.try_clone().unwrap());
                let state = proxy.state.clone();
                proxy.threads.push(thread::spawn(move || state.accept(&listener)));
                let (queries, state) = (udp.try_clone().unwrap(), proxy.state.clone());
                proxy.threads.push(thread::spawn(move || state.datagrams(&queries)));
                proxy.listeners.extend([tcp, udp]);
            }
            proxy
        })
    }

    /// What passed since the last question.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut *self.state.seen.lock().unwrap())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        for listener in &self.listeners {
            // SAFETY: sockets of our own; both calls wake whoever waits for them.
            unsafe { libc::shutdown(listener.as_raw_fd(), libc::SHUT_RDWR) };
        }
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
        for stream in self.state.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl State {
    fn accept(self: Arc<Self>, listener: &TcpListener) {
        while let Ok((client, peer)) = listener.accept() {
            let state = self.clone();
            thread::spawn(move || state.connection(client, peer));
        }
    }

    fn connection(&self, client: TcpStream, peer: SocketAddr) {
        let destination = client.local_addr().unwrap();
        let upstream = socket(libc::SOCK_STREAM, peer.is_ipv6());
        set(&upstream, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
        let own_port = bind(&upstream, peer).is_ok();
        if !own_port {
            bind(&upstream, SocketAddr::new(peer.ip(), 0)).unwrap();
        }
        let connected = connect(&upstream, destination);
        self.seen.lock().unwrap().push((peer, destination, own_port));
        if connected.is_err() {
            return;
        }
        let server = TcpStream::from(upstream);
        for stream in [&client, &server] {
            self.open.lock().unwrap().push(stream.try_clone().unwrap());
        }
        let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        let upwards = thread::spawn(move || copy(&from, &to));
        if self.closes_first {
            let mut buffer = [0; 256];
            let length = (&server).read(&mut buffer).unwrap_or(0);
            let _ = (&client).write_all(&buffer[..length]);
            let _ = client.shutdown(Shutdown::Write);
        } else {
            copy(&server, &client);
        }
        let _ = upwards.join();
        self.open.lock().unwrap().clear();
    }

    fn datagrams(self: Arc<Self>, queries: &OwnedFd) {
        while let Some((question, client, destination)) = receive(queries.as_raw_fd()) {
            self.seen.lock().unwrap().push((client, destination, false));
            thread::spawn(move || {
                let upstream = socket(libc::SOCK_DGRAM, client.is_ipv6());
                bind(&upstream, SocketAddr::new(client.ip(), 0)).unwrap();
                let upstream = UdpSocket::from(upstream);
                upstream.set_read_timeout(Some(crate::WAIT)).unwrap();
                let mut answer = [0; 256];
                let answered = upstream
                    .connect(destination)
                    .and_then(|()| upstream.send(&question))
                    .and_then(|_| upstream.recv(&mut answer));
                let Ok(length) = answered else { return };
                let back = socket(libc::SOCK_DGRAM, client.is_ipv6());
                set(&back, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
                bind(&back, destination).unwrap();
                UdpSocket::from(back).send_to(&answer[..length], client).unwrap();
            });
        }
    }
}

fn copy(mut from: &TcpStream, mut to: &TcpStream) {
    let mut buffer = [0; 4096];
    while let Ok(length) = from.read(&mut buffer) {
        if length == 0 || to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// A socket of a proxy's for datagrams, which nobody reads yet.
pub(crate) fn datagrams(node: &Place, address: SocketAddr) -> UdpSocket {
    node.run(move || {
        let socket = socket(libc::SOCK_DGRAM, address.is_ipv6());
        bind(&socket, address).unwrap();
        UdpSocket::from(socket)
    })
}

/// A TCP socket that is nothing special.
pub(crate) fn plain_socket(ipv6: bool) -> OwnedFd {
    new_socket(libc::SOCK_STREAM, ipv6)
}

fn new_socket(kind: i32, ipv6: bool) -> OwnedFd {
    let family = if ipv6 { libc::AF_INET6 } else { libc::AF_INET };
    // SAFETY: makes a descriptor that nobody else has.
    unsafe {
        let fd = libc::socket(family, kind | libc::SOCK_CLOEXEC, 0);
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd)
    }
}

/// A transparent socket with the proxy's mark.
fn socket(kind: i32, ipv6: bool) -> OwnedFd {
    let socket = new_socket(kind, ipv6);
    let (level, name) = if ipv6 {
        (libc::SOL_IPV6, libc::IPV6_TRANSPARENT)
    } else {
        (libc::SOL_IP, libc::IP_TRANSPARENT)
    };
    set(&socket, level, name, 1);
    set(&socket, libc::SOL_SOCKET, libc::SO_MARK, FROM_PROXY as i32);
    socket
}

fn original_destination(ipv6: bool) -> (i32, i32) {
    if ipv6 {
        (libc::SOL_IPV6, libc::IPV6_RECVORIGDSTADDR)
    } else {
        (libc::SOL_IP, libc::IP_RECVORIGDSTADDR)
    }
}

pub(crate) fn set(socket: &impl AsRawFd, level: i32, name: i32, value: i32) {
    let pointer = (&raw const value).cast();
    // SAFETY: an integer and its size.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, pointer, 4) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

fn with_raw(
    address: SocketAddr,
    call: impl FnOnce(*const libc::sockaddr, u32) -> i32,
) -> io::Result<()> {
    let done = match address {
        SocketAddr::V4(address) => {
            // SAFETY: plain integers.
            let mut raw: libc::sockaddr_in = unsafe { zeroed() };
            raw.sin_family = libc::AF_INET as u16;
            raw.sin_port = address.port().to_be();
            raw.sin_addr.s_addr = u32::from_ne_bytes(address.ip().octets());
            call((&raw const raw).cast(), size_of::<libc::sockaddr_in>() as u32)
        }
        SocketAddr::V6(address) => {
            // SAFETY: plain integers.
            let mut raw: libc::sockaddr_in6 = unsafe { zeroed() };
            raw.sin6_family = libc::AF_INET6 as u16;
            raw.sin6_port = address.port().to_be();
            raw.sin6_addr.s6_addr = address.ip().octets();
            call((&raw const raw).cast(), size_of::<libc::sockaddr_in6>() as u32)
        }
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

pub(crate) fn bind(socket: &impl AsRawFd, address: SocketAddr) -> io::Result<()> {
    // SAFETY: an address and its size.
    with_raw(address, |raw, size| unsafe { libc::bind(socket.as_raw_fd(), raw, size) })
}

pub(crate) fn connect(socket: &impl AsRawFd, address: SocketAddr) -> io::Result<()> {
    // SAFETY: an address and its size.
    with_raw(address, |raw, size| unsafe { libc::connect(socket.as_raw_fd(), raw, size) })
}

/// A datagram, its sender and its original destination; nothing once the socket is shut down.
fn receive(socket: RawFd) -> Option<(Vec<u8>, SocketAddr, SocketAddr)> {
    let mut bytes = vec![0; 512];
    let mut control = [0_u64; 16];
    // SAFETY: plain integers and pointers; everything pointed at outlives the call.
    unsafe {
        let mut from: libc::sockaddr_in6 = zeroed();
        let mut vector = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        let mut message: libc::msghdr = zeroed();
        message.msg_name = (&raw mut from).cast();
        message.msg_namelen = size_of::<libc::sockaddr_in6>() as u32;
        message.msg_iov = &raw mut vector;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        let length = libc::recvmsg(socket, &raw mut message, 0);
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        if length <= 0 || header.is_null() {
            return None;
        }
        bytes.truncate(length as usize);
        let destination = libc::CMSG_DATA(header).cast::<libc::sockaddr_in6>().read_unaligned();
        Some((bytes, address(&from), address(&destination)))
    }
}

fn address(raw: &libc::sockaddr_in6) -> SocketAddr {
    let port = u16::from_be(raw.sin6_port);
    if i32::from(raw.sin6_family) == libc::AF_INET6 {
        return SocketAddr::new(raw.sin6_addr.s6_addr.into(), port);
    }
    // `sockaddr_in` has its address where the other has the flow label.
    SocketAddr::new(raw.sin6_flowinfo.to_ne_bytes().into(), port)
}
