//! What runs of Palisade in a cluster, as the API server tells.

use std::collections::BTreeMap;

use k8s_openapi::api::{
    apps::v1::{DaemonSet, Deployment},
    core::v1::{ContainerState, ContainerStatus, Pod},
};
use kube::{Api, Client, ResourceExt, api::ListParams};

/// The DaemonSet of the agents, wherever it is.
const AGENTS: &str = "k8s-app=palisade";
const PODS: &str = "k8s-app in (palisade, palisade-operator)";
/// What a container waits for that just has not begun.
const BEGINNING: [&str; 2] = ["ContainerCreating", "PodInitializing"];

/// An installation.
#[derive(Debug, Default)]
pub(crate) struct Installation {
    /// Where it is.
    pub(crate) namespace: String,
    /// Version of the chart.
    pub(crate) version: String,
    /// The DaemonSet `palisade`.
    pub(crate) agents: Replicas,
    /// The Deployment `palisade-operator`.
    pub(crate) operators: Option<Replicas>,
    /// Agents bring a proxy.
    pub(crate) proxy: bool,
    /// Pods of both.
    pub(crate) pods: Vec<PodState>,
}

/// How many there are, and should be.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Replicas {
    pub(crate) desired: i32,
    pub(crate) ready: i32,
    pub(crate) available: i32,
    /// The newest version is everywhere.
    pub(crate) current: bool,
}

/// One pod.
#[derive(Debug)]
pub(crate) struct PodState {
    /// `palisade` or `palisade-operator`.
    pub(crate) component: String,
    pub(crate) name: String,
    pub(crate) node: Option<String>,
    pub(crate) phase: String,
    /// Why it is on no node.
    pub(crate) unschedulable: Option<String>,
    pub(crate) containers: Vec<Container>,
}

/// One container.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) name: String,
    pub(crate) image: String,
    pub(crate) running: bool,
    pub(crate) ready: bool,
    pub(crate) restarts: i32,
    /// How it ended before it was restarted.
    pub(crate) ended: Option<String>,
    /// Why it does not run, where it should.
    pub(crate) problem: Option<String>,
}

impl Installation {
    /// Looks for one in every namespace.
    pub(crate) async fn find(client: &Client) -> kube::Result<Option<Self>> {
        let Some(agents) = Self::agents(client).await?.into_iter().next() else { return Ok(None) };
        let namespace = agents.namespace().unwrap_or_default();
        let operators: Api<Deployment> = Api::namespaced(client.clone(), &namespace);
        let operators = operators.get_opt("palisade-operator").await?;
        let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
        let pods = pods.list(&ListParams::default().labels(PODS)).await?.items;
        Ok(Some(Self::new(&agents, operators.as_ref(), &pods)))
    }

    /// The agents of every installation, whoever made it.
    pub(crate) async fn agents(client: &Client) -> kube::Result<Vec<DaemonSet>> {
        let all: Api<DaemonSet> = Api::all(client.clone());
        let mut found = all.list(&ListParams::default().labels(AGENTS)).await?.items;
        found.retain(|it| it.name_any() == "palisade");
        Ok(found)
    }

    fn new(agents: &DaemonSet, operators: Option<&Deployment>, pods: &[Pod]) -> Self {
        let mut containers = agents.spec.template.spec.iter().flat_map(|spec| &spec.containers);
        Self {
            namespace: agents.namespace().unwrap_or_default(),
            version: agents.labels().get("app.kubernetes.io/version").cloned().unwrap_or_default(),
            agents: of_daemon_set(agents),
            operators: operators.map(of_deployment),
            proxy: containers.any(|container| container.name == "proxy"),
            pods: pods.iter().map(PodState::of).collect(),
        }
    }

    /// By component and image: pods that run it.
    pub(crate) fn images(&self) -> BTreeMap<String, BTreeMap<String, usize>> {
        let mut images: BTreeMap<String, BTreeMap<String, usize>> = BTreeMap::new();
        for pod in self.pods.iter().filter(|pod| pod.phase == "Running") {
            let Some(container) = pod.containers.iter().find(|it| it.running) else { continue };
            let of_component = images.entry(pod.component.clone()).or_default();
            *of_component.entry(container.image.clone()).or_default() += 1;
        }
        images
    }
}

fn of_daemon_set(agents: &DaemonSet) -> Replicas {
    let Some(status) = &agents.status else { return Replicas::default() };
    Replicas {
        desired: status.desired_number_scheduled,
        ready: status.number_ready,
        available: status.number_available.unwrap_or_default(),
        current: status.observed_generation == agents.metadata.generation
            && status.updated_number_scheduled.unwrap_or_default()
                == status.desired_number_scheduled,
    }
}

fn of_deployment(operators: &Deployment) -> Replicas {
    let desired = operators.spec.replicas.unwrap_or(1);
    let status = operators.status.clone().unwrap_or_default();
    Replicas {
        desired,
        ready: status.ready_replicas.unwrap_or_default(),
        available: status.available_replicas.unwrap_or_default(),
        current: status.observed_generation == operators.metadata.generation,
    }
}

impl PodState {
    fn of(pod: &Pod) -> Self {
        let spec = pod.spec.as_ref();
        let status = pod.status.clone().unwrap_or_default();
        let scheduled = status.conditions.iter().flatten().find(|it| it.type_ == "PodScheduled");
        let unschedulable = scheduled.filter(|it| it.status == "False");
        let before = status.init_container_statuses.iter().flatten().map(|it| container(it, true));
        let main = status.container_statuses.iter().flatten().map(|it| container(it, false));
        // Of the containers that prepare, only one that cannot is worth a word.
        let before = before.filter(|container| container.problem.is_some());
        Self {
            component: pod.labels().get("k8s-app").cloned().unwrap_or_default(),
            name: pod.name_any(),
            node: spec.and_then(|spec| spec.node_name.clone()),
            phase: status.phase.clone().unwrap_or_default(),
            unschedulable: unschedulable.and_then(|it| it.message.clone()),
            containers: before.chain(main).collect(),
        }
    }
}

fn container(status: &ContainerStatus, prepares: bool) -> Container {
    let state = status.state.clone().unwrap_or_default();
    Container {
        name: status.name.clone(),
        image: status.image.clone(),
        running: state.running.is_some(),
        ready: status.ready,
        restarts: status.restart_count,
        ended: status.last_state.as_ref().and_then(ended),
        problem: problem(&state, status.last_state.as_ref(), prepares),
    }
}

fn problem(
    state: &ContainerState,
    before: Option<&ContainerState>,
    prepares: bool,
) -> Option<String> {
    if let Some(waiting) = &state.waiting {
        let reason = waiting.reason.as_deref().unwrap_or("waiting");
        if BEGINNING.contains(&reason) {
            return None;
        }
        let why = before.and_then(ended).or_else(|| waiting.message.clone()).unwrap_or_default();
        return Some(with(reason, &why));
    }
    let failed = state.terminated.as_ref().is_some_and(|it| !prepares || it.exit_code != 0);
    if failed { ended(state) } else { None }
}

fn ended(state: &ContainerState) -> Option<String> {
    let ended = state.terminated.as_ref()?;
    // So the kubelet tells of containers that it finds gone after the node started again: whatever
    // they said last is no reason.
    if (ended.reason.as_deref(), ended.exit_code) == (Some("Unknown"), 255) {
        return Some("it ended with its node, or with the node's container runtime".to_owned());
    }
    let said = ended.message.as_deref().unwrap_or_default().trim();
    // The last thing that it said is why; what it logged before may be in front.
    let said = said.rfind("\nError: ").map_or(said, |at| &said[at..]);
    let said = said.lines().filter(|line| !line.trim().is_empty()).collect::<Vec<_>>().join(" ");
    let reason = ended.reason.as_deref().unwrap_or("ended");
    Some(with(&format!("{reason}, exit code {}", ended.exit_code), &said))
}

/// What there is to say, and why if anybody said so.
fn with(what: &str, why: &str) -> String {
    if why.is_empty() { what.to_owned() } else { format!("{what}: {why}") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_restart_is_told_with_what_came_before_it() {
        let said = "INFO leading\nWARN cannot renew the Lease\nError: the Lease is lost\n";
        let status = json!({
            "name": "operator", "image": "palisade", "imageID": "", "ready": true,
            "restartCount": 1, "state": { "running": {} },
            "lastState": { "terminated": { "exitCode": 1, "reason": "Error", "message": said } },
        });
        let container = container(&serde_json::from_value(status).unwrap(), false);
        let why = "Error, exit code 1: Error: the Lease is lost";
        assert_eq!(container.ended.as_deref(), Some(why));
        assert_eq!((container.restarts, container.problem), (1, None));
    }

    #[test]
    fn a_node_that_started_again_is_the_reason_itself() {
        let lost = json!({ "terminated": { "exitCode": 255, "reason": "Unknown",
            "message": "INFO all is well\n" } });
        let told = ended(&serde_json::from_value(lost).unwrap());
        assert_eq!(
            told.as_deref(),
            Some("it ended with its node, or with the node's container runtime")
        );
    }

    #[test]
    fn nothing_follows_where_nothing_was_said() {
        let problem = |state| problem(&serde_json::from_value(state).unwrap(), None, false);
        let waiting = json!({ "waiting": { "reason": "CrashLoopBackOff" } });
        assert_eq!(problem(waiting).as_deref(), Some("CrashLoopBackOff"));
        let ended = json!({ "terminated": { "exitCode": 137, "reason": "OOMKilled" } });
        assert_eq!(problem(ended).as_deref(), Some("OOMKilled, exit code 137"));
    }
}
