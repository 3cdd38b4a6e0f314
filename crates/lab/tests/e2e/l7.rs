//! Policy on HTTP, in real clusters: what the kernel hands to the proxy, what becomes of it there,
//! and what happens when the proxy or the agent dies meanwhile.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use palisade_lab::nodes::Program;
use rustix::process::Signal;

use super::{
    connectivity::palisade,
    harness::{Lab, Pod, eventually},
    http::{Client, Origin},
    traffic::{Conversations, Flow, serve_echo},
};

pub(super) const PORT: u16 = 8080;

/// What the server admits: the near and the far client, and of them only this.
pub(super) const INGRESS: &str = "spec: {endpointSelector: {matchLabels: {app: server}}, ingress: [{
    fromEndpoints: [{matchExpressions: [{key: app, operator: In, values: [near, far]}]}],
    toPorts: [{ports: [{port: '8080', protocol: TCP}], rules: {http: [{method: GET, path: '/public(/.*)?'}]}}]}]}";
/// The same, said by the clients.
const EGRESS: &str = "spec: {endpointSelector: {matchExpressions: [{key: app, operator: In, values: [near, far]}]}, egress: [{
    toEndpoints: [{matchLabels: {app: server}}],
    toPorts: [{ports: [{port: '8080', protocol: TCP}], rules: {http: [{method: GET, path: '/public(/.*)?'}]}}]}]}";
/// Nothing at all.
pub(super) const CLOSED: &str =
    "spec: {endpointSelector: {matchLabels: {app: server}}, ingress: [{}]}";
/// Something else of HTTP.
pub(super) const OTHER: &str = "spec: {endpointSelector: {matchLabels: {app: server}}, ingress: [{
    fromEndpoints: [{matchExpressions: [{key: app, operator: In, values: [near, far]}]}],
    toPorts: [{ports: [{port: '8080', protocol: TCP}], rules: {http: [{method: GET, path: '/other'}]}}]}]}";

/// The addresses of a Service before the server.
pub(super) fn service(lab: &Lab, port: u16) -> [IpAddr; 2] {
    lab.apply(&format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: server}}\n\
         spec: {{ipFamilyPolicy: RequireDualStack, selector: {{app: server}}, ports: [{{port: {port}}}]}}\n",
    ));
    let addresses = lab.kubectl(&["get", "svc", "server", "-o", "jsonpath={.spec.clusterIPs}"]);
    let addresses: Vec<IpAddr> = serde_json::from_str(&addresses).unwrap();
    lab.await_table("service-entries", |rows| {
        addresses.iter().all(|ip| rows.iter().any(|row| row.join(" ").contains(&ip.to_string())))
    });
    [addresses[0], addresses[1]]
}

/// One request over a connection of its own.
pub(super) fn ask(from: &Pod, to: IpAddr, method: &str, target: &str) -> Option<u16> {
    Client::connect(from, SocketAddr::new(to, PORT)).ok()?.ask(method, target).ok()
}

#[test]
fn requests_are_judged_one_by_one() {
    let lab = Lab::up(2);
    let [server, near, far, stranger] =
        lab.pods([("server", 1), ("near", 1), ("far", 2), ("stranger", 2)]);
    let origin = Origin::start(&server, PORT);
    serve_echo(&server);
    let to: Vec<IpAddr> = server.addresses.into_iter().chain(service(&lab, PORT)).collect();

    for from in [&near, &far, &stranger] {
        for to in &to {
            assert_eq!(ask(from, *to, "DELETE", "/admin"), Some(200), "before any policy");
        }
    }
    for (policy, strangers) in [(INGRESS, None), (EGRESS, Some(200))] {
        lab.apply_cilium_policy("default", "l7", policy);
        origin.take();
        for (name, from) in [("near", &near), ("far", &far)] {
            for to in &to {
                let said = |method, target| ask(from, *to, method, target);
                assert_eq!(said("GET", "/public"), Some(200), "{name} {to} {policy}");
                assert_eq!(said("GET", "/public?b=c"), Some(403), "a query is part of the path");
                assert_eq!(said("GET", "/public/a"), Some(200), "{name} {to} {policy}");
                assert_eq!(said("GET", "/admin"), Some(403), "{name} {to} {policy}");
                assert_eq!(said("GET", "/public/../admin"), Some(403), "{name} {to} {policy}");
                assert_eq!(said("POST", "/public"), Some(403), "{name} {to} {policy}");
                let family = usize::from(to.is_ipv6());
                let expected = [
                    (from.addresses[family], "GET /public HTTP/1.1".to_owned()),
                    (from.addresses[family], "GET /public/a HTTP/1.1".to_owned()),
                ];
                assert_eq!(origin.take(), expected, "{name} {to}: what the origin got, from whom");
            }
        }
        for to in &to {
            assert_eq!(ask(&stranger, *to, "GET", "/public"), strangers, "stranger {to}");
        }
        one_connection_many_requests(&origin, &near, server.addresses[0]);
        what_is_not_http_goes_nowhere(&origin, &near, server.addresses[0]);
        assert!(
            Flow::tcp(&near, server.addresses[0]).is_err(),
            "a port that no rule names is closed"
        );
        lab.kubectl(&["delete", "cnp", "l7"]);
        lab.await_policies(0);
    }
}

fn one_connection_many_requests(origin: &Origin, from: &Pod, to: IpAddr) {
    origin.take();
    let mut client = Client::connect(from, SocketAddr::new(to, PORT)).unwrap();
    for _ in 0..3 {
        assert_eq!(client.ask("GET", "/public").unwrap(), 200);
        assert_eq!(client.ask("GET", "/secret").unwrap(), 403);
    }
    assert_eq!(origin.take().len(), 3);
}

fn what_is_not_http_goes_nowhere(origin: &Origin, from: &Pod, to: IpAddr) {
    let before = origin.bytes();
    let hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";
    for bytes in
        [&hello[..], b"SSH-2.0-OpenSSH_9.9\r\n", b"EHLO somebody\r\n\r\n", b"\0\0\0\0\r\n\r\n"]
    {
        let mut client = Client::connect(from, SocketAddr::new(to, PORT)).unwrap();
        let answer = client.say(bytes);
        assert!(!answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    }
    assert_eq!(origin.bytes(), before, "bytes that are not HTTP arrived");
}

#[test]
fn a_change_reaches_open_connections() {
    let lab = Lab::up(1);
    let [server, near] = lab.pods([("server", 1), ("near", 1)]);
    let origin = Origin::start(&server, PORT);
    for to in server.addresses {
        let to = SocketAddr::new(to, PORT);
        lab.apply_cilium_policy("default", "l7", INGRESS);
        let mut client = Client::connect(&near, to).unwrap();
        assert_eq!(client.ask("GET", "/public").unwrap(), 200);
        lab.apply_cilium_policy("default", "l7", OTHER);
        assert_eq!(client.ask("GET", "/public").unwrap(), 403, "judged by the policy of now");
        assert_eq!(client.ask("GET", "/other").unwrap(), 200);
        origin.take();
        lab.apply_cilium_policy("default", "l7", CLOSED);
        assert!(client.ask("GET", "/other").is_err(), "the connection itself is denied now");
        assert_eq!(origin.take(), []);
        // Its unanswered request would be sent again, and the next round's policy may allow it.
        client.abort();
        lab.kubectl(&["delete", "cnp", "l7"]);
        lab.await_policies(0);
    }
}

#[test]
fn without_the_proxy_what_needs_it_is_closed_and_nothing_else() {
    let lab = Lab::up(1);
    let [server, near, bystander] = lab.pods([("server", 1), ("near", 1), ("bystander", 1)]);
    let origin = Origin::start(&server, PORT);
    serve_echo(&bystander);
    let flows = bystander.addresses.map(|to| Flow::tcp(&near, to).unwrap());
    let untouched = Conversations::start(flows.into());
    lab.apply_cilium_policy("default", "l7", INGRESS);
    for round in 0..10 {
        for to in server.addresses {
            assert_eq!(ask(&near, to, "GET", "/public"), Some(200), "round {round}");
        }
        origin.take();
        let killed = Instant::now();
        lab.kill(1, Program::Proxy);
        for to in server.addresses {
            assert_ne!(ask(&near, to, "GET", "/secret"), Some(200), "round {round}");
        }
        eventually("the proxy is back", || {
            server.addresses.iter().all(|to| ask(&near, *to, "GET", "/public") == Some(200))
        });
        assert!(killed.elapsed() < Duration::from_secs(3), "round {round}: {:?}", killed.elapsed());
        assert!(origin.take().iter().all(|(_, line)| line == "GET /public HTTP/1.1"));
    }
    let (interrupted, words, _) = untouched.end();
    assert_eq!((interrupted, words > 10), (0, true));
}

/// A proxy that does not know a pod yet would judge by the other end's policy alone.
#[test]
fn a_pod_with_policy_on_requests_starts_when_the_proxy_knows_it() {
    let lab = Lab::up(1);
    let [near] = lab.pods([("near", 1)]);
    lab.apply_cilium_policy("default", "l7", INGRESS);
    lab.signal(1, Program::Proxy, Signal::STOP);
    let pod = |name| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: {name}}}}}\n\
             spec: {{nodeName: node1, containers: [{{name: pause, image: registry.k8s.io/pause}}]}}\n"
        )
    };
    lab.apply(&format!("{}---\n{}", pod("server"), pod("bystander")));
    let ready = ["wait", "--for=condition=Ready", "--timeout=30s", "pod"];
    lab.kubectl(&[&ready[..], &["bystander"]].concat());
    let phase = lab.kubectl(&["get", "pod", "server", "-o", "jsonpath={.status.phase}"]);
    assert_eq!(phase, "Pending", "the proxy has not heard of it");
    lab.signal(1, Program::Proxy, Signal::CONT);
    lab.kubectl(&[&ready[..], &["server"]].concat());
    let server = lab.pod("default", "server");
    let origin = Origin::start(&server, PORT);
    for to in server.addresses {
        assert_eq!(ask(&near, to, "GET", "/public"), Some(200));
        assert_eq!(ask(&near, to, "GET", "/secret"), Some(403));
    }
    assert_eq!(origin.take().len(), 2);
}

/// What is said of a policy counts for the proxy too.
#[test]
fn a_policy_is_told_of_as_in_force_when_the_proxy_has_it() {
    let lab = Lab::up(1);
    lab.pods([("server", 1)]);
    lab.apply_cilium_policy("default", "first", INGRESS);
    let says = |name: &str| {
        let (_, text) = palisade(&lab, &["policy", "get"]);
        let line = text.lines().find(|line| line.contains(&format!("default/{name} ")));
        let line = line.unwrap_or_default().to_owned();
        let path = "jsonpath={.status.conditions[?(@.type==\"Valid\")].status}";
        (line, lab.kubectl(&["get", "cnp", name, "-o", path]))
    };
    let in_force = |name: &str| {
        let (line, valid) = says(name);
        line.contains("in force") && !line.contains("not in force") && valid == "True"
    };
    eventually("the first one is in force", || in_force("first"));
    lab.signal(1, Program::Proxy, Signal::STOP);
    lab.apply(&format!(
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {{name: second}}\n{OTHER}"
    ));
    eventually("the second one waits for the proxy", || {
        says("second").0.contains("not in force yet in the L7 proxy (node1)")
    });
    // What is told of a later one is told after what is told of this one.
    let plain = "spec: {endpointSelector: {}, ingress: [{fromEntities: [cluster]}]}";
    lab.apply_cilium_policy("default", "third", plain);
    eventually("the third one needs no proxy", || says("third").1 == "True");
    assert_eq!(says("second").1, "", "nobody says that it is valid and in force");
    lab.signal(1, Program::Proxy, Signal::CONT);
    eventually("the second one is in force", || in_force("second"));
}

/// Connections that the proxy carries outlive the last policy that sent them there.
#[test]
fn the_end_of_the_last_policy_denies_nothing() {
    let lab = Lab::up(1);
    let [server, near] = lab.pods([("server", 1), ("near", 1)]);
    let _origin = Origin::start(&server, PORT);
    let open =
        || server.addresses.map(|to| Client::connect(&near, SocketAddr::new(to, PORT)).unwrap());
    lab.apply_cilium_policy("default", "l7", INGRESS);
    let mut clients = open();
    for client in &mut clients {
        assert_eq!(client.ask("GET", "/public").unwrap(), 200);
        assert_eq!(client.ask("GET", "/secret").unwrap(), 403);
    }
    lab.kubectl(&["delete", "cnp", "l7"]);
    lab.await_policies(0);
    for client in clients.iter_mut().chain(&mut open()) {
        assert_eq!(client.ask("GET", "/secret").unwrap(), 200, "nothing denies it any more");
    }
    // The next agent knows of no policy that ever asked for a proxy.
    let before = lab.process(1, Program::Agent);
    lab.kill(1, Program::Agent);
    eventually("the next agent is ready", || {
        lab.statuses()
            .iter()
            .flatten()
            .any(|now| now.ready && now.pid != before.as_raw_nonzero().get().cast_unsigned())
    });
    for client in &mut clients {
        assert_ne!(client.ask("GET", "/secret").ok(), Some(403), "it may end, but is not refused");
    }
    for client in &mut open() {
        assert_eq!(client.ask("GET", "/secret").unwrap(), 200);
    }
}

/// It reads what strangers say.
#[test]
fn the_proxy_is_nobody() {
    let lab = Lab::up(1);
    let status = || {
        let process = lab.process(1, Program::Proxy).as_raw_nonzero();
        fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default()
    };
    eventually("the proxy gave up what it does not need", || {
        let status = status();
        let holds = |line: &str| status.lines().any(|found| found == line);
        // CAP_NET_BIND_SERVICE is 10, CAP_NET_ADMIN is 12.
        let capabilities = format!("{:016x}", 1 << 10 | 1 << 12);
        holds(&format!("CapEff:\t{capabilities}"))
            && holds(&format!("CapPrm:\t{capabilities}"))
            && holds(&format!("Uid:\t{}", ["14240"; 4].join("\t")))
            && holds("Seccomp:\t2")
            && holds("NoNewPrivs:\t1")
    });
}

#[test]
fn without_the_agent_requests_are_judged_as_before() {
    let lab = Lab::up(1);
    let [server, near] = lab.pods([("server", 1), ("near", 1)]);
    let origin = Origin::start(&server, PORT);
    lab.apply_cilium_policy("default", "l7", INGRESS);
    let mut clients =
        server.addresses.map(|to| Client::connect(&near, SocketAddr::new(to, PORT)).unwrap());
    for round in 0..5 {
        lab.kill(1, Program::Agent);
        let killed = Instant::now();
        let mut ready = false;
        // Without a pause until the next agent is ready, and a while longer.
        while !ready || killed.elapsed() < Duration::from_secs(2) {
            ready |= lab.statuses().iter().flatten().any(|status| status.ready);
            for (client, to) in clients.iter_mut().zip(server.addresses) {
                assert_eq!(client.ask("GET", "/public").unwrap(), 200, "round {round}");
                assert_eq!(client.ask("GET", "/secret").unwrap(), 403, "round {round}");
                assert_eq!(ask(&near, to, "GET", "/public"), Some(200), "round {round}");
            }
        }
    }
    assert!(origin.take().iter().all(|(_, line)| line == "GET /public HTTP/1.1"));
}
