use super::*;
use crate::cluster::ClusterPod;

pub(in super::super) fn status(node: &str) -> Status {
    Status {
        version: "0.1.0".to_owned(),
        node: node.to_owned(),
        cluster: "default".to_owned(),
        ready: true,
        ready_after_ms: Some(80),
        uptime_seconds: 1,
        pid: 7,
        inputs: Vec::new(),
        policy_revision: 1,
        problems: Vec::new(),
        endpoints: 1,
        endpoints_not_ready: 0,
        pods: Some(BTreeMap::new()),
        identities: 2,
        policies: 0,
        policies_refused: 0,
        policies_last_good: 0,
        services: 1,
        addresses: Vec::new(),
        pod_cidrs: Vec::new(),
        ipam: Vec::new(),
        remote_nodes: 0,
        l7_proxy: true,
    }
}

fn endpoint(pod: &str) -> Endpoint {
    Endpoint {
        id: 2,
        namespace: "default".to_owned(),
        pod: pod.to_owned(),
        container_id: "c".to_owned(),
        state: "ready".to_owned(),
        identity: 1000,
        labels: Vec::new(),
        ipv4: None,
        ipv6: None,
        interface: "lxc0".to_owned(),
        row: 2,
        ingress_enforced: false,
        egress_enforced: false,
        policy_revision: 1,
    }
}

fn agent(node: &str, pods: &[&str]) -> AgentState {
    let endpoints = pods.iter().map(|pod| endpoint(pod)).collect();
    AgentState { name: node.to_owned(), answer: Ok((status(node), endpoints)) }
}

fn cluster(nodes: &[&str], pods: &[&str]) -> Cluster {
    Cluster {
        version: "v1.37.1".to_owned(),
        nodes: nodes.iter().map(|&node| node.to_owned()).collect(),
        pods: pods.iter().map(|pod| (format!("default/{pod}"), ClusterPod::default())).collect(),
        endpoints: Ok(BTreeSet::new()),
        without_network: Vec::new(),
        installation: None,
    }
}

#[test]
fn a_healthy_cluster_is_ok_and_counts_its_pods() {
    let agents = vec![agent("node1", &["a", "b"]), agent("node2", &["c"])];
    let report = Report::new(agents, Ok(cluster(&["node1", "node2"], &["a", "b", "c"])));
    assert!(report.ok());
    let text = report.text();
    assert!(text.contains("Palisade:           OK\n"), "{text}");
    assert!(text.contains("Desired: 2, Ready: 2/2, Available: 2/2\n"), "{text}");
    assert!(text.contains("Cluster Pods:          3/3 managed by Palisade\n"), "{text}");
    assert!(text.contains("palisade-agent:v0.1.0: 2\n"), "{text}");
    assert!(!text.contains("Errors:"), "{text}");
}

#[test]
fn nothing_is_said_of_an_operator_that_nobody_can_tell_of() {
    let operator = |cluster| {
        let text = Report::new(vec![agent("node1", &[])], cluster).text();
        let line = text.lines().find(|line| line.contains("Operator:")).unwrap().to_owned();
        line.split("Operator:").nth(1).unwrap().trim().to_owned()
    };
    assert_eq!(operator(Ok(cluster(&["node1"], &[]))), "disabled");
    assert!(operator(Err("away".into())).starts_with("unknown"));
}

#[test]
fn a_node_without_an_agent_is_an_error() {
    let report = Report::new(vec![agent("node1", &[])], Ok(cluster(&["node1", "node2"], &[])));
    assert!(!report.ok());
    assert!(report.text().contains("Unavailable: 1/2"), "{}", report.text());
    assert_eq!(report.json()["pod_state"]["palisade"]["Unavailable"], 1);
}

#[test]
fn a_pod_that_no_agent_manages_makes_it_not_ok() {
    let report = Report::new(vec![agent("node1", &["a"])], Ok(cluster(&["node1"], &["a", "b"])));
    assert!(!report.ok());
    assert_eq!(report.json()["pods_count"], json!({ "all": 2, "by_cilium": 1 }));
}

#[test]
fn an_agent_that_is_not_ready_says_what_it_waits_for() {
    let mut waiting = status("node1");
    waiting.ready = false;
    waiting.inputs.push(palisade_api::admin::Input {
        kind: "Pod".to_owned(),
        complete: false,
        objects: 0,
        error: None,
    });
    let agents = vec![AgentState { name: "node1".to_owned(), answer: Ok((waiting, Vec::new())) }];
    let report = Report::new(agents, Ok(cluster(&["node1"], &[])));
    assert!(report.text().contains("node1    not ready: Pod"), "{}", report.text());
}

#[test]
fn objects_that_cannot_be_read_are_not_taken_for_none() {
    let mut cluster = cluster(&["node1"], &["a"]);
    cluster.endpoints = Err("429 Too Many Requests".to_owned());
    let report = Report::new(vec![agent("node1", &["a"])], Ok(cluster));
    let why = "CiliumEndpoints: 429 Too Many Requests";
    assert_eq!(report.collection_errors(), [why]);
    assert!(report.text().contains(why) && report.ok(), "the agents know best");
}

#[test]
fn nothing_at_all_is_told_apart_from_something_wrong() {
    assert!(Report::new(Vec::new(), Err("refused".to_owned())).nothing_there());
    assert!(!Report::new(Vec::new(), Ok(cluster(&[], &[]))).nothing_there());
}

#[test]
fn one_cause_is_one_error() {
    let mut cut_off = status("node1");
    for kind in ["Pod", "Node", "Service", "Namespace"] {
        cut_off.inputs.push(palisade_api::admin::Input {
            kind: kind.to_owned(),
            complete: true,
            objects: 1,
            error: Some("connection refused".to_owned()),
        });
    }
    let agents = vec![AgentState { name: "node1".to_owned(), answer: Ok((cut_off, Vec::new())) }];
    let text = Report::new(agents, Err("refused".to_owned())).text();
    assert!(text.contains("1 errors, 0 warnings"), "{text}");
    assert!(text.contains("4 kinds of objects (Pod, Node, …): connection refused"), "{text}");
}

#[test]
fn refused_policies_are_told_by_what_is_in_force_and_once() {
    let agents = |stand: [usize; 2]| {
        let agents = ["node1", "node2"].into_iter().zip(stand).map(|(node, stand)| {
            let status = Status { policies_refused: 2, policies_last_good: stand, ..status(node) };
            AgentState { name: node.to_owned(), answer: Ok((status, Vec::new())) }
        });
        Report::new(agents.collect(), Ok(cluster(&["node1", "node2"], &[])))
    };
    let locked = "refused and their subjects locked down: palisade policy get";
    let stands = "refused, with their last good versions in force: palisade policy get";

    let text = agents([1, 1]).text();
    assert!(text.contains(&format!("all 2 nodes    1 policies are {locked}\n")), "{text}");
    assert!(text.contains(&format!("all 2 nodes    1 policies are {stands}\n")), "{text}");
    assert!(text.contains("0 errors, 2 warnings") && !text.contains("node1"), "{text}");

    let text = agents([2, 2]).text();
    assert!(text.contains(&format!("all 2 nodes    2 policies are {stands}\n")), "{text}");
    assert!(text.contains("0 errors, 1 warnings") && !text.contains("locked down"), "{text}");

    let report = agents([0, 2]);
    let text = report.text();
    assert!(text.contains(&format!("node1    2 policies are {locked}\n")), "{text}");
    assert!(text.contains(&format!("node2    2 policies are {stands}\n")), "{text}");
    // Programs look up nodes by their names.
    let warnings = &agents([2, 2]).json()["errors"]["palisade"]["node2"]["Warnings"];
    assert_eq!(warnings.as_array().map(Vec::len), Some(1), "{warnings}");
}
