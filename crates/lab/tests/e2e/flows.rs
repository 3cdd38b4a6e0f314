//! Policy changes under open flows: what is denied stops at once, what is allowed never notices.

use std::time::Duration;

use super::{
    harness::{Lab, Pod},
    traffic::{Conversations, FRIENDS_ONLY, Flow, serve_echo},
};

const FOES_STAY_HOME: &str = r"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: egress}
spec:
  endpointSelector: {matchExpressions: [{key: app, operator: In, values: [foe, foe-far]}]}
  enableDefaultDeny: {egress: false}
  egressDeny: [{toEndpoints: [{matchLabels: {app: target}}]}]
";

/// TCP and UDP, to both addresses.
fn flows(from: &[&Pod], to: &Pod) -> Vec<Flow> {
    let pairs = from.iter().flat_map(|pod| to.addresses.map(|address| (*pod, address)));
    pairs
        .flat_map(|(pod, address)| [Flow::tcp(pod, address), Flow::udp(pod, address)])
        .collect::<Result<_, _>>()
        .unwrap()
}

#[test]
fn changes_reach_open_flows() {
    let lab = Lab::up(2);
    let [target, friend, friend_far, foe, foe_far] =
        lab.pods([("target", 1), ("friend", 1), ("friend-far", 2), ("foe", 1), ("foe-far", 2)]);
    serve_echo(&target);
    let allowed = Conversations::start(flows(&[&friend, &friend_far], &target));

    for (kind, name, policy) in
        [("netpol", "friends-only", FRIENDS_ONLY), ("cnp", "egress", FOES_STAY_HOME)]
    {
        let mut denied = flows(&[&foe, &foe_far], &target);
        for flow in &mut denied {
            flow.ask(1).unwrap();
        }
        lab.apply(policy);
        lab.await_policies(1);
        for flow in &mut denied {
            assert!(flow.ask(2).is_err(), "{name}: a denied flow goes on");
        }
        for to in target.addresses {
            assert!(Flow::tcp(&foe, to).is_err(), "{name}: a denied connection opens");
        }
        lab.kubectl(&["delete", kind, name]);
        lab.await_policies(0);
        for flow in &mut flows(&[&foe, &foe_far], &target) {
            flow.ask(3).unwrap();
        }
    }

    let (interrupted, words, slowest) = allowed.end();
    println!("allowed flows: {interrupted} interrupted, {words} words, slowest {slowest:?}");
    assert_eq!(interrupted, 0);
    assert!(words > 100);
    assert!(slowest < Duration::from_millis(200), "{slowest:?}");
}
