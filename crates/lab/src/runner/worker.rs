//! One pod from its assignment to a node until nothing of it is left.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use k8s_openapi::api::core::v1::{Container, Pod};
use kube::api::{DeleteParams, Preconditions};
use kube::{Api, Client, ResourceExt};
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use super::cni::Attachment;
use super::console::Wanted;
use super::container::{self, Running, unblock};
use super::events::Recorder;
use super::logs::Log;
use super::probes::{self, Scene};
use super::status::{Board, running, terminated, waiting};
use super::{Settings, Shared, Target, environment, images};
use crate::container::{ContainerSpec, Privileges, Process};
use crate::layout::{NodePlan, POD_NETNS_PREFIX};
use crate::sys::{cgroup, netns};

/// The first restart of a container is at once, the next ones wait so long, doubling.
const BACKOFF: Duration = Duration::from_secs(10);
const MAX_BACKOFF: Duration = Duration::from_secs(300);
/// A container that ran so long starts again without waiting.
const CALM: Duration = Duration::from_secs(600);
/// Between attempts to make or remove a sandbox.
const SANDBOX_RETRY: Duration = Duration::from_secs(1);
const DEFAULT_GRACE: Duration = Duration::from_secs(30);

/// Everything the parts of one pod share.
struct Worker<'a> {
    settings: &'a Settings,
    client: Client,
    node: NodePlan,
    pod: Pod,
    uid: String,
    board: Arc<Board>,
    shared: Arc<Shared>,
    events: Recorder,
    cgroup: PathBuf,
    directory: PathBuf,
    updates: watch::Receiver<Option<Pod>>,
}

/// Where the pod lives.
struct Sandbox {
    netns: PathBuf,
    attachment: Option<Attachment>,
}

/// Runs a pod until its object is gone.
pub(super) async fn run(
    settings: &Settings,
    client: Client,
    node: NodePlan,
    updates: watch::Receiver<Option<Pod>>,
    shared: Arc<Shared>,
) {
    let Some(pod) = updates.borrow().clone() else { return };
    let uid = pod.uid().unwrap_or_default();
    let worker = Worker {
        settings,
        board: Arc::new(Board::new(&pod)),
        shared,
        events: Recorder::new(client.clone(), "kubelet", Some(node.name.clone())),
        cgroup: settings.cgroup.join(&node.name).join(format!("pod-{uid}")),
        directory: settings.layout.pods().join(&uid),
        client,
        node,
        pod,
        uid,
        updates,
    };
    worker.live().await;
}

impl Worker<'_> {
    async fn live(&self) {
        let publish = async {
            self.board.publish(&self.client, &self.pod, &self.node).await;
            // The object is gone; what runs is taken down by the other side of the select.
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = publish => {}
            () = self.work_until_gone() => {}
        }
        self.forget_object().await;
        let _ = tokio::fs::remove_dir_all(&self.directory).await;
    }

    async fn work_until_gone(&self) {
        let sandbox = tokio::select! {
            sandbox = self.make_sandbox() => Some(sandbox),
            () = self.deleted() => None,
        };
        if let Some(sandbox) = &sandbox {
            self.shared.netns.get_or_init(|| sandbox.netns.clone());
            self.run_containers(sandbox).await;
        }
        self.remove_sandbox(sandbox.as_ref()).await;
        if sandbox.is_some() {
            self.deleted().await;
        }
    }

    /// Somebody wants the pod to go.
    async fn deleted(&self) {
        let mut updates = self.updates.clone();
        let going = |pod: &Option<Pod>| {
            pod.as_ref().is_none_or(|pod| pod.metadata.deletion_timestamp.is_some())
        };
        // An error means that the runner itself is going.
        let _ = updates.wait_for(going).await;
    }

    fn grace(&self) -> Duration {
        let pod = self.updates.borrow();
        let Some(pod) = &*pod else { return Duration::ZERO };
        let seconds = pod
            .metadata
            .deletion_grace_period_seconds
            .or_else(|| pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds));
        seconds
            .and_then(|seconds| u64::try_from(seconds).ok())
            .map_or(DEFAULT_GRACE, Duration::from_secs)
    }

    fn sandbox_id(&self) -> String {
        let digest = Sha256::digest(self.uid.as_bytes());
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn netns_name(&self) -> String {
        format!("{POD_NETNS_PREFIX}{}", &self.sandbox_id()[..12])
    }

    async fn make_sandbox(&self) -> Sandbox {
        loop {
            match self.try_sandbox().await {
                Ok(sandbox) => return sandbox,
                Err(error) => {
                    tracing::warn!("sandbox of pod {}: {error:#}", self.pod.name_any());
                    let message = format!("Failed to create pod sandbox: {error:#}");
                    self.events.warning(&self.pod, "FailedCreatePodSandBox", message).await;
                    self.remove_sandbox(None).await;
                }
            }
            tokio::time::sleep(SANDBOX_RETRY).await;
        }
    }

    async fn try_sandbox(&self) -> anyhow::Result<Sandbox> {
        tokio::fs::create_dir_all(&self.directory).await?;
        cgroup::create(&self.cgroup).context("cannot create the pod's control group")?;
        let host = self.pod.spec.as_ref().and_then(|spec| spec.host_network) == Some(true);
        if host {
            self.board.set_addresses(self.node.addresses().to_vec());
            return Ok(Sandbox { netns: self.node.netns_path(), attachment: None });
        }
        let name = self.netns_name();
        let netns = unblock(move || netns::create(&name))
            .await
            .context("cannot create the pod's network namespace")?;
        let attachment = self.attachment();
        let addresses = attachment.add().await?;
        self.board.set_addresses(addresses);
        Ok(Sandbox { netns, attachment: Some(attachment) })
    }

    fn attachment(&self) -> Attachment {
        Attachment {
            plugin: self.settings.cni_plugin.clone(),
            node_netns: self.node.netns_path(),
            agent_socket: self.settings.layout.cni_socket(&self.node),
            container_id: self.sandbox_id(),
            pod_netns: netns::path(&self.netns_name()),
            namespace: self.pod.namespace().unwrap_or_default(),
            name: self.pod.name_any(),
            uid: self.uid.clone(),
        }
    }

    /// Removes what there is of a sandbox, whole or not. DEL is repeated until it succeeds, as
    /// the agent may be restarting; the pod's addresses are in use until then.
    async fn remove_sandbox(&self, sandbox: Option<&Sandbox>) {
        let group = self.cgroup.clone();
        if let Err(error) = unblock(move || cgroup::remove(&group)).await {
            tracing::warn!("control group of pod {}: {error}", self.pod.name_any());
        }
        let hosted = sandbox.is_some_and(|sandbox| sandbox.attachment.is_none());
        if hosted || !netns::path(&self.netns_name()).exists() {
            return;
        }
        while let Err(error) = self.attachment().delete().await {
            tracing::warn!("detaching pod {}: {error:#}", self.pod.name_any());
            tokio::time::sleep(SANDBOX_RETRY).await;
        }
        let name = self.netns_name();
        if let Err(error) = unblock(move || netns::remove(&name)).await {
            tracing::warn!("network namespace of pod {}: {error}", self.pod.name_any());
        }
    }

    async fn run_containers(&self, sandbox: &Sandbox) {
        let Some(spec) = &self.pod.spec else { return };
        let volumes = loop {
            let attempt = environment::volumes(&self.client, &self.pod, &self.directory).await;
            match attempt {
                Ok(volumes) => break volumes,
                Err(error) => {
                    self.events.warning(&self.pod, "FailedMount", format!("{error:#}")).await;
                }
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(2)) => {}
                () = self.deleted() => return,
            }
        };
        for init in spec.init_containers.iter().flatten() {
            let code = self.run_container(sandbox, init, &volumes, true).await;
            if code != Some(0) {
                return;
            }
        }
        let all = spec.containers.iter().map(|c| self.run_container(sandbox, c, &volumes, false));
        futures::future::join_all(all).await;
        if self.board.finished() {
            tracing::info!("pod {} has finished", self.pod.name_any());
        }
    }

    /// Runs a container over and over, as the restart policy says. Its last exit code, or `None`
    /// if the pod was deleted.
    async fn run_container(
        &self,
        sandbox: &Sandbox,
        container: &Container,
        volumes: &BTreeMap<String, PathBuf>,
        init: bool,
    ) -> Option<i32> {
        let mut restarts = 0;
        let mut backoff = Backoff::default();
        loop {
            let image = tokio::select! {
                image = self.pull(container) => image,
                () = self.deleted() => return None,
            };
            let started = Instant::now();
            let prepared = self.prepare(sandbox, container, volumes, &image, restarts).await;
            let code = match prepared {
                Ok((run, process)) => self.attend(sandbox, container, run, process, init).await,
                Err(error) => {
                    let message = format!("{error:#}");
                    self.events.warning(&self.pod, "Failed", format!("Error: {message}")).await;
                    let state =
                        terminated(128, "StartError", Some(message), jiff::Timestamp::now());
                    self.board.update(&container.name, |model| model.state = state);
                    Some(128)
                }
            };
            let code = code?;
            if !self.restarts_after(code, init) {
                self.board.update(&container.name, |model| model.done = Some(code));
                return Some(code);
            }
            let wait = backoff.after(started.elapsed());
            if !wait.is_zero() {
                self.back_off(container, wait).await?;
            }
            restarts += 1;
            self.board.update(&container.name, |model| {
                if model.state.terminated.is_some() {
                    model.last = Some(model.state.clone());
                }
                model.restarts = restarts;
            });
        }
    }

    fn restarts_after(&self, code: i32, init: bool) -> bool {
        let policy = self.pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref());
        match policy.unwrap_or("Always") {
            "Never" => false,
            "Always" if !init => true,
            _ => code != 0,
        }
    }

    async fn back_off(&self, container: &Container, wait: Duration) -> Option<()> {
        let name = &container.name;
        let message = format!(
            "back-off {} restarting failed container={name} pod={}_{}({})",
            human(wait),
            self.pod.name_any(),
            self.pod.namespace().unwrap_or_default(),
            self.uid
        );
        let text =
            format!("Back-off restarting failed container {name} in pod {}", self.pod.name_any());
        self.events.warning(&self.pod, "BackOff", text).await;
        self.board.update(name, |model| {
            model.last = Some(model.state.clone());
            model.state = waiting("CrashLoopBackOff", message);
        });
        tokio::select! {
            () = tokio::time::sleep(wait) => Some(()),
            () = self.deleted() => None,
        }
    }

    /// Finds the image; waits as long as there is none, telling why.
    async fn pull(&self, container: &Container) -> images::Image {
        let reference = container.image.clone().unwrap_or_default();
        let mut wait = BACKOFF;
        loop {
            let reason = match images::resolve(&reference) {
                Ok(image) => {
                    let text =
                        format!("Container image \"{reference}\" already present on machine");
                    self.events.normal(&self.pod, "Pulled", text).await;
                    return image;
                }
                Err(reason) => reason,
            };
            let text = format!("Failed to pull image \"{reference}\": {reason}");
            self.events.warning(&self.pod, "Failed", &text).await;
            self.events.warning(&self.pod, "Failed", "Error: ErrImagePull").await;
            self.board.update(&container.name, |model| model.state = waiting("ErrImagePull", text));
            tokio::time::sleep(Duration::from_secs(2)).await;
            let text = format!("Back-off pulling image \"{reference}\": {reason}");
            self.events.normal(&self.pod, "BackOff", &text).await;
            self.board
                .update(&container.name, |model| model.state = waiting("ImagePullBackOff", text));
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(MAX_BACKOFF);
        }
    }

    async fn prepare(
        &self,
        sandbox: &Sandbox,
        container: &Container,
        volumes: &BTreeMap<String, PathBuf>,
        image: &images::Image,
        restarts: i32,
    ) -> anyhow::Result<(Running, Process)> {
        let addresses = self.board.addresses();
        let env =
            environment::variables(&self.client, &self.pod, container, &self.node, &addresses)
                .await?;
        let lookup: BTreeMap<_, _> = env.iter().cloned().collect();
        let expand = |words: &Option<Vec<String>>| -> Vec<String> {
            words.iter().flatten().map(|word| environment::expand(word, &lookup)).collect()
        };
        let console = Wanted::of(container);
        let argv = image.argv(&expand(&container.command), &expand(&container.args), console.stdin);
        let directory = container.working_dir.clone().unwrap_or_default();
        let wanted = container.security_context.as_ref();
        let pod = self.pod.spec.as_ref().and_then(|spec| spec.security_context.as_ref());
        let privileges = Privileges::granted(pod, wanted)?;
        let mut process = Process { argv, env, directory, privileges };
        if console.tty {
            process.name_terminal();
        }
        let id = self.container_id(&container.name, restarts);
        let home = self.directory.join("containers").join(&container.name);
        let sockets = self.settings.layout.run_dir().join("sock");
        tokio::fs::create_dir_all(&sockets).await?;
        let logs = home.join("logs");
        tokio::fs::create_dir_all(&logs).await?;
        let spec = ContainerSpec {
            notify: sockets.join(&id[..16]),
            netns: sandbox.netns.clone(),
            cgroup: self.cgroup.join(&container.name),
            root: home.join("root"),
            hostname: environment::hostname(&self.pod, &self.node),
            etc: environment::etc(&self.pod, &self.node, &addresses),
            volumes: environment::mounts(container, volumes)?,
            read_only: wanted.and_then(|w| w.read_only_root_filesystem) == Some(true),
            tty: console.tty,
            process: process.clone(),
        };
        let log = Log::create(logs.join(format!("{restarts}.log"))).await?;
        self.shared.update(&container.name, |live| {
            live.previous = live.current.take();
            live.current = Some(Arc::clone(&log));
        });
        let _ = tokio::fs::remove_file(logs.join(format!("{}.log", restarts - 2))).await;
        let created = format!("Created container: {}", container.name);
        self.events.normal(&self.pod, "Created", created).await;
        let run = container::start(&home, &spec, console, log).await?;
        let started = format!("Started container {}", container.name);
        self.events.normal(&self.pod, "Started", started).await;
        self.board.update(&container.name, |model| model.id = Some(id));
        Ok((run, process))
    }

    fn container_id(&self, name: &str, restarts: i32) -> String {
        let digest = Sha256::digest(format!("{}/{name}/{restarts}", self.uid).as_bytes());
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Stays with a running container until it ends. `None`: it was ended with the pod.
    async fn attend(
        &self,
        sandbox: &Sandbox,
        container: &Container,
        mut run: Running,
        process: Process,
        init: bool,
    ) -> Option<i32> {
        let since = jiff::Timestamp::now();
        let name = container.name.as_str();
        let target = Target {
            pid: run.target,
            cgroup: self.cgroup.join(name),
            process,
            console: Arc::clone(&run.console),
        };
        self.shared.update(name, |live| live.running = Some(target.clone()));
        let ready = container.readiness_probe.is_none() && container.startup_probe.is_none();
        self.board.update(name, |model| {
            model.state = running(since);
            model.ready = ready && !init;
        });
        let scene = Scene {
            node_netns: self.node.netns_path(),
            address: self.board.addresses().first().copied().unwrap_or(IpAddr::from([0; 4])),
            container: container.clone(),
            target,
            scratch: self.settings.layout.run_dir().join("exec"),
        };
        debug_assert!(sandbox.netns.is_absolute());
        let (code, deleted) = tokio::select! {
            code = run.wait() => (code, false),
            reason = self.probe(container, &scene) => (self.restart_unhealthy(&mut run, name, reason).await, false),
            () = self.deleted() => (self.stop(&mut run, name, self.grace()).await, true),
        };
        self.shared.update(name, |live| live.running = None);
        let reason = if code == 0 { "Completed" } else { "Error" };
        let state = terminated(code, reason, None, since);
        self.board.update(name, |model| {
            model.state = state;
            model.ready = false;
        });
        (!deleted).then_some(code)
    }

    async fn restart_unhealthy(&self, run: &mut Running, name: &str, reason: String) -> i32 {
        let text = format!("Liveness probe failed: {reason}");
        self.events.warning(&self.pod, "Unhealthy", text).await;
        let text = format!("Container {name} failed liveness probe, will be restarted");
        self.events.normal(&self.pod, "Killing", text).await;
        self.stop(run, name, self.grace()).await
    }

    /// Asks a container to end, and ends it when it does not.
    async fn stop(&self, run: &mut Running, name: &str, grace: Duration) -> i32 {
        self.board.update(name, |model| model.ready = false);
        let text = format!("Stopping container {name}");
        self.events.normal(&self.pod, "Killing", text).await;
        if !grace.is_zero() {
            run.terminate();
            if let Ok(code) = tokio::time::timeout(grace, run.wait()).await {
                return code;
            }
        }
        run.kill().await;
        137
    }

    /// Runs the probes; ends, with the reason, when the container must be restarted.
    async fn probe(&self, container: &Container, scene: &Scene) -> String {
        if let Some(startup) = &container.startup_probe {
            if let Err(reason) = self.first_result(startup, scene).await {
                return reason;
            }
            if container.readiness_probe.is_none() {
                self.board.update(&container.name, |model| model.ready = true);
            }
        }
        let readiness = async {
            match &container.readiness_probe {
                Some(probe) => {
                    probes::watch(probe, scene, |result| self.set_ready(container, result)).await
                }
                None => std::future::pending().await,
            }
        };
        let liveness = async {
            let Some(probe) = &container.liveness_probe else {
                return std::future::pending().await;
            };
            let (sender, mut failures) = tokio::sync::mpsc::unbounded_channel();
            tokio::select! {
                () = probes::watch(probe, scene, |result| { let _ = sender.send(result); }) => String::new(),
                reason = async {
                    loop {
                        match failures.recv().await {
                            Some(Err(reason)) => return reason,
                            Some(Ok(())) => {}
                            None => std::future::pending().await,
                        }
                    }
                } => reason,
            }
        };
        tokio::select! {
            () = readiness => String::new(),
            reason = liveness => reason,
        }
    }

    async fn first_result(
        &self,
        probe: &k8s_openapi::api::core::v1::Probe,
        scene: &Scene,
    ) -> Result<(), String> {
        let (sender, mut results) = tokio::sync::mpsc::unbounded_channel();
        tokio::select! {
            () = probes::watch(probe, scene, |result| { let _ = sender.send(result); }) => Ok(()),
            result = results.recv() => result.unwrap_or(Ok(())),
        }
    }

    fn set_ready(&self, container: &Container, result: Result<(), String>) {
        self.board.update(&container.name, |model| model.ready = result.is_ok());
        let Err(reason) = result else { return };
        let (events, pod) = (self.events.clone(), self.pod.clone());
        tokio::spawn(async move {
            events.warning(&pod, "Unhealthy", format!("Readiness probe failed: {reason}")).await;
        });
    }

    /// The pod has ended: its object may go now.
    async fn forget_object(&self) {
        if self.updates.borrow().is_none() {
            return;
        }
        let namespace = self.pod.namespace().unwrap_or_default();
        let api = Api::<Pod>::namespaced(self.client.clone(), &namespace);
        let last = self.board.write(&api, &self.pod, &self.uid, &self.node);
        let _ = tokio::time::timeout(Duration::from_secs(2), last).await;
        let parameters = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions {
                uid: Some(self.uid.clone()),
                ..Preconditions::default()
            }),
            ..DeleteParams::default()
        };
        loop {
            match api.delete(&self.pod.name_any(), &parameters).await {
                Ok(_) => return,
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => return,
                Err(error) => tracing::warn!("removing pod {}: {error}", self.pod.name_any()),
            }
            tokio::time::sleep(SANDBOX_RETRY).await;
        }
    }
}

/// The waits between restarts.
#[derive(Debug, Default)]
struct Backoff {
    next: Option<Duration>,
}

impl Backoff {
    fn after(&mut self, ran: Duration) -> Duration {
        if ran > CALM {
            self.next = None;
        }
        let wait = self.next.unwrap_or(Duration::ZERO);
        self.next = Some(if wait.is_zero() { BACKOFF } else { (wait * 2).min(MAX_BACKOFF) });
        wait
    }
}

fn human(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match (seconds / 60, seconds % 60) {
        (0, seconds) => format!("{seconds}s"),
        (minutes, seconds) => format!("{minutes}m{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_restart_is_at_once() {
        let mut backoff = Backoff::default();
        let short = Duration::from_secs(1);
        let waits: Vec<_> = (0..7).map(|_| backoff.after(short).as_secs()).collect();
        assert_eq!(waits, [0, 10, 20, 40, 80, 160, 300]);
        assert_eq!(backoff.after(CALM * 2), Duration::ZERO);
    }

    #[test]
    fn durations_for_people() {
        assert_eq!(human(Duration::from_secs(10)), "10s");
        assert_eq!(human(Duration::from_secs(160)), "2m40s");
    }
}
