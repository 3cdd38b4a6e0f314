//! Nodes as the cluster sees them: programs that are kept running, and Node objects that tell of it.

use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use palisade_api::admin::{Request, Response, Status};
use palisade_api::routing::{Masquerade, Routing};
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use crate::fabric::{self, UPLINK};
use crate::layout::{Layout, NodePlan};

/// How often a ready agent is asked.
const PERIOD: Duration = Duration::from_secs(1);
/// How often one that is not ready yet is asked.
const IMPATIENT: Duration = Duration::from_millis(50);
/// An agent that says nothing for so long is not ready.
const PATIENCE: Duration = Duration::from_secs(2);
/// The Node object is written at least so often.
const HEARTBEAT: Duration = Duration::from_secs(30);
/// A program that lived so long is started again at once.
const SETTLED: Duration = Duration::from_secs(1);
/// Between restarts of one that dies sooner: at first, and at most.
const RESTART: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// One node.
#[derive(Debug, Clone)]
pub struct Keeper {
    /// The node.
    pub node: NodePlan,
    /// Paths of the lab.
    pub layout: Layout,
    /// The control group of all nodes.
    pub cgroup: PathBuf,
    /// The directory of the programs.
    pub programs: PathBuf,
    /// How pods of different nodes reach each other.
    pub routing: Routing,
    /// Whether pods reach the outside with their node's address.
    pub masquerade: Masquerade,
}

/// The process of a node's program, if it runs: the one in the node's network.
pub fn process(layout: &Layout, node: &NodePlan, program: Program) -> Option<Pid> {
    let run = layout.node_run(node);
    let network = std::fs::metadata(node.netns_path()).ok()?.ino();
    let entries = std::fs::read_dir("/proc").ok()?.map_while(Result::ok);
    let mut pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let found = pids.find(|pid: &i32| {
        // Processes come and go meanwhile.
        let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = command.split('\0');
        words.next().is_some_and(|name| name.ends_with(program.file()))
            && words.any(|word| Path::new(word) == run)
            && std::fs::metadata(format!("/proc/{pid}/ns/net"))
                .is_ok_and(|entry| entry.ino() == network)
    });
    found.and_then(Pid::from_raw)
}

/// A program that every node runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// `palisade-agent`.
    Agent,
    /// `palisade-proxy`.
    Proxy,
}

impl Program {
    /// What every node runs.
    pub const ALL: [Self; 2] = [Self::Agent, Self::Proxy];

    /// Its file name.
    pub const fn file(self) -> &'static str {
        match self {
            Self::Agent => "palisade-agent",
            Self::Proxy => "palisade-proxy",
        }
    }
}

impl Keeper {
    /// Keeps a program running until the lab ends.
    pub async fn keep(&self, program: Program) {
        let what = format!("{}'s {}", self.node.name, program.file());
        let mut pause = Duration::ZERO;
        loop {
            let started = tokio::time::Instant::now();
            // Nothing is wrong with one that somebody killed.
            let mut killed = false;
            match self.spawn(program).await {
                Ok(mut child) => match child.wait().await {
                    Ok(status) => {
                        killed = status.signal() == Some(Signal::KILL.as_raw());
                        tracing::warn!("{what} ended: {status}");
                    }
                    Err(error) => tracing::warn!("{what}: {error}"),
                },
                Err(error) => tracing::error!("{what}: {error:#}"),
            }
            pause = match killed || started.elapsed() > SETTLED {
                true => Duration::ZERO,
                false => (pause * 2).clamp(RESTART.0, RESTART.1),
            };
            tokio::time::sleep(pause).await;
        }
    }

    async fn spawn(&self, program: Program) -> anyhow::Result<Child> {
        let (layout, node) = (&self.layout, &self.node);
        for directory in [layout.node_run(node), layout.node_state(node), layout.bpffs(node)] {
            tokio::fs::create_dir_all(&directory)
                .await
                .with_context(|| format!("cannot create {}", directory.display()))?;
        }
        let group = self.cgroup.join(&node.name);
        tokio::fs::create_dir_all(&group).await?;
        let own = self.cgroup.join("agents");
        tokio::fs::create_dir_all(&own).await?;
        let file = self.programs.join(program.file());
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(layout.log(node, program))
            .with_context(|| format!("cannot open the log of {}", program.file()))?;
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("netns-exec")
            .arg("--cgroup")
            .arg(own)
            .arg(node.netns_path())
            .arg("--")
            .arg(&file)
            .arg("--run-dir")
            .arg(layout.node_run(node))
            .arg("--state-dir")
            .arg(match program {
                Program::Agent => layout.node_state(node),
                Program::Proxy => layout.node_state(node).join("proxy"),
            });
        if program == Program::Agent {
            command
                .args(["--node-name", &node.name, "--cluster-name", "default", "--uplink", UPLINK])
                .args(["--routing", &self.routing.to_string()])
                .args(["--masquerade", &self.masquerade.to_string()])
                .arg("--kubeconfig")
                .arg(layout.node_kubeconfig())
                .arg("--bpffs")
                .arg(layout.bpffs(node))
                .arg("--cgroup")
                .arg(group);
        }
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", file.display()))
    }

    /// Keeps the Node object true until the lab ends.
    pub async fn keep_status(&self, client: &Client) {
        let api = Api::<Node>::all(client.clone());
        let mut told: Option<(bool, Vec<IpAddr>)> = None;
        let mut since = jiff::Timestamp::now();
        let mut written = tokio::time::Instant::now();
        loop {
            let asked = tokio::time::timeout(PATIENCE, self.ask()).await;
            let problem = match asked {
                Ok(Ok(status)) if status.ready => None,
                Ok(Ok(status)) => {
                    Some(format!("agent is starting: {}", status.problems.join("; ")))
                }
                Ok(Err(error)) => Some(format!("agent does not answer: {error:#}")),
                Err(_) => Some("agent does not answer in time".to_owned()),
            };
            let ready = problem.is_none();
            let now = (ready, self.addresses().await);
            if told.as_ref() != Some(&now) || written.elapsed() > HEARTBEAT {
                if told.as_ref().is_none_or(|(told, _)| *told != ready) {
                    since = jiff::Timestamp::now();
                }
                let status = node_status(&self.node, &now.1, since, problem);
                let patch = Patch::Merge(json!({"status": status}));
                match api.patch_status(&self.node.name, &PatchParams::default(), &patch).await {
                    Ok(_) => {
                        told = Some(now);
                        written = tokio::time::Instant::now();
                    }
                    Err(error) => tracing::warn!("status of {}: {error}", self.node.name),
                }
            }
            tokio::time::sleep(if ready { PERIOD } else { IMPATIENT }).await;
        }
    }

    /// As the node's interface has them, which somebody may give others.
    async fn addresses(&self) -> Vec<IpAddr> {
        let node = self.node.clone();
        let found = tokio::task::spawn_blocking(move || fabric::addresses(&node)).await;
        match found {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                tracing::warn!("addresses of {}: {error:#}", self.node.name);
                Vec::new()
            }
            Err(_) => Vec::new(),
        }
    }

    async fn ask(&self) -> anyhow::Result<Status> {
        let mut stream = UnixStream::connect(self.layout.admin_socket(&self.node)).await?;
        let mut request = serde_json::to_vec(&Request::Status)?;
        request.push(b'\n');
        stream.write_all(&request).await?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).await?;
        match serde_json::from_str(&line).context("unreadable answer")? {
            Response::Status(status) => Ok(*status),
            Response::Error(error) => bail!("{error}"),
            other => bail!("unexpected answer {other:?}"),
        }
    }
}

fn node_status(
    node: &NodePlan,
    addresses: &[IpAddr],
    since: jiff::Timestamp,
    problem: Option<String>,
) -> Value {
    let now = json!(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::now()));
    let since = json!(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(since));
    let condition = |kind: &str, status: bool, reason: &str, message: &str| {
        json!({
            "type": kind,
            "status": if status { "True" } else { "False" },
            "reason": reason,
            "message": message,
            "lastHeartbeatTime": now,
            "lastTransitionTime": since,
        })
    };
    let (reason, message) = match &problem {
        None => ("KubeletReady", "the agent is ready and pods can be started"),
        Some(problem) => ("KubeletNotReady", problem.as_str()),
    };
    let uname = rustix::system::uname();
    let memory = rustix::system::sysinfo().totalram / 1024;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let resources = json!({
        "cpu": cpus.to_string(),
        "memory": format!("{memory}Ki"),
        "pods": "110",
        "ephemeral-storage": "10Gi",
    });
    let mut addresses: Vec<Value> =
        addresses.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
    addresses.push(json!({"type": "Hostname", "address": node.name}));
    json!({
        "addresses": addresses,
        "capacity": resources,
        "allocatable": resources,
        "conditions": [
            condition("MemoryPressure", false, "KubeletHasSufficientMemory", "sufficient memory"),
            condition("DiskPressure", false, "KubeletHasNoDiskPressure", "no disk pressure"),
            condition("PIDPressure", false, "KubeletHasSufficientPID", "sufficient PIDs"),
            condition("NetworkUnavailable", problem.is_some(), "PalisadeAgent", message),
            condition("Ready", problem.is_none(), reason, message),
        ],
        "nodeInfo": {
            "architecture": std::env::consts::ARCH.replace("x86_64", "amd64").replace("aarch64", "arm64"),
            "bootID": std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim(),
            "containerRuntimeVersion": concat!("palisade-lab://", env!("CARGO_PKG_VERSION")),
            "kernelVersion": uname.release().to_string_lossy(),
            "kubeProxyVersion": "",
            "kubeletVersion": concat!("v1.37.0-palisade.", env!("CARGO_PKG_VERSION")),
            "machineID": "",
            "operatingSystem": "linux",
            "osImage": "Palisade lab node",
            "systemUUID": "",
        },
        "daemonEndpoints": {"kubeletEndpoint": {"Port": 0}},
    })
}
