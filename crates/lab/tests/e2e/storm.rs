//! Requests that every version of a policy denies, over HTTP/1.1 and HTTP/2 and both families, over
//! new connections and old ones, while the versions follow one another and the proxy and the agent
//! are killed: none arrives. What some version allows does arrive meanwhile, so the counter counts.

use std::{
    io,
    net::{Ipv6Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use kube::{
    Api, Config,
    api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams},
    config::Kubeconfig,
};
use palisade_lab::nodes::Program;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};

use super::{
    harness::{Lab, Pod, eventually},
    http::answer,
    l7::{CLOSED, INGRESS, OTHER, PORT, ask},
};

/// The policy changes so often.
const CHANGE: Duration = Duration::from_millis(50);
/// One change in so many brings a death with it: often, and with time in between for requests.
const KILL: u64 = 60;
/// After so many changes it is told how far it is.
const TELL: u64 = 1000;
/// An answer that takes longer is none.
const PATIENCE: Duration = Duration::from_secs(1);
/// Requests over one connection.
const PER_CONNECTION: usize = 100;
/// No version allows it.
const DENIED: &str = "/secret";
/// One version each allows these.
const ALLOWED: [&str; 2] = ["/public", "/other"];

struct Scale {
    /// Refusals that have to be heard.
    refusals: u64,
    /// Connections that have to be made.
    connections: u64,
    /// Clients at a time, of each pod, family and version of HTTP.
    clients: usize,
    within: Duration,
}

#[test]
fn nothing_denied_arrives_while_everything_changes() {
    storm(&Scale {
        refusals: 10_000,
        connections: 200,
        clients: 4,
        within: Duration::from_secs(120),
    });
}

/// `cargo test -p palisade-lab --test e2e -- --ignored --nocapture a_million_denied_requests`
#[test]
#[ignore = "takes many minutes"]
fn a_million_denied_requests() {
    storm(&Scale {
        refusals: 1_000_000,
        connections: 10_000,
        clients: 32,
        within: Duration::from_secs(3600),
    });
}

#[derive(Debug, Default)]
struct Counts {
    over: AtomicBool,
    connections: AtomicU64,
    asked: AtomicU64,
    refused: AtomicU64,
    /// Neither refused nor cut off.
    odd: Mutex<Vec<u16>>,
    allowed: AtomicU64,
}

#[derive(Debug, Default)]
struct Arrived {
    allowed: AtomicU64,
    others: Mutex<Vec<String>>,
}

#[derive(Clone, Copy, Debug)]
enum Version {
    One,
    Two,
}

fn storm(scale: &Scale) {
    let lab = Lab::up(1);
    let [server, near, far] = lab.pods([("server", 1), ("near", 1), ("far", 1)]);
    let arrived = origin(&server);
    lab.apply_cilium_policy("default", "l7", INGRESS);
    let counts = Arc::new(Counts::default());
    let clients = [&near, &far].map(|pod| {
        let (to, counts, clients) = (server.addresses, counts.clone(), scale.clients);
        pod.spawn(move || {
            runtime()?.block_on(press(to.map(|to| SocketAddr::new(to, PORT)), counts, clients));
            Ok(())
        })
    });
    let begun = Instant::now();
    let (changes, kills) = runtime().unwrap().block_on(change(&lab, &counts, scale));
    counts.over.store(true, Relaxed);
    for client in clients {
        client.join().unwrap().unwrap();
    }
    println!(
        "{} denied requests over {} connections, {} refused by an answer, in {:?}; {changes} \
         changes of policy, the proxy killed {} times, the agent {} times; allowed: {} answered, \
         {} arrived; others that arrived: {}",
        counts.asked.load(Relaxed),
        counts.connections.load(Relaxed),
        counts.refused.load(Relaxed),
        begun.elapsed(),
        kills[0],
        kills[1],
        counts.allowed.load(Relaxed),
        arrived.allowed.load(Relaxed),
        arrived.others.lock().unwrap().len(),
    );
    assert_eq!(*arrived.others.lock().unwrap(), [""; 0], "what every policy denies arrived");
    assert_eq!(*counts.odd.lock().unwrap(), [0; 0], "answers to what every policy denies");
    assert!(arrived.allowed.load(Relaxed) > 0, "what is allowed arrives meanwhile");
    lab.apply_cilium_policy("default", "l7", INGRESS);
    eventually("what is allowed still passes", || {
        server.addresses.iter().all(|to| ask(&near, *to, "GET", "/public") == Some(200))
    });
}

fn runtime() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// One version after the other, and a death now and then, until enough was refused.
async fn change(lab: &Lab, counts: &Counts, scale: &Scale) -> (u64, [u64; 2]) {
    let kubeconfig = Kubeconfig::read_from(lab.kubeconfig()).unwrap();
    let config = Config::from_custom_kubeconfig(kubeconfig, &Default::default()).await.unwrap();
    let kind = GroupVersionKind::gvk("cilium.io", "v2", "CiliumNetworkPolicy");
    let client = kube::Client::try_from(config).unwrap();
    let api: Api<DynamicObject> =
        Api::namespaced_with(client, "default", &ApiResource::from_gvk(&kind));
    let specs = [OTHER, CLOSED, INGRESS].map(|text| serde_saphyr::from_str::<Value>(text).unwrap());
    let begun = Instant::now();
    let mut tick = interval(CHANGE);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut changes, mut kills, mut random) = (0, [0; 2], 0x9e37_79b9_7f4a_7c15_u64);
    for spec in specs.iter().cycle() {
        if counts.refused.load(Relaxed) >= scale.refusals
            && counts.connections.load(Relaxed) >= scale.connections
            && kills.into_iter().all(|kills| kills > 0)
        {
            break;
        }
        assert!(begun.elapsed() < scale.within, "too few requests: {counts:?}");
        tick.tick().await;
        let spec = Patch::Merge(json!({ "spec": spec["spec"] }));
        api.patch("l7", &PatchParams::default(), &spec).await.unwrap();
        changes += 1;
        if changes % TELL == 0 {
            println!("{changes} changes, killed {kills:?}: {counts:?}");
        }
        // Xorshift: deaths at moments that follow no pattern, the same in each run.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        if random % KILL == 0 {
            let next = usize::from(kills[0] > kills[1]);
            kills[next] += u64::from(lab.try_kill(1, [Program::Proxy, Program::Agent][next]));
        }
    }
    (changes, kills)
}

/// The clients of a pod.
async fn press(to: [SocketAddr; 2], counts: Arc<Counts>, clients: usize) {
    let mut tasks = JoinSet::new();
    for to in to {
        for version in [Version::One, Version::Two] {
            for _ in 0..clients {
                let counts = counts.clone();
                tasks.spawn(async move {
                    while !counts.over.load(Relaxed) {
                        let Some(mut client) = Client::connect(to, version).await else { continue };
                        counts.connections.fetch_add(1, Relaxed);
                        client.insist(&counts).await;
                    }
                });
            }
            let counts = counts.clone();
            tasks.spawn(async move {
                while !counts.over.load(Relaxed) {
                    let Some(mut client) = Client::connect(to, version).await else { continue };
                    for target in ALLOWED.into_iter().cycle().take(PER_CONNECTION) {
                        match client.ask(target).await {
                            Some(200) => _ = counts.allowed.fetch_add(1, Relaxed),
                            Some(_) => {}
                            None => break,
                        }
                    }
                }
            });
        }
    }
    tasks.join_all().await;
}

enum Client {
    One(TcpStream),
    Two(h2::client::SendRequest<Bytes>),
}

impl Client {
    async fn connect(to: SocketAddr, version: Version) -> Option<Self> {
        let stream = timeout(PATIENCE, TcpStream::connect(to)).await.ok()?.ok()?;
        stream.set_nodelay(true).ok()?;
        match version {
            Version::One => Some(Self::One(stream)),
            Version::Two => {
                let (send, connection) = h2::client::handshake(stream).await.ok()?;
                // It ends with the last sender.
                tokio::spawn(connection);
                Some(Self::Two(send))
            }
        }
    }

    async fn insist(&mut self, counts: &Counts) {
        for _ in 0..PER_CONNECTION {
            counts.asked.fetch_add(1, Relaxed);
            match self.ask(DENIED).await {
                Some(403) => _ = counts.refused.fetch_add(1, Relaxed),
                Some(status) => counts.odd.lock().unwrap().push(status),
                // Cut off, which is as good as denied.
                None => return,
            }
        }
    }

    /// The status of the answer, if there is one in time.
    async fn ask(&mut self, target: &str) -> Option<u16> {
        let asked = async {
            match self {
                Self::One(stream) => {
                    let request = format!("GET {target} HTTP/1.1\r\nhost: origin\r\n\r\n");
                    stream.write_all(request.as_bytes()).await.ok()?;
                    let mut received = Vec::new();
                    loop {
                        if stream.read_buf(&mut received).await.ok()? == 0 {
                            return None;
                        }
                        if let Some((status, _)) = answer(&received) {
                            return Some(status);
                        }
                    }
                }
                Self::Two(send) => {
                    let request = http::Request::get(format!("http://origin{target}"));
                    let mut ready = send.clone().ready().await.ok()?;
                    let (response, _) = ready.send_request(request.body(()).ok()?, true).ok()?;
                    Some(response.await.ok()?.status().as_u16())
                }
            }
        };
        timeout(PATIENCE, asked).await.ok()?
    }
}

/// A server of both versions in a pod, which remembers what arrives.
fn origin(pod: &Pod) -> Arc<Arrived> {
    let at = SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT));
    let listener = pod.run(move || {
        let listener = std::net::TcpListener::bind(at)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    let arrived = Arc::new(Arrived::default());
    let served = arrived.clone();
    thread::spawn(move || {
        runtime().unwrap().block_on(async {
            let listener = TcpListener::from_std(listener).unwrap();
            loop {
                // A client that goes away is no concern of the origin.
                let Ok((stream, _)) = listener.accept().await else { continue };
                tokio::spawn(serve(stream, served.clone()));
            }
        });
    });
    arrived
}

impl Arrived {
    fn note(&self, target: &str) {
        match ALLOWED.contains(&target) {
            true => _ = self.allowed.fetch_add(1, Relaxed),
            false => self.others.lock().unwrap().push(target.to_owned()),
        }
    }
}

async fn serve(mut stream: TcpStream, arrived: Arc<Arrived>) -> io::Result<()> {
    let mut first = [0; 3];
    // What a request begins with comes in one piece.
    stream.peek(&mut first).await?;
    if first == *b"PRI" {
        return serve_two(stream, &arrived).await.map_err(io::Error::other);
    }
    let mut received = Vec::new();
    loop {
        while let Some(end) = received.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            let head: Vec<u8> = received.drain(..end + 4).collect();
            let head = String::from_utf8_lossy(&head);
            arrived.note(head.split(' ').nth(1).unwrap_or_default());
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nhello\n").await?;
        }
        if stream.read_buf(&mut received).await? == 0 {
            return Ok(());
        }
    }
}

async fn serve_two(stream: TcpStream, arrived: &Arrived) -> Result<(), h2::Error> {
    let mut connection = h2::server::handshake(stream).await?;
    while let Some(accepted) = connection.accept().await {
        let (request, mut respond) = accepted?;
        arrived.note(request.uri().path());
        respond.send_response(http::Response::new(()), true)?;
    }
    Ok(())
}
