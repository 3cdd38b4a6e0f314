//! `palisade connectivity test` and `palisade sysdump` on a lab: the tests pass, and they can fail.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal};
use serde_json::{Value, json};

use crate::{
    harness::{Lab, Outside, within},
    traffic::serve_echo,
};

fn program() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_palisade-lab")).with_file_name("palisade")
}

pub(crate) fn palisade(lab: &Lab, args: &[&str]) -> (i32, String) {
    palisade_in(Path::new("."), lab, args)
}

fn palisade_in(directory: &Path, lab: &Lab, args: &[&str]) -> (i32, String) {
    let mut command = Command::new(program());
    command.args(args).current_dir(directory).env("KUBECONFIG", lab.kubeconfig());
    let Output { status, stdout, stderr } = command.output().unwrap();
    (status.code().unwrap(), String::from_utf8([stdout, stderr].concat()).unwrap())
}

/// Somebody outside the cluster, for the cluster's DNS.
const OUTSIDE: &str = "
apiVersion: v1
kind: Service
metadata: {name: outside}
spec:
  clusterIP: None
  ipFamilyPolicy: PreferDualStack
  ports: [{port: 80}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: outside-v4, labels: {kubernetes.io/service-name: outside}}
addressType: IPv4
ports: [{port: 80}]
endpoints: [{addresses: [172.31.255.200]}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: outside-v6, labels: {kubernetes.io/service-name: outside}}
addressType: IPv6
ports: [{port: 80}]
endpoints: [{addresses: ['fd31::200']}]
";

fn scratch(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("palisade-{name}-{}", std::process::id()))
}

/// What `make test-cluster` runs: the lab is a cluster that a kubeconfig leads to.
#[test]
fn the_tests_of_a_cluster_pass_on_a_lab() {
    let lab = Lab::up(2);
    let outside = Outside::new(&lab);
    serve_echo(&outside.pod);
    lab.apply(OUTSIDE);
    let results = scratch("results");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::iter::once(root.join(".tools/bin")).chain(std::env::split_paths(&path));
    let mut tests = Command::new(root.join("scripts/test-cluster.sh"));
    tests
        .args(["--external-target", "outside.default.svc.cluster.local", "--external-port", "80"])
        .args(["--external-ip", "172.31.255.200,fd31::200", "--junit-file"])
        .arg(&results)
        .env("PATH", std::env::join_paths(path).unwrap())
        .env("PALISADE", program())
        .env("KUBECONFIG", lab.kubeconfig());
    let Output { status, stdout, stderr } = tests.output().unwrap();
    let text = String::from_utf8([stdout, stderr].concat()).unwrap();
    assert!(status.success(), "{text}");
    assert!(text.contains("skipped: nobody bound the role"), "{text}");
    let xml = fs::read_to_string(&results).unwrap();
    assert!(xml.contains("failures=\"0\" errors=\"0\" skipped=\"0\""), "{xml}\n{text}");
    fs::remove_file(&results).unwrap();
    for namespace in ["palisade-test-1", "palisade-starwars"] {
        assert!(lab.try_kubectl(&["get", "namespace", namespace]).is_none(), "{text}");
    }
}

#[test]
fn interrupted_tests_say_what_was_seen_and_take_away_what_they_made() {
    let lab = Lab::up(1);
    let two = "^(all-ingress-deny-knp|clusterwide-ingress)$";
    let results = scratch("interrupted");
    let tests = Command::new(program())
        .args(["connectivity", "test", "--test-concurrency", "1", "--test", two, "--junit-file"])
        .arg(&results)
        .env("KUBECONFIG", lab.kubeconfig())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let policy = ["get", "ciliumclusterwidenetworkpolicy", "palisade-test-1-ingress"];
    // The whole first test comes before it.
    within(Duration::from_secs(120), "the policy is there", || lab.try_kubectl(&policy).is_some());
    let process = Pid::from_raw(tests.id().try_into().unwrap()).unwrap();
    rustix::process::kill_process(process, Signal::INT).unwrap();
    let Output { status, stdout, stderr } = tests.wait_with_output().unwrap();
    let [table, said] = [stdout, stderr].map(|text| String::from_utf8(text).unwrap());
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("error: interrupted"), "{said}");
    let result = |test: &str| {
        let row = table.lines().find(|line| line.starts_with(test)).expect(test);
        row[test.len()..].trim_start().split("  ").next().unwrap().to_owned()
    };
    assert_eq!(result("all-ingress-deny-knp"), "passed", "{table}");
    assert_eq!(result("clusterwide-ingress"), "not run", "{table}");
    assert!(table.contains("1 passed, 0 failed, 0 skipped, 1 not run"), "{table}");
    let xml = fs::read_to_string(&results).unwrap();
    fs::remove_file(&results).unwrap();
    assert!(xml.contains("tests=\"3\" failures=\"0\" errors=\"2\" skipped=\"0\""), "{xml}");
    assert!(xml.contains("<error message=\"interrupted\"/>"), "{xml}");
    assert!(lab.try_kubectl(&policy).is_none(), "{said}");
    assert!(lab.try_kubectl(&["get", "namespace", "palisade-test-1"]).is_none(), "{said}");
}

#[test]
fn a_policy_too_many_is_noticed() {
    let lab = Lab::up(2);
    // Somebody's policy closes what the tests take for open.
    lab.apply_cilium_policy(
        "",
        "stranger",
        "spec:\n  endpointSelector: {matchLabels: {other: client}}\n  \
         enableDefaultDeny: {egress: false}\n  \
         egressDeny: [{toEndpoints: [{matchLabels: {kind: echo}}]}]",
    );
    let only = "^(all-ingress-deny-knp|echo-ingress|cluster-entity)$";
    let only = ["connectivity", "test", "--test", only, "--test-concurrency", "1"];
    let dumps = scratch("dumps");
    fs::create_dir(&dumps).unwrap();
    let dump = [&only[..], &["--collect-sysdump-on-failure"]].concat();
    let (code, text) = palisade_in(&dumps, &lab, &dump);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("OK    all-ingress-deny-knp"), "{text}");
    let missed = "client2 → echo-same-node (10.";
    assert!(text.contains(missed) && text.contains("did not get through (TIMEOUT)"), "{text}");
    assert!(!text.contains("client1 →"), "{text}");
    // What the first failing test worked on is in the only dump.
    let taken: Vec<PathBuf> =
        fs::read_dir(&dumps).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(taken.len(), 1, "{text}");
    let held =
        |name: &str, what: &str| fs::read_to_string(taken[0].join(name)).unwrap().contains(what);
    assert!(held("pods.json", "echo-same-node"), "{text}");
    assert!(held("ciliumnetworkpolicies.json", "echo-ingress"), "{text}");
    assert!(!held("ciliumnetworkpolicies.json", "cluster-entity"), "{text}");
    fs::remove_dir_all(dumps).unwrap();
    let (code, text) = palisade(&lab, &["connectivity", "test", "--test", "nothing"]);
    assert_eq!(code, 4, "{text}");
    // Without somebody outside nobody is asked there, and it is said.
    let world = ["connectivity", "test", "--test", "^to-(cidr-external|fqdns)$"];
    let (code, text) = palisade(&lab, &world);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("to-cidr-external: no address outside the cluster is given"), "{text}");
    assert!(text.contains("to-fqdns: no name outside the cluster is given"), "{text}");

    // A dump holds what one looks for, and no secret.
    lab.kubectl(&["create", "secret", "generic", "mine", "--from-literal=key=do-not-tell"]);
    let directory = scratch("sysdump");
    let (code, text) = palisade(
        &lab,
        &["sysdump", "-o", "json", "--output-directory", directory.to_str().unwrap()],
    );
    assert_eq!(code, 0, "{text}");
    let told: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(told, json!({ "directory": directory, "errors": [] }));
    let read = |name: &str| fs::read_to_string(directory.join(name)).unwrap();
    assert_eq!(read("errors.txt").trim(), "");
    assert!(read("ciliumclusterwidenetworkpolicies.json").contains("stranger"));
    let agent: Value = serde_json::from_str(&read("agent-node1.json")).unwrap();
    assert!(agent["tables"]["policies"].to_string().contains("stranger"));
    for entry in fs::read_dir(&directory).unwrap() {
        let text = fs::read_to_string(entry.unwrap().path()).unwrap();
        assert!(!text.contains("do-not-tell") && !text.contains("ZG8tbm90LXRlbGw="));
    }
    fs::remove_dir_all(directory).unwrap();
}
