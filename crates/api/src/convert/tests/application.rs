//! Rules for what is inside connections: each trap beside its opposite, allowed and denied.

use palisade_policy::{
    evaluate::{Verdict, evaluate_inside},
    l7::{HttpRequest, Question, SecretRef, Secrets},
};

use super::*;

fn tcp(port: &str) -> Value {
    json!([{ "port": port, "protocol": "TCP" }])
}

fn http(rules: &Value) -> Value {
    json!({ "toPorts": [{ "ports": tcp("80"), "rules": { "http": rules } }] })
}

fn dns(port: &Value, rules: &Value) -> Value {
    json!({ "toPorts": [{ "ports": [port], "rules": { "dns": rules } }] })
}

/// What pod x/a's policy says of a request from x/b to port 80: `METHOD TARGET`.
fn asks(policies: &[&Policy], request: &str, headers: &[(&str, &[u8])]) -> Verdict {
    let (method, target) = request.split_once(' ').expect("a method and a target");
    let token = SecretRef { namespace: "x".into(), name: "token".into(), key: None };
    let secrets = Secrets::from_iter([(token, "s3cret".to_owned())]);
    let request = HttpRequest { method, target, host: "A.example:80", headers };
    let question = Question::Http(request, &secrets);
    let policies = policies.iter().copied();
    let (subject, peer) = (pod("x", "a"), pod("x", "b"));
    evaluate_inside(policies, Direction::Ingress, &subject, &peer, 6, 80, &question)
}

fn from(rules: &[Value]) -> Policy {
    accept(CNP, &json!({ "endpointSelector": {}, "ingress": rules }))
}

fn to(rules: &[Value]) -> Policy {
    accept(CNP, &json!({ "endpointSelector": {}, "egress": rules }))
}

fn looks_up(policies: &[&Policy], protocol: u8, port: u16, name: &str) -> bool {
    let (subject, peer) = (pod("x", "a"), pod("x", "d"));
    let policies = policies.iter().copied();
    let question = Question::Dns(name);
    evaluate_inside(policies, Direction::Egress, &subject, &peer, protocol, port, &question).allowed
}

#[test]
fn methods_paths_and_hosts_match_as_a_whole() {
    let rows = [
        (json!([{ "method": "GET", "path": "/public" }]), "GET /public", "GET /public?x=1"),
        (json!([{ "method": "GET", "path": "/public" }]), "GET /public", "GET /x/public"),
        (json!([{ "method": "GET", "path": "/public" }]), "GET /public", "get /public"),
        (json!([{ "method": "GET|PUT" }]), "PUT /a", "POST /a"),
        (json!([{ "method": "GET" }, { "path": "/b" }]), "POST /b", "POST /a"),
        (json!([{ "method": "GET", "path": "" }]), "GET /any", "PUT /any"),
        (json!([{ "path": "/a/[0-9]+(\\?.*)?" }]), "GET /a/1?b", "GET /a/b"),
        (json!([{ "path": "/A" }]), "GET /A", "GET /a"),
    ];
    for (rules, yes, no) in rows {
        let policy = from(&[http(&rules)]);
        assert!(asks(&[&policy], yes, &[]).allowed, "{rules} {yes}");
        let denied = asks(&[&policy], no, &[]);
        assert_eq!(denied, Verdict { allowed: false, proxied: true, rule: None }, "{rules} {no}");
    }
    for (host, expected) in [
        ("a.example", true),
        ("a.example:80", true),
        ("A.EXAMPLE", true),
        ("a.example:81", false),
        ("example", false),
    ] {
        let policy = from(&[http(&json!([{ "host": host }]))]);
        assert_eq!(asks(&[&policy], "GET /", &[]).allowed, expected, "{host}");
    }
}

#[test]
fn headers_match_if_every_one_of_the_name_does() {
    type Headers = &'static [(&'static str, &'static [u8])];
    let rows: [(Value, Headers, Headers); 9] = [
        (json!({ "headers": ["X-Role: user"] }), &[("x-role", b"user")], &[("x-role", b"admin")]),
        (json!({ "headers": ["X-Role user"] }), &[("x-role", b"user")], &[]),
        (json!({ "headers": ["X-Role:"] }), &[("x-role", b"any")], &[("x-rol", b"any")]),
        (
            json!({ "headers": ["X-Role: user"] }),
            &[("x-role", b"user"), ("x-role", b"user")],
            &[("x-role", b"user"), ("x-role", b"admin")],
        ),
        (
            json!({ "headers": ["X-Role: user"] }),
            &[("a", b"b"), ("x-role", b"user")],
            &[("x-role", b"admin"), ("x-role", b"user")],
        ),
        (json!({ "headers": ["X-Role: user"] }), &[("x-role", b"user")], &[("x-role", b"user,x")]),
        (json!({ "headers": ["X-Role: a b"] }), &[("x-role", b"a b")], &[("x-role", b"a\xff")]),
        (
            json!({ "headerMatches": [{ "name": "X-Token", "value": "1" }] }),
            &[("x-token", b"1")],
            &[("x-token", b"2")],
        ),
        (
            json!({ "headerMatches": [{ "name": "X-Token", "value": "1", "secret": { "name": "token" } }] }),
            &[("x-token", b"s3cret")],
            &[("x-token", b"1")],
        ),
    ];
    for (rule, yes, no) in rows {
        let policy = from(&[http(&json!([rule]))]);
        assert!(asks(&[&policy], "GET /", yes).allowed, "{rule}");
        assert!(!asks(&[&policy], "GET /", no).allowed, "{rule}");
    }
    let missing = json!([{ "headerMatches": [{ "name": "a", "secret": { "name": "gone" } }] }]);
    assert!(!asks(&[&from(&[http(&missing)])], "GET /", &[("a", b"")]).allowed);
    for mismatch in ["LOG", "ADD", "DELETE", "REPLACE"] {
        let rule =
            json!([{ "headerMatches": [{ "name": "a", "value": "1", "mismatch": mismatch }] }]);
        assert!(asks(&[&from(&[http(&rule)])], "GET /", &[("a", b"2")]).allowed, "{mismatch}");
    }
}

#[test]
fn a_rule_may_ask_for_websockets() {
    for rule in [
        json!({ "headers": ["Upgrade WebSocket"] }),
        json!({ "headers": ["upgrade"] }),
        json!({ "headerMatches": [{ "name": "Upgrade", "value": "websocket" }] }),
    ] {
        let policy = from(&[http(&json!([rule]))]);
        assert!(asks(&[&policy], "GET /", &[("upgrade", b"websocket")]).allowed, "{rule}");
        assert!(!asks(&[&policy], "GET /", &[]).allowed, "{rule}");
    }
    let either = from(&[http(&json!([{ "method": "GET|CONNECT" }]))]);
    assert!(asks(&[&either], "GET /", &[]).allowed);
}

#[test]
fn blanks_around_a_value_are_none_of_it() {
    for rule in [
        json!({ "headers": ["X-Role:  user \n"] }),
        json!({ "headerMatches": [{ "name": "x-role", "value": " user\n" }] }),
    ] {
        let policy = from(&[http(&json!([rule]))]);
        assert!(asks(&[&policy], "GET /", &[("x-role", b"user")]).allowed, "{rule}");
    }
}

#[test]
fn rules_on_one_port_add_up_as_documented() {
    let l7 = http(&json!([{ "method": "GET" }]));
    let put = http(&json!([{ "method": "PUT" }]));
    let b = json!([{ "matchLabels": { "app": "b" } }]);
    let with = |mut rule: Value, field: &str, value: Value| {
        rule[field] = value;
        rule
    };
    let port = |port: &str| json!({ "toPorts": [{ "ports": tcp(port) }] });
    let range = |first: &str, last: u16| json!({ "toPorts": [{ "ports": [{ "port": first, "endPort": last, "protocol": "TCP" }] }] });
    // second rule beside `GET`: whether POST passes, and PUT
    let rows = [
        (put, false, true),
        (port("80"), true, true),
        (json!({ "toPorts": [{ "ports": [{ "port": "80" }] }] }), true, true),
        (port("0"), true, true),
        (port("81"), false, false),
        (range("70", 90), false, false),
        (range("1", 65535), false, false),
        (json!({ "fromEntities": ["all"] }), true, true),
        (json!({ "fromEndpoints": b }), true, true),
        (json!({ "fromEndpoints": [{ "matchLabels": { "app": "c" } }] }), false, false),
        (with(port("80"), "fromEndpoints", b.clone()), true, true),
        (http(&json!([{}])), true, true),
        (json!({ "toPorts": [{ "ports": tcp("80"), "rules": { "http": [] } }] }), true, true),
        (json!({ "toPorts": [{ "ports": tcp("80"), "rules": {} }] }), true, true),
    ];
    for (second, post_passes, put_passes) in rows {
        for rules in [[l7.clone(), second.clone()], [second.clone(), l7.clone()]] {
            let policy = from(&rules);
            let get = asks(&[&policy], "GET /", &[]);
            assert!(get.allowed && get.proxied, "{second}: proxied whatever else allows it");
            assert_eq!(asks(&[&policy], "POST /", &[]).allowed, post_passes, "{second}");
            assert_eq!(asks(&[&policy], "PUT /", &[]).allowed, put_passes, "{second}");
        }
    }
    let open = accept(
        CNP,
        &json!({
            "endpointSelector": {}, "ingress": [l7], "enableDefaultDeny": { "ingress": false },
        }),
    );
    assert!(asks(&[&open], "POST /", &[]).allowed, "without default deny it is only seen");
    let denied = accept(
        CNP,
        &json!({
            "endpointSelector": {}, "ingress": [l7], "ingressDeny": [{ "fromEndpoints": b }],
        }),
    );
    assert!(!asks(&[&denied], "GET /", &[]).allowed, "deny goes before what is inside");
}

#[test]
fn what_asks_nothing_needs_no_proxy_and_each_item_is_a_rule() {
    let items = json!({ "toPorts": [
        { "ports": tcp("80"), "rules": { "http": [{ "method": "GET" }] } },
        { "ports": tcp("81") },
        { "ports": tcp("443"), "serverNames": ["a.example"] },
    ]});
    let policy = from(&[items]);
    let paths: Vec<&str> =
        policy.rules[0].ingress.entries.iter().map(|entry| entry.path.as_str()).collect();
    assert_eq!(
        paths,
        [
            "spec.ingress[0].toPorts[0].rules.http",
            "spec.ingress[0].toPorts[2].serverNames",
            "spec.ingress[0]",
        ]
    );
    for (port, allowed, proxied) in
        [(80, true, true), (81, true, false), (443, true, true), (82, false, false)]
    {
        let (subject, peer) = (pod("x", "a"), pod("x", "b"));
        let found = evaluate([&policy], Direction::Ingress, &subject, &peer, 6, port);
        assert_eq!((found.allowed, found.proxied), (allowed, proxied), "{port}");
    }
    let idiom = from(&[http(&json!([{}]))]);
    let seen = asks(&[&idiom], "POST /any", &[]);
    assert!(seen.allowed && seen.proxied);
}

#[test]
fn questions_of_dns_are_judged_by_name() {
    let any = json!({ "port": "53", "protocol": "ANY" });
    let policy =
        to(&[dns(&any, &json!([{ "matchName": "A.x.io." }, { "matchPattern": "*.y.io" }]))]);
    for (name, expected) in [
        ("a.x.io", true),
        ("A.X.IO.", true),
        ("b.y.io", true),
        ("y.io", false),
        ("a.b.y.io", false),
        ("a.x.io.evil", false),
    ] {
        assert_eq!(looks_up(&[&policy], 17, 53, name), expected, "{name}");
        assert_eq!(looks_up(&[&policy], 6, 53, name), expected, "{name}");
    }
    assert!(!looks_up(&[&policy], 132, 53, "a.x.io"), "DNS does not run over SCTP");
    // Rules beside it: what names the port opens it, what names none does not.
    let wide = to(&[json!({ "toEntities": ["all"] })]);
    assert!(!looks_up(&[&policy, &wide], 17, 53, "c.z.io"));
    let udp = json!([{ "port": "53", "protocol": "UDP" }]);
    let named = to(&[json!({ "toPorts": [{ "ports": udp }] })]);
    assert!(looks_up(&[&policy, &named], 17, 53, "c.z.io"));
    assert!(!looks_up(&[&policy, &named], 6, 53, "c.z.io"));
}

#[test]
fn server_names_are_asked_of_everybody() {
    let sni = json!({ "toPorts": [{ "ports": tcp("443"), "serverNames": ["a.io", "**.b.io"] }] });
    let plain = json!({ "toPorts": [{ "ports": tcp("443") }] });
    let admits = |policy: &Policy, name: Option<&str>| {
        let question = Question::Tls(name);
        let subject = pod("x", "a");
        evaluate_inside([policy], Direction::Egress, &subject, &world(), 6, 443, &question).allowed
    };
    for policy in [to(std::slice::from_ref(&sni)), to(&[sni, plain])] {
        assert!(admits(&policy, Some("a.io")) && admits(&policy, Some("x.y.b.io")));
        assert!(!admits(&policy, Some("b.io")) && !admits(&policy, None));
    }
}

#[test]
fn names_open_what_dns_gave_for_them_outside_the_cluster() {
    let policy = to(&[json!({
        "toFQDNs": [{ "matchName": "a.io" }, { "matchPattern": "*.b.io" }],
        "toPorts": [{ "ports": tcp("443") }],
    })]);
    let told = |mut end: End, names: &[&str]| {
        end.names = names.iter().map(|name| (*name).to_owned()).collect();
        end
    };
    let v6 = || other(number::WORLD_IPV6, "2001:db8::1");
    assert!(opens(&policy, &told(world(), &["a.io"]), 443));
    assert!(opens(&policy, &told(v6(), &["z.io", "x.b.io"]), 443));
    for (end, port) in [
        (world(), 443),
        (told(world(), &["a.io"]), 80),
        (told(world(), &["b.io"]), 443),
        (told(pod("x", "b"), &["a.io"]), 443),
        (told(other(number::REMOTE_NODE, "172.31.255.2"), &["a.io"]), 443),
        (told(other(number::WORLD_IPV4, "169.254.169.254"), &["a.io"]), 443),
        (told(other(number::WORLD_IPV6, "fe80::1"), &["a.io"]), 443),
        (told(other(number::WORLD_IPV6, "::1"), &["a.io"]), 443),
    ] {
        assert!(!opens(&policy, &end, port), "{end:?} {port}");
    }
    let nobody = to(&[json!({ "toFQDNs": [], "toPorts": [{ "ports": tcp("443") }] })]);
    assert!(!opens(&nobody, &told(world(), &["a.io"]), 443), "an empty list names nobody");
}

#[test]
fn what_can_only_be_a_mistake_is_refused_with_its_field_and_a_remedy() {
    let get = json!([{ "method": "GET" }]);
    let on = |port: Value| json!({ "toPorts": [{ "ports": [port], "rules": { "http": get } }] });
    let name = json!([{ "matchName": "a.io" }]);
    let udp = json!({ "port": "53", "protocol": "UDP" });
    let header = |text: &str| http(&json!([{ "headers": [text] }]));
    let matching = |one: Value| http(&json!([{ "headerMatches": [one] }]));
    let large = "(a{1000}){1000}";
    // the list, its rule, the field and what the message has to say
    let rows = [
        ("ingress", http(&json!([{ "path": "[" }])), "rules.http[0].path", "not a regular"),
        ("ingress", http(&json!([{ "path": "(?=a)" }])), "rules.http[0].path", "look-around"),
        ("ingress", http(&json!([{ "host": large }])), "rules.http[0].host", "too large"),
        // As a path it would not be: a host may be written in capitals.
        ("ingress", http(&json!([{ "host": "[a-z]{3400}" }])), "rules.http[0].host", "too large"),
        ("ingress", http(&json!([{ "paht": "/" }])), "rules.http[0].paht", "did you mean `path`?"),
        ("ingress", on(json!({ "port": "80" })), "ports[0].protocol", "write TCP"),
        ("ingress", on(json!({ "port": "80", "protocol": "ANY" })), "ports[0].protocol", "ANY"),
        ("ingress", on(json!({ "port": "80", "protocol": "UDP" })), "ports[0].protocol", "UDP"),
        ("ingress", on(json!({ "port": "0", "protocol": "TCP" })), "ports[0].port", "name the"),
        (
            "ingress",
            json!({ "toPorts": [{ "rules": { "http": get } }] }),
            "toPorts[0].ports",
            "name the ports",
        ),
        ("ingressDeny", http(&get), "rules.http", "allow rule"),
        ("ingress", header("X-Role:admin"), "headers[0]", "`X-Role: admin`"),
        ("ingress", header("Host: a.io"), "headers[0]", "`host`"),
        ("ingress", header("bad@name"), "headers[0]", "no name of a header"),
        ("ingress", http(&json!([{ "method": "CONNECT" }])), "rules.http[0].method", "leave the"),
        ("ingress", header("Upgrade: h2c"), "headers[0]", "`Upgrade: websocket`"),
        (
            "ingress",
            matching(json!({ "name": "upgrade", "value": "websocket", "mismatch": "ADD" })),
            "headerMatches[0]",
            "`Upgrade: websocket`",
        ),
        ("ingress", header("x: a\r\n\r\nPUT /"), "headers[0]", "write one line"),
        ("ingress", matching(json!({ "value": "1" })), "headerMatches[0].name", "is missing"),
        (
            "ingress",
            matching(json!({ "name": "a", "mismatch": "ADD" })),
            "headerMatches[0].mismatch",
            "write a `value`",
        ),
        (
            "ingress",
            matching(json!({ "name": "a", "secret": { "name": "s", "namespace": "y" } })),
            "headerMatches[0].secret.namespace",
            "cannot use a Secret of `y`",
        ),
        ("ingress", dns(&udp, &name), "rules.dns", "egress"),
        ("egress", dns(&json!({ "port": "53", "endPort": 54 }), &name), "endPort", "one by one"),
        ("egress", dns(&json!({ "port": "53", "protocol": "SCTP" }), &name), "protocol", "UDP"),
        ("egress", dns(&udp, &json!([{ "matchPattern": "a..b" }])), "matchPattern", "empty label"),
        ("egress", dns(&udp, &json!([{ "matchPattern": "a b" }])), "matchPattern", "` `"),
        ("egress", dns(&udp, &json!([{ "matchName": "*.io" }])), "matchName", "`matchPattern`"),
        ("egress", dns(&udp, &json!([{}])), "rules.dns[0]", "either"),
        (
            "egress",
            dns(&udp, &json!([{ "matchName": "a", "matchPattern": "b" }])),
            "rules.dns[0]",
            "two items",
        ),
        ("egress", json!({ "toFQDNs": [{ "matchPattern": "-..-" }] }), "toFQDNs[0]", "no name"),
        ("egressDeny", json!({ "toFQDNs": name }), "toFQDNs", "no such field"),
        ("egress", json!({ "toFQDNs": name, "toEntities": ["world"] }), "egress[0]", "two rules"),
        (
            "egress",
            json!({ "toPorts": [{ "ports": [{ "port": "443" }], "serverNames": ["a"] }] }),
            "ports[0].protocol",
            "write TCP",
        ),
        (
            "egress",
            json!({ "toPorts": [{ "ports": tcp("443"), "serverNames": ["a"], "rules": { "http": get } }] }),
            "serverNames",
            "leave out",
        ),
        (
            "egress",
            json!({ "toPorts": [{ "ports": tcp("443"), "serverNames": ["w*.example.com"] }] }),
            "serverNames[",
            "`**.example.com` for any number",
        ),
        (
            "egress",
            json!({ "toPorts": [{ "ports": tcp("443"), "serverNames": ["a.*.io"] }] }),
            "serverNames[",
            "first labels",
        ),
        (
            "egress",
            json!({ "toPorts": [{ "ports": tcp("443"), "serverNames": ["*"] }] }),
            "serverNames[",
            "first labels",
        ),
        (
            "egress",
            json!({ "toPorts": [{ "ports": tcp("443"), "serverNames": ["***.io"] }] }),
            "serverNames[",
            "first labels",
        ),
        (
            "egress",
            json!({ "toPorts": [{ "ports": tcp("443"), "serverNames": ["a.io", "A.io."] }] }),
            "serverNames[",
            "there twice",
        ),
        (
            "egress",
            json!({ "toPorts": [{ "ports": tcp("443"), "serverNames": [] }] }),
            "serverNames",
            "leave it out",
        ),
        (
            "egress",
            json!({ "toPorts": [{ "ports": tcp("443"), "terminatingTLS": { "secret": { "name": "s" } } }] }),
            "terminatingTLS",
            "not supported",
        ),
        (
            "egress",
            json!({ "toPorts": [{ "ports": tcp("9092"), "rules": { "kafka": [{}] } }] }),
            "rules.kafka",
            "not supported",
        ),
        (
            "egress",
            json!({ "toPorts": [{ "ports": tcp("53"), "rules": { "http": get, "dns": name } }] }),
            "rules.dns",
            "two items",
        ),
        (
            "egress",
            json!({ "toPorts": [
                { "ports": tcp("80"), "rules": { "http": get } },
                { "ports": tcp("80"), "serverNames": ["a"] },
            ]}),
            "toPorts[1].serverNames",
            "toPorts[0].rules.http",
        ),
    ];
    for (list, rule, field, message) in rows {
        let refusal = refuse(CNP, &json!({ "endpointSelector": {}, list: [rule] }));
        let told = refusal
            .problems
            .iter()
            .any(|problem| problem.path.contains(field) && problem.to_string().contains(message));
        assert!(told, "{rule}: {refusal}");
        assert!(refusal.problems.iter().all(|p| p.path.starts_with(&format!("spec.{list}"))));
        let lockdown = refusal.lockdown();
        assert!(!takes(&lockdown, &world(), 80) || !opens(&lockdown, &world(), 80), "{rule}");
    }
    for name in [
        "Connection",
        "Content-Length",
        "Expect",
        "HTTP2-Settings",
        "Keep-Alive",
        "Proxy-Connection",
        "TE",
        "Trailer",
        "Transfer-Encoding",
        "X_Role",
    ] {
        let mut rules = vec![("headers[0]", json!({ "headers": [name] }))];
        for mismatch in [None, Some("LOG"), Some("ADD"), Some("DELETE"), Some("REPLACE")] {
            let matching = json!({ "name": name, "value": "1", "mismatch": mismatch });
            rules.push(("headerMatches[0].name", json!({ "headerMatches": [matching] })));
        }
        for (field, rule) in rules {
            let spec = json!({ "endpointSelector": {}, "egress": [http(&json!([rule]))] });
            let refusal = refuse(CNP, &spec);
            assert!(refusal.problems[0].path.ends_with(field), "{rule}: {refusal}");
            assert!(refusal.to_string().contains(&format!("header `{name}` ")), "{refusal}");
        }
    }
    let smuggled = "1\r\n\r\nPUT /v1/exhaust-port HTTP/1.1\r\nHost: d\r\nx: y";
    for value in [smuggled, "1\n2", "1\r2", "1\0", "1\u{7f}"] {
        for mismatch in ["LOG", "ADD", "DELETE", "REPLACE"] {
            let rule = matching(json!({ "name": "x", "value": value, "mismatch": mismatch }));
            let refusal = refuse(CNP, &json!({ "endpointSelector": {}, "egress": [rule] }));
            assert!(refusal.problems[0].path.ends_with("headerMatches[0].value"), "{refusal}");
            assert!(refusal.to_string().contains("write one line"), "{refusal}");
        }
    }
    let cluster = json!({ "endpointSelector": {}, "ingress": [
        matching(json!({ "name": "a", "secret": { "name": "s" } })),
    ]});
    assert!(refuse(CCNP, &cluster).to_string().contains("secret.namespace: is missing"));
}
