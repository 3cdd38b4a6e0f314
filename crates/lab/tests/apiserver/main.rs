//! The API server as `kube` clients and `kubectl` see it.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::net::{Ipv4Addr, TcpListener};
use std::process::{Command, Output};
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt as _, StreamExt as _};
use palisade_lab::apiserver::{ApiServer, ApiServerConfig};
use palisade_lab::runtime::{
    ExecIo, ExecRequest, ExitStatus, LogRequest, PodRuntime, RuntimeError,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

mod hostile;
mod streams;

/// Echoes stdin and the command, and exits with the number that the command ends with.
struct Echo;

impl PodRuntime for Echo {
    fn exec(
        &self,
        request: ExecRequest,
        mut io: ExecIo,
    ) -> BoxFuture<'static, Result<ExitStatus, RuntimeError>> {
        async move {
            let mut text = format!("{}\n", request.command.join(" "));
            if let Some(stdin) = &mut io.stdin {
                let _ = stdin.read_to_string(&mut text).await;
            }
            if let Some(stdout) = &mut io.stdout {
                let _ = stdout.write_all(text.as_bytes()).await;
            }
            let code = request.command.last().and_then(|word| word.parse().ok()).unwrap_or(0);
            Ok(ExitStatus { code })
        }
        .boxed()
    }

    fn logs(
        &self,
        request: LogRequest,
    ) -> BoxFuture<'static, Result<BoxStream<'static, Bytes>, RuntimeError>> {
        let text = format!("log of {}\n", request.pod);
        async move { Ok(futures::stream::iter([Bytes::from(text)]).boxed()) }.boxed()
    }

    /// The pod is this machine.
    fn connect(
        &self,
        _: &str,
        _: &str,
        port: u16,
    ) -> BoxFuture<'static, Result<TcpStream, RuntimeError>> {
        async move {
            let refused = |error| RuntimeError::BadRequest(format!("port {port}: {error}"));
            TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.map_err(refused)
        }
        .boxed()
    }
}

struct Cluster {
    server: ApiServer,
    kubeconfig: std::path::PathBuf,
    kubectl: Option<std::path::PathBuf>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.server.shutdown();
        let _ = std::fs::remove_file(&self.kubeconfig);
    }
}

fn find_kubectl() -> Option<std::path::PathBuf> {
    let named = std::env::var_os("PALISADE_KUBECTL").map(std::path::PathBuf::from);
    let tools = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.tools/bin/kubectl");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|directory| directory.join("kubectl"));
    named.into_iter().chain([tools]).chain(on_path).find(|candidate| candidate.is_file())
}

fn start(name: &str) -> Cluster {
    let config = ApiServerConfig {
        data: None,
        certificate_names: Vec::new(),
        crds: Vec::new(),
        runtime: Arc::new(Echo),
    };
    let server = ApiServer::new(config).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let kubeconfig =
        std::env::temp_dir().join(format!("palisade-{name}-{}.yaml", std::process::id()));
    std::fs::write(&kubeconfig, server.kubeconfig(&url)).unwrap();
    drop(server.serve(listener));
    Cluster { server, kubeconfig, kubectl: find_kubectl() }
}

impl Cluster {
    fn kubectl(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.kubectl.as_ref().unwrap());
        command
            .env("KUBECONFIG", &self.kubeconfig)
            .env("KUBECACHEDIR", self.kubeconfig.with_extension("cache"))
            .args(arguments);
        command
    }

    fn run(&self, arguments: &[&str], input: &str) -> Output {
        use std::io::Write as _;
        let mut child = self
            .kubectl(arguments)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }

    fn ok(&self, arguments: &str, input: &str) -> String {
        let words: Vec<&str> = arguments.split_whitespace().collect();
        let output = self.run(&words, input);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubectl {arguments}: {text}{error}");
        format!("{text}{error}")
    }

    fn refused(&self, arguments: &str, input: &str) -> String {
        let words: Vec<&str> = arguments.split_whitespace().collect();
        let output = self.run(&words, input);
        assert!(!output.status.success(), "kubectl {arguments} succeeded");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
}

const APP: &str = "
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{port: 80}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers: [{name: web, image: example.com/web}]
---
apiVersion: v1
kind: Pod
metadata: {name: client, labels: {app: client}}
spec:
  containers: [{name: main, image: example.com/client}]
";

fn default_namespace(cluster: &Cluster) {
    let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: default}\n";
    cluster.ok("create -f -", namespace);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_walk_through_of_kubectl() {
    let cluster = start("walk");
    if cluster.kubectl.is_none() {
        eprintln!("SKIPPED: no kubectl in PALISADE_KUBECTL, .tools/bin or PATH");
        return;
    }
    default_namespace(&cluster);
    let created = cluster.ok("apply -f -", APP);
    assert!(created.contains("deployment.apps/web created"), "{created}");
    let again = cluster.ok("apply -f -", APP);
    assert_eq!(again.matches("unchanged").count(), 3, "{again}");

    let table = cluster.ok("get service,deployment,pod -o wide", "");
    assert!(table.contains("10.96.0.16"), "{table}");
    assert!(table.contains("0/2"), "{table}");
    assert!(table.contains("Pending"), "{table}");
    assert!(cluster.ok("get pod client -o yaml", "").contains("restartPolicy: Always"));
    assert!(cluster.ok("describe pod client", "").contains("example.com/client"));

    cluster.ok("label pod client tier=front", "");
    cluster.ok("annotate pod client note=hello", "");
    assert!(cluster.ok("get pods -l tier=front -o name", "").contains("pod/client"));
    cluster.ok("scale deployment web --replicas=3", "");
    assert!(cluster.ok("get deployment web", "").contains("0/3"));

    assert!(cluster.ok("exec client -- say hi", "").contains("say hi"));
    let echoed = cluster.ok("exec -i client -- cat", "typed");
    assert!(echoed.contains("typed"), "{echoed}");
    let failed = cluster.run(&["exec", "client", "--", "exit", "7"], "");
    assert_eq!(failed.status.code(), Some(7));
    assert_eq!(cluster.ok("logs client", ""), "log of client\n");

    let unknown = APP.replace("replicas: 2", "replicaz: 2");
    assert!(cluster.refused("apply -f -", &unknown).contains("unknown field \"spec.replicaz\""));
    assert!(cluster.ok("explain pod.spec.restartPolicy", "").contains("Restart policy"));
    assert!(cluster.ok("api-resources", "").contains("networkpolicies"));
    assert!(cluster.ok("auth can-i create pods", "").contains("yes"));
    cluster.ok("delete pod client", "");
    assert!(cluster.refused("get pod client", "").contains("not found"));
}

#[tokio::test(flavor = "multi_thread")]
async fn server_side_apply_finds_conflicts() {
    let cluster = start("ssa");
    if cluster.kubectl.is_none() {
        eprintln!("SKIPPED: no kubectl in PALISADE_KUBECTL, .tools/bin or PATH");
        return;
    }
    default_namespace(&cluster);
    cluster.ok("apply --server-side --field-manager=one -f -", APP);
    let other = APP.replace("replicas: 2", "replicas: 5");
    let refusal = cluster.refused("apply --server-side --field-manager=two -f -", &other);
    assert!(refusal.contains(".spec.replicas"), "{refusal}");
    cluster.ok("apply --server-side --field-manager=two --force-conflicts -f -", &other);
    assert!(cluster.ok("get deployment web -o jsonpath={.spec.replicas}", "").contains('5'));
}

const CRD: &str = "
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: walls.example.com}
spec:
  group: example.com
  scope: Namespaced
  names: {plural: walls, singular: wall, kind: Wall, shortNames: [wl]}
  versions:
  - name: v1
    served: true
    storage: true
    additionalPrinterColumns: [{name: Height, type: integer, jsonPath: .spec.height}]
    schema:
      openAPIV3Schema:
        type: object
        properties:
          spec:
            type: object
            required: [height]
            properties:
              height: {type: integer, minimum: 1}
              width: {type: integer, default: 3}
            x-kubernetes-validations:
            - {rule: 'self.height <= self.width', message: too high}
";

#[tokio::test(flavor = "multi_thread")]
async fn custom_resources_are_validated_defaulted_and_shown() {
    let cluster = start("crd");
    if cluster.kubectl.is_none() {
        eprintln!("SKIPPED: no kubectl in PALISADE_KUBECTL, .tools/bin or PATH");
        return;
    }
    default_namespace(&cluster);
    cluster.ok("apply -f -", CRD);
    cluster.ok("wait --for=condition=Established crd/walls.example.com --timeout=10s", "");
    let wall = |height: &str| {
        format!(
            "apiVersion: example.com/v1\nkind: Wall\nmetadata: {{name: a}}\nspec: {{height: {height}}}\n"
        )
    };
    assert!(cluster.refused("apply -f -", &wall("0")).contains("greater than or equal to 1"));
    assert!(cluster.refused("apply -f -", &wall("9")).contains("too high"));
    cluster.ok("apply -f -", &wall("2"));
    let table = cluster.ok("get wl", "");
    assert!(table.contains("HEIGHT"), "{table}");
    assert!(cluster.ok("get wall a -o jsonpath={.spec.width}", "").contains('3'));
    cluster.ok("delete crd walls.example.com", "");
}

/// Commands in their order, and what each prints.
const VERBS: &[(&str, &str)] = &[
    // Bodies in protobuf.
    ("create namespace galaxy", "namespace/galaxy created"),
    ("create deployment web --image=example.com/web --replicas=2 --port=80", "web created"),
    (
        "get deployment web -o jsonpath={.spec.replicas}/{.spec.template.spec.containers[0].ports[0].containerPort}",
        "2/80",
    ),
    ("create configmap settings --from-literal=colour=blue", "settings created"),
    ("get configmap settings -o jsonpath={.data.colour}", "blue"),
    ("create secret generic key --from-literal=key=value", "key created"),
    ("get secret key -o jsonpath={.data.key}", "dmFsdWU="),
    ("create serviceaccount robot", "robot created"),
    ("create service clusterip web --tcp=80:8080 --tcp=443:8443", "web created"),
    ("get service web -o jsonpath={.spec.ports[1].targetPort}", "8443"),
    ("create role reader --verb=get,list --resource=pods", "reader created"),
    ("create rolebinding readers --role=reader --serviceaccount=default:robot", "readers created"),
    ("create clusterrole watcher --verb=watch --resource=nodes", "watcher created"),
    ("create clusterrolebinding watchers --clusterrole=watcher --user=me", "watchers created"),
    ("get rolebinding readers -o jsonpath={.subjects[0].name}", "robot"),
    ("create token robot --duration=1h", ""),
    ("auth whoami", "kubernetes-admin"),
    // The others.
    ("run client --image=example.com/client --labels=app=client", "pod/client created"),
    ("expose deployment web --name=exposed --port=80", "exposed exposed"),
    ("get pods,services -o wide", "service/exposed"),
    ("get pod client -o yaml", "restartPolicy: Always"),
    ("get pod client -o json", "\"restartPolicy\": \"Always\""),
    ("get pods -o name", "pod/client"),
    ("get pods --field-selector metadata.name=client --no-headers", "client"),
    ("get deployments --all-namespaces", "default"),
    ("describe deployment web", "example.com/web"),
    ("label pod client tier=front", "pod/client labeled"),
    ("get pods -l tier=front,app!=web -o name", "pod/client"),
    ("label pod client tier-", "pod/client unlabeled"),
    ("annotate pod client note=hello", "pod/client annotated"),
    ("scale deployment web --replicas=3", "web scaled"),
    ("set image deployment/web web=example.com/web:2", "image updated"),
    ("patch deployment web -p {\"spec\":{\"replicas\":1}}", "web patched"),
    ("patch deployment web --type=merge -p {\"spec\":{\"replicas\":4}}", "web patched"),
    (
        "patch deployment web --type=json -p [{\"op\":\"replace\",\"path\":\"/spec/replicas\",\"value\":5}]",
        "web patched",
    ),
    ("get deployment web -o jsonpath={.spec.replicas}", "5"),
    ("wait --for=jsonpath={.spec.replicas}=5 deployment/web --timeout=5s", "condition met"),
    ("explain networkpolicy.spec.ingress.from", "namespaceSelector"),
    ("api-resources --api-group=networking.k8s.io", "netpol"),
    ("api-versions", "networking.k8s.io/v1"),
    ("cluster-info", "control plane"),
    ("version", "Server Version"),
    ("delete configmap settings", "\"settings\" deleted"),
    ("delete service --all", "\"exposed\" deleted"),
    ("delete pods -l app=client --grace-period=0 --force", "deleted"),
    ("wait --for=delete pod/client --timeout=5s", ""),
    ("delete deployment web", "deleted"),
];

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_verbs() {
    let cluster = start("verbs");
    if cluster.kubectl.is_none() {
        eprintln!("SKIPPED: no kubectl in PALISADE_KUBECTL, .tools/bin or PATH");
        return;
    }
    cluster.ok("create namespace default", "");
    for (command, says) in VERBS {
        let said = cluster.ok(command, "");
        assert!(said.contains(says), "kubectl {command}: {said}");
    }
}
