//! What people see of requests: through `palisade` and `kubectl` alone, in a real cluster.

use std::net::SocketAddr;

use super::{
    connectivity::palisade,
    harness::{Lab, eventually},
    http::{Client, Origin},
    names::{look_up, serve_names},
    status::stand_in,
};

const PORT: u16 = 8080;
const SERVER: &str = "spec: {endpointSelector: {matchLabels: {app: server}}, ingress: [{
    fromEndpoints: [{matchLabels: {app: near}}],
    toPorts: [{ports: [{port: '8080', protocol: TCP}], rules: {http: [{method: GET, path: '/public'}]}}]}]}";
/// The idiom for seeing all and denying nothing that reaches the port.
const OPEN: &str = "spec: {endpointSelector: {matchLabels: {app: server}}, ingress: [{
    fromEndpoints: [{matchLabels: {app: near}}],
    toPorts: [{ports: [{port: '8080', protocol: TCP}], rules: {http: [{}]}}]}]}";
const NAMES: &str = "spec: {endpointSelector: {matchLabels: {app: near}}, egress: [
    {toEndpoints: [{matchLabels: {app: server}}]},
    {toEndpoints: [{matchLabels: {app: names}}],
     toPorts: [{ports: [{port: '53', protocol: ANY}], rules: {dns: [{matchPattern: '*.example.com'}]}}]}]}";
const SECRETIVE: &str = "spec: {endpointSelector: {matchLabels: {app: server}}, ingress: [{
    fromEndpoints: [{matchLabels: {app: near}}],
    toPorts: [{ports: [{port: '8080', protocol: TCP}], rules: {http: [
        {path: '/secret', headerMatches: [{name: x-token, secret: {name: token}}]},
        {path: '/(set|open)'},
        {path: '/set', headerMatches: [{name: x-token, secret: {name: token}, mismatch: REPLACE}]}]}}]}]}";

/// Waits until `palisade observe` prints just one line that holds all of the words.
fn sees(lab: &Lab, args: &[&str], words: &[&str]) {
    let args = [&["observe", "--last", "1000"], args].concat();
    let mut text = String::new();
    let holds = || {
        text = palisade(lab, &args).1;
        let mut lines = text.lines();
        let line = lines.next().unwrap_or_default();
        lines.next().is_none() && words.iter().all(|word| line.contains(word))
    };
    eventually(&format!("{args:?} shows {words:?}"), holds);
    println!("{text}");
}

#[test]
fn requests_and_questions_are_seen_and_explained() {
    let lab = Lab::up(1);
    let [server, near, names] = lab.pods([("server", 1), ("near", 1), ("names", 1)]);
    let _origin = Origin::start(&server, PORT);
    let [v4, v6] = server.addresses;
    serve_names(&names, vec![("api.example.com", v4), ("api.example.com", v6)]);
    lab.apply_cilium_policy("default", "server", SERVER);
    lab.apply_cilium_policy("default", "names", NAMES);

    for to in server.addresses {
        let to = SocketAddr::new(to, PORT);
        let mut client = Client::connect(&near, to).unwrap();
        assert_eq!(client.ask("GET", "/public").unwrap(), 200);
        assert_eq!(client.ask("PUT", "/hidden").unwrap(), 403);
        let ip = to.ip().to_string();
        let ends = ["default/near:", "default/server:8080", "ingress"];
        let allowed = [
            "FORWARDED",
            "GET http://origin/public: 200",
            "CiliumNetworkPolicy default/server spec.ingress[0].toPorts[0].rules.http",
        ];
        sees(&lab, &["--ip", &ip, "--http-path", "/pub*"], &[&ends[..], &allowed].concat());
        let denied = [
            "DROPPED",
            "PUT http://origin/hidden: 403",
            "no rule of CiliumNetworkPolicy default/server allows it",
        ];
        for filter in [["--http-status", "4xx"], ["--http-method", "put"], ["--verdict", "dropped"]]
        {
            let args = [&["--ip", &ip, "--kind", "request"], &filter[..]].concat();
            sees(&lab, &args, &[&ends[..], &denied].concat());
        }
        let opened = ["--ip", &ip, "--type", "open", "--verdict", "redirected"];
        sees(&lab, &opened, &["REDIRECTED", "default/near:"]);
    }
    for (from, to) in names.addresses.into_iter().zip(server.addresses) {
        look_up(&near, from, "api.example.com", false).unwrap();
        look_up(&near, from, "api.example.org", false).unwrap();
        let (ip, to) = (from.to_string(), to.to_string());
        let answered = [
            "FORWARDED",
            "api.example.com: NOERROR",
            &to,
            "CiliumNetworkPolicy default/names spec.egress[1]",
        ];
        sees(&lab, &["--ip", &ip, "--dns-name", "*.example.com"], &answered);
        let refused = [
            "DROPPED",
            "api.example.org",
            "no rule of CiliumNetworkPolicy default/names allows it",
        ];
        sees(&lab, &["--ip", &ip, "--dns-name", "api.example.org"], &refused);
    }
    explained(&lab);
    explained_behind_a_service(&lab);
    everything_is_seen_and_no_secret_told(&lab);
    a_secret_that_is_not_there(&lab);
}

/// A rule that asks nothing allows every request, and has each of them told, but for what must not
/// be.
fn everything_is_seen_and_no_secret_told(lab: &Lab) {
    lab.apply_cilium_policy("default", "server", OPEN);
    let (server, near) = (lab.pod("default", "server"), lab.pod("default", "near"));
    for to in server.addresses {
        let mut client = Client::connect(&near, SocketAddr::new(to, PORT)).unwrap();
        let secrets = "authorization: Bearer s3cret\r\ncookie: id=s3cret\r\nx-api-key: s3cret\r\n";
        let target = "/hidden?a=1&access_token=s3cret&b=2";
        assert_eq!(client.ask_with("DELETE", target, secrets).unwrap(), 200);
        let ip = to.to_string();
        let told = [
            "FORWARDED",
            "DELETE http://origin/hidden?a=1&access_token=[redacted]&b=2: 200",
            "CiliumNetworkPolicy default/server spec.ingress[0].toPorts[0].rules.http",
        ];
        sees(lab, &["--ip", &ip, "--http-method", "DELETE"], &told);
    }
    for format in ["table", "json"] {
        let (_, text) = palisade(lab, &["observe", "--last", "1000", "-o", format]);
        assert!(text.contains("[redacted]") && !text.contains("s3cret"), "{text}");
    }
}

fn explained(lab: &Lab) {
    let explain = |request: &str| {
        let ends = ["--from", "default/near", "--to", "default/server", "--port", "8080"];
        palisade(lab, &[&["policy", "explain"], &ends[..], &["--http", request]].concat())
    };
    let (code, text) = explain("GET /public");
    assert!(code == 0 && text.starts_with("ALLOWED"), "{code} {text}");
    assert!(text.contains("CiliumNetworkPolicy default/server"), "{text}");
    let (code, text) = explain("PUT /hidden");
    assert!(code != 0 && text.starts_with("DENIED"), "{code} {text}");
    assert!(text.contains("nearest: ") && text.contains("/public"), "{text}");
}

/// The port is the Service's, and what is judged its backend.
fn explained_behind_a_service(lab: &Lab) {
    lab.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: front}\n\
         spec: {selector: {app: server}, ports: [{port: 80, targetPort: 8080}]}\n",
    );
    let address = lab.kubectl(&["get", "svc", "front", "-o", "jsonpath={.spec.clusterIP}"]);
    let backend = lab.pod("default", "server").addresses[usize::from(address.contains(':'))];
    let backend = SocketAddr::new(backend, PORT);
    let explain = |to: &str, port: &str, request: &str| {
        let ends = ["--from", "near", "--to", to, "--port", port, "--http", request];
        palisade(lab, &[&["policy", "explain"], &ends[..]].concat())
    };
    eventually("the Service has its backend", || {
        explain("svc/front", "80", "GET /public").1.contains(&backend.to_string())
    });
    for to in ["svc/front", "default/front", &address] {
        let (code, text) = explain(to, "80", "GET /public");
        assert!(code == 0 && text.starts_with("ALLOWED"), "{code} {text}");
        assert!(text.contains("Service default/front"), "{text}");
        assert!(text.contains(&format!("default/server at {backend}")), "{text}");
        let (code, text) = explain(to, "80", "PUT /hidden");
        assert!(code == 1 && text.starts_with("DENIED") && text.contains("nearest: "), "{text}");
    }
    let (code, text) = explain("svc/front", "8080", "GET /public");
    assert!(code == 4 && text.contains("has no port 8080/TCP; it has 80/TCP"), "{code} {text}");
}

fn a_secret_that_is_not_there(lab: &Lab) {
    let says = |status: &str, words: &[&str]| {
        let path = "jsonpath={.status.conditions[?(@.type==\"Valid\")]}";
        eventually(&format!("the condition is {status}, with {words:?}"), || {
            let text = lab.kubectl(&["get", "cnp", "server", "-o", path]);
            text.contains(&format!("\"status\":\"{status}\""))
                && words.iter().all(|word| text.contains(word))
        });
    };
    lab.apply_cilium_policy("default", "server", SECRETIVE);
    let field = "spec.ingress[0].toPorts[0].rules.http[0].headerMatches";
    says("False", &["SecretMissing", field, "default.token", "palisade-secrets"]);
    let (server, near) = (lab.pod("default", "server"), lab.pod("default", "near"));
    let get = |target: &str, token: &str| {
        let mut client = Client::connect(&near, SocketAddr::new(server.addresses[0], PORT)).ok()?;
        client.ask_with("GET", target, &format!("x-token: {token}\r\n")).ok()
    };
    let ask = |token: &str| get("/secret", token);
    for token in ["", "right"] {
        assert_eq!(ask(token), Some(403), "nothing opens without the Secret");
    }
    let wanting = "denied by the proxy for want of Secret default/token";
    assert_eq!((get("/set", "own"), get("/open", "own")), (Some(403), Some(200)));
    is_explained(lab, "/set", false, wanting);
    is_explained(lab, "/secret", false, "needs Secret default/token, of which there is no copy");
    is_explained(lab, "/open", true, "rules.http");
    lab.try_kubectl(&["create", "namespace", "palisade-secrets"]);
    let create = ["create", "secret", "generic", "default.token", "--from-literal=value=right"];
    lab.kubectl(&[&["-n", "palisade-secrets"], &create[..]].concat());
    says("True", &["Accepted"]);
    eventually("the right header passes", || ask("right") == Some(200));
    assert_eq!(ask("wrong"), Some(403));
    assert_eq!(get("/set", "own"), Some(200));
    is_explained(lab, "/set", true, "rules.http");
    is_explained(lab, "/secret", false, "with header x-token as in Secret default/token\n");
    is_explained_with(lab, "/secret", &["--header", "X-Token: right"], true, "rules.http");
    is_explained_with(lab, "/secret", &["--header", "X-Token: wrong"], false, "nearest: ");
    lab.kubectl(&["-n", "palisade-secrets", "delete", "secret", "default.token"]);
    says("False", &["SecretMissing", field, "default.token", "palisade-secrets"]);
    assert_eq!(ask("right"), Some(403), "what was taken away opens nothing any more");
    assert_eq!(get("/set", "own"), Some(403));
    is_explained(lab, "/set", false, wanting);
}

/// Which addresses a name stands for to a pod is known on its node only.
const ROLES: &str = "spec: {endpointSelector: {matchLabels: {app: near}}, egress: [
    {toFQDNs: [{matchName: api.example.com}]},
    {toCIDR: [192.0.2.1/32],
     toPorts: [{ports: [{port: '8080', protocol: TCP}], rules: {http: [
         {headerMatches: [{name: x-role, value: admin}]}]}}]}]}";

#[test]
fn headers_are_explained_by_the_agent_of_another_node() {
    let lab = Lab::up(2);
    stand_in(&lab);
    lab.pods([("near", 1)]);
    lab.apply_cilium_policy("default", "roles", ROLES);
    let socket = lab.run_dir(2).join("admin.sock");
    let words = "policy explain --from near --to 192.0.2.1 --port 8080 --http";
    let explain = |headers: &[&str]| {
        let socket = ["--socket", socket.to_str().unwrap()];
        let words: Vec<&str> = words.split(' ').collect();
        palisade(&lab, &[&socket[..], &words, &["GET /"], headers].concat())
    };
    let (code, text) = explain(&[]);
    assert!(code == 1 && text.starts_with("DENIED"), "{code} {text}");
    let (code, text) = explain(&["--header", "x-one: a b", "--header", "X-Role: admin"]);
    assert!(code == 0 && text.starts_with("ALLOWED"), "{code} {text}");
    let (code, text) = explain(&["--header", "x-role: user"]);
    assert!(code == 1 && text.starts_with("DENIED"), "{code} {text}");
    // Nobody is there to ask.
    lab.kubectl(&["-n", "kube-system", "delete", "pod", "palisade-node1", "--wait"]);
    let (code, text) = explain(&["--header", "x-role: s3cret"]);
    assert!(code != 0 && text.contains("--header=-") && !text.contains("s3cret"), "{code} {text}");
}

/// Of a request without headers of its own.
fn is_explained(lab: &Lab, target: &str, allowed: bool, words: &str) {
    is_explained_with(lab, target, &[], allowed, words);
}

/// By the agent, and from files.
fn is_explained_with(lab: &Lab, target: &str, headers: &[&str], allowed: bool, words: &str) {
    let objects = lab.kubectl(&["get", "pods,cnp", "-o", "yaml"]);
    let secrets = lab.kubectl(&["-n", "palisade-secrets", "get", "secrets", "-o", "yaml"]);
    let file = std::env::temp_dir().join(format!("explained-{}.yaml", std::process::id()));
    std::fs::write(&file, format!("{objects}\n---\n{secrets}")).unwrap();
    let request = format!("GET {target}");
    let live = ["policy", "explain", "--from", "near", "--to", "server", "--port", "8080"];
    let live = [&live[..], &["--http", &request], headers].concat();
    let from_files = [&live[..], &["-f", file.to_str().unwrap()]].concat();
    for args in [live, from_files] {
        let (code, text) = palisade(lab, &args);
        assert_eq!((code, text.contains(words)), (i32::from(!allowed), true), "{args:?}: {text}");
    }
    std::fs::remove_file(file).unwrap();
}
