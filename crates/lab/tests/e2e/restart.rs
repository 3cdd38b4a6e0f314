//! What an agent that starts again must know, and what it can do alone.

use std::{
    fs,
    os::unix::{net::UnixStream, process::CommandExt},
    process::{Child, Command, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};

use super::{
    harness::{Lab, PROGRAM, eventually},
    traffic::{Flow, serve_echo},
};

const FRIENDS_ONLY: &str = r"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: friends-only}
spec:
  endpointSelector: {matchLabels: {app: target}}
  ingress: [{fromEndpoints: [{matchLabels: {app: friend}}]}]
";
/// Nobody's port.
const REFUSED: &str = r"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: friends-only}
spec:
  endpointSelector: {matchLabels: {app: target}}
  ingress: [{toPorts: [{ports: [{port: '99999', protocol: TCP}]}]}]
";

fn kill(pid: u32) {
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
}

fn agent(lab: &Lab) -> Option<u32> {
    let status = lab.statuses().pop()??;
    status.ready.then_some(status.pid)
}

fn kill_agent(lab: &Lab) {
    let old = agent(lab).unwrap();
    kill(old);
    eventually("the agent is ready again", || agent(lab).is_some_and(|now| now != old));
}

fn valid(lab: &Lab, wanted: &str) {
    let condition = "--for=jsonpath={.status.conditions[?(@.type=='Valid')].status}";
    lab.kubectl(&["wait", &format!("{condition}={wanted}"), "cnp/friends-only"]);
}

#[test]
fn the_last_good_version_of_a_refused_policy_outlives_the_agent() {
    let lab = Lab::up(1);
    let [target, friend, foe] = lab.pods([("target", 1), ("friend", 1), ("foe", 1)]);
    serve_echo(&target);
    let friends_only = || {
        for to in target.addresses {
            assert!(Flow::tcp(&friend, to).is_ok(), "{to}");
            assert!(Flow::tcp(&foe, to).is_err(), "{to}");
        }
    };
    let closed = || {
        for to in target.addresses {
            assert!(Flow::tcp(&friend, to).is_err(), "{to}");
            assert!(Flow::tcp(&foe, to).is_err(), "{to}");
        }
    };
    lab.apply(FRIENDS_ONLY);
    valid(&lab, "True");
    friends_only();
    lab.apply(REFUSED);
    valid(&lab, "False");
    friends_only();
    for _ in 0..2 {
        kill_agent(&lab);
        friends_only();
    }

    // A policy of the same name is not the same policy.
    lab.kubectl(&["delete", "cnp", "friends-only"]);
    lab.apply(REFUSED);
    valid(&lab, "False");
    closed();
    kill_agent(&lab);
    closed();
}

/// An agent that nobody but its test looks after.
struct Orphan(Child);

impl Drop for Orphan {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn an_agent_starts_without_an_api_server() {
    let lab = Lab::up(1);
    let [target, friend, foe] = lab.pods([("target", 1), ("friend", 1), ("foe", 1)]);
    serve_echo(&target);
    lab.apply(FRIENDS_ONLY);
    valid(&lab, "True");
    let mut open: Vec<Flow> =
        target.addresses.iter().map(|to| Flow::tcp(&friend, *to).unwrap()).collect();

    let old = agent(&lab).unwrap();
    let line = fs::read_to_string(format!("/proc/{old}/cmdline")).unwrap();
    lab.crash();
    kill(old);
    let mut command = Command::new(PROGRAM);
    command.args(["exec", "node1", "--"]).args(line.split_terminator('\0'));
    let quiet = command.stdout(Stdio::null()).stderr(Stdio::null());
    let _orphan = Orphan(quiet.process_group(0).spawn().unwrap());

    eventually("another agent answers", || {
        let status = lab.statuses().pop().flatten();
        status.is_some_and(|status| status.pid != old)
    });
    let status = lab.statuses().pop().flatten().unwrap();
    assert!(!status.ready, "without its inputs it cannot be ready");
    assert_eq!(status.endpoints, 4, "the pods of before, and the cluster's DNS");
    let socket = lab.cni(1).socket;
    eventually("the plugin is answered", || UnixStream::connect(&socket).is_ok());
    for (flow, to) in open.iter_mut().zip(target.addresses) {
        flow.ask(7).unwrap();
        assert!(Flow::tcp(&friend, to).is_ok(), "{to}");
        assert!(Flow::tcp(&foe, to).is_err(), "{to}");
    }
}
