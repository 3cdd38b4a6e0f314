//! The agent and the CNI plugin.

use std::{
    io::Write,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use palisade_api::admin::Status;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::{
    blocking,
    cluster::{Cluster, Pods},
    paths::Path,
    report::{Goal, Row, median},
};
use crate::sys::netns;

/// So often each thing is done; the median counts.
const AGAIN: usize = 15;
/// The port of the server that a policy closes.
const KNOCKED: u16 = 7776;
/// A connection that takes longer has been denied.
const CONNECT: Duration = Duration::from_millis(20);
/// Until a change of policy must have been noticed.
const SOON: Duration = Duration::from_secs(5);

/// Restarts the agent beside running pods, and looks at its memory.
pub(super) async fn agent(cluster: &Cluster) -> Result<Vec<Row>> {
    let mut times = Vec::new();
    let mut memory = Vec::new();
    for _ in 0..5 {
        // The lab starts an agent again at once if it ran for a while.
        let settled = |now: &Status| now.ready && now.uptime_seconds >= 2;
        let old = cluster.await_status("the agent is ready", settled).await?.pid;
        let pid = Pid::from_raw(i32::try_from(old)?).context("no process number")?;
        let begun = Instant::now();
        kill_process(pid, Signal::KILL)?;
        let new =
            cluster.await_status("the agent is back", |now| now.ready && now.pid != old).await?;
        times.push(begun.elapsed().as_secs_f64() * 1e3);
        ensure!(new.endpoints >= 3, "the agent came back without its pods");
        memory.push(resident(new.pid)?);
    }
    Ok(vec![
        Row::new("agent killed, until it is ready again, 3 pods", median(&mut times), "ms")
            .goal(Goal::AtMost(500.0)),
        Row::new("agent memory (RSS), 3 pods", median(&mut memory), "MB").goal(Goal::AtMost(30.0)),
    ])
}

/// Resident memory in megabytes (proc_pid_status(5)).
pub(super) fn resident(pid: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kilobytes: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kilobytes * 1024.0 / 1e6)
}

/// Time that a process spent, all threads together (proc_pid_stat(5)).
pub(super) fn cpu_time(pid: u32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = stat.rsplit_once(')').context("no process name")?.1;
    let mut fields = fields.split_whitespace().skip(11);
    let mut ticks = || fields.next().and_then(|field| field.parse::<u64>().ok());
    let used = ticks().zip(ticks()).map(|(user, system)| user + system).context("no times")?;
    Ok(Duration::from_secs(1) / u32::try_from(rustix::param::clock_ticks_per_second())?
        * u32::try_from(used)?)
}

/// From the start of the plugin to its answer, as a container runtime sees it.
pub(super) async fn cni_add(cluster: &Cluster) -> Result<Row> {
    let mut times = Vec::new();
    for number in 0..AGAIN {
        let name = format!("added-{number}");
        // The pod is an object only; its network is this bench's business. As one more replica of
        // an application it has an identity that exists.
        let pod = cluster.create_pod(&name, "bystander", "palisade-bench").await?;
        let namespace = Namespace::create(&format!("palisade-bench-pod-{number}"))?;
        let plugin = Plugin {
            cluster_node: cluster.node.netns_path(),
            socket: cluster.layout.cni_socket(&cluster.node),
            uid: pod.metadata.uid.context("a pod without a uid")?,
            netns: namespace.0.clone(),
            pod: name,
        };
        times.push(blocking(move || plugin.measure_add()).await?.as_secs_f64() * 1e3);
    }
    Ok(Row::new("CNI ADD", median(&mut times), "ms").goal(Goal::AtMost(20.0)))
}

/// A network namespace that goes with this value.
struct Namespace(String);

impl Namespace {
    fn create(name: &str) -> Result<Self> {
        netns::remove(name)?;
        netns::create(name)?;
        Ok(Self(name.to_owned()))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = netns::remove(&self.0) {
            eprintln!("bench: network namespace {}: {error}", self.0);
        }
    }
}

struct Plugin {
    cluster_node: std::path::PathBuf,
    socket: std::path::PathBuf,
    uid: String,
    netns: String,
    pod: String,
}

impl Plugin {
    fn measure_add(&self) -> Result<Duration> {
        let begun = Instant::now();
        self.call("ADD")?;
        let took = begun.elapsed();
        self.call("DEL")?;
        Ok(took)
    }

    fn call(&self, command: &str) -> Result<()> {
        let this = std::env::current_exe()?;
        let plugin = this.with_file_name("palisade-cni");
        let mut child = Command::new(&this)
            .arg("netns-exec")
            .arg(&self.cluster_node)
            .arg("--")
            .arg(&plugin)
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &self.netns)
            .env("CNI_NETNS", netns::path(&self.netns))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", plugin.parent().context("no directory")?)
            .env(
                "CNI_ARGS",
                format!(
                    "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={};K8S_POD_UID={}",
                    self.pod, self.uid
                ),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let configuration = json!({
            "cniVersion": "1.1.0",
            "name": "palisade",
            "type": "palisade-cni",
            "agentSocket": self.socket,
        });
        let mut stdin = child.stdin.take().context("no pipe to the plugin")?;
        stdin.write_all(configuration.to_string().as_bytes())?;
        drop(stdin);
        let output = child.wait_with_output()?;
        if output.status.success() {
            return Ok(());
        }
        bail!("CNI {command}: {}", String::from_utf8_lossy(&output.stdout))
    }
}

/// Milliseconds from the API server's answer to a new policy until connections to the
/// [server](serve) fail.
pub(super) async fn denied(cluster: &Cluster, pods: &Pods) -> Result<f64> {
    let mut times = Vec::new();
    let path = pods.path();
    let before = cluster.status().context("the agent does not answer")?.policies;
    for _ in 0..AGAIN {
        let knocking = Knocking::start(path.clone())?;
        cluster
            .apply_policy("closed", json!({"podSelector": {"matchLabels": {"app": "server"}}}))
            .await?;
        let answered = Instant::now();
        let failed = blocking(move || knocking.until_denied()).await?;
        times.push(failed.saturating_duration_since(answered).as_secs_f64() * 1e3);
        cluster.delete_policy("closed").await?;
        let gone = |now: &Status| now.ready && now.policies == before;
        cluster.await_status("the policy is gone", gone).await?;
    }
    Ok(median(&mut times))
}

/// Accepts connections as long as this process lives.
pub(super) fn serve(path: &Path) -> Result<()> {
    let listener =
        netns::run_in(&path.server, || TcpListener::bind((Ipv4Addr::UNSPECIFIED, KNOCKED)))?;
    thread::spawn(move || listener.incoming().take_while(Result::is_ok).for_each(drop));
    Ok(())
}

/// Connects without pause.
struct Knocking {
    over: Arc<AtomicBool>,
    client: thread::JoinHandle<std::io::Result<Instant>>,
}

impl Knocking {
    fn start(path: Path) -> Result<Self> {
        let to = SocketAddr::new(path.address, KNOCKED);
        netns::run_in(&path.client, move || TcpStream::connect_timeout(&to, SOON))
            .context("the pods do not reach each other without a policy")?;
        let over = Arc::new(AtomicBool::new(false));
        let stop = over.clone();
        let client = thread::spawn(move || {
            netns::run_in(&path.client, move || {
                while !stop.load(Relaxed) {
                    let begun = Instant::now();
                    if TcpStream::connect_timeout(&to, CONNECT).is_err() {
                        return Ok(begun);
                    }
                }
                Err(std::io::Error::other("connections never failed"))
            })
        });
        Ok(Self { over, client })
    }

    /// When the first connection that failed began.
    fn until_denied(self) -> Result<Instant> {
        let begun = Instant::now();
        while !self.client.is_finished() && begun.elapsed() < SOON {
            thread::sleep(Duration::from_millis(1));
        }
        self.over.store(true, Relaxed);
        let failed = self.client.join();
        Ok(failed.map_err(|_| anyhow::anyhow!("a client of the bench panicked"))??)
    }
}
