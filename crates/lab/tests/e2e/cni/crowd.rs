//! Many plugins at once, plugins that die, and addresses that are given again.

use std::{
    collections::HashSet,
    net::IpAddr,
    os::unix::net::UnixStream,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use palisade_api::cni::{Add, Attachment, ContainerId, IfName, Operation, Pod, Request};
use palisade_lab::{nodes::Program, sys::netns};
use serde_json::{Value, json};

use super::{Container, Node, addresses};
use crate::harness::{Lab, eventually};

/// Plugins that run at the same time where it does not matter how many.
const WORKERS: usize = 12;
/// Plugins that are killed.
const KILLS: u64 = 40;
/// Containers that come at once, and how many of them go again. What stays fits into the node's 253
/// addresses beside the pods of the lab.
const COME: usize = 500;
const GO: usize = 250;
/// Agents that are killed, while so many workers attach so many containers one after the other.
const AGENTS: usize = 4;
const RESTLESS: usize = 4;
const ROUNDS: usize = 10;
/// How often an address goes from one container to the next.
const TURNS: usize = 10;

/// The addresses that containers have at a moment.
#[derive(Default)]
struct InUse(Mutex<HashSet<IpAddr>>);

impl InUse {
    fn add(&self, result: &Value) {
        let mut in_use = self.0.lock().unwrap();
        let twice = addresses(result).into_iter().find(|address| !in_use.insert(*address));
        assert_eq!(twice, None, "given to two containers");
    }

    /// DEL, before which nobody else may get the container's addresses.
    fn delete(&self, container: &Container<'_>, result: &Value) {
        let leaving = addresses(result);
        self.0.lock().unwrap().retain(|address| !leaving.contains(address));
        container.delete();
    }
}

/// All come at the same time, and some of them go again at once. What stays is as it should be.
fn come_and_go(node: &Node) -> Vec<(Container<'_>, Value)> {
    let in_use = InUse::default();
    let kept = Mutex::new(Vec::new());
    let times = Mutex::new(Vec::new());
    let begun = Instant::now();
    thread::scope(|scope| {
        for number in 0..COME {
            let (in_use, kept, times) = (&in_use, &kept, &times);
            scope.spawn(move || {
                let container = Container::new(node, &format!("c{number}"));
                let (result, took) = add_when_there_is_room(&container);
                in_use.add(&result);
                times.lock().unwrap().push(took);
                match number < GO {
                    true => in_use.delete(&container, &result),
                    false => kept.lock().unwrap().push((container, result)),
                }
            });
        }
    });
    let mut times = times.into_inner().unwrap();
    times.sort_unstable();
    println!(
        "{COME} ADD at once and {GO} DEL among them: {:.1} s, ADD p50 {:?}, p99 {:?}, slowest {:?}",
        begun.elapsed().as_secs_f32(),
        times[COME / 2],
        times[COME * 99 / 100],
        times[COME - 1],
    );
    kept.into_inner().unwrap()
}

/// As a runtime does: what may work later is tried again. Returns how long the one took that
/// worked.
fn add_when_there_is_room(container: &Container<'_>) -> (Value, Duration) {
    loop {
        let begun = Instant::now();
        let outcome = container.run("ADD", json!({}));
        if outcome.success {
            return (outcome.answer, begun.elapsed());
        }
        assert_eq!(outcome.code(), Some(11), "{}", outcome.answer);
    }
}

/// The last address goes to the next container while the one that had it leaves; what is asked
/// about the first one afterwards does not harm the second.
fn an_address_changes_hands(
    node: &Node,
    leaving: Vec<(Container<'_>, Value)>,
    other: &Container<'_>,
) {
    let mut stay = Vec::new();
    for (number, (old, before)) in leaving.into_iter().enumerate() {
        let new = Container::new(node, &format!("n{number}"));
        let after = thread::scope(|scope| {
            let leaves = scope.spawn(|| old.delete());
            let (after, _) = add_when_there_is_room(&new);
            leaves.join().unwrap();
            after
        });
        // The IPv6 range has room for ever: only the IPv4 address is the same.
        assert_eq!(addresses(&before)[0], addresses(&after)[0]);
        old.delete();
        old.run("CHECK", json!({"prevResult": before})).refused(3, "unknown");
        old.delete();
        new.check(&after).succeeded();
        assert!(other.reaches(&addresses(&after)));
        stay.push(new);
    }
    stay.iter().for_each(Container::delete);
}

/// A runtime that is killed with its plugin at any moment asks for DEL afterwards.
fn killed_plugins_leave_nothing(node: &Node) {
    let before = node.traces();
    let finished = AtomicUsize::new(0);
    thread::scope(|scope| {
        for worker in 0..4 {
            let finished = &finished;
            scope.spawn(move || {
                for round in 0..KILLS / 4 {
                    let container = Container::new(node, &format!("k{worker}-{round}"));
                    let mut plugin = container.start("ADD", json!({}));
                    thread::sleep(Duration::from_millis(round * 12 + worker));
                    plugin.kill().unwrap();
                    let status = plugin.wait().unwrap();
                    finished.fetch_add(status.success().into(), Relaxed);
                    container.delete();
                }
            });
        }
    });
    println!("{} of {KILLS} plugins were done before they were killed", finished.into_inner());
    // A plugin that was killed before it asked is answered, and undone, after the DEL.
    eventually("nothing is left of killed plugins", || node.traces() == before);
}

/// A plugin that died after it asked, and a runtime that does not know of it: nobody asks for DEL.
fn forsaken_requests_are_undone(node: &Node) {
    let before = node.traces();
    let containers: Vec<_> =
        (0..WORKERS).map(|number| Container::new(node, &format!("f{number}"))).collect();
    for container in &containers {
        let mut stream = UnixStream::connect(&node.place.socket).unwrap();
        let attachment = Attachment {
            container_id: ContainerId::try_from(container.id.clone()).unwrap(),
            ifname: IfName::try_from("eth0".to_owned()).unwrap(),
        };
        let pod = Pod { namespace: "default".into(), name: "shared".into(), uid: None };
        let netns = netns::path(&container.id);
        let add = Add { attachment, network: "test".into(), netns, pod };
        let request = Request { patience_ms: 30_000, operation: Operation::Add(add) };
        palisade_api::cni::write(&mut stream, &request).unwrap();
    }
    eventually("the agent has begun", || node.traces() != before);
    eventually("nothing is left of what nobody waits for", || node.traces() == before);
}

/// Agents are killed in the middle of whatever they do. As a runtime does: what failed is deleted
/// and tried again.
fn killed_agents_leave_nothing(lab: &Lab, node: &Node) {
    let before = node.traces();
    let (in_use, came) = (InUse::default(), AtomicUsize::new(0));
    let come_and_go = |worker: usize| {
        let mut last = None;
        for round in 0..ROUNDS {
            let container = Container::new(node, &format!("a{worker}-{round}"));
            let begun = Instant::now();
            let outcome = loop {
                let outcome = container.run("ADD", json!({}));
                if outcome.success {
                    break outcome;
                }
                assert!(begun.elapsed() < Duration::from_secs(60), "{}", outcome.answer);
                container.delete();
            };
            in_use.add(&outcome.answer);
            came.fetch_add(1, Relaxed);
            if let Some((last, result)) = last.replace((container, outcome.answer)) {
                in_use.delete(&last, &result);
            }
        }
        last.unwrap()
    };
    let stay: Vec<_> = thread::scope(|scope| {
        let come_and_go = &come_and_go;
        let workers: Vec<_> =
            (0..RESTLESS).map(|worker| scope.spawn(move || come_and_go(worker))).collect();
        for number in 0..AGENTS {
            let some = (2 * number + 1) * RESTLESS * ROUNDS / (2 * AGENTS);
            eventually("containers come", || came.load(Relaxed) >= some);
            lab.replace_agent(1);
        }
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    for (container, result) in &stay {
        container.check(result).succeeded();
        container.delete();
    }
    eventually("nothing is left of what agents were at", || node.traces() == before);
}

/// Interfaces vanish, and the agent is killed before anybody tells it.
fn what_vanished_before_a_restart_is_forgotten(lab: &Lab, node: &Node) {
    let before = node.traces();
    for number in 0..WORKERS {
        let container = Container::new(node, &format!("v{number}"));
        container.add();
    }
    eventually("the interfaces went with their namespaces", || node.traces().links == before.links);
    assert_ne!(node.traces().pins, before.pins);
    lab.kill(1, Program::Agent);
    eventually("the next agent finds nothing of them", || node.traces() == before);
}

/// Until there is none left; the error says where.
fn exhaust(node: &Node) -> Vec<(Container<'_>, Value)> {
    let extra = Mutex::new(Vec::new());
    let take = |worker| {
        for number in 0.. {
            let container = Container::new(node, &format!("x{worker}-{number}"));
            let outcome = container.run("ADD", json!({}));
            if outcome.success {
                extra.lock().unwrap().push((container, outcome.answer));
                continue;
            }
            for hint in ["node node1", "all 253 pod addresses of 10.244.1.0/24", "podCIDRs"] {
                outcome.refused(11, hint);
            }
            return;
        }
    };
    thread::scope(|scope| {
        for worker in 0..WORKERS {
            scope.spawn(move || take(worker));
        }
    });
    extra.into_inner().unwrap()
}

#[test]
fn the_plugin_many_times_at_once() {
    let lab = Lab::up(1);
    lab.pods([("shared", 1)]);
    let rollout = ["-n", "kube-system", "rollout", "status", "deployment/kube-dns"];
    lab.kubectl(&rollout);
    let node = Node::new(&lab);
    let empty = node.traces();
    node.run("STATUS", json!({})).succeeded();
    let held = || {
        let status = lab.statuses().pop().flatten().unwrap();
        (status.ipam, status.endpoints, status.problems)
    };
    let nothing = held();

    let mut kept = come_and_go(&node);
    let stay = COME - GO;
    let distinct: HashSet<IpAddr> = kept.iter().flat_map(|(_, result)| addresses(result)).collect();
    assert_eq!((kept.len(), distinct.len()), (stay, 2 * stay));
    let now = node.traces();
    assert_eq!(now.links.len() - empty.links.len(), stay);
    assert_eq!(now.records.len() - empty.records.len(), stay);
    assert_eq!(now.pins.len() - empty.pins.len(), 2 * stay);
    assert_eq!(now.entries.len() - empty.entries.len(), 3 * stay);
    for (container, result) in kept.iter().step_by(10) {
        container.check(result).succeeded();
    }

    kept.extend(exhaust(&node));
    node.run("STATUS", json!({})).refused(50, "node node1");
    let leaving = kept.split_off(kept.len() - TURNS);
    an_address_changes_hands(&node, leaving, &kept[0].0);
    node.run("STATUS", json!({})).succeeded();

    // The pods of the lab's own network are not looked at.
    node.run("GC", json!({"cni.dev/valid-attachments": []})).succeeded();
    assert_eq!(node.traces(), empty);
    drop(kept);

    killed_plugins_leave_nothing(&node);
    forsaken_requests_are_undone(&node);
    killed_agents_leave_nothing(&lab, &node);
    what_vanished_before_a_restart_is_forgotten(&lab, &node);
    let ready = || lab.statuses().iter().flatten().any(|status| status.ready);
    eventually("the agent is ready again", ready);
    // All addresses are there again.
    let again: Vec<_> = (0..3).map(|number| Container::new(&node, &format!("a{number}"))).collect();
    again.iter().for_each(|container| drop(container.add()));
    again.iter().for_each(Container::delete);
    assert_eq!(node.traces(), empty);
    assert_eq!(held(), nothing);
}
