//! The plugin as a runtime sees it: environment, standard input, standard output, exit code.
//! No agent runs here, so these are the answers that do not need one.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};

/// A directory that goes with this value; the agent's socket would be in it.
struct Home(PathBuf);

impl Home {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("plsd-plugin-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).expect("directory");
        Self(path)
    }

    fn config(&self) -> Value {
        json!({
            "cniVersion": "1.1.0",
            "name": "palisade",
            "type": "palisade-cni",
            "agentSocket": self.0.join("cni.sock"),
        })
    }

    fn queued(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.0.join("cni-deletions")) else { return Vec::new() };
        let name = |e: std::io::Result<fs::DirEntry>| {
            e.expect("entry").file_name().into_string().expect("text")
        };
        entries.map(name).collect()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Answer {
    success: bool,
    stdout: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).expect("stdout is JSON")
    }

    #[track_caller]
    fn refused(&self, code: u64, hint: &str) {
        assert!(!self.success, "{}", self.stdout);
        let error = self.json();
        assert_eq!(error["code"], code, "{error}");
        let text = format!("{} {}", error["msg"], error["details"]);
        assert!(text.contains(hint), "{hint:?} is not in {text}");
        assert!(error["cniVersion"].is_string(), "{error}");
    }

    #[track_caller]
    fn silent_success(&self) {
        assert!(self.success && self.stdout.is_empty(), "{}", self.stdout);
    }
}

/// A well-formed environment; a test changes what it is about.
const GOOD: [(&str, &str); 5] = [
    ("CNI_CONTAINERID", "abc123"),
    ("CNI_NETNS", "/proc/self/ns/net"),
    ("CNI_IFNAME", "eth0"),
    ("CNI_PATH", "/opt/cni/bin"),
    ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=x;K8S_POD_NAME=a"),
];

fn run(verb: &str, changes: &[(&str, Option<&str>)], input: &[u8]) -> Answer {
    run_as(Path::new(env!("CARGO_BIN_EXE_palisade-cni")), verb, changes, input)
}

fn run_as(program: &Path, verb: &str, changes: &[(&str, Option<&str>)], input: &[u8]) -> Answer {
    let mut command = Command::new(program);
    command.env_clear().env("CNI_COMMAND", verb).envs(GOOD);
    for (name, value) in changes {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn().expect("start the plugin");
    // A plugin that refuses its environment does not read its input.
    let _ = child.stdin.take().expect("stdin").write_all(input);
    let output = child.wait_with_output().expect("plugin");
    let stdout = String::from_utf8(output.stdout).expect("text");
    Answer { success: output.status.success(), stdout }
}

fn with(verb: &str, config: &Value) -> Answer {
    run(verb, &[], config.to_string().as_bytes())
}

#[test]
fn versions_are_negotiated() {
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let answer = with("VERSION", &json!({ "cniVersion": version }));
        assert!(answer.success);
        let expected = json!({
            "cniVersion": version,
            "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"],
        });
        assert_eq!(answer.json(), expected);
    }
    with("VERSION", &json!({ "cniVersion": "9.9.9" })).refused(1, "9.9.9");
}

#[test]
fn verbs_are_refused_in_versions_that_lack_them() {
    let home = Home::new();
    for (verb, version) in [("CHECK", "0.3.1"), ("GC", "1.0.0"), ("STATUS", "1.0.0")] {
        let mut config = home.config();
        config["cniVersion"] = json!(version);
        with(verb, &config).refused(1, verb);
    }
}

#[test]
fn a_missing_variable_is_named() {
    let home = Home::new();
    let config = home.config().to_string();
    for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH", "CNI_ARGS"] {
        for value in [None, Some("")] {
            run("ADD", &[(name, value)], config.as_bytes()).refused(4, name);
        }
    }
    run("ADD", &[("CNI_COMMAND", None)], config.as_bytes()).refused(4, "CNI_COMMAND");
    run("EXPLODE", &[], config.as_bytes()).refused(4, "EXPLODE");
}

#[test]
fn hostile_variables_are_refused() {
    let home = Home::new();
    let config = home.config().to_string();
    let long = "f".repeat(5000);
    for verb in ["ADD", "DEL", "CHECK"] {
        for id in ["../x", "/etc/passwd", "a/../../b", ".x", "a b", "a@b", &long] {
            run(verb, &[("CNI_CONTAINERID", Some(id))], config.as_bytes())
                .refused(4, "CNI_CONTAINERID");
        }
        for ifname in ["abcdefghijklmnop", "a/b", "lo", "..", "a b", "all"] {
            run(verb, &[("CNI_IFNAME", Some(ifname))], config.as_bytes()).refused(4, "CNI_IFNAME");
        }
    }
    for netns in ["/etc/hostname", "/", "/proc/self/environ"] {
        run("ADD", &[("CNI_NETNS", Some(netns))], config.as_bytes()).refused(4, "CNI_NETNS");
    }
    run("ADD", &[("CNI_NETNS", Some("/run/netns/plsd-none"))], config.as_bytes())
        .refused(3, "/run/netns/plsd-none");
    run("ADD", &[("CNI_ARGS", Some("K8S_POD_NAME=a"))], config.as_bytes())
        .refused(4, "K8S_POD_NAMESPACE");
    assert!(home.queued().is_empty(), "a refused deletion is not written down");
}

#[test]
fn input_that_is_no_configuration_is_refused() {
    for input in [&b""[..], b"{", b"[]", b"null", b"\xff\xfe", b"{\"name\":\"\\ud800\"}"] {
        run("ADD", &[], input).refused(6, "network configuration");
    }
    let huge = format!("{{\"name\":\"{}\"}}", "a".repeat(9 << 20));
    run("ADD", &[], huge.as_bytes()).refused(6, "network configuration");
    let deep = "[".repeat(100_000);
    run("ADD", &[], format!("{{\"a\":{deep}").as_bytes()).refused(6, "network configuration");
}

#[test]
fn a_wrong_configuration_names_its_field() {
    let home = Home::new();
    let wrong = [
        ("name", json!("../x")),
        ("name", json!(7)),
        ("type", json!("../../evil")),
        ("agentSocket", json!("relative.sock")),
        ("prevResult", json!([])),
        ("cniVersion", json!(1.1)),
    ];
    for (field, value) in wrong {
        let mut config = home.config();
        config[field] = value;
        with("ADD", &config).refused(7, field);
    }
    with("GC", &home.config()).refused(7, "cni.dev/valid-attachments");
    with("CHECK", &home.config()).refused(7, "prevResult");
}

#[test]
fn without_an_agent_the_runtime_is_told_to_try_again() {
    let home = Home::new();
    with("ADD", &home.config()).refused(11, "cni.sock");
    with("STATUS", &home.config()).refused(50, "cni.sock");
    let mut gc = home.config();
    gc["cni.dev/valid-attachments"] = json!([]);
    with("GC", &gc).refused(11, "cni.sock");
    // The socket of an agent that died is still there.
    drop(std::os::unix::net::UnixListener::bind(home.0.join("cni.sock")).expect("socket"));
    with("ADD", &home.config()).refused(11, "cni.sock");
    with("STATUS", &home.config()).refused(50, "cni.sock");
}

#[test]
fn deletions_wait_for_the_agent_and_may_be_repeated() {
    let home = Home::new();
    let config = home.config().to_string();
    let gone: [&[(&str, Option<&str>)]; 3] =
        [&[], &[("CNI_NETNS", None)], &[("CNI_NETNS", Some("/run/netns/plsd-none"))]];
    for changes in gone {
        run("DEL", changes, config.as_bytes()).silent_success();
        assert_eq!(home.queued(), ["abc123@eth0.json"]);
    }
    // A runtime that lost what ADD told it.
    for previous in [json!(null), json!({}), json!({ "cniVersion": "1.1.0" })] {
        let mut config = home.config();
        config["prevResult"] = previous;
        with("DEL", &config).silent_success();
    }
    assert_eq!(home.queued(), ["abc123@eth0.json"]);
    run("DEL", &[("CNI_IFNAME", Some("net1"))], config.as_bytes()).silent_success();
    assert_eq!(home.queued().len(), 2, "the second interface is another attachment");
    assert!(!Path::new(&home.0).join("cni.sock").exists());
}

/// A network namespace that goes with this value.
struct Netns(String);

impl Netns {
    fn new() -> Self {
        let name = format!("plsd-lo-{}", std::process::id());
        ip(&["netns", "add", &name]);
        Self(name)
    }

    fn lo_is_up(&self) -> bool {
        ip(&["-n", &self.0, "-o", "link", "show", "lo"]).contains("<LOOPBACK,UP")
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        ip(&["netns", "del", &self.0]);
    }
}

fn ip(args: &[&str]) -> String {
    let output = Command::new("ip").args(args).output().expect("ip");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn under_another_name_it_is_the_loopback_plugin() {
    let home = Home::new();
    let program = home.0.join("loopback");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_palisade-cni"), &program).expect("link");
    let netns = Netns::new();
    let path = format!("/run/netns/{}", netns.0);
    let place = [("CNI_NETNS", Some(path.as_str())), ("CNI_IFNAME", Some("lo"))];
    let config = json!({ "cniVersion": "0.4.0", "name": "cni-loopback", "type": "loopback" });
    let ask = |verb, config: &Value| run_as(&program, verb, &place, config.to_string().as_bytes());

    ask("CHECK", &config).refused(102, "lo is down");
    assert!(!netns.lo_is_up());
    let added = ask("ADD", &config);
    assert!(added.success && netns.lo_is_up(), "{}", added.stdout);
    let result = added.json();
    assert_eq!(result["cniVersion"], "0.4.0");
    assert_eq!(result["interfaces"][0]["sandbox"], path);
    assert_eq!(result["ips"][1], json!({ "address": "::1/128", "interface": 0, "version": "6" }));
    ask("CHECK", &config).silent_success();

    let mut second = config.clone();
    second["prevResult"] = json!({ "cniVersion": "0.4.0", "ips": [{ "address": "10.0.0.1/8" }] });
    assert_eq!(ask("ADD", &second).json()["ips"], second["prevResult"]["ips"]);
    ask("DEL", &config).silent_success();
    let gone = [("CNI_NETNS", None)];
    run_as(&program, "DEL", &gone, config.to_string().as_bytes()).silent_success();
    run_as(&program, "ADD", &gone, config.to_string().as_bytes()).refused(4, "CNI_NETNS");
    ask("VERSION", &json!({ "cniVersion": "9.9.9" })).refused(1, "9.9.9");
}
