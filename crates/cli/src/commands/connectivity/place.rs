//! A namespace with two clients and two servers, one of these on another node where there is one.

use std::{net::IpAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use clap::Args;
use k8s_openapi::api::core::v1::{self, Event, Namespace, Pod, Service};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, DynamicObject, ListParams},
    runtime::{
        conditions::{is_deleted, is_pod_running},
        wait::await_condition,
    },
};
use serde_json::{Value, json};

use super::{
    probe::{From, HTTP, Name, Node, OTHER, Probe, To, UDP, What},
    suite::Kind,
};
use crate::{cluster, commands::install::apply, exit::Failure};

/// Label of the namespaces that may be deleted, and, with the namespace's name, of policies that are
/// in none.
const OURS: &str = "palisade.io/connectivity-test";
const CLUSTERWIDE: &str = "CiliumClusterwideNetworkPolicy";
/// Pods must run after so long; images may have to be pulled.
const START: Duration = Duration::from_secs(180);
/// A policy must be judged after so long.
const JUDGED: Duration = Duration::from_secs(15);
/// Servers on a node's own network have two ports each from here on, other ones in each place.
const NODE_PORTS: u16 = 18080;

/// Whom to ask outside the cluster.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct Outside {
    /// Name of somebody outside the cluster who accepts TCP connections; without one, nobody is
    /// asked for by name there.
    #[arg(long = "external-target", value_name = "NAME")]
    name: Option<String>,
    /// Addresses outside the cluster that accept TCP connections; without them, none is asked.
    #[arg(long = "external-ip", value_name = "ADDRESS", value_delimiter = ',')]
    addresses: Vec<IpAddr>,
    /// Port of these.
    #[arg(long = "external-port", value_name = "PORT", default_value_t = 443)]
    port: u16,
}

/// The namespace and what is in it.
#[derive(Clone)]
pub(super) struct Place(Arc<Inner>);

struct Inner {
    client: Client,
    namespace: String,
    /// Of the servers on nodes' own networks.
    node_port: u16,
    outside: Outside,
    /// Addresses outside, of families that pods have none of.
    out_of_reach: Vec<IpAddr>,
    /// Servers and their Service.
    cluster: Vec<To>,
    /// Nodes, by their addresses.
    nodes: Vec<To>,
}

/// What a place is made from.
#[derive(Clone)]
pub(super) struct Plan {
    /// Beginning of the namespace's name.
    pub(super) name: String,
    pub(super) image: String,
    pub(super) outside: Outside,
}

impl Place {
    /// Starts clients and servers and waits until they run. Places have different numbers.
    pub(super) async fn start(client: Client, plan: Plan, number: u16) -> Result<Self> {
        let namespace = namespace(&plan.name, number);
        let node_port = NODE_PORTS + 2 * number;
        let names = nodes(&client).await?;
        let first = names.first().context("the cluster has no node that pods can be put on")?;
        let second = names.get(1);
        clear(&client, &namespace).await?;
        for object in objects(&namespace, &plan.image, node_port, first, second) {
            apply::quietly(&client, &object).await?;
        }
        let mut place = Inner {
            client,
            namespace,
            node_port,
            outside: plan.outside,
            out_of_reach: Vec::new(),
            cluster: Vec::new(),
            nodes: Vec::new(),
        };
        for client in [From::Client1, From::Client2] {
            let own = place.ready(client.pod()).await?;
            // Who has no address of a family reaches nobody there.
            let has = |it: &IpAddr| own.iter().any(|own| own.is_ipv4() == it.is_ipv4());
            let (asked, others) = place.outside.addresses.into_iter().partition(has);
            place.outside.addresses = asked;
            place.out_of_reach.extend::<Vec<_>>(others);
        }
        for node in [Node::Own, Node::Other] {
            let addresses = place.ready(node.server()).await?;
            place.cluster.extend(addresses.into_iter().map(|it| To::Pod(node, it)));
            // Where there is no other node, its server is on the only one.
            if node == Node::Own || second.is_some() {
                let addresses = place.ready(node.pod()).await?;
                place.nodes.extend(addresses.into_iter().map(|it| To::Node(node, it)));
            }
        }
        let service: Api<Service> = Api::namespaced(place.client.clone(), &place.namespace);
        let service = service.get("echo").await?;
        let addresses = service.spec.and_then(|spec| spec.cluster_ips).unwrap_or_default();
        let addresses = addresses.iter().filter_map(|address| address.parse::<IpAddr>().ok());
        place.cluster.extend(addresses.map(To::Service));
        place.cluster.push(To::Name(Name::Echo));
        Ok(Self(Arc::new(place)))
    }

    pub(super) fn namespace(&self) -> &str {
        &self.0.namespace
    }

    /// What a name is. The dot at the end keeps resolvers from asking for longer names first.
    pub(super) fn name(&self, name: Name) -> String {
        match name {
            Name::Echo => format!("echo.{}.svc.cluster.local.", self.namespace()),
            Name::Kubernetes => "kubernetes.default.svc.cluster.local.".to_owned(),
            Name::Outside => format!("{}.", self.0.outside.plain_name().unwrap_or_default()),
        }
    }

    /// Every question of these kinds.
    pub(super) fn probes(&self, kinds: &[Kind]) -> Vec<Probe> {
        kinds.iter().flat_map(|kind| self.questions(*kind)).collect()
    }

    fn questions(&self, kind: Kind) -> Vec<Probe> {
        let Inner { cluster, nodes, node_port, outside, .. } = &*self.0;
        let clients = || vec![From::Client1, From::Client2];
        let pods = || cluster.iter().copied().filter(|to| matches!(to, To::Pod(..)));
        let named = |name| vec![To::Name(name)];
        let (from, to, what) = match kind {
            Kind::Connect => (clients(), cluster.clone(), vec![HTTP, OTHER, UDP]),
            Kind::Http => {
                (clients(), cluster.clone(), vec![What::Get("/hostname"), What::Get("/clientip")])
            }
            Kind::Ping => {
                (clients(), pods().chain(nodes.iter().copied()).collect(), vec![What::Ping])
            }
            Kind::Lookup => {
                let names = [Name::Echo, Name::Kubernetes].map(To::Name).to_vec();
                (clients(), names, vec![What::Lookup])
            }
            Kind::Node => (clients(), nodes.clone(), vec![What::Tcp(*node_port)]),
            Kind::FromNode => {
                let hosts = self.hosts();
                let on = |to: &To| {
                    hosts.iter().any(
                        |host| matches!((host, to), (From::Node(it), To::Pod(on, _)) if it == on),
                    )
                };
                let to = pods().filter(on).collect();
                (hosts, to, vec![HTTP, UDP])
            }
            Kind::World => {
                let addresses = outside.addresses.iter().copied().map(To::Outside);
                (clients(), addresses.collect(), vec![What::Tcp(outside.port)])
            }
            Kind::WorldByName => {
                let to = outside.name.as_ref().map_or_else(Vec::new, |_| named(Name::Outside));
                (clients(), to, vec![What::Tcp(outside.port)])
            }
        };
        let mut probes = Vec::new();
        for from in from {
            for &to in &to {
                probes.extend(what.iter().map(|&what| Probe { from, to, what }));
            }
        }
        probes
    }

    /// Why there may be no question of a kind.
    pub(super) fn absence(&self, kind: Kind) -> String {
        let why = match kind {
            Kind::World if !self.0.out_of_reach.is_empty() => {
                let addresses: Vec<String> =
                    self.0.out_of_reach.iter().map(ToString::to_string).collect();
                return format!("pods have no address of the family of {}", addresses.join(", "));
            }
            Kind::World => "no address outside the cluster is given with --external-ip",
            Kind::WorldByName => "no name outside the cluster is given with --external-target",
            _ => "there is nobody to ask",
        };
        why.to_owned()
    }

    /// Addresses outside that nobody asks, as pods have none of their family.
    pub(super) fn out_of_reach(&self) -> &[IpAddr] {
        &self.0.out_of_reach
    }

    /// The nodes, as askers.
    fn hosts(&self) -> Vec<From> {
        let among = |node: &Node| {
            self.0.nodes.iter().any(|to| matches!(to, To::Node(which, _) if which == node))
        };
        [Node::Own, Node::Other].into_iter().filter(among).map(From::Node).collect()
    }

    /// Applies policies; why one is refused, if one is.
    pub(super) async fn apply(&self, policies: &str) -> Result<Option<String>> {
        for policy in self.policies(policies)? {
            apply::quietly(&self.0.client, &policy).await?;
            if policy["apiVersion"] != "cilium.io/v2" {
                continue;
            }
            let name = policy["metadata"]["name"].as_str().unwrap_or_default();
            let api = self.api(&policy)?;
            let judged = await_condition(api, name, |it: Option<&DynamicObject>| {
                it.is_some_and(|it| valid(it).is_some())
            });
            let judged = tokio::time::timeout(JUDGED, judged)
                .await
                .with_context(|| format!("no agent says whether policy {name} is valid"))??;
            if let Some((false, why)) = judged.as_ref().and_then(valid) {
                return Ok(Some(why));
            }
        }
        Ok(None)
    }

    /// Deletes policies.
    pub(super) async fn withdraw(&self, policies: &str) -> Result<()> {
        for policy in self.policies(policies)? {
            let name = policy["metadata"]["name"].as_str().unwrap_or_default();
            match self.api(&policy)?.delete(name, &DeleteParams::default()).await {
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                outcome => drop(outcome?),
            }
        }
        Ok(())
    }

    fn policies(&self, policies: &str) -> Result<Vec<Value>> {
        let text = self.0.outside.fill_in(policies).replace("NAMESPACE", self.namespace());
        let mut policies: Vec<Value> = serde_saphyr::from_multiple(&text)?;
        for policy in &mut policies {
            if policy["kind"] == CLUSTERWIDE {
                policy["metadata"]["labels"][OURS] = self.namespace().into();
            } else {
                policy["metadata"]["namespace"] = self.namespace().into();
            }
        }
        Ok(policies)
    }

    fn api(&self, object: &Value) -> Result<Api<DynamicObject>> {
        apply::api_of(&self.0.client, object)
    }

    /// Runs a command in a client; whether it succeeded, and what it said.
    pub(super) async fn exec(&self, pod: &str, command: Vec<String>) -> Result<(bool, String)> {
        let pods: Api<Pod> = Api::namespaced(self.0.client.clone(), self.namespace());
        cluster::exec(&pods, pod, None, command, None).await
    }

    /// Deletes the namespace and waits until it is gone.
    pub(super) async fn remove(&self) -> Result<()> {
        clear(&self.0.client, self.namespace()).await
    }
}

/// The name of a place's namespace.
pub(super) fn namespace(beginning: &str, number: u16) -> String {
    format!("{beginning}-{number}")
}

/// Deletes a namespace of these tests, where there is one, and waits until it is gone: what an
/// interrupted run left in it would make the next one's answers wrong.
pub(super) async fn clear(client: &Client, name: &str) -> Result<()> {
    let kind = json!({ "apiVersion": "cilium.io/v2", "kind": CLUSTERWIDE });
    let policies = ListParams::default().labels(&format!("{OURS}={name}"));
    let policies =
        apply::api_of(client, &kind)?.delete_collection(&DeleteParams::default(), &policies).await;
    if !matches!(&policies, Err(kube::Error::Api(status)) if status.code == 404) {
        policies?;
    }
    let api: Api<Namespace> = Api::all(client.clone());
    let Some(namespace) = api.get_opt(name).await? else { return Ok(()) };
    if !namespace.labels().contains_key(OURS) {
        return Err(Failure::refused(
            format!("there is a namespace {name} already, and not one of these tests"),
            "Let theirs have another name with --test-namespace NAME.",
        )
        .into());
    }
    api.delete(name, &DeleteParams::default()).await?;
    let uid = namespace.uid().unwrap_or_default();
    let gone = await_condition(api, name, is_deleted(&uid));
    tokio::time::timeout(START, gone)
        .await
        .with_context(|| format!("the namespace {name} does not go"))??;
    Ok(())
}

impl Inner {
    /// Waits until a pod is ready; its addresses.
    async fn ready(&self, name: &str) -> Result<Vec<IpAddr>> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let decided = await_condition(pods.clone(), name, |pod: Option<&Pod>| {
            is_ready(pod) || pod.and_then(trouble).is_some_and(|trouble| trouble.lasting)
        });
        let pod = match tokio::time::timeout(START, decided).await {
            Ok(pod) => pod?,
            Err(_) => pods.get_opt(name).await?,
        };
        if !is_ready(pod.as_ref()) {
            let why = match pod.as_ref().and_then(trouble) {
                Some(trouble) => trouble.what,
                None => self.warning(name).await?,
            };
            bail!("pod {}/{name} is not ready: {why}", self.namespace);
        }
        let addresses = pod.iter().flat_map(|it| &it.status).flat_map(|it| it.pod_ips.iter());
        Ok(addresses.flatten().filter_map(|it| it.ip.parse().ok()).collect())
    }

    /// The last that anybody had to say of a pod.
    async fn warning(&self, pod: &str) -> Result<String> {
        let events: Api<Event> = Api::namespaced(self.client.clone(), &self.namespace);
        let about = format!("involvedObject.name={pod},type=Warning");
        let mut events = events.list(&ListParams::default().fields(&about)).await?.items;
        events.sort_by_key(|event| event.last_timestamp.clone());
        let last = events.pop().and_then(|event| event.message);
        Ok(last.unwrap_or_else(|| "nobody says why".to_owned()))
    }
}

impl Outside {
    /// The name, without a dot at the end.
    fn plain_name(&self) -> Option<&str> {
        self.name.as_deref().map(|name| name.trim_end_matches('.'))
    }

    /// Puts what is outside into policies.
    pub(super) fn fill_in(&self, policies: &str) -> String {
        let cidrs = |v4: bool| {
            let family = self.addresses.iter().filter(move |it| it.is_ipv4() == v4);
            family.map(move |it| format!("\"{it}/{}\"", if v4 { 32 } else { 128 }))
        };
        let list = |cidrs: Vec<String>| format!("[{}]", cidrs.join(", "));
        policies
            .replace("WORLD-IPV4-CIDRS", &list(cidrs(true).collect()))
            .replace("WORLD-IPV6-CIDRS", &list(cidrs(false).collect()))
            .replace("WORLD-CIDRS", &list(cidrs(true).chain(cidrs(false)).collect()))
            .replace("WORLD-NAME", self.plain_name().unwrap_or_default())
    }
}

/// Why a pod does not run.
struct Trouble {
    what: String,
    /// Waiting does not help.
    lasting: bool,
}

fn trouble(pod: &Pod) -> Option<Trouble> {
    let status = pod.status.as_ref()?;
    let told = |reason: Option<&String>, message: Option<&String>| {
        let said = [reason, message].into_iter().flatten().map(String::as_str);
        said.collect::<Vec<_>>().join(": ")
    };
    if status.phase.as_deref() == Some("Failed") {
        let what = told(status.reason.as_ref(), status.message.as_ref());
        return Some(Trouble { what, lasting: true });
    }
    let containers = status.container_statuses.iter().flatten();
    let mut waiting = containers.filter_map(|it| it.state.as_ref()?.waiting.as_ref());
    let waiting = waiting.find(|it| it.message.is_some())?;
    let lasting = waiting.reason.as_deref() == Some("CrashLoopBackOff");
    Some(Trouble { what: told(waiting.reason.as_ref(), waiting.message.as_ref()), lasting })
}

fn is_ready(pod: Option<&Pod>) -> bool {
    use kube::runtime::wait::Condition as _;
    let conditions = pod.iter().flat_map(|pod| &pod.status).flat_map(|it| it.conditions.iter());
    let ready = conditions.flatten().any(|it| it.type_ == "Ready" && it.status == "True");
    ready && is_pod_running().matches_object(pod)
}

/// Whether a policy is valid, and what is said of it.
fn valid(policy: &DynamicObject) -> Option<(bool, String)> {
    let conditions = policy.data.pointer("/status/conditions")?.as_array()?;
    let condition = conditions.iter().find(|it| it["type"] == "Valid")?;
    // What is said of an earlier version does not count.
    let observed = condition["observedGeneration"].as_i64();
    if observed.is_some_and(|observed| Some(observed) < policy.metadata.generation) {
        return None;
    }
    let message = condition["message"].as_str().unwrap_or_default().to_owned();
    Some((condition["status"] == "True", message))
}

/// Nodes that take pods, by name.
async fn nodes(client: &Client) -> Result<Vec<String>> {
    let nodes = Api::<v1::Node>::all(client.clone()).list(&ListParams::default()).await?;
    let takes_pods = |node: &v1::Node| {
        let spec = node.spec.as_ref();
        let taints = spec.and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
        spec.is_none_or(|spec| spec.unschedulable != Some(true))
            && taints.iter().all(|taint| taint.effect == "PreferNoSchedule")
    };
    let mut names: Vec<String> =
        nodes.items.iter().filter(|it| takes_pods(it)).map(ResourceExt::name_any).collect();
    names.sort();
    Ok(names)
}

fn objects(
    namespace: &str,
    image: &str,
    node_port: u16,
    first: &str,
    second: Option<&String>,
) -> Vec<Value> {
    let pod = |name: &str, node: &str, labels: Value, account: &str, containers: Value| {
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": name, "namespace": namespace, "labels": labels },
            "spec": {
                "nodeName": node,
                "serviceAccountName": account,
                "terminationGracePeriodSeconds": 1,
                "automountServiceAccountToken": false,
                // A policy that denies DNS is seen soon.
                "dnsConfig": { "options": [
                    { "name": "timeout", "value": "1" },
                    { "name": "attempts", "value": "1" },
                ]},
                "containers": containers,
            },
        })
    };
    let client = json!([{ "name": "client", "image": image, "args": ["pause"] }]);
    let server = |name: &str, port: u16| {
        let (http, udp) = (format!("--http-port={port}"), format!("--udp-port={}", port + 1));
        json!({ "name": name, "image": image, "args": ["netexec", http, udp] })
    };
    let mut servers = [server("http", 8080), server("other", 8082)];
    servers[0]["ports"] = json!([
        { "name": "http", "containerPort": 8080, "protocol": "TCP" },
        { "name": "udp", "containerPort": 8081, "protocol": "UDP" },
    ]);
    servers[1]["ports"] = json!([{ "name": "other", "containerPort": 8082, "protocol": "TCP" }]);
    let host = |which: Node, node: &str| {
        let mut server = server("http", node_port);
        // So that whoever has the port already is named.
        server["ports"] = json!([
            { "containerPort": node_port, "protocol": "TCP" },
            { "containerPort": node_port + 1, "protocol": "UDP" },
        ]);
        let mut pod = pod(which.pod(), node, json!({}), "default", json!([server]));
        pod["spec"]["hostNetwork"] = true.into();
        pod
    };
    let account = |name: &str| {
        json!({
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": { "name": name, "namespace": namespace },
        })
    };
    let echo = || json!({ "kind": "echo" });
    let mut objects = vec![
        json!({
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {
                "name": namespace,
                "labels": {
                    OURS: "",
                    // For the pods on the nodes' network.
                    "pod-security.kubernetes.io/enforce": "privileged",
                },
            },
        }),
        account("client1"),
        account("client2"),
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": "echo", "namespace": namespace },
            "spec": {
                "ipFamilyPolicy": "PreferDualStack",
                "selector": echo(),
                "ports": [
                    { "name": "http", "port": 8080, "protocol": "TCP" },
                    { "name": "udp", "port": 8081, "protocol": "UDP" },
                    { "name": "other", "port": 8082, "protocol": "TCP" },
                ],
            },
        }),
        pod("client1", first, json!({ "kind": "client" }), "client1", client.clone()),
        pod("client2", first, json!({ "kind": "client", "other": "client" }), "client2", client),
        pod(Node::Own.server(), first, echo(), "default", json!(servers)),
        pod(
            Node::Other.server(),
            second.map_or(first, String::as_str),
            echo(),
            "default",
            json!(servers),
        ),
        host(Node::Own, first),
    ];
    objects.extend(second.map(|second| host(Node::Other, second)));
    objects
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_that_will_not_run_is_told_from_one_that_may() {
        let pod =
            |status: Value| serde_json::from_value::<Pod>(json!({ "status": status })).unwrap();
        let waiting = |reason: &str| {
            let waiting = json!({ "reason": reason, "message": "why" });
            pod(json!({ "phase": "Pending", "containerStatuses": [{
                "name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "state": { "waiting": waiting },
            }]}))
        };
        let told = |pod: &Pod| trouble(pod).map(|it| (it.what, it.lasting));
        let taken = pod(json!({ "phase": "Failed", "reason": "NodePorts", "message": "no port" }));
        assert_eq!(told(&taken), Some(("NodePorts: no port".to_owned(), true)));
        assert_eq!(
            told(&waiting("CrashLoopBackOff")),
            Some(("CrashLoopBackOff: why".to_owned(), true))
        );
        assert_eq!(
            told(&waiting("ImagePullBackOff")),
            Some(("ImagePullBackOff: why".to_owned(), false))
        );
        assert_eq!(told(&pod(json!({ "phase": "Running" }))), None);
    }
}
