//! The tests: policies, and who may get through under them. Every test asks every question, so that
//! a policy is also seen to leave alone what is not its business.

use super::probe::{From, Kind, Port, Probe, To};

/// One test. In the policies `NAMESPACE` is the namespace in which the test runs.
pub(super) struct Test {
    pub(super) name: &'static str,
    pub(super) policies: &'static str,
    pub(super) kind: Kind,
    pub(super) allows: fn(&Probe) -> bool,
    /// A refused policy is no failure.
    pub(super) optional: bool,
}

const fn test(name: &'static str, policies: &'static str, allows: fn(&Probe) -> bool) -> Test {
    Test { name, policies, kind: Kind::Connect, allows, optional: false }
}

const fn http(name: &'static str, policies: &'static str, allows: fn(&Probe) -> bool) -> Test {
    Test { name, policies, kind: Kind::Http, allows, optional: true }
}

fn by_address(probe: &Probe) -> bool {
    !matches!(probe.to, To::Name)
}

pub(super) const TESTS: &[Test] = &[
    test("no-policies", "", |_| true),
    test(
        "all-ingress-deny-knp",
        r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: all-ingress-deny}
spec: {podSelector: {}, policyTypes: [Ingress]}
"#,
        |_| false,
    ),
    test(
        "all-egress-deny-knp",
        r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: all-egress-deny}
spec: {podSelector: {}, policyTypes: [Egress]}
"#,
        |_| false,
    ),
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
        |probe| probe.port == Port::Http && by_address(probe),
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
        |probe| probe.port != Port::Other,
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
        |probe| probe.port == Port::Http,
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
        |probe| probe.port == Port::Other && probe.from == From::Client2,
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
        |probe| probe.port != Port::Other && by_address(probe),
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
        |probe| probe.from == From::Client1 || probe.port != Port::Http,
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
    ),
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
        |_| true,
    ),
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
        // Neither world nor a CIDR is ever a pod.
        |_| false,
    ),
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
        |probe| probe.port == Port::Udp && probe.from == From::Client2,
    ),
    http(
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
        |probe| probe.port == Port::Get("/hostname"),
    ),
    http(
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
        |probe| probe.from == From::Client1 || probe.port == Port::Get("/clientip"),
    ),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_policy_is_one_that_can_be_read_and_every_name_is_used_once() {
        let mut names = BTreeSet::new();
        for test in TESTS {
            assert!(names.insert(test.name), "{}", test.name);
            let policies: Vec<serde_json::Value> =
                serde_saphyr::from_multiple(&test.policies.replace("NAMESPACE", "ns")).unwrap();
            assert_eq!(policies.is_empty(), test.name == "no-policies", "{}", test.name);
            assert!(policies.iter().all(|it| it["kind"].is_string()), "{}", test.name);
        }
    }
}
