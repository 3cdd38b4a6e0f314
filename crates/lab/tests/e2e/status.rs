//! `palisade status` of an installation. A pod stands in for that of the DaemonSet, and leads to the
//! agent of its node.

use std::path::Path;

use crate::{
    harness::{Lab, PROGRAM, within},
    install::{pretend, run, succeeds},
    silence::{CALM, NOTICED, Pulled},
};

pub(crate) fn stand_in(lab: &Lab) {
    let program = Path::new(PROGRAM).with_file_name("palisade");
    lab.apply(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: palisade-node1, namespace: kube-system, labels: {{k8s-app: palisade}}}}
spec:
  nodeName: node1
  hostNetwork: true
  containers:
  - name: agent
    image: docker.io/tgraf/netperf
    volumeMounts: [{{name: program, mountPath: /palisade}}, {{name: run, mountPath: /run/palisade}}]
  volumes:
  - {{name: program, hostPath: {{path: {}}}}}
  - {{name: run, hostPath: {{path: {}}}}}
",
        program.display(),
        lab.run_dir(1).display()
    ));
    lab.kubectl(&[
        "-n",
        "kube-system",
        "wait",
        "--for=condition=Ready",
        "pod/palisade-node1",
        "--timeout=60s",
    ]);
}

#[test]
fn agents_are_asked_how_they_are() {
    let lab = Lab::up(1);
    succeeds(&lab, &["install"]);
    pretend(&lab, "palisade", 1, 1);
    stand_in(&lab);
    let says = |what: &str| run(&lab, &["status"]).1.contains(what);
    let well = || says("Palisade:           OK");
    within(CALM, "the agent is well", well);

    // It may be ready, and its pods connected, while it hears of nothing new.
    let pulled = Pulled::out();
    within(NOTICED, "the agent cannot follow", || {
        let (code, text) = run(&lab, &["status"]);
        let error = |line: &str| line.contains("palisade-node1    ") && line.contains("kinds of");
        code == 1 && text.lines().any(error) && text.contains("Ready: 1/1")
    });
    drop(pulled);
    within(CALM, "the agent is well again", well);

    let suspended = lab.suspend_agent(1);
    assert!(says("palisade-node1    does not say how it is"));
    drop(suspended);
    within(CALM, "the agent answers again", well);
}
