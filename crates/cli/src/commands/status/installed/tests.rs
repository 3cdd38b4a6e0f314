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
        pods: BTreeSet::new(),
        running: BTreeSet::new(),
        endpoints: BTreeSet::new(),
        without_network: Vec::new(),
        installation: Some(installation),
    };
    Installed::of(cluster).unwrap_or_else(|_| panic!("there is an installation"))
}

fn hear(answers: [Answer; 2]) -> Installed {
    let mut installed = installed();
    let pods = ["palisade-1", "palisade-2"].map(str::to_owned);
    let asked = pods.into_iter().zip(answers).map(|(pod, answer)| Asked { pod, answer });
    installed.hear(Ok(asked.collect()));
    installed
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
    let operator = "container operator: 1 restarts, the last one after: Error, exit code 1: Error: \
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

#[test]
fn pods_whose_objects_could_not_be_written_are_managed_all_the_same() {
    let pods = ["default/a", "default/b", "default/c"].map(str::to_owned);
    let hear = |answers: [Answer; 2]| {
        let mut installed = installed();
        installed.cluster.pods.extend(pods.clone());
        installed.cluster.running.extend(pods.clone());
        installed.cluster.endpoints.insert(pods[0].clone());
        let answers = answers.map(|answer| Asked { pod: String::new(), answer });
        installed.hear(Ok(answers.into()));
        installed.text(false)
    };
    // What is outdated is there.
    let unwritten = |pods: &[String]| {
        let unwritten = pods.iter().map(|pod| (pod.clone(), "429 Too Many Requests".to_owned()));
        says(Status { unwritten: unwritten.collect(), ..status("node1") })
    };
    let well = || says(status("node2"));
    let managed = "1 pods are managed by Palisade, but have no CiliumEndpoint yet: 429 Too Many";
    let foreign = "pods have an address that Palisade did not give them";
    let unsure = "1 pods have an address and no CiliumEndpoint; whether Palisade manages them";

    let text = hear([unwritten(&pods), well()]);
    assert!(text.contains(&managed.replace('1', "2")) && !text.contains(foreign), "{text}");
    assert!(text.contains("3/3 managed by Palisade"), "{text}");
    let text = hear([unwritten(&pods[..2]), well()]);
    assert!(text.contains(managed) && text.contains(&format!("1 {foreign}")), "{text}");
    assert!(text.contains("2/3 managed by Palisade"), "{text}");
    let text = hear([unwritten(&pods[..2]), Answer::Unasked("403 Forbidden".into())]);
    assert!(text.contains(unsure) && !text.contains(foreign), "{text}");
}
