//! The NetworkPolicy matrices of the Kubernetes end-to-end tests: three namespaces of three pods,
//! on three nodes. Every case probes every pair, both ports, TCP and UDP, IPv4 and IPv6, by pod
//! address and by Service, so one case says more than its upstream namesake.

use std::collections::BTreeMap;

use super::{
    harness::{Lab, Pod},
    probe::{self, Answer, Protocol, Target},
    traffic::serve_echo_on,
};

const NAMESPACES: [&str; 3] = ["x", "y", "z"];
const PORTS: [u16; 2] = [80, 81];
const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

/// One question: may `from` reach `to` there?
struct Question {
    from: &'static str,
    to: &'static str,
    port: u16,
    protocol: Protocol,
}

impl Question {
    fn source_namespace(&self) -> &str {
        &self.from[..1]
    }

    fn target_namespace(&self) -> &str {
        &self.to[..1]
    }

    fn is(&self, port: u16, protocol: Protocol) -> bool {
        self.port == port && self.protocol == protocol
    }
}

/// What a step does before everything is probed.
enum Action {
    /// Applies a policy: namespace, name, spec. `{x/b 4}` and `{x/b 6}` stand for the pod's
    /// addresses.
    Policy(&'static str, &'static str, String),
    /// Deletes a policy.
    Delete(&'static str, &'static str),
    /// Labels a pod, for this case only.
    LabelPod(&'static str, &'static str),
    /// Labels a namespace, for this case only.
    LabelNamespace(&'static str, &'static str),
}

type Step = (Vec<Action>, fn(&Question) -> bool);

struct Case {
    title: &'static str,
    steps: Vec<Step>,
}

fn case(title: &'static str, actions: Vec<Action>, open: fn(&Question) -> bool) -> Case {
    Case { title, steps: vec![(actions, open)] }
}

impl Case {
    fn then(mut self, actions: Vec<Action>, open: fn(&Question) -> bool) -> Self {
        self.steps.push((actions, open));
        self
    }
}

/// A policy of the name `p` in namespace x.
fn in_x(spec: &str) -> Vec<Action> {
    vec![Action::Policy("x", "p", spec.into())]
}

/// Ingress rules for the pod x/a.
fn to_a(rules: &str) -> Vec<Action> {
    in_x(&format!("{{podSelector: {{matchLabels: {{pod: a}}}}, ingress: [{rules}]}}"))
}

/// Egress rules for the pod x/a.
fn from_a(rules: &str) -> Vec<Action> {
    in_x(&format!(
        "{{podSelector: {{matchLabels: {{pod: a}}}}, policyTypes: [Egress], egress: [{rules}]}}"
    ))
}

const NS_Y: &str = "{namespaceSelector: {matchLabels: {ns: 'y'}}}";
const NS_NOT_X: &str =
    "{namespaceSelector: {matchExpressions: [{key: ns, operator: NotIn, values: [x]}]}}";

#[expect(clippy::too_many_lines, reason = "a table")]
fn cases() -> Vec<Case> {
    use Action::{Delete, LabelNamespace, LabelPod, Policy};
    use Protocol::{Tcp, Udp};
    let deny_ingress = "{podSelector: {}, policyTypes: [Ingress]}";
    let deny_egress = "{podSelector: {}, policyTypes: [Egress]}";
    let deny_all = "{podSelector: {}, policyTypes: [Ingress, Egress]}";
    let allow_ingress = "{podSelector: {}, ingress: [{}]}";
    let ports =
        |protocol: &str, port: &str| format!("ports: [{{protocol: {protocol}, port: {port}}}]");
    let y_on =
        |protocol: &str, port: &str| format!("{{from: [{NS_Y}], {}}}", ports(protocol, port));
    let pod = |name: &str| format!("podSelector: {{matchLabels: {{pod: {name}}}}}");
    let block = |address: &str| {
        format!(
            "{{ipBlock: {{cidr: '{{{address} 4}}/32'}}}}, {{ipBlock: {{cidr: '{{{address} 6}}/128'}}}}"
        )
    };
    let around = |address: &str| {
        format!(
            "{{ipBlock: {{cidr: 0.0.0.0/4, except: ['{{{address} 4}}/32']}}}}, \
             {{ipBlock: {{cidr: 'f000::/4', except: ['{{{address} 6}}/128']}}}}"
        )
    };
    vec![
        case("default-deny-ingress", in_x(deny_ingress), |q| q.target_namespace() != "x"),
        case("default-deny-all", in_x(deny_all), |q| {
            q.target_namespace() != "x" && q.source_namespace() != "x"
        }),
        case("ingress from pods of the namespace by PodSelector",
            to_a(&format!("{{from: [{{{}}}]}}", pod("b"))),
            |q| q.to != "x/a" || q.from == "x/b"),
        case("ingress for one target in a denied namespace",
            vec![Policy("x", "deny", deny_ingress.into()),
                 Policy("x", "p", "{podSelector: {matchLabels: {pod: a}}, ingress: [{}]}".into())],
            |q| q.target_namespace() != "x" || q.to == "x/a"),
        case("ingress from all namespaces", to_a("{from: [{namespaceSelector: {}}]}"), |_| true),
        case("ingress only from another namespace", to_a(&format!("{{from: [{NS_Y}]}}")),
            |q| q.to != "x/a" || q.source_namespace() == "y"),
        case("PodSelector with MatchExpressions",
            to_a("{from: [{podSelector: {matchExpressions: [{key: pod, operator: In, values: [b]}]}}]}"),
            |q| q.to != "x/a" || q.from == "x/b"),
        case("NamespaceSelector with MatchExpressions",
            to_a("{from: [{namespaceSelector: {matchExpressions: [{key: ns, operator: In, values: ['y']}]}}]}"),
            |q| q.to != "x/a" || q.source_namespace() == "y"),
        case("PodSelector or NamespaceSelector",
            to_a(&format!("{{from: [{{{}}}, {NS_NOT_X}]}}", pod("b"))),
            |q| q.to != "x/a" || q.from == "x/b" || q.source_namespace() != "x"),
        case("PodSelector and NamespaceSelector",
            to_a("{from: [{namespaceSelector: {matchExpressions: [{key: ns, operator: NotIn, values: [x]}]}, \
                   podSelector: {matchLabels: {pod: b}}}]}"),
            |q| q.to != "x/a" || ["y/b", "z/b"].contains(&q.from)),
        case("several PodSelectors and NamespaceSelectors",
            to_a("{from: [{namespaceSelector: {matchExpressions: [{key: ns, operator: NotIn, values: [x]}]}, \
                   podSelector: {matchExpressions: [{key: pod, operator: In, values: [b, c]}]}}]}"),
            |q| q.to != "x/a" || ["y/b", "y/c", "z/b", "z/c"].contains(&q.from)),
        case("any of two PodSelectors",
            to_a(&format!("{{from: [{{{}}}, {{{}}}]}}", pod("b"), pod("c"))),
            |q| q.to != "x/a" || ["x/b", "x/c"].contains(&q.from)),
        case("only from a pod of another namespace",
            to_a("{from: [{namespaceSelector: {matchLabels: {ns: 'y'}}, podSelector: {matchLabels: {pod: a}}}]}"),
            |q| q.to != "x/a" || q.from == "y/a"),
        case("based on ports", to_a(&y_on("TCP", "81")),
            |q| q.to != "x/a" || q.source_namespace() == "y" && q.is(81, Tcp)),
        case("stacked policies with overlapping selectors", to_a(&y_on("TCP", "81")),
            |q| q.to != "x/a" || q.source_namespace() == "y" && q.is(81, Tcp))
            .then(vec![Policy("x", "second", format!(
                "{{podSelector: {{matchLabels: {{pod: a}}}}, ingress: [{}]}}", y_on("TCP", "80")))],
            |q| q.to != "x/a" || q.source_namespace() == "y" && q.protocol == Tcp),
        case("allow-all", in_x(allow_ingress), |_| true),
        case("ingress on a named port",
            in_x(&format!("{{podSelector: {{}}, ingress: [{{{}}}]}}", ports("TCP", "serve-81-tcp"))),
            |q| q.target_namespace() != "x" || q.is(81, Tcp)),
        case("ingress from a namespace on a named port", to_a(&y_on("TCP", "serve-80-tcp")),
            |q| q.to != "x/a" || q.source_namespace() == "y" && q.is(80, Tcp)),
        case("egress on a named port",
            in_x(&format!("{{podSelector: {{}}, policyTypes: [Egress], egress: [{{{}}}]}}",
                ports("TCP", "serve-80-tcp"))),
            |q| q.source_namespace() != "x" || q.is(80, Tcp)),
        case("an updated policy", in_x(allow_ingress), |_| true)
            .then(in_x(deny_ingress), |q| q.target_namespace() != "x"),
        case("ingress from an updated namespace",
            to_a("{from: [{namespaceSelector: {matchLabels: {ns2: updated}}}]}"), |q| q.to != "x/a")
            .then(vec![LabelNamespace("y", "ns2=updated")],
            |q| q.to != "x/a" || q.source_namespace() == "y"),
        case("ingress from an updated pod",
            to_a("{from: [{podSelector: {matchLabels: {pod2: updated}}}]}"), |q| q.to != "x/a")
            .then(vec![LabelPod("x/b", "pod2=updated")], |q| q.to != "x/a" || q.from == "x/b"),
        case("no ingress from other namespaces",
            in_x("{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}"),
            |q| q.target_namespace() != "x" || q.source_namespace() == "x"),
        case("no ingress to an updated pod",
            in_x("{podSelector: {matchLabels: {target: isolated}}, policyTypes: [Ingress]}"), |_| true)
            .then(vec![LabelPod("x/a", "target=isolated")], |q| q.to != "x/a"),
        case("no egress of a pod", from_a(""), |q| q.from != "x/a"),
        case("no egress of a namespace", in_x(deny_egress), |q| q.source_namespace() != "x"),
        case("ingress and egress together",
            in_x(&format!("{{podSelector: {{matchLabels: {{pod: a}}}}, policyTypes: [Ingress, Egress], \
                ingress: [{{from: [{{{}}}]}}], egress: [{{{}}}]}}", pod("b"), ports("TCP", "80"))),
            |q| (q.to != "x/a" || q.from == "x/b") && (q.from != "x/a" || q.is(80, Tcp))),
        case("denied at the client, though the server would allow it",
            from_a("{to: [{namespaceSelector: {matchLabels: {ns: 'y'}}, podSelector: {matchLabels: {pod: a}}}]}")
                .into_iter()
                .chain(["a", "b"].map(|name| Policy("y", name, format!(
                    "{{podSelector: {{matchLabels: {{pod: {name}}}}}, ingress: [{{from: [{{namespaceSelector: \
                     {{matchLabels: {{ns: x}}}}, podSelector: {{matchLabels: {{pod: a}}}}}}]}}]}}"))))
                .collect(),
            |q| (q.from != "x/a" || q.to == "y/a") && (!["y/a", "y/b"].contains(&q.to) || q.from == "x/a")),
        case("egress to a server of another namespace",
            from_a("{to: [{namespaceSelector: {matchLabels: {ns: 'y'}}, podSelector: {matchLabels: {pod: a}}}]}"),
            |q| q.from != "x/a" || q.to == "y/a"),
        case("ingress on any port of a protocol", to_a("{ports: [{protocol: TCP}]}"),
            |q| q.to != "x/a" || q.protocol == Tcp),
        case("several ingress policies, allow-all wins",
            in_x(&format!("{{podSelector: {{}}, ingress: [{{{}}}]}}", ports("TCP", "80"))),
            |q| q.target_namespace() != "x" || q.is(80, Tcp))
            .then(vec![Policy("x", "all", allow_ingress.into())], |_| true),
        case("several egress policies, allow-all wins",
            in_x(&format!("{{podSelector: {{}}, policyTypes: [Egress], egress: [{{{}}}]}}", ports("TCP", "80"))),
            |q| q.source_namespace() != "x" || q.is(80, Tcp))
            .then(vec![Policy("x", "all",
                "{podSelector: {}, policyTypes: [Egress], egress: [{}]}".into())], |_| true),
        case("deleted policies are not enforced", in_x(deny_all), |q| {
            q.target_namespace() != "x" && q.source_namespace() != "x"
        })
        .then(vec![Delete("x", "p")], |_| true),
        case("egress to an ipBlock that is a pod", from_a(&format!("{{to: [{}]}}", block("y/b"))),
            |q| q.from != "x/a" || q.to == "y/b"),
        case("an ipBlock with except", from_a(&format!("{{to: [{}]}}", around("x/b"))),
            |q| q.from != "x/a" || q.to != "x/b"),
        case("ipBlocks of which one allows what the other excepts",
            from_a(&format!("{{to: [{}]}}", around("x/b"))), |q| q.from != "x/a" || q.to != "x/b")
            .then(from_a(&format!("{{to: [{}]}}", block("x/b"))), |q| q.from != "x/a" || q.to == "x/b")
            .then(from_a(&format!("{{to: [{}, {}]}}", around("x/b"), block("x/b"))), |_| true),
        case("ingress and egress independently",
            vec![Policy("x", "in", "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress]}".into()),
                 Policy("x", "out", "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{}]}".into())],
            |q| q.to != "x/a"),
        case("SCTP is not TCP", to_a(&format!("{{{}}}", ports("SCTP", "81"))), |q| q.to != "x/a"),
        case("a policy for SCTP isolates", to_a(&format!("{{{}}}", ports("SCTP", "80"))), |q| q.to != "x/a"),
        case("UDP is not TCP", to_a(&format!("{{{}}}", ports("UDP", "81"))),
            |q| q.to != "x/a" || q.is(81, Udp)),
        case("the namespace's own label, MatchLabels",
            to_a("{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: 'y'}}}]}"),
            |q| q.to != "x/a" || q.source_namespace() == "y"),
        case("the namespace's own label, MatchExpressions",
            from_a("{to: [{namespaceSelector: {matchExpressions: \
                [{key: kubernetes.io/metadata.name, operator: NotIn, values: ['y']}]}}]}"),
            |q| q.from != "x/a" || q.target_namespace() != "y"),
        case("based on ports, UDP", to_a(&y_on("UDP", "81")),
            |q| q.to != "x/a" || q.source_namespace() == "y" && q.is(81, Udp)),
        case("a range of ports",
            to_a("{ports: [{protocol: TCP, port: 81, endPort: 90}, {protocol: UDP, port: 70, endPort: 80}]}"),
            |q| q.to != "x/a" || q.is(81, Tcp) || q.is(80, Udp)),
    ]
}

struct World {
    lab: Lab,
    /// By `namespace/name`.
    pods: BTreeMap<&'static str, Pod>,
    targets: Vec<(&'static str, Target)>,
}

/// `x/a` … `z/c`.
const NAMES: [&str; 9] = ["x/a", "x/b", "x/c", "y/a", "y/b", "y/c", "z/a", "z/b", "z/c"];

fn manifest() -> String {
    let namespaces = NAMESPACES.map(|name| {
        format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: '{name}', labels: {{ns: '{name}'}}}}\n---\n")
    });
    let ports: String = PORTS
        .iter()
        .flat_map(|port| {
            ["TCP", "UDP"].map(|protocol| {
                let name = format!("serve-{port}-{}", protocol.to_lowercase());
                format!("{{name: {name}, protocol: {protocol}, containerPort: {port}}}, ")
            })
        })
        .collect();
    let service_ports = ports.replace("containerPort", "port");
    let pods = NAMES.iter().enumerate().map(|(number, name)| {
        let (namespace, pod) = (&name[..1], &name[2..]);
        // Pairs on one node and across nodes, within and between namespaces.
        let node = (number + number / 3) % 3 + 1;
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {pod}, namespace: '{namespace}', labels: {{pod: {pod}}}}}\n\
             spec: {{nodeName: node{node}, containers: [{{name: pause, image: registry.k8s.io/pause, ports: [{ports}]}}]}}\n\
             ---\n\
             apiVersion: v1\nkind: Service\nmetadata: {{name: {pod}, namespace: '{namespace}'}}\n\
             spec: {{ipFamilyPolicy: RequireDualStack, selector: {{pod: {pod}}}, ports: [{service_ports}]}}\n---\n"
        )
    });
    namespaces.into_iter().chain(pods).collect()
}

impl World {
    fn new() -> Self {
        let lab = Lab::up(3);
        lab.apply(&manifest());
        for namespace in NAMESPACES {
            let ready = ["wait", "--for=condition=Ready", "pod", "--all", "--timeout=60s"];
            lab.kubectl(&[&["-n", namespace], &ready[..]].concat());
        }
        let pods: BTreeMap<_, _> =
            NAMES.map(|name| (name, lab.pod(&name[..1], &name[2..]))).into_iter().collect();
        let mut targets = Vec::new();
        for (name, pod) in &pods {
            for port in PORTS {
                serve_echo_on(pod, port);
            }
            let clusters = ["-n", &name[..1], "get", "service", &name[2..], "-o"];
            let clusters =
                lab.kubectl(&[&clusters[..], &["jsonpath={.spec.clusterIPs[*]}"]].concat());
            let clusters: Vec<_> =
                clusters.split_whitespace().map(|text| text.parse().unwrap()).collect();
            assert_eq!(clusters.len(), 2);
            for address in clusters.into_iter().chain(pod.addresses) {
                for port in PORTS {
                    let to = PROTOCOLS.map(|protocol| Target { protocol, address, port });
                    targets.extend(to.map(|target| (*name, target)));
                }
            }
        }
        // Every agent knows every Service with its backend: two addresses, four ports each.
        lab.await_table("service-entries", |rows| rows.len() >= NAMES.len() * 8);
        Self { lab, pods, targets }
    }

    fn act(&self, action: &Action) {
        match action {
            Action::Policy(namespace, name, spec) => {
                self.lab.apply_policy(namespace, name, &self.with_addresses(spec));
            }
            Action::Delete(namespace, name) => {
                self.lab.kubectl(&["-n", namespace, "delete", "netpol", name]);
                let policy = format!("NetworkPolicy {namespace}/{name}");
                self.lab.await_table("policies", |rows| rows.iter().all(|row| row[0] != policy));
            }
            Action::LabelPod(pod, label) => {
                self.lab.kubectl(&["-n", &pod[..1], "label", "pod", &pod[2..], label]);
                let label = format!("k8s:{label}");
                self.await_identity(|row| {
                    row[0] != *pod || numbered(row) && row[2].contains(&label)
                });
            }
            Action::LabelNamespace(namespace, label) => {
                self.lab.kubectl(&["label", "namespace", namespace, label]);
                let label = format!("namespace.labels.{label}");
                self.await_identity(|row| {
                    !row[0].starts_with(namespace) || numbered(row) && row[2].contains(&label)
                });
            }
        }
    }

    fn await_identity(&self, holds: impl Fn(&[String]) -> bool) {
        self.lab.await_table("pod-identities", |rows| rows.iter().all(|row| holds(row)));
    }

    fn with_addresses(&self, spec: &str) -> String {
        self.pods.iter().fold(spec.to_owned(), |spec, (name, pod)| {
            let [v4, v6] = pod.addresses.map(|address| address.to_string());
            spec.replace(&format!("{{{name} 4}}"), &v4).replace(&format!("{{{name} 6}}"), &v6)
        })
    }

    /// Undoes what actions did.
    fn reset(&self, case: &Case) {
        for namespace in NAMESPACES {
            self.lab.kubectl(&["-n", namespace, "delete", "netpol", "--all"]);
        }
        self.lab.await_policies(0);
        for action in case.steps.iter().flat_map(|(actions, _)| actions) {
            let key = |label: &'static str| label.split('=').next().unwrap();
            match action {
                Action::LabelPod(pod, label) => {
                    let remove = format!("{}-", key(label));
                    self.lab.kubectl(&["-n", &pod[..1], "label", "pod", &pod[2..], &remove]);
                    self.await_identity(|row| numbered(row) && !row[2].contains(key(label)));
                }
                Action::LabelNamespace(namespace, label) => {
                    let remove = format!("{}-", key(label));
                    self.lab.kubectl(&["label", "namespace", namespace, &remove]);
                    self.await_identity(|row| numbered(row) && !row[2].contains(key(label)));
                }
                Action::Policy(..) | Action::Delete(..) => {}
            }
        }
    }

    /// Probes everything; tells what is not as it should be, and how many answers there were.
    fn check(&self, open: fn(&Question) -> bool) -> (usize, Vec<String>) {
        let started: Vec<_> = self
            .pods
            .iter()
            .map(|(from, pod)| {
                let targets: Vec<_> =
                    self.targets.iter().filter(|(to, _)| to != from).copied().collect();
                let run = probe::start(pod, targets.iter().map(|(_, target)| *target).collect());
                (*from, targets, run)
            })
            .collect();
        let (mut count, mut wrong) = (0, Vec::new());
        for (from, targets, run) in started {
            let answers = run.join().unwrap().unwrap();
            for ((to, target), answer) in targets.into_iter().zip(answers) {
                count += 1;
                let Target { port, protocol, address } = target;
                let expected = match open(&Question { from, to, port, protocol }) {
                    true => Answer::Open,
                    false => Answer::Silence,
                };
                if answer != expected {
                    wrong.push(format!(
                        "{from} → {to} {address} {protocol:?} {port}: {answer:?} instead of {expected:?}"
                    ));
                }
            }
        }
        (count, wrong)
    }
}

fn numbered(row: &[String]) -> bool {
    row[1] != "-"
}

#[test]
fn the_network_policy_matrices() {
    let world = World::new();
    let mut cases = cases();
    cases.insert(0, Case { title: "no policy", steps: vec![(Vec::new(), |_| true)] });
    let (mut probes, mut steps, mut failures) = (0, 0, Vec::new());
    for case in &cases {
        for (number, (actions, open)) in case.steps.iter().enumerate() {
            actions.iter().for_each(|action| world.act(action));
            let (count, wrong) = world.check(*open);
            probes += count;
            steps += 1;
            if !wrong.is_empty() {
                let sample: Vec<&str> = wrong.iter().take(4).map(String::as_str).collect();
                failures.push(format!(
                    "{}, step {}: {} of {count} wrong:\n  {}",
                    case.title,
                    number + 1,
                    wrong.len(),
                    sample.join("\n  ")
                ));
            }
        }
        world.reset(case);
    }
    println!("{} cases, {steps} matrices, {probes} probes", cases.len());
    assert!(failures.is_empty(), "{} failures\n{}", failures.len(), failures.join("\n"));
}
