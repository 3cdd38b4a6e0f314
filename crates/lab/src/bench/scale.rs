//! A cluster of which this node is a small part: objects that nobody runs, posted to the API
//! server as if other nodes had them.

use std::{
    future::Future,
    net::{Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::{
    core::v1::{Namespace, Node, Pod},
    networking::v1::NetworkPolicy,
};
use kube::{
    Api,
    api::{
        ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams,
    },
};
use palisade_api::admin::Status;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::{
    cluster::{Cluster, object},
    control, progress,
    report::{Goal, Report, Row},
};

/// The node that the pods are on. It has no networks: nothing leads there.
const ELSEWHERE: &str = "elsewhere";
/// Requests on their way at the same time.
const AT_ONCE: usize = 16;
/// Pods that come and go, to see what one costs.
const CHURN: usize = 200;

/// How much there is of everything.
#[derive(Clone, Copy)]
struct Size {
    namespaces: usize,
    pods: usize,
    policies: usize,
    identities: usize,
}

const NONE: Size = Size { namespaces: 0, pods: 0, policies: 0, identities: 0 };
const MIDDLE: Size = Size { namespaces: 50, pods: 5_000, policies: 1_000, identities: 500 };
const LARGE: Size = Size { policies: 10_000, identities: 50_000, ..MIDDLE };

/// Fills a cluster, and looks at the agent meanwhile.
pub(super) async fn measure(report: &mut Report) -> Result<()> {
    let cluster = &Cluster::up().await?;
    let pods = cluster.start_pods().await?;
    control::serve(&pods.path())?;
    let filling = Filling { cluster };
    filling.nowhere().await?;

    let mut row = |what: &str, value, unit| {
        report.push(Row::new(format!("5,000 pods, 1,000 policies: {what}"), value, unit));
    };
    let agent = Agent::of(cluster)?;
    let before = control::cpu_time(agent.pid)?;
    let behind = filling.grow(NONE, MIDDLE).await?;
    row("CPU to take them up", agent.since(before)?, "ms");
    row("the last is written, until it is in force", behind, "ms");
    row("agent memory (RSS)", control::resident(agent.pid)?, "MB");
    row("policy written, until denied", control::denied(cluster, &pods).await?, "ms");
    row("CPU for a pod that comes and goes", filling.churn(&agent).await?, "ms");
    row("agent killed, until it is ready again", restart(cluster, MIDDLE).await?, "ms");
    let agent = Agent::of(cluster)?;
    row("agent memory (RSS), started with them", control::resident(agent.pid)?, "MB");

    filling.grow(MIDDLE, LARGE).await?;
    let title = |what: &str| format!("10,000 policies, 50,000 identities: {what}");
    let memory = control::resident(agent.pid)?;
    report.push(Row::new(title("agent memory (RSS)"), memory, "MB").goal(Goal::AtMost(250.0)));
    let denied = control::denied(cluster, &pods).await?;
    report.push(Row::new(title("policy written, until denied"), denied, "ms"));
    let ready = restart(cluster, LARGE).await?;
    report.push(Row::new(title("agent killed, until it is ready again"), ready, "ms"));
    Ok(())
}

/// A process, and what it has used.
struct Agent {
    pid: u32,
}

impl Agent {
    fn of(cluster: &Cluster) -> Result<Self> {
        Ok(Self { pid: cluster.status().context("the agent does not answer")?.pid })
    }

    /// Milliseconds of processor time since then.
    fn since(&self, before: Duration) -> Result<f64> {
        Ok((control::cpu_time(self.pid)? - before).as_secs_f64() * 1e3)
    }
}

/// Kills the agent; milliseconds until the next one knows everything again.
async fn restart(cluster: &Cluster, size: Size) -> Result<f64> {
    let settled = |now: &Status| now.ready && now.uptime_seconds >= 2;
    let old = cluster.await_status("the agent is ready", settled).await?.pid;
    let begun = Instant::now();
    kill_process(Pid::from_raw(i32::try_from(old)?).context("no process number")?, Signal::KILL)?;
    let new = cluster.await_status("the agent is back", |now| now.ready && now.pid != old).await?;
    ensure!(new.policies >= size.policies, "the agent is ready before it knows all policies");
    Ok(millis(begun))
}

fn millis(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e3
}

/// Makes the objects.
struct Filling<'a> {
    cluster: &'a Cluster,
}

impl Filling<'_> {
    async fn nowhere(&self) -> Result<()> {
        let node: Node = object(json!({"metadata": {"name": ELSEWHERE}}))?;
        Api::all(self.cluster.client.clone()).create(&PostParams::default(), &node).await?;
        Ok(())
    }

    /// Adds what there is more in `to`; milliseconds from the last answer until all is in force.
    async fn grow(&self, from: Size, to: Size) -> Result<f64> {
        let before = self.cluster.status().context("the agent does not answer")?;
        let policies = before.policies + to.policies - from.policies;
        let identities = before.identities + to.identities - from.identities;
        let Size { pods, policies: rules, identities: numbers, .. } = to;
        progress(&format!("{pods} pods, {rules} policies, {numbers} identities"));
        each(from.namespaces..to.namespaces, |number| self.namespace(number)).await?;
        each(from.identities..to.identities, |number| self.identity(number)).await?;
        each(from.pods..to.pods, |number| self.pod(number)).await?;
        each(from.policies..to.policies, |number| self.policy(number)).await?;
        let written = Instant::now();
        let all = |now: &Status| {
            now.problems.is_empty() && now.policies == policies && now.identities >= identities
        };
        self.cluster.await_status("all objects are in force", all).await?;
        Ok(millis(written))
    }

    async fn namespace(&self, number: usize) -> Result<()> {
        let new: Namespace = object(json!({"metadata": {"name": namespace(number)}}))?;
        let api = Api::all(self.cluster.client.clone());
        api.create(&PostParams::default(), &new).await?;
        Ok(())
    }

    async fn identity(&self, number: usize) -> Result<()> {
        let kind = GroupVersionKind::gvk("cilium.io", "v2", "CiliumIdentity");
        let resource = ApiResource::from_gvk_with_plural(&kind, "ciliumidentities");
        let api: Api<DynamicObject> = Api::all_with(self.cluster.client.clone(), &resource);
        let namespace = namespace(number % MIDDLE.namespaces);
        let labels = json!({
            "k8s:app": format!("app-{}", number / MIDDLE.namespaces),
            "k8s:io.kubernetes.pod.namespace": namespace,
            "k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name": namespace,
            "k8s:io.cilium.k8s.policy.serviceaccount": "default",
            "k8s:io.cilium.k8s.policy.cluster": "default",
        });
        // Pods of the lab may have taken the first one.
        for id in [65_535 - number, 256 + number % 15_000] {
            let mut new = DynamicObject::new(&id.to_string(), &resource);
            new.data = json!({"security-labels": labels});
            match api.create(&PostParams::default(), &new).await {
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                other => return Ok(other.map(drop)?),
            }
        }
        bail!("no number is left for identity {number}")
    }

    async fn pod(&self, number: usize) -> Result<()> {
        let api: Api<Pod> =
            Api::namespaced(self.cluster.client.clone(), &namespace(number % MIDDLE.namespaces));
        let name = format!("pod-{number}");
        let new = object(json!({
            "metadata": {"name": name, "labels": {"app": app(number), "pod-template-hash": "5d4f"}},
            "spec": {
                "nodeName": ELSEWHERE,
                "containers": [{
                    "name": "main",
                    "image": "registry.k8s.io/pause",
                    "env": [{"name": "MODE", "value": "production"}],
                    "ports": [{"name": "http", "containerPort": 8080}],
                }],
            },
        }))?;
        api.create(&PostParams::default(), &new).await?;
        let offset = u32::try_from(number)?;
        let v4 = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 250, 0, 1)) + offset);
        let v6 = Ipv6Addr::from(
            u128::from(Ipv6Addr::new(0xfd50, 0, 0, 0, 0, 0, 0, 1)) + u128::from(offset),
        );
        let status = json!({"status": {
            "phase": "Running",
            "podIP": v4,
            "podIPs": [{"ip": v4}, {"ip": v6}],
        }});
        api.patch_status(&name, &PatchParams::default(), &Patch::Merge(status)).await?;
        Ok(())
    }

    /// Most are about pods elsewhere, as anywhere. A few select a pod here.
    async fn policy(&self, number: usize) -> Result<()> {
        let here = number.is_multiple_of(50);
        let namespace =
            if here { "default".to_owned() } else { namespace(number % MIDDLE.namespaces) };
        let subject = if here { json!("bystander") } else { json!(app(number)) };
        let new: NetworkPolicy = object(json!({
            "metadata": {"name": format!("policy-{number}")},
            "spec": {
                "podSelector": {"matchLabels": {"app": subject}},
                "policyTypes": ["Ingress", "Egress"],
                "ingress": [{
                    "from": [{
                        "namespaceSelector": {},
                        "podSelector": {"matchLabels": {"app": app(number + 1)}},
                    }],
                    "ports": [{"port": 8000 + number % 100}],
                }],
                "egress": [{"to": [{"ipBlock": {
                    "cidr": format!("10.{}.{}.0/24", number / 250, number % 250),
                }}]}],
            },
        }))?;
        let api = Api::namespaced(self.cluster.client.clone(), &namespace);
        api.create(&PostParams::default(), &new).await?;
        Ok(())
    }

    /// The agent's processor time for a pod that comes and goes, in milliseconds.
    async fn churn(&self, agent: &Agent) -> Result<f64> {
        let numbers = MIDDLE.pods..MIDDLE.pods + CHURN;
        let before = control::cpu_time(agent.pid)?;
        each(numbers.clone(), |number| self.pod(number)).await?;
        self.await_pods(MIDDLE.pods + CHURN).await?;
        each(numbers, |number| self.delete_pod(number)).await?;
        self.await_pods(MIDDLE.pods).await?;
        Ok(agent.since(before)? / CHURN as f64)
    }

    async fn delete_pod(&self, number: usize) -> Result<()> {
        let api: Api<Pod> =
            Api::namespaced(self.cluster.client.clone(), &namespace(number % MIDDLE.namespaces));
        let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        api.delete(&format!("pod-{number}"), &now).await?;
        Ok(())
    }

    /// The lab's own pods are few.
    async fn await_pods(&self, count: usize) -> Result<()> {
        let holds = |now: &Status| {
            let pods = now.inputs.iter().find(|input| input.kind == "Pod");
            pods.is_some_and(|pods| (count..count + CHURN).contains(&pods.objects))
        };
        self.cluster.await_status("the agent knows the pods", holds).await?;
        Ok(())
    }
}

async fn each<F: Future<Output = Result<()>>>(
    numbers: std::ops::Range<usize>,
    make: impl Fn(usize) -> F,
) -> Result<()> {
    stream::iter(numbers.map(make)).buffer_unordered(AT_ONCE).try_collect().await
}

fn namespace(number: usize) -> String {
    format!("team-{number}")
}

/// The applications of the pods: ten in each namespace, so that there are identities for them.
fn app(number: usize) -> String {
    format!("app-{}", number / MIDDLE.namespaces % 10)
}
