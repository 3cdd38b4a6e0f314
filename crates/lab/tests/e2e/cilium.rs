//! `CiliumNetworkPolicy` and `CiliumClusterwideNetworkPolicy` at layers 3 and 4. Every step probes
//! every pair of pods, nodes and the outside: both ports, TCP, UDP and echo, IPv4 and IPv6.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

use super::{
    harness::{Lab, Outside, Pod, eventually},
    probe::{self, Answer, Protocol, Target, allow_echo},
    traffic::serve_echo_at,
};

const PORTS: [u16; 2] = [80, 81];
/// Pods and their nodes.
const PODS: [(&str, u8); 5] = [("x/a", 1), ("x/b", 1), ("x/c", 2), ("y/a", 2), ("y/b", 1)];

/// One question: may `from` reach `to` there? The nodes are `n1` and `n2`, the outside is `out`,
/// its second addresses `out2`.
#[derive(Clone, Copy)]
struct Question {
    from: &'static str,
    to: &'static str,
    protocol: Protocol,
    port: u16,
    ipv6: bool,
}

impl Question {
    fn is(&self, protocol: Protocol, port: u16) -> bool {
        self.protocol == protocol && self.port == port
    }

    /// A node reaches the pods that live on it, whatever policies say.
    fn is_from_own_node(&self) -> bool {
        PODS.iter().any(|(pod, node)| self.to == *pod && self.from == format!("n{node}"))
    }

    fn is_from_pod(&self) -> bool {
        self.from.contains('/')
    }

    fn is_from_cluster(&self) -> bool {
        self.from != "out"
    }
}

type Step = (Vec<(&'static str, &'static str)>, fn(&Question) -> bool);

/// A case: policies of one step after another, each `namespace/name` (clusterwide ones have no
/// namespace) with its content, and what is open then.
struct Case {
    title: &'static str,
    steps: Vec<Step>,
}

fn case(
    title: &'static str,
    policies: &[(&'static str, &'static str)],
    open: fn(&Question) -> bool,
) -> Case {
    Case { title, steps: vec![(policies.to_vec(), open)] }
}

impl Case {
    fn then(
        mut self,
        policies: &[(&'static str, &'static str)],
        open: fn(&Question) -> bool,
    ) -> Self {
        self.steps.push((policies.to_vec(), open));
        self
    }
}

/// A policy `x/p` for the pod x/a.
macro_rules! to_a {
    ($rules:literal) => {
        &[("x/p", concat!("spec: {endpointSelector: {matchLabels: {pod: a}}, ", $rules, "}"))]
    };
}

/// Whether the question is one that ingress rules for x/a decide.
fn into_a(q: &Question) -> bool {
    q.to == "x/a" && !q.is_from_own_node()
}

/// See [`api_servers`].
fn is_api_server(place: &str) -> bool {
    matches!(place, "n2" | "out2")
}

fn out_of_a(q: &Question) -> bool {
    q.from == "x/a"
}

#[expect(clippy::too_many_lines, reason = "a table")]
fn cases() -> Vec<Case> {
    use Protocol::{Echo, Tcp, Udp};
    vec![
        case("no policy", &[], |_| true),
        case("fromEndpoints means the policy's own namespace",
            to_a!("ingress: [{fromEndpoints: [{matchLabels: {pod: b}}]}]"),
            |q| !into_a(q) || q.from == "x/b"),
        case("fromEndpoints of another namespace",
            to_a!("ingress: [{fromEndpoints: [{matchLabels: {k8s:io.kubernetes.pod.namespace: 'y'}}]}]"),
            |q| !into_a(q) || q.from.starts_with("y/")),
        case("fromEndpoints by a label of the namespace",
            to_a!("ingress: [{fromEndpoints: [{matchLabels: {k8s:io.cilium.k8s.namespace.labels.team: green, pod: a}}]}]"),
            |q| !into_a(q) || q.from == "y/a"),
        case("fromEndpoints with expressions, one of two",
            to_a!("ingress: [{fromEndpoints: [{matchExpressions: [{key: pod, operator: NotIn, values: [b, c]}]}, \
                   {matchExpressions: [{key: pod, operator: In, values: [c]}]}]}]"),
            |q| !into_a(q) || q.from == "x/c"),
        case("fromEndpoints, everybody of the namespace", to_a!("ingress: [{fromEndpoints: [{}]}]"),
            |q| !into_a(q) || q.from.starts_with("x/")),
        case("an empty rule closes", to_a!("ingress: [{}]"), |q| !into_a(q)),
        case("an empty list of peers closes", to_a!("ingress: [{fromEndpoints: []}]"), |q| !into_a(q)),
        case("entity host", to_a!("ingress: [{fromEntities: [host]}]"), |q| !into_a(q)),
        case("entity remote-node", to_a!("ingress: [{fromEntities: [remote-node]}]"),
            |q| !into_a(q) || q.from == "n2"),
        case("entity world", to_a!("ingress: [{fromEntities: [world]}]"), |q| !into_a(q) || q.from == "out"),
        case("entity cluster", to_a!("ingress: [{fromEntities: [cluster]}]"), |q| !into_a(q) || q.is_from_cluster()),
        case("entity all", to_a!("ingress: [{fromEntities: [all]}]"), |_| true),
        case("entity kube-apiserver", to_a!("ingress: [{fromEntities: [kube-apiserver]}]"),
            |q| !into_a(q) || q.from == "n2"),
        case("entity kube-apiserver, on a node and outside", to_a!("egress: [{toEntities: [kube-apiserver]}]"),
            |q| !out_of_a(q) || is_api_server(q.to)),
        case("entity kube-apiserver, denied", to_a!("egress: [{toEntities: [all]}], egressDeny: [{toEntities: [kube-apiserver]}]"),
            |q| !out_of_a(q) || !is_api_server(q.to)),
        case("fromCIDR means the world, not nodes and pods",
            to_a!("ingress: [{fromCIDR: [172.31.255.0/24, 'fd31::/64', 10.244.0.0/16]}]"),
            |q| !into_a(q) || q.from == "out"),
        case("fromCIDR of one family", to_a!("ingress: [{fromCIDR: [0.0.0.0/0]}]"),
            |q| !into_a(q) || q.from == "out" && !q.ipv6),
        case("fromCIDRSet with except",
            to_a!("ingress: [{fromCIDRSet: [{cidr: 172.31.0.0/16, except: [172.31.255.200/32]}, {cidr: 'fd31::/64'}]}]"),
            |q| !into_a(q) || q.from == "out" && q.ipv6),
        case("an except is no deny",
            to_a!("ingress: [{fromCIDRSet: [{cidr: 172.31.0.0/16, except: [172.31.255.200/32]}]}, {fromCIDR: [172.31.255.192/26]}]"),
            |q| !into_a(q) || q.from == "out" && !q.ipv6),
        case("a port", to_a!("ingress: [{fromEndpoints: [{matchLabels: {pod: b}}], toPorts: [{ports: [{port: '80', protocol: TCP}]}]}]"),
            |q| !into_a(q) || q.from == "x/b" && q.is(Tcp, 80)),
        case("a port of any protocol, for anybody", to_a!("ingress: [{toPorts: [{ports: [{port: '81', protocol: ANY}]}]}]"),
            |q| !into_a(q) || q.port == 81 && q.protocol != Echo),
        case("a range of ports", to_a!("ingress: [{toPorts: [{ports: [{port: '79', endPort: 80, protocol: UDP}]}]}]"),
            |q| !into_a(q) || q.is(Udp, 80)),
        case("all ports of a protocol", to_a!("ingress: [{toPorts: [{ports: [{port: '0', protocol: UDP}]}]}]"),
            |q| !into_a(q) || q.protocol == Udp),
        case("a named port", to_a!("ingress: [{toPorts: [{ports: [{port: serve-81-tcp, protocol: TCP}]}]}]"),
            |q| !into_a(q) || q.is(Tcp, 81)),
        case("icmps of one family", to_a!("ingress: [{icmps: [{fields: [{type: EchoRequest, family: IPv4}]}]}]"),
            |q| !into_a(q) || q.protocol == Echo && !q.ipv6),
        case("icmps with peers, by number",
            to_a!("ingress: [{fromEndpoints: [{}], icmps: [{fields: [{type: 8}, {type: 128, family: IPv6}]}]}]"),
            |q| !into_a(q) || q.protocol == Echo && q.from.starts_with("x/")),
        case("another type of icmp", to_a!("ingress: [{icmps: [{fields: [{type: Timestamp, family: IPv4}]}]}]"),
            |q| !into_a(q)),
        case("deny beats allow",
            to_a!("ingress: [{fromEntities: [all]}], ingressDeny: [{fromEndpoints: [{matchLabels: {pod: b}}]}]"),
            |q| !into_a(q) || q.from != "x/b"),
        case("deny of a port beats a wider allow",
            to_a!("ingress: [{fromEndpoints: [{}]}], ingressDeny: [{fromEndpoints: [{matchLabels: {pod: b}}], toPorts: [{ports: [{port: '80'}]}]}]"),
            |q| !into_a(q) || q.from.starts_with("x/") && !(q.from == "x/b" && q.port == 80)),
        case("a wide deny beats a narrow allow",
            to_a!("ingress: [{fromEndpoints: [{matchLabels: {pod: b}}], toPorts: [{ports: [{port: '80', protocol: TCP}]}]}], \
                   ingressDeny: [{fromEntities: [cluster]}]"),
            |q| !into_a(q)),
        case("deny alone closes everything else too", to_a!("ingressDeny: [{fromEndpoints: [{matchLabels: {pod: b}}]}]"),
            |q| !into_a(q)),
        case("deny without default deny",
            to_a!("enableDefaultDeny: {ingress: false}, ingressDeny: [{fromEndpoints: [{matchLabels: {pod: b}}]}]"),
            |q| !into_a(q) || q.from != "x/b"),
        case("allow without default deny", to_a!("enableDefaultDeny: {ingress: false}, ingress: [{fromEndpoints: [{}]}]"),
            |_| true)
            .then(&[("x/q", "spec: {endpointSelector: {matchLabels: {pod: a}}, ingress: [{fromEntities: [world]}]}")],
            |q| !into_a(q) || q.from == "out" || q.from.starts_with("x/")),
        case("several rules in one object",
            &[("x/p", "specs: [{endpointSelector: {matchLabels: {pod: a}}, ingress: [{fromEndpoints: [{matchLabels: {pod: b}}]}]}, \
                       {endpointSelector: {matchLabels: {pod: b}}, egress: [{toEndpoints: [{matchLabels: {pod: a}}]}]}]")],
            |q| (!into_a(q) || q.from == "x/b") && (q.from != "x/b" || q.to == "x/a")),
        case("toEndpoints", to_a!("egress: [{toEndpoints: [{matchLabels: {k8s:io.kubernetes.pod.namespace: 'y'}}]}]"),
            |q| !out_of_a(q) || q.to.starts_with("y/")),
        case("egress to the host", to_a!("egress: [{toEntities: [host]}]"), |q| !out_of_a(q) || q.to == "n1"),
        case("egress to remote nodes", to_a!("egress: [{toEntities: [remote-node]}]"), |q| !out_of_a(q) || q.to == "n2"),
        case("egress to the cluster", to_a!("egress: [{toEntities: [cluster]}]"),
            |q| !out_of_a(q) || !q.to.starts_with("out")),
        case("egress to the world", to_a!("egress: [{toEntities: [world]}]"),
            |q| !out_of_a(q) || q.to.starts_with("out")),
        case("egress to everybody", to_a!("egress: [{toEntities: [all]}]"), |_| true),
        case("egress to a CIDR", to_a!("egress: [{toCIDR: [172.31.255.201/32, 'fd31::200/128', 10.244.0.0/16]}]"),
            |q| !out_of_a(q) || q.to == if q.ipv6 { "out" } else { "out2" }),
        case("egress to a CIDR with except",
            to_a!("egress: [{toCIDRSet: [{cidr: 0.0.0.0/0, except: [172.31.255.200/32]}, {cidr: '::/0', except: ['fd31::201/128']}]}]"),
            |q| !out_of_a(q) || q.to == if q.ipv6 { "out" } else { "out2" }),
        case("egress to a port", to_a!("egress: [{toPorts: [{ports: [{port: '80', protocol: TCP}, {port: '81', protocol: UDP}]}]}]"),
            |q| !out_of_a(q) || q.is(Tcp, 80) || q.is(Udp, 81)),
        case("egress to a port with a name, which only pods have",
            to_a!("egress: [{toPorts: [{ports: [{port: serve-80-udp, protocol: UDP}]}]}]"),
            |q| !out_of_a(q) || q.to.contains('/') && q.is(Udp, 80)),
        case("egress of icmp", to_a!("egress: [{toEntities: [cluster], icmps: [{fields: [{type: EchoRequest, family: IPv6}]}]}]"),
            |q| !out_of_a(q) || q.protocol == Echo && q.ipv6 && !q.to.starts_with("out")),
        case("egressDeny beats egress",
            to_a!("egress: [{toEntities: [all]}], egressDeny: [{toCIDR: [172.31.255.200/32]}, {toEntities: [remote-node]}, \
                   {toEndpoints: [{matchLabels: {pod: b}}], toPorts: [{ports: [{port: '81', protocol: UDP}]}]}]"),
            |q| !out_of_a(q) || (q.to != "out" || q.ipv6) && q.to != "n2" && !(q.to == "x/b" && q.is(Udp, 81))),
        case("both directions",
            to_a!("ingress: [{fromEntities: [world]}], egress: [{toEntities: [world]}]"),
            |q| (!into_a(q) || q.from == "out") && (!out_of_a(q) || q.to.starts_with("out"))),
        case("one policy for both ends",
            &[("x/p", "spec: {endpointSelector: {}, ingress: [{fromEndpoints: [{}]}], egress: [{toEndpoints: [{}]}]}")],
            |q| (!q.to.starts_with("x/") || q.is_from_own_node() || q.from.starts_with("x/"))
                && (!q.from.starts_with("x/") || q.to.starts_with("x/"))),
        case("clusterwide",
            &[("/p", "spec: {endpointSelector: {matchLabels: {pod: a}}, ingress: [{fromEndpoints: [{matchLabels: {pod: b}}]}]}")],
            |q| !q.to.ends_with("/a") || q.is_from_own_node() || q.from.ends_with("/b")),
        case("clusterwide, from every pod of the cluster",
            &[("/p", "spec: {endpointSelector: {matchLabels: {pod: a}}, ingress: [{fromEndpoints: [{}]}]}")],
            |q| !q.to.ends_with("/a") || q.is_from_own_node() || q.is_from_pod()),
        case("clusterwide deny beats what others allow",
            &[("/p", "spec: {endpointSelector: {}, enableDefaultDeny: {ingress: false, egress: false}, \
                      ingressDeny: [{fromEndpoints: [{matchLabels: {pod: c}}]}], egressDeny: [{toEntities: [world]}]}"),
              ("x/p", "spec: {endpointSelector: {matchLabels: {pod: a}}, ingress: [{fromEndpoints: [{}]}], egress: [{toEntities: [all]}]}")],
            |q| (!into_a(q) || q.from.starts_with("x/"))
                && (q.from != "x/c" || !q.to.contains('/'))
                && !(q.is_from_pod() && q.to.starts_with("out"))),
        case("policies add up",
            &[("x/p", "spec: {endpointSelector: {matchLabels: {pod: a}}, ingress: [{fromEndpoints: [{matchLabels: {pod: b}}]}]}"),
              ("/p", "spec: {endpointSelector: {matchLabels: {k8s:io.kubernetes.pod.namespace: x, pod: a}}, ingress: [{fromEntities: [remote-node]}]}")],
            |q| !into_a(q) || ["x/b", "n2"].contains(&q.from)),
    ]
}

struct World {
    lab: Lab,
    /// Everybody who asks.
    places: BTreeMap<&'static str, Pod>,
    targets: Vec<(&'static str, Target)>,
}

fn manifest() -> String {
    let namespaces = [("x", "blue"), ("y", "green")].map(|(name, team)| {
        format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: '{name}', labels: {{team: {team}}}}}\n---\n"
        )
    });
    let ports = PORTS.map(|port| {
        ["TCP", "UDP"].map(|protocol| {
            let name = format!("serve-{port}-{}", protocol.to_lowercase());
            format!("{{name: {name}, containerPort: {port}, protocol: {protocol}}}")
        })
    });
    let ports = ports.concat().join(", ");
    let pods = PODS.map(|(name, node)| {
        let (namespace, pod) = name.split_once('/').unwrap();
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {pod}, namespace: '{namespace}', labels: {{pod: {pod}}}}}\n\
             spec: {{nodeName: node{node}, containers: [{{name: pause, image: registry.k8s.io/pause, ports: [{ports}]}}]}}\n---\n"
        )
    });
    namespaces.into_iter().chain(pods).collect()
}

/// Tells the cluster of API servers at these addresses, besides its own.
fn api_servers(addresses: &[IpAddr]) -> String {
    let slice = |family: &str, addresses: Vec<String>| {
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: more-{}, labels: {{kubernetes.io/service-name: kubernetes}}}}\n\
             addressType: {family}\nports: [{{name: https, port: 6443}}]\n\
             endpoints: [{{addresses: [{}]}}]\n---\n",
            family.to_lowercase(),
            addresses.join(", ")
        )
    };
    let (v4, v6): (Vec<_>, Vec<_>) = addresses.iter().partition(|address| address.is_ipv4());
    let text = |addresses: Vec<&IpAddr>| addresses.iter().map(|it| format!("'{it}'")).collect();
    slice("IPv4", text(v4)) + &slice("IPv6", text(v6))
}

impl World {
    fn new() -> (Self, Outside) {
        let lab = Lab::up(2);
        lab.apply(&manifest());
        let mut places = BTreeMap::new();
        for namespace in ["x", "y"] {
            let ready = ["-n", namespace, "wait", "--for=condition=Ready", "pod", "--all"];
            lab.kubectl(&ready);
        }
        for (name, _) in PODS {
            let (namespace, pod) = name.split_once('/').unwrap();
            places.insert(name, lab.pod(namespace, pod));
        }
        for (name, number) in [("n1", 1), ("n2", 2)] {
            places.insert(name, lab.node(number));
        }
        let mut addresses: Vec<_> =
            places.iter().map(|(name, place)| (*name, place.addresses)).collect();
        let outside = Outside::new(&lab);
        let known = [lab.node(2).addresses, outside.second].concat();
        lab.apply(&api_servers(&known));
        // Who has several addresses must answer from the one that was asked.
        let serve = |place: &Pod, own: [IpAddr; 2]| {
            for address in own {
                for port in PORTS {
                    serve_echo_at(place, SocketAddr::new(address, port));
                }
            }
        };
        places.values().for_each(|place| serve(place, place.addresses));
        for (name, own) in [("out", outside.pod.addresses), ("out2", outside.second)] {
            addresses.push((name, own));
            serve(&outside.pod, own);
        }
        let targets = addresses.iter().flat_map(|(name, own)| {
            let ways = own.iter().flat_map(|address| {
                let ports = PORTS.into_iter().flat_map(|port| {
                    [Protocol::Tcp, Protocol::Udp].map(|protocol| (protocol, port))
                });
                let ways = ports.chain([(Protocol::Echo, 0)]);
                ways.map(|(protocol, port)| Target { protocol, address: *address, port })
            });
            ways.map(|target| (*name, target))
        });
        let targets = targets.collect();
        let world = Self { lab, places, targets };
        world.places.values().for_each(allow_echo);
        allow_echo(&outside.pod);
        (world, outside)
    }

    fn apply(&self, name: &str, content: &str) {
        let (namespace, name) = name.split_once('/').unwrap();
        self.lab.apply_cilium_policy(namespace, name, content);
    }

    fn reset(&self) {
        self.lab.kubectl(&["-n", "x", "delete", "cnp", "--all"]);
        self.lab.kubectl(&["delete", "ccnp", "--all"]);
        self.lab.await_policies(0);
    }

    /// Probes everything of which one end is a pod; tells what is not as it should be, and how
    /// many answers there were.
    fn check(&self, outside: &Outside, open: fn(&Question) -> bool) -> (usize, Vec<String>) {
        let places = self.places.iter().map(|(name, place)| (*name, place));
        let started: Vec<_> = places
            .chain([("out", &outside.pod)])
            .map(|(from, place)| {
                let asked = |to: &str| from != to && (from.contains('/') || to.contains('/'));
                let targets: Vec<_> =
                    self.targets.iter().filter(|(to, _)| asked(to)).copied().collect();
                let run = probe::start(place, targets.iter().map(|(_, target)| *target).collect());
                (from, targets, run)
            })
            .collect();
        let (mut count, mut wrong) = (0, Vec::new());
        for (from, targets, run) in started {
            for ((to, target), answer) in targets.into_iter().zip(run.join().unwrap().unwrap()) {
                count += 1;
                let Target { protocol, address, port } = target;
                let question = Question { from, to, protocol, port, ipv6: address.is_ipv6() };
                let expected = if open(&question) { Answer::Open } else { Answer::Silence };
                if answer != expected {
                    wrong.push(format!(
                        "{from} → {to} {address} {protocol:?} {port}: {answer:?} instead of {expected:?}"
                    ));
                }
            }
        }
        (count, wrong)
    }

    /// The condition `Valid` of the policy x/p, once it speaks of the present generation.
    fn condition(&self) -> (String, String) {
        let mut found = None;
        eventually("the policy's condition is written", || {
            let get = ["-n", "x", "get", "cnp", "p", "-o", "json"];
            let object: serde_json::Value = serde_json::from_str(&self.lab.kubectl(&get)).unwrap();
            let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let valid = conditions.into_iter().find(|condition| {
                condition["type"] == "Valid"
                    && condition["observedGeneration"] == object["metadata"]["generation"]
            });
            found = valid.map(|valid| {
                let text = |field: &str| valid[field].as_str().unwrap().to_owned();
                (text("status"), text("message"))
            });
            found.is_some()
        });
        found.unwrap()
    }

    /// Policies that are not understood: their subjects are closed in the directions that they
    /// name, and what the last good version allowed stays.
    fn refused_policies(&self, outside: &Outside) {
        let expect = |what: &str, open: fn(&Question) -> bool| {
            let (_, wrong) = self.check(outside, open);
            assert!(wrong.is_empty(), "{what}:\n{}", wrong.join("\n"));
        };
        let refused = |field: &str| {
            let (status, message) = self.condition();
            assert_eq!(status, "False");
            assert!(message.contains(field), "{message:?} does not name {field}");
        };
        let [(_, good)] = to_a!("ingress: [{fromEndpoints: [{matchLabels: {pod: b}}]}]");
        let [(_, tls)] = to_a!(
            "ingress: [{fromEndpoints: [{}], toPorts: [{ports: [{port: '80', protocol: TCP}], \
            terminatingTLS: {secret: {name: s}}}]}]"
        );
        let [(_, nodes)] = to_a!("egress: [{toNodes: [{matchLabels: {rack: '1'}}]}]");

        self.apply("x/p", tls);
        refused("spec.ingress[0].toPorts[0].terminatingTLS");
        expect("terminated TLS from the beginning", |q| !into_a(q));
        self.apply("x/p", good);
        assert_eq!(self.condition().0, "True");
        expect("then something good", |q| !into_a(q) || q.from == "x/b");
        self.apply("x/p", tls);
        refused("spec.ingress[0].toPorts[0].terminatingTLS");
        expect("the last good version stands", |q| !into_a(q) || q.from == "x/b");
        self.apply("x/p", nodes);
        refused("spec.egress[0].toNodes");
        expect("and egress is closed", |q| (!into_a(q) || q.from == "x/b") && !out_of_a(q));
        self.reset();
        expect("deleted", |_| true);
    }
}

#[test]
fn cilium_policies_at_layers_3_and_4() {
    let (world, outside) = World::new();
    world.refused_policies(&outside);
    let (mut probes, mut steps, mut failures) = (0, 0, Vec::new());
    let cases = cases();
    for case in &cases {
        for (policies, open) in &case.steps {
            policies.iter().for_each(|(name, content)| world.apply(name, content));
            let (count, wrong) = world.check(&outside, *open);
            probes += count;
            steps += 1;
            if !wrong.is_empty() {
                let sample: Vec<&str> = wrong.iter().take(6).map(String::as_str).collect();
                let (title, number) = (case.title, wrong.len());
                failures.push(format!(
                    "{title}: {number} of {count} wrong:\n  {}",
                    sample.join("\n  ")
                ));
            }
        }
        world.reset();
    }
    println!("{} cases, {steps} steps, {probes} probes", cases.len());
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
}
