//! The operator at work: who leads, pod networks of nodes, taints, and identities that nobody uses.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::Value;

use crate::harness::{Lab, PROGRAM, eventually, within};

/// Longer than a Lease lasts.
const TAKEOVER: std::time::Duration = std::time::Duration::from_secs(30);

/// A running operator; it ends with the test.
pub(crate) struct Operator(Child);

impl Operator {
    fn start(lab: &Lab, name: &str, port: u16) -> Self {
        Self::run(Command::new(Self::program()), &lab.kubeconfig(), name, port)
    }

    /// On the first node, in whose network it is.
    pub(crate) fn start_on_node(lab: &Lab, name: &str) -> Self {
        let mut command = Command::new(PROGRAM);
        command.args(["exec", "node1", "--"]).arg(Self::program());
        Self::run(command, &lab.node_kubeconfig(), name, 9963)
    }

    fn program() -> PathBuf {
        Path::new(PROGRAM).with_file_name("palisade-operator")
    }

    fn run(mut command: Command, kubeconfig: &Path, name: &str, port: u16) -> Self {
        let child = command
            .arg("--kubeconfig")
            .arg(kubeconfig)
            .args(["--identity", name, "--listen", &format!("127.0.0.1:{port}")])
            .args(["--ipam", "cluster-pool", "--identity-grace", "4s"])
            .args(["--agent-node-selector", r#"{"kubernetes.io/os":"linux"}"#])
            .args(["--pool-ipv4", "10.200.0.0/16", "--pool-ipv6", "fd00:200::/104"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    /// Whether it has ended by itself.
    pub(crate) fn ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn get(lab: &Lab, args: &[&str]) -> Option<Value> {
    let text = lab.try_kubectl(&[&["get", "-o", "json"], args].concat())?;
    Some(serde_json::from_str(&text).unwrap())
}

fn lease(lab: &Lab) -> Option<Value> {
    get(lab, &["-n", "kube-system", "lease", "palisade-operator"])
}

pub(crate) fn holder(lab: &Lab) -> Option<String> {
    Some(lease(lab)?["spec"]["holderIdentity"].as_str()?.to_owned())
}

/// How often the Lease changed hands.
pub(crate) fn transitions(lab: &Lab) -> Option<u64> {
    lease(lab)?["spec"]["leaseTransitions"].as_u64()
}

fn identity_of(lab: &Lab, pod: &str) -> u64 {
    let mut id = 0;
    eventually("the pod has an identity", || {
        let endpoint = get(lab, &["ciliumendpoint", pod]);
        id = endpoint.and_then(|it| it["status"]["identity"]["id"].as_u64()).unwrap_or_default();
        id >= 256
    });
    id
}

fn is_marked(lab: &Lab, id: u64) -> Option<bool> {
    let identity = get(lab, &["ciliumidentity", &id.to_string()])?;
    Some(identity["metadata"]["annotations"]["palisade.io/unused-since"].is_string())
}

/// What the operator takes for the agent of a node.
fn agent_pod(lab: &Lab, node: &str) {
    lab.apply(&format!(
        "apiVersion: v1\nkind: Pod\n\
         metadata: {{name: agent-{node}, namespace: kube-system, labels: {{k8s-app: palisade}}}}\n\
         spec:\n  nodeName: {node}\n  hostNetwork: true\n  containers:\n  - name: agent\n    \
         image: registry.k8s.io/pause\n"
    ));
}

fn tainted(lab: &Lab, node: &str) -> bool {
    let node = get(lab, &["node", node]).unwrap();
    let taints = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
    taints.iter().any(|taint| taint["key"] == "node.cilium.io/agent-not-ready")
}

pub(crate) fn networks(lab: &Lab, node: &str) -> Vec<String> {
    let node = get(lab, &["node", node]).unwrap();
    let networks = node["spec"]["podCIDRs"].as_array().cloned().unwrap_or_default();
    networks.iter().map(|it| it.as_str().unwrap().to_owned()).collect()
}

#[test]
fn one_operator_leads_and_another_follows_when_it_is_killed() {
    let lab = Lab::up(1);
    let mut first = Operator::start(&lab, "first", 19_963);
    eventually("the first one leads", || holder(&lab).as_deref() == Some("first"));
    let _second = Operator::start(&lab, "second", 19_964);

    // Nodes get networks that no other one has, of both families; those that have some keep them.
    let before = networks(&lab, "node1");
    let of_system = |name: &str, system: &str| {
        lab.apply(&format!(
            "apiVersion: v1\nkind: Node\n\
             metadata: {{name: {name}, labels: {{kubernetes.io/os: {system}}}}}\n\
             spec: {{taints: [{{key: node.cilium.io/agent-not-ready, effect: NoSchedule}}]}}\n"
        ));
    };
    let node = |name: &str| of_system(name, "linux");
    node("joined1");
    node("joined2");
    eventually("the nodes have networks", || {
        networks(&lab, "joined1").len() == 2 && networks(&lab, "joined2").len() == 2
    });
    let mut given = [networks(&lab, "joined1"), networks(&lab, "joined2")].concat();
    given.sort();
    assert_eq!(given, ["10.200.0.0/24", "10.200.1.0/24", "fd00:200::/120", "fd00:200::100/120"]);
    assert_eq!(networks(&lab, "node1"), before);

    // Nodes are tainted until their agent is ready, and again when it is gone.
    eventually("nodes without agent are tainted", || {
        tainted(&lab, "node1") && tainted(&lab, "joined1")
    });
    agent_pod(&lab, "node1");
    eventually("the taint goes", || !tainted(&lab, "node1"));
    assert!(tainted(&lab, "joined1"));

    first.kill();
    within(TAKEOVER, "the second one leads", || holder(&lab).as_deref() == Some("second"));
    node("joined3");
    eventually("the new leader gives networks", || {
        networks(&lab, "joined3") == ["10.200.2.0/24", "fd00:200::200/120"]
    });
    lab.kubectl(&["-n", "kube-system", "delete", "pod", "agent-node1", "--now"]);
    eventually("the new leader taints", || tainted(&lab, "node1"));

    // As the kubelet may register it, and no agent will ever run there.
    of_system("windows1", "windows");
    eventually("a node that gets no agent is not tainted", || !tainted(&lab, "windows1"));
}

#[test]
fn an_identity_is_collected_when_nobody_uses_it_and_never_before() {
    let lab = Lab::up(1);
    agent_pod(&lab, "node1");
    let _pods = lab.pods([("stays", 1), ("goes", 1)]);
    let (stays, goes) = (identity_of(&lab, "stays"), identity_of(&lab, "goes"));
    let _operator = Operator::start(&lab, "only", 19_965);

    lab.kubectl(&["delete", "pod", "goes", "--now"]);
    eventually("the identity is marked", || is_marked(&lab, goes) == Some(true));
    // Agents do not know it any more; a pod with its labels takes it back.
    let _pods = lab.pods([("goes", 1)]);
    assert_eq!(identity_of(&lab, "goes"), goes);
    eventually("the mark is gone", || is_marked(&lab, goes) == Some(false));

    // A mark on an identity in use, as one who errs would set it, does not last.
    let mark = "palisade.io/unused-since=2020-01-01T00:00:00Z";
    lab.kubectl(&["annotate", "ciliumidentity", &stays.to_string(), mark]);
    eventually("the mark is taken off", || is_marked(&lab, stays) == Some(false));

    lab.kubectl(&["delete", "pod", "goes", "--now"]);
    eventually("the identity is collected", || is_marked(&lab, goes).is_none());
    assert_eq!(is_marked(&lab, stays), Some(false));
    assert_eq!(identity_of(&lab, "stays"), stays);
}
