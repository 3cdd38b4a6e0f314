//! Real sockets in two pods of one node, through the attached programs.
//!
//! Needs root. The node is a network namespace of the test's own, made by `unshare`; the machine's
//! interfaces are not touched.
#![expect(unsafe_code, reason = "unshare is unsafe to call from a program with threads")]
#![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::{
    fs,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::PathBuf,
    process::Command,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use palisade_abi::{
    Address, EndpointKey, EndpointRow, EndpointValue, NODE_NONE, TABLE_ALLOW_ALL, row_flags,
};
use palisade_datapath::{Config, Datapath, Entry, Kernel, Step};
use rustix::thread::{UnshareFlags, unshare_unsafe};

const WAIT: Duration = Duration::from_millis(300);
/// A table that is never programmed: default deny by absence.
const TABLE_EMPTY: u32 = 99;

#[derive(Clone, Copy)]
struct Pod {
    row: u32,
    link: &'static str,
    ipv4: [u8; 4],
    ipv6: [u8; 16],
    mac: [u8; 6],
}

const PODS: [Pod; 2] = [
    Pod {
        row: 2,
        link: "lxcone",
        ipv4: [10, 9, 0, 1],
        ipv6: [0xfd, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        mac: [2, 0, 0, 0, 9, 1],
    },
    Pod {
        row: 3,
        link: "lxctwo",
        ipv4: [10, 9, 0, 2],
        ipv6: [0xfd, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2],
        mac: [2, 0, 0, 0, 9, 2],
    },
];

impl Pod {
    fn address(&self, ipv6: bool) -> IpAddr {
        if ipv6 { self.ipv6.into() } else { self.ipv4.into() }
    }

    fn keys(&self) -> [Address; 2] {
        [std::net::Ipv4Addr::from(self.ipv4).to_ipv6_mapped().octets(), self.ipv6]
    }
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {message}");
}

/// A thread that lives in a pod's network namespace and does what it is told.
struct Inside {
    jobs: mpsc::Sender<Box<dyn FnOnce() + Send>>,
}

impl Inside {
    /// Makes the namespace and moves `peer` of the node into it.
    fn new(pod: Pod) -> Self {
        let (jobs, inbox) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let (ready, is_ready) = mpsc::channel();
        let (go, may_go) = mpsc::channel::<()>();
        thread::spawn(move || {
            // SAFETY: only this thread's network changes.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
            ready.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
            may_go.recv().unwrap();
            set_up(pod);
            ready.send(0).unwrap();
            for job in inbox {
                job();
            }
        });
        let thread = is_ready.recv().unwrap();
        ip(&format!("link add {} type veth peer name eth0 netns {thread}", pod.link));
        go.send(()).unwrap();
        is_ready.recv().unwrap();
        let (link, ipv4, ipv6) = (pod.link, pod.address(false), pod.address(true));
        ip(&format!("addr add fe80::1/64 dev {link} nodad"));
        ip(&format!("link set {link} up"));
        ip(&format!("route add {ipv4}/32 dev {link}"));
        ip(&format!("-6 route add {ipv6}/128 dev {link}"));
        Self { jobs }
    }

    fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (answer, result) = mpsc::channel();
        self.jobs.send(Box::new(move || drop(answer.send(job())))).unwrap();
        result.recv().unwrap()
    }
}

fn set_up(pod: Pod) {
    let mac = pod.mac.map(|byte| format!("{byte:02x}")).join(":");
    ip(&format!("link set eth0 address {mac}"));
    ip("link set lo up");
    ip("link set eth0 up");
    ip(&format!("addr add {}/32 dev eth0", pod.address(false)));
    ip(&format!("addr add {}/128 dev eth0 nodad", pod.address(true)));
    ip("route add default via 10.9.0.254 dev eth0 onlink");
    ip("-6 route add default via fe80::1 dev eth0");
}

struct Node {
    datapath: Datapath,
    kernel: Arc<dyn Kernel>,
    pods: [Inside; 2],
    directories: [PathBuf; 2],
}

impl Node {
    fn new() -> Self {
        // SAFETY: only this test's thread changes, and the threads that it starts.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        ip("link set lo up");
        ip("addr add 10.9.0.254/32 dev lo");
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        let name = format!("palisade-traffic-{}", std::process::id());
        let bpffs = PathBuf::from("/sys/fs/bpf").join(&name);
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let root = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).unwrap();
        let cgroup = PathBuf::from(root.split(' ').nth(1).unwrap()).join(&name);
        fs::create_dir_all(&cgroup).unwrap();
        let config = Config { bpffs: bpffs.clone(), cgroup: cgroup.clone() };
        let datapath = Datapath::open(&config).unwrap();
        let pods = PODS.map(Inside::new);
        let kernel = datapath.kernel();
        let node = Self { datapath, kernel, pods, directories: [bpffs, cgroup] };
        for pod in &PODS {
            node.datapath.attach_endpoint(pod.link).unwrap();
            assert!(node.datapath.is_attached(pod.link));
            node.put(Entry::Interface(ifindex(pod.link), pod.row));
            for address in pod.keys() {
                let identity = 1000 + pod.row;
                let value = EndpointValue { identity, prefix: 0, row: pod.row, node: NODE_NONE };
                node.put(Entry::Endpoint(EndpointKey { address }, value));
            }
        }
        node
    }

    fn put(&self, entry: Entry) {
        self.kernel.apply(&Step::Put(entry)).unwrap();
    }

    fn tables(&self, pod: usize, ingress_table: u32, egress_table: u32) {
        let Pod { row, link, ipv4, ipv6, mac } = PODS[pod];
        let row_value = EndpointRow {
            ingress_table,
            egress_table,
            ifindex: ifindex(link),
            identity: 1000 + row,
            flags: row_flags::VALID,
            endpoint: row,
            mac,
            ipv4,
            ipv6,
            ..EndpointRow::default()
        };
        self.put(Entry::Row(row, row_value));
    }

    fn allow_all(&self) {
        self.tables(0, TABLE_ALLOW_ALL, TABLE_ALLOW_ALL);
        self.tables(1, TABLE_ALLOW_ALL, TABLE_ALLOW_ALL);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for pod in &PODS {
            let _ = self.datapath.detach_endpoint(pod.link);
        }
        let [bpffs, cgroup] = &self.directories;
        for part in ["links", "maps"] {
            let _ = fs::remove_dir_all(bpffs.join(part));
        }
        let _ = fs::remove_dir(bpffs);
        let _ = fs::remove_dir(cgroup);
    }
}

fn ifindex(name: &str) -> u32 {
    let output = Command::new("ip").args(["-o", "link", "show", name]).output().unwrap();
    let line = String::from_utf8(output.stdout).unwrap();
    line.split(':').next().unwrap().parse().unwrap()
}

/// Echoes what one TCP connection and every UDP datagram at the port say.
fn serve(inside: &Inside, address: SocketAddr) {
    inside.run(move || {
        let tcp = TcpListener::bind(address).unwrap();
        thread::spawn(move || {
            for stream in tcp.incoming() {
                thread::spawn(move || echo(stream.unwrap()));
            }
        });
        let udp = UdpSocket::bind(address).unwrap();
        thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((length, from)) = udp.recv_from(&mut buffer) {
                let _ = udp.send_to(&buffer[..length], from);
            }
        });
    });
}

fn echo(mut stream: TcpStream) {
    let mut buffer = [0; 64];
    while let Ok(length) = stream.read(&mut buffer) {
        if length == 0 || stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

fn connect(inside: &Inside, address: SocketAddr) -> io::Result<TcpStream> {
    inside.run(move || {
        let stream = TcpStream::connect_timeout(&address, WAIT)?;
        stream.set_read_timeout(Some(WAIT))?;
        Ok(stream)
    })
}

fn answered(stream: &mut TcpStream) -> bool {
    let mut buffer = [0; 4];
    stream.write_all(b"ping").is_ok()
        && stream.read_exact(&mut buffer).is_ok()
        && &buffer == b"ping"
}

fn datagram(inside: &Inside, address: SocketAddr) -> bool {
    inside.run(move || {
        let local = if address.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
        let socket = UdpSocket::bind(local).unwrap();
        socket.set_read_timeout(Some(WAIT)).unwrap();
        let _ = socket.send_to(b"ping", address);
        let mut buffer = [0; 8];
        socket.recv_from(&mut buffer).is_ok()
    })
}

#[test]
fn pods_talk_as_policy_says_and_stop_when_it_changes() {
    let node = Node::new();
    let [client, server] = &node.pods;
    for (index, ipv6) in [false, true].into_iter().enumerate() {
        let address = SocketAddr::new(PODS[1].address(ipv6), 8000 + index as u16);
        serve(server, address);
        node.tables(0, TABLE_ALLOW_ALL, TABLE_EMPTY);
        node.tables(1, TABLE_ALLOW_ALL, TABLE_ALLOW_ALL);
        assert!(connect(client, address).is_err(), "egress denied, {address}");
        assert!(!datagram(client, address), "egress denied, {address}");
        node.tables(0, TABLE_ALLOW_ALL, TABLE_ALLOW_ALL);
        node.tables(1, TABLE_EMPTY, TABLE_ALLOW_ALL);
        assert!(connect(client, address).is_err(), "ingress denied, {address}");
        assert!(!datagram(client, address), "ingress denied, {address}");

        node.allow_all();
        let mut stream = connect(client, address).expect("allowed");
        assert!(answered(&mut stream), "{address}");
        assert!(datagram(client, address), "{address}");
        // A change that allows the same does not disturb the connection.
        node.allow_all();
        assert!(answered(&mut stream), "{address}");
        node.tables(1, TABLE_EMPTY, TABLE_ALLOW_ALL);
        for _ in 0..3 {
            // The far end sends again what was not acknowledged; that must not revive it.
            assert!(!answered(&mut stream), "an open connection stops, {address}");
        }
        assert!(!datagram(client, address), "{address}");
    }
}
