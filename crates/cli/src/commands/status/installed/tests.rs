use palisade_api::admin::Input;

use super::{super::report::tests::status, *};

const EVERYWHERE: Replicas = Replicas { desired: 2, ready: 2, available: 2, current: true };

/// Two nodes, of which the API server has nothing but good to tell.
fn installed() -> Installed {
    let installation =
        Installation { agents: EVERYWHERE, operators: Some(EVERYWHERE), ..Installation::default() };
    let cluster = Cluster {
        version: "v1.37.1".to_owned(),
        nodes: vec!["node1".to_owned(), "node2".to_owned()],
        pods: Pods::new(),
        endpoints: Ok(BTreeSet::new()),
        without_network: Vec::new(),
        installation: Some(installation),
    };
    Installed::of(cluster).unwrap_or_else(|_| panic!("there is an installation"))
}

fn hear(answers: [Answer; 2]) -> Installed {
    let mut installed = installed();
    answer(&mut installed, answers, || panic!("nothing is to be asked again"));
    installed
}

fn answer(installed: &mut Installed, answers: [Answer; 2], again: impl FnOnce() -> Result<Pods>) {
    let pods = ["palisade-1", "palisade-2"].map(str::to_owned);
    let asked = pods.into_iter().zip(answers).map(|(pod, answer)| Asked { pod, answer });
    installed.hear(Ok(asked.collect()), again);
}

fn says(status: Status) -> Answer {
    Answer::Status(Box::new(status))
}

#[test]
fn agents_that_are_well_add_nothing() {
    let installed = hear(["node1", "node2"].map(|node| says(status(node))));
    assert!(installed.ok());
    let text = installed.text(false);
    assert!(text.contains("Palisade:           OK"), "{text}");
    assert!(!text.contains("Errors") && !text.contains("Not collected"), "{text}");
    let status = &installed.json()["cilium_status"];
    assert_eq!(status["node2"]["ready"], true, "{status}");
}

#[test]
fn an_agent_that_cannot_follow_the_api_server_is_an_error_of_its_pod() {
    let mut deaf = status("node2");
    deaf.inputs = ["Pod", "Node"]
        .map(|kind| Input {
            kind: kind.to_owned(),
            complete: true,
            objects: 1,
            error: Some("timed out".to_owned()),
        })
        .to_vec();
    let installed = hear([says(status("node1")), says(deaf)]);
    assert!(!installed.ok());
    let text = installed.text(false);
    assert!(text.contains("palisade-2    Pod, Node: timed out"), "{text}");
    assert!(!text.contains("palisade-1"), "{text}");
    let error = &installed.json()["errors"]["palisade"]["palisade-2"]["Errors"];
    assert_eq!(error[0], "Pod, Node: timed out");
}

#[test]
fn what_all_agents_say_is_said_once() {
    let refused = |node| says(Status { policies_refused: 1, ..status(node) });
    let installed = hear(["node1", "node2"].map(refused));
    assert!(installed.ok());
    let text = installed.text(false);
    assert_eq!(text.matches("locked down").count(), 1, "{text}");
    assert!(text.contains("all 2 nodes    1 policies are refused"), "{text}");
}

#[test]
fn operators_are_on_no_particular_node() {
    let mut installed = installed();
    for pod in ["palisade-operator-1", "palisade-operator-2"] {
        let (component, text) = (OPERATORS, "container operator: ErrImagePull".to_owned());
        installed.errors.push(Remark { component, from: pod.to_owned(), text });
    }
    let text = installed.text(false);
    assert!(text.contains("palisade-operator-1    container operator: ErrImagePull"), "{text}");
    assert!(!text.contains("all 2 nodes"), "{text}");
}

#[test]
fn a_restart_is_told_with_its_cause() {
    let container = Container {
        name: "operator".into(),
        image: String::new(),
        running: true,
        ready: true,
        restarts: 1,
        ended: Some("Error, exit code 1: Error: the Lease is lost".into()),
        problem: None,
    };
    let pod = PodState {
        component: OPERATORS.into(),
        name: "palisade-operator-1".into(),
        node: None,
        phase: "Running".into(),
        unschedulable: None,
        containers: vec![container],
    };
    let found = warnings(&Installation { pods: vec![pod], ..installed().installation });
    let texts: Vec<&str> = found.iter().map(|it| it.text.as_str()).collect();
    let operator = "container operator: 1 restart, the last one after: Error, exit code 1: Error: \
                    the Lease is lost";
    assert_eq!(texts, [operator]);
}

#[test]
fn a_proxy_that_its_agent_does_not_hear_is_told() {
    let mut installed = installed();
    installed.installation.proxy = true;
    installed.installation.agents.desired = 0;
    installed.agents = vec![Status { l7_proxy: false, ..status("node1") }];
    assert_eq!(installed.proxy(), "not connected on 1 of 1 nodes");
}

#[test]
fn an_answer_that_does_not_come_is_no_good_one() {
    let silent = || Answer::None("the agent does not answer".to_owned());
    let installed = hear([says(status("node1")), silent()]);
    assert!(!installed.ok());
    let text = installed.text(false);
    assert!(text.contains("palisade-2    does not say how it is: the agent does"), "{text}");
}

#[test]
fn agents_that_nobody_may_ask_are_not_ill() {
    let forbidden = || Answer::Unasked("403 Forbidden".to_owned());
    let installed = hear([forbidden(), forbidden()]);
    assert!(installed.ok());
    let text = installed.text(false);
    assert_eq!(text.matches("Not collected:").count(), 1, "{text}");
    assert_eq!(installed.json()["collection_errors"].as_array().map(Vec::len), Some(1));
}

/// Connected pods of two nodes.
fn pods<const N: usize>(all: [(&str, &str); N]) -> Pods {
    let pod = |(name, node): (&str, &str)| {
        let pod = ClusterPod { uid: "u".into(), node: Some(node.into()), connected: true };
        (format!("default/{name}"), pod)
    };
    all.map(pod).into()
}

/// An agent that tells its pods, whose objects are as they should be.
fn has<const N: usize>(node: &str, pods: [&str; N]) -> Status {
    let pods = pods.map(|name| (format!("default/{name}"), EndpointObject::Current));
    Status { pods: Some(pods.into()), ..status(node) }
}

const FOREIGN: &str = "an address that Palisade did not give, and no policy";
const UNTOLD: &str = "an address and no CiliumEndpoint, on nodes where no agent said which pods";

#[test]
fn pods_whose_objects_could_not_be_written_are_managed_all_the_same() {
    let mut node1 = has("node1", ["a", "b"]);
    for object in node1.pods.iter_mut().flat_map(BTreeMap::values_mut) {
        *object = EndpointObject::Unwritten("429 Too Many Requests".into());
    }
    let mut installed = installed();
    installed.cluster.pods = pods([("a", "node1"), ("b", "node1"), ("c", "node2")]);
    // What is outdated is there.
    installed.cluster.endpoints = Ok(["default/a", "default/c"].map(str::to_owned).into());
    let answers = [says(node1), says(has("node2", ["c"]))];
    answer(&mut installed, answers, || panic!("nothing is to be asked again"));
    let text = installed.text(false);
    let managed = "1 pod is managed by Palisade, but without a CiliumEndpoint yet: 429 Too Many";
    assert!(text.contains(managed) && text.contains("3/3 managed by Palisade"), "{text}");
    assert!(!text.contains(FOREIGN) && !text.contains(UNTOLD), "{text}");
}

#[test]
fn pods_that_their_agent_does_not_know_are_named() {
    let all = || pods([("a", "node1"), ("b", "node1"), ("c", "node2")]);
    let mut installed = installed();
    installed.cluster.pods = all();
    // Another network may have left its objects.
    installed.cluster.endpoints = Ok(["default/b"].map(str::to_owned).into());
    let answers = [says(has("node1", ["a"])), says(has("node2", ["c"]))];
    answer(&mut installed, answers, || Ok(all()));
    let text = installed.text(false);
    assert!(text.contains(&format!("1 pod has {FOREIGN}")), "{text}");
    assert!(text.lines().any(|line| line.contains(FOREIGN) && line.ends_with(": default/b")));
    assert!(text.contains("2/3 managed by Palisade"), "{text}");
}

#[test]
fn pods_that_come_and_go_while_agents_are_asked_are_nobody_elses() {
    let mut before = pods([("goes", "node1"), ("ends", "node1"), ("anew", "node1")]);
    before.extend(pods([("moves", "node1"), ("stays", "node1")]));
    let heard = |again: Result<Pods>| {
        let mut installed = installed();
        installed.cluster.pods = before.clone();
        // It has no address yet, and none from anybody else.
        let begins = ClusterPod { connected: false, ..before["default/goes"].clone() };
        installed.cluster.pods.insert("default/begins".into(), begins);
        let answers = [says(has("node1", ["stays"])), says(has("node2", []))];
        answer(&mut installed, answers, || again);
        installed.text(false)
    };
    let mut after = before.clone();
    after.remove("default/goes");
    after.extend(pods([("moves", "node2"), ("begins", "node1")]));
    after.get_mut("default/ends").unwrap().connected = false;
    after.get_mut("default/anew").unwrap().uid = "another".into();
    let text = heard(Ok(after));
    assert!(!text.contains(FOREIGN), "{text}");
    let text = heard(Err(anyhow::anyhow!("away")));
    assert!(!text.contains(FOREIGN) && text.contains("pods once more: away"), "{text}");
}

#[test]
fn silence_of_an_agent_makes_no_pod_somebody_elses() {
    let older = || Status { pods: None, ..status("node2") };
    let unasked = || Answer::Unasked("403 Forbidden".into());
    let silent = || Answer::None("the agent does not answer".into());
    for other in [says(older()), unasked(), silent()] {
        let mut installed = installed();
        installed.cluster.pods = pods([("a", "node1"), ("b", "node2"), ("c", "node2")]);
        installed.cluster.endpoints = Ok(["default/c"].map(str::to_owned).into());
        let answers = [says(has("node1", ["a"])), other];
        answer(&mut installed, answers, || panic!("nothing is to be asked again"));
        let text = installed.text(false);
        assert!(text.contains(&format!("1 pod has {UNTOLD}")), "{text}");
        assert!(text.contains("2/3 managed by Palisade") && !text.contains(FOREIGN), "{text}");
    }
}

#[test]
fn objects_that_cannot_be_read_are_not_taken_for_none() {
    let mut cluster = *installed().cluster;
    cluster.installation = Some(installed().installation);
    cluster.endpoints = Err("429 Too Many Requests".into());
    cluster.pods = pods([("a", "node1"), ("b", "node2")]);
    let mut installed = Installed::of(cluster).unwrap_or_else(|_| panic!("an installation"));
    let answers = [says(has("node1", ["a"])), Answer::Unasked("403 Forbidden".into())];
    answer(&mut installed, answers, || panic!("nothing is to be asked again"));
    let text = installed.text(false);
    assert!(text.contains("CiliumEndpoints: 429 Too Many Requests"), "{text}");
    assert!(!text.contains(UNTOLD) && !text.contains(FOREIGN), "{text}");
}
