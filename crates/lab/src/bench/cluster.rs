//! The lab that is measured, and its pods.

use std::{
    net::IpAddr,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::{core::v1::Pod, networking::v1::NetworkPolicy};
use kube::{
    Api, Client, Config,
    api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
    runtime::wait::{await_condition, conditions},
};
use palisade_api::admin::{self, Request, Response, Status};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{
    dns, l7,
    paths::{Path, Port},
};
use crate::{
    layout::{Layout, NodePlan},
    nodes::{Program, process},
    sys::mounts,
};

/// Until a pod runs or an agent has something in force.
const SOON: Duration = Duration::from_secs(30);

/// A lab of one node that ends with this value.
pub(super) struct Cluster {
    pub(super) client: Client,
    pub(super) layout: Layout,
    pub(super) node: NodePlan,
}

/// The pods that talk: `client` to `server`.
pub(super) struct Pods {
    pub(super) client: Place,
    pub(super) server: Place,
}

/// A pod's network.
pub(super) struct Place {
    pub(super) netns: PathBuf,
    address: IpAddr,
}

impl Pods {
    pub(super) fn path(&self) -> Path {
        Path {
            client: self.client.netns.clone(),
            server: self.server.netns.clone(),
            address: self.server.address,
        }
    }
}

impl Cluster {
    pub(super) async fn up() -> Result<Self> {
        let up = tokio::task::spawn_blocking(|| lab("up")).await?;
        // Not before it is up: a lab that somebody else has up must stay so.
        up?;
        let layout = Layout::default();
        let guard = Down;
        let kubeconfig = Kubeconfig::read_from(layout.kubeconfig())?;
        let options = KubeConfigOptions::default();
        let config = Config::from_custom_kubeconfig(kubeconfig, &options).await?;
        let client = Client::try_from(config)?;
        std::mem::forget(guard);
        Ok(Self { client, layout, node: NodePlan::new(1) })
    }

    fn pods(&self) -> Api<Pod> {
        Api::default_namespaced(self.client.clone())
    }

    fn policies(&self) -> Api<NetworkPolicy> {
        Api::default_namespaced(self.client.clone())
    }

    /// Three pods that do nothing of their own.
    pub(super) async fn start_pods(&self) -> Result<Pods> {
        for name in ["client", "server", "bystander"] {
            self.create_pod(name, name, "default-scheduler").await?;
        }
        for name in ["client", "server", "bystander"] {
            let running = await_condition(self.pods(), name, conditions::is_pod_running());
            tokio::time::timeout(SOON, running).await.with_context(|| format!("pod {name}"))??;
        }
        Ok(Pods { client: self.place("client").await?, server: self.place("server").await? })
    }

    /// A pod of an application; with a scheduler that does not exist it stays an object.
    pub(super) async fn create_pod(&self, name: &str, app: &str, scheduler: &str) -> Result<Pod> {
        let pod = object(json!({
            "metadata": {"name": name, "labels": {"app": app}},
            "spec": {
                "schedulerName": scheduler,
                "containers": [{"name": "pause", "image": "registry.k8s.io/pause"}],
            },
        }))?;
        Ok(self.pods().create(&PostParams::default(), &pod).await?)
    }

    /// Where a pod is.
    pub(super) async fn place(&self, name: &str) -> Result<Place> {
        let pod = self.pods().get(name).await?;
        let status = pod.status.unwrap_or_default();
        let address = status.pod_ip.context("a pod without an address")?.parse()?;
        let uid = pod.metadata.uid.context("a pod without a uid")?;
        let groups = mounts::cgroup2_root()?.context("no cgroup v2 hierarchy")?;
        let group = groups.join("palisade").join(&self.node.name).join(format!("pod-{uid}/pause"));
        let processes = std::fs::read_to_string(group.join("cgroup.procs"))?;
        let process = processes.lines().next().context("a pod without processes")?;
        Ok(Place { netns: format!("/proc/{process}/ns/net").into(), address })
    }

    /// Both ends get a policy that allows this one conversation.
    pub(super) async fn restrict(&self, pods: &Pods) -> Result<()> {
        let ports: Vec<Value> = Port::ALL.iter().map(|port| port.in_policy()).collect();
        self.apply_policy("egress", json!({
            "podSelector": {"matchLabels": {"app": "client"}},
            "policyTypes": ["Egress"],
            "egress": [{"to": [{"podSelector": {"matchLabels": {"app": "server"}}}], "ports": ports}],
        }))
        .await?;
        self.apply_policy("ingress", json!({
            "podSelector": {"matchLabels": {"app": "server"}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "client"}}}], "ports": ports}],
        }))
        .await?;
        self.await_status("the policies are in force", |now| now.ready && now.policies == 2)
            .await?;
        ensure!(pods.path().refuses_others()?, "the policies of the bench are not in force");
        Ok(())
    }

    /// A rule on HTTP for one port of the server, and none for another.
    pub(super) async fn rule_http(&self) -> Result<()> {
        let port = |number: u16| json!([{"port": number.to_string(), "protocol": "TCP"}]);
        let rule = json!({"method": "GET", "path": "/public(/.*)?"});
        let ruled = json!({"ports": port(l7::RULED), "rules": {"http": [rule]}});
        self.rule(
            "http",
            json!([
                {"endpointSelector": select("server"), "ingress": [{
                    "fromEndpoints": [select("client")],
                    "toPorts": [ruled, {"ports": port(l7::PLAIN)}],
                }]},
                {"endpointSelector": select("client"), "egress": [{
                    "toEndpoints": [select("server")],
                    "toPorts": [{"ports": port(l7::RULED)}, {"ports": port(l7::PLAIN)}],
                }]},
            ]),
        )
        .await
    }

    /// A rule on DNS for both who ask the server.
    pub(super) async fn rule_dns(&self) -> Result<()> {
        let ports = json!([{"port": dns::PORT.to_string(), "protocol": "UDP"}]);
        let asks = |app: &str| {
            let rules = json!({"dns": [{"matchPattern": "*.bench.test"}]});
            json!({"endpointSelector": select(app), "egress": [{
                "toEndpoints": [select("server")],
                "toPorts": [{"ports": ports, "rules": rules}],
            }]})
        };
        let answers = json!({"endpointSelector": select("server"), "ingress": [{
            "fromEndpoints": [select("client"), select("bystander")],
            "toPorts": [{"ports": ports}],
        }]});
        self.rule("dns", json!([asks("client"), asks("bystander"), answers])).await
    }

    /// Puts one more policy in force.
    async fn rule(&self, name: &str, specs: Value) -> Result<()> {
        let before = self.status().context("the agent does not answer")?.policies;
        let policy: DynamicObject = object(json!({
            "apiVersion": "cilium.io/v2",
            "kind": "CiliumNetworkPolicy",
            "metadata": {"name": name},
            "specs": specs,
        }))?;
        let kind = GroupVersionKind::gvk("cilium.io", "v2", "CiliumNetworkPolicy");
        let resource = ApiResource::from_gvk_with_plural(&kind, "ciliumnetworkpolicies");
        let api: Api<DynamicObject> = Api::default_namespaced_with(self.client.clone(), &resource);
        api.create(&PostParams::default(), &policy).await?;
        self.await_status("a rule is in force", |now| {
            now.policies == before + 1 && now.problems.is_empty()
        })
        .await?;
        Ok(())
    }

    /// The process of the node's L7 proxy.
    pub(super) fn proxy(&self) -> Option<u32> {
        let pid = process(&self.layout, &self.node, Program::Proxy)?;
        pid.as_raw_nonzero().get().try_into().ok()
    }

    pub(super) async fn apply_policy(&self, name: &str, spec: Value) -> Result<()> {
        let policy = object(json!({"metadata": {"name": name}, "spec": spec}))?;
        self.policies().create(&PostParams::default(), &policy).await?;
        Ok(())
    }

    pub(super) async fn delete_policy(&self, name: &str) -> Result<()> {
        self.policies().delete(name, &DeleteParams::default()).await?;
        Ok(())
    }

    /// What the agent says, if it answers.
    pub(super) fn status(&self) -> Option<Status> {
        let mut client = admin::Client::connect(&self.layout.admin_socket(&self.node)).ok()?;
        client.set_timeout(Some(Duration::from_secs(1))).ok()?;
        match client.request(&Request::Status) {
            Ok(Response::Status(status)) => Some(*status),
            _ => None,
        }
    }

    /// Asks each millisecond until the answer is yes.
    pub(super) async fn await_status(
        &self,
        what: &str,
        holds: impl Fn(&Status) -> bool,
    ) -> Result<Status> {
        let asked = async {
            loop {
                if let Some(status) = self.status()
                    && holds(&status)
                {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(SOON, asked).await.with_context(|| format!("not soon: {what}"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(Down);
    }
}

/// Takes the lab down.
struct Down;

impl Drop for Down {
    fn drop(&mut self) {
        if let Err(error) = lab("down") {
            eprintln!("bench: {error:#}");
        }
    }
}

fn lab(verb: &str) -> Result<()> {
    let output = Command::new(std::env::current_exe()?)
        .arg(verb)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    bail!("palisade lab {verb}: {}", String::from_utf8_lossy(&output.stderr).trim())
}

fn select(app: &str) -> Value {
    json!({"matchLabels": {"app": app}})
}

pub(super) fn object<T: DeserializeOwned>(json: Value) -> Result<T> {
    Ok(serde_json::from_value(json)?)
}
