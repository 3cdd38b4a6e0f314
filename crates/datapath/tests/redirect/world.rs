//! Two nodes with two pods each, on one link. Every place is a thread in a network namespace of its
//! own; the machine's interfaces are not touched.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread,
};

use palisade_abi::{
    Address, ChunkKey, ChunkValue, EndpointKey, EndpointRow, EndpointValue, NODE_NONE, PortKey,
    PortValue, ROW_NONE, TABLE_ALLOW_ALL, protocol, row_flags,
};
use palisade_datapath::{Config, Datapath, Entry, Kernel, Side, Step, netlink::Netlink};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// A thread that lives in a network namespace of its own and does what it is told.
pub(crate) struct Place {
    jobs: mpsc::Sender<Box<dyn FnOnce() + Send>>,
    thread: i32,
}

impl Place {
    fn new() -> Self {
        let (jobs, inbox) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let (ready, is_ready) = mpsc::channel();
        thread::spawn(move || {
            // SAFETY: only this thread's network changes, and that of the threads it starts.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
            // Addresses are usable at once.
            fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").unwrap();
            ip("link set lo up");
            ready.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
            for job in inbox {
                job();
            }
        });
        Self { jobs, thread: is_ready.recv().unwrap() }
    }

    pub(crate) fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (answer, result) = mpsc::channel();
        self.jobs.send(Box::new(move || drop(answer.send(job())))).unwrap();
        result.recv().unwrap()
    }

    fn ip(&self, arguments: String) {
        self.run(move || ip(&arguments));
    }
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {message}");
}

pub(crate) struct Pod {
    pub(crate) place: Place,
    pub(crate) row: u32,
    number: u8,
    node: u8,
}

impl Pod {
    pub(crate) fn address(&self, ipv6: bool) -> IpAddr {
        pod_address(self.node, self.number, ipv6)
    }

    pub(crate) fn identity(&self) -> u32 {
        identity(self.node, self.number)
    }

    fn link(&self) -> String {
        format!("lxc{}", self.number)
    }

    fn mac(&self) -> [u8; 6] {
        [2, 0, 0, 0, self.node, self.number]
    }
}

fn pod_address(node: u8, number: u8, ipv6: bool) -> IpAddr {
    if ipv6 {
        return Ipv6Addr::new(0xfd09, 0, 0, node.into(), 0, 0, 0, number.into()).into();
    }
    Ipv4Addr::new(10, 9, node, number).into()
}

fn identity(node: u8, number: u8) -> u32 {
    1000 + u32::from(node) * 10 + u32::from(number)
}

pub(crate) fn key(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

/// What a rule of [`Node::table`] does with its port.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    Deny,
    Redirect,
    Allow,
}

pub(crate) struct Node {
    pub(crate) place: Place,
    pub(crate) datapath: Arc<Datapath>,
    pub(crate) kernel: Arc<dyn Kernel>,
    pub(crate) pods: [Pod; 2],
    number: u8,
    directories: [PathBuf; 2],
}

impl Node {
    fn new(number: u8) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let place = Place::new();
        place.ip("addr add 10.9.255.254/32 dev lo".into());
        place.run(|| {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let netlink = Netlink::current().unwrap();
                netlink.prepare_node(false, |_| ()).await.unwrap();
                netlink.steer_to_proxy().await.unwrap();
                netlink.steer_to_proxy().await.unwrap();
            });
        });
        let serial = COUNT.fetch_add(1, Ordering::SeqCst);
        let name = format!("palisade-redirect-{}-{serial}", std::process::id());
        let bpffs = PathBuf::from("/sys/fs/bpf").join(&name);
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let root = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).unwrap();
        let cgroup = PathBuf::from(root.split(' ').nth(1).unwrap()).join(&name);
        fs::create_dir_all(&cgroup).unwrap();
        let config = Config { bpffs: bpffs.clone(), cgroup: cgroup.clone() };
        let datapath = Arc::new(Datapath::open(&config).unwrap());
        let pods = [1, 2].map(|pod| add_pod(&place, number, pod));
        let kernel = datapath.kernel();
        let node = Self { place, datapath, kernel, pods, number, directories: [bpffs, cgroup] };
        for pod in &node.pods {
            let (datapath, link) = (node.datapath.clone(), pod.link());
            let ifindex = node.place.run(move || {
                datapath.attach_endpoint(&link).unwrap();
                assert!(datapath.is_attached(&link));
                ifindex(&link)
            });
            node.put(Entry::Interface(ifindex, pod.row));
        }
        node
    }

    pub(crate) fn put(&self, entry: Entry) {
        self.kernel.apply(&Step::Put(entry)).unwrap();
    }

    fn know(&self, address: IpAddr, identity: u32, row: u32) {
        let address = key(address);
        let value = EndpointValue { identity, prefix: 0, row, node: NODE_NONE };
        self.put(Entry::Endpoint(EndpointKey { address }, value));
        self.kernel.apply(&Step::BumpShard(address)).unwrap();
    }

    /// Sets a pod's tables.
    pub(crate) fn row(&self, pod: usize, ingress_table: u32, egress_table: u32) {
        let pod = &self.pods[pod];
        let link = pod.link();
        let (IpAddr::V4(ipv4), IpAddr::V6(ipv6)) = (pod.address(false), pod.address(true)) else {
            unreachable!()
        };
        let row = EndpointRow {
            ingress_table,
            egress_table,
            ifindex: self.place.run(move || ifindex(&link)),
            identity: pod.identity(),
            flags: row_flags::VALID,
            endpoint: pod.row,
            mac: pod.mac(),
            ipv4: ipv4.octets(),
            ipv6: ipv6.octets(),
            ..EndpointRow::default()
        };
        self.put(Entry::Row(pod.row, row));
    }

    /// A table: for everybody, at these ports, TCP and UDP; nothing else.
    pub(crate) fn table(&self, table: u32, rules: &[(u16, Rule)]) {
        let bits = |kind| {
            let matching = rules.iter().enumerate().filter(|(_, (_, rule))| *rule == kind);
            [matching.fold(0, |bits, (bit, _)| bits | 1 << bit), 0]
        };
        for (port, _) in rules {
            let matching = rules.iter().enumerate().filter(|(_, (other, _))| other == port);
            let value =
                PortValue { rules: [matching.fold(0, |bits, (bit, _)| bits | 1 << bit), 0] };
            for protocol in [protocol::TCP, protocol::UDP] {
                let key =
                    PortKey { table, chunk: 0, prefix_len: 16, protocol, port: *port, reserved: 0 };
                self.put(Entry::Port(key, value));
            }
        }
        let head = ChunkValue {
            default_peers: [(1 << rules.len()) - 1, 0],
            default_ports: [0; 2],
            deny: bits(Rule::Deny),
            redirect: bits(Rule::Redirect),
            port_prefixes: 1 << 16,
            chunks: 1,
        };
        self.put(Entry::Chunk(ChunkKey { table, chunk: 0 }, head));
    }

    pub(crate) fn allow_all(&self) {
        self.row(0, TABLE_ALLOW_ALL, TABLE_ALLOW_ALL);
        self.row(1, TABLE_ALLOW_ALL, TABLE_ALLOW_ALL);
    }

    pub(crate) fn host_address(&self, ipv6: bool) -> IpAddr {
        if ipv6 {
            return Ipv6Addr::new(0xfd31, 0, 0, 0, 0, 0, 0, self.number.into()).into();
        }
        Ipv4Addr::new(172, 31, 0, self.number).into()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for pod in &self.pods {
            let _ = self.datapath.detach_endpoint(&pod.link());
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

fn add_pod(node: &Place, node_number: u8, number: u8) -> Pod {
    let place = Place::new();
    let pod = Pod { place, row: 1 + u32::from(number), number, node: node_number };
    let (link, thread) = (pod.link(), pod.place.thread);
    node.ip(format!("link add {link} type veth peer name eth0 netns {thread}"));
    let mac = pod.mac().map(|byte| format!("{byte:02x}")).join(":");
    let (ipv4, ipv6) = (pod.address(false), pod.address(true));
    for arguments in [
        format!("link set eth0 address {mac}"),
        "link set eth0 up".into(),
        format!("addr add {ipv4}/32 dev eth0"),
        format!("addr add {ipv6}/128 dev eth0 nodad"),
        "route add default via 10.9.255.254 dev eth0 onlink".into(),
        "-6 route add default via fe80::1 dev eth0".into(),
    ] {
        pod.place.ip(arguments);
    }
    for arguments in [
        format!("addr add fe80::1/64 dev {link} nodad"),
        format!("link set {link} up"),
        format!("route add {ipv4}/32 dev {link}"),
        format!("-6 route add {ipv6}/128 dev {link}"),
    ] {
        node.ip(arguments);
    }
    pod
}

/// Two connected nodes, everything allowed.
pub(crate) fn world() -> [Node; 2] {
    let nodes = [Node::new(1), Node::new(2)];
    let other = nodes[1].place.thread;
    nodes[0].place.ip(format!("link add uplink type veth peer name uplink netns {other}"));
    for (index, node) in nodes.iter().enumerate() {
        let far = &nodes[1 - index];
        let (number, far_number) = (node.number, far.number);
        for arguments in [
            "link set uplink up".into(),
            format!("addr add {}/24 dev uplink", node.host_address(false)),
            format!("addr add {}/64 dev uplink nodad", node.host_address(true)),
            format!("route add 10.9.{far_number}.0/24 via {}", far.host_address(false)),
            format!("-6 route add fd09:0:0:{far_number}::/64 via {}", far.host_address(true)),
        ] {
            node.place.ip(arguments);
        }
        let datapath = node.datapath.clone();
        node.place.run(move || {
            datapath.attach("uplink", Side::Uplink).unwrap();
            assert!(datapath.is_side_attached("uplink", Side::Uplink));
        });
        for ipv6 in [false, true] {
            for pod in [1, 2] {
                let row = 1 + u32::from(pod);
                node.know(pod_address(number, pod, ipv6), identity(number, pod), row);
                let remote = pod_address(far_number, pod, ipv6);
                node.know(remote, identity(far_number, pod), ROW_NONE);
            }
        }
        node.allow_all();
    }
    nodes
}
