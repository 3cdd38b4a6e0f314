//! What is told of policies while the proxy takes its time, through the real engine.

use palisade_api::{convert::convert, routing::Routing};
use palisade_datapath::fake::FakeKernel;
use palisade_policy::model::PolicyKind;
use serde_json::{Value, json};

use super::*;
use crate::{
    engine::{Engine, Outputs, Progress},
    publish::Publication,
    reconcile::Reconciler,
    resolve::{Resolver, Scope},
    tables::{
        Change, Intent, ObjectName, POLICY_KINDS, TablesWriter,
        nodes::{NodeSource, Surroundings},
        pods::Endpoint,
        policies::{Finding, PolicyContent, PolicyObject},
        secrets::Secret,
    },
};

struct Bench {
    engine: Engine,
    link: Arc<ProxyLink>,
    progress: watch::Receiver<Progress>,
    published: mpsc::UnboundedReceiver<Publication>,
}

impl Bench {
    /// One endpoint, which has no identity yet.
    fn new() -> Self {
        let reconciler = Reconciler::new(Arc::new(FakeKernel::default())).unwrap();
        let scope =
            Scope { node: "node1".into(), cluster: "default".into(), routing: Routing::Native };
        let (sender, progress) = watch::channel(Progress::default());
        let (publications, published) = mpsc::unbounded_channel();
        let link = Arc::new(ProxyLink::default());
        let outputs = Outputs {
            progress: sender,
            surroundings: watch::channel(Surroundings::default()).0,
            publications,
            proxy: link.clone(),
            rounds: Arc::default(),
        };
        let resolver = Resolver::new(scope, []);
        let mut tables = TablesWriter::default();
        tables.write().secrets_namespace = "elsewhere".into();
        let mut engine = Engine::new(tables, resolver, reconciler, outputs);
        let endpoint = Endpoint {
            id: 2,
            pod: ObjectName::new("default", "web"),
            uid: "web".into(),
            container_id: "web".into(),
            interface: "lxc2".into(),
            ifindex: 12,
            mac: [2; 6],
            host_mac: [4; 6],
            ipv4: Some([10, 0, 1, 11].into()),
            ipv6: None,
        };
        let mut inputs = vec![
            Intent::Namespace(Change::Replace(Vec::new())),
            Intent::Pod(Change::Replace(Vec::new())),
            Intent::Service(Change::Replace(Vec::new())),
            Intent::Slice(Change::Replace(Vec::new())),
            Intent::Node(NodeSource::Node, Change::Replace(Vec::new())),
            Intent::Node(NodeSource::CiliumNode, Change::Replace(Vec::new())),
            Intent::Identity(Change::Replace(Vec::new())),
            Intent::Endpoint(Change::Replace(vec![endpoint])),
            Intent::Names(Change::Replace(Vec::new())),
        ];
        inputs.extend(POLICY_KINDS.map(|kind| Intent::Policy(kind, Change::Replace(Vec::new()))));
        assert!(engine.round(inputs));
        Self { engine, link, progress, published }
    }

    fn apply(&mut self, name: &str, path: Option<&str>) -> PolicyRef {
        self.apply_http(name, path.map(|path| json!([{ "path": path }])))
    }

    fn apply_http(&mut self, name: &str, http: Option<Value>) -> PolicyRef {
        let kind = PolicyKind::CiliumClusterwideNetworkPolicy;
        let id = PolicyRef { kind, namespace: None, name: name.into() };
        let mut ports = json!({ "ports": [{ "port": "80", "protocol": "TCP" }] });
        if let Some(http) = http {
            ports["rules"] = json!({ "http": http });
        }
        let spec = json!({ "endpointSelector": {}, "ingress": [{ "toPorts": [ports] }] });
        let object = json!({ "metadata": { "name": name }, "spec": spec });
        let content = PolicyContent::Accepted(convert(kind, &object, "default").unwrap().into());
        let uid = name.into();
        let object = PolicyObject { id: id.clone(), uid, generation: 1, content, reported: None };
        self.round(vec![Intent::Policy(kind, Change::Put(object))]);
        id
    }

    fn round(&mut self, intents: Vec<Intent>) {
        assert!(self.engine.round(intents));
    }

    /// The proxy takes over whatever there is; the agent looks again where it was late.
    fn acknowledge(&mut self, connection: u64) {
        let version = guard(&self.link.book).rules().version;
        if self.link.note(connection, version) {
            self.round(Vec::new());
        }
    }

    fn awaiting(&self) -> Vec<String> {
        let progress = self.progress.borrow();
        progress.awaiting_proxy.iter().map(|id| id.name.clone()).collect()
    }

    /// The policies of which it was said since the last call that they are accepted.
    fn accepted(&mut self) -> Vec<String> {
        let mut told = Vec::new();
        while let Ok(publication) = self.published.try_recv() {
            if let Publication::Condition(policy, condition) = publication {
                assert_eq!(condition.finding, Finding::Accepted);
                told.push(policy.id.name.clone());
            }
        }
        told
    }
}

#[test]
fn a_policy_is_accepted_when_the_proxy_has_it() {
    let mut bench = Bench::new();
    bench.apply("plain", None);
    assert_eq!(bench.accepted(), ["plain"]);

    // No proxy is there.
    bench.apply("first", Some("/a"));
    assert_eq!((bench.accepted(), bench.awaiting()), (vec![], vec!["first".to_owned()]));
    let connection = bench.link.connected();
    bench.acknowledge(connection);
    assert_eq!((bench.accepted(), bench.awaiting()), (vec!["first".to_owned()], vec![]));

    // One hangs. What it needs is told of at once, and of the others that they wait.
    bench.apply("second", Some("/b"));
    assert_eq!(bench.accepted(), [""; 0]);
    assert!(bench.awaiting().contains(&"second".to_owned()));
    bench.apply("other", None);
    assert_eq!(bench.accepted(), ["other"]);
    bench.acknowledge(connection);
    assert_eq!((bench.accepted(), bench.awaiting()), (vec!["second".to_owned()], vec![]));
}

#[test]
fn what_is_gone_before_the_proxy_has_it_is_not_told_of() {
    let mut bench = Bench::new();
    let id = bench.apply("gone", Some("/a"));
    bench.apply("stays", Some("/b"));
    bench.round(vec![Intent::Policy(id.kind, Change::Delete(id))]);
    assert_eq!(bench.awaiting(), ["stays"]);
    let connection = bench.link.connected();
    bench.acknowledge(connection);
    assert_eq!(bench.accepted(), ["stays"]);
}

#[test]
fn a_secret_that_is_gone_closes_and_one_that_cannot_be_read_stands() {
    let mut bench = Bench::new();
    bench.apply("other", Some("/a"));
    let name = ObjectName::new("elsewhere", "default.token");
    let data = [("value".to_owned(), b"right".to_vec())].into();
    let secret = Secret { name: name.clone(), data };
    bench.round(vec![Intent::Secret(Change::Replace(vec![secret]))]);
    let problems = |bench: &Bench| bench.progress.borrow().problems.join("; ");
    let known = |bench: &Bench| {
        let secrets: Vec<(_, String)> = guard(&bench.link.book).rules().secrets.clone().into();
        secrets.into_iter().any(|(_, value)| value == "right")
    };

    let failed = || vec![Intent::Secret(Change::Failed("secrets is forbidden".into()))];
    bench.round(failed());
    assert!(known(&bench) && !problems(&bench).contains("forbidden"), "nobody needs it");
    let header = json!({ "name": "x", "secret": { "name": "token", "namespace": "default" } });
    bench.apply_http("needs", Some(json!([{ "headerMatches": [header] }])));
    let problem = problems(&bench);
    let user = "CiliumClusterwideNetworkPolicy needs";
    for word in ["forbidden", "`headerMatches`", "elsewhere", "read last", user] {
        assert!(problem.contains(word), "{word}: {problem}");
    }
    assert!(known(&bench), "what was read last stands");
    bench.round(vec![Intent::Secret(Change::Recovered)]);
    assert!(known(&bench) && !problems(&bench).contains("forbidden"));
    bench.round(vec![Intent::Secret(Change::Delete(name))]);
    assert!(!known(&bench), "nobody gets in with what was taken away");
}
