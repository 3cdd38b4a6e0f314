//! The tests: policies, and who may get through under them. A test asks every question of its
//! kinds, so that a policy is also seen to leave alone what is not its business.

use super::probe::{From, HTTP, Name, Node, OTHER, Probe, To, UDP, What};

/// Questions that are asked together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Whether clients reach the servers and their Service.
    Connect,
    /// Whether their requests are answered.
    Http,
    /// Whether servers and nodes answer their ICMP echo requests.
    Ping,
    /// Whether they are told what names of the cluster stand for.
    Lookup,
    /// Whether they reach nodes.
    Node,
    /// Whether nodes reach the servers.
    FromNode,
    /// Whether clients reach addresses outside the cluster.
    World,
    /// Whether they reach somebody outside by name.
    WorldByName,
}

/// One test. In the policies `NAMESPACE` is the namespace in which the test runs, `WORLD-NAME` the
/// name of somebody outside the cluster, and `WORLD-CIDRS` the list of addresses there, which is
/// also there for each family alone.
pub(super) struct Test {
    pub(super) name: &'static str,
    pub(super) policies: &'static str,
    pub(super) kinds: &'static [Kind],
    pub(super) allows: fn(&Probe) -> bool,
    /// What whoever must not get through must hear.
    pub(super) refusal: Option<&'static str>,
    /// A refused policy is no failure.
    pub(super) optional: bool,
}

const fn test(name: &'static str, policies: &'static str, allows: fn(&Probe) -> bool) -> Test {
    let kinds = &[Kind::Connect];
    Test { name, policies, kinds, allows, refusal: None, optional: false }
}

impl Test {
    const fn asking(self, kinds: &'static [Kind]) -> Self {
        Self { kinds, ..self }
    }

    /// For policies that only the proxy can carry out.
    const fn proxied(self) -> Self {
        Self { optional: true, ..self }
    }

    const fn refusing(self, refusal: &'static str) -> Self {
        Self { refusal: Some(refusal), ..self }
    }
}

fn by_address(probe: &Probe) -> bool {
    !matches!(probe.to, To::Name(_))
}

/// A node always reaches the pods that it runs.
fn at_home(probe: &Probe) -> bool {
    matches!((probe.from, probe.to), (From::Node(from), To::Pod(to, _)) if from == to)
}

fn to_node(probe: &Probe) -> bool {
    matches!(probe.to, To::Node(..))
}

fn to_own_node(probe: &Probe) -> bool {
    matches!(probe.to, To::Node(Node::Own, _))
}

fn to_other_node(probe: &Probe) -> bool {
    matches!(probe.to, To::Node(Node::Other, _))
}

pub(super) const TESTS: &[Test] = &[
    test("no-policies", "", |_| true).asking(&[
        Kind::Connect,
        Kind::Ping,
        Kind::Lookup,
        Kind::Node,
        Kind::FromNode,
        Kind::World,
        Kind::WorldByName,
    ]),
    test(
        "all-ingress-deny-knp",
        r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: all-ingress-deny}
spec: {podSelector: {}, policyTypes: [Ingress]}
"#,
        |probe| to_node(probe) || at_home(probe),
    )
    .asking(&[Kind::Connect, Kind::Ping, Kind::Node, Kind::FromNode]),
    test(
        "all-egress-deny-knp",
        r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: all-egress-deny}
spec: {podSelector: {}, policyTypes: [Egress]}
"#,
        |probe| matches!(probe.from, From::Node(_)),
    )
    .asking(&[
        Kind::Connect,
        Kind::Ping,
        Kind::Lookup,
        Kind::Node,
        Kind::FromNode,
        Kind::World,
    ]),
    test(
        "echo-ingress-knp",
        r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: echo-ingress}
spec:
  podSelector: {matchLabels: {kind: echo}}
  ingress: [{from: [{podSelector: {matchLabels: {other: client}}}]}]
"#,
        |probe| probe.from == From::Client2,
    ),
    test(
        "client-egress-knp",
        r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: client-egress}
spec:
  podSelector: {matchLabels: {kind: client}}
  policyTypes: [Egress]
  egress:
  - to: [{podSelector: {matchLabels: {kind: echo}}}]
    ports: [{port: 8080, protocol: TCP}]
"#,
        |probe| probe.what == HTTP && by_address(probe),
    ),
    test(
        "client-egress-dns-knp",
        r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: client-egress-dns}
spec:
  podSelector: {matchLabels: {kind: client}}
  policyTypes: [Egress]
  egress:
  - to: [{podSelector: {matchLabels: {kind: echo}}}]
    ports: [{port: 8080, protocol: TCP}, {port: 8081, protocol: UDP}]
  - to: [{namespaceSelector: {}, podSelector: {matchLabels: {k8s-app: kube-dns}}}]
    ports: [{port: 53, protocol: TCP}, {port: 53, protocol: UDP}]
"#,
        |probe| probe.what != OTHER,
    ),
    test(
        "echo-ingress",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: echo-ingress}
spec:
  endpointSelector: {matchLabels: {kind: echo}}
  ingress:
  - fromEndpoints: [{matchLabels: {kind: client}}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}]}]
"#,
        |probe| probe.what == HTTP,
    ),
    test(
        "echo-ingress-named-port",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: echo-ingress-named-port}
spec:
  endpointSelector: {matchLabels: {kind: echo}}
  ingress:
  - fromEndpoints: [{matchLabels: {other: client}}]
    toPorts: [{ports: [{port: other, protocol: TCP}]}]
"#,
        |probe| probe.what == OTHER && probe.from == From::Client2,
    ),
    test(
        "echo-ingress-from-other-client-deny",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: echo-ingress-deny}
spec:
  endpointSelector: {matchLabels: {kind: echo}}
  ingress: [{fromEndpoints: [{matchLabels: {kind: client}}]}]
  ingressDeny: [{fromEndpoints: [{matchLabels: {other: client}}]}]
"#,
        |probe| probe.from == From::Client1,
    ),
    test(
        "client-with-service-account-egress-to-echo",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: by-service-account}
spec:
  endpointSelector: {matchLabels: {kind: echo}}
  ingress:
  - fromEndpoints: [{matchLabels: {io.cilium.k8s.policy.serviceaccount: client2}}]
"#,
        |probe| probe.from == From::Client2,
    ),
    test(
        "client-egress-expression-port-range",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: port-range}
spec:
  endpointSelector: {matchLabels: {kind: client}}
  egress:
  - toEndpoints: [{matchExpressions: [{key: kind, operator: In, values: [echo]}]}]
    toPorts: [{ports: [{port: "8080", endPort: 8081, protocol: ANY}]}]
"#,
        |probe| probe.what != OTHER && by_address(probe),
    ),
    test(
        "client-egress-to-echo-deny",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: egress-deny}
spec:
  endpointSelector: {matchLabels: {other: client}}
  egress: [{toEntities: [all]}]
  egressDeny:
  - toEndpoints: [{matchLabels: {kind: echo}}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}]}]
"#,
        |probe| probe.from == From::Client1 || probe.what != HTTP,
    ),
    test(
        "all-entities-deny",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: all-entities-deny}
spec:
  endpointSelector: {}
  egressDeny: [{toEntities: [all]}]
"#,
        |_| false,
    )
    .asking(&[Kind::Connect, Kind::Node, Kind::World]),
    test(
        "cluster-entity",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: cluster-entity}
spec:
  endpointSelector: {}
  ingress: [{fromEntities: [cluster]}]
  egress: [{toEntities: [cluster]}]
"#,
        |probe| !matches!(probe.to, To::Outside(_) | To::Name(Name::Outside)),
    )
    .asking(&[Kind::Connect, Kind::Node, Kind::FromNode, Kind::World, Kind::WorldByName]),
    test(
        "world-entity",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: world-entity}
spec:
  endpointSelector: {matchLabels: {kind: client}}
  egress: [{toEntities: [world]}, {toCIDR: [0.0.0.0/0, "::/0"]}]
"#,
        // Neither world nor a CIDR is ever a pod or a node.
        |_| false,
    )
    .asking(&[Kind::Connect, Kind::Node]),
    test(
        "clusterwide-ingress",
        r#"
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: NAMESPACE-ingress}
spec:
  endpointSelector: {matchLabels: {kind: echo, k8s:io.kubernetes.pod.namespace: NAMESPACE}}
  ingress:
  - fromEndpoints: [{matchLabels: {other: client, k8s:io.kubernetes.pod.namespace: NAMESPACE}}]
    toPorts: [{ports: [{port: "8081", protocol: UDP}]}]
"#,
        |probe| probe.what == UDP && probe.from == From::Client2,
    ),
    test(
        "echo-ingress-l7",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: echo-ingress-l7}
spec:
  endpointSelector: {matchLabels: {kind: echo}}
  ingress:
  - fromEndpoints: [{matchLabels: {kind: client}}]
    toPorts:
    - ports: [{port: "8080", protocol: TCP}]
      rules: {http: [{method: GET, path: /hostname}]}
"#,
        |probe| probe.what == What::Get("/hostname"),
    )
    .asking(&[Kind::Http])
    .proxied()
    .refusing("403"),
    test(
        "client-egress-l7",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client-egress-l7}
spec:
  endpointSelector: {matchLabels: {other: client}}
  egress:
  - toEndpoints: [{matchLabels: {kind: echo}}]
    toPorts:
    - ports: [{port: "8080", protocol: TCP}]
      rules: {http: [{method: GET, path: "/clientip"}]}
  - toEndpoints: [{matchLabels: {k8s:io.kubernetes.pod.namespace: kube-system}}]
    toPorts: [{ports: [{port: "53", protocol: ANY}]}]
"#,
        |probe| probe.from == From::Client1 || probe.what == What::Get("/clientip"),
    )
    .asking(&[Kind::Http])
    .proxied()
    .refusing("403"),
    test(
        "host-entity-egress",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: host-entity-egress}
spec:
  endpointSelector: {matchLabels: {kind: client}}
  egress: [{toEntities: [host]}]
"#,
        to_own_node,
    )
    .asking(&[Kind::Node, Kind::Ping]),
    test(
        "remote-node-entity-egress",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: remote-node-entity-egress}
spec:
  endpointSelector: {matchLabels: {kind: client}}
  egress: [{toEntities: [remote-node]}]
"#,
        to_other_node,
    )
    .asking(&[Kind::Node, Kind::Ping]),
    test(
        "node-entities-egress-deny",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: host-entity-egress-deny}
spec:
  endpointSelector: {matchLabels: {other: client}}
  egress: [{toEntities: [all]}]
  egressDeny: [{toEntities: [host]}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: remote-node-entity-egress-deny}
spec:
  endpointSelector:
    matchLabels: {kind: client}
    matchExpressions: [{key: other, operator: DoesNotExist}]
  egress: [{toEntities: [all]}]
  egressDeny: [{toEntities: [remote-node]}]
"#,
        |probe| match probe.from {
            From::Client2 => !to_own_node(probe),
            _ => !to_other_node(probe),
        },
    )
    .asking(&[Kind::Node, Kind::Ping]),
    test(
        "host-entity-ingress",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: host-entity-ingress}
spec:
  endpointSelector: {matchLabels: {kind: echo}}
  ingress: [{fromEntities: [host]}]
"#,
        |probe| to_node(probe) || at_home(probe),
    )
    .asking(&[Kind::FromNode, Kind::Ping]),
    test(
        "remote-node-entity-ingress",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: remote-node-entity-ingress}
spec:
  endpointSelector: {matchLabels: {kind: echo}}
  ingress: [{fromEntities: [remote-node]}]
"#,
        |probe| to_node(probe) || matches!(probe.from, From::Node(_)),
    )
    .asking(&[Kind::FromNode, Kind::Ping]),
    test(
        "remote-node-entity-ingress-deny",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: remote-node-entity-ingress-deny}
spec:
  endpointSelector: {matchLabels: {kind: echo}}
  ingress: [{fromEntities: [all]}]
  ingressDeny: [{fromEntities: [remote-node]}]
"#,
        |probe| !matches!(probe.from, From::Node(_)) || at_home(probe),
    )
    .asking(&[Kind::FromNode, Kind::Ping]),
    test(
        "echo-ingress-icmp",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: echo-ingress-icmp}
spec:
  endpointSelector: {matchLabels: {kind: echo}}
  ingress:
  - fromEndpoints: [{matchLabels: {other: client}}]
    icmps: [{fields: [{type: 8, family: IPv4}, {type: EchoRequest, family: IPv6}]}]
"#,
        |probe| match probe.to {
            To::Pod(..) => probe.what == What::Ping && probe.from == From::Client2,
            to => matches!(to, To::Node(..)),
        },
    )
    .asking(&[Kind::Ping, Kind::Connect]),
    test(
        "echo-ingress-from-other-client-icmp-deny",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: echo-ingress-icmp-deny}
spec:
  endpointSelector: {matchLabels: {kind: echo}}
  ingress: [{fromEntities: [all]}]
  ingressDeny:
  - fromEndpoints: [{matchLabels: {other: client}}]
    icmps: [{fields: [{type: EchoRequest, family: IPv4}, {type: 128, family: IPv6}]}]
"#,
        |probe| probe.from == From::Client1 || probe.what != What::Ping || to_node(probe),
    )
    .asking(&[Kind::Ping, Kind::Connect]),
    test(
        "client-egress-icmp-ipv4",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client-egress-icmp-ipv4}
spec:
  endpointSelector: {matchLabels: {kind: client}}
  egress:
  - toEntities: [cluster]
    icmps: [{fields: [{type: EchoRequest, family: IPv4}]}]
"#,
        |probe| probe.what == What::Ping && probe.to.is_ipv4(),
    )
    .asking(&[Kind::Ping, Kind::Node]),
    test(
        "client-egress-l7-dns",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: dns-by-name}
spec:
  endpointSelector: {matchLabels: {other: client}}
  egress:
  - toEndpoints: [{matchLabels: {k8s:io.kubernetes.pod.namespace: kube-system, k8s-app: kube-dns}}]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
      rules: {dns: [{matchName: echo.NAMESPACE.svc.cluster.local}]}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: dns-by-pattern}
spec:
  endpointSelector:
    matchLabels: {kind: client}
    matchExpressions: [{key: other, operator: DoesNotExist}]
  egress:
  - toEndpoints: [{matchLabels: {k8s:io.kubernetes.pod.namespace: kube-system, k8s-app: kube-dns}}]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
      rules: {dns: [{matchPattern: "*.default.svc.cluster.local"}]}
"#,
        |probe| match probe.from {
            From::Client2 => probe.to == To::Name(Name::Echo),
            _ => probe.to == To::Name(Name::Kubernetes),
        },
    )
    .asking(&[Kind::Lookup])
    .proxied()
    .refusing("REFUSED"),
    test(
        "to-entities-world",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: to-entities-world}
spec:
  endpointSelector: {matchLabels: {other: client}}
  egress:
  - toEntities: [world]
  - toEndpoints: [{matchLabels: {k8s:io.kubernetes.pod.namespace: kube-system, k8s-app: kube-dns}}]
    toPorts: [{ports: [{port: "53", protocol: ANY}]}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: to-entities-cluster}
spec:
  endpointSelector:
    matchLabels: {kind: client}
    matchExpressions: [{key: other, operator: DoesNotExist}]
  egress: [{toEntities: [cluster]}]
"#,
        |probe| probe.from == From::Client2,
    )
    .asking(&[Kind::World, Kind::WorldByName]),
    test(
        "to-entities-world-deny",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: to-entities-world-deny}
spec:
  endpointSelector: {matchLabels: {other: client}}
  egress: [{toEntities: [all]}]
  egressDeny: [{toEntities: [world]}]
"#,
        |probe| probe.from == From::Client1,
    )
    .asking(&[Kind::World, Kind::WorldByName]),
    test(
        "to-cidr-external",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: to-cidr}
spec:
  endpointSelector:
    matchLabels: {kind: client}
    matchExpressions: [{key: other, operator: DoesNotExist}]
  egress: [{toCIDR: WORLD-CIDRS}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: to-cidr-except}
spec:
  endpointSelector: {matchLabels: {other: client}}
  egress:
  - toCIDRSet:
    - {cidr: 0.0.0.0/0, except: WORLD-IPV4-CIDRS}
    - {cidr: "::/0", except: WORLD-IPV6-CIDRS}
"#,
        |probe| probe.from == From::Client1,
    )
    .asking(&[Kind::World]),
    test(
        "to-cidr-external-deny",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: to-cidr-deny}
spec:
  endpointSelector: {matchLabels: {other: client}}
  egress: [{toEntities: [all]}]
  egressDeny: [{toCIDR: WORLD-CIDRS}]
"#,
        |probe| probe.from == From::Client1,
    )
    .asking(&[Kind::World]),
    test(
        "to-cidr-external-knp",
        r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: to-cidr}
spec:
  podSelector: {matchLabels: {kind: client}}
  policyTypes: [Egress]
  egress:
  - to:
    - ipBlock: {cidr: 0.0.0.0/0, except: WORLD-IPV4-CIDRS}
    - ipBlock: {cidr: "::/0", except: WORLD-IPV6-CIDRS}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: to-cidr-other}
spec:
  podSelector: {matchLabels: {other: client}}
  policyTypes: [Egress]
  egress: [{to: [{ipBlock: {cidr: 0.0.0.0/0}}, {ipBlock: {cidr: "::/0"}}]}]
"#,
        |probe| probe.from == From::Client2,
    )
    .asking(&[Kind::World]),
    test(
        "to-fqdns",
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: to-fqdns}
spec:
  endpointSelector: {matchLabels: {other: client}}
  egress:
  - toFQDNs: [{matchName: WORLD-NAME}]
  - toEndpoints: [{matchLabels: {k8s:io.kubernetes.pod.namespace: kube-system, k8s-app: kube-dns}}]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
      rules: {dns: [{matchPattern: "*"}]}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: to-other-fqdns}
spec:
  endpointSelector:
    matchLabels: {kind: client}
    matchExpressions: [{key: other, operator: DoesNotExist}]
  egress:
  - toFQDNs: [{matchName: other.invalid}]
  - toEndpoints: [{matchLabels: {k8s:io.kubernetes.pod.namespace: kube-system, k8s-app: kube-dns}}]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
      rules: {dns: [{matchPattern: "*"}]}
"#,
        |probe| probe.from == From::Client2,
    )
    .asking(&[Kind::WorldByName])
    .proxied(),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{super::place::Outside, *};

    #[test]
    fn every_policy_is_one_that_can_be_read_and_every_name_is_used_once() {
        let mut names = BTreeSet::new();
        for test in TESTS {
            assert!(names.insert(test.name), "{}", test.name);
            let policies: Vec<serde_json::Value> =
                serde_saphyr::from_multiple(&Outside::default().fill_in(test.policies)).unwrap();
            assert_eq!(policies.is_empty(), test.name == "no-policies", "{}", test.name);
            assert!(policies.iter().all(|it| it["kind"].is_string()), "{}", test.name);
        }
    }
}
