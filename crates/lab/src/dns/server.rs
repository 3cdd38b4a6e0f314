//! Serving the zone over UDP and TCP, and keeping it current.

use std::net::{Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use anyhow::Context;
use futures::StreamExt;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Config};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Notify, Semaphore};

use super::Arguments;
use super::wire::{Answer, Incoming, Query, number, read_query};
use super::zone::Zone;

/// A TCP client that says nothing for so long is sent away.
const IDLE: Duration = Duration::from_secs(10);
/// TCP clients at a time.
const MAX_STREAMS: usize = 256;
/// A resolver outside that says nothing for so long is given up.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(2);
/// Questions that wait for a resolver outside.
const MAX_FORWARDED: usize = 256;

struct Server {
    zone: RwLock<Arc<Zone>>,
    complete: AtomicBool,
    forward: Vec<SocketAddr>,
    forwarded: Semaphore,
}

pub(super) async fn serve(arguments: Arguments) -> anyhow::Result<()> {
    let server = Arc::new(Server {
        zone: RwLock::default(),
        complete: AtomicBool::new(false),
        forward: arguments.forward,
        forwarded: Semaphore::new(MAX_FORWARDED),
    });
    let udp = bind(Type::DGRAM, Protocol::UDP, arguments.port)?;
    let udp = Arc::new(UdpSocket::from_std(udp.into())?);
    let tcp = bind(Type::STREAM, Protocol::TCP, arguments.port)?;
    tcp.listen(128)?;
    let tcp = TcpListener::from_std(tcp.into())?;
    let ready = TcpListener::bind((Ipv6Addr::UNSPECIFIED, arguments.ready_port))
        .await
        .context("cannot serve the readiness probe")?;
    let client = client(&arguments.kubeconfig).await?;
    tokio::try_join!(
        watch(Arc::clone(&server), client),
        serve_udp(Arc::clone(&server), udp),
        serve_tcp(Arc::clone(&server), tcp),
        serve_ready(Arc::clone(&server), ready),
    )?;
    Ok(())
}

fn bind(kind: Type, protocol: Protocol, port: u16) -> anyhow::Result<Socket> {
    let socket = Socket::new(Domain::IPV6, kind, Some(protocol))?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    socket.bind(&address.into()).with_context(|| format!("cannot listen on port {port}"))?;
    Ok(socket)
}

async fn client(kubeconfig: &Path) -> anyhow::Result<Client> {
    let kubeconfig = kube::config::Kubeconfig::read_from(kubeconfig)
        .with_context(|| format!("cannot read {}", kubeconfig.display()))?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &Default::default()).await?;
    Ok(Client::try_from(config)?)
}

/// Follows the objects and rebuilds the zone when they change.
async fn watch(server: Arc<Server>, client: Client) -> anyhow::Result<()> {
    let changed = Arc::new(Notify::new());
    let services = follow::<Service>(&client, &changed);
    let slices = follow::<EndpointSlice>(&client, &changed);
    services.wait_until_ready().await?;
    slices.wait_until_ready().await?;
    let mut serial = 0;
    loop {
        serial += 1;
        let (services, slices) = (services.state(), slices.state());
        let zone = Zone::build(services.iter().map(|s| &**s), slices.iter().map(|s| &**s), serial);
        if let Ok(mut current) = server.zone.write() {
            *current = Arc::new(zone);
        }
        if !server.complete.swap(true, Ordering::Relaxed) {
            tracing::info!(services = services.len(), "serving");
        }
        changed.notified().await;
    }
}

fn follow<K>(client: &Client, changed: &Arc<Notify>) -> Store<K>
where
    K: kube::Resource<DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + Send
        + Sync
        + serde::de::DeserializeOwned
        + 'static,
{
    let (store, writer) = reflector::store();
    let stream = watcher(Api::<K>::all(client.clone()), watcher::Config::default())
        .default_backoff()
        .reflect(writer);
    let changed = Arc::clone(changed);
    tokio::spawn(stream.for_each(move |event| {
        match event {
            Ok(_) => changed.notify_one(),
            Err(error) => tracing::warn!("watching {}: {error}", K::kind(&())),
        }
        std::future::ready(())
    }));
    store
}

async fn serve_udp(server: Arc<Server>, socket: Arc<UdpSocket>) -> anyhow::Result<()> {
    let mut buffer = vec![0; 4096];
    loop {
        // An ICMP error of an earlier answer shows up here; it concerns nobody else.
        let Ok((length, peer)) = socket.recv_from(&mut buffer).await else { continue };
        match read_query(&buffer[..length]) {
            Incoming::Ignore => {}
            Incoming::Reject(message) => {
                let _ = socket.send_to(&message, peer).await;
            }
            Incoming::Query(query) => {
                let answer = server.answer(&query);
                if answer.code != number::REFUSED || server.forward.is_empty() {
                    let _ = socket.send_to(&query.datagram(&answer), peer).await;
                    continue;
                }
                let (server, socket) = (Arc::clone(&server), Arc::clone(&socket));
                let message = buffer[..length].to_vec();
                tokio::spawn(async move {
                    let failed = || query.datagram(&Answer::code(number::SERVER_FAILURE));
                    let answer = server.ask_outside(&message).await.unwrap_or_else(failed);
                    let _ = socket.send_to(&answer, peer).await;
                });
            }
        }
    }
}

async fn serve_tcp(server: Arc<Server>, listener: TcpListener) -> anyhow::Result<()> {
    let slots = Arc::new(Semaphore::new(MAX_STREAMS));
    loop {
        let slot = Arc::clone(&slots).acquire_owned().await?;
        let Ok((stream, _)) = listener.accept().await else { continue };
        let server = Arc::clone(&server);
        tokio::spawn(async move {
            // Errors here are clients that went away.
            let _ = conversation(&server, stream).await;
            drop(slot);
        });
    }
}

async fn conversation(server: &Server, mut stream: TcpStream) -> std::io::Result<()> {
    loop {
        let length = tokio::time::timeout(IDLE, stream.read_u16()).await??;
        let mut message = vec![0; usize::from(length)];
        tokio::time::timeout(IDLE, stream.read_exact(&mut message)).await??;
        let answer = match read_query(&message) {
            Incoming::Ignore => return Ok(()),
            Incoming::Reject(message) => message,
            Incoming::Query(query) => {
                let mut answer = server.answer(&query);
                if answer.code == number::REFUSED && !server.forward.is_empty() {
                    answer = Answer::code(number::SERVER_FAILURE);
                }
                query.stream(&answer)
            }
        };
        let length = u16::try_from(answer.len()).map_err(std::io::Error::other)?;
        stream.write_all(&[&length.to_be_bytes(), answer.as_slice()].concat()).await?;
    }
}

/// Any connection is the probe; it is accepted only once the zone is complete.
async fn serve_ready(server: Arc<Server>, listener: TcpListener) -> anyhow::Result<()> {
    loop {
        let Ok((mut stream, _)) = listener.accept().await else { continue };
        let status =
            if server.complete.load(Ordering::Relaxed) { "200 OK" } else { "503 Not Ready" };
        let _ = stream.read(&mut [0; 1024]).await;
        let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        let _ = stream.write_all(answer.as_bytes()).await;
    }
}

impl Server {
    fn answer(&self, query: &Query) -> Answer {
        if !self.complete.load(Ordering::Relaxed) {
            return Answer::code(number::SERVER_FAILURE);
        }
        let zone = self.zone.read().map(|zone| Arc::clone(&zone)).unwrap_or_default();
        zone.answer(query)
    }

    /// Passes a question on, unchanged; the first resolver that answers wins.
    async fn ask_outside(&self, message: &[u8]) -> Option<Vec<u8>> {
        let _slot = self.forwarded.try_acquire().ok()?;
        for resolver in &self.forward {
            let asked = tokio::time::timeout(FORWARD_TIMEOUT, ask_one(*resolver, message)).await;
            if let Ok(Ok(answer)) = asked {
                return Some(answer);
            }
        }
        None
    }
}

async fn ask_one(resolver: SocketAddr, message: &[u8]) -> std::io::Result<Vec<u8>> {
    let local: SocketAddr = if resolver.is_ipv4() {
        (std::net::Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let socket = UdpSocket::bind(local).await?;
    socket.connect(resolver).await?;
    socket.send(message).await?;
    let mut buffer = vec![0; 4096];
    loop {
        let length = socket.recv(&mut buffer).await?;
        // Answers to something else are not ours.
        if length >= 2 && buffer[..2] == message[..2] {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}
