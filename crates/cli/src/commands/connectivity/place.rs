//! A namespace with two clients and two servers, one of these on another node where there is one.

use std::{net::IpAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, DynamicObject, ListParams},
    runtime::{
        conditions::{is_deleted, is_pod_running},
        wait::await_condition,
    },
};
use serde_json::{Value, json};

use super::probe::{From, Kind, Probe, To};
use crate::{cluster, commands::install::apply};

/// Pods must run after so long; images may have to be pulled.
const START: Duration = Duration::from_secs(180);
/// A policy must be judged after so long.
const JUDGED: Duration = Duration::from_secs(15);
const SERVERS: [&str; 2] = ["echo-same-node", "echo-other-node"];

/// The namespace and what is in it.
#[derive(Clone)]
pub(super) struct Place(Arc<Inner>);

struct Inner {
    client: Client,
    namespace: String,
    targets: Vec<To>,
}

impl Place {
    /// Starts clients and servers and waits until they run.
    pub(super) async fn start(client: Client, namespace: String, image: &str) -> Result<Self> {
        let nodes = nodes(&client).await?;
        let first = nodes.first().context("the cluster has no node that pods can be put on")?;
        let second = nodes.get(1).unwrap_or(first);
        for object in objects(&namespace, image, first, second) {
            apply::quietly(&client, &object).await?;
        }
        let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
        let mut targets = Vec::new();
        for name in ["client1", "client2"].into_iter().chain(SERVERS) {
            let running = await_condition(pods.clone(), name, is_ready);
            let pod = tokio::time::timeout(START, running)
                .await
                .with_context(|| format!("pod {namespace}/{name} is not ready in time"))??;
            let addresses = pod.iter().flat_map(|it| &it.status).flat_map(|it| it.pod_ips.iter());
            let addresses = addresses.flatten().filter_map(|it| it.ip.parse().ok());
            if let Some(name) = SERVERS.into_iter().find(|server| *server == name) {
                targets.extend(addresses.map(|address| To::Pod(name, address)));
            }
        }
        let service: Api<Service> = Api::namespaced(client.clone(), &namespace);
        let service = service.get("echo").await?;
        let addresses = service.spec.and_then(|spec| spec.cluster_ips).unwrap_or_default();
        let addresses = addresses.iter().filter_map(|address| address.parse::<IpAddr>().ok());
        targets.extend(addresses.map(To::Service));
        targets.push(To::Name);
        Ok(Self(Arc::new(Inner { client, namespace, targets })))
    }

    pub(super) fn namespace(&self) -> &str {
        &self.0.namespace
    }

    /// Every question of a kind.
    pub(super) fn probes(&self, kind: Kind) -> Vec<Probe> {
        let mut probes = Vec::new();
        for from in [From::Client1, From::Client2] {
            for to in &self.0.targets {
                for &port in kind.ports() {
                    probes.push(Probe { from, to: to.clone(), port });
                }
            }
        }
        probes
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
        let text = policies.replace("NAMESPACE", self.namespace());
        let mut policies: Vec<Value> = serde_saphyr::from_multiple(&text)?;
        for policy in &mut policies {
            if policy["kind"] != "CiliumClusterwideNetworkPolicy" {
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
        cluster::exec(&pods, pod, None, command).await
    }

    /// Deletes the namespace and waits until it is gone.
    pub(super) async fn remove(&self) -> Result<()> {
        let api: Api<Namespace> = Api::all(self.0.client.clone());
        let Some(namespace) = api.get_opt(self.namespace()).await? else { return Ok(()) };
        api.delete(self.namespace(), &DeleteParams::default()).await?;
        let uid = namespace.metadata.uid.unwrap_or_default();
        let gone = await_condition(api, self.namespace(), is_deleted(&uid));
        tokio::time::timeout(START, gone)
            .await
            .with_context(|| format!("the namespace {} does not go", self.namespace()))??;
        Ok(())
    }
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
    let nodes = Api::<Node>::all(client.clone()).list(&ListParams::default()).await?;
    let takes_pods = |node: &Node| {
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

fn objects(namespace: &str, image: &str, first: &str, second: &str) -> Vec<Value> {
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
    let servers = json!([
        {
            "name": "http",
            "image": image,
            "args": ["netexec", "--http-port=8080", "--udp-port=8081"],
            "ports": [
                { "name": "http", "containerPort": 8080, "protocol": "TCP" },
                { "name": "udp", "containerPort": 8081, "protocol": "UDP" },
            ],
        },
        {
            "name": "other",
            "image": image,
            "args": ["netexec", "--http-port=8082", "--udp-port=8083"],
            "ports": [{ "name": "other", "containerPort": 8082, "protocol": "TCP" }],
        },
    ]);
    let account = |name: &str| {
        json!({
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": { "name": name, "namespace": namespace },
        })
    };
    vec![
        json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": namespace } }),
        account("client1"),
        account("client2"),
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": "echo", "namespace": namespace },
            "spec": {
                "ipFamilyPolicy": "PreferDualStack",
                "selector": { "kind": "echo" },
                "ports": [
                    { "name": "http", "port": 8080, "protocol": "TCP" },
                    { "name": "udp", "port": 8081, "protocol": "UDP" },
                    { "name": "other", "port": 8082, "protocol": "TCP" },
                ],
            },
        }),
        pod("client1", first, json!({ "kind": "client" }), "client1", client.clone()),
        pod("client2", first, json!({ "kind": "client", "other": "client" }), "client2", client),
        pod(SERVERS[0], first, json!({ "kind": "echo" }), "default", servers.clone()),
        pod(SERVERS[1], second, json!({ "kind": "echo" }), "default", servers),
    ]
}
