//! An agent of another version, whose tables are laid out in another way, takes over: what is open
//! stays open, what is denied stays denied.

use std::{fs, path::Path};

use palisade_lab::nodes::Program;

use super::{
    harness::{Lab, eventually},
    traffic::{Conversations, Counter, FRIENDS_ONLY, Flood, Flow, Siege, serve_echo},
};

/// Replaces the agents of all nodes after `before` was done to the pins of each.
fn replace_agents(lab: &Lab, nodes: usize, before: impl Fn(&Path)) {
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
fn exchange(maps: &Path, [one, other]: [&str; 2]) {
    let aside = maps.join("aside");
    fs::rename(maps.join(one), &aside).unwrap();
    fs::rename(maps.join(other), maps.join(one)).unwrap();
    fs::rename(aside, maps.join(other)).unwrap();
}

/// Agents that end while they fill other tables: each one begins again, and until one is done the
/// programs of before judge.
#[test]
fn a_takeover_that_is_cut_short_begins_again() {
    let lab = Lab::up(1);
    let [target, friend, foe] = lab.pods([("target", 1), ("friend", 1), ("foe", 1)]);
    serve_echo(&target);
    lab.apply(FRIENDS_ONLY);
    lab.await_policies(1);
    let arrived = Counter::start(&target, &[&foe]);
    let flows = (0..20).map(|number| {
        let to = target.addresses[number % 2];
        let flow = if number % 4 < 2 { Flow::udp(&friend, to) } else { Flow::tcp(&friend, to) };
        flow.unwrap()
    });
    let conversations = Conversations::start(flows.collect());
    let flood = Flood::start(&[&foe], target.addresses);

    let maps = lab.cni(1).maps;
    let begun = maps.with_file_name("anew");
    let tables = fs::read_dir(&maps).unwrap().count();
    exchange(&maps, ["PEERS", "PORTS"]);
    lab.kill(1, Program::Agent);
    let has_all_tables = || fs::read_dir(&maps).unwrap().count() == tables;
    let answers = || lab.statuses()[0].is_some();
    let moments: [&dyn Fn() -> bool; 3] = [&|| true, &has_all_tables, &answers];
    for moment in moments {
        let cut_short = || begun.exists() && moment() && lab.try_kill(1, Program::Agent);
        eventually("the takeover is under way", cut_short);
        assert!(begun.exists(), "it was over");
    }
    eventually("the takeover is over", || !begun.exists());
    lab.await_policies(1);

    let sent = flood.end();
    let (interrupted, words, slowest) = conversations.end();
    println!(
        "{sent} packets of the foe sent; {interrupted} interrupted, {words} words, {slowest:?}"
    );
    assert_eq!((arrived.count(), interrupted), (0, 0));
    assert!(sent > 1000, "only {sent} packets were sent");
    for to in target.addresses {
        assert!(Flow::tcp(&friend, to).is_ok() && Flow::tcp(&foe, to).is_err(), "{to}");
    }
}

#[test]
fn agents_with_other_tables_let_nothing_through_and_cut_nothing_off() {
    let lab = Lab::up(2);
    let siege = Siege::begin(&lab);
    // To the next version and back; then one that lacks a table.
    replace_agents(&lab, 2, |maps| exchange(maps, ["PEERS", "PORTS"]));
    Siege::close_bystander(&lab);
    lab.await_policies(2);
    replace_agents(&lab, 2, |maps| {
        exchange(maps, ["ENDPOINT_ROWS", "SHARDS"]);
        exchange(maps, ["SERVICES", "IPCACHE"]);
    });
    replace_agents(&lab, 2, |maps| fs::remove_file(maps.join("BACKENDS")).unwrap());
    // What packets fill is kept, or not, for itself.
    replace_agents(&lab, 2, |maps| exchange(maps, ["METRICS", "SOCKETS"]));
    siege.end(1000);
    // The tables of before went with their programs.
    let names = |maps: &Path| -> Vec<_> {
        let mut names: Vec<_> =
            fs::read_dir(maps).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert!(!names(&lab.cni(1).maps).iter().any(|name| name == "aside"));
    assert_eq!(names(&lab.cni(1).maps), names(&lab.cni(2).maps));
}
