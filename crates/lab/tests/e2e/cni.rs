//! The plugin as a runtime runs it, many times at once, against a live agent.

use std::{
    collections::{BTreeSet, HashSet},
    fs,
    io::Write,
    net::IpAddr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use palisade_api::cni::{Add, Attachment, ContainerId, IfName, Operation, Pod, Request};
use palisade_lab::sys::netns;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::harness::{CniPlace, Lab, eventually};

/// Plugins that run at the same time.
const WORKERS: usize = 12;
/// Containers that come, and of those that go again while others come. What stays fits into the
/// node's 253 addresses beside the pods of the lab.
const COME: usize = 500;
const GO: usize = 250;
/// Plugins that are killed.
const KILLS: u64 = 40;

/// A container of a runtime of our own: a network namespace, and requests about it in the name of
/// the pod `shared`.
struct Container<'a> {
    node: &'a Node,
    id: String,
}

struct Outcome {
    success: bool,
    answer: Value,
}

impl Outcome {
    fn code(&self) -> Option<u64> {
        self.answer["code"].as_u64()
    }
}

impl<'a> Container<'a> {
    fn new(node: &'a Node, name: &str) -> Self {
        let id = format!("palisade-test-{name}");
        netns::create(&id).unwrap();
        Self { node, id }
    }

    fn start(&self, command: &str, extra: Value) -> Child {
        self.node.start(command, &self.id, extra)
    }

    fn run(&self, command: &str, extra: Value) -> Outcome {
        finish(self.start(command, extra))
    }

    /// Attaches the container; the plugin's result.
    fn add(&self) -> Value {
        let outcome = self.run("ADD", json!({}));
        assert!(outcome.success, "{}: {}", self.id, outcome.answer);
        outcome.answer
    }

    fn delete(&self) {
        let outcome = self.run("DEL", json!({}));
        assert!(outcome.success, "{}: {}", self.id, outcome.answer);
    }

    fn check(&self, result: &Value) -> Outcome {
        self.run("CHECK", json!({"prevResult": result}))
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        netns::remove(&self.id).unwrap();
    }
}

/// The node whose agent is asked.
struct Node {
    plugin: PathBuf,
    place: CniPlace,
}

/// All traces of pods on a node.
#[derive(Debug, PartialEq, Eq)]
struct Traces {
    links: BTreeSet<String>,
    routes: BTreeSet<String>,
    pins: BTreeSet<String>,
    records: BTreeSet<String>,
    queue: BTreeSet<String>,
}

impl Node {
    fn new(lab: &Lab) -> Self {
        let lab_program = Path::new(env!("CARGO_BIN_EXE_palisade-lab"));
        Self { plugin: lab_program.with_file_name("palisade-cni"), place: lab.cni(1) }
    }

    fn start(&self, command: &str, id: &str, extra: Value) -> Child {
        let mut configuration = json!({
            "cniVersion": "1.1.0",
            "name": "test",
            "type": "palisade-cni",
            "agentSocket": self.place.socket,
        });
        let extra = extra.as_object().cloned().unwrap_or_default();
        configuration.as_object_mut().unwrap().extend(extra);
        let mut child = Command::new(&self.plugin)
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", netns::path(id))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", self.plugin.parent().unwrap())
            .env("CNI_ARGS", "K8S_POD_NAMESPACE=default;K8S_POD_NAME=shared")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(configuration.to_string().as_bytes()).unwrap();
        child
    }

    fn run(&self, command: &str, extra: Value) -> Outcome {
        finish(self.start(command, "", extra))
    }

    fn traces(&self) -> Traces {
        let files = |path: &Path| -> BTreeSet<String> {
            let Ok(entries) = fs::read_dir(path) else { return BTreeSet::new() };
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        };
        let lines = |arguments: &'static str| -> BTreeSet<String> {
            let output = netns::run_in(&self.place.netns, move || {
                Command::new("ip").args(arguments.split(' ')).output()
            });
            let text = String::from_utf8(output.unwrap().stdout).unwrap();
            text.lines().filter(|line| line.contains("lxc")).map(str::to_owned).collect()
        };
        let mut routes = lines("-4 route show table all");
        routes.extend(lines("-6 route show table all"));
        Traces {
            links: lines("-o -br link"),
            routes,
            pins: files(&self.place.pins),
            records: files(&self.place.records),
            queue: files(&palisade_api::cni::deletion_queue(&self.place.socket)),
        }
    }
}

fn finish(child: Child) -> Outcome {
    let output = child.wait_with_output().unwrap();
    let answer = serde_json::from_slice(&output.stdout).unwrap_or_default();
    Outcome { success: output.status.success(), answer }
}

fn addresses(result: &Value) -> Vec<IpAddr> {
    let ips = result["ips"].as_array().unwrap().iter();
    ips.map(|ip| ip["address"].as_str().unwrap().split('/').next().unwrap().parse().unwrap())
        .collect()
}

/// What is to be done with container `number`.
enum Job {
    Keep(usize),
    ComeAndGo(usize),
}

/// Containers that go come first and those that stay last, so that the addresses suffice.
fn jobs() -> Vec<Job> {
    let going = (0..GO).map(Job::ComeAndGo);
    let mut staying = (GO..COME).map(Job::Keep);
    let mut jobs = Vec::new();
    for (index, job) in going.enumerate() {
        jobs.push(job);
        if index >= 2 * WORKERS {
            jobs.extend(staying.next());
        }
    }
    jobs.extend(staying);
    jobs.reverse();
    jobs
}

/// 500 come and 250 of them go, several at a time. What stays is as it should be, and checked.
fn come_and_go(node: &Node) -> Vec<(Container<'_>, Value)> {
    let jobs = Mutex::new(jobs());
    let kept = Mutex::new(Vec::new());
    let longest = Mutex::new(Duration::ZERO);
    let begun = Instant::now();
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                loop {
                    let Some(job) = jobs.lock().unwrap().pop() else { break };
                    let (Job::Keep(number) | Job::ComeAndGo(number)) = job;
                    let container = Container::new(node, &format!("c{number}"));
                    let added = Instant::now();
                    let result = container.add();
                    let mut longest = longest.lock().unwrap();
                    *longest = longest.max(added.elapsed());
                    drop(longest);
                    match job {
                        Job::Keep(_) => kept.lock().unwrap().push((container, result)),
                        Job::ComeAndGo(_) => container.delete(),
                    }
                }
            });
        }
    });
    println!(
        "{COME} ADD and {GO} DEL, {WORKERS} at a time: {:.1} s, slowest ADD {:?}",
        begun.elapsed().as_secs_f32(),
        longest.lock().unwrap()
    );
    kept.into_inner().unwrap()
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

/// Interfaces vanish, and the agent is killed before anybody tells it.
fn what_vanished_before_a_restart_is_forgotten(lab: &Lab, node: &Node) {
    let before = node.traces();
    for number in 0..WORKERS {
        let container = Container::new(node, &format!("v{number}"));
        container.add();
    }
    eventually("the interfaces went with their namespaces", || node.traces().links == before.links);
    assert_ne!(node.traces().pins, before.pins);
    let status = lab.statuses().pop().flatten().unwrap();
    let pid = Pid::from_raw(i32::try_from(status.pid).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    eventually("the next agent finds nothing of them", || node.traces() == before);
}

/// Until there is none left; the error says where.
fn exhaust<'a>(node: &'a Node) -> Vec<Container<'a>> {
    let mut extra = Vec::new();
    loop {
        let container = Container::new(node, &format!("x{}", extra.len()));
        let outcome = container.run("ADD", json!({}));
        if outcome.success {
            extra.push(container);
            assert!(extra.len() < 20, "more than there are");
            continue;
        }
        let message = outcome.answer["msg"].as_str().unwrap();
        assert_eq!(outcome.code(), Some(11), "try again later");
        for hint in ["node node1", "all 253 pod addresses of 10.244.1.0/24", "podCIDRs"] {
            assert!(message.contains(hint), "{message:?} does not say {hint:?}");
        }
        return extra;
    }
}

#[test]
fn the_plugin_many_times_at_once() {
    let lab = Lab::up(1);
    lab.pods([("shared", 1)]);
    let rollout = ["-n", "kube-system", "rollout", "status", "deployment/kube-dns"];
    lab.kubectl(&rollout);
    let node = Node::new(&lab);
    let empty = node.traces();
    assert!(node.run("STATUS", json!({})).success);

    let kept = come_and_go(&node);
    let distinct: HashSet<IpAddr> = kept.iter().flat_map(|(_, result)| addresses(result)).collect();
    assert_eq!((kept.len(), distinct.len()), (COME - GO, 2 * (COME - GO)));
    let now = node.traces();
    assert_eq!(now.links.len() - empty.links.len(), COME - GO);
    assert_eq!(now.records.len() - empty.records.len(), COME - GO);
    assert_eq!(now.pins.len() - empty.pins.len(), 2 * (COME - GO));
    for (container, result) in kept.iter().step_by(10) {
        let outcome = container.check(result);
        assert!(outcome.success, "{}", outcome.answer);
    }
    let (first, other) = (&kept[0], &kept[1]);
    assert!(!first.0.check(&other.1).success, "CHECK with another's result");
    assert_eq!(first.0.run("ADD", json!({})).code(), Some(100), "ADD twice");

    let extra = exhaust(&node);
    let status = node.run("STATUS", json!({}));
    assert_eq!(status.code(), Some(50), "{}", status.answer);
    assert!(status.answer["msg"].as_str().unwrap().contains("node node1"));
    extra.iter().for_each(Container::delete);
    assert!(node.run("STATUS", json!({})).success);

    // Everything but one goes; the pods of the lab's own network are not looked at.
    let valid = json!([{"containerID": kept[0].0.id, "ifname": "eth0"}]);
    let collected = node.run("GC", json!({"cni.dev/valid-attachments": valid}));
    assert!(collected.success, "{}", collected.answer);
    let now = node.traces();
    assert_eq!(now.links.len() - empty.links.len(), 1);
    assert!(kept[0].0.check(&kept[0].1).success);
    assert!(!kept[1].0.check(&kept[1].1).success);
    assert!(!node.run("GC", json!({})).success, "GC without a list");
    for (container, _) in &kept {
        container.delete();
        container.delete();
    }
    assert_eq!(node.traces(), empty);

    killed_plugins_leave_nothing(&node);
    forsaken_requests_are_undone(&node);
    what_vanished_before_a_restart_is_forgotten(&lab, &node);
    let ready = || lab.statuses().iter().flatten().any(|status| status.ready);
    eventually("the agent is ready again", ready);
    // All addresses are there again.
    let again: Vec<_> = (0..3).map(|number| Container::new(&node, &format!("a{number}"))).collect();
    again.iter().for_each(|container| drop(container.add()));
    again.iter().for_each(Container::delete);
    assert_eq!(node.traces(), empty);
}
