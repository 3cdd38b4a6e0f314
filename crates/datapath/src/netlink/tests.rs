use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use super::*;

/// A network namespace that goes with this value.
struct TempNs(String);

impl TempNs {
    fn new(purpose: &str) -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("plsd-nl-{}-{purpose}{number}", std::process::id());
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let added = Command::new("ip").args(["netns", "add", &name]).status().ok()?;
        added.success().then_some(Self(name))
    }

    fn netlink(&self) -> Netlink {
        let netns = NetNs::open(format!("/run/netns/{}", self.0)).expect("namespace");
        Netlink::of(Arc::new(netns)).expect("netlink")
    }

    fn ip(&self, args: &str) -> String {
        Self::ip_in(&self.0, args)
    }

    fn ip_in(name: &str, args: &str) -> String {
        let output = Command::new("ip")
            .args(["-n", name])
            .args(args.split_whitespace())
            .output()
            .expect("run ip");
        String::from_utf8(output.stdout).expect("text")
    }

    fn ping(&self, target: &str) -> bool {
        let output = Command::new("ip")
            .args(["netns", "exec", &self.0, "ping", "-c1", "-W2", "-i0.2", target])
            .output()
            .expect("run ping");
        output.status.success()
    }
}

impl Drop for TempNs {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("address")
}

fn pair() -> VethPair {
    VethPair {
        host: "lxctest".into(),
        host_mac: [2, 0, 0, 0, 0, 1],
        pod: "eth0".into(),
        pod_mac: [2, 0, 0, 0, 0, 2],
        mtu: 1400,
    }
}

fn pod_link(host: Link) -> PodLink {
    let v4 = PodAddress { address: ip("10.244.9.7"), router: ip("10.244.9.1") };
    let v6 = PodAddress { address: ip("fd44:0:0:9::7"), router: ip("fe80::1") };
    let VethPair { host_mac, pod, pod_mac, .. } = pair();
    PodLink { host, host_mac, pod, pod_mac, addresses: vec![v4, v6], alias: "a pod".into() }
}

#[tokio::test]
async fn a_pod_interface_carries_packets_both_ways() {
    let (Some(node), Some(pod)) = (TempNs::new("node"), TempNs::new("pod")) else { return };
    let (node_nl, pod_nl) = (node.netlink(), pod.netlink());
    node_nl.prepare_node(false, |_| ()).await.expect("prepare");
    let routers = [ip("10.244.9.1"), ip("fd44:0:0:9::1")];
    node_nl.add_router_addresses(&routers).await.expect("routers");
    node_nl.add_router_addresses(&routers).await.expect("again");

    let start = Instant::now();
    let host = node_nl.create_veth(pair(), pod_nl.netns()).await.expect("create");
    assert!(!host.up && host.mtu == 1400 && host.mac == Some([2, 0, 0, 0, 0, 1]), "{host:?}");
    node_nl.configure_pod(&pod_link(host.clone()), &pod_nl).await.expect("configure");
    println!("pod interface set up in {:?}", start.elapsed());
    let link = node_nl.link("lxctest").await.expect("get").expect("exists");
    assert!(link.up && link.running, "{link:?}");
    let way = pod.ip("-6 route get fd44:0:0:9::7");
    assert!(way.starts_with("local"), "{way}");
    node_nl.configure_pod(&pod_link(host.clone()), &pod_nl).await.expect("idempotent");

    assert!(pod.ping("10.244.9.1") && pod.ping("fd44:0:0:9::1") && node.ping("10.244.9.7"));
    assert!(node.ping("fd44:0:0:9::7"));
    let addresses = pod.ip("addr show dev eth0");
    assert!(addresses.contains("10.244.9.7/32") && addresses.contains("fd44:0:0:9::7/128"));
    assert!(!addresses.contains("fe80") && !addresses.contains("tentative"), "{addresses}");
    let neighbours = pod.ip("neigh show dev eth0");
    assert_eq!(neighbours.matches("PERMANENT").count(), 2, "{neighbours}");
    let routes = pod_nl.routes().await.expect("routes");
    assert!(routes.iter().any(|r| r.gateway == Some(ip("10.244.9.1")) && r.onlink && r.ours));
    assert_eq!(link.alias.as_deref(), Some("a pod"));

    node_nl.set_down(link.ifindex, "closed").await.expect("down");
    let closed = node_nl.link("lxctest").await.expect("get").expect("exists");
    assert!(!closed.up && closed.alias.as_deref() == Some("closed"), "{closed:?}");
    assert!(!pod.ping("10.244.9.1") && !node.ping("fd44:0:0:9::7"));
    node_nl.configure_host_side(pod_link(host.clone()).host_side()).await.expect("open");
    assert!(pod.ping("10.244.9.1") && pod.ping("fd44:0:0:9::1"));
    assert!(node.ping("10.244.9.7") && node.ping("fd44:0:0:9::7"));

    let again = node_nl.create_veth(pair(), pod_nl.netns()).await.expect_err("must exist");
    assert!(again.is_exists(), "{again}");
    assert!(node_nl.delete_link("lxctest").await.expect("delete"));
    assert!(!node_nl.delete_link("lxctest").await.expect("idempotent"));
    assert!(pod_nl.link("eth0").await.expect("get").is_none());
}

#[tokio::test]
async fn routes_to_other_nodes_are_replaced_and_removed() {
    let Some(node) = TempNs::new("routes") else { return };
    let nl = node.netlink();
    node.ip("link add eth0 type veth peer name eth1");
    node.ip("link set eth0 up");
    node.ip("link set eth1 up");
    node.ip("addr add 172.31.255.1/24 dev eth0");
    node.ip("addr add fd31::1/64 dev eth0 nodad");
    let routes = [
        Route::via("10.244.2.0/24".parse().expect("net"), ip("172.31.255.2")),
        Route::via("fd44:0:0:2::/64".parse().expect("net"), ip("fd31::2")),
    ];
    nl.replace_routes(&routes).await.expect("add");
    nl.replace_routes(&routes).await.expect("again");
    let moved = Route::via("10.244.2.0/24".parse().expect("net"), ip("172.31.255.3"));
    nl.replace_routes(&[moved]).await.expect("replace");
    let ours: Vec<_> = nl.routes().await.expect("list").into_iter().filter(|r| r.ours).collect();
    assert_eq!(ours.len(), 2, "{ours:?}");
    assert!(ours.iter().any(|r| r.gateway == Some(ip("172.31.255.3"))));
    nl.delete_routes(&[moved, routes[1]]).await.expect("delete");
    nl.delete_routes(&[moved, routes[1]]).await.expect("idempotent");
    assert!(!nl.routes().await.expect("list").iter().any(|r| r.ours));
}

/// A dump must be complete although interfaces come and go and the receive buffer is tiny.
#[tokio::test]
async fn dumps_are_complete_under_churn() {
    let Some(node) = TempNs::new("churn") else { return };
    let nl = node.netlink();
    for index in 0..30 {
        node.ip(&format!("link add stable{index} type veth peer name stableb{index}"));
    }
    let netns = Arc::clone(nl.netns());
    let churn = thread::spawn(move || {
        netns.run(|| {
            for _ in 0..40 {
                for verb in ["add", "del"] {
                    let mut ip = Command::new("ip");
                    ip.args(["link", verb, "flap"]);
                    if verb == "add" {
                        ip.args(["type", "veth"]);
                    }
                    let _ = ip.status();
                }
            }
        })
    });
    while !churn.is_finished() {
        let links = nl
            .run(|socket| {
                socket.set_receive_buffer(4096).map_err(NetlinkError::Enter)?;
                socket.dump("list interfaces", &message::all_links())
            })
            .await
            .expect("dump");
        let stable = links.iter().filter_map(new_link).filter(|l| l.name.starts_with("stable"));
        assert_eq!(stable.count(), 60);
    }
    churn.join().expect("thread").expect("namespace");
}

/// The answer to a question may be older than what is told before it arrives.
#[tokio::test]
async fn what_is_told_during_a_question_is_not_missed() {
    let Some(node) = TempNs::new("news") else { return };
    let name = node.0.clone();
    let wait = move |_: &mut socket::Socket| {
        let mut answers = 0;
        let begun = Instant::now();
        socket::Socket::wait_until(socket::News::Links, "wait for a link", |socket| {
            answers += 1;
            if answers == 1 {
                TempNs::ip_in(&name, "link add late type veth peer name later");
            }
            socket.dump("list interfaces", &message::all_links())?;
            Ok(answers > 1)
        })?;
        Ok(begun.elapsed())
    };
    let waited = node.netlink().run(wait).await.expect("told");
    assert!(waited < socket::SILENCE, "{waited:?}");
}

#[test]
fn what_is_not_a_network_namespace_is_refused() {
    let missing = NetNs::open("/run/netns/plsd-no-such").expect_err("missing");
    assert!(matches!(missing, NamespaceError::NotFound(_)));
    let regular = NetNs::open("/etc/hostname").expect_err("regular");
    assert!(matches!(regular, NamespaceError::WrongKind(_)));
}
