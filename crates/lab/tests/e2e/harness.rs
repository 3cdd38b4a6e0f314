//! A lab for a test, and what a test does in it.

use std::{
    fs::{self, File},
    io::{self, Write},
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use palisade_api::admin::{Client, Request, Response, Status};
use palisade_lab::{
    layout::{FABRIC_NETNS, Layout, NodePlan},
    nodes::{Program, process},
    sys::{cgroup, mounts, netns},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_palisade-lab");
/// Until something must be in force.
const SOON: Duration = Duration::from_secs(10);

/// A running lab. A machine has room for one, so it holds a lock that all tests share.
pub(crate) struct Lab {
    nodes: Vec<NodePlan>,
    layout: Layout,
    _lock: File,
}

/// A pod that runs.
#[derive(Clone)]
pub(crate) struct Pod {
    /// IPv4 first.
    pub(crate) addresses: [IpAddr; 2],
    netns: PathBuf,
    group: PathBuf,
}

/// See [`Lab::cni`].
pub(crate) struct CniPlace {
    pub(crate) socket: PathBuf,
    pub(crate) netns: PathBuf,
    pub(crate) records: PathBuf,
    pub(crate) pins: PathBuf,
    pub(crate) maps: PathBuf,
}

/// See [`Lab::suspend`].
pub(crate) struct Suspended(Pid);

impl Drop for Suspended {
    fn drop(&mut self) {
        kill_process(self.0, Signal::CONT).unwrap();
    }
}

/// See [`Lab::other_agent`].
pub(crate) struct OtherAgent(Child);

impl Drop for OtherAgent {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// How a node gets to see what a socket of a pod does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// When it connects or sends, as every container's sockets.
    Socket,
    /// By its packets only, as the sockets of somebody who entered the pod's network.
    Packet,
}

/// Only one thread at a time may say in which control group this process is.
static GROUP: Mutex<()> = Mutex::new(());

impl Pod {
    /// Somebody's network, as if it were a pod.
    pub(crate) fn in_network(netns: PathBuf, addresses: [IpAddr; 2]) -> Self {
        Self { addresses, netns, group: own_group() }
    }

    /// What the node sees of this pod's sockets, but in the network of `other`.
    pub(crate) fn within(&self, other: &Self) -> Self {
        Self { addresses: other.addresses, netns: other.netns.clone(), group: self.group.clone() }
    }

    /// Starts `work` on a thread inside the pod's network.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> thread::JoinHandle<io::Result<T>> {
        let netns = self.netns.clone();
        thread::spawn(move || netns::run_in(&netns, work))
    }

    /// New sockets of the pod. A socket belongs for ever to the control group in which it was made.
    pub(crate) fn sockets(&self, level: Level, kinds: Vec<(Domain, Type)>) -> Vec<Socket> {
        let make = move || kinds.into_iter().map(|(family, kind)| Socket::new(family, kind, None));
        if level == Level::Packet {
            return self.run(move || make().collect());
        }
        let guard = GROUP.lock().unwrap_or_else(PoisonError::into_inner);
        let home = own_group();
        cgroup::join(&self.group).unwrap();
        let sockets = netns::run_in(&self.netns, move || make().collect());
        cgroup::join(&home).unwrap();
        drop(guard);
        sockets.unwrap()
    }

    /// Runs `work` inside the pod's network.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> T {
        netns::run_in(&self.netns, work).unwrap()
    }
}

/// Machines that are not of the cluster: a network beside the nodes, with two addresses of each
/// family. The first ones are its own, the second ones only answer.
pub(crate) struct Outside {
    pub(crate) pod: Pod,
    pub(crate) second: [IpAddr; 2],
}

impl Outside {
    const NETNS: &str = "palisade-test-outside";

    pub(crate) fn new(lab: &Lab) -> Self {
        let netns = netns::create(Self::NETNS).unwrap();
        let inside = format!("-n {}", Self::NETNS);
        let fabric = format!("-n {FABRIC_NETNS}");
        ip(&format!("{fabric} link add outside type veth peer eth0 netns {}", Self::NETNS));
        ip(&format!("{fabric} link set outside master fabric up"));
        ip(&format!("{inside} link set eth0 up"));
        let addresses: [[&str; 2]; 2] =
            [["172.31.255.200", "172.31.255.201"], ["fd31::200", "fd31::201"]];
        let [v4, v6] = addresses;
        ip(&format!("{inside} addr add {}/24 dev eth0", v4[0]));
        ip(&format!("{inside} addr add {}/24 dev eth0", v4[1]));
        ip(&format!("{inside} addr add {}/64 dev eth0 nodad", v6[0]));
        ip(&format!("{inside} addr add {}/64 dev eth0 nodad preferred_lft 0", v6[1]));
        for node in &lab.nodes {
            ip(&format!("{inside} route add {} via {}", node.pods_v4(), node.v4()));
            ip(&format!("{inside} -6 route add {} via {}", node.pods_v6(), node.v6()));
        }
        let address = |text: &str| text.parse().unwrap();
        Self {
            pod: Pod::in_network(netns, [address(v4[0]), address(v6[0])]),
            second: [address(v4[1]), address(v6[1])],
        }
    }
}

impl Outside {
    /// From now on it has no way to pods, but by those who speak for them.
    pub(crate) fn forget_pods(&self, lab: &Lab) {
        for node in &lab.nodes {
            ip(&format!("-n {} route del {}", Self::NETNS, node.pods_v4()));
            ip(&format!("-n {} -6 route del {}", Self::NETNS, node.pods_v6()));
        }
    }
}

/// A machine further away, which the outside routes to.
pub(crate) struct Beyond {
    pub(crate) pod: Pod,
}

impl Beyond {
    const NETNS: &str = "palisade-test-beyond";

    /// The way to it is narrow.
    pub(crate) fn new(lab: &Lab, outside: &Outside, mtu: u32) -> Self {
        let netns = netns::create(Self::NETNS).unwrap();
        let (here, inside) = (format!("-n {}", Outside::NETNS), format!("-n {}", Self::NETNS));
        ip(&format!(
            "{here} link add beyond mtu {mtu} type veth peer eth0 mtu {mtu} netns {}",
            Self::NETNS
        ));
        ip(&format!("{here} link set beyond up"));
        ip(&format!("{inside} link set eth0 up"));
        let [v4, v6] = ["198.51.100.2", "fd99::2"];
        ip(&format!("{here} addr add 198.51.100.1/24 dev beyond"));
        ip(&format!("{here} addr add fd99::1/64 dev beyond nodad"));
        ip(&format!("{inside} addr add {v4}/24 dev eth0"));
        ip(&format!("{inside} addr add {v6}/64 dev eth0 nodad"));
        ip(&format!("{inside} route add default via 198.51.100.1"));
        ip(&format!("{inside} -6 route add default via fd99::1"));
        outside.pod.run(|| {
            fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
            fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")
        });
        let [near4, near6] = outside.pod.addresses;
        for node in &lab.nodes {
            ip(&format!("-n {} route add 198.51.100.0/24 via {near4}", node.netns()));
            ip(&format!("-n {} -6 route add fd99::/64 via {near6}", node.netns()));
        }
        let address = |text: &str| text.parse().unwrap();
        Self { pod: Pod::in_network(netns, [address(v4), address(v6)]) }
    }
}

impl Drop for Beyond {
    fn drop(&mut self) {
        netns::remove(Self::NETNS).unwrap();
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        netns::remove(Self::NETNS).unwrap();
    }
}

pub(crate) fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", text(&output));
}

impl Lab {
    pub(crate) fn up(nodes: u8) -> Self {
        Self::up_with(nodes, &[])
    }

    /// As [`Lab::up`], with more options.
    pub(crate) fn up_with(nodes: u8, options: &[&str]) -> Self {
        let lab = Self { nodes: NodePlan::all(nodes), layout: Layout::default(), _lock: lock() };
        lab.start(nodes, options);
        lab
    }

    /// Starts it again; it must have ended before, one way or another.
    pub(crate) fn up_again(&mut self, nodes: u8, options: &[&str]) {
        self.nodes = NodePlan::all(nodes);
        self.start(nodes, options);
    }

    fn start(&self, nodes: u8, options: &[&str]) {
        let nodes = nodes.to_string();
        let mut arguments = vec!["up", "--nodes", &nodes];
        // The whole suite runs with either routing.
        let routing = std::env::var("PALISADE_TEST_ROUTING").unwrap_or("native".into());
        if !options.contains(&"--routing") {
            arguments.extend(["--routing", &routing]);
        }
        arguments.extend(options);
        let output = program(&arguments);
        assert!(output.status.success(), "{}", text(&output));
    }

    fn pid(&self) -> Pid {
        let pid = fs::read_to_string(self.layout.pid_file()).unwrap();
        Pid::from_raw(pid.trim().parse().unwrap()).unwrap()
    }

    /// Stops the lab's process until the returned value goes: its API server answers nobody, and
    /// a node's program that dies stays dead.
    pub(crate) fn suspend(&self) -> Suspended {
        let pid = self.pid();
        kill_process(pid, Signal::STOP).unwrap();
        Suspended(pid)
    }

    /// Kills the lab's process.
    pub(crate) fn crash(&self) {
        kill_process(self.pid(), Signal::KILL).unwrap();
        let status = || program(&["status"]).status.code();
        eventually("the lab's process is gone", || status() == Some(3));
    }

    /// Stops a node's agent until the returned value goes; another one may take its place.
    pub(crate) fn suspend_agent(&self, number: usize) -> Suspended {
        self.signal(number, Program::Agent, Signal::STOP);
        Suspended(self.process(number, Program::Agent))
    }

    /// An agent in the place of a node's own, whom nobody tells the uplink, until the returned value
    /// goes. It is ready.
    pub(crate) fn other_agent(&self, number: usize, options: &[&str]) -> OtherAgent {
        let (node, layout) = (&self.nodes[number - 1], &self.layout);
        let run = layout.run_dir().join("others").join(&node.name);
        let group = mounts::cgroup2_root().unwrap().unwrap().join("palisade").join(&node.name);
        let log = File::options().append(true).open(layout.log(node, Program::Agent)).unwrap();
        let mut command = Command::new(PROGRAM);
        command.arg("netns-exec").arg(node.netns_path()).arg("--");
        command.arg(Path::new(PROGRAM).with_file_name(Program::Agent.file()));
        command.args(["--node-name", &node.name]).args(options);
        for (option, path) in [
            ("--run-dir", &run),
            ("--state-dir", &layout.node_state(node)),
            ("--kubeconfig", &layout.node_kubeconfig()),
            ("--bpffs", &layout.bpffs(node)),
            ("--cgroup", &group),
        ] {
            command.arg(option).arg(path);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let child = command.spawn();
        let agent = OtherAgent(child.unwrap());
        let socket = run.join("admin.sock");
        eventually("the other agent is ready", || {
            let answer = ask(&socket, &Request::Status);
            matches!(answer, Ok(Response::Status(status)) if status.ready)
        });
        agent
    }

    /// The administrator's kubeconfig.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.layout.kubeconfig()
    }

    /// The kubeconfig of the nodes' programs.
    pub(crate) fn node_kubeconfig(&self) -> PathBuf {
        self.layout.node_kubeconfig()
    }

    pub(crate) fn kubectl(&self, args: &[&str]) -> String {
        let output = self.run_kubectl(args);
        assert!(output.status.success(), "kubectl {}: {}", args.join(" "), text(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// What `kubectl` printed, unless it failed.
    pub(crate) fn try_kubectl(&self, args: &[&str]) -> Option<String> {
        let output = self.run_kubectl(args);
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    }

    fn run_kubectl(&self, args: &[&str]) -> Output {
        self.command(args).stdin(Stdio::null()).output().unwrap()
    }

    pub(crate) fn apply(&self, manifest: &str) {
        let mut child = self
            .command(&["apply", "-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(manifest.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success(), "{manifest}");
    }

    /// `kubectl`, to start.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.tools/bin");
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::iter::once(tools).chain(std::env::split_paths(&path));
        let mut command = Command::new("kubectl");
        command
            .args(args)
            .env("PATH", std::env::join_paths(path).unwrap())
            .env("KUBECONFIG", self.layout.kubeconfig());
        command
    }

    /// Applies a `NetworkPolicy` and waits until every agent has it.
    pub(crate) fn apply_policy(&self, namespace: &str, name: &str, spec: &str) {
        self.apply(&format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
             metadata: {{name: {name}, namespace: '{namespace}'}}\nspec: {spec}\n"
        ));
        self.await_policy("NetworkPolicy", namespace, name);
    }

    /// Applies a `CiliumNetworkPolicy`, or where there is no namespace a
    /// `CiliumClusterwideNetworkPolicy`, and waits until every agent has it. `content` is `spec:`
    /// or `specs:` and what it holds.
    pub(crate) fn apply_cilium_policy(&self, namespace: &str, name: &str, content: &str) {
        let clusterwide = namespace.is_empty();
        let kind =
            if clusterwide { "CiliumClusterwideNetworkPolicy" } else { "CiliumNetworkPolicy" };
        self.apply(&format!(
            "apiVersion: cilium.io/v2\nkind: {kind}\n\
             metadata: {{name: {name}, namespace: '{namespace}'}}\n{content}\n"
        ));
        self.await_policy(kind, namespace, name);
    }

    fn await_policy(&self, kind: &str, namespace: &str, name: &str) {
        let path = "jsonpath={.metadata.generation}";
        let generation = self.kubectl(&["-n", namespace, "get", kind, name, "-o", path]);
        let policy = match namespace {
            "" => format!("{kind} {name}"),
            _ => format!("{kind} {namespace}/{name}"),
        };
        self.await_table("policies", |rows| {
            rows.iter().any(|row| row[0] == policy && row[1] == generation)
        });
    }

    /// The network of a node, as if it were a pod.
    pub(crate) fn node(&self, number: usize) -> Pod {
        let node = &self.nodes[number - 1];
        Pod::in_network(node.netns_path(), node.addresses())
    }

    /// Starts pods that do nothing, each on a node and with a label `app` that is its name.
    pub(crate) fn pods<const N: usize>(&self, pods: [(&str, u8); N]) -> [Pod; N] {
        let manifests = pods.map(|(name, node)| {
            format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: {name}}}}}\n\
                 spec:\n  nodeName: node{node}\n  containers:\n  - name: pause\n    \
                 image: registry.k8s.io/pause\n"
            )
        });
        self.apply(&manifests.join("---\n"));
        self.kubectl(&["wait", "--for=condition=Ready", "pod", "--all", "--timeout=30s"]);
        pods.map(|(name, _)| self.pod("default", name))
    }

    /// A pod that runs.
    pub(crate) fn pod(&self, namespace: &str, name: &str) -> Pod {
        let object = self.kubectl(&["-n", namespace, "get", "pod", name, "-o", "json"]);
        let object: Value = serde_json::from_str(&object).unwrap();
        let addresses = object["status"]["podIPs"].as_array().unwrap();
        let address = |index: usize| addresses[index]["ip"].as_str().unwrap().parse().unwrap();
        let node = object["spec"]["nodeName"].as_str().unwrap();
        let uid = object["metadata"]["uid"].as_str().unwrap();
        let group = mounts::cgroup2_root().unwrap().unwrap().join("palisade").join(node);
        let container = object["spec"]["containers"][0]["name"].as_str().unwrap();
        let group = group.join(format!("pod-{uid}/{container}"));
        let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap();
        let process = processes.lines().next().unwrap();
        Pod {
            addresses: [address(0), address(1)],
            netns: PathBuf::from(format!("/proc/{process}/ns/net")),
            group,
        }
    }

    /// Kills a program of a node; it is started again.
    pub(crate) fn kill(&self, number: usize, program: Program) {
        self.signal(number, program, Signal::KILL);
    }

    /// Kills the agent of a node, and waits until the next one is ready.
    pub(crate) fn replace_agent(&self, number: usize) {
        let old = self.process(number, Program::Agent).as_raw_pid().cast_unsigned();
        self.kill(number, Program::Agent);
        within(3 * SOON, "the next agent is ready", || {
            let status = self.statuses().swap_remove(number - 1);
            status.is_some_and(|now| now.ready && now.pid != old)
        });
    }

    /// Sends a signal to a program of a node.
    pub(crate) fn signal(&self, number: usize, program: Program, signal: Signal) {
        kill_process(self.process(number, program), signal).unwrap();
    }

    /// As [`Lab::kill`], unless it is dead already; whether it was not.
    pub(crate) fn try_kill(&self, number: usize, program: Program) -> bool {
        let pid = process(&self.layout, &self.nodes[number - 1], program);
        pid.is_some_and(|pid| kill_process(pid, Signal::KILL).is_ok())
    }

    /// The process of a program of a node.
    pub(crate) fn process(&self, number: usize, program: Program) -> Pid {
        process(&self.layout, &self.nodes[number - 1], program).unwrap()
    }

    /// Where the agent of a node is asked, and where it keeps what it knows of pods.
    pub(crate) fn cni(&self, number: usize) -> CniPlace {
        let node = &self.nodes[number - 1];
        CniPlace {
            socket: self.layout.cni_socket(node),
            netns: node.netns_path(),
            records: self.layout.node_state(node).join("attachments"),
            pins: self.layout.bpffs(node).join("links"),
            maps: self.layout.bpffs(node).join("maps"),
        }
    }

    /// Where the agent of a node has its sockets.
    pub(crate) fn run_dir(&self, number: usize) -> PathBuf {
        self.layout.admin_socket(&self.nodes[number - 1]).parent().unwrap().to_owned()
    }

    /// What the agent of each node says; nothing from one that does not answer.
    pub(crate) fn statuses(&self) -> Vec<Option<Status>> {
        let answers = self.answers(&Request::Status).into_iter();
        let status = |answer| match answer {
            Some(Response::Status(status)) => Some(*status),
            _ => None,
        };
        answers.map(status).collect()
    }

    fn answers(&self, request: &Request) -> Vec<Option<Response>> {
        let sockets = self.nodes.iter().map(|node| self.layout.admin_socket(node));
        sockets.map(|socket| ask(&socket, request).ok()).collect()
    }

    /// Waits until a table of every agent holds what it must; rows are those of
    /// `palisade get TABLE`. A table is shown between rounds only, when what is in it is in force.
    pub(crate) fn await_table(&self, table: &str, holds: impl Fn(&[Vec<String>]) -> bool) {
        let request = Request::TableGet { table: table.into() };
        eventually(table, || {
            self.answers(&request).iter().all(|answer| match answer {
                Some(Response::Table(table)) => holds(&table.rows),
                _ => false,
            })
        });
    }

    /// Waits until every agent is ready and has so many policies in force.
    pub(crate) fn await_policies(&self, count: usize) {
        eventually("the policies are in force", || {
            self.statuses().iter().all(|status| {
                status.as_ref().is_some_and(|status| {
                    status.ready && status.policies == count && status.problems.is_empty()
                })
            })
        });
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if thread::panicking() {
            for node in &self.nodes {
                for program in Program::ALL {
                    let log =
                        fs::read_to_string(self.layout.log(node, program)).unwrap_or_default();
                    let lines: Vec<&str> = log.lines().rev().take(20).collect();
                    eprintln!("{}'s {}:\n{}", node.name, program.file(), lines.join("\n"));
                }
            }
        }
        let output = Command::new(PROGRAM).arg("down").output().unwrap();
        assert!(output.status.success() || thread::panicking(), "{}", text(&output));
    }
}

/// A machine has room for one lab.
pub(crate) fn lock() -> File {
    let lock = File::create("/run/palisade-test.lock").unwrap();
    lock.lock().unwrap();
    lock
}

/// Runs `palisade-lab`.
pub(crate) fn program(args: &[&str]) -> Output {
    Command::new(PROGRAM).args(args).output().unwrap()
}

/// The control group of this process.
fn own_group() -> PathBuf {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap();
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
    mounts::cgroup2_root().unwrap().unwrap().join(path)
}

fn ask(socket: &Path, request: &Request) -> io::Result<Response> {
    let mut client = Client::connect(socket)?;
    client.set_timeout(Some(Duration::from_secs(2)))?;
    client.request(request)
}

/// Asks every 10 ms; panics where the answer stays no.
pub(crate) fn eventually(what: &str, holds: impl FnMut() -> bool) {
    within(SOON, what, holds);
}

/// As [`eventually`], for what may take longer.
pub(crate) fn within(time: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < time, "not within {time:?}: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

pub(crate) fn text(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    format!("{}{}", String::from_utf8_lossy(out), String::from_utf8_lossy(err))
}
