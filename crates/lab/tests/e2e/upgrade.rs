//! An agent of another version, whose tables are laid out in another way, takes over: what is open
//! stays open, what is denied stays denied.

use std::{fs, time::Duration};

use palisade_lab::nodes::Program;

use super::{
    harness::{Lab, eventually},
    traffic::{Conversations, Counter, Flood, Flow, serve_echo},
};

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

/// Replaces the agents of all nodes after `before` was done to the pins of each.
fn replace_agents(lab: &Lab, nodes: usize, before: impl Fn(&std::path::Path)) {
    let old = lab.statuses();
    let old: Vec<u32> = old.iter().flatten().map(|status| status.pid).collect();
    assert_eq!(old.len(), nodes);
    for number in 1..=nodes {
        before(&lab.cni(number).maps);
        lab.kill(number, Program::Agent);
    }
    eventually("the agents are ready again", || {
        lab.statuses()
            .iter()
            .all(|status| status.as_ref().is_some_and(|now| now.ready && !old.contains(&now.pid)))
    });
}

/// Now each of the two tables has the layout of the other: for the next agent, that of another
/// version.
fn exchange(maps: &std::path::Path, [one, other]: [&str; 2]) {
    let aside = maps.join("aside");
    fs::rename(maps.join(one), &aside).unwrap();
    fs::rename(maps.join(other), maps.join(one)).unwrap();
    fs::rename(aside, maps.join(other)).unwrap();
}

#[test]
fn agents_with_other_tables_let_nothing_through_and_cut_nothing_off() {
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
    let flood = Flood::start(&foes, target.addresses);
    eventually("packets arrive without a policy", || arrived.count() > 100);
    flood.end();
    lab.apply(FRIENDS_ONLY);
    lab.await_policies(1);
    let before = arrived.count();

    let flows = (0..CONNECTIONS).map(|number| {
        let from = if number % 2 == 0 { &friend } else { &friend_far };
        let to = target.addresses[number / 2 % 2];
        let flow = if number % 5 == 4 { Flow::udp(from, to) } else { Flow::tcp(from, to) };
        flow.unwrap()
    });
    let conversations = Conversations::start(flows.collect());
    let flood = Flood::start(&foes, target.addresses);

    // To the next version and back; then one that lacks a table.
    replace_agents(&lab, 2, |maps| exchange(maps, ["PEERS", "PORTS"]));
    lab.apply(CLOSED);
    lab.await_policies(2);
    replace_agents(&lab, 2, |maps| {
        exchange(maps, ["ENDPOINT_ROWS", "SHARDS"]);
        exchange(maps, ["SERVICES", "IPCACHE"]);
    });
    replace_agents(&lab, 2, |maps| fs::remove_file(maps.join("BACKENDS")).unwrap());
    // What packets fill is kept, or not, for itself.
    replace_agents(&lab, 2, |maps| exchange(maps, ["METRICS", "SOCKETS"]));

    let sent = flood.end();
    let (interrupted, words, slowest) = conversations.end();
    println!(
        "{sent} packets of foes sent, {} arrived; {CONNECTIONS} connections, {interrupted} \
         interrupted, {words} words, slowest {slowest:?}",
        arrived.count() - before
    );
    assert_eq!(arrived.count(), before, "packets that policy denies arrived");
    assert!(sent > 1000, "only {sent} packets were sent");
    assert_eq!(interrupted, 0);
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    for to in target.addresses {
        assert!(Flow::tcp(&friend, to).is_ok() && Flow::tcp(&friend_far, to).is_ok(), "{to}");
        assert!(Flow::tcp(&foe, to).is_err() && Flow::tcp(&foe_far, to).is_err(), "{to}");
    }
    for to in bystander.addresses {
        assert!(Flow::tcp(&friend, to).is_err(), "{to}");
    }
    // The tables of before went with their programs.
    let names = |maps: &std::path::Path| -> Vec<_> {
        let mut names: Vec<_> =
            fs::read_dir(maps).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert!(!names(&lab.cni(1).maps).iter().any(|name| name == "aside"));
    assert_eq!(names(&lab.cni(1).maps), names(&lab.cni(2).maps));
}
