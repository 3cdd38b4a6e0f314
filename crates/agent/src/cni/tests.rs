//! The real kernel, the real plugin protocol, and endpoints that only count.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use palisade_api::cni::{
    Add, Attached, Attachment, Check, Code, ContainerId, Gc, IfName, Pod, deletion_queue,
};
use palisade_datapath::netlink::{NetNs, Netlink};

use super::*;
use crate::ipam::Ipam;

const PATIENCE: Duration = Duration::from_secs(30);

struct TempNs(String);

impl TempNs {
    fn new() -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("plsd-cni-{}-{number}", std::process::id());
        let added = Command::new("ip").args(["netns", "add", &name]).status().ok()?;
        added.success().then_some(Self(name))
    }

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.0)
    }

    fn netlink(&self) -> Netlink {
        Netlink::of(Arc::new(NetNs::open(self.path()).expect("namespace"))).expect("netlink")
    }

    fn output(&self, command: &[&str]) -> String {
        let output = Command::new("ip").args(["netns", "exec", &self.0]).args(command).output();
        String::from_utf8(output.expect("run ip").stdout).expect("text").trim().to_owned()
    }

    fn run(&self, command: &[&str]) -> bool {
        let output = Command::new("ip").args(["netns", "exec", &self.0]).args(command).output();
        output.expect("run ip").status.success()
    }
}

impl Drop for TempNs {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

#[derive(Default)]
struct Counting {
    known: Mutex<HashSet<Attachment>>,
    refuse: bool,
    /// Programming begins and never ends; `reached` says that it began.
    stall: bool,
    reached: tokio::sync::Notify,
}

impl Endpoints for Counting {
    async fn add(&self, endpoint: NewEndpoint) -> Result<u32, EndpointError> {
        self.known.lock().expect("lock").insert(endpoint.attachment);
        if self.stall {
            self.reached.notify_one();
            std::future::pending::<()>().await;
        }
        if self.refuse {
            return Err(EndpointError::TryAgain("labels unknown".into()));
        }
        Ok(7)
    }

    async fn remove(&self, attachment: &Attachment) -> Result<(), EndpointError> {
        self.known.lock().expect("lock").remove(attachment);
        Ok(())
    }

    async fn check(&self, attachment: &Attachment) -> Result<(), EndpointError> {
        match self.known.lock().expect("lock").contains(attachment) {
            true => Ok(()),
            false => Err(EndpointError::Differs("programs detached".into())),
        }
    }

    async fn readiness(&self) -> Readiness {
        Readiness::Ready
    }
}

struct Bench {
    node: TempNs,
    directory: PathBuf,
    attachments: Attachments,
    endpoints: Counting,
}

impl Bench {
    async fn new(endpoints: Counting) -> Option<Self> {
        let node = TempNs::new()?;
        let directory = std::env::temp_dir().join(&node.0);
        let (attachments, restored) = Self::restore(&node, &directory).await;
        assert!(restored.live.is_empty() && restored.gone.is_empty());
        node.netlink().prepare_node(false, |_| ()).await.expect("settings");
        let routers = ["10.244.9.1", "fd44:0:0:9::1"].map(|a| a.parse().expect("address"));
        node.netlink().add_router_addresses(&routers).await.expect("routers");
        Some(Self { node, directory, attachments, endpoints })
    }

    /// A range with room for five pods.
    async fn shrink(&mut self) {
        let settings = self.attachments.settings.clone();
        let ipam = Ipam::new(&["10.244.9.0/29".parse().expect("range")]).expect("ipam");
        let (again, _) =
            Attachments::restore(settings, ipam, self.node.netlink()).await.expect("restore");
        self.attachments = again;
    }

    async fn restore(node: &TempNs, directory: &Path) -> (Attachments, Restored) {
        let ranges = ["10.244.9.0/24", "fd44:0:0:9::/64"].map(|r| r.parse().expect("range"));
        let settings = Settings {
            node: "node9".into(),
            socket: directory.join("cni.sock"),
            records: directory.join("records"),
            mtu: 1500,
        };
        let ipam = Ipam::new(&ranges).expect("ipam");
        Attachments::restore(settings, ipam, node.netlink()).await.expect("restore")
    }

    async fn add(&self, pod: &TempNs) -> Result<Attached, palisade_api::cni::Failure> {
        let add = Add {
            attachment: attachment(&pod.0),
            network: "palisade".into(),
            netns: pod.path(),
            pod: Pod { namespace: "x".into(), name: "a".into(), uid: None },
        };
        self.attachments.add(&self.endpoints, add, PATIENCE).await
    }

    async fn links(&self) -> usize {
        let links = self.node.netlink().links().await.expect("links");
        links.iter().filter(|link| link.name.starts_with("lxc")).count()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn attachment(container: &str) -> Attachment {
    Attachment {
        container_id: ContainerId::try_from(container.to_owned()).expect("id"),
        ifname: IfName::try_from("eth0".to_owned()).expect("name"),
    }
}

fn check(pod: &TempNs, attached: &Attached) -> Check {
    Check {
        attachment: attachment(&pod.0),
        netns: pod.path(),
        mac: Some(attached.pod.mac.clone()),
        addresses: attached.addresses.iter().map(|a| a.address).collect(),
        routes: attached.routes.clone(),
    }
}

#[tokio::test]
async fn a_pod_is_attached_checked_restored_and_detached() {
    let Some(bench) = Bench::new(Counting::default()).await else { return };
    let Some(pod) = TempNs::new() else { return };
    let start = Instant::now();
    let attached = bench.add(&pod).await.expect("add");
    println!("ADD took {:?}", start.elapsed());
    assert!(pod.run(&["ping", "-c1", "-W2", "10.244.9.1"]));
    assert_eq!(bench.add(&pod).await.expect_err("twice").code, Code::AlreadyExists);
    assert!(pod.run(&["ping", "-c1", "-W2", "fd44:0:0:9::1"]), "the first one still works");

    let (again, restored) = Bench::restore(&bench.node, &bench.directory).await;
    assert_eq!((restored.live.len(), restored.gone.len()), (1, 0));
    assert_eq!(restored.live[0].phase, Phase::Committed(7));
    drop(again);

    let expected = check(&pod, &attached);
    bench.attachments.check(&bench.endpoints, expected.clone()).await.expect("as it was made");
    pod.run(&["ip", "route", "del", "default"]);
    let failure = bench.attachments.check(&bench.endpoints, expected).await.expect_err("route");
    assert_eq!(failure.code, Code::Differs);

    for _ in 0..3 {
        let key = attachment(&pod.0);
        bench.attachments.del(&bench.endpoints, &key).await.expect("del");
    }
    assert_eq!((bench.links().await, bench.attachments.list().len()), (0, 0));
}

#[tokio::test]
async fn a_refused_endpoint_leaves_nothing() {
    let refusing = Counting { refuse: true, ..Counting::default() };
    let Some(bench) = Bench::new(refusing).await else { return };
    let Some(pod) = TempNs::new() else { return };
    let failure = bench.add(&pod).await.expect_err("refused");
    assert_eq!(failure.code, Code::TryAgain);
    assert_eq!(bench.links().await, 0);
    assert!(bench.endpoints.known.lock().expect("lock").is_empty());
    let (_, restored) = Bench::restore(&bench.node, &bench.directory).await;
    assert!(restored.live.is_empty() && restored.gone.is_empty());
}

#[tokio::test]
async fn a_queued_deletion_and_a_collection_remove_what_they_name() {
    let Some(bench) = Bench::new(Counting::default()).await else { return };
    let pods: Vec<TempNs> = (0..4).filter_map(|_| TempNs::new()).collect();
    let added = futures::future::join_all(pods.iter().map(|pod| bench.add(pod))).await;
    let addresses: HashSet<_> = added
        .iter()
        .flat_map(|a| a.as_ref().expect("add").addresses.iter().map(|a| a.address))
        .collect();
    assert_eq!((addresses.len(), bench.links().await), (8, 4));

    let queue = deletion_queue(&bench.directory.join("cni.sock"));
    std::fs::create_dir_all(&queue).expect("queue");
    std::fs::write(queue.join(attachment(&pods[0].0).file_name()), "").expect("queue");
    bench.attachments.drain(&bench.endpoints).await;
    assert_eq!((bench.links().await, std::fs::read_dir(&queue).expect("queue").count()), (3, 0));

    let valid = vec![attachment(&pods[1].0)];
    let gc = Gc { network: "palisade".into(), valid };
    bench.attachments.gc(&bench.endpoints, gc).await.expect("gc");
    assert_eq!(bench.links().await, 1);
    assert!(pods[1].run(&["ping", "-c1", "-W2", "10.244.9.1"]));
}

/// Whatever happened to the records: an address in use is not given again, and the pod that has
/// it keeps its interface.
#[tokio::test]
async fn lost_records_do_not_free_addresses() {
    let Some(mut bench) = Bench::new(Counting::default()).await else { return };
    let pods: Vec<TempNs> = (0..3).filter_map(|_| TempNs::new()).collect();
    let first = bench.add(&pods[0]).await.expect("add");
    let second = bench.add(&pods[1]).await.expect("add");
    std::fs::remove_dir_all(bench.directory.join("records")).expect("wipe");

    let (again, restored) = Bench::restore(&bench.node, &bench.directory).await;
    assert!(restored.live.is_empty() && restored.gone.is_empty());
    bench.attachments = again;
    assert!(pods[0].run(&["ping", "-c1", "-W2", "10.244.9.1"]), "the pod's interface stays");
    let third = bench.add(&pods[2]).await.expect("add");
    let addresses: HashSet<_> = [&first, &second, &third]
        .iter()
        .flat_map(|attached| attached.addresses.iter().map(|a| a.address))
        .collect();
    assert_eq!((addresses.len(), bench.links().await), (6, 3));
    assert_eq!(bench.attachments.used_addresses(), 3);

    for pod in &pods {
        bench.attachments.del(&bench.endpoints, &attachment(&pod.0)).await.expect("del");
    }
    assert_eq!((bench.attachments.used_addresses(), bench.links().await), (0, 0));
}

/// The agent dies between making the interface and answering: nothing is left, and the next
/// agent gives no address twice.
#[tokio::test]
async fn a_crash_in_the_middle_leaves_nothing() {
    let stalling = Counting { stall: true, ..Counting::default() };
    let Some(mut bench) = Bench::new(stalling).await else { return };
    let Some(pod) = TempNs::new() else { return };
    tokio::select! {
        result = bench.add(&pod) => panic!("must not end: {result:?}"),
        () = bench.endpoints.reached.notified() => {}
    }
    assert_eq!(bench.links().await, 1, "the interface exists already");
    let host = bench.node.netlink().links().await.expect("links");
    let host = host.iter().find(|link| link.name.starts_with("lxc")).expect("interface");
    assert!(!host.up, "no packet passes before the policy is in force");
    assert!(!pod.run(&["ping", "-c1", "-W1", "10.244.9.1"]));

    let (again, restored) = Bench::restore(&bench.node, &bench.directory).await;
    assert_eq!((restored.live.len(), restored.gone.len()), (0, 1));
    bench.attachments = again;
    assert_eq!((bench.links().await, bench.attachments.used_addresses()), (0, 0));
    assert_eq!(std::fs::read_dir(bench.directory.join("records")).expect("records").count(), 0);
    bench.endpoints.stall = false;
    bench.add(&pod).await.expect("the runtime's next attempt");
}

/// A damaged record cannot say what its pod may do: the pod loses its interface, nobody else does.
#[tokio::test]
async fn a_damaged_record_closes_its_pod_alone() {
    let Some(mut bench) = Bench::new(Counting::default()).await else { return };
    let pods: Vec<TempNs> = (0..3).filter_map(|_| TempNs::new()).collect();
    for pod in &pods {
        bench.add(pod).await.expect("add");
    }
    let record =
        |pod: &TempNs| bench.directory.join("records").join(attachment(&pod.0).file_name());
    let text = std::fs::read(record(&pods[0])).expect("record");
    std::fs::write(record(&pods[0]), &text[..text.len() / 2]).expect("truncate");
    std::fs::write(record(&pods[1]), b"\0\xff").expect("corrupt");

    let (again, restored) = Bench::restore(&bench.node, &bench.directory).await;
    assert_eq!((restored.live.len(), restored.gone.len()), (1, 0));
    bench.attachments = again;
    assert_eq!((bench.links().await, bench.attachments.used_addresses()), (1, 1));
    assert!(!pods[0].run(&["ping", "-c1", "-W1", "10.244.9.1"]));
    assert!(pods[2].run(&["ping", "-c1", "-W2", "10.244.9.1"]));
}

/// Many at once: distinct addresses, and afterwards the node is as before.
#[tokio::test]
async fn many_pods_come_and_go_at_once() {
    const PODS: usize = 60;
    let Some(bench) = Bench::new(Counting::default()).await else { return };
    let before = bench.node.netlink().routes().await.expect("routes").len();
    let pods: Vec<TempNs> = (0..PODS).filter_map(|_| TempNs::new()).collect();
    let start = Instant::now();
    let added = futures::future::join_all(pods.iter().map(|pod| bench.add(pod))).await;
    println!("{PODS} ADD at once took {:?}", start.elapsed());
    let addresses: HashSet<_> = added
        .iter()
        .flat_map(|a| a.as_ref().expect("add").addresses.iter().map(|a| a.address))
        .collect();
    assert_eq!((addresses.len(), bench.links().await), (2 * PODS, PODS));

    let keys: Vec<Attachment> = pods.iter().map(|pod| attachment(&pod.0)).collect();
    let deletions = keys.iter().map(|key| bench.attachments.del(&bench.endpoints, key));
    for deleted in futures::future::join_all(deletions).await {
        deleted.expect("del");
    }
    assert_eq!((bench.links().await, bench.attachments.used_addresses()), (0, 0));
    assert_eq!(bench.node.netlink().routes().await.expect("routes").len(), before);
    assert_eq!(std::fs::read_dir(bench.directory.join("records")).expect("records").count(), 0);
}

#[tokio::test]
async fn a_full_range_says_so_and_deleted_pods_make_room() {
    let Some(mut bench) = Bench::new(Counting::default()).await else { return };
    bench.shrink().await;
    let pods: Vec<TempNs> = (0..6).filter_map(|_| TempNs::new()).collect();
    let mut given = Vec::new();
    for pod in &pods[..5] {
        given.push(bench.add(pod).await.expect("add").addresses[0].address);
    }
    let full = bench.add(&pods[5]).await.expect_err("full");
    assert_eq!(full.code, Code::TryAgain);
    for hint in
        ["node node9", "all 5 pod addresses of 10.244.9.0/29", "delete pods", "Node.spec.podCIDRs"]
    {
        assert!(full.message.contains(hint), "{full}");
    }
    let status = bench.attachments.status(&bench.endpoints).await.expect_err("full");
    assert_eq!(status.code, Code::NotAvailable);
    assert_eq!(bench.links().await, 5, "the refused pod has no interface");

    for pod in [&pods[3], &pods[1]] {
        bench.attachments.del(&bench.endpoints, &attachment(&pod.0)).await.expect("del");
    }
    bench.attachments.status(&bench.endpoints).await.expect("room again");
    let again = bench.add(&pods[5]).await.expect("add").addresses[0].address;
    assert_eq!(again, given[3], "the address that was released first");
}

#[tokio::test]
async fn interfaces_are_set_up_as_promised() {
    let Some(bench) = Bench::new(Counting::default()).await else { return };
    let Some(pod) = TempNs::new() else { return };
    let attached = bench.add(&pod).await.expect("add");
    let host = &attached.host.name;
    let addresses = bench.node.output(&["ip", "-o", "addr", "show", "dev", host]);
    assert!(addresses.contains("fe80::1/64") && addresses.lines().count() == 1, "{addresses}");
    for (setting, value) in [
        ("ipv4/conf/{}/rp_filter", "0"),
        ("ipv4/conf/{}/accept_local", "1"),
        ("ipv4/conf/{}/forwarding", "1"),
        ("ipv6/conf/{}/accept_ra", "0"),
        ("ipv6/conf/{}/forwarding", "1"),
    ] {
        let path = format!("/proc/sys/net/{}", setting.replace("{}", host));
        assert_eq!(bench.node.output(&["cat", &path]), value, "{path}");
    }
    for (place, device, mac) in
        [(&bench.node, host.as_str(), &attached.pod.mac), (&pod, "eth0", &attached.host.mac)]
    {
        let neighbours = place.output(&["ip", "neigh", "show", "dev", device]);
        let permanent = |line: &&str| line.contains("PERMANENT") && line.contains(mac.as_str());
        assert_eq!(neighbours.lines().filter(permanent).count(), 2, "{neighbours}");
        let link = place.netlink().link(device).await.expect("get").expect("exists");
        assert!(link.up && link.mtu == 1500, "{link:?}");
    }
    let inside = pod.output(&["ip", "-o", "addr", "show", "dev", "eth0"]);
    assert!(inside.contains("/32") && inside.contains("/128") && !inside.contains("fe80"));
}

/// What is on the disk after a crash of the machine: whole records, torn ones, and files that never
/// became any, none of them with an interface.
#[tokio::test]
async fn records_of_before_a_crash_of_the_machine_are_forgotten() {
    let Some(mut bench) = Bench::new(Counting::default()).await else { return };
    let pods: Vec<TempNs> = (0..3).filter_map(|_| TempNs::new()).collect();
    for pod in &pods {
        bench.add(pod).await.expect("add");
    }
    let records = bench.directory.join("records");
    let record = |pod: &TempNs| records.join(attachment(&pod.0).file_name());
    std::fs::write(record(&pods[1]), "").expect("truncate");
    let partial = record(&pods[2]).with_extension("partial");
    std::fs::rename(record(&pods[2]), partial).expect("rename");
    bench.node = TempNs::new().expect("another kernel, as it were");

    let (again, restored) = Bench::restore(&bench.node, &bench.directory).await;
    bench.attachments = again;
    assert_eq!((restored.live.len(), restored.gone.len()), (0, 1));
    assert_eq!(std::fs::read_dir(&records).expect("records").count(), 0);
    assert_eq!(bench.attachments.used_addresses(), 0);
    for pod in &pods {
        let key = attachment(&pod.0);
        bench.attachments.del(&bench.endpoints, &key).await.expect("the runtime's DEL");
    }
}

/// Other nodes take whoever has an address for the pod that had it, until they hear of the change.
#[tokio::test]
async fn addresses_of_pods_that_are_gone_do_not_come_back_with_the_next_agent() {
    let Some(mut bench) = Bench::new(Counting::default()).await else { return };
    let mut given = HashSet::new();
    for lost in [false, false, true, false] {
        let pods: Vec<TempNs> = (0..3).filter_map(|_| TempNs::new()).collect();
        for pod in &pods {
            let attached = bench.add(pod).await.expect("add");
            let fresh = attached.addresses.iter().all(|pod| given.insert(pod.address));
            assert!(fresh, "{attached:?} after {given:?}");
        }
        let first = attachment(&pods[0].0);
        bench.attachments.del(&bench.endpoints, &first).await.expect("del");
        bench.node = TempNs::new().expect("another kernel, as it were");
        if lost {
            // It was not on the disk yet when the machine crashed.
            std::fs::write(bench.directory.join("next-addresses.json"), "").expect("truncate");
        } else {
            Bench::restore(&bench.node, &bench.directory).await;
        }
        (bench.attachments, _) = Bench::restore(&bench.node, &bench.directory).await;
    }
}
