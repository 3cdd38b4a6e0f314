//! Programs that somebody detaches while everything runs.

use std::{fs, path::Path, thread, time::Duration};

use super::{
    harness::{Lab, eventually},
    traffic::{Counter, Flood},
};

const CLOSED: &str = r"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed}
spec: {podSelector: {matchLabels: {app: target}}, policyTypes: [Ingress]}
";

#[test]
fn programs_that_somebody_detaches_are_attached_again() {
    let lab = Lab::up(1);
    let [target, foe] = lab.pods([("target", 1), ("foe", 1)]);
    // Nobody answers: what the target sends by itself opens a conversation that policy allows.
    lab.apply(CLOSED);
    lab.await_policies(1);
    let foes = [&foe];
    let arrived = Counter::start(&target, &foes);
    let flood = Flood::start(&foes, target.addresses);
    thread::sleep(Duration::from_millis(300));
    assert_eq!(arrived.count(), 0);

    // Without its pin a link goes, and its program with it.
    let links = Path::new("/sys/fs/bpf/palisade/node1/links");
    let pins = |prefix: &str| -> Vec<_> {
        let entries = fs::read_dir(links).unwrap().map(|entry| entry.unwrap());
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix)).collect()
    };
    for prefix in ["from_pod-", "to_pod-", "from_net-"] {
        let pins = pins(prefix);
        assert!(!pins.is_empty(), "{prefix}");
        pins.iter().for_each(|pin| fs::remove_file(pin.path()).unwrap());
    }
    eventually("packets arrive without programs", || arrived.count() > 0);
    eventually("the programs are back", || {
        ["from_pod-", "to_pod-", "from_net-"].iter().all(|prefix| !pins(prefix).is_empty())
    });
    eventually("no packet arrives any more", || {
        let before = arrived.count();
        thread::sleep(Duration::from_millis(200));
        arrived.count() == before
    });
    flood.end();
}
