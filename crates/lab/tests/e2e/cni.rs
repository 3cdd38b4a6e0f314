//! The plugin as a runtime runs it, against a live agent.

mod crowd;
mod differences;
mod verbs;

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use aya::maps::{HashMap, Map, MapData};
use palisade_lab::sys::netns;
use serde_json::{Value, json};

use super::harness::{CniPlace, Lab};

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

    /// It failed with this code, and says what is wrong.
    #[track_caller]
    fn refused(&self, code: u64, hint: &str) {
        assert_eq!((self.success, self.code()), (false, Some(code)), "{}", self.answer);
        let message = self.answer["msg"].as_str().unwrap();
        assert!(message.contains(hint), "{message:?} does not say {hint:?}");
    }

    #[track_caller]
    fn succeeded(&self) {
        assert!(self.success, "{}", self.answer);
    }
}

impl<'a> Container<'a> {
    fn new(node: &'a Node, name: &str) -> Self {
        let id = format!("palisade-test-{name}");
        netns::create(&id).unwrap();
        Self { node, id }
    }

    fn start(&self, command: &str, extra: Value) -> Child {
        self.node.start(command, &self.id, &[], extra)
    }

    fn run(&self, command: &str, extra: Value) -> Outcome {
        finish(self.start(command, extra))
    }

    /// With other variables than usual.
    fn run_with(&self, command: &str, variables: &[(&str, &str)]) -> Outcome {
        finish(self.node.start(command, &self.id, variables, json!({})))
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

    /// Runs `ip` inside.
    fn ip(&self, arguments: &str) {
        ip_in(&netns::path(&self.id), arguments);
    }

    /// Whether each of these addresses answers from inside.
    fn reaches(&self, addresses: &[IpAddr]) -> bool {
        addresses.iter().all(|address| {
            let target = address.to_string();
            let ping = move || {
                let arguments = ["-n", "-c1", "-W1", &target];
                Command::new("ping").args(arguments).stdout(Stdio::null()).status()
            };
            netns::run_in(&netns::path(&self.id), ping).unwrap().success()
        })
    }
}

/// Detaches a program, and keeps the next one from being attached. The pin is all that keeps a
/// program (the kernel lets go of it a little later), and a directory takes the place of the pin.
fn keep_away(pin: &Path) {
    fs::remove_file(pin).unwrap();
    fs::create_dir(pin).unwrap();
}

fn ip_in(netns: &Path, arguments: &str) {
    let words: Vec<String> = arguments.split(' ').map(str::to_owned).collect();
    let output = netns::run_in(netns, move || Command::new("ip").args(words).output()).unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
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
    /// Keys in the kernel's tables of pods' addresses and interfaces.
    entries: BTreeSet<Vec<u8>>,
    records: BTreeSet<String>,
    queue: BTreeSet<String>,
}

impl Node {
    fn new(lab: &Lab) -> Self {
        let lab_program = Path::new(env!("CARGO_BIN_EXE_palisade-lab"));
        Self { plugin: lab_program.with_file_name("palisade-cni"), place: lab.cni(1) }
    }

    fn start(&self, command: &str, id: &str, variables: &[(&str, &str)], extra: Value) -> Child {
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
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // A plugin that refuses its variables does not read its configuration.
        let _ = child.stdin.take().unwrap().write_all(configuration.to_string().as_bytes());
        child
    }

    fn run(&self, command: &str, extra: Value) -> Outcome {
        finish(self.start(command, "", &[], extra))
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
        let mut entries = keys::<16, 16>(&self.place.maps.join("ENDPOINTS"));
        entries.extend(keys::<4, 4>(&self.place.maps.join("INTERFACES")));
        let mut routes = lines("-4 route show table all");
        routes.extend(lines("-6 route show table all"));
        Traces {
            links: lines("-o -br link"),
            routes,
            pins: files(&self.place.pins),
            entries,
            records: files(&self.place.records),
            queue: files(&palisade_api::cni::deletion_queue(&self.place.socket)),
        }
    }
}

/// A pinned table of these sizes.
fn open<const K: usize, const V: usize>(pin: &Path) -> HashMap<MapData, [u8; K], [u8; V]> {
    HashMap::try_from(Map::HashMap(MapData::from_pin(pin).unwrap())).unwrap()
}

/// The keys in such a table, but for those that go meanwhile.
fn keys<const K: usize, const V: usize>(pin: &Path) -> BTreeSet<Vec<u8>> {
    open::<K, V>(pin).keys().flatten().map(Vec::from).collect()
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
