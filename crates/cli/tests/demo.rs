//! The demonstration on real clusters: it passes, it can fail, and it cleans up after itself.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Output, Stdio},
};

const PALISADE: &str = env!("CARGO_BIN_EXE_palisade");
/// Lets everybody land, and closes nothing.
const OPEN: &str = r#"{"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy",
    "metadata": {"name": "open", "namespace": "default"},
    "spec": {"endpointSelector": {}, "enableDefaultDeny": {"ingress": false},
        "ingress": [{"fromEntities": ["all"], "toPorts": [{
            "ports": [{"port": "80", "protocol": "TCP"}],
            "rules": {"http": [{"method": "POST", "path": "/v1/request-landing"}]}}]}]}}"#;

/// Held while a test has a lab: a machine has room for one.
fn only_lab() -> File {
    let lock = File::create("/run/palisade-test.lock").unwrap();
    lock.lock().unwrap();
    lock
}

fn palisade(args: &[&str]) -> Output {
    Command::new(PALISADE).args(args).current_dir(repository()).output().unwrap()
}

fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

fn text(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    format!("{}{}", String::from_utf8_lossy(out), String::from_utf8_lossy(err))
}

fn passes(nodes: &str) {
    let _lock = only_lab();
    let output = palisade(&["demo", "starwars", "--nodes", nodes]);
    let text = text(&output);
    assert!(output.status.success(), "{text}");
    assert!(!text.contains("FAIL"), "{text}");
    // Both ships nine times without a policy, then the tiefighter nine times under each.
    assert_eq!(text.matches("Ship landed").count(), 45, "{text}");
    // And nine times what it may not.
    assert_eq!(text.matches("Access denied").count(), 9, "{text}");
}

#[test]
fn passes_on_one_node() {
    passes("1");
}

#[test]
fn passes_on_three_nodes() {
    passes("3");
}

#[test]
fn fails_where_the_rebels_can_land() {
    let _lock = only_lab();
    let up = palisade(&["lab", "up"]);
    assert!(up.status.success(), "{}", text(&up));
    let mut apply = Command::new("kubectl")
        .args(["apply", "-f", "-"])
        .env("KUBECONFIG", "/run/palisade/lab/kubeconfig")
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    apply.stdin.take().unwrap().write_all(OPEN.as_bytes()).unwrap();
    assert!(apply.wait().unwrap().success());

    let refused = palisade(&["demo", "starwars"]);
    let demo = palisade(&["demo", "starwars", "--use-running"]);
    let down = palisade(&["lab", "down"]);

    assert_eq!(refused.status.code(), Some(1), "{}", text(&refused));
    assert!(text(&refused).contains("a lab is running already"), "{}", text(&refused));
    assert_eq!(demo.status.code(), Some(1), "{}", text(&demo));
    // The rebel's own step and eight ways to land, once with each policy; and with the last one
    // eight ways to be told of what may not be asked.
    assert_eq!(text(&demo).matches("FAIL").count(), 35, "{}", text(&demo));
    assert!(down.status.success(), "{}", text(&down));
}

#[test]
fn an_interrupt_takes_the_lab_down() {
    let _lock = only_lab();
    let mut demo = Command::new(PALISADE)
        .args(["demo", "starwars"])
        .current_dir(repository())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(demo.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("Step 1")));
    let pid = rustix::process::Pid::from_child(&demo);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    // Its output is read on, so that it can end.
    let rest: Vec<String> = lines.map_while(Result::ok).collect();
    assert_eq!(demo.wait().unwrap().code(), Some(1), "{rest:?}");
    assert!(rest.iter().any(|line| line == "The lab is down."), "{rest:?}");
    assert!(!Path::new("/run/palisade/lab/kubeconfig").exists());
}
