//! Mistakes and mischief, as `kubectl` shows what comes of them.

use super::{Cluster, default_namespace, start};

/// What must be refused, and a part of the reason.
const REFUSED: &[(&str, &str)] = &[
    // Selectors.
    ("get pods -l app==((", "unable to parse requirement"),
    ("get pods -l app=a=b", "unable to parse requirement"),
    ("get pods -l app>many", "unable to parse requirement"),
    ("get pods --field-selector=spec.nosuch=1", "field label not supported: spec.nosuch"),
    // Paths and parameters.
    ("get --raw /api/v1/nosuch", "could not find the requested resource"),
    ("get --raw /api/v1/namespaces/default/pods/client/nosuch", "could not find the requested"),
    ("get --raw /api/v1/pods?limit=x", "is not a non-negative number"),
    ("get --raw /api/v1/pods?resourceVersion=x", "is not a non-negative number"),
    ("get --raw /api/v1/pods?resourceVersion=99999999999999", "Too large resource version"),
    ("get --raw /api/v1/pods?continue=made-up", "continue parameter is too old"),
    ("get --raw /api/v1/pods?watch=1&resourceVersion=1", "too old resource version"),
    ("delete --raw /api/v1/namespaces/default/pods/client/status", "does not allow this method"),
    // What is not built.
    ("create job j --image=i -- true", "could not find the requested resource"),
    ("create ingress i --rule=a.example/b=c:80", "could not find the requested resource"),
    ("get --raw /api/v1/namespaces/default/pods/client/portforward", "served over WebSocket only"),
    ("top pods", "Metrics API not available"),
    ("debug client --image=i -- true", "ephemeral containers are disabled"),
    ("get nosuch", "doesn't have a resource type \"nosuch\""),
    // Objects that are not there, and those that are.
    ("get pods nosuch", "pods \"nosuch\" not found"),
    ("get cm -n nosuch nosuch", "\"nosuch\" not found"),
    ("create configmap settings", "configmaps \"settings\" already exists"),
    ("create configmap x -n nosuch", "namespaces \"nosuch\" not found"),
    // What every cluster has.
    ("delete namespace default", "this namespace may not be deleted"),
    // Patches.
    ("patch cm settings --type=merge -p []", "the patch would leave no object"),
    ("patch cm settings --type=merge -p {\"data\":{\"k\":5}}", "cannot unmarshal number"),
    (
        "patch cm settings --type=merge -p {\"metadata\":{\"name\":\"other\"}}",
        "does not match the name on the URL",
    ),
    (
        "patch cm settings --type=json -p [{\"op\":\"test\",\"path\":\"/data/k\",\"value\":\"no\"}]",
        "value did not match",
    ),
    ("patch cm settings --type=json -p [{\"op\":\"remove\",\"path\":\"/data/no\"}]", "/data/no"),
    ("patch pod client -p {\"spec\":{\"nodeName\":\"n\"}}", "pod updates may not change fields"),
    ("patch pod client --type=merge -p {\"spec\":null}", "spec.containers: Required value"),
];

/// Objects that must be refused, and a part of the reason.
const WRONG_OBJECTS: &[(&str, &str)] = &[
    ("{apiVersion: v1, kind: Podd, metadata: {name: x}}", "no matches for kind \"Podd\""),
    ("{apiVersion: v9, kind: Pod, metadata: {name: x}}", "no matches for kind \"Pod\""),
    ("kind: Pod\n  metadata: x", "error parsing STDIN"),
    ("{apiVersion: v1, kind: ConfigMap, metadata: {name: A_B}}", "RFC 1123 subdomain"),
    ("{apiVersion: v1, kind: ConfigMap}", "name or generateName is required"),
    ("{apiVersion: v1, kind: ConfigMap, metadata: {name: x, labels: {a: b c}}}", "label"),
    ("{apiVersion: v1, kind: ConfigMap, metadata: {name: x}, dota: {}}", "unknown field \"dota\""),
    (
        "{apiVersion: v1, kind: Pod, metadata: {name: x}, spec: {containers: [{name: a, image: b, \
         ports: [{containerPort: 99999}]}]}}",
        "containers[0].ports[0].containerPort",
    ),
    (
        "{apiVersion: v1, kind: Pod, metadata: {name: x}, spec: {containers: [{name: a, image: b}, \
         {name: a, image: b}]}}",
        "Duplicate value",
    ),
    (
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: x}, spec: \
         {podSelector: {matchExpressions: [{key: a, operator: Near, values: [b]}]}}}",
        "spec.podSelector.matchExpressions[0].operator",
    ),
    (
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: x}, spec: \
         {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/33}}]}]}}",
        "spec.ingress[0].from[0].ipBlock.cidr",
    ),
    (
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: x}, spec: \
         {podSelector: {}, ingress: [{ports: [{port: 70000}]}]}}",
        "spec.ingress[0].ports[0].port",
    ),
    (
        "{apiVersion: v1, kind: Service, metadata: {name: x}, spec: {ports: [{port: 0}]}}",
        "spec.ports[0].port",
    ),
    (
        "{apiVersion: v1, kind: Service, metadata: {name: x}, spec: {clusterIP: 1.2.3.4, \
         ports: [{port: 1}]}}",
        "spec.clusterIP",
    ),
];

fn cluster(name: &str) -> Option<Cluster> {
    let cluster = start(name);
    if cluster.kubectl.is_none() {
        eprintln!("SKIPPED: no kubectl in PALISADE_KUBECTL, .tools/bin or PATH");
        return None;
    }
    default_namespace(&cluster);
    let pod = "{apiVersion: v1, kind: Pod, metadata: {name: client}, spec: {containers: \
               [{name: main, image: example.com/client}]}}";
    cluster.ok("apply -f -", pod);
    cluster.ok("create configmap settings --from-literal=k=v", "");
    Some(cluster)
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_are_refused_with_the_reason() {
    let Some(cluster) = cluster("mistakes") else { return };
    let before = cluster.ok("get pod/client cm/settings -o yaml", "");
    let commands = REFUSED.iter().map(|(command, reason)| (*command, "", *reason));
    let objects = WRONG_OBJECTS.iter().map(|(object, reason)| ("create -f -", *object, *reason));
    let wrong: Vec<String> = commands
        .chain(objects)
        .filter_map(|(command, input, reason)| {
            let said = cluster.refused(command, input);
            (!said.contains(reason)).then(|| format!("kubectl {command} {input}: {said}"))
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(cluster.ok("get pod/client cm/settings -o yaml", ""), before);
    assert_eq!(
        cluster.ok("get pods,cm,svc,netpol -o name", ""),
        "pod/client\nconfigmap/settings\n"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn large_objects_are_kept_and_larger_ones_refused() {
    let Some(cluster) = cluster("large") else { return };
    let object = |kind: &str, name: &str, field: &str, text: &str| {
        format!(
            "{{apiVersion: v1, kind: {kind}, metadata: {{name: {name}}}, {field}: {{k: {text}}}}}"
        )
    };
    const LIMIT: usize = 1 << 20;
    let x = |bytes: usize| "x".repeat(bytes);
    // As base64, of which four characters stand for three bytes.
    let zeros = |bytes: usize| "A".repeat(bytes.div_ceil(3) * 4);
    cluster.ok("create -f -", &object("ConfigMap", "large", "data", &x(LIMIT)));
    let data = cluster.ok("get cm large -o jsonpath={.data.k}", "");
    assert_eq!(data.len(), LIMIT);
    cluster.ok("create -f -", &object("ConfigMap", "binary", "binaryData", &zeros(LIMIT - 3)));
    cluster.ok("create -f -", &object("Secret", "large", "data", &zeros(LIMIT - 3)));

    let refused = |kind: &str, field: &str, text: &str, reason: &str| {
        let said = cluster.refused("create -f -", &object(kind, "larger", field, text));
        assert!(said.contains(reason), "{said}");
    };
    let no_field = "\"larger\" is invalid: []: Too long: may not be more than 1048576 bytes";
    refused("ConfigMap", "data", &x(LIMIT + 1), no_field);
    refused("ConfigMap", "binaryData", &zeros(LIMIT + 3), no_field);
    refused("Secret", "data", &zeros(LIMIT + 3), "data: Too long: may not be more than 1048576");
    let account = format!(
        "{{apiVersion: v1, kind: ServiceAccount, metadata: {{name: larger}}, \
         secrets: [{{name: {}}}]}}",
        x(1_600_000)
    );
    assert!(cluster.refused("create -f -", &account).contains("etcdserver: request is too large"));
    refused("ConfigMap", "data", &x(3 << 20), "Request entity too large: limit is 3145728");
    for kind in ["cm", "secret", "sa"] {
        assert!(cluster.refused(&format!("get {kind} larger"), "").contains("not found"));
    }
    let grown = format!("{{\"data\":{{\"more\":\"{}\"}}}}", "x".repeat(1000));
    let said = cluster.refused(&format!("patch cm large --type=merge -p {grown}"), "");
    assert!(said.contains("Too long"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_belongs_to_the_list_that_it_continues() {
    let Some(cluster) = cluster("pages") else { return };
    for name in ["a", "b", "c"] {
        cluster.ok(&format!("create configmap {name}"), "");
        cluster.ok(&format!("create secret generic {name}"), "");
    }
    let base = "/api/v1/namespaces/default";
    let page = |path: &str| -> serde_json::Value {
        serde_json::from_str(&cluster.ok(&format!("get --raw {base}/{path}"), "")).unwrap()
    };
    let secrets = page("secrets?limit=1");
    let token = secrets["metadata"]["continue"].as_str().unwrap();
    for other in ["configmaps?", "secrets?labelSelector=a&", "configmaps?limit=1&"] {
        let said = cluster.refused(&format!("get --raw {base}/{other}continue={token}"), "");
        assert!(said.contains("continue key is not valid"), "{other}: {said}");
    }
    let rest = page(&format!("secrets?limit=5&continue={token}"));
    assert_eq!(rest["items"].as_array().unwrap().len(), 2);
    // Empty is as good as absent.
    assert_eq!(page("secrets?continue=")["items"].as_array().unwrap().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_shown_without_their_names() {
    let Some(cluster) = cluster("events") else { return };
    let event = "{apiVersion: v1, kind: Event, metadata: {name: client.1}, type: Warning, reason: \
                 Failed, message: it broke, involvedObject: {kind: Pod, name: client}}";
    cluster.ok("create -f -", event);
    let table = cluster.ok("get events", "");
    assert!(table.starts_with("LAST SEEN"), "{table}");
    assert!(table.contains("pod/client") && table.contains("it broke"), "{table}");
    assert!(!table.contains("client.1"), "{table}");
    let wide = cluster.ok("get events -o wide", "");
    assert!(wide.contains("client.1"), "{wide}");
}
