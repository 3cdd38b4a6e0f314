//! Every verb, with what runtimes and accidents do to it.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use palisade_lab::{nodes::Program, sys::netns};
use serde_json::{Value, json};

use super::{Container, Node, Traces, addresses, keep_away};
use crate::{
    harness::{Lab, Pod, eventually},
    probe::{self, Answer, Protocol, Target, allow_echo},
    traffic::{serve_echo_at, serve_echo_on},
};

fn start() -> (Lab, Node) {
    let lab = Lab::up(1);
    lab.pods([("shared", 1)]);
    lab.kubectl(&["-n", "kube-system", "rollout", "status", "deployment/kube-dns"]);
    let node = Node::new(&lab);
    (lab, node)
}

/// A container, and one that talks to it.
fn pair(node: &Node) -> [(Container<'_>, Value); 2] {
    ["one", "two"].map(|name| {
        let container = Container::new(node, name);
        let result = container.add();
        (container, result)
    })
}

fn every_version_gets_its_own_answer(node: &Node) {
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let container = Container::new(node, &format!("v{version}"));
        let outcome = container.run("ADD", json!({"cniVersion": version}));
        outcome.succeeded();
        let result = outcome.answer;
        assert_eq!(result["cniVersion"], version);
        let numbered = result["ips"][0]["version"] == "4" && result["ips"][1]["version"] == "6";
        assert_eq!(numbered, version.starts_with('0'), "{result}");
        assert_eq!(result["interfaces"][1]["mtu"].is_u64(), version == "1.1.0", "{result}");
        let check = json!({"cniVersion": version, "prevResult": result});
        match version {
            "0.3.1" => container.run("CHECK", check).refused(1, "CHECK does not exist"),
            _ => container.run("CHECK", check).succeeded(),
        }
        container.run("DEL", json!({"cniVersion": version, "prevResult": result})).succeeded();
    }
    let container = Container::new(node, "v9");
    for verb in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
        container.run(verb, json!({"cniVersion": "9.9.9"})).refused(1, "9.9.9");
    }
}

fn a_second_add_is_refused_and_the_first_stays(node: &Node) {
    let [(one, result), (two, other)] = pair(node);
    let before = node.traces();
    one.run("ADD", json!({})).refused(100, "exists already; DEL it first");
    assert_eq!(node.traces(), before);
    one.check(&result).succeeded();
    assert!(two.reaches(&addresses(&result)) && one.reaches(&addresses(&other)));
    one.check(&other).refused(7, "eth0 is not among them");

    // Somebody else's interface of that name.
    let taken = Container::new(node, "taken");
    taken.ip("link add eth0 type veth peer name other");
    taken.run("ADD", json!({})).refused(100, "eth0");
    taken.ip("link del eth0");
    assert_eq!(node.traces(), before);
    one.delete();
    two.delete();
}

/// Behind another plugin: what that one made is handed on.
fn a_chained_add_keeps_what_was_there(node: &Node) {
    let before = node.traces();
    let container = Container::new(node, "chained");
    let first = json!({"name": "other0", "mac": "02:00:00:00:00:09"});
    let dns = json!({"nameservers": ["192.0.2.1"]});
    let previous = json!({"cniVersion": "1.1.0", "interfaces": [first], "dns": dns});
    let outcome = container.run("ADD", json!({"prevResult": previous}));
    outcome.succeeded();
    let result = outcome.answer;
    assert_eq!((&result["interfaces"][0], &result["dns"]), (&first, &dns));
    assert_eq!(result["interfaces"][2]["name"], "eth0");
    let ours = |ip: &Value| ip["interface"] == 2;
    assert!(result["ips"].as_array().unwrap().iter().all(ours), "{result}");
    container.check(&result).succeeded();
    container.run("DEL", json!({"prevResult": result})).succeeded();
    assert_eq!(node.traces(), before);
}

fn wrong_parameters_change_nothing(node: &Node) {
    let before = node.traces();
    let container = Container::new(node, "wrong");
    let long = "i".repeat(201);
    for id in ["", "../x", "a/b", ".x", "a b", &long] {
        for verb in ["ADD", "DEL", "CHECK"] {
            container.run_with(verb, &[("CNI_CONTAINERID", id)]).refused(4, "CNI_CONTAINERID");
        }
    }
    for ifname in ["", "abcdefghijklmnop", "a/b", "lo", "..", "a b", "a:b"] {
        for verb in ["ADD", "DEL", "CHECK"] {
            container.run_with(verb, &[("CNI_IFNAME", ifname)]).refused(4, "CNI_IFNAME");
        }
    }
    for (netns, code) in
        [("", 4), ("/etc/hostname", 4), ("/run", 4), ("/proc/self/ns/mnt", 4), ("/run/none", 3)]
    {
        container.run_with("ADD", &[("CNI_NETNS", netns)]).refused(code, "CNI_NETNS");
    }
    let own = node.place.netns.to_str().unwrap();
    container.run_with("ADD", &[("CNI_NETNS", own)]).refused(4, "the node's own");
    container.run_with("ADD", &[("CNI_ARGS", "")]).refused(4, "CNI_ARGS");
    let nameless = [("CNI_ARGS", "K8S_POD_NAMESPACE=default")];
    container.run_with("ADD", &nameless).refused(4, "K8S_POD_NAME");
    container.run("ADD", json!({"type": "../../evil"})).refused(7, "type");
    container.run("ADD", json!({"name": "../x"})).refused(7, "name");
    let list = |id: &str, ifname: &str| {
        let valid = json!([{"containerID": id, "ifname": ifname}]);
        node.run("GC", json!({"cni.dev/valid-attachments": valid}))
    };
    for (id, ifname) in [("../x", "eth0"), ("a\0b", "eth0"), ("a", "lo"), ("a", "e\0")] {
        list(id, ifname).refused(7, "cni.dev/valid-attachments");
    }
    node.run("GC", json!({})).refused(7, "cni.dev/valid-attachments");
    assert_eq!(node.traces(), before);
}

fn a_deletion_succeeds_whatever_is_left(node: &Node) {
    let before = node.traces();
    let container = Container::new(node, "never");
    container.delete();

    let container = Container::new(node, "thrice");
    container.add();
    for _ in 0..3 {
        container.delete();
    }
    container.add();
    container.run_with("DEL", &[("CNI_NETNS", "")]).succeeded();

    let container = Container::new(node, "late");
    container.add();
    netns::remove(&container.id).unwrap();
    container.delete();
    netns::create(&container.id).unwrap();
    assert_eq!(node.traces(), before);
}

/// Half of fifty stay, and go on talking.
fn a_collection_removes_what_it_must_and_nothing_else(node: &Node) {
    let before = node.traces();
    let all: Vec<_> = (0..50)
        .map(|number| {
            let container = Container::new(node, &format!("g{number}"));
            let result = container.add();
            (container, result)
        })
        .collect();
    let full = node.traces();
    let (valid, stale) = all.split_at(25);
    let list = |containers: &[(Container<'_>, Value)]| {
        let entry = |(container, _): &(Container<'_>, Value)| json!({"containerID": container.id, "ifname": "eth0"});
        json!({"cni.dev/valid-attachments": containers.iter().map(entry).collect::<Vec<_>>()})
    };

    let mut of_another_network = list(&[]);
    of_another_network["name"] = json!("another");
    node.run("GC", of_another_network).succeeded();
    assert_eq!(node.traces(), full);

    node.run("GC", list(valid)).succeeded();
    let now = node.traces();
    assert_eq!(now.links.len() - before.links.len(), 25);
    assert_eq!(now.records.len() - before.records.len(), 25);
    for (index, (container, result)) in valid.iter().enumerate() {
        container.check(result).succeeded();
        let (_, next) = &valid[(index + 1) % 25];
        assert!(container.reaches(&addresses(next)), "{} does not reach {next}", container.id);
    }
    for (container, result) in stale {
        container.check(result).refused(3, "unknown");
    }
    node.run("GC", list(&[])).succeeded();
    assert_eq!(node.traces(), before);
}

/// What is sent the moment ADD has returned is not lost, either way.
fn the_first_packet_arrives(lab: &Lab, node: &Node) {
    const PORT: u16 = 4321;
    let host = lab.node(1);
    // At its addresses one by one: a datagram's answer comes from where it was asked.
    for address in host.addresses {
        serve_echo_at(&host, SocketAddr::new(address, PORT));
    }
    allow_echo(&host);
    for round in 0..20 {
        let container = Container::new(node, &format!("first{round}"));
        let unknown = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        let inside = Pod::in_network(netns::path(&container.id), unknown);
        serve_echo_on(&inside, PORT);
        allow_echo(&inside);
        let result = container.add();
        let all = |addresses: &[IpAddr]| -> Vec<Target> {
            let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Echo];
            let targets = addresses.iter().flat_map(|&address| {
                protocols.map(|protocol| Target { protocol, address, port: PORT })
            });
            targets.collect()
        };
        let probes = [
            probe::start(&host, all(&addresses(&result))),
            probe::start(&inside, all(&host.addresses)),
        ];
        for answers in probes.map(|probe| probe.join().unwrap().unwrap()) {
            assert_eq!(answers, [Answer::Open; 6], "round {round}");
        }
        container.delete();
    }
}

/// The API server answers nobody: what the agent knows is enough.
fn without_the_api_server_pods_come_and_go(lab: &Lab, node: &Node) {
    let before = node.traces();
    let suspended = lab.suspend();
    node.run("STATUS", json!({})).succeeded();
    let [(one, result), (two, other)] = pair(node);
    one.check(&result).succeeded();
    assert!(two.reaches(&addresses(&result)) && one.reaches(&addresses(&other)));
    one.delete();
    two.delete();
    assert_eq!(node.traces(), before);
    drop(suspended);
}

/// The agent is dead: what there is goes on, nothing comes, and what goes is remembered.
fn without_the_agent_pods_go(lab: &Lab, node: &Node) {
    let before = node.traces();
    let [(one, result), (two, other)] = pair(node);
    let suspended = lab.suspend();
    lab.kill(1, Program::Agent);
    let away = "the palisade agent does not answer at";
    eventually("the agent is dead", || !node.run("STATUS", json!({})).success);
    node.run("STATUS", json!({})).refused(50, away);
    one.check(&result).refused(11, away);
    node.run("GC", json!({"cni.dev/valid-attachments": []})).refused(11, away);
    let third = Container::new(node, "three");
    third.run("ADD", json!({})).refused(11, away);
    assert!(two.reaches(&addresses(&result)) && one.reaches(&addresses(&other)));
    one.delete();
    one.delete();
    third.delete();
    assert_eq!(node.traces().queue.len(), 2);
    drop(suspended);
    let only_two = |traces: &Traces| traces.links.len() == before.links.len() + 1;
    eventually("the next agent carries the deletion out", || {
        let traces = node.traces();
        only_two(&traces) && traces.queue.is_empty()
    });
    eventually("pods can come", || node.run("STATUS", json!({})).success);
    two.check(&other).succeeded();
    one.check(&result).refused(3, "unknown");
    // What was deleted may come again, and a pod that stayed is reached as before.
    let again = one.add();
    assert!(two.reaches(&addresses(&again)) && one.reaches(&addresses(&other)));
    two.delete();
    one.delete();
    assert_eq!(node.traces(), before);
}

/// A pod is cut off because nothing can be attached to its interface: the next one would be, too.
fn an_impaired_pod_is_told_of(node: &Node) {
    let before = node.traces();
    let [(one, result), (two, _)] = pair(node);
    let host = result["interfaces"][0]["name"].as_str().unwrap();
    let pin = node.place.pins.join(format!("from_pod-{host}"));
    keep_away(&pin);
    eventually("the node says so", || node.run("STATUS", json!({})).code() == Some(51));
    node.run("STATUS", json!({})).refused(51, "pod default/shared is cut off");
    one.check(&result).refused(101, &format!("the programs are not attached to {host}"));
    assert!(!two.reaches(&addresses(&result)[..1]) && !two.reaches(&addresses(&result)[1..]));
    fs::remove_dir(&pin).unwrap();
    eventually("it is repaired", || node.run("STATUS", json!({})).success);
    one.check(&result).succeeded();
    assert!(two.reaches(&addresses(&result)));
    one.delete();
    two.delete();
    assert_eq!(node.traces(), before);
}

#[test]
fn every_verb_as_runtimes_and_accidents_use_it() {
    let (lab, node) = start();
    every_version_gets_its_own_answer(&node);
    a_second_add_is_refused_and_the_first_stays(&node);
    a_chained_add_keeps_what_was_there(&node);
    wrong_parameters_change_nothing(&node);
    a_deletion_succeeds_whatever_is_left(&node);
    a_collection_removes_what_it_must_and_nothing_else(&node);
    an_impaired_pod_is_told_of(&node);
    the_first_packet_arrives(&lab, &node);
    without_the_api_server_pods_come_and_go(&lab, &node);
    without_the_agent_pods_go(&lab, &node);
}
