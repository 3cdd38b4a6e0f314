//! Connections to the API server that die without a word.

use std::{process::Command, time::Duration};

use palisade_lab::{
    layout::{FABRIC_NETNS, NodePlan},
    sys::netns,
};

use super::{
    harness::{Lab, eventually, ip, text, within},
    operator::{Operator, holder, networks},
};

/// By then it is clear that nobody is at the other end.
pub(crate) const NOTICED: Duration = Duration::from_secs(20);
/// By then it is clear that all is well again.
pub(crate) const CALM: Duration = Duration::from_secs(30);

/// The cable of the first node, pulled out until this value goes.
pub(crate) struct Pulled;

impl Pulled {
    pub(crate) fn out() -> Self {
        ip(&format!("-n {FABRIC_NETNS} link set node1 nomaster"));
        Self
    }
}

impl Drop for Pulled {
    fn drop(&mut self) {
        ip(&format!("-n {FABRIC_NETNS} link set node1 master fabric"));
    }
}

/// The API server's machine forgets its connections to the first node, as one does that took over
/// the address of another; nothing of that reaches the node.
fn forget_connections() {
    let connections = |options: &'static str| {
        let node = NodePlan::new(1).v4().to_string();
        let ss = move || Command::new("ss").args([options, "dst", &node]).output();
        text(&netns::run_in(&netns::path(FABRIC_NETNS), ss).unwrap())
    };
    assert!(!connections("-Htn").is_empty());
    connections("-HtnK");
    assert_eq!(connections("-Htn"), "");
}

/// Whether this is so of the errors of all that the agent reads from the API server.
fn inputs(lab: &Lab, holds: impl Fn(Option<&str>) -> bool) -> bool {
    let Some(status) = lab.statuses().pop().flatten() else { return false };
    let its_own = ["Endpoint", "LearnedNames"];
    let mut inputs = status.inputs.iter().filter(|it| !its_own.contains(&it.kind.as_str()));
    inputs.all(|input| holds(input.error.as_deref()))
}

fn policies(lab: &Lab) -> usize {
    lab.statuses().pop().flatten().map_or(0, |status| status.policies)
}

fn policy(lab: &Lab, name: &str) {
    lab.apply(&format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}}}\n\
         spec: {{podSelector: {{}}}}\n"
    ));
}

#[test]
fn connections_that_died_without_a_word_are_replaced_soon() {
    let lab = Lab::up(1);
    let _operator = Operator::start_on_node(&lab, "only");
    eventually("the operator leads", || holder(&lab).as_deref() == Some("only"));
    let join = |name: &str| {
        lab.apply(&format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\n"));
    };
    join("joined1");
    eventually("the operator works", || networks(&lab, "joined1").len() == 2);

    // The other end forgets them, and answers no sign of life but with a reset.
    let pulled = Pulled::out();
    forget_connections();
    drop(pulled);
    policy(&lab, "first");
    join("joined2");
    within(NOTICED, "the agent hears of a policy", || policies(&lab) == 1);
    within(NOTICED, "the operator hears of a node", || networks(&lab, "joined2").len() == 2);
    within(CALM, "the agent is content", || inputs(&lab, |error| error.is_none()));

    // There is no other end.
    let pulled = Pulled::out();
    within(NOTICED, "the agent says that it hears nothing", || {
        inputs(&lab, |error| error.is_some())
    });
    policy(&lab, "second");
    drop(pulled);
    within(NOTICED, "the agent hears of what happened meanwhile", || policies(&lab) == 2);
    within(CALM, "the agent is content", || inputs(&lab, |error| error.is_none()));
}
