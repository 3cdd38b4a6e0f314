use std::{fs, thread};

use palisade_api::admin::Inside;

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
    let name = format!("explain-{}-{:?}.yaml", std::process::id(), thread::current().id());
    let file = std::env::temp_dir().join(name);
    fs::write(&file, world).unwrap();
    let inside = inside.map(|(method, target)| Inside::Http {
        method: method.into(),
        target: target.into(),
        host: String::new(),
    });
    let asked = Explain { from: from.into(), to: "star".into(), protocol: 6, port, inside };
    let explanation = explain(std::slice::from_ref(&file), &asked).unwrap();
    fs::remove_file(file).unwrap();
    explanation
}

const SERVICE: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: front}
spec: {clusterIP: 10.96.0.9, selector: {class: star}, ports: [{port: 8000, targetPort: web}]}
"#;

fn ask_service(world: &str, from: &str, to: &str, port: u16) -> Result<Explanation> {
    let name = format!("explain-{}-{:?}.yaml", std::process::id(), thread::current().id());
    let file = std::env::temp_dir().join(name);
    fs::write(&file, world).unwrap();
    let (from, to) = (from.into(), to.into());
    let asked = Explain { from, to, protocol: 6, port, inside: None };
    let answer = explain(std::slice::from_ref(&file), &asked);
    fs::remove_file(file).unwrap();
    answer
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
