//! A pod's status, put together from its containers' states and written to the API server.

use std::net::IpAddr;
use std::sync::Mutex;

use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting, Pod,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::Notify;

use super::lock;
use crate::layout::NodePlan;

/// One container.
#[derive(Debug, Clone, Default)]
pub(super) struct ContainerModel {
    pub(super) name: String,
    pub(super) image: String,
    pub(super) init: bool,
    pub(super) state: ContainerState,
    pub(super) last: Option<ContainerState>,
    pub(super) restarts: i32,
    pub(super) ready: bool,
    pub(super) id: Option<String>,
    /// It has ended and will not be started again; its exit code.
    pub(super) done: Option<i32>,
}

#[derive(Debug, Default)]
struct Model {
    containers: Vec<ContainerModel>,
    addresses: Vec<IpAddr>,
    conditions: Vec<Value>,
    start: Option<Time>,
}

/// The status of one pod. Changes are cheap; [`Board::publish`] writes the newest one.
#[derive(Debug)]
pub(super) struct Board {
    model: Mutex<Model>,
    changed: Notify,
}

/// Shorthands for container states.
pub(super) fn waiting(reason: &str, message: impl Into<String>) -> ContainerState {
    let message = Some(message.into()).filter(|message| !message.is_empty());
    ContainerState {
        waiting: Some(ContainerStateWaiting { reason: Some(reason.to_owned()), message }),
        ..ContainerState::default()
    }
}

pub(super) fn running(since: jiff::Timestamp) -> ContainerState {
    ContainerState {
        running: Some(ContainerStateRunning { started_at: Some(Time(since)) }),
        ..ContainerState::default()
    }
}

pub(super) fn terminated(
    code: i32,
    reason: &str,
    message: Option<String>,
    since: jiff::Timestamp,
) -> ContainerState {
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code: code,
            reason: Some(reason.to_owned()),
            message,
            started_at: Some(Time(since)),
            finished_at: Some(Time(jiff::Timestamp::now())),
            ..ContainerStateTerminated::default()
        }),
        ..ContainerState::default()
    }
}

impl Board {
    pub(super) fn new(pod: &Pod) -> Self {
        let spec = pod.spec.clone().unwrap_or_default();
        let reason =
            if spec.init_containers.is_some() { "PodInitializing" } else { "ContainerCreating" };
        let model = |init: bool| {
            move |container: &k8s_openapi::api::core::v1::Container| ContainerModel {
                name: container.name.clone(),
                image: container.image.clone().unwrap_or_default(),
                init,
                state: waiting(reason, ""),
                ..ContainerModel::default()
            }
        };
        let init = spec.init_containers.iter().flatten().map(model(true));
        let containers = init.chain(spec.containers.iter().map(model(false))).collect();
        let start = Some(Time(jiff::Timestamp::now()));
        let model = Model { containers, start, ..Model::default() };
        let board = Self { model: Mutex::new(model), changed: Notify::new() };
        board.changed.notify_one();
        board
    }

    pub(super) fn update(&self, container: &str, change: impl FnOnce(&mut ContainerModel)) {
        let mut model = lock(&self.model);
        if let Some(found) = model.containers.iter_mut().find(|c| c.name == container) {
            change(found);
        }
        drop(model);
        self.changed.notify_one();
    }

    pub(super) fn set_addresses(&self, addresses: Vec<IpAddr>) {
        lock(&self.model).addresses = addresses;
        self.changed.notify_one();
    }

    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        lock(&self.model).addresses.clone()
    }

    /// Whether every ordinary container has ended for good.
    pub(super) fn finished(&self) -> bool {
        let model = lock(&self.model);
        model.containers.iter().filter(|c| !c.init).all(|c| c.done.is_some())
    }

    /// Writes the status after every change, until the pod's object is gone.
    pub(super) async fn publish(&self, client: &Client, pod: &Pod, node: &NodePlan) {
        let api = Api::<Pod>::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
        let uid = pod.uid().unwrap_or_default();
        loop {
            self.changed.notified().await;
            while let Err(error) = self.write(&api, pod, &uid, node).await {
                if matches!(&error, kube::Error::Api(status) if status.code == 404 || status.code == 409)
                {
                    return;
                }
                tracing::warn!("status of pod {}: {error}", pod.name_any());
                tokio::time::sleep(std::time::Duration::from_millis(200)).await;
            }
        }
    }

    /// Writes the status as it is now.
    pub(super) async fn write(
        &self,
        api: &Api<Pod>,
        pod: &Pod,
        uid: &str,
        node: &NodePlan,
    ) -> kube::Result<()> {
        let status = self.render(pod, node);
        // The uid guards against a new pod of the same name.
        let patch = json!({"metadata": {"uid": uid}, "status": status});
        let name = pod.name_any();
        api.patch_status(&name, &PatchParams::default(), &Patch::Merge(&patch)).await.map(drop)
    }

    fn render(&self, pod: &Pod, node: &NodePlan) -> Value {
        let mut model = lock(&self.model);
        let phase = phase(&model);
        let spec = pod.spec.clone().unwrap_or_default();
        let initialized = model.containers.iter().filter(|c| c.init).all(|c| c.done == Some(0));
        let unready: Vec<_> = model
            .containers
            .iter()
            .filter(|c| !c.init && !c.ready)
            .map(|c| c.name.clone())
            .collect();
        let completed = matches!(phase, "Succeeded" | "Failed");
        let (ready, reason, message) = if completed {
            (false, Some("PodCompleted"), None)
        } else if unready.is_empty() {
            (true, None, None)
        } else {
            let text = format!("containers with unready status: [{}]", unready.join(" "));
            (false, Some("ContainersNotReady"), Some(text))
        };
        let sandbox = !model.addresses.is_empty();
        let generation = pod.metadata.generation;
        for (kind, holds, reason, message) in [
            ("PodReadyToStartContainers", sandbox && !completed, None, None),
            ("Initialized", initialized, None, None),
            ("Ready", ready && sandbox, reason, message.clone()),
            ("ContainersReady", ready && sandbox, reason, message),
            ("PodScheduled", true, None, None),
        ] {
            set_condition(&mut model.conditions, kind, holds, reason, message, generation);
        }
        let statuses = |init: bool| -> Vec<Value> {
            model.containers.iter().filter(|c| c.init == init).map(container_status).collect()
        };
        let mut status = json!({
            "phase": phase,
            "conditions": model.conditions,
            "hostIP": node.v4(),
            "hostIPs": node.addresses().map(|ip| json!({"ip": ip})),
            "containerStatuses": statuses(false),
            "qosClass": "BestEffort",
            "startTime": model.start,
            "observedGeneration": generation,
        });
        if spec.init_containers.is_some() {
            status["initContainerStatuses"] = statuses(true).into();
        }
        if let Some(first) = model.addresses.first() {
            status["podIP"] = json!(first);
            status["podIPs"] = model.addresses.iter().map(|ip| json!({"ip": ip})).collect();
        }
        status
    }
}

fn phase(model: &Model) -> &'static str {
    let mut main = model.containers.iter().filter(|c| !c.init);
    if model.containers.iter().any(|c| c.init && c.done.is_some_and(|code| code != 0)) {
        return "Failed";
    }
    if main.clone().all(|c| c.done.is_some()) {
        let failed = main.any(|c| c.done != Some(0));
        return if failed { "Failed" } else { "Succeeded" };
    }
    let started = |c: &ContainerModel| {
        c.state.running.is_some() || c.state.terminated.is_some() || c.last.is_some()
    };
    if main.all(started) { "Running" } else { "Pending" }
}

fn set_condition(
    conditions: &mut Vec<Value>,
    kind: &str,
    holds: bool,
    reason: Option<&str>,
    message: Option<String>,
    generation: Option<i64>,
) {
    let status = if holds { "True" } else { "False" };
    let old = conditions.iter().position(|c| c["type"] == kind);
    let since = old.filter(|at| conditions[*at]["status"] == status).map_or_else(
        || json!(Time(jiff::Timestamp::now())),
        |at| conditions[at]["lastTransitionTime"].clone(),
    );
    let mut condition = json!({
        "type": kind, "status": status, "lastTransitionTime": since,
        "observedGeneration": generation,
    });
    if let Some(reason) = reason {
        condition["reason"] = reason.into();
    }
    if let Some(message) = message {
        condition["message"] = message.into();
    }
    match old {
        Some(at) => conditions[at] = condition,
        None => conditions.push(condition),
    }
}

fn container_status(container: &ContainerModel) -> Value {
    json!({
        "name": container.name,
        "image": container.image,
        // An image that was not found has no number.
        "imageID": container.id.as_ref().map_or(String::new(), |_| format!("palisade-lab://{}", container.image)),
        "containerID": container.id.as_ref().map(|id| format!("palisade-lab://{id}")),
        "state": container.state,
        "lastState": container.last.clone().unwrap_or_default(),
        "ready": container.ready,
        "started": container.state.running.is_some(),
        "restartCount": container.restarts,
    })
}
