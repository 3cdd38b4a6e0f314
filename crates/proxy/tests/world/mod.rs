//! A client, the proxy and an origin, each in a network namespace of its own. The proxy is the real
//! binary; the kernel's own TPROXY hands it the connections, and its `limit` no more datagrams than
//! a pod may send, which is what the data path does in production; the test plays the agent.
#![allow(dead_code, reason = "no test uses all of it")]

pub(crate) mod agent;
pub(crate) mod frames;
pub(crate) mod origin;

use std::{
    fs,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use agent::Agent;

pub(crate) const CLIENT4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 1, 2));
pub(crate) const CLIENT6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd77, 1, 0, 0, 0, 0, 0, 2));
pub(crate) const SERVER4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 2, 2));
pub(crate) const SERVER6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd77, 2, 0, 0, 0, 0, 0, 2));
/// An origin listens here.
pub(crate) const PORT: u16 = 80;

/// A thread that lives in a network namespace and does what it is told there.
pub(crate) struct Namespace {
    jobs: mpsc::Sender<Box<dyn FnOnce() + Send>>,
    thread: u32,
}

impl Namespace {
    pub(crate) fn new() -> Self {
        let (jobs, queue) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            unshare_network();
            tell.send(rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned()).unwrap();
            for job in queue {
                job();
            }
        });
        let thread = told.recv().unwrap();
        let namespace = Self { jobs, thread };
        namespace.ip("link set lo up");
        namespace
    }

    /// Runs something in the namespace; threads and processes that it starts live there too.
    pub(crate) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (tell, told) = mpsc::channel();
        self.jobs.send(Box::new(move || tell.send(job()).unwrap())).unwrap();
        told.recv().expect("the job did not panic")
    }

    pub(crate) fn ip(&self, arguments: &str) -> String {
        let arguments: Vec<String> = arguments.split(' ').map(Into::into).collect();
        self.run(move || command("ip", &arguments))
    }

    pub(crate) fn nft(&self, rules: &'static str) {
        self.run(move || assert!(Command::new("nft").arg(rules).status().unwrap().success()));
    }

    /// The end of a pair that is up before the other drops what it is to send until the kernel has
    /// come to it (`dev_activate` by linkwatch).
    fn await_link(&self, name: &str) {
        let begun = Instant::now();
        while !self.ip(&format!("link show {name}")).contains("state UP") {
            assert!(begun.elapsed() < WAIT, "{name} stays down");
        }
    }
}

fn command(program: &str, arguments: &[String]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

const NFT: &str = "table inet proxy {
  chain in {
    type filter hook prerouting priority mangle;
    iifname c0 meta l4proto udp meter questions { ip saddr limit rate over 10000/second burst 1000 packets } drop
    iifname c0 meta nfproto ipv4 meta l4proto { tcp, udp } tproxy ip to 127.0.0.1:14240 meta mark set 0x200 accept
    iifname c0 meta nfproto ipv6 meta l4proto { tcp, udp } tproxy ip6 to [::1]:14240 meta mark set 0x200 accept
    iifname s0 meta l4proto { tcp, udp } meta mark set 0x200
    iifname s0 icmp type destination-unreachable meta mark set 0x200
    iifname s0 icmpv6 type destination-unreachable meta mark set 0x200
  }
}";

/// A server under this takes no connection, and refuses none.
pub(crate) const HOLD: &str = "add table inet hold; \
     add chain inet hold in { type filter hook input priority 0; }; \
     add rule inet hold in tcp flags & (syn|ack) == syn drop";
pub(crate) const RELEASE: &str = "delete table inet hold";

pub(crate) struct World {
    pub(crate) client: Namespace,
    pub(crate) node: Namespace,
    pub(crate) server: Namespace,
    pub(crate) directory: PathBuf,
    pub(crate) agent: Agent,
    pub(crate) proxy: Proxy,
}

/// The process; killed when it is dropped.
pub(crate) struct Proxy(pub(crate) Child);

impl Proxy {
    /// Resident memory in KiB.
    pub(crate) fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    fn end(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.end();
    }
}

impl World {
    /// With the proxy up and under the rules.
    pub(crate) fn new(rules: palisade_api::proxy::Rules) -> Self {
        let (client, node, server) = (Namespace::new(), Namespace::new(), Namespace::new());
        for (name, peer, number) in [("c0", &client, 1), ("s0", &server, 2)] {
            // Fixed addresses and neighbours: a busy machine may be too slow to find them.
            let mac = |end| format!("02:00:00:00:0{number}:0{end}");
            let (own, other) = (mac(1), mac(2));
            node.ip(&format!(
                "link add {name} address {own} type veth peer name eth0 address {other} netns {}",
                peer.thread
            ));
            node.ip(&format!("addr add 10.77.{number}.1/24 dev {name}"));
            node.ip(&format!("addr add fd77:{number}::1/64 dev {name} nodad"));
            node.ip(&format!("link set {name} up"));
            peer.ip(&format!("addr add 10.77.{number}.2/24 dev eth0"));
            peer.ip(&format!("addr add fd77:{number}::2/64 dev eth0 nodad"));
            peer.ip("link set eth0 up");
            for net in [format!("10.77.{number}."), format!("fd77:{number}::")] {
                node.ip(&format!("neigh replace {net}2 lladdr {other} dev {name} nud permanent"));
                peer.ip(&format!("neigh replace {net}1 lladdr {own} dev eth0 nud permanent"));
            }
            peer.ip(&format!("route add default via 10.77.{number}.1"));
            peer.ip(&format!("-6 route add default via fd77:{number}::1"));
            node.await_link(name);
        }
        node.run(|| {
            for path in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                fs::write(format!("/proc/sys/net/{path}"), "1").unwrap();
            }
            let mut nft =
                Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
            nft.stdin.take().unwrap().write_all(NFT.as_bytes()).unwrap();
            assert!(nft.wait().unwrap().success());
        });
        for family in ["-4", "-6"] {
            node.ip(&format!("{family} rule add fwmark 0x200/0xf00 lookup 14240"));
            node.ip(&format!("{family} route add local default dev lo table 14240"));
        }
        static WORLDS: AtomicU32 = AtomicU32::new(0);
        let number = WORLDS.fetch_add(1, Ordering::Relaxed);
        let directory =
            std::env::temp_dir().join(format!("palisade-proxy-{}-{number}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let agent = Agent::listen(&directory);
        let proxy = start(&node, &directory);
        agent.accept();
        agent.put(rules);
        Self { client, node, server, directory, agent, proxy }
    }

    /// A new process, under the rules that the old one left; that is gone first, since both want
    /// the same port.
    pub(crate) fn restart(&mut self) {
        self.proxy.end();
        self.proxy = start(&self.node, &self.directory);
    }

    /// Waits until a new process takes connections; before, they would go to the origin.
    pub(crate) fn await_listener(&self) {
        const LISTEN: &str = "0A";
        let deadline = std::time::Instant::now() + WAIT;
        let ready = || {
            self.node.run(|| {
                let tables = ["tcp", "tcp6"].map(|table| format!("/proc/thread-self/net/{table}"));
                tables.into_iter().all(|table| {
                    let lines = fs::read_to_string(table).unwrap();
                    lines.lines().any(|line| line.split_whitespace().nth(3) == Some(LISTEN))
                })
            })
        };
        while !ready() {
            assert!(std::time::Instant::now() < deadline, "the proxy does not come back");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// A connection from the client to the origin, as the client sees it.
    pub(crate) fn connect(&self, server: IpAddr) -> TcpStream {
        self.connect_to(SocketAddr::new(server, PORT))
    }

    pub(crate) fn connect_to(&self, server: SocketAddr) -> TcpStream {
        connect(&self.client, server).unwrap()
    }

    /// Sends bytes, ends the stream, and returns all that comes back.
    pub(crate) fn ask(&self, bytes: &[u8]) -> Vec<u8> {
        say(&self.client, SocketAddr::new(SERVER4, PORT), bytes, Then::End)
    }
}

fn connect(from: &Namespace, to: SocketAddr) -> io::Result<TcpStream> {
    let stream = from.run(move || TcpStream::connect_timeout(&to, WAIT))?;
    stream.set_read_timeout(Some(WAIT))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// What a client does when it has said what it had to say.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Then {
    /// It ends its side of the stream.
    End,
    Wait,
}

/// Sends bytes from somewhere, and returns all that comes back. A connection that is closed early,
/// even before the client heard that it has one, is an answer too.
pub(crate) fn say(from: &Namespace, to: SocketAddr, bytes: &[u8], then: Then) -> Vec<u8> {
    let mut stream = match connect(from, to) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Vec::new(),
        connected => connected.unwrap(),
    };
    _ = stream.write_all(bytes);
    if then == Then::End {
        _ = stream.shutdown(Shutdown::Write);
    }
    rest(&mut stream)
}

impl Drop for World {
    fn drop(&mut self) {
        _ = fs::remove_dir_all(&self.directory);
    }
}

/// For anything that is to happen.
pub(crate) const WAIT: Duration = Duration::from_secs(15);

/// 256 MiB of zeros, packed.
pub(crate) fn bomb() -> Vec<u8> {
    let pack = ["-c", "head -c 268435456 /dev/zero | gzip -1"];
    let output = Command::new("sh").args(pack).output().unwrap();
    assert!(output.status.success() && output.stdout.starts_with(&[0x1f, 0x8b]));
    output.stdout
}

/// All bytes until the end of the stream, or its reset.
pub(crate) fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut part = [0; 4096];
    loop {
        match stream.read(&mut part) {
            Ok(0) => return bytes,
            Ok(count) => bytes.extend_from_slice(&part[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                panic!("nothing more within {WAIT:?} after {}", String::from_utf8_lossy(&bytes))
            }
            Err(_) => return bytes,
        }
    }
}

/// Reads until the bytes end in a text.
pub(crate) fn until(stream: &mut TcpStream, end: &str) -> String {
    let mut bytes = Vec::new();
    while !bytes.ends_with(end.as_bytes()) {
        let mut byte = [0];
        let count = stream
            .read(&mut byte)
            .unwrap_or_else(|error| panic!("{error} after {:?}", String::from_utf8_lossy(&bytes)));
        assert_eq!(count, 1, "the stream ended after {:?}", String::from_utf8_lossy(&bytes));
        bytes.push(byte[0]);
    }
    String::from_utf8(bytes).unwrap()
}

/// The status of the first answer in some bytes, 0: there is none.
pub(crate) fn status(answer: &[u8]) -> u16 {
    let text = String::from_utf8_lossy(answer);
    text.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok()).unwrap_or(0)
}

fn start(node: &Namespace, directory: &std::path::Path) -> Proxy {
    let directory = directory.to_owned();
    Proxy(node.run(move || {
        Command::new(env!("CARGO_BIN_EXE_palisade-proxy"))
            .arg("--run-dir")
            .arg(&directory)
            .arg("--state-dir")
            .arg(directory.join("state"))
            .spawn()
            .unwrap()
    }))
}

#[expect(unsafe_code, reason = "rustix marks unshare unsafe for what may be done to file tables")]
fn unshare_network() {
    // SAFETY: only the network namespace of this thread changes.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
}
