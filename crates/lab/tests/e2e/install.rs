//! `palisade install` and what follows it, against a real API server. Nothing here runs the
//! installed pods: the lab has no controller for DaemonSets, so the test says what they became.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use palisade_lab::nodes::Program;
use serde_json::Value;

use crate::harness::{Lab, PROGRAM, eventually, program, text};

fn palisade(lab: &Lab, args: &[&str]) -> Command {
    let program = Path::new(env!("CARGO_BIN_EXE_palisade-lab")).with_file_name("palisade");
    let mut command = Command::new(program);
    command.args(args).env("KUBECONFIG", lab.kubeconfig()).stdin(Stdio::null());
    command
}

pub(crate) fn run(lab: &Lab, args: &[&str]) -> (i32, String) {
    let Output { status, stdout, stderr } = palisade(lab, args).output().unwrap();
    let text = [stdout, stderr].concat();
    (status.code().unwrap(), String::from_utf8(text).unwrap())
}

#[track_caller]
pub(crate) fn succeeds(lab: &Lab, args: &[&str]) -> String {
    let (code, text) = run(lab, args);
    assert_eq!(code, 0, "palisade {}: {text}", args.join(" "));
    text
}

#[track_caller]
fn fails(lab: &Lab, args: &[&str], code: i32, why: &str) {
    let (found, text) = run(lab, args);
    assert_eq!(found, code, "palisade {}: {text}", args.join(" "));
    assert!(text.contains(why), "{text}");
}

/// What the controller of DaemonSets would say.
pub(crate) fn pretend(lab: &Lab, name: &str, desired: u32, ready: u32) {
    let path = "jsonpath={.metadata.generation}";
    let generation = lab.kubectl(&["-n", "kube-system", "get", "ds", name, "-o", path]);
    let status = format!(
        r#"{{"status": {{"observedGeneration": {generation}, "desiredNumberScheduled": {desired},
            "currentNumberScheduled": {desired}, "updatedNumberScheduled": {desired},
            "numberReady": {ready}, "numberAvailable": {ready}, "numberMisscheduled": 0}}}}"#
    );
    let args = ["patch", "ds", name, "--subresource=status", "--type=merge", "-p", &status];
    lab.kubectl(&[&["-n", "kube-system"], &args[..]].concat());
}

fn everything_of_ours(lab: &Lab) -> String {
    let kinds = "ds,deploy,pods,cm,sa,pdb,role,rolebinding,clusterrole,clusterrolebinding,ns";
    let label = "app.kubernetes.io/part-of=palisade";
    let objects = lab.kubectl(&["get", kinds, "-A", "-l", label, "-o", "name"]);
    let others = lab.kubectl(&["get", "crd,lease", "-A", "-o", "name"]);
    let others = others.lines().filter(|it| it.contains("cilium.io") || it.contains("palisade"));
    others.fold(objects, |all, name| format!("{all}{name}\n"))
}

/// Every object is one that the API server takes, without a field that it does not know.
fn check_strictly(lab: &Lab, manifest: &str) {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.tools/bin");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path: Vec<PathBuf> = std::iter::once(tools).chain(std::env::split_paths(&path)).collect();
    let mut child = Command::new("kubectl")
        .args(["apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-"])
        .env("PATH", std::env::join_paths(path).unwrap())
        .env("KUBECONFIG", lab.kubeconfig())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(manifest.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn what_is_installed_can_be_changed_and_leaves_nothing_behind() {
    let lab = Lab::up(1);

    // Before: what is wrong is said, and nothing is changed.
    fails(&lab, &["upgrade"], 4, "palisade install");
    fails(&lab, &["uninstall"], 4, "palisade install");
    fails(&lab, &["install", "--set", "config.ipam=dhcp"], 1, "config.ipam: \"dhcp\" is none of");
    fails(&lab, &["install", "--set", "confg.ipam=x"], 1, "confg: there is no such value");
    fails(&lab, &["install", "-n", "nowhere"], 4, "error: there is no namespace nowhere\n");
    fails(&lab, &["install", "--context", "other"], 1, "other");
    let manifest = succeeds(&lab, &["install", "--dry-run"]);
    // A dry run makes no namespace for the objects after it.
    lab.kubectl(&["create", "namespace", "palisade-secrets"]);
    check_strictly(&lab, &manifest);
    let adopts = "there is a namespace palisade-secrets already, which is not Palisade's";
    fails(&lab, &["install"], 1, adopts);
    lab.kubectl(&["label", "ns", "palisade-secrets", "app.kubernetes.io/part-of=palisade"]);
    let pool = |network: &str| {
        let network = format!("config.ipam=cluster-pool,config.pool-ipv4={network}");
        run(&lab, &["install", "--set", &network])
    };
    for (network, whose) in
        [("10.96.0.0/16", "Service kubernetes"), ("172.31.0.0/16", "node node1")]
    {
        let (code, text) = pool(network);
        assert!(code == 1 && text.contains(whose), "{network}: {text}");
    }
    let other = "apiVersion: apps/v1\nkind: DaemonSet\nmetadata: {name: kindnet}\nspec:\n  \
                 selector: {matchLabels: {a: b}}\n  template:\n    metadata: {labels: {a: b}}\n    \
                 spec: {containers: [{name: c, image: c}]}\n";
    lab.apply(other);
    fails(&lab, &["install"], 1, "another network: DaemonSet default/kindnet");
    lab.kubectl(&["delete", "ds", "kindnet"]);
    // As Helm marks what it made.
    lab.apply(
        "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\nmetadata:\n  \
         name: palisade-operator\n  labels: {app.kubernetes.io/managed-by: Helm}\n  annotations: \
         {meta.helm.sh/release-name: pal, meta.helm.sh/release-namespace: kube-system}\n\
         roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: x}\n\
         subjects: [{kind: ServiceAccount, name: palisade-operator, namespace: kube-system}]\n",
    );
    fails(
        &lab,
        &["install"],
        1,
        "Helm installed Palisade: release pal in the namespace kube-system",
    );
    assert!(lab.try_kubectl(&["-n", "kube-system", "get", "cm", "palisade-install"]).is_none());
    lab.kubectl(&["delete", "clusterrolebinding", "palisade-operator"]);
    // The lab's own definitions are there from the beginning.
    let before = everything_of_ours(&lab);
    assert!(!before.contains("daemonset") && !before.contains("clusterrole"), "{before}");

    let text = succeeds(&lab, &["install", "--set", "config.identity-grace=45m"]);
    assert!(text.contains("daemonset/palisade applied"), "{text}");
    fails(&lab, &["install"], 1, "Palisade is installed in the namespace kube-system");

    // A second one, which would take the rights of the first, is refused before it leaves a trace.
    lab.kubectl(&["create", "namespace", "other"]);
    let adopts = "there is a namespace other already, which is not Palisade's";
    fails(&lab, &["upgrade", "--set", "secrets.namespace=other"], 1, adopts);
    let only = "Palisade is installed in the namespace kube-system, and a cluster has only one";
    fails(&lab, &["install", "-n", "other"], 1, only);
    fails(
        &lab,
        &["uninstall", "-n", "other"],
        4,
        "did not install Palisade in the namespace other",
    );
    assert!(lab.try_kubectl(&["-n", "other", "get", "cm", "palisade-install"]).is_none());
    let path = "jsonpath={.subjects[0].namespace}";
    let holder = ["get", "clusterrolebinding", "palisade", "-o", path];
    assert_eq!(lab.kubectl(&holder), "kube-system");
    // Where there are two all the same, none takes what the other one uses.
    let second = r#"{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name":
        "palisade-install", "namespace": "other"}, "data": {"values": "{}", "version": "0",
        "objects": "[{\"apiVersion\": \"v1\", \"kind\": \"Namespace\", \"name\": \"palisade-secrets\"}]"}}"#;
    lab.apply(second);
    fails(
        &lab,
        &["upgrade", "-n", "other"],
        1,
        "Palisade is installed in the namespace kube-system",
    );
    let text = succeeds(&lab, &["uninstall", "-n", "other", "--delete-secrets"]);
    assert!(text.contains("palisade upgrade -n kube-system"), "{text}");
    lab.kubectl(&["delete", "namespace", "other"]);
    assert_eq!(
        lab.kubectl(&["get", "ns", "palisade-secrets", "-o", "jsonpath={.status.phase}"]),
        "Active"
    );
    assert!(succeeds(&lab, &["config", "view"]).contains("identity-grace: 45m"));

    // A changed setting is in the ConfigMap, and in a new version of the pods; others stay.
    let template = |lab: &Lab| {
        let path = "jsonpath={.spec.template}";
        lab.kubectl(&["-n", "kube-system", "get", "ds", "palisade", "-o", path])
    };
    let first = template(&lab);
    succeeds(&lab, &["config", "set", "log-level=debug"]);
    let path = "jsonpath={.data.log-level} {.data.identity-grace}";
    let config = ["-n", "kube-system", "get", "cm", "palisade-config", "-o", path];
    assert_eq!(lab.kubectl(&config), "debug 45m");
    assert_ne!(template(&lab), first);
    fails(&lab, &["config", "set", "log-level=loud"], 1, "config.log-level");
    cleaners_of_before_end_first(&lab);

    // An object that a new version has no more goes.
    let namespace = |name: &str| lab.try_kubectl(&["get", "namespace", name]).is_some();
    let secret = ["create", "secret", "generic", "token", "--from-literal=a=b", "-n"];
    lab.kubectl(&[&secret[..], &["palisade-secrets"]].concat());
    let elsewhere = ["upgrade", "--set", "secrets.namespace=elsewhere"];
    fails(&lab, &elsewhere, 1, "1 secrets would be lost with the namespace palisade-secrets");
    lab.kubectl(&["-n", "palisade-secrets", "delete", "secret", "token"]);
    succeeds(&lab, &elsewhere);
    assert!(namespace("elsewhere"));
    eventually("the old namespace goes", || !namespace("palisade-secrets"));

    // Status names what is wrong and where.
    pretend(&lab, "palisade", 2, 1);
    eventually("the operator's image is not there", || {
        let (code, text) = run(&lab, &["status"]);
        let problem = text.lines().any(|line| {
            let why = line.split_once("container operator: ").map_or("", |(_, why)| why);
            line.contains("palisade-operator-")
                && (why.starts_with("ErrImagePull") || why.starts_with("ImagePullBackOff"))
        });
        code == 1 && problem
    });
    let (_, text) = run(&lab, &["status", "--verbose"]);
    assert!(text.contains("Desired: 2, Ready: 1/2, Available: 1/2, Unavailable: 1/2"), "{text}");
    assert!(text.contains("Palisade:           1 not ready"), "{text}");
    let (_, json) = run(&lab, &["status", "-o", "json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["pod_state"]["palisade"]["Unavailable"], 1);
    assert_eq!(json["pod_state"]["palisade-operator"]["Desired"], 2);
    fails(&lab, &["upgrade", "--wait", "--wait-duration", "1"], 1, "does not run after 1 s");

    // Policies are not lost unasked.
    lab.apply(
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: mine}\n\
         spec: {endpointSelector: {}, ingress: [{}]}\n",
    );
    fails(&lab, &["uninstall"], 1, "1 ciliumnetworkpolicies would be lost");
    assert!(everything_of_ours(&lab).contains("daemonset.apps/palisade"));

    // Nor are Secrets.
    lab.kubectl(&[&secret[..], &["elsewhere"]].concat());
    let lost = "1 secrets would be lost with the namespace elsewhere";
    fails(&lab, &["uninstall", "--delete-policies"], 1, lost);
    let both = "palisade uninstall --delete-policies --delete-secrets";
    fails(&lab, &["uninstall", "--delete-policies"], 1, both);
    fails(&lab, &["uninstall", "--delete-secrets"], 1, both);
    assert!(everything_of_ours(&lab).contains("daemonset.apps/palisade"));

    lab.kubectl(&["taint", "node", "node1", "node.cilium.io/agent-not-ready=true:NoSchedule"]);
    // As the operator says it. What others say stays.
    let conditions = r#"{"status": {"conditions": [
        {"type": "NetworkUnavailable", "status": "False", "reason": "PalisadeIsUp"},
        {"type": "Other", "status": "False", "reason": "Somebody"}]}}"#;
    lab.kubectl(&["patch", "node", "node1", "--subresource=status", "-p", conditions]);
    let uninstall = palisade(&lab, &["uninstall", "--delete-policies", "--delete-secrets"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    eventually("nodes are cleaned", || {
        let cleaner = ["-n", "kube-system", "get", "ds", "palisade-clean"];
        lab.try_kubectl(&cleaner).is_some()
    });
    pretend(&lab, "palisade-clean", 1, 1);
    let Output { status, stderr, .. } = uninstall.wait_with_output().unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    let definitions = lab.kubectl(&["get", "crd", "-o", "name"]);
    assert!(!definitions.contains("cilium.io"), "{definitions}");
    eventually("nothing is left", || everything_of_ours(&lab).is_empty());
    let taints = lab.kubectl(&["get", "node", "node1", "-o", "jsonpath={.spec.taints}"]);
    assert!(!taints.contains("cilium"), "{taints}");
    let conditions = ["get", "node", "node1", "-o", "jsonpath={.status.conditions[*].reason}"];
    let conditions = lab.kubectl(&conditions);
    assert!(conditions.contains("Somebody"), "{conditions}");
    assert!(!conditions.contains("PalisadeIsUp"), "{conditions}");
}

/// An uninstallation that failed leaves what would wipe the nodes of the next installation.
fn cleaners_of_before_end_first(lab: &Lab) {
    let labels = "{app.kubernetes.io/part-of: palisade, k8s-app: palisade-clean}";
    lab.kubectl(&["create", "namespace", "before"]);
    for namespace in ["kube-system", "before"] {
        lab.apply(&format!(
            "apiVersion: apps/v1\nkind: DaemonSet\n\
             metadata: {{name: palisade-clean, namespace: {namespace}, labels: {labels}}}\n\
             spec:\n  selector: {{matchLabels: {{a: b}}}}\n  template:\n    \
             metadata: {{labels: {{a: b}}}}\n    spec: {{containers: [{{name: c, image: c}}]}}\n"
        ));
    }
    lab.apply(&format!(
        "apiVersion: v1\nkind: Pod\n\
         metadata: {{name: cleans, namespace: before, labels: {labels}, finalizers: [a.b/c]}}\n\
         spec: {{containers: [{{name: c, image: registry.k8s.io/pause}}]}}\n"
    ));
    let still = "after 1 s, pods that clean nodes are still there";
    fails(lab, &["upgrade", "--wait-duration", "1"], 1, still);
    let left = lab.kubectl(&["get", "ds", "-A", "-o", "name"]);
    assert!(!left.contains("palisade-clean"), "{left}");
    let free = r#"{"metadata": {"finalizers": null}}"#;
    lab.kubectl(&["-n", "before", "patch", "pod", "cleans", "--type=merge", "-p", free]);
    lab.kubectl(&["delete", "namespace", "before"]);
    succeeds(lab, &["upgrade"]);
}

#[test]
fn a_cleaned_node_has_its_settings_back() {
    const NAMES: [&str; 3] = ["tcp_early_demux", "udp_early_demux", "ip_local_reserved_ports"];
    let lab = Lab::up_with(1, &["--routing", "overlay"]);
    let node = lab.node(1);
    let settings = || {
        node.run(|| {
            let read = |name| fs::read_to_string(format!("/proc/sys/net/ipv4/{name}"));
            NAMES
                .iter()
                .map(|name| Ok(read(name)?.trim().to_owned()))
                .collect::<io::Result<Vec<_>>>()
        })
    };
    let routers = || {
        let show =
            ["exec", "node1", "--", "ip", "-o", "address", "show", "dev", "lo", "scope", "global"];
        text(&program(&show)).lines().filter(|line| line.contains("inet")).count()
    };
    let ours = ["0", "0", "49152-65535"];
    assert_eq!(settings(), ours);
    assert_eq!(routers(), 2);
    // An agent that finds them as it wants them forgets nothing.
    let records = lab.cni(1).records;
    let ready = || {
        let status = lab.statuses().pop()??;
        status.ready.then_some(status.pid)
    };
    let first = ready();
    lab.kill(1, Program::Agent);
    eventually("another agent is ready", || ready().is_some_and(|now| Some(now) != first));
    assert_eq!(settings(), ours);

    let suspended = lab.suspend();
    lab.kill(1, Program::Agent);
    let place = std::env::temp_dir().join(format!("palisade-clean-{}", std::process::id()));
    fs::create_dir_all(place.join("cni")).unwrap();
    fs::create_dir_all(place.join("state")).unwrap();
    symlink(records.parent().unwrap(), place.join("state/agent")).unwrap();
    let palisade = Path::new(PROGRAM).with_file_name("palisade");
    let directory = |flag: &str, path: &str| format!("--{flag}={}", place.join(path).display());
    let mut clean = Command::new(PROGRAM);
    clean.args(["exec", "node1", "--"]).arg(palisade).args(["node", "clean"]).args([
        directory("cni-bin-dir", "cni"),
        directory("cni-conf-dir", "cni"),
        directory("run-dir", "run"),
        directory("state-dir", "state"),
        directory("bpffs", "bpf"),
    ]);
    let Output { status, stderr, .. } = clean.output().unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    assert_eq!(settings(), ["1", "1", ""]);
    assert_eq!(routers(), 0);
    assert!(!place.join("state").exists());
    fs::remove_dir_all(place).unwrap();
    drop(suspended);
}
