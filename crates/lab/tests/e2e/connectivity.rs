//! `palisade connectivity test` and `palisade sysdump` on a lab: the tests pass, and they can fail.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;

use crate::harness::Lab;

pub(crate) fn palisade(lab: &Lab, args: &[&str]) -> (i32, String) {
    palisade_in(Path::new("."), lab, args)
}

fn palisade_in(directory: &Path, lab: &Lab, args: &[&str]) -> (i32, String) {
    let program = Path::new(env!("CARGO_BIN_EXE_palisade-lab")).with_file_name("palisade");
    let mut command = Command::new(program);
    command.args(args).current_dir(directory).env("KUBECONFIG", lab.kubeconfig());
    let Output { status, stdout, stderr } = command.output().unwrap();
    (status.code().unwrap(), String::from_utf8([stdout, stderr].concat()).unwrap())
}

fn scratch(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("palisade-{name}-{}", std::process::id()))
}

#[test]
fn connectivity_is_as_policies_say_and_a_policy_too_many_is_noticed() {
    let lab = Lab::up(2);
    let results = scratch("results");
    let junit = results.to_str().unwrap();
    let (code, text) = palisade(&lab, &["connectivity", "test", "--junit-file", junit]);
    assert_eq!(code, 0, "{text}");
    let xml = fs::read_to_string(&results).unwrap();
    assert!(xml.contains("failures=\"0\""), "{xml}");
    fs::remove_file(&results).unwrap();
    assert!(lab.try_kubectl(&["get", "namespace", "palisade-test-1"]).is_none());

    // Somebody's policy closes what the tests take for open.
    lab.apply_cilium_policy(
        "",
        "stranger",
        "spec:\n  endpointSelector: {matchLabels: {other: client}}\n  \
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

    // A dump holds what one looks for, and no secret.
    lab.kubectl(&["create", "secret", "generic", "mine", "--from-literal=key=do-not-tell"]);
    let directory = scratch("sysdump");
    let (code, text) =
        palisade(&lab, &["sysdump", "--output-directory", directory.to_str().unwrap()]);
    assert_eq!(code, 0, "{text}");
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
