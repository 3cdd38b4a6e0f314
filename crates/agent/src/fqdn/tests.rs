//! From an answer to a kernel in memory, through the real engine.

use std::{
    io::Write,
    path::PathBuf,
    sync::{
        Mutex as StdMutex,
        atomic::{AtomicU32, Ordering},
    },
};

use palisade_abi::{ChunkKey, PREFIX_ID_BIT};
use palisade_api::{routing::Routing, service::Addresses};
use palisade_datapath::{
    Entry, Kernel, KernelError, Key, Step, fake::FakeKernel, netlink::Netlink,
};
use palisade_policy::{
    l7::NamePattern,
    model::{
        Action, Application, Entry as Rule, Peer, Peers, Policy, PolicyKind, PolicyRef, Ports,
        Rule as Rules, Section,
    },
};
use rustix::{
    mount::{MountFlags, MountPropagationFlags},
    thread::UnshareFlags,
};

use super::*;
use crate::{
    engine::{Engine, Outputs},
    reconcile::Reconciler,
    resolve::{LastGood, Resolver, Scope},
    tables::{
        ObjectName, POLICY_KINDS, TablesWriter,
        nodes::Surroundings,
        nodes::{Node, NodeSource},
        pods::Endpoint,
        policies::{PolicyContent, PolicyObject},
        services::{EndpointSlice, Service, SliceBackend},
    },
};

const POD: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 1, 11));
const POD6: IpAddr = IpAddr::V6(std::net::Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 11));

/// What a load balancer has for a Service.
const LENT: [&str; 2] = ["203.0.113.80", "2001:db8::80"];
/// What it has as well, and what is the cluster's: the node's address, and a pod's.
const OF_THE_CLUSTER: [&str; 2] = ["172.31.255.1", "10.0.1.7"];

/// A kernel whose networks are full on demand.
#[derive(Default)]
struct Full {
    kernel: FakeKernel,
    full: StdMutex<bool>,
}

impl Kernel for Full {
    fn apply(&self, step: &Step) -> Result<(), KernelError> {
        if matches!(step, Step::Put(Entry::Ipcache(..))) && *self.full.lock().unwrap() {
            return Err(KernelError::Full { table: "IPCACHE" });
        }
        self.kernel.apply(step)
    }

    fn dump(&self) -> Result<Vec<Entry>, KernelError> {
        self.kernel.dump()
    }
}

#[derive(Default)]
struct Live(BTreeSet<(IpAddr, IpAddr)>);

impl Flows for Live {
    fn live_pairs(&self) -> Result<BTreeSet<(IpAddr, IpAddr)>, String> {
        Ok(self.0.clone())
    }
}

struct Bench {
    directory: PathBuf,
    kernel: Arc<Full>,
    commands: mpsc::Sender<Command>,
    progress: watch::Receiver<Progress>,
    health: Arc<Health>,
    names: Names,
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

impl Bench {
    async fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("palisade-fqdn-{}-{number}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&directory).unwrap();
        Self::start(directory, Arc::default(), &Live::default()).await
    }

    /// An agent over a kernel and a state directory that may have had one before, in front of a
    /// cluster.
    async fn start(directory: PathBuf, kernel: Arc<Full>, live: &Live) -> Self {
        let bench = Self::begin(directory, kernel, live).await;
        bench.tell_all().await;
        bench
    }

    /// The same before it hears anything of the cluster.
    async fn begin(directory: PathBuf, kernel: Arc<Full>, live: &Live) -> Self {
        let tables = TablesWriter::default();
        let reader = tables.reader();
        let reconciler = Reconciler::new(kernel.clone()).unwrap();
        let prefixes = reconciler.policy_prefixes().clone();
        let scope =
            Scope { node: "node1".into(), cluster: "default".into(), routing: Routing::Native };
        let (progress_sender, progress) = watch::channel(Progress::default());
        let outputs = Outputs {
            progress: progress_sender,
            surroundings: watch::channel(Surroundings::default()).0,
            publications: mpsc::unbounded_channel().0,
            proxy: Arc::default(),
            rounds: Arc::default(),
        };
        let engine = Engine::new(tables, Resolver::new(scope, prefixes), reconciler, outputs);
        let (commands, queue) = mpsc::channel(64);
        let (retry, runtime) = (commands.downgrade(), tokio::runtime::Handle::current());
        std::thread::spawn(move || engine.run(queue, retry, &runtime));
        let (told, seen) = (commands.clone(), progress.clone());
        let health = Arc::new(Health::default());
        let names = Names::restore(&directory, reader, told, seen, health.clone(), live);
        let names = names.await.unwrap();
        Self { directory, kernel, commands, progress, health, names }
    }

    /// The agent is gone, its files and the kernel stay.
    fn stop(self) -> (PathBuf, Arc<Full>) {
        let left = (self.directory.clone(), self.kernel.clone());
        std::mem::forget(self);
        left
    }

    /// Lets something happen while the disk is full.
    async fn on_full_disk<T>(&self, what: impl Future<Output = T>) -> T {
        let swap =
            async |journal| std::mem::replace(&mut self.names.known.lock().await.journal, journal);
        let good = swap(Journal::on_full_disk()).await;
        let done = what.await;
        swap(good).await;
        done
    }

    async fn send(&self, intent: Intent) {
        self.commands.send(Command::Intent(Box::new(intent))).await.unwrap();
    }

    async fn tell_all(&self) {
        let node = Node {
            name: "node1".into(),
            source: NodeSource::Node,
            uid: "node1".into(),
            addresses: vec![ip("172.31.255.1")],
            router_addresses: Vec::new(),
            pod_cidrs: vec!["10.0.1.0/24".parse().unwrap(), "fd00:1::/64".parse().unwrap()],
        };
        let service = Service {
            name: ObjectName::new("default", "kubernetes"),
            addresses: Addresses {
                own: BTreeSet::from([ip("198.18.0.1")]),
                lent: LENT.into_iter().chain(OF_THE_CLUSTER).map(ip).collect(),
            },
            ports: Vec::new(),
            affinity: None,
        };
        self.send(Intent::Namespace(Change::Replace(Vec::new()))).await;
        self.send(Intent::Pod(Change::Replace(Vec::new()))).await;
        self.send(Intent::Service(Change::Replace(vec![service]))).await;
        let api_server = SliceBackend { address: ip("198.51.100.9"), ready: true, serving: true };
        let slice = EndpointSlice {
            name: ObjectName::new("default", "kubernetes"),
            service: "kubernetes".into(),
            by_controller: false,
            ports: Vec::new(),
            backends: vec![api_server],
        };
        self.send(Intent::Slice(Change::Replace(vec![slice]))).await;
        self.send(Intent::Node(NodeSource::Node, Change::Replace(vec![node]))).await;
        self.send(Intent::Node(NodeSource::CiliumNode, Change::Replace(Vec::new()))).await;
        self.send(Intent::Identity(Change::Replace(Vec::new()))).await;
        for kind in POLICY_KINDS {
            let policies =
                if kind == PolicyKind::CiliumNetworkPolicy { vec![policy()] } else { vec![] };
            self.send(Intent::Policy(kind, Change::Replace(policies))).await;
        }
        self.send(Intent::Endpoint(Change::Replace(vec![endpoint("web")]))).await;
        let mut progress = self.progress.clone();
        progress.wait_for(|progress| progress.synced).await.unwrap();
    }

    /// Whether the kernel lets the pod reach an address by name, now.
    fn opened(&self, address: &str) -> bool {
        let tables = self.kernel.kernel.tables();
        let network = ipnet::IpNet::from(ip(address));
        let key = crate::reconcile::mirror::ipcache_key(network);
        let Some(Entry::Ipcache(_, value)) = tables.entries.get(&Key::Ipcache(key)) else {
            return false;
        };
        let table = tables.rows[&2].egress_table;
        assert!(tables.entries.contains_key(&Key::Chunk(ChunkKey { table, chunk: 0 })));
        let knows = |key: &&Key| matches!(key, Key::Peer(key) if key.table == table && key.id == value.prefix);
        value.prefix & PREFIX_ID_BIT != 0 && tables.entries.keys().any(|key| knows(&key))
    }

    async fn learn(&self, name: &str, addresses: &[&str]) -> Result<(), NotLearned> {
        let addresses: Vec<IpAddr> = addresses.iter().map(|address| ip(address)).collect();
        self.names.learn(POD, name, &addresses, 60).await
    }

    /// Waits until the kernel holds what the names are now.
    async fn settled(&self) {
        let row = self.names.known.lock().await.cache.row(2);
        let generation = row.map_or(0, |row| row.generation);
        let mut progress = self.progress.clone();
        let settled = |progress: &Progress| match generation {
            0 => !progress.names.contains_key(&2),
            generation => progress.names.get(&2) == Some(&generation),
        };
        progress.wait_for(settled).await.unwrap();
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Every pod may reach `*.example.com`, and nothing else.
fn policy() -> PolicyObject {
    let id = PolicyRef {
        kind: PolicyKind::CiliumNetworkPolicy,
        namespace: Some("default".into()),
        name: "names".into(),
    };
    let entry = Rule {
        action: Action::Allow,
        peers: Peers::List(vec![Peer::Fqdn(NamePattern::pattern("*.example.com").unwrap())]),
        ports: Ports::Any,
        application: Application::Any,
        path: "spec.egress[0]".into(),
    };
    let egress = Section { default_deny: true, entries: vec![entry] };
    let rule = Rules { egress, ..Rules::default() };
    let content = PolicyContent::Accepted(Policy { id: id.clone(), rules: vec![rule] }.into());
    PolicyObject { id, uid: "names".into(), generation: 1, content, reported: None }
}

fn endpoint(container: &str) -> Endpoint {
    let (IpAddr::V4(ipv4), IpAddr::V6(ipv6)) = (POD, POD6) else { unreachable!() };
    Endpoint {
        id: 2,
        pod: ObjectName::new("default", "web"),
        uid: "web".into(),
        container_id: container.into(),
        interface: "lxc2".into(),
        ifindex: 12,
        mac: [2; 6],
        host_mac: [4; 6],
        ipv4: Some(ipv4),
        ipv6: Some(ipv6),
    }
}

#[tokio::test]
async fn an_answer_is_in_force_when_it_is_learned() {
    let bench = Bench::new().await;
    assert!(!bench.opened("93.184.216.34"));
    bench.learn("api.example.com", &["93.184.216.34", "2606:2800::1"]).await.unwrap();
    assert!(bench.opened("93.184.216.34") && bench.opened("2606:2800::1"));
    // The same over the pod's other family.
    bench.names.learn(POD6, "b.example.com", &[ip("93.184.216.35")], 60).await.unwrap();
    assert!(bench.opened("93.184.216.35"));
    // A name that no rule speaks of is learned, and opens nothing.
    bench.learn("example.org", &["93.184.216.36"]).await.unwrap();
    assert!(!bench.opened("93.184.216.36"));
    let (nobody, address) = (ip("10.0.1.99"), [ip("93.184.216.37")]);
    let learned = bench.names.learn(nobody, "api.example.com", &address, 60).await;
    assert_eq!(learned, Err(NotLearned::NoPod(nobody)));
    assert!(!bench.opened("93.184.216.37"));
}

#[tokio::test]
async fn many_answers_one_after_the_other() {
    let bench = Bench::new().await;
    for n in 0..300u32 {
        let address = std::net::Ipv4Addr::from(0x5db8_0000 + n).to_string();
        bench.learn(&format!("n{n}.example.com"), &[&address]).await.unwrap();
        assert!(bench.opened(&address), "{address}");
    }
}

#[tokio::test]
async fn what_a_full_name_gets_is_in_force() {
    let bench = Bench::new().await;
    let all: Vec<IpAddr> =
        (0..1000).map(|n| std::net::Ipv4Addr::from(0x5db8_0000 + n).into()).collect();
    bench.names.learn(POD, "api.example.com", &all, 60).await.unwrap();
    bench.learn("api.example.com", &["203.0.113.1"]).await.unwrap();
    assert!(
        bench.opened("203.0.113.1") && !bench.opened("93.184.0.0") && bench.opened("93.184.0.1")
    );
}

#[tokio::test]
async fn a_name_opens_nothing_in_the_cluster() {
    let bench = Bench::new().await;
    let inside = [
        "10.0.1.11",
        "10.0.1.77",
        "10.0.1.1",
        "172.31.255.1",
        "198.18.0.1",
        "127.0.0.1",
        "198.51.100.9",
        "169.254.169.254",
        "0.0.0.0",
        "fd00:1::77",
        "::1",
        "fe80::1",
        "::ffff:10.0.0.1",
    ];
    bench.learn("api.example.com", &inside).await.unwrap();
    for address in inside {
        assert!(!bench.opened(address), "{address}");
    }
    assert!(bench.names.known.lock().await.cache.is_empty());
}

/// Where it leads into the cluster the pods there are judged; all else of it is outside.
#[tokio::test]
async fn a_name_opens_what_a_load_balancer_has() {
    let bench = Bench::new().await;
    let lent = [LENT, OF_THE_CLUSTER].concat();
    bench.learn("api.example.com", &lent).await.unwrap();
    for address in lent {
        assert_eq!(bench.opened(address), LENT.contains(&address), "{address}");
    }
}

#[tokio::test]
async fn what_is_in_use_outlives_its_time() {
    let bench = Bench::new().await;
    bench.learn("api.example.com", &["93.184.216.34", "93.184.216.35"]).await.unwrap();
    let later = now() + 60 + cache::GRACE + 1;
    let live = Live([(POD, ip("93.184.216.34"))].into());
    bench.names.expire(now() + 60, &Live::default()).await.unwrap();
    bench.settled().await;
    assert!(bench.opened("93.184.216.34") && bench.opened("93.184.216.35"));
    bench.names.expire(later, &live).await.unwrap();
    bench.settled().await;
    assert!(bench.opened("93.184.216.34") && !bench.opened("93.184.216.35"));
    bench.names.expire(later, &Live::default()).await.unwrap();
    bench.settled().await;
    assert!(!bench.opened("93.184.216.34"));
}

#[tokio::test]
async fn a_restart_takes_nothing_back() {
    let bench = Bench::new().await;
    bench.learn("api.example.com", &["93.184.216.34"]).await.unwrap();
    bench.learn("b.example.com", &["93.184.216.35"]).await.unwrap();
    let live = Live([(POD, ip("93.184.216.34"))].into());
    bench.names.expire(now() + 3600, &live).await.unwrap();
    bench.settled().await;
    let (directory, kernel) = bench.stop();
    let before = kernel.kernel.tables().entries.clone();
    let bench = Bench::start(directory, kernel, &live).await;
    bench.settled().await;
    assert!(bench.opened("93.184.216.34") && !bench.opened("93.184.216.35"));
    assert_eq!(bench.kernel.kernel.tables().entries, before, "nothing had to be written");
}

#[tokio::test]
async fn a_restart_opens_nothing_whose_time_is_over() {
    let bench = Bench::new().await;
    let owner = Owner { endpoint: 2, container: "web".into() };
    let over = [ip("93.184.216.34"), ip("93.184.216.35")];
    bench.names.known.lock().await.journal.append(&owner, "api.example.com", &over, 1).unwrap();
    let (directory, kernel) = bench.stop();
    let live = Live([(POD, over[0])].into());
    let bench = Bench::start(directory, kernel, &live).await;
    bench.settled().await;
    assert!(bench.opened("93.184.216.34") && !bench.opened("93.184.216.35"));
}

#[tokio::test]
async fn a_look_before_the_pods_are_known_takes_nothing_back() {
    let bench = Bench::new().await;
    bench.learn("api.example.com", &["93.184.216.34"]).await.unwrap();
    let (directory, kernel) = bench.stop();
    let live = Live([(POD, ip("93.184.216.34"))].into());
    let bench = Bench::begin(directory, kernel, &live).await;
    bench.names.expire(now() + 3600, &live).await.unwrap();
    bench.tell_all().await;
    bench.settled().await;
    assert!(bench.opened("93.184.216.34"));
}

#[tokio::test]
async fn what_expires_while_the_disk_is_full_is_closed() {
    let bench = Bench::new().await;
    bench.learn("api.example.com", &["93.184.216.34"]).await.unwrap();
    let later = now() + 60 + cache::GRACE + 1;
    let live = Live::default();
    let expired = bench.on_full_disk(bench.names.expire(later, &live)).await;
    assert!(matches!(expired, Err(NotLearned::Disk(_))), "{expired:?}");
    bench.settled().await;
    assert!(!bench.opened("93.184.216.34"));
    // The file follows as soon as there is room, though nothing else expires.
    let file = || std::fs::read_to_string(bench.directory.join(FILE)).unwrap();
    assert!(file().contains("93.184.216.34"));
    bench.names.expire(later, &live).await.unwrap();
    assert!(!file().contains("93.184.216.34"));
}

#[tokio::test]
async fn what_a_full_disk_held_back_is_learned_when_it_has_room() {
    let bench = Bench::new().await;
    let learn = || bench.learn("api.example.com", &["93.184.216.34"]);
    let learned = bench.on_full_disk(learn()).await;
    assert!(matches!(learned, Err(NotLearned::Disk(_))), "{learned:?}");
    assert!(!bench.opened("93.184.216.34"));
    learn().await.unwrap();
    assert!(bench.opened("93.184.216.34"));
}

/// Does something on a file system of its own that has little room.
#[expect(unsafe_code, reason = "rustix marks unshare unsafe for what may be done to file tables")]
fn on_small_disk(what: impl AsyncFnOnce(PathBuf) + Send + 'static) {
    let directory = std::env::temp_dir().join(format!("palisade-small-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let place = directory.clone();
    let done = std::thread::spawn(move || {
        // SAFETY: only the mounts of this thread change, and its working directory is its own.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        // As many files as the names need: the directory, theirs, and the one that replaces it.
        let options = Some(c"size=64k,nr_inodes=3");
        rustix::mount::mount("tmpfs", &place, "tmpfs", MountFlags::empty(), options).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(what(place));
    });
    done.join().unwrap();
    std::fs::remove_dir(&directory).unwrap();
}

/// A file that takes all the room.
fn fill(directory: &Path) -> PathBuf {
    let path = directory.join("full");
    let mut file = std::fs::File::create(&path).unwrap();
    while file.write_all(&[0; 4096]).is_ok() {}
    path
}

#[test]
fn an_agent_starts_on_a_full_disk() {
    on_small_disk(async |directory| {
        let bench = Bench::start(directory, Arc::default(), &Live::default()).await;
        bench.learn("api.example.com", &["93.184.216.34"]).await.unwrap();
        let (directory, kernel) = bench.stop();
        let full = fill(&directory);
        // What was never kept is not there, and cannot be made.
        let (missing, node) = (directory.join("missing"), Netlink::current().unwrap());
        assert!(LastGood::open(missing.clone()).is_ok());
        assert!(crate::cni::recorded(missing, &node).await.unwrap().is_empty());

        let bench = Bench::start(directory.clone(), kernel, &Live::default()).await;
        assert!(bench.opened("93.184.216.34"), "what could be read holds");
        let learned = bench.learn("b.example.com", &["93.184.216.35"]).await;
        assert!(matches!(learned, Err(NotLearned::Disk(_))), "{learned:?}");
        let later = now() + 1;
        let looked = bench.names.expire(later, &Live::default()).await;
        assert!(matches!(looked, Err(NotLearned::Disk(_))), "{looked:?}");
        let [problem] = &bench.health.problems()[..] else { panic!("{:?}", bench.health) };
        assert!(problem.contains("learned names") && problem.contains("storage"), "{problem}");

        std::fs::remove_file(full).unwrap();
        bench.names.expire(later, &Live::default()).await.unwrap();
        assert_eq!(bench.health.problems(), Vec::<String>::new());
        bench.learn("b.example.com", &["93.184.216.35"]).await.unwrap();
        let (directory, kernel) = bench.stop();
        let bench = Bench::start(directory, kernel, &Live::default()).await;
        assert!(bench.opened("93.184.216.34") && bench.opened("93.184.216.35"));
    });
}

#[tokio::test]
async fn a_later_pod_of_the_same_number_has_learned_nothing() {
    let bench = Bench::new().await;
    bench.learn("api.example.com", &["93.184.216.34"]).await.unwrap();
    bench.send(Intent::Endpoint(Change::Put(endpoint("other")))).await;
    let (tables, mut progress) = (bench.names.tables.clone(), bench.progress.clone());
    let is_other = |_: &Progress| {
        tables.read().endpoints.get(&2).is_some_and(|row| row.container_id == "other")
    };
    progress.wait_for(is_other).await.unwrap();
    bench.learn("b.example.com", &["93.184.216.35"]).await.unwrap();
    assert!(!bench.opened("93.184.216.34") && bench.opened("93.184.216.35"));
}

#[tokio::test]
async fn what_the_kernel_has_no_room_for_is_not_learned() {
    let bench = Bench::new().await;
    *bench.kernel.full.lock().unwrap() = true;
    let learned = bench.learn("api.example.com", &["93.184.216.34"]).await;
    assert!(matches!(learned, Err(NotLearned::NotInForce(problem)) if problem.contains("IPCACHE")));
    *bench.kernel.full.lock().unwrap() = false;
    bench.learn("api.example.com", &["93.184.216.34"]).await.unwrap();
    assert!(bench.opened("93.184.216.34"));
}
