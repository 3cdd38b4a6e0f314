//! Agents die; what they put into the kernel stays in force.

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::{
    harness::{Lab, eventually},
    traffic::{Conversations, Counter, Flood, Flow, serve_echo},
};

const KILLS: usize = 50;
const CONNECTIONS: usize = 100;

const FRIENDS_ONLY: &str = r"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends-only}
spec:
  podSelector: {matchLabels: {app: target}}
  ingress: [{from: [{podSelector: {matchExpressions: [{key: app, operator: In, values: [friend, friend-far]}]}}]}]
";
const CLOSED: &str = r"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed}
spec: {podSelector: {matchLabels: {app: bystander}}, policyTypes: [Ingress]}
";

#[test]
fn killed_agents_let_nothing_through_and_cut_nothing_off() {
    let lab = Lab::up(2);
    let [target, bystander, friend, friend_far, foe, foe_far] = lab.pods([
        ("target", 1),
        ("bystander", 1),
        ("friend", 1),
        ("friend-far", 2),
        ("foe", 1),
        ("foe-far", 2),
    ]);
    serve_echo(&target);
    serve_echo(&bystander);
    let foes = [&foe, &foe_far];
    let arrived = Counter::start(&target, &foes);

    // The opposite first: the foes' packets arrive, and are seen.
    let flood = Flood::start(&foes, target.addresses);
    eventually("packets arrive without a policy", || arrived.count() > 100);
    flood.end();

    lab.apply(FRIENDS_ONLY);
    lab.await_policies(1);
    let before = arrived.count();

    let flows = (0..CONNECTIONS).map(|number| {
        let from = if number % 2 == 0 { &friend } else { &friend_far };
        Flow::tcp(from, target.addresses[number / 2 % 2]).unwrap()
    });
    let conversations = Conversations::start(flows.collect());
    let flood = Flood::start(&foes, target.addresses);
    for round in 0..KILLS {
        let statuses = lab.statuses();
        let pids: Vec<u32> = statuses.iter().flatten().map(|status| status.pid).collect();
        assert_eq!(pids.len(), 2);
        for pid in &pids {
            let pid = Pid::from_raw(i32::try_from(*pid).unwrap()).unwrap();
            kill_process(pid, Signal::KILL).unwrap();
        }
        if round == KILLS / 2 {
            // A change that nobody is there to hear.
            lab.apply(CLOSED);
        }
        eventually("the agents are ready again", || {
            lab.statuses().iter().all(|status| {
                status.as_ref().is_some_and(|now| now.ready && !pids.contains(&now.pid))
            })
        });
    }
    lab.await_policies(2);
    let sent = flood.end();
    let (interrupted, words, slowest) = conversations.end();

    println!(
        "{KILLS} kills of each of 2 agents; {sent} packets of foes sent, {} arrived; \
         {CONNECTIONS} connections, {interrupted} interrupted, {words} words, slowest {slowest:?}",
        arrived.count() - before
    );
    assert_eq!(arrived.count(), before, "packets that policy denies arrived");
    assert!(sent > 10_000, "only {sent} packets were sent");
    assert_eq!(interrupted, 0);
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    for to in bystander.addresses {
        assert!(Flow::tcp(&friend, to).is_err(), "the policy made meanwhile is not in force");
    }
}
