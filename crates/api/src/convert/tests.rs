//! Every row of the tables of meaning, each beside its opposite.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use palisade_abi::identity as number;
use palisade_policy::{
    evaluate::{End, evaluate},
    identity::{PodLabels, reserved, security_labels},
    label::Labels,
    model::{Direction, NamedPort},
};
use serde_json::json;

use super::*;

mod application;

fn pod(namespace: &str, app: &str) -> End {
    let own = BTreeMap::from([("app".to_owned(), app.to_owned())]);
    let team = BTreeMap::from([
        ("kubernetes.io/metadata.name".to_owned(), namespace.to_owned()),
        ("team".to_owned(), format!("team-{namespace}")),
    ]);
    let labels = security_labels(&PodLabels {
        namespace,
        namespace_labels: Some(&team),
        pod_labels: Some(&own),
        service_account: "default",
        cluster: "default",
    });
    let address = format!("10.0.{}.{}", namespace.len(), app.as_bytes()[0]).parse();
    End {
        identity: 1000,
        labels,
        address: address.expect("an address"),
        named_ports: vec![NamedPort { name: "web".into(), protocol: 6, port: 8080 }],
        names: BTreeSet::new(),
    }
}

fn other(identity: u32, address: &str) -> End {
    let address: IpAddr = address.parse().expect("an address");
    let labels = reserved(identity).unwrap_or_default();
    End { identity, labels, address, named_ports: Vec::new(), names: BTreeSet::new() }
}

fn object(kind: PolicyKind, spec: &Value) -> Value {
    json!({ "metadata": { "name": "p", "namespace": "x" }, "spec": spec, "kind": kind.as_str() })
}

const NP: PolicyKind = PolicyKind::NetworkPolicy;
const CNP: PolicyKind = PolicyKind::CiliumNetworkPolicy;
const CCNP: PolicyKind = PolicyKind::CiliumClusterwideNetworkPolicy;

fn accept(kind: PolicyKind, spec: &Value) -> Policy {
    convert(kind, &object(kind, spec), "default").expect("the policy is accepted")
}

fn refuse(kind: PolicyKind, spec: &Value) -> Refusal {
    convert(kind, &object(kind, spec), "default").expect_err("the policy is refused")
}

/// Whether pod x/a takes a TCP connection.
fn takes(policy: &Policy, from: &End, port: u16) -> bool {
    evaluate([policy], Direction::Ingress, &pod("x", "a"), from, 6, port).allowed
}

/// Whether pod x/a may open a TCP connection.
fn opens(policy: &Policy, to: &End, port: u16) -> bool {
    evaluate([policy], Direction::Egress, &pod("x", "a"), to, 6, port).allowed
}

fn world() -> End {
    other(number::WORLD_IPV4, "192.0.2.1")
}

/// A CNP or CCNP with one ingress rule.
fn ingress(kind: PolicyKind, rule: &Value) -> Policy {
    accept(kind, &json!({ "endpointSelector": {}, "ingress": [rule] }))
}

#[test]
fn nil_and_empty_in_cilium_rules() {
    let ports = json!([{ "ports": [{ "port": "80", "protocol": "TCP" }] }]);
    // rule, kind, x/b:80, y/b:80, world:80, x/b:81
    let rows = [
        (json!({}), CNP, [false, false, false, false]),
        (json!({ "toPorts": ports }), CNP, [true, true, true, false]),
        (json!({ "fromEndpoints": [] }), CNP, [false, false, false, false]),
        (json!({ "fromEndpoints": [], "toPorts": ports }), CNP, [false, false, false, false]),
        (json!({ "fromEntities": [], "toPorts": ports }), CNP, [false, false, false, false]),
        (json!({ "fromCIDR": [], "toPorts": ports }), CNP, [false, false, false, false]),
        (json!({ "fromCIDRSet": [], "toPorts": ports }), CNP, [false, false, false, false]),
        (json!({ "fromNodes": [], "toPorts": ports }), CNP, [false, false, false, false]),
        (json!({ "fromEndpoints": [{}] }), CNP, [true, false, false, true]),
        (json!({ "fromEndpoints": [{}], "toPorts": ports }), CNP, [true, false, false, false]),
        (json!({ "fromEndpoints": [{}] }), CCNP, [true, true, false, true]),
        (json!({ "fromEndpoints": [{}], "toPorts": [] }), CNP, [true, false, false, true]),
        (json!({ "fromEndpoints": [{}], "toPorts": [{}] }), CNP, [false, false, false, false]),
        (json!({ "toPorts": [{}] }), CNP, [false, false, false, false]),
        (json!({ "toPorts": [] }), CNP, [false, false, false, false]),
        (json!({ "fromEntities": ["all"] }), CNP, [true, true, true, true]),
        (json!({ "fromEntities": ["world"] }), CNP, [false, false, true, false]),
        (json!({ "fromEntities": ["cluster"] }), CNP, [true, true, false, true]),
        (json!({ "fromEntities": ["none"] }), CNP, [false, false, false, false]),
    ];
    for (rule, kind, expected) in rows {
        let policy = ingress(kind, &rule);
        let found = [
            takes(&policy, &pod("x", "b"), 80),
            takes(&policy, &pod("y", "b"), 80),
            takes(&policy, &world(), 80),
            takes(&policy, &pod("x", "b"), 81),
        ];
        assert_eq!(found, expected, "{kind} {rule}");
    }
}

#[test]
fn nil_and_empty_in_network_policies() {
    let rows = [
        (json!({ "ingress": [] }), false, false),
        (json!({ "ingress": [{}] }), true, true),
        (json!({ "policyTypes": ["Ingress"] }), false, false),
        (json!({}), false, false),
        (json!({ "policyTypes": ["Egress"], "ingress": [] }), true, true),
        (json!({ "ingress": [{ "from": [] }] }), true, true),
        (json!({ "ingress": [{ "from": [{ "podSelector": {} }] }] }), true, false),
        (json!({ "ingress": [{ "from": [{ "namespaceSelector": {} }] }] }), true, false),
        (json!({ "ingress": [{ "ports": [{ "protocol": "TCP" }] }] }), true, true),
        (json!({ "ingress": [{ "ports": [{ "protocol": "UDP" }] }] }), false, false),
        (json!({ "ingress": [{ "ports": [{ "port": 80 }] }] }), true, true),
        (json!({ "ingress": [{ "ports": [{ "port": 79, "endPort": 81 }] }] }), true, true),
        (json!({ "ingress": [{ "ports": [{ "port": "web" }] }] }), false, false),
    ];
    for (mut spec, from_pod, from_world) in rows {
        spec["podSelector"] = json!({});
        let policy = accept(NP, &spec);
        assert_eq!(takes(&policy, &pod("x", "b"), 80), from_pod, "{spec}");
        assert_eq!(takes(&policy, &world(), 80), from_world, "{spec}");
    }
    let named =
        accept(NP, &json!({ "podSelector": {}, "ingress": [{ "ports": [{ "port": "web" }] }] }));
    assert!(takes(&named, &world(), 8080));
}

#[test]
fn policy_types_default_as_kubernetes_says() {
    let spec = json!({ "podSelector": {}, "egress": [{ "to": [{ "podSelector": {} }] }] });
    let policy = accept(NP, &spec);
    assert!(!takes(&policy, &world(), 80), "ingress always");
    assert!(!opens(&policy, &world(), 80), "egress if there are egress rules");
    let policy = accept(NP, &json!({ "podSelector": {} }));
    assert!(opens(&policy, &world(), 80));
    let policy = accept(NP, &json!({ "podSelector": {}, "policyTypes": ["Egress"] }));
    assert!(!opens(&policy, &world(), 80));
    assert!(takes(&policy, &world(), 80));
}

#[test]
fn one_peer_is_and_two_peers_are_or() {
    let pods = json!({ "matchLabels": { "app": "b" } });
    let team = json!({ "matchLabels": { "team": "team-yy" } });
    let one = json!([{ "podSelector": pods, "namespaceSelector": team }]);
    let two = json!([{ "podSelector": pods }, { "namespaceSelector": team }]);
    for (from, expected) in [(one, [false, true, false]), (two, [true, true, true])] {
        let policy = accept(NP, &json!({ "podSelector": {}, "ingress": [{ "from": from }] }));
        let found = [
            takes(&policy, &pod("x", "b"), 80),
            takes(&policy, &pod("yy", "b"), 80),
            takes(&policy, &pod("yy", "c"), 80),
        ];
        assert_eq!(found, expected);
    }
}

#[test]
fn ip_blocks_match_pods_and_cilium_cidrs_do_not() {
    let block = json!({ "cidr": "10.0.0.0/8", "except": ["10.0.1.99/32"] });
    let np = accept(
        NP,
        &json!({
            "podSelector": {}, "policyTypes": ["Egress"], "egress": [{ "to": [{ "ipBlock": block }] }],
        }),
    );
    assert!(opens(&np, &pod("x", "b"), 80));
    assert!(!opens(&np, &pod("x", "c"), 80), "10.0.1.99 is carved out");
    let cnp = accept(
        CNP,
        &json!({
            "endpointSelector": {}, "egress": [{ "toCIDRSet": [block] }],
        }),
    );
    assert!(!opens(&cnp, &pod("x", "b"), 80));
    assert!(opens(&cnp, &other(number::WORLD_IPV4, "10.0.0.1"), 80));
    assert!(!opens(&cnp, &other(number::WORLD_IPV4, "10.0.1.99"), 80));
}

#[test]
fn a_namespaced_policy_stays_in_its_namespace() {
    // Whatever the operator, pods elsewhere and reserved endpoints are not selected.
    for operator in ["Exists", "DoesNotExist", "In", "NotIn"] {
        for key in [
            "reserved:init",
            "reserved:host",
            "k8s:io.kubernetes.pod.namespace",
            "io.kubernetes.pod.namespace",
            "app",
        ] {
            let mut expression = json!({ "key": key, "operator": operator });
            if operator.ends_with("In") {
                expression["values"] = json!(["y"]);
            }
            let spec = json!({
                "endpointSelector": { "matchExpressions": [expression] },
                "ingress": [{}],
            });
            let policy = match convert(CNP, &object(CNP, &spec), "default") {
                Ok(policy) => policy,
                Err(refusal) => refusal.lockdown(),
            };
            for rule in &policy.rules {
                assert!(!rule.subject.matches(&pod("y", "a").labels), "{spec}");
                for identity in [number::HOST, number::INIT, number::HEALTH] {
                    let labels: Labels = reserved(identity).expect("reserved");
                    assert!(!rule.subject.matches(&labels), "{spec}");
                }
            }
        }
    }
}

#[test]
fn peers_elsewhere_are_meant_only_where_they_are_named() {
    let from = |selector: Value| ingress(CNP, &json!({ "fromEndpoints": [selector] }));
    let named = from(json!({ "matchLabels": { "k8s:io.kubernetes.pod.namespace": "y" } }));
    assert!(takes(&named, &pod("y", "b"), 80));
    assert!(!takes(&named, &pod("x", "b"), 80));
    let team = "io.cilium.k8s.namespace.labels.team";
    let labelled = from(json!({ "matchLabels": { team: "team-y" } }));
    assert!(takes(&labelled, &pod("y", "b"), 80));
    assert!(!takes(&labelled, &pod("x", "b"), 80));
    let not_there = from(json!({ "matchExpressions": [
        { "key": "io.kubernetes.pod.namespace", "operator": "NotIn", "values": ["z"] },
    ]}));
    assert!(takes(&not_there, &pod("y", "b"), 80));
    assert!(!takes(&not_there, &world(), 80), "the world is not a pod in another namespace");
    let reserved = from(json!({ "matchLabels": { "reserved:remote-node": "" } }));
    assert!(takes(&reserved, &other(number::REMOTE_NODE, "172.31.255.2"), 80));
    assert!(!takes(&reserved, &pod("x", "b"), 80));
    let negative = json!({ "endpointSelector": {}, "ingress": [{ "fromEndpoints": [{
        "matchExpressions": [{ "key": "reserved:init", "operator": "DoesNotExist" }],
    }]}]});
    assert!(refuse(CNP, &negative).to_string().contains("nearly everybody"));
}

#[test]
fn deny_goes_before_allow_and_needs_no_allow_to_close() {
    let policy = accept(
        CNP,
        &json!({
            "endpointSelector": {},
            "ingress": [{ "fromEntities": ["all"] }],
            "ingressDeny": [{ "fromEndpoints": [{ "matchLabels": { "app": "b" } }] }],
        }),
    );
    assert!(!takes(&policy, &pod("x", "b"), 80));
    assert!(takes(&policy, &pod("x", "c"), 80));
    let deny = json!([{ "fromEndpoints": [{ "matchLabels": { "app": "b" } }] }]);
    let closed = accept(CNP, &json!({ "endpointSelector": {}, "ingressDeny": deny }));
    assert!(!takes(&closed, &pod("x", "c"), 80));
    let open = accept(
        CNP,
        &json!({
            "endpointSelector": {},
            "ingressDeny": deny,
            "enableDefaultDeny": { "ingress": false },
        }),
    );
    assert!(takes(&open, &pod("x", "c"), 80));
    assert!(!takes(&open, &pod("x", "b"), 80));
}

#[test]
fn ports_of_cilium_rules() {
    let allows = |port: Value, protocol: u8, number: u16| {
        let policy = ingress(CNP, &json!({ "toPorts": [{ "ports": [port] }] }));
        evaluate([&policy], Direction::Ingress, &pod("x", "a"), &world(), protocol, number).allowed
    };
    let any = json!({ "port": "53" });
    assert!([6, 17, 132].iter().all(|&protocol| allows(any.clone(), protocol, 53)));
    assert!(!allows(any, 1, 53), "never ICMP");
    assert!(allows(json!({ "port": "0", "protocol": "UDP" }), 17, 9));
    assert!(!allows(json!({ "port": "0", "protocol": "UDP" }), 6, 9));
    let range = json!({ "port": "80", "endPort": 90, "protocol": "TCP" });
    assert!(allows(range.clone(), 6, 90) && !allows(range, 6, 91));
    let backwards = json!({ "port": "80", "endPort": 70, "protocol": "TCP" });
    assert!(allows(backwards.clone(), 6, 80) && !allows(backwards, 6, 75));
    assert!(allows(json!({ "port": "WEB", "protocol": "TCP" }), 6, 8080));
}

#[test]
fn icmp_type_0_is_echo_reply_and_nothing_else() {
    let allows = |field: Value, protocol: u8, kind: u16| {
        let policy = ingress(CNP, &json!({ "icmps": [{ "fields": [field] }] }));
        evaluate([&policy], Direction::Ingress, &pod("x", "a"), &world(), protocol, kind).allowed
    };
    for reply in [json!({ "type": 0 }), json!({ "type": "0" }), json!({ "type": "EchoReply" })] {
        assert!(allows(reply.clone(), 1, 0));
        assert!(!allows(reply, 1, 8));
    }
    let v6 = json!({ "family": "IPv6", "type": "EchoRequest" });
    assert!(allows(v6.clone(), 58, 128));
    assert!(!allows(v6, 1, 8));
}

/// The API server, or the peer that such policies were written for, takes none of these either.
#[test]
fn what_the_api_server_refuses_is_refused() {
    let ports: Vec<Value> = (1..42).map(|n: u8| json!({ "port": n.to_string() })).collect();
    let types: Vec<Value> = (1..42).map(|n: u8| json!({ "type": n })).collect();
    let labels = |value: &str| json!({ "ingress": [{ "fromEndpoints": [{ "matchLabels": { "a": value } }] }] });
    let rows = [
        (json!({ "egress": [{ "toCIDR": ["10.0.0.1"] }] }), "toCIDR[0]", "write 10.0.0.1/32"),
        (json!({ "egress": [{ "toCIDRSet": [{ "cidr": "fd00::1" }] }] }), "cidr", "fd00::1/128"),
        (json!({ "egress": [{ "toPorts": [{ "ports": ports }] }] }), "toPorts[0].ports", "40"),
        (json!({ "ingress": [{ "icmps": [{ "fields": types }] }] }), "icmps[0].fields", "40"),
        (labels("b c"), "matchLabels.a", "no label"),
        (labels("-b"), "matchLabels.a", "no label"),
        (labels(&"b".repeat(64)), "matchLabels.a", "63"),
        (json!({ "ingress": [{}], "description": 5 }), "spec.description", "string"),
        (json!({ "ingress": [{}], "labels": [{ "value": "b" }] }), "labels[0].key", "missing"),
        (json!({ "ingress": [{}], "log": { "value": "x".repeat(33) } }), "log.value", "32"),
        (json!({ "ingress": [{}], "log": { "value": "a\u{7}" } }), "log.value", "printable"),
    ];
    for (mut spec, field, message) in rows {
        spec["endpointSelector"] = json!({});
        let refusal = refuse(CNP, &spec);
        let [problem] = &refusal.problems[..] else { panic!("{refusal}") };
        assert!(problem.path.ends_with(field), "{refusal}");
        assert!(problem.to_string().contains(message), "{refusal}");
    }
    let fine = json!({
        "endpointSelector": { "matchLabels": { "a": "", "b": "x_y.Z-1" } },
        "ingress": [{}],
        "description": "why",
        "labels": [{ "key": "a", "value": "b", "source": "k8s" }],
        "log": { "value": "gr\u{fc}n" },
    });
    accept(CNP, &fine);
}

#[test]
fn keys_that_no_label_has_are_refused_and_open_nothing() {
    let absent = |key: &str| {
        let peer = json!({ "matchExpressions": [{ "key": key, "operator": "DoesNotExist" }] });
        json!({ "endpointSelector": {}, "ingress": [{ "fromEndpoints": [peer] }] })
    };
    let with =
        |key: &str| json!({ "endpointSelector": { "matchLabels": { key: "a" } }, "ingress": [{}] });
    let (long, longest) = ("a".repeat(64), "a".repeat(63));
    for key in ["", "app role", "-app", "a/b/c", "Example.org/app", "/app", "app/", &long, "k8s:"] {
        for spec in [absent(key), with(key)] {
            let refusal = refuse(CNP, &spec);
            let text = refusal.to_string();
            assert!(text.contains(&format!("`{key}` is the key of no label")), "{key}: {text}");
            assert!(!takes(&refusal.lockdown(), &pod("x", "a"), 80), "{key}");
        }
    }
    for key in ["app", "any:app", "k8s:example.org/app.kubernetes_io", &longest] {
        accept(CNP, &with(key));
    }
    assert!(takes(&accept(CNP, &absent("other")), &pod("x", "a"), 80));
    accept(CCNP, &with(&format!("k8s:io.cilium.k8s.namespace.labels.{longest}")));
    accept(CCNP, &with("io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name"));
}

#[test]
fn what_is_not_supported_is_refused_with_its_field_and_closes_its_subject() {
    let rows = [
        ("egress", json!({ "toServices": [{}] }), "toServices"),
        ("egress", json!({ "toNodes": [{}] }), "toNodes"),
        ("egress", json!({ "toGroups": [{}] }), "toGroups"),
        ("egress", json!({ "toCIDRSet": [{ "cidrGroupRef": "g" }] }), "cidrGroupRef"),
        ("egress", json!({ "toRequires": [{}] }), "toRequires"),
        ("egress", json!({ "authentication": { "mode": "required" } }), "authentication"),
        ("egressDeny", json!({ "toPorts": [{}] }), "denies nothing"),
        ("egress", json!({ "toEndpoints": [{}], "toCIDR": ["10.0.0.0/8"] }), "two rules"),
        ("egress", json!({ "toEndpoint": [{}] }), "did you mean `toEndpoints`?"),
        ("egress", json!({ "toEntities": ["wrold"] }), "did you mean `world`?"),
        ("egress", json!({ "toCIDR": ["10.0.0/8"] }), "egress[0].toCIDR[0]"),
        ("egress", json!({ "toCIDR": ["::ffff:10.0.0.0/104"] }), "IPv4"),
        (
            "egress",
            json!({ "toCIDRSet": [{ "cidr": "10.0.0.0/8", "except": ["11.0.0.0/9"] }] }),
            "does not lie inside",
        ),
        ("egress", json!({ "toPorts": [{ "ports": [{ "port": 80 }] }] }), "write \"80\""),
        (
            "egress",
            json!({ "toEndpoints": [{ "matchLabels": { "pod-template-hash": "1" } }] }),
            "differs from replica",
        ),
    ];
    for (list, rule, expected) in rows {
        let refusal = refuse(CNP, &json!({ "endpointSelector": {}, list: [rule] }));
        assert!(refusal.to_string().contains(expected), "{refusal}");
        assert!(refusal.problems.iter().all(|p| p.path.starts_with("spec.egress")), "{refusal}");
        let lockdown = refusal.lockdown();
        assert!(!opens(&lockdown, &world(), 80), "{rule}");
        assert!(takes(&lockdown, &world(), 80), "{rule}");
    }
}

#[test]
fn empty_rules_of_layer_7_ask_for_nothing() {
    for rules in [json!({}), json!({ "http": [] })] {
        let ports = json!([{ "ports": [{ "port": "80" }], "rules": rules }]);
        assert!(takes(&ingress(CNP, &json!({ "toPorts": ports })), &world(), 80));
    }
}

#[test]
fn several_rules_and_none() {
    let rule = |app: &str| json!({ "endpointSelector": { "matchLabels": { "app": app } }, "ingress": [{}] });
    let object = json!({
        "metadata": { "name": "p", "namespace": "x" }, "specs": [rule("a"), rule("b")],
    });
    let policy = convert(CNP, &object, "default").expect("accepted");
    assert_eq!(policy.rules.len(), 2);
    assert_eq!(policy.rules[1].ingress.entries[0].path, "specs[1].ingress[0]");
    let none = json!({ "metadata": { "name": "p", "namespace": "x" } });
    let refusal = convert(CNP, &none, "default").expect_err("refused");
    assert!(!takes(&refusal.lockdown(), &world(), 80));
    let empty = refuse(CNP, &json!({ "endpointSelector": {}, "ingress": [] }));
    assert!(empty.to_string().contains("ingress: [{}]"));
    assert!(!takes(&empty.lockdown(), &world(), 80));
    let node = refuse(CCNP, &json!({ "nodeSelector": {}, "ingress": [{}] }));
    assert!(node.lockdown().rules.is_empty(), "no pod is meant");
}

#[test]
fn network_policies_that_are_wrong() {
    let rows = [
        (json!({ "ingres": [] }), "did you mean `ingress`?"),
        (json!({ "policyTypes": ["ingress"] }), "did you mean `Ingress`?"),
        (json!({ "ingress": [{ "from": [{}] }] }), "must say whom"),
        (json!({ "ingress": [{ "ports": [{ "port": "80" }] }] }), "write 80 without quotes"),
        (json!({ "ingress": [{ "ports": [{ "port": 80, "endPort": 79 }] }] }), "less than"),
        (json!({ "ingress": [{ "ports": [{ "port": 0 }] }] }), "from 1 to 65535"),
        (json!({ "ingress": [{ "ports": [{ "endPort": 79 }] }] }), "write the first port"),
    ];
    for (spec, expected) in rows {
        let refusal = refuse(NP, &spec);
        assert!(refusal.to_string().contains(expected), "{refusal}");
        assert!(!takes(&refusal.lockdown(), &world(), 80));
    }
    let spoof = json!({ "podSelector": { "matchExpressions": [
        { "key": "io.kubernetes.pod.namespace", "operator": "DoesNotExist" },
    ]}});
    assert!(!takes(&refuse(NP, &spoof).lockdown(), &world(), 80));
}

#[test]
fn check_reads_any_document() {
    assert_eq!(check(&json!({ "kind": "Pod" })), None);
    let mut document = json!({
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": { "name": "p" },
        "spec": { "endpointSelector": {}, "ingress": [{}] },
    });
    assert_eq!(check(&document), Some(Vec::new()));
    document["apiVersion"] = json!("cilium.io/v3");
    document["spec"]["ingress"][0]["fromEndpoint"] = json!([]);
    let problems = check(&document).expect("a policy");
    assert_eq!(problems[0].path, "apiVersion");
    assert_eq!(problems[1].path, "spec.ingress[0].fromEndpoint");
    assert_eq!(problems[1].suggestion, "did you mean `fromEndpoints`?");
}
