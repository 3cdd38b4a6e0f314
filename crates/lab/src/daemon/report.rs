//! `status`, and whether a lab runs at all.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::layout::Layout;

/// How a lab is.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) pid: u32,
    pub(super) version: String,
    pub(super) uptime_seconds: u64,
    pub(super) api: String,
    pub(super) kubeconfig: PathBuf,
    pub(super) logs: PathBuf,
    pub(super) data: Option<PathBuf>,
    pub(super) pods: usize,
    pub(super) nodes: Vec<NodeReport>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct NodeReport {
    pub(super) name: String,
    pub(super) ready: bool,
    pub(super) netns: String,
    pub(super) addresses: Vec<IpAddr>,
    pub(super) pod_cidrs: Vec<String>,
}

/// The process of the running lab. The lock tells, not the number: numbers are used again.
pub fn running(layout: &Layout) -> anyhow::Result<Option<u32>> {
    let mut file = match File::open(layout.pid_file()) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            bail!("labs are root's, and only root sees whether one is running: use sudo")
        }
        Err(error) => return Err(error).context(layout.pid_file().display().to_string()),
    };
    if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
        return Ok(None);
    }
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    // Not written yet by one that is just starting.
    Ok(Some(text.trim().parse().unwrap_or(0)))
}

/// Prints how the lab is.
pub fn status(json: bool) -> anyhow::Result<ExitCode> {
    let layout = Layout::default();
    let Some(pid) = running(&layout)? else {
        if json {
            say(&serde_json::json!({"running": false}).to_string())?;
        } else {
            say("No lab is running. Start one with: palisade lab up")?;
        }
        return Ok(super::NOT_RUNNING.into());
    };
    let mut stream = UnixStream::connect(layout.socket())
        .with_context(|| format!("the lab (process {pid}) does not answer"))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut text = String::new();
    stream.read_to_string(&mut text).context("the lab does not answer in time")?;
    let report: Report = serde_json::from_str(&text)?;
    if json {
        let mut value = serde_json::to_value(&report)?;
        value["running"] = true.into();
        say(&format!("{value:#}"))?;
    } else {
        say(&table(&report))?;
    }
    if report.nodes.iter().any(|node| !node.ready) {
        bail!("some nodes are not ready; see the agents' logs in {}", report.logs.display());
    }
    Ok(ExitCode::SUCCESS)
}

fn table(report: &Report) -> String {
    let Report { pid, version, uptime_seconds: up, .. } = report;
    let data = report.data.as_ref().map_or("in memory".into(), |data| data.to_string_lossy());
    let mut text = format!(
        "Lab:         running (process {pid}, version {version}, up {up} s)\n\
         API server:  {}\n\
         KUBECONFIG:  {}\n\
         Logs:        {}\n\
         Data:        {data}\n\
         Pods:        {}\n\n\
         {:8} {:9} {:28} POD CIDRS",
        report.api,
        report.kubeconfig.display(),
        report.logs.display(),
        report.pods,
        "NODE",
        "STATUS",
        "ADDRESSES",
    );
    for node in &report.nodes {
        let ready = if node.ready { "Ready" } else { "NotReady" };
        let addresses: Vec<_> = node.addresses.iter().map(IpAddr::to_string).collect();
        let (addresses, cidrs) = (addresses.join(", "), node.pod_cidrs.join(", "));
        text.push_str(&format!("\n{:8} {ready:9} {addresses:28} {cidrs}", node.name));
    }
    text
}

/// Who reads no further (`| head`) is no reason to fail.
fn say(text: &str) -> io::Result<()> {
    match writeln!(io::stdout(), "{text}") {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}
