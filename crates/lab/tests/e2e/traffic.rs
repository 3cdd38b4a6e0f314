//! Traffic of the tests: servers that echo, conversations that note every pause, floods, a listener
//! that counts what really arrives, and a siege of all of it.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use socket2::{Domain, Protocol, Socket, Type};

use super::harness::{Lab, Pod, eventually};

/// Port of the echo servers, TCP and UDP.
pub(crate) const PORT: u16 = 80;
/// No answer within this is no answer.
const ANSWER: Duration = Duration::from_secs(1);

/// Serves [`PORT`] as [`serve_echo_on`] does.
pub(crate) fn serve_echo(pod: &Pod) {
    serve_echo_on(pod, PORT);
}

/// Serves TCP and UDP on both families in `pod`, until the test ends.
pub(crate) fn serve_echo_on(pod: &Pod, port: u16) {
    serve_echo_at(pod, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)));
}

/// Serves TCP and UDP at one address of `pod`, until the test ends.
pub(crate) fn serve_echo_at(pod: &Pod, at: SocketAddr) {
    let (tcp, udp) = pod.run(move || Ok((TcpListener::bind(at)?, UdpSocket::bind(at)?)));
    thread::spawn(move || {
        for stream in tcp.incoming().map_while(Result::ok) {
            thread::spawn(move || echo(stream));
        }
    });
    thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((length, from)) = udp.recv_from(&mut buffer) {
            // A peer that policy cut off gets no answer; that is the point.
            let _ = udp.send_to(&buffer[..length], from);
        }
    });
}

fn echo(mut stream: TcpStream) {
    let mut buffer = [0; 64];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

/// One flow that stays open.
pub(crate) enum Flow {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

impl Flow {
    /// A connection from `pod`.
    pub(crate) fn tcp(pod: &Pod, to: IpAddr) -> io::Result<Self> {
        Self::tcp_at(pod, SocketAddr::new(to, PORT))
    }

    /// A connection from `pod` to any port.
    pub(crate) fn tcp_at(pod: &Pod, to: SocketAddr) -> io::Result<Self> {
        let connect = move || {
            let stream = TcpStream::connect_timeout(&to, ANSWER)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(ANSWER))?;
            Ok(Self::Tcp(stream))
        };
        pod.spawn(connect).join().unwrap()
    }

    /// A connected socket in `pod`.
    pub(crate) fn udp(pod: &Pod, to: IpAddr) -> io::Result<Self> {
        let connect = move || {
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any)?;
            socket.connect(SocketAddr::new(to, PORT))?;
            socket.set_read_timeout(Some(ANSWER))?;
            Ok(Self::Udp(socket))
        };
        pod.spawn(connect).join().unwrap()
    }

    /// Says something and waits for the echo; how long that took.
    pub(crate) fn ask(&mut self, word: u64) -> io::Result<Duration> {
        let begun = Instant::now();
        let mut answer = [0; 8];
        match self {
            Self::Tcp(stream) => {
                stream.write_all(&word.to_be_bytes())?;
                stream.read_exact(&mut answer)?;
            }
            Self::Udp(socket) => {
                socket.send(&word.to_be_bytes())?;
                socket.recv(&mut answer)?;
            }
        }
        if answer == word.to_be_bytes() {
            return Ok(begun.elapsed());
        }
        Err(io::Error::other("not what was said"))
    }
}

/// Flows that talk all the time, on a thread each.
pub(crate) struct Conversations {
    over: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<io::Result<(u64, Duration)>>>,
}

impl Conversations {
    pub(crate) fn start(flows: Vec<Flow>) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let threads = flows
            .into_iter()
            .map(|mut flow| {
                let over = over.clone();
                thread::spawn(move || {
                    let (mut words, mut slowest) = (0, Duration::ZERO);
                    while !over.load(Relaxed) {
                        slowest = slowest.max(flow.ask(words)?);
                        words += 1;
                        thread::sleep(Duration::from_millis(20));
                    }
                    Ok((words, slowest))
                })
            })
            .collect();
        Self { over, threads }
    }

    /// Ends them: how many were interrupted, how many words were said, and the longest wait for
    /// an answer.
    pub(crate) fn end(self) -> (usize, u64, Duration) {
        self.over.store(true, Relaxed);
        let results: Vec<_> =
            self.threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        let interrupted = results.iter().filter(|result| result.is_err()).count();
        let good = results.iter().flatten();
        let words = good.clone().map(|(words, _)| words).sum();
        (interrupted, words, good.map(|(_, slowest)| *slowest).max().unwrap_or_default())
    }
}

/// Opens TCP connections and sends datagrams to all `targets`, without waiting for anything,
/// about a thousand rounds a second.
pub(crate) struct Flood {
    over: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<io::Result<u64>>>,
}

impl Flood {
    pub(crate) fn start(sources: &[&Pod], targets: [IpAddr; 2]) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let threads = sources
            .iter()
            .map(|pod| {
                let over = over.clone();
                pod.spawn(move || flood(&targets, &over))
            })
            .collect();
        Self { over, threads }
    }

    /// Ends it; how much was sent.
    pub(crate) fn end(self) -> u64 {
        self.over.store(true, Relaxed);
        self.threads.into_iter().map(|thread| thread.join().unwrap().unwrap()).sum()
    }
}

fn flood(targets: &[IpAddr], over: &AtomicBool) -> io::Result<u64> {
    let datagrams = [UdpSocket::bind("0.0.0.0:0")?, UdpSocket::bind("[::]:0")?];
    let mut sent = 0;
    while !over.load(Relaxed) {
        for target in targets {
            let to = SocketAddr::new(*target, PORT);
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
            socket.set_nonblocking(true)?;
            // In progress is all that it can say.
            let _ = socket.connect(&to.into());
            let _ = datagrams[usize::from(target.is_ipv6())].send_to(b"x", to);
            sent += 2;
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(sent)
}

/// Counts the packets that arrive at a pod from some addresses, whatever becomes of them there.
pub(crate) struct Counter {
    count: Arc<AtomicU64>,
}

/// `ETH_P_ALL` in network order, see packet(7).
const EVERYTHING: i32 = 0x0003_u16.to_be() as i32;
/// Source addresses behind an Ethernet header.
const SOURCE4: std::ops::Range<usize> = 26..30;
const SOURCE6: std::ops::Range<usize> = 22..38;

impl Counter {
    pub(crate) fn start(pod: &Pod, sources: &[&Pod]) -> Self {
        let socket =
            pod.run(|| Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(EVERYTHING))));
        // So that a burst is not lost on the way to the counter.
        socket.set_recv_buffer_size(8 << 20).unwrap();
        let sources: Vec<IpAddr> = sources.iter().flat_map(|pod| pod.addresses).collect();
        let count = Arc::new(AtomicU64::new(0));
        let counted = count.clone();
        thread::spawn(move || {
            let mut buffer = [0; 128];
            while let Ok(length) = (&socket).read(&mut buffer) {
                let from = source(&buffer[..length]);
                counted.fetch_add(from.map_or(0, |from| sources.contains(&from).into()), Relaxed);
            }
        });
        Self { count }
    }

    pub(crate) fn count(&self) -> u64 {
        self.count.load(Relaxed)
    }
}

fn source(packet: &[u8]) -> Option<IpAddr> {
    match packet.get(12..14)? {
        [0x08, 0x00] => Some(<[u8; 4]>::try_from(packet.get(SOURCE4)?).ok()?.into()),
        [0x86, 0xdd] => Some(<[u8; 16]>::try_from(packet.get(SOURCE6)?).ok()?.into()),
        _ => None,
    }
}

/// Who may talk to `target`.
pub(crate) const FRIENDS_ONLY: &str = r"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends-only}
spec:
  podSelector: {matchLabels: {app: target}}
  ingress: [{from: [{podSelector: {matchExpressions: [{key: app, operator: In, values: [friend, friend-far]}]}}]}]
";
const CLOSED: &str = r"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed}
spec: {podSelector: {matchLabels: {app: bystander}}, policyTypes: [Ingress]}
";

/// Friends talk to a pod and foes flood it, from its own node and from another one, while something
/// happens to the agents: nothing may let the foes through or interrupt the friends.
pub(crate) struct Siege {
    target: Pod,
    bystander: Pod,
    friends: [Pod; 2],
    foes: [Pod; 2],
    arrived: Counter,
    before: u64,
    conversations: Conversations,
    flood: Flood,
}

impl Siege {
    const CONNECTIONS: usize = 100;
    /// Of so many connections one is UDP.
    const UDP: usize = 5;

    /// Begins it, in a lab of two nodes without pods.
    pub(crate) fn begin(lab: &Lab) -> Self {
        let [target, bystander, friend, friend_far, foe, foe_far] = lab.pods([
            ("target", 1),
            ("bystander", 1),
            ("friend", 1),
            ("friend-far", 2),
            ("foe", 1),
            ("foe-far", 2),
        ]);
        serve_echo(&target);
        serve_echo(&bystander);
        let (friends, foes) = ([friend, friend_far], [foe, foe_far]);
        let flood = || Flood::start(&foes.each_ref(), target.addresses);

        // The opposite first: the foes' packets arrive, and are seen.
        let arrived = Counter::start(&target, &foes.each_ref());
        let early = flood();
        eventually("packets arrive without a policy", || arrived.count() > 100);
        early.end();
        lab.apply(FRIENDS_ONLY);
        lab.await_policies(1);

        let flows = (0..Self::CONNECTIONS).map(|number| {
            let (from, to) = (&friends[number % 2], target.addresses[number / 2 % 2]);
            let open = if number % Self::UDP == 0 { Flow::udp } else { Flow::tcp };
            open(from, to).unwrap()
        });
        let conversations = Conversations::start(flows.collect());
        let (before, flood) = (arrived.count(), flood());
        Self { target, bystander, friends, foes, arrived, before, conversations, flood }
    }

    /// Changes what is allowed: nobody reaches the bystander any more. [`Siege::end`] relies on it.
    pub(crate) fn close_bystander(lab: &Lab) {
        lab.apply(CLOSED);
    }

    /// Ends it: nothing that was denied arrived, and what was open is open still. Fewer than `least`
    /// packets of foes would prove nothing.
    pub(crate) fn end(self, least: u64) {
        let sent = self.flood.end();
        let (interrupted, words, slowest) = self.conversations.end();
        let arrived = self.arrived.count() - self.before;
        println!(
            "{sent} packets of foes sent, {arrived} arrived; {} connections, {interrupted} \
             interrupted, {words} words, slowest {slowest:?}",
            Self::CONNECTIONS
        );
        assert_eq!(arrived, 0, "packets that policy denies arrived");
        assert!(sent > least, "only {sent} packets were sent");
        assert_eq!(interrupted, 0);
        assert!(slowest < Duration::from_secs(1), "{slowest:?}");
        for to in self.target.addresses {
            assert!(self.friends.iter().all(|friend| Flow::tcp(friend, to).is_ok()), "{to}");
            assert!(self.foes.iter().all(|foe| Flow::tcp(foe, to).is_err()), "{to}");
        }
        for to in self.bystander.addresses {
            assert!(Flow::tcp(&self.friends[0], to).is_err(), "{to}: a later policy");
        }
    }
}
