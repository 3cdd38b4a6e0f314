//! Nodes that get other addresses, and nodes that leave: the others' pods do not notice, and nobody
//! inherits anything from an address.

use std::{net::SocketAddr, time::Duration};

use super::{
    harness::{Lab, Outside, Pod, eventually, within},
    overlay::{all, answers, command},
    probe::Answer,
    traffic::{Conversations, Flow, PORT, serve_echo},
};

const FRIENDS_ONLY: &str = "{podSelector: {matchLabels: {app: server}}, \
     ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]}";
/// Other nodes and nobody else.
const NODES_ONLY: &str = "spec:\n  endpointSelector: {matchLabels: {app: guarded}}\n  \
     ingress: [{fromEntities: [remote-node]}]";

/// By then a node's agent has noticed that its connections to the API server are dead.
const NOTICED: Duration = Duration::from_secs(30);

/// Gives a node other addresses, and returns the new ones.
fn renumber(node: &Pod, to: [&str; 2]) -> Pod {
    let [v4, v6] = node.addresses;
    command(node, &format!("ip addr del {v4}/24 dev eth0"));
    command(node, &format!("ip addr add {}/24 dev eth0", to[0]));
    command(node, &format!("ip addr del {v6}/64 dev eth0"));
    command(node, &format!("ip addr add {}/64 dev eth0 nodad", to[1]));
    let mut renumbered = node.clone();
    renumbered.addresses = to.map(|address| address.parse().unwrap());
    renumbered
}

/// The stranger takes addresses that were another's, and tries `to`.
fn squat(stranger: &Pod, addresses: &Pod, to: &Pod) -> bool {
    addresses.addresses.iter().zip(to.addresses).any(|(&from, to)| {
        let length = if from.is_ipv4() { 24 } else { 64 };
        let nodad = if from.is_ipv4() { "" } else { " nodad" };
        command(stranger, &format!("ip addr add {from}/{length} dev eth0{nodad}"));
        let came = stranger.run(move || {
            let socket = socket2::Socket::new(
                socket2::Domain::for_address(SocketAddr::new(to, PORT)),
                socket2::Type::STREAM,
                None,
            )?;
            socket.bind(&SocketAddr::new(from, 0).into())?;
            let to = SocketAddr::new(to, PORT).into();
            Ok(socket.connect_timeout(&to, Duration::from_secs(1)).is_ok())
        });
        command(stranger, &format!("ip addr del {from}/{length} dev eth0"));
        came
    })
}

fn nodes_change(routing: &str) {
    let lab = Lab::up_with(3, &["--routing", routing]);
    let [server, friend, foe, far, guarded] =
        lab.pods([("server", 2), ("friend", 1), ("foe", 1), ("far", 3), ("guarded", 1)]);
    let pods = [&server, &friend, &far, &guarded];
    pods.iter().for_each(|pod| serve_echo(pod));
    let nodes = [1, 2, 3].map(|number| lab.node(number));
    let outside = Outside::new(&lab);
    lab.apply_policy("default", "friends", FRIENDS_ONLY);
    lab.apply_cilium_policy("default", "nodes", NODES_ONLY);
    let guards = || {
        assert!(all(&answers(&friend, &server.addresses), Answer::Open), "allowed");
        assert!(all(&answers(&foe, &server.addresses), Answer::Silence), "denied");
    };
    guards();
    assert!(all(&answers(&nodes[1], &guarded.addresses), Answer::Open), "a node");
    assert!(all(&answers(&outside.pod, &guarded.addresses), Answer::Silence), "a stranger");

    // What has no part in it goes on.
    let flows = friend.addresses.into_iter().chain(far.addresses);
    let flows = flows.flat_map(|to| {
        let from = if friend.addresses.contains(&to) { &far } else { &friend };
        [Flow::tcp(from, to).unwrap(), Flow::udp(from, to).unwrap()]
    });
    let others = Conversations::start(flows.collect());

    let renumbered = renumber(&nodes[1], ["172.31.255.102", "fd31::102"]);
    let told = |address: &str| {
        lab.kubectl(&["get", "node", "node2", "-o", "jsonpath={.status.addresses}"])
            .contains(address)
    };
    eventually("the node tells its addresses", || told("172.31.255.102") && told("fd31::102"));
    within(NOTICED, "pods of the node are reached", || {
        all(&answers(&friend, &server.addresses), Answer::Open)
    });
    guards();
    eventually("the node is who it was", || {
        all(&answers(&renumbered, &guarded.addresses), Answer::Open)
    });
    assert!(all(&answers(&friend, &far.addresses), Answer::Open));
    let nobody = !squat(&outside.pod, &nodes[1], &guarded);
    assert!(nobody, "a stranger is taken for the node whose address it has");

    let (interrupted, words, slowest) = others.end();
    println!("{routing}: {words} words meanwhile, slowest {slowest:?}");
    assert_eq!(interrupted, 0);

    // One leaves.
    let flows = friend
        .addresses
        .iter()
        .zip(server.addresses)
        .flat_map(|(_, to)| [Flow::tcp(&friend, to).unwrap(), Flow::udp(&friend, to).unwrap()]);
    let others = Conversations::start(flows.collect());
    lab.kubectl(&["delete", "node", "node3"]);
    // What follows from the first in a cluster with a garbage collector for everything.
    lab.kubectl(&["delete", "ciliumnode", "node3"]);
    let lost = || {
        far.addresses.iter().all(|address| {
            let route = command(&nodes[0], &format!("ip route get {address}"));
            !route.contains("palisade_vxlan")
                && !route.contains(&nodes[2].addresses[0].to_string())
                && !route.contains(&nodes[2].addresses[1].to_string())
        })
    };
    eventually("nothing leads to a node that left", lost);
    eventually("a node that left is nobody", || {
        all(&answers(&nodes[2], &guarded.addresses), Answer::Silence)
    });
    guards();
    let (interrupted, words, slowest) = others.end();
    println!("{routing}: {words} words meanwhile, slowest {slowest:?}");
    assert_eq!(interrupted, 0);
}

#[test]
fn nodes_change_with_the_overlay() {
    nodes_change("overlay");
}

#[test]
fn nodes_change_with_native_routing() {
    nodes_change("native");
}
