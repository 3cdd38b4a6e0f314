//! The daemon itself: puts the parts together and keeps them running until it is told to end.

use std::fs::{self, File};
use std::future::Future;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Node;
use kube::api::ListParams;
use kube::runtime::wait::await_condition;
use kube::{Api, Client, Config, ResourceExt};
use rustix::fs::{FlockOperation, flock};
use rustix::mount::MountFlags;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};

use super::report::{NodeReport, Report};
use super::{Options, Progress, Undo, down};
use crate::apiserver::{ApiServer, ApiServerConfig};
use crate::controllers::{self, Cluster};
use crate::layout::{API_PORT, FABRIC_V4, FABRIC_V6, Layout, NETNS_DIR, NodePlan};
use crate::nodes::{Keeper, Program};
use crate::runner::{Runner, Settings};
use crate::sys::{cgroup, mounts, require};
use crate::{fabric, runtime};

/// How long each step of coming up may take.
const API_TIMEOUT: Duration = Duration::from_secs(20);
const NODES_TIMEOUT: Duration = Duration::from_secs(60);
const DNS_TIMEOUT: Duration = Duration::from_secs(60);

/// Runs the lab until it is told to end; takes everything down before it returns.
pub fn serve(options: &Options) -> anyhow::Result<ExitCode> {
    let cgroups = require::check()?;
    let layout = Layout::default();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| "info,kube=warn".into()),
        )
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    // A daemon of its own session does not end with the terminal; in the foreground this fails,
    // and should.
    let _ = rustix::process::setsid();
    let lock = lock(&layout)?;
    let runtime = tokio::runtime::Runtime::new()?;
    let outcome = runtime.block_on(run(options, &layout, &cgroups));
    runtime.shutdown_timeout(Duration::from_secs(2));
    if let Err(error) = &outcome {
        tracing::error!("{error:#}");
        // The log goes with the run directory; what matters is kept where people look.
        let kept = keep_logs(&layout);
        drop(lock);
        let cleaned = down::clean(&layout, &cgroups);
        let mut why = format!("{error:#}");
        if let Some(kept) = kept {
            why.push_str(&format!("\nThe logs are kept in {}", kept.display()));
        }
        if let Err(error) = cleaned {
            why.push_str(&format!("\nCleaning up: {error:#}"));
        }
        tell(&Progress::Failed(why));
        return Ok(ExitCode::FAILURE);
    }
    drop(lock);
    down::clean(&layout, &cgroups)?;
    Ok(ExitCode::SUCCESS)
}

fn lock(layout: &Layout) -> anyhow::Result<File> {
    fs::create_dir_all(layout.logs())?;
    // Who may not read it is told that labs are root's.
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(layout.pid_file())?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)
        .context("another lab is being started at this moment")?;
    file.set_len(0)?;
    file.write_all(std::process::id().to_string().as_bytes())?;
    Ok(file)
}

fn keep_logs(layout: &Layout) -> Option<PathBuf> {
    let kept = std::env::temp_dir().join(format!("palisade-lab-failed-{}", std::process::id()));
    fs::create_dir_all(&kept).ok()?;
    for entry in fs::read_dir(layout.logs()).ok()?.flatten() {
        fs::copy(entry.path(), kept.join(entry.file_name())).ok()?;
    }
    Some(kept)
}

/// Tells `up`. Nobody listens once it has ended, or in the foreground; that is no error.
fn tell(progress: &Progress) {
    if let Ok(line) = serde_json::to_string(progress) {
        let _ = writeln!(std::io::stdout(), "{line}");
        let _ = std::io::stdout().flush();
    }
}

fn done(what: impl Into<String>) {
    let what = what.into();
    tracing::info!("{what}");
    tell(&Progress::Done(what));
}

async fn run(options: &Options, layout: &Layout, cgroups: &Path) -> anyhow::Result<()> {
    let mut end = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let lab = async {
        let lab = Lab::start(options, layout, cgroups).await?;
        tell(&Progress::Ready);
        lab.attend().await
    };
    tokio::select! {
        result = lab => result,
        _ = end.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    }
}

struct Lab {
    layout: Layout,
    nodes: Vec<NodePlan>,
    runner: Arc<Runner>,
    client: Client,
    api_url: String,
    data: Option<PathBuf>,
    started: Instant,
    controllers: tokio::task::JoinHandle<anyhow::Result<()>>,
}

impl Lab {
    async fn start(options: &Options, layout: &Layout, cgroups: &Path) -> anyhow::Result<Self> {
        let started = Instant::now();
        let nodes = NodePlan::all(options.nodes);
        mount_what_is_missing(layout)?;
        let cgroup = down::cgroup_base(cgroups);
        cgroup::create(&cgroup).context("cannot create the lab's control group")?;
        let plans = nodes.clone();
        tokio::task::spawn_blocking(move || fabric::create(&plans)).await??;
        done(format!("fabric and {} up", count(nodes.len(), "node")));
        let beside = std::env::current_exe()?;
        let runner = Runner::new(Settings {
            layout: layout.clone(),
            cgroup: cgroup.clone(),
            cni_plugin: beside.with_file_name("palisade-cni"),
            nodes: nodes.clone(),
        });
        let (server, api_url) = start_api(options, layout, Arc::clone(&runner) as _).await?;
        let client = client(&server.kubeconfig(&api_url)).await?;
        bounded("the API server", API_TIMEOUT, layout, async {
            client.apiserver_version().await?;
            let kubeconfig_dir =
                layout.node_kubeconfig().parent().unwrap_or(Path::new("/")).to_owned();
            controllers::bootstrap(&client, &Cluster { nodes: nodes.clone(), kubeconfig_dir }).await
        })
        .await?;
        done(format!("API server at {api_url}"));
        for node in &nodes {
            let keeper = Keeper {
                node: node.clone(),
                layout: layout.clone(),
                cgroup: cgroup.clone(),
                programs: beside.parent().unwrap_or(Path::new("/")).to_owned(),
                routing: options.routing,
                masquerade: options.masquerade,
            };
            for program in Program::ALL {
                let keeper = keeper.clone();
                tokio::spawn(async move { keeper.keep(program).await });
            }
            let client = client.clone();
            tokio::spawn(async move { keeper.keep_status(&client).await });
        }
        let controllers = tokio::spawn(controllers::run(client.clone(), server.ca().to_owned()));
        tokio::spawn(Arc::clone(&runner).run(client.clone()));
        bounded("the nodes' agents", NODES_TIMEOUT, layout, wait_nodes(&client, &nodes)).await?;
        done(format!("{} ready", count(nodes.len(), "node")));
        bounded("the cluster's DNS", DNS_TIMEOUT, layout, wait_dns(&client)).await?;
        done("cluster DNS ready");
        Ok(Self {
            layout: layout.clone(),
            nodes,
            runner,
            client,
            api_url,
            data: options.data.clone(),
            started,
            controllers,
        })
    }

    /// Answers `status` until the lab ends.
    async fn attend(mut self) -> anyhow::Result<()> {
        let socket = self.layout.socket();
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket)?;
        loop {
            let mut stream = tokio::select! {
                accepted = listener.accept() => accepted?.0,
                ended = &mut self.controllers => {
                    ended??;
                    bail!("the controllers have ended");
                }
            };
            let report = serde_json::to_vec(&self.report().await)?;
            // Somebody who asked and left needs no answer.
            let _ = stream.write_all(&report).await;
        }
    }

    async fn report(&self) -> Report {
        let api = Api::<Node>::all(self.client.clone());
        let objects = api.list(&ListParams::default()).await.map(|list| list.items);
        let objects = objects.unwrap_or_default();
        let nodes = self.nodes.iter().map(|node| NodeReport {
            name: node.name.clone(),
            ready: objects.iter().any(|object| object.name_any() == node.name && ready(object)),
            netns: node.netns(),
            addresses: node.addresses().to_vec(),
            pod_cidrs: vec![node.pods_v4().to_string(), node.pods_v6().to_string()],
        });
        Report {
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: self.started.elapsed().as_secs(),
            api: self.api_url.clone(),
            kubeconfig: self.layout.kubeconfig(),
            logs: self.layout.logs(),
            data: self.data.clone(),
            pods: self.runner.len(),
            nodes: nodes.collect(),
        }
    }
}

fn count(number: usize, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}

/// A step that must not take for ever, and says where to look when it does.
async fn bounded<T>(
    what: &str,
    limit: Duration,
    layout: &Layout,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result.map_err(plain).with_context(|| format!("starting {what}")),
        Err(_) => {
            let problem = last_problem(layout).unwrap_or_default();
            bail!("{what} did not get ready within {} s{problem}", limit.as_secs())
        }
    }
}

/// What the API server said is a sentence; the error around it shows every field of its answer.
fn plain(error: anyhow::Error) -> anyhow::Error {
    match error.downcast_ref::<kube::Error>() {
        Some(kube::Error::Api(status)) => anyhow::anyhow!("{}", status.message),
        _ => error,
    }
}

/// The last line of an agent's log often says it all.
fn last_problem(layout: &Layout) -> Option<String> {
    let log = fs::read_to_string(layout.log(&NodePlan::new(1), Program::Agent)).ok()?;
    log.lines().last().map(|line| format!("; the agent's last words: {line}"))
}

/// Mounts the bpf file system where it is missing, and writes down what is to be undone.
fn mount_what_is_missing(layout: &Layout) -> anyhow::Result<()> {
    let root = layout.bpffs_root();
    let undo = Undo {
        bpffs: mounts::kind_at(root)?.as_deref() != Some("bpf"),
        netns_mount: mounts::kind_at(Path::new(NETNS_DIR))?.is_none(),
        netns_dir: !Path::new(NETNS_DIR).exists(),
    };
    fs::write(layout.undo_file(), serde_json::to_vec(&undo)?)?;
    if undo.bpffs {
        rustix::mount::mount("bpf", root, "bpf", MountFlags::empty(), Some(c"mode=0700"))
            .with_context(|| format!("cannot mount a bpf file system on {}", root.display()))?;
    }
    Ok(())
}

async fn start_api(
    options: &Options,
    layout: &Layout,
    runtime: Arc<dyn runtime::PodRuntime>,
) -> anyhow::Result<(ApiServer, String)> {
    let local = local_listener(options.api_port)?;
    let url = format!("https://{}", local.local_addr()?);
    let config = ApiServerConfig {
        data: options.data.as_ref().map(|directory| directory.join("cluster.redb")),
        certificate_names: vec![FABRIC_V4.to_string(), FABRIC_V6.to_string()],
        crds: palisade_api::crd::all(),
        runtime,
    };
    let server = tokio::task::spawn_blocking(move || ApiServer::new(config)).await??;
    server.serve(local);
    for listener in tokio::task::spawn_blocking(fabric::listen).await?? {
        server.serve(listener);
    }
    write_private(&layout.kubeconfig(), &server.kubeconfig(&url))?;
    let inside = format!("https://{}:{API_PORT}", IpAddr::from(FABRIC_V4));
    write_private(&layout.node_kubeconfig(), &server.kubeconfig(&inside))?;
    Ok((server, url))
}

fn local_listener(wanted: Option<u16>) -> anyhow::Result<TcpListener> {
    match TcpListener::bind((Ipv4Addr::LOCALHOST, wanted.unwrap_or(API_PORT))) {
        Ok(listener) => Ok(listener),
        Err(_) if wanted.is_none() => Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?),
        Err(error) => Err(error).with_context(|| {
            let port = wanted.unwrap_or(API_PORT);
            format!("cannot listen on 127.0.0.1:{port}; choose another --api-port, or leave it out")
        }),
    }
}

fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let _ = fs::remove_file(path);
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}

async fn client(kubeconfig: &str) -> anyhow::Result<Client> {
    let kubeconfig = kube::config::Kubeconfig::from_yaml(kubeconfig)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &Default::default()).await?;
    Ok(Client::try_from(config)?)
}

fn ready(node: &Node) -> bool {
    node.status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten())
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

async fn wait_nodes(client: &Client, nodes: &[NodePlan]) -> anyhow::Result<()> {
    for node in nodes {
        let api = Api::<Node>::all(client.clone());
        let is_ready = |node: Option<&Node>| node.is_some_and(ready);
        await_condition(api, &node.name, is_ready).await?;
    }
    Ok(())
}

async fn wait_dns(client: &Client) -> anyhow::Result<()> {
    let api = Api::<Deployment>::namespaced(client.clone(), "kube-system");
    let available = |deployment: Option<&Deployment>| {
        deployment
            .and_then(|deployment| deployment.status.as_ref()?.available_replicas)
            .is_some_and(|replicas| replicas > 0)
    };
    await_condition(api, "kube-dns", available).await?;
    Ok(())
}
