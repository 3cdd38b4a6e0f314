use std::{fs, thread};

use palisade_api::admin::{ExplainedEnd, Inside};

use super::*;

const WORLD: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: ship, labels: {org: empire}}
---
apiVersion: v1
kind: Pod
metadata: {name: rebel, labels: {org: alliance}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: star}
spec:
  template:
    metadata: {labels: {class: star}}
    spec: {containers: [{ports: [{name: web, containerPort: 80}]}]}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: rule1}
spec:
  endpointSelector: {matchLabels: {class: star}}
  ingress:
  - fromEndpoints: [{matchLabels: {org: empire}}]
    toPorts:
    - ports: [{port: "80", protocol: TCP}]
      rules: {http: [{method: POST, path: /v1/land}, {method: GET, path: /public/.*}]}
"#;

fn ask(from: &str, port: u16, inside: Option<(&str, &str)>) -> Explanation {
    ask_in(WORLD, from, port, inside)
}

fn ask_in(world: &str, from: &str, port: u16, inside: Option<(&str, &str)>) -> Explanation {
    let inside = inside.map(|(method, target)| request(method, target, &[]));
    answer(world, Explain { from: from.into(), to: "star".into(), protocol: 6, port, inside })
        .unwrap()
}

fn request(method: &str, target: &str, headers: &[(&str, &str)]) -> Inside {
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    Inside::Http {
        method: method.into(),
        target: target.into(),
        host: String::new(),
        headers: headers.iter().map(owned).collect(),
    }
}

fn answer(world: &str, asked: Explain) -> Result<Explanation> {
    let name = format!("explain-{}-{:?}.yaml", std::process::id(), thread::current().id());
    let file = std::env::temp_dir().join(name);
    fs::write(&file, world).unwrap();
    let answer = explain(std::slice::from_ref(&file), &asked);
    fs::remove_file(file).unwrap();
    answer
}

/// As the proxy has them: without what belongs to the connection, each of a name, the host apart.
#[test]
fn headers_are_judged_as_the_proxy_has_them() {
    let rules = r#"{http: [
        {path: /role, headers: [X-Role]},
        {path: /token, headerMatches: [{name: x-token, secret: {name: token}}]},
        {path: /host, host: a.io},
        {path: /chat, headerMatches: [{name: upgrade, value: websocket}]}]}"#;
    let secret = r#"
apiVersion: v1
kind: Secret
metadata: {namespace: palisade-secrets, name: default.token}
stringData: {value: s3cret}
"#;
    let plain = "{http: [{method: POST, path: /v1/land}, {method: GET, path: /public/.*}]}";
    let world = format!("{}---{secret}", WORLD.replace(plain, rules));
    let ask = |target: &str, headers: &[(&str, &str)]| {
        let inside = Some(request("GET", target, headers));
        let (from, to) = ("ship".into(), "star".into());
        answer(&world, Explain { from, to, protocol: 6, port: 80, inside }).unwrap()
    };
    let upgrade = ("upgrade", "WebSocket");
    for (target, headers, allowed) in [
        ("/role", &[][..], false),
        ("/role", &[("x-role", "any")], true),
        ("/role", &[("x-role", "any"), ("connection", "close, X-Role")], false),
        ("/token", &[("x-token", "s3cret")], true),
        ("/token", &[("x-token", "wrong")], false),
        ("/token", &[("x-token", "s3cret"), ("x-token", "wrong")], false),
        ("/host", &[("host", "A.io")], true),
        ("/host", &[("host", "b.io")], false),
        ("/chat", &[upgrade], false),
        ("/chat", &[upgrade, ("connection", "upgrade")], true),
    ] {
        let found = ask(target, headers);
        assert_eq!(found.allowed, allowed, "{target} {headers:?}: {found:?}");
        assert!(!format!("{found:?}").contains("s3cret"), "{found:?}");
    }
    for (headers, why) in [
        (&[("host", "a"), ("host", "a")][..], "a field twice that may come once only"),
        (&[("host", "a b")], "the host is not valid"),
        (&[("connection", "host")], "the connection field names what must go further"),
        (&[("connection", "a b")], "the connection field is no list of names"),
    ] {
        let verdict = ask("/role", headers).ends.pop().unwrap().verdict;
        assert!(verdict.contains(&format!("the proxy answers 400: {why}")), "{verdict}");
    }
    assert_eq!(ask("/host", &[("host", "A.io")]).read_as.unwrap(), "GET http://a.io/host");
}

#[test]
fn a_url_and_a_header_name_one_host() {
    let ask = |host: &str, header: &str| {
        let Inside::Http { method, target, headers, .. } =
            request("GET", "/public/x", &[("host", header)])
        else {
            panic!()
        };
        let inside = Some(Inside::Http { method, target, host: host.into(), headers });
        let (from, to) = ("ship".into(), "star".into());
        answer(WORLD, Explain { from, to, protocol: 6, port: 80, inside }).unwrap().allowed
    };
    assert!(ask("a.io", "A.io"));
    assert!(!ask("a.io", "b.io"));
}

const SERVICE: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: front}
spec: {clusterIP: 10.96.0.9, selector: {class: star}, ports: [{port: 8000, targetPort: web}]}
"#;

fn ask_service(world: &str, from: &str, to: &str, port: u16) -> Result<Explanation> {
    let (from, to) = (from.into(), to.into());
    answer(world, Explain { from, to, protocol: 6, port, inside: None })
}

#[test]
fn a_service_is_judged_at_its_backends() {
    let world = format!("{WORLD}---{SERVICE}");
    for to in ["svc/front", "svc/default/front", "front", "default/front", "10.96.0.9"] {
        let ship = ask_service(&world, "ship", to, 8000).unwrap();
        let service = ship.service.unwrap();
        assert_eq!((&*service.name, &*service.frontend), ("default/front", "10.96.0.9:8000/TCP"));
        let [backend] = &service.backends[..] else { panic!("{service:?}") };
        assert!(ship.allowed && backend.allowed && backend.to == "default/star at port 80");
        assert!(!ask_service(&world, "rebel", to, 8000).unwrap().allowed, "{to}");
    }
    let twice = format!(
        "{SERVICE}---\n{}",
        WORLD.replace(
            "name: rebel, labels: {org: alliance}",
            "name: rebel, labels: {org: alliance, class: star, odd: odd}"
        )
    );
    let odd = "endpointSelector: {matchLabels: {class: star}, matchExpressions: [{key: odd, operator: DoesNotExist}]}";
    let twice = twice
        .replace("endpointSelector: {matchLabels: {class: star}}", odd)
        .replace("targetPort: web", "targetPort: 81");
    let both = ask_service(&twice, "ship", "svc/front", 8000).unwrap();
    let verdicts = both.service.unwrap().backends.into_iter().map(|one| (one.to, one.allowed));
    let expected = [("default/rebel at port 81", true), ("default/star at port 81", false)];
    assert!(!both.allowed);
    assert_eq!(verdicts.collect::<Vec<_>>(), expected.map(|(to, ok)| (to.to_owned(), ok)));
}

#[test]
fn slices_say_who_is_behind_a_service() {
    let slice = r#"
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: front-1, labels: {kubernetes.io/service-name: front}}
addressType: IPv4
ports: [{name: "", port: 80, protocol: TCP}]
endpoints:
- {addresses: [10.0.0.3], targetRef: {kind: Pod, name: rebel, namespace: default}}
- {addresses: [192.0.2.7]}
- {addresses: ["fd00::7"]}
- {addresses: [10.0.0.4], conditions: {ready: false}, targetRef: {kind: Pod, name: ship, namespace: default}}
"#;
    let world = format!("{WORLD}---{SERVICE}---{slice}");
    let ship = ask_service(&world, "ship", "svc/front", 8000).unwrap();
    let names: Vec<_> = ship.service.unwrap().backends.into_iter().map(|one| one.to).collect();
    assert_eq!(names, ["default/rebel at 10.0.0.3:80", "192.0.2.7:80"]);
    let unknown = world.replace("name: rebel, namespace", "name: gone, namespace");
    let error = ask_service(&unknown, "ship", "svc/front", 8000).unwrap_err().to_string();
    assert!(error.contains("pod gone, which the files do not have"), "{error}");
}

/// As the agent finds it: by address and port.
#[test]
fn an_address_that_several_have_is_explained_port_by_port() {
    let service = |name: &str, own: &str, port: u16| {
        let lent = ["203.0.113.7", "10.96.0.2", "127.0.0.1"].map(|ip| format!("{{ip: {ip}}}"));
        format!(
            "---\n{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, spec: {{clusterIP: \
             {own}, selector: {{class: star}}, ports: [{{port: {port}, targetPort: web}}]}}, \
             status: {{loadBalancer: {{ingress: [{}]}}}}}}\n",
            lent.join(", ")
        )
    };
    let [a, b] = [service("a", "10.96.0.1", 80), service("b", "10.96.0.2", 81)];
    let also = service("aa", "10.96.0.3", 81);
    for world in [[&a, &b, &also], [&also, &b, &a]] {
        let world = format!("{WORLD}{}{}{}", world[0], world[1], world[2]);
        for (to, port, service, frontend) in [
            ("203.0.113.7", 80, Some("default/a"), "203.0.113.7:80/TCP"),
            ("203.0.113.7", 81, Some("default/aa"), "203.0.113.7:81/TCP"),
            ("::ffff:203.0.113.7", 81, Some("default/aa"), "203.0.113.7:81/TCP"),
            ("203.0.113.7", 82, None, ""),
            ("10.96.0.2", 80, Some("default/a"), "10.96.0.2:80/TCP"),
            ("10.96.0.2", 81, Some("default/b"), "10.96.0.2:81/TCP"),
            ("svc/b", 81, Some("default/b"), "10.96.0.2:81/TCP"),
            ("127.0.0.1", 80, None, ""),
        ] {
            let found = ask_service(&world, "ship", to, port).unwrap().service;
            let found = found.map(|it| (it.name, it.frontend));
            let expected = service.map(|name| (name.to_owned(), frontend.to_owned()));
            assert_eq!(found, expected, "{to}:{port}");
        }
        assert!(ask_service(&world, "203.0.113.7", "ship", 80).is_ok());
        for (from, to, expected) in [
            ("ship", "10.96.0.2", "Service default/b has no such port; it has 81/TCP"),
            ("10.96.0.2", "ship", "Service default/b opens no connections"),
        ] {
            let error = ask_service(&world, from, to, 82).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}

#[test]
fn what_cannot_be_known_of_a_service_is_said() {
    let world = format!("{WORLD}---{SERVICE}");
    let headless = world.replace("clusterIP: 10.96.0.9", "clusterIP: None");
    let nobody = world.replace("selector: {class: star}", "selector: {class: moon}");
    let free = world.replace("selector: {class: star}, ", "");
    for (world, from, to, port, expected) in [
        (&world, "ship", "svc/front", 80, "has no such port; it has 8000/TCP"),
        (&world, "ship", "svc/back", 80, "no Service default/back"),
        (&world, "svc/front", "ship", 80, "Service default/front opens no connections"),
        (&headless, "ship", "svc/front", 8000, "is headless"),
        (&nobody, "ship", "svc/front", 8000, "that Service default/front selects"),
        (&free, "ship", "svc/front", 8000, "no EndpointSlice of it"),
    ] {
        let error = ask_service(world, from, to, port).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn the_nearest_request_differs_least() {
    let policy = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: rule2}
spec:
  endpointSelector: {matchLabels: {class: star}}
  ingress:
  - toPorts:
    - ports: [{port: "80", protocol: TCP}]
      rules:
        http:
        - {method: PUT, path: /v2}
        - {method: GET, path: /v1/?}
        - {method: GET, path: /host, host: 'star\..*'}
"#;
    let world = format!("{WORLD}---{policy}");
    for (method, target, nearest) in [
        ("GET", "/host", "rule2 spec.ingress[0].toPorts[0].rules.http[2] allows GET /host to host"),
        ("PUT", "/host", "rule2 spec.ingress[0].toPorts[0].rules.http[2] allows GET /host to host"),
        ("POST", "/v2", "rule2 spec.ingress[0].toPorts[0].rules.http[0] allows PUT /v2"),
        ("PUT", "/v1", "rule2 spec.ingress[0].toPorts[0].rules.http[1] allows GET /v1/?"),
        ("POST", "/v3", "rule1 spec.ingress[0].toPorts[0].rules.http[0] allows POST /v1/land"),
    ] {
        let denied = ask_in(&world, "ship", 80, Some((method, target)));
        let end = denied.ends.iter().find(|end| end.direction == "ingress").unwrap();
        assert!(!denied.allowed && end.nearest.as_ref().unwrap().contains(nearest), "{end:?}");
    }
}

#[test]
fn files_answer_as_the_cluster_would() {
    let land = ask("ship", 80, Some(("POST", "/v1/land")));
    assert!(land.allowed);
    let end = land.ends.iter().find(|end| end.direction == "ingress").unwrap();
    assert_eq!(end.rules[0].path, "spec.ingress[0].toPorts[0].rules.http");
    assert_eq!(end.rules[0].policy, "CiliumNetworkPolicy default/rule1");

    let rows = [
        ("ship", 80, Some(("PUT", "/v1/exhaust")), "rules.http[0] allows POST /v1/land"),
        ("ship", 81, None, "allows this peer, on TCP/80"),
        ("rebel", 80, Some(("POST", "/v1/land")), "allows this port, for other peers"),
        ("192.0.2.1", 80, None, "allows this port, for other peers"),
    ];
    for (from, port, inside, nearest) in rows {
        let denied = ask(from, port, inside);
        assert!(!denied.allowed, "{from} {port}");
        let end = denied.ends.iter().find(|end| end.direction == "ingress").unwrap();
        assert!(end.nearest.as_ref().unwrap().contains(nearest), "{end:?}");
    }
    // As the proxy reads it: it judges what the server would see, and refuses what is unclear.
    for (target, read_as) in [
        ("//v1/land", "POST /v1/land"),
        ("/v1/./land", "POST /v1/land"),
        ("/v1/la%6ed", "POST /v1/land"),
    ] {
        let land = ask("ship", 80, Some(("POST", target)));
        assert!(land.allowed && land.read_as.as_deref() == Some(read_as), "{land:?}");
    }
    let secret = ask("ship", 80, Some(("GET", "/public/../v2/secret")));
    assert!(!secret.allowed && secret.read_as.as_deref() == Some("GET /v2/secret"));
    assert!(ask("ship", 80, Some(("GET", "/public/x"))).allowed);
    for (method, target, answer) in [
        ("GET", "/public/%00", "400: a control character in the path"),
        ("GET", "/public/%zz", "400: a percent sign without two digits"),
        ("GET", "/public/x;y", "400: a character in the path that is read in several ways"),
        ("GET", "*", "400: the target is no path"),
        ("CONNECT", "star:80", "405: CONNECT is not for this proxy"),
    ] {
        let refused = ask("ship", 80, Some((method, target)));
        let end = refused.ends.iter().find(|end| end.direction == "ingress").unwrap();
        let verdict = format!("ingress: denied: the proxy answers {answer}");
        assert!(!refused.allowed && end.nearest.is_none(), "{refused:?}");
        assert_eq!(end.verdict, verdict);
        // Where no proxy is in the way, nobody reads it.
        let denied = ask("rebel", 80, Some((method, target)));
        assert!(denied.ends.iter().all(|end| !end.verdict.contains("proxy")), "{denied:?}");
    }
    let connection = ask("ship", 80, None);
    assert!(connection.allowed && connection.ends.iter().any(|end| end.proxied));
}

/// A policy for requests at port 81.
fn at_81(name: &str, subject: &str, direction: &str, http: &str) -> String {
    format!(
        "---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: {name}}}
spec:
  endpointSelector: {{matchLabels: {subject}}}
  {direction}:
  - toPorts: [{{ports: [{{port: '81', protocol: TCP}}], rules: {{http: {http}}}}}]
"
    )
}

/// Port 81 of the star, for requests by these rules.
fn into_star(http: &str) -> String {
    format!("{WORLD}{}", at_81("rule2", "{class: star}", "ingress", http))
}

fn secret(namespace: &str, name: &str, data: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Secret, metadata: {{name: {name}, namespace: {namespace}}}, \
         {data}}}\n"
    )
}

/// Whether the ship may ask the star for a page, and what the star's policies say.
fn page(world: &str) -> (bool, ExplainedEnd) {
    let answer = ask_in(world, "ship", 81, Some(("GET", "/")));
    let end = answer.ends.into_iter().find(|end| end.direction == "ingress").unwrap();
    (answer.allowed, end)
}

#[test]
fn a_rule_has_the_value_of_its_secret_or_says_that_it_lacks_it() {
    let there = secret("palisade-secrets", "default.token", "stringData: {value: s3cret}");
    for (mismatch, with, without) in [
        ("", false, false),
        (", mismatch: LOG", true, true),
        (", mismatch: DELETE", true, true),
        (", mismatch: ADD", true, false),
        (", mismatch: REPLACE", true, false),
    ] {
        let world = into_star(&format!(
            "[{{headerMatches: [{{name: x-token, secret: {{name: token}}{mismatch}}}]}}]"
        ));
        let (allowed, end) = page(&format!("{world}{there}"));
        assert_eq!((allowed, end.rules.len()), (with, usize::from(with)), "{mismatch}: {end:?}");
        let lack = "rules.http[0] allows ";
        let copy = "Secret default/token, of which there is no copy `default.token`";
        let lacks = |end: &ExplainedEnd| {
            let nearest = end.nearest.as_deref().unwrap_or_default();
            assert_eq!(nearest.contains(copy), nearest.contains("and needs"), "{nearest}");
            nearest.contains(lack) && nearest.contains(copy)
        };
        assert!(!lacks(&end), "{mismatch}: {end:?}");
        let (allowed, end) = page(&world);
        assert_eq!((allowed, lacks(&end)), (without, !without), "{mismatch}: {end:?}");
        let wanting = end.verdict.ends_with("for want of Secret default/token");
        assert_eq!(wanting, with && !without, "{mismatch}: {end:?}");
    }
}

#[test]
fn secrets_count_as_in_the_cluster() {
    let world =
        into_star("[{headerMatches: [{name: x-token, secret: {name: token}, mismatch: REPLACE}]}]");
    let (home, copy) = ("palisade-secrets", "default.token");
    for (namespace, name, data, counts) in [
        (home, copy, "data: {value: czNjcmV0}", true),
        (home, copy, "data: {value: Cg==}, stringData: {value: s3cret}", true),
        (home, copy, "data: {value: Cg==}", false),
        (home, copy, "stringData: {a: s3cret, b: s3cret}", false),
        (home, "other.token", "stringData: {value: s3cret}", false),
        ("default", copy, "stringData: {value: s3cret}", false),
        ("default", copy, "data: {value: 'ENC[encrypted]'}", false),
        ("default", "token", "stringData: {value: s3cret}", false),
    ] {
        let (allowed, end) = page(&format!("{world}{}", secret(namespace, name, data)));
        assert_eq!(allowed, counts, "{namespace}/{name} {data}: {end:?}");
    }
}

#[test]
fn rules_are_judged_together_as_the_proxy_does() {
    let setting = "{headerMatches: [{name: x-token, secret: {name: token}, mismatch: REPLACE}]}";
    let there = secret("palisade-secrets", "default.token", "stringData: {value: s3cret}");
    for rules in [format!("[{{}}, {setting}]"), format!("[{setting}, {{}}]")] {
        let world = into_star(&rules);
        let (allowed, end) = page(&world);
        assert!(!allowed && end.verdict.contains("for want of Secret default/token"), "{end:?}");
        assert!(end.nearest.unwrap().contains("Secret default/token"));
        assert!(page(&format!("{world}{there}")).0);
    }
    // Those of other policies too, and what asks for nothing.
    let plain = "---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: rule3}
spec:
  endpointSelector: {matchLabels: {class: star}}
  ingress: [{toPorts: [{ports: [{port: '81', protocol: TCP}]}]}]
";
    let world = format!("{}{plain}", into_star(&format!("[{setting}]")));
    assert!(!page(&world).0);
    let (allowed, end) = page(&format!("{world}{there}"));
    let rules: Vec<&str> = end.rules.iter().map(|rule| &*rule.policy).collect();
    let both = ["CiliumNetworkPolicy default/rule2", "CiliumNetworkPolicy default/rule3"];
    assert!(allowed && rules == both, "{rules:?}");
    let elsewhere =
        into_star(&format!("[{{}}, {}]", setting.replace("{header", "{path: /x, header")));
    assert!(page(&elsewhere).0, "a rule for another path has no say");
}

#[test]
fn the_receiver_is_asked_about_what_the_sender_sends() {
    let from_ship = |http: &str| at_81("rule3", "{org: empire}", "egress", http);
    let there = secret("palisade-secrets", "default.token", "stringData: {value: s3cret}");
    let adds = |name: &str, value: &str| {
        format!("[{{headerMatches: [{{name: {name}, {value}, mismatch: ADD}}]}}]")
    };
    let demands = into_star("[{headerMatches: [{name: X-Token, secret: {name: token}}]}]");
    for (sends, allowed) in [
        (String::new(), false),
        (from_ship("[{}]"), false),
        (from_ship(&adds("x-token", "value: s3cret")), true),
        (from_ship(&adds("x-token", "secret: {name: token}")), true),
        (from_ship(&adds("x-token", "value: wrong")), false),
        (from_ship(&adds("x-tok", "value: s3cret")), false),
        (from_ship("[{path: /other}]"), false),
    ] {
        let (found, end) = page(&format!("{demands}{sends}{there}"));
        assert_eq!(found, allowed, "{sends}: {end:?}");
    }
    // A header that says who asks is one like others.
    let demands = into_star("[{headers: ['Proxy-Authorization: Basic eA==']}]");
    assert!(!page(&demands).0);
    let sends = from_ship(&adds("proxy-authorization", "value: Basic eA=="));
    assert!(page(&format!("{demands}{sends}")).0);
}

#[test]
fn server_names_are_those_that_the_proxy_reads() {
    let policy = "---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: rule2}
spec:
  endpointSelector: {matchLabels: {class: star}}
  ingress:
  - toPorts: [{ports: [{port: '443', protocol: TCP}], serverNames: [a.com]}]
";
    let world = format!("{WORLD}{policy}");
    for (name, allowed, resets) in [
        ("a.com", true, false),
        ("A.com", true, false),
        ("b.com", false, false),
        ("a.com.", false, true),
        ("", false, true),
    ] {
        let (from, to) = ("ship".into(), "star".into());
        let inside = Some(Inside::Tls(name.into()));
        let found = answer(&world, Explain { from, to, protocol: 6, port: 443, inside }).unwrap();
        let end = found.ends.iter().find(|end| end.direction == "ingress").unwrap();
        assert_eq!(found.allowed, allowed, "{name}");
        assert_eq!(end.verdict.contains("the proxy resets"), resets, "{end:?}");
        assert_eq!(end.nearest.is_some(), !allowed && !resets, "{end:?}");
    }
}
