//! Labs that come up again with what they had, and those that cannot come up.

use std::{
    fs::{self, File},
    net::TcpListener,
    os::{fd::AsRawFd, unix::process::CommandExt},
    path::Path,
    process::Command,
};

use super::harness::{Lab, eventually, lock, program, text};

const PODS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: near}
spec:
  nodeName: node1
  containers: [{name: main, image: docker.io/library/busybox, command: [sleep, infinity]}]
---
apiVersion: v1
kind: Pod
metadata: {name: far}
spec:
  nodeName: node2
  containers: [{name: main, image: docker.io/library/busybox, command: [sleep, infinity]}]
---
apiVersion: v1
kind: Pod
metadata: {name: done}
spec:
  nodeName: node1
  restartPolicy: Never
  containers: [{name: main, image: docker.io/library/busybox, command: ['true']}]
";

/// Where a condition is true, the pods run.
fn nothing_is_said_too_early(lab: &Lab) {
    let ready = "-o=jsonpath={.status.conditions[?(@.type=='Ready')].status}";
    for pod in ["near", "far"] {
        if lab.kubectl(&["get", "pod", pod, "--ignore-not-found", ready]) == "True" {
            lab.kubectl(&["exec", pod, "--", "true"]);
        }
    }
}

#[test]
fn a_cluster_outlives_its_lab() {
    let data = std::env::temp_dir().join(format!("palisade-data-{}", std::process::id()));
    let keep = ["--data", data.to_str().unwrap()];
    let mut lab = Lab::up_with(2, &keep);
    lab.apply(PODS);
    lab.kubectl(&["wait", "--for=condition=Ready", "pod/near", "pod/far"]);
    lab.kubectl(&["wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/done"]);
    let spec = "{podSelector: {}, policyTypes: [Ingress]}";
    lab.apply_policy("default", "closed", spec);
    let uids = "-o=jsonpath={.items[*].metadata.uid}";
    let objects = ["get", "pods,networkpolicies,namespaces", uids];
    let before = lab.kubectl(&objects);

    lab.crash();
    lab.up_again(2, &keep);
    nothing_is_said_too_early(&lab);
    assert_eq!(lab.kubectl(&objects), before);
    lab.kubectl(&["wait", "--for=condition=Ready", "pod/near", "pod/far"]);
    lab.kubectl(&["exec", "near", "--", "true"]);
    lab.await_policies(1);

    // A smaller cluster has lost a node, and what ran there.
    assert!(program(&["down"]).status.success());
    lab.up_again(1, &keep);
    nothing_is_said_too_early(&lab);
    assert_eq!(lab.kubectl(&["get", "nodes", "-o", "name"]), "node/node1\n");
    eventually("the other node's pod is gone", || {
        lab.kubectl(&["get", "pods", "-o", "name"]) == "pod/done\npod/near\n"
    });
    lab.kubectl(&["wait", "--for=condition=Ready", "pod/near"]);
    drop(lab);
    fs::remove_dir_all(data).unwrap();
}

#[test]
fn one_lab_is_enough() {
    let lab = Lab::up(1);
    let again = program(&["up"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again).contains("a lab is running already"), "{}", text(&again));
    assert!(program(&["status"]).status.success());
    lab.kubectl(&["get", "nodes"]);
}

#[test]
fn what_hinders_a_lab_is_named_and_leaves_nothing_behind() {
    let _lock = lock();
    let file = std::env::temp_dir().join(format!("palisade-file-{}", std::process::id()));
    File::create(&file).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let cases = [
        (vec!["up", "--data", file.to_str().unwrap()], "this is no directory"),
        (vec!["up", "--data", "/proc/nothing"], "--data: cannot create /proc/nothing"),
        (vec!["up", "--api-port", &port], "choose another --api-port"),
        (vec!["exec", "node1", "--", "true"], "there is no node"),
    ];
    for (arguments, reason) in cases {
        let refused = program(&arguments);
        assert_eq!(refused.status.code(), Some(1), "{arguments:?}: {}", text(&refused));
        assert!(text(&refused).contains(reason), "{arguments:?}: {}", text(&refused));
        assert!(!Path::new("/run/palisade").exists(), "{arguments:?}");
    }
    for arguments in [["status"], ["kubeconfig"]] {
        let refused = program(&arguments);
        assert_eq!(refused.status.code(), Some(3), "{arguments:?}: {}", text(&refused));
        assert!(text(&refused).contains("palisade lab up"), "{arguments:?}: {}", text(&refused));
    }
    for nodes in ["0", "65", "some"] {
        let refused = program(&["up", "--nodes", nodes]);
        assert_eq!(refused.status.code(), Some(2), "{nodes}: {}", text(&refused));
    }
    fs::remove_file(file).unwrap();
}

#[test]
fn labs_are_for_root() {
    let lab = Lab::up(1);
    // The program's directory may be closed to others.
    let opened = File::open(env!("CARGO_BIN_EXE_palisade-lab")).unwrap();
    let path = format!("/proc/self/fd/{}", opened.as_raw_fd());
    for arguments in [["up"], ["down"], ["status"], ["kubeconfig"]] {
        let mut command = Command::new(&path);
        let refused = command.args(arguments).uid(65534).gid(65534).output().unwrap();
        assert_eq!(refused.status.code(), Some(1), "{arguments:?}: {}", text(&refused));
        assert!(text(&refused).contains("root"), "{arguments:?}: {}", text(&refused));
    }
    lab.kubectl(&["get", "nodes"]);
}

#[test]
fn every_answer_is_there_for_programs() {
    let lock = lock();
    let json = |arguments: &[&str]| -> serde_json::Value {
        let output = program(arguments);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output)))
    };
    let up = json(&["up", "-o", "json"]);
    assert_eq!(up["running"], true);
    assert_eq!(json(&["kubeconfig", "-o", "json"])["kubeconfig"], up["kubeconfig"]);
    assert_eq!(json(&["-o", "json", "status"])["nodes"][0]["ready"], true);
    assert_eq!(json(&["down", "-o", "json"])["running"], false);
    assert_eq!(json(&["status", "-o", "json"])["running"], false);
    drop(lock);
}
