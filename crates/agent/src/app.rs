//! The wiring.

use std::{
    convert::Infallible,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::Parser;
use palisade_api::{
    client,
    routing::{self, Routing},
    secrets, settings,
};
use palisade_datapath::{
    Config as DatapathConfig, Datapath, Side,
    netlink::{Netlink, SettingChange},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    task::JoinSet,
};
use tracing::{info, warn};

use crate::{
    admin::{self, Admin, Readiness},
    cni::{self, Attachments, Endpoints, NewEndpoint, Phase, Server, Settings},
    endpoints::{self, Health, Lifecycle, NodeLinks, Succession},
    engine::{Engine, Outputs, Progress, Rounds},
    fqdn::Names,
    ipam::Ipam,
    masquerade::{self, Masquerade},
    memory,
    observer::{Namer, Observer},
    overlay::{self, Overlay},
    proxy::{self, Desk, ProxyLink},
    publish,
    reconcile::{Reconciler, Ways},
    reflect,
    resolve::{LastGood, Resolver, Scope},
    tables::{
        TablesReader, TablesWriter,
        nodes::{Node, Surroundings},
    },
};

/// Events that may wait for the engine before their senders do.
const QUEUE: usize = 4096;
/// How long other tables may lack what the kernel refuses before they are taken as they are.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is wrong while pods wait for it.
const UPLINK: &str = "the uplink";

/// Connects, isolates and watches the pods of one node.
#[derive(Debug, Parser)]
#[command(name = "palisade-agent", version)]
pub struct Options {
    /// Name of the node.
    #[arg(long, env = "PALISADE_AGENT_NODE_NAME")]
    pub node_name: String,
    /// How to reach the API server; by default with the service account of the pod that this
    /// runs in.
    #[arg(long, env = "PALISADE_AGENT_KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// Directory of the sockets.
    #[arg(long, env = "PALISADE_AGENT_RUN_DIR")]
    pub run_dir: PathBuf,
    /// Directory of records that outlive the agent.
    #[arg(long, env = "PALISADE_AGENT_STATE_DIR")]
    pub state_dir: PathBuf,
    /// Directory in a bpffs, of this node alone.
    #[arg(long, env = "PALISADE_AGENT_BPFFS")]
    pub bpffs: PathBuf,
    /// cgroup v2 directory of the node's pods.
    #[arg(long, env = "PALISADE_AGENT_CGROUP")]
    pub cgroup: PathBuf,
    /// Name of the cluster.
    #[arg(long, env = "PALISADE_AGENT_CLUSTER_NAME", default_value = "default")]
    pub cluster_name: String,
    /// The one namespace whose Secrets policies may refer to: the agent needs no rights on others.
    #[arg(long, env = "PALISADE_AGENT_SECRETS_NAMESPACE", default_value = secrets::NAMESPACE)]
    pub secrets_namespace: String,
    /// Interface to the other nodes, and to what is outside the cluster.
    #[arg(long, env = "PALISADE_AGENT_UPLINK")]
    pub uplink: Option<String>,
    /// How pods of different nodes reach each other: `native` or `overlay`.
    #[arg(long, env = "PALISADE_AGENT_ROUTING", default_value_t)]
    pub routing: Routing,
    /// Whether pods reach what is outside the cluster with their node's address: `auto` (with an
    /// overlay), `always` or `never`.
    #[arg(long, env = "PALISADE_AGENT_MASQUERADE", default_value_t)]
    pub masquerade: routing::Masquerade,
}

/// Runs the agent until it is told to stop. Programs and tables stay as they are then.
///
/// # Errors
/// Something that the agent cannot work without is missing.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let begun = Instant::now();
    let made = |directory: &Path| {
        let made = std::fs::create_dir_all(directory);
        made.with_context(|| format!("cannot make {}", directory.display()))
    };
    made(&options.run_dir)?;
    if let Err(error) = made(&options.state_dir) {
        warn!("{error:#}: nothing is recorded until it is there");
    }
    let client = client::client(options.kubeconfig.as_deref()).await?;

    // The kernel.
    let datapath = Arc::new(Datapath::open(&DatapathConfig {
        bpffs: options.bpffs.clone(),
        cgroup: options.cgroup.clone(),
    })?);
    let netlink = Netlink::current()?;
    let masquerades = options.masquerade.applies(options.routing);
    let record = options.state_dir.join(settings::FILE);
    // Before the node's own connections of this process get ports.
    netlink
        .prepare_node(masquerades, move |changes| {
            if let Err(error) = settings::record(&record, recorded_settings(changes)) {
                warn!(%error, "settings of the node are changed, and cannot be put back one day");
            }
        })
        .await?;
    netlink.steer_to_proxy().await?;
    let side = match options.routing {
        Routing::Native => Side::Uplink,
        Routing::Overlay => Side::Underlay,
    };
    let succession = if datapath.is_anew() {
        info!("the programs of before have tables of another layout: new ones are filled first");
        Succession::Later
    } else {
        Succession::AtOnce
    };
    if let Some(uplink) = options.uplink.as_deref().filter(|_| succession == Succession::AtOnce) {
        datapath.attach(uplink, side)?;
    }

    // Tables and the engine between them and the kernel.
    let scope = Scope {
        node: options.node_name.clone(),
        cluster: options.cluster_name.clone(),
        routing: options.routing,
    };
    let mut tables = TablesWriter::default();
    tables.write().secrets_namespace.clone_from(&options.secrets_namespace);
    let reader = tables.reader();
    let reconciler = Reconciler::new(datapath.kernel())?;
    let prefixes = reconciler.policy_prefixes().clone();
    let last_good = LastGood::open(options.state_dir.join("last-good-policies"))
        .context("cannot read the last good versions of policies")?;
    let resolver = Resolver::new(scope.clone(), prefixes).with_last_good(last_good);
    let (commands, queue) = mpsc::channel(QUEUE);
    let (progress_sender, progress) = watch::channel(Progress::default());
    let (surroundings_sender, surroundings) = watch::channel(Surroundings::default());
    let (publications, publication_queue) = mpsc::unbounded_channel();
    let health = Arc::new(Health::default());
    let proxy = Arc::new(ProxyLink::default());
    let rounds = Arc::new(Rounds::default());
    let outputs = Outputs {
        progress: progress_sender,
        surroundings: surroundings_sender,
        publications: publications.clone(),
        proxy: proxy.clone(),
        rounds: rounds.clone(),
    };
    let engine = Engine::new(tables, resolver, reconciler, outputs);
    let (retry, runtime) = (commands.downgrade(), tokio::runtime::Handle::current());
    std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || engine.run(queue, retry, &runtime))?;

    // What pods learned from DNS, before anything is taken back that follows from it.
    let names = Names::restore(
        &options.state_dir,
        reader.clone(),
        commands.clone(),
        progress.clone(),
        health.clone(),
        &*datapath,
    )
    .await
    .context("cannot take up the learned names")?;
    let names = Arc::new(names);

    // What feeds and follows them.
    let secrets = options.secrets_namespace.clone();
    let mut tasks: JoinSet<()> =
        reflect::follow_all(&client, &options.cluster_name, secrets, &commands);
    let (attempts_sender, attempts) = watch::channel(publish::Attempts::default());
    tasks.spawn(publish::run(
        client.clone(),
        scope.clone(),
        publication_queue,
        commands.downgrade(),
        attempts_sender,
    ));
    tasks.spawn(publish::keep_node(
        client,
        options.node_name.clone(),
        reader.clone(),
        progress.clone(),
    ));
    let namer = Namer::new(&options.node_name, reader.clone(), progress.clone());
    let observer = Arc::new(Observer::new(namer));
    tasks.spawn(observer.clone().run(datapath.events()?));
    tasks.spawn(collect_flows(datapath.clone(), observer.clone()));
    tasks.spawn(names.clone().keep(datapath.clone()));

    let desk = Arc::new(Desk {
        link: proxy.clone(),
        observer: observer.clone(),
        engine: commands.downgrade(),
        names,
    });
    tasks.spawn(proxy::serve(desk, proxy::listen(&options.run_dir)?));

    // Endpoints of before a restart get their programs before anything is waited for.
    let records = options.state_dir.join("attachments");
    let recorded = cni::recorded(records.clone(), &netlink)
        .await
        .map_err(|failure| anyhow::anyhow!("cannot read the records of pods: {failure:?}"))?;
    let outputs = endpoints::Outputs { commands, publications, health: health.clone() };
    let links = NodeLinks::new(datapath.clone(), netlink.clone());
    let recorded = recorded.iter().filter_map(recorded_endpoint).collect();
    let lifecycle =
        Lifecycle::restore(links, reader.clone(), progress.clone(), outputs, recorded, succession)
            .await?;
    let lifecycle = Arc::new(lifecycle);

    // Who asks gets an answer from here on.
    let socket = options.run_dir.join("cni.sock");
    let server = Arc::new(Server::new(socket.clone(), netlink.clone(), lifecycle.clone()));
    tasks.spawn(server.clone().serve(server.listen()?));
    let readiness = Readiness::new(begun, progress.clone(), server.attachments());
    let observed = readiness.clone().observe();
    tasks.spawn(async {
        observed.await;
        memory::give_back().await;
    });
    let admin = Arc::new(Admin {
        scope,
        begun,
        tables: reader.clone(),
        progress: progress.clone(),
        rounds,
        observer,
        datapath: datapath.clone(),
        proxy,
        health: health.clone(),
        readiness,
        attachments: server.attachments(),
        attempts,
    });
    tasks.spawn(admin::serve(admin, admin::listen(&options.run_dir)?));

    let open = async {
        if succession == Succession::Later {
            filled(&progress, PATIENCE).await;
            datapath.attach_sockets()?;
            if let Some(uplink) = &options.uplink {
                datapath.attach(uplink, side)?;
            }
            lifecycle.attach_all().await;
            datapath.taken_over()?;
        }
        let mut keeping = JoinSet::new();
        keeping.spawn(lifecycle.clone().guard());
        if let Some(uplink) = options.uplink.clone() {
            keeping.spawn(endpoints::guard_uplink(datapath.clone(), uplink, side, health.clone()));
        }
        // The node's own object says which addresses its pods have.
        let node = own_node(&reader, &options.node_name, &progress).await;
        let ipam = Ipam::new(&node.pod_cidrs)?;
        netlink.add_router_addresses(&ipam.routers()).await?;
        if masquerades {
            let uplink = match &options.uplink {
                Some(uplink) => uplink.clone(),
                None => {
                    let name = &options.node_name;
                    let tell = |missing| health.set(UPLINK, missing);
                    let uplink = masquerade::await_uplink(&netlink, &reader, name, tell).await;
                    health.clear(UPLINK);
                    uplink
                }
            };
            let (tables, name) = (reader.clone(), options.node_name.clone());
            let masquerade =
                Masquerade::new(datapath.clone(), netlink.clone(), tables, name, uplink.clone());
            masquerade.apply().await?;
            if options.uplink.is_none() {
                datapath.attach(&uplink, side)?;
                let datapath = datapath.clone();
                keeping.spawn(endpoints::guard_uplink(datapath, uplink, side, health.clone()));
            }
            keeping.spawn(masquerade.keep());
        } else {
            masquerade::end(&datapath)?;
            if options.uplink.is_none() && options.routing == Routing::Native {
                // Pods need not wait for it.
                let (datapath, health) = (datapath.clone(), health.clone());
                let (netlink, tables) = (netlink.clone(), reader.clone());
                let name = options.node_name.clone();
                keeping.spawn(async move {
                    let tell = |missing| warn!("{missing}");
                    let uplink = masquerade::await_uplink(&netlink, &tables, &name, tell).await;
                    answers_come_in_by(datapath, netlink, uplink, health).await;
                });
            }
        }
        let mtu = mtu(&netlink, &node, options.uplink.as_deref(), options.routing).await?;
        let ways = match options.routing {
            Routing::Native => {
                overlay::remove(&datapath, &netlink).await?;
                Ways::native(netlink.clone())
            }
            Routing::Overlay => {
                let overlay = Overlay::new(datapath, netlink.clone(), mtu);
                Ways::overlay(netlink.clone(), overlay)
            }
        };
        keeping.spawn(keep_ways(ways, surroundings, health));
        let settings = Settings { node: options.node_name.clone(), socket, records, mtu };
        let (attachments, restored) = Attachments::restore(settings, ipam, netlink)
            .await
            .map_err(|failure| anyhow::anyhow!("cannot restore the pods: {failure:?}"))?;
        for record in restored.gone {
            lifecycle.remove(&record.attachment).await?;
        }
        lifecycle.sweep().await;
        server.open(attachments);
        info!(node = options.node_name, "pods can be attached");
        anyhow::Ok(std::future::pending::<Infallible>().await)
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    tokio::select! {
        () = stop => {}
        opened = open => match opened? {},
    }
    info!("stopping; programs and tables stay in force");
    Ok(())
}

fn recorded_settings(changes: Vec<SettingChange>) -> settings::Changes {
    let recorded = |SettingChange { name, before, after }| {
        (name.to_owned(), settings::Change { before, after })
    };
    changes.into_iter().map(recorded).collect()
}

/// With native routing, servers of other nodes answer the proxy by the uplink. Without a program
/// there the stack would take the answers to the pod in whose name the proxy asked.
async fn answers_come_in_by(
    datapath: Arc<Datapath>,
    netlink: Netlink,
    uplink: String,
    health: Arc<Health>,
) {
    // The programs read Ethernet headers; tunnels have none.
    if !matches!(netlink.link(&uplink).await, Ok(Some(link)) if link.mac.is_some()) {
        return warn!(
            "{uplink} has no Ethernet address: requests by HTTP rules reach no other node"
        );
    }
    // What fails is told, and tried again, by who looks after it.
    _ = datapath.attach(&uplink, Side::Uplink);
    endpoints::guard_uplink(datapath, uplink, Side::Uplink, health).await;
}

/// Pods may send what the uplink can carry, less the envelope where there is one.
async fn mtu(
    netlink: &Netlink,
    node: &Node,
    uplink: Option<&str>,
    routing: Routing,
) -> anyhow::Result<u32> {
    /// What every Ethernet carries.
    const ETHERNET: u32 = 1500;
    let links = netlink.links().await?;
    let end = node.tunnel_end();
    let carries = match (uplink, end) {
        (Some(uplink), _) => {
            let found = links.iter().find(|link| link.name == uplink);
            found.with_context(|| format!("there is no interface {uplink}"))?.mtu
        }
        (None, Some(end)) => {
            let addresses = netlink.addresses().await?;
            let own = addresses.iter().find(|own| own.address.addr() == end);
            let found = own.and_then(|own| links.iter().find(|link| link.ifindex == own.ifindex));
            found.map_or(ETHERNET, |link| link.mtu)
        }
        (None, None) => ETHERNET,
    };
    Ok(match (routing, end) {
        (Routing::Overlay, Some(end)) => carries.saturating_sub(overlay::overhead(end)),
        _ => carries,
    })
}

/// Waits until the kernel's tables hold what follows from all inputs, for a while even where the
/// kernel refuses a part. That part stays closed; what was there before would stay open.
async fn filled(progress: &watch::Receiver<Progress>, patience: Duration) {
    let mut progress = progress.clone();
    if progress.wait_for(|progress| progress.told).await.is_err() {
        std::future::pending::<()>().await;
    }
    let synced = progress.wait_for(|progress| progress.synced);
    if tokio::time::timeout(patience, synced).await.is_err() {
        warn!("the kernel refuses a part of the tables, which stays closed");
    }
}

/// Waits for this node's object with pod networks.
async fn own_node(tables: &TablesReader, name: &str, progress: &watch::Receiver<Progress>) -> Node {
    let mut progress = progress.clone();
    loop {
        let node = tables.read().node(name).map(|node| (**node).clone());
        if let Some(node) = node.filter(|node| !node.pod_cidrs.is_empty()) {
            return node;
        }
        if progress.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

fn recorded_endpoint(record: &cni::Record) -> Option<(NewEndpoint, u32)> {
    match &record.phase {
        Phase::Committed(id) => Some((new_endpoint(record), *id)),
        _ => None,
    }
}

fn new_endpoint(record: &cni::Record) -> NewEndpoint {
    NewEndpoint {
        attachment: record.attachment.clone(),
        pod: record.pod.clone(),
        host: record.host.clone(),
        mac: record.mac,
        addresses: record.addresses,
        netns: record.netns.clone(),
    }
}

/// Follows what is wanted, and looks from time to time whether somebody undid it.
async fn keep_ways(
    ways: Ways,
    mut surroundings: watch::Receiver<Surroundings>,
    health: Arc<Health>,
) {
    const WAYS: &str = "the ways to other nodes";
    const LOOK: Duration = Duration::from_secs(5);
    const RETRY: Duration = Duration::from_secs(1);
    if surroundings.changed().await.is_err() {
        return;
    }
    loop {
        let wanted = surroundings.borrow_and_update().clone();
        let applied = ways.apply(&wanted).await;
        match &applied {
            Ok(()) => health.clear(WAYS),
            Err(error) => health.set(WAYS, format!("{WAYS} cannot be set: {error:#}")),
        }
        let pause = if applied.is_ok() { LOOK } else { RETRY };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            changed = surroundings.changed() => {
                if changed.is_err() {
                    return;
                }
            }
        }
    }
}

/// Expired flows go, and are told of.
async fn collect_flows(datapath: Arc<Datapath>, observer: Arc<Observer>) {
    let mut tick = tokio::time::interval(Duration::from_secs(5));
    loop {
        tick.tick().await;
        match tokio::task::block_in_place(|| datapath.collect_flows()) {
            Ok(stats) => observer.record(&stats.closed),
            Err(error) => warn!(%error, "cannot collect flows"),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn tables_are_awaited_as_long_as_inputs_are_missing_and_not_much_longer() {
        let (sender, progress) = watch::channel(Progress::default());
        let patience = Duration::from_millis(50);
        let mut waiting = std::pin::pin!(filled(&progress, patience));
        assert!(timeout(2 * patience, &mut waiting).await.is_err(), "nothing is known yet");
        sender.send_modify(|progress| progress.told = true);
        let told = Instant::now();
        waiting.await;
        assert!(told.elapsed() >= patience, "the kernel refuses a part");
        sender.send_modify(|progress| progress.synced = true);
        timeout(Duration::ZERO, filled(&progress, PATIENCE)).await.expect("all is there");
    }
}
