//! The ends and the policies from files: pods, workloads that would make pods, namespaces, Services.

mod services;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
};

use anyhow::{Context, Result, anyhow, bail};
use palisade_api::{
    admin::{Explain, Explanation, Translated},
    convert::convert,
    explain::{self, NamedEnd},
};
use palisade_policy::{
    evaluate::End,
    identity::{PodLabels, endpoint_labels, reserved},
    model::{NamedPort, Policy, PolicyKind},
};
use serde_json::Value;

use self::services::{Services, full_name};
use crate::{
    check::{documents, objects, read},
    exit::Failure,
};

/// The cluster's name where nobody gave it one.
const CLUSTER: &str = "default";
/// Any identity that a pod can have: the labels are what counts.
const POD: u32 = 256;

/// Identities of addresses that are no pod's: in the world.
const WORLD_IPV4: u32 = 9;
const WORLD_IPV6: u32 = 10;

#[derive(Default)]
struct Objects {
    policies: Vec<Policy>,
    /// Labels by namespace.
    namespaces: BTreeMap<String, BTreeMap<String, String>>,
    pods: Vec<Pod>,
    services: Services,
}

struct Pod {
    /// It stands for those that a workload makes.
    is_made: bool,
    namespace: String,
    name: String,
    labels: BTreeMap<String, String>,
    service_account: String,
    addresses: Vec<IpAddr>,
    ports: Vec<NamedPort>,
}

pub(super) fn explain(files: &[PathBuf], asked: &Explain) -> Result<Explanation> {
    let mut objects = Objects::default();
    for file in files {
        let text = read(file)?;
        for (line, document) in documents(&text) {
            let document: Value = serde_saphyr::from_str(document)
                .with_context(|| format!("{}:{line}", file.display()))?;
            for (path, object) in self::objects(&document) {
                let place = || format!("{}:{line}: {path}", file.display());
                objects.add(object).with_context(place)?;
            }
        }
    }
    let policies: Vec<&Policy> = objects.policies.iter().collect();
    let services = &objects.services;
    if let Some(service) = services.find(&objects, &asked.from)? {
        let name = full_name(service);
        bail!("--from {}: Service {name} opens no connections; name a pod", asked.from);
    }
    let from = objects.find(&asked.from)?;
    let Some(service) = services.find(&objects, &asked.to)? else {
        return Ok(explain::explain(&policies, &from, &objects.find(&asked.to)?, asked));
    };
    let target = services.translate(&objects, service, asked)?;
    let backends = target.backends.iter().map(|(to, port)| {
        explain::explain(&policies, &from, to, &Explain { port: *port, ..asked.clone() })
    });
    let backends = backends.collect();
    let service = Translated { name: target.name, frontend: target.frontend, backends };
    Ok(explain::explain_service(&from, service))
}

impl Objects {
    fn has_namespace(&self, name: &str) -> bool {
        self.namespaces.contains_key(name) || self.pods.iter().any(|pod| pod.namespace == name)
    }

    fn add(&mut self, object: &Value) -> Result<()> {
        if self.services.add(object)? {
            return Ok(());
        }
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
        let kind = match text("/kind").unwrap_or_default() {
            "NetworkPolicy" => PolicyKind::NetworkPolicy,
            "CiliumNetworkPolicy" => PolicyKind::CiliumNetworkPolicy,
            "CiliumClusterwideNetworkPolicy" => PolicyKind::CiliumClusterwideNetworkPolicy,
            "Namespace" => {
                let name = text("/metadata/name").unwrap_or_default().to_owned();
                self.namespaces.insert(name, strings(object.pointer("/metadata/labels")));
                return Ok(());
            }
            "Pod" => {
                self.pods.push(Pod::read(object, &object["metadata"], object));
                return Ok(());
            }
            _ => {
                if let Some(template) = object.pointer("/spec/template") {
                    let made = Pod::read(object, &template["metadata"], template);
                    self.pods.push(Pod { is_made: true, ..made });
                }
                return Ok(());
            }
        };
        let mut object = object.clone();
        // The API server would put it there.
        if kind != PolicyKind::CiliumClusterwideNetworkPolicy
            && object.pointer("/metadata/namespace").is_none()
        {
            object["metadata"]["namespace"] = "default".into();
        }
        self.policies.push(match convert(kind, &object, CLUSTER) {
            Ok(policy) => policy,
            Err(refusal) => {
                eprintln!("warning: refused, its subject is locked down: {refusal}");
                refusal.lockdown()
            }
        });
        Ok(())
    }

    fn find(&self, text: &str) -> Result<NamedEnd> {
        let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
        if let Ok(address) = text.parse::<IpAddr>() {
            let owner = self.pods.iter().find(|pod| pod.addresses.contains(&address));
            return Ok(owner.map_or_else(|| outside(address), |pod| self.end(pod)));
        }
        let inside = || self.pods.iter().filter(|pod| pod.namespace == namespace);
        let found = inside()
            .find(|pod| pod.name == name)
            .or_else(|| inside().find(|pod| pod.name.starts_with(name)))
            .ok_or_else(|| {
                anyhow!(Failure::not_found(format!(
                    "the files have no pod and no Service {namespace}/{name}, and nothing that \
                     makes pods of that name"
                )))
            })?;
        Ok(self.end(found))
    }

    fn end(&self, pod: &Pod) -> NamedEnd {
        let mut team = self.namespaces.get(&pod.namespace).cloned().unwrap_or_default();
        team.insert("kubernetes.io/metadata.name".into(), pod.namespace.clone());
        let labels = endpoint_labels(&PodLabels {
            namespace: &pod.namespace,
            namespace_labels: Some(&team),
            pod_labels: Some(&pod.labels),
            service_account: &pod.service_account,
            cluster: CLUSTER,
        });
        let end = End {
            identity: POD,
            labels,
            address: pod.addresses.first().copied().unwrap_or([0, 0, 0, 0].into()),
            named_ports: pod.ports.clone(),
            names: BTreeSet::new(),
        };
        NamedEnd { name: format!("{}/{}", pod.namespace, pod.name), end }
    }
}

fn outside(address: IpAddr) -> NamedEnd {
    let identity = if address.is_ipv4() { WORLD_IPV4 } else { WORLD_IPV6 };
    let labels = reserved(identity).unwrap_or_default();
    let end = End { identity, labels, address, named_ports: Vec::new(), names: BTreeSet::new() };
    NamedEnd { name: address.to_string(), end }
}

impl Pod {
    /// `object` has the name; `metadata` and `pod` may be those of its template.
    fn read(object: &Value, metadata: &Value, pod: &Value) -> Self {
        let text = |value: &Value, pointer: &str| {
            value.pointer(pointer).and_then(Value::as_str).map(str::to_owned)
        };
        let addresses = pod.pointer("/status/podIPs").and_then(Value::as_array);
        let containers = pod.pointer("/spec/containers").and_then(Value::as_array);
        Self {
            is_made: false,
            namespace: text(object, "/metadata/namespace").unwrap_or_else(|| "default".into()),
            name: text(object, "/metadata/name").unwrap_or_default(),
            labels: strings(metadata.get("labels")),
            service_account: text(pod, "/spec/serviceAccountName")
                .unwrap_or_else(|| "default".into()),
            addresses: addresses
                .into_iter()
                .flatten()
                .filter_map(|one| one["ip"].as_str()?.parse().ok())
                .collect(),
            ports: containers
                .into_iter()
                .flatten()
                .flat_map(|container| container["ports"].as_array().into_iter().flatten())
                .filter_map(named_port)
                .collect(),
        }
    }
}

fn named_port(port: &Value) -> Option<NamedPort> {
    Some(NamedPort {
        name: port["name"].as_str()?.to_owned(),
        protocol: match port["protocol"].as_str().unwrap_or("TCP") {
            "UDP" => 17,
            "SCTP" => 132,
            _ => 6,
        },
        port: u16::try_from(port["containerPort"].as_u64()?).ok()?,
    })
}

fn strings(map: Option<&Value>) -> BTreeMap<String, String> {
    map.and_then(Value::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
        .collect()
}

#[cfg(test)]
mod tests {
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
            assert_eq!(
                (&*service.name, &*service.frontend),
                ("default/front", "10.96.0.9:8000/TCP")
            );
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
            (
                "GET",
                "/host",
                "rule2 spec.ingress[0].toPorts[0].rules.http[2] allows GET /host to host",
            ),
            (
                "PUT",
                "/host",
                "rule2 spec.ingress[0].toPorts[0].rules.http[2] allows GET /host to host",
            ),
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
}
