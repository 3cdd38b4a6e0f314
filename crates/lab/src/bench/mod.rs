//! Measures what Palisade costs, beside a bare veth pair, a routed one and an nftables rule set
//! of the same meaning, and beside Envoy where that is installed, all in one run on one machine.

mod cluster;
mod control;
mod dns;
mod l7;
mod load;
mod paths;
mod programs;
mod report;
mod scale;

use std::process::ExitCode;

use anyhow::{Result, anyhow, bail};
use tokio::signal::unix::{SignalKind, signal};

use self::{
    cluster::Cluster,
    paths::Baselines,
    report::{Goal, Report, Row},
};

/// What to measure, and how often.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Options {
    /// Rounds of the data path's comparison; each takes about ten seconds
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u16).range(1..=100))]
    pub rounds: u16,
}

/// Brings a lab up, measures, takes it down, and prints a table or JSON.
///
/// # Errors
/// A lab is running already, or something of the set-up failed.
pub fn run(options: Options, json: bool) -> Result<ExitCode> {
    if !rustix::process::geteuid().is_root() {
        bail!("the bench needs root; run it with sudo");
    }
    if cfg!(debug_assertions) {
        eprintln!("warning: this is a development build; for figures that count:  make bench");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut report = Report::default();
    let measured = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        // What was set up is taken down when the future is dropped, an interrupt included.
        tokio::select! {
            measured = measure(options, &mut report) => measured,
            _ = interrupt.recv() => Err(anyhow!("interrupted")),
            _ = terminate.recv() => Err(anyhow!("terminated")),
        }
    });
    runtime.shutdown_background();
    // What was measured before something failed is as good.
    report.print(json)?;
    measured?;
    Ok(ExitCode::SUCCESS)
}

async fn measure(options: Options, report: &mut Report) -> Result<()> {
    progress("bringing a lab up");
    let cluster = Cluster::up().await?;
    let baselines = Baselines::build()?;
    let pods = cluster.start_pods().await?;

    progress("agent");
    report.extend(control::agent(&cluster).await?);
    progress("CNI ADD");
    report.push(control::cni_add(&cluster).await?);
    progress("policy change");
    control::serve(&pods.path())?;
    let denied = control::denied(&cluster, &pods).await?;
    report.push(
        Row::new("policy written, until a connection is denied", denied, "ms")
            .goal(Goal::AtMost(10.0)),
    );

    cluster.restrict(&pods).await?;
    progress("eBPF time");
    report.extend(
        blocking({
            let path = pods.path();
            move || programs::measure(&path)
        })
        .await?,
    );
    progress("L7 policy");
    cluster.rule_http().await?;
    report.extend(l7::measure(&cluster, &pods).await?);
    progress("DNS policy");
    cluster.rule_dns().await?;
    report.extend(dns::measure(&cluster, &pods).await?);
    for round in 1..=options.rounds {
        progress(&format!("data path, round {round} of {}", options.rounds));
        let paths = baselines.paths(pods.path());
        report.round(blocking(move || load::round(&paths, round)).await?);
    }
    drop((baselines, cluster));
    progress("a large cluster");
    scale::measure(report).await
}

/// Measuring blocks its thread, and starts threads in other network namespaces.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await?
}

fn progress(what: &str) {
    eprintln!("bench: {what}");
}
