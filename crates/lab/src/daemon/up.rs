//! `up`: starts the daemon and waits until the cluster can be used.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, bail};

use super::{Options, Progress, down, report};
use crate::layout::Layout;
use crate::sys::require;

/// Programs that must lie beside this one.
const COMPANIONS: [&str; 3] = ["palisade-agent", "palisade-proxy", "palisade-cni"];

/// Brings a lab up.
pub fn up(options: &Options, foreground: bool, json: bool) -> anyhow::Result<ExitCode> {
    let cgroups = require::check()?;
    let layout = Layout::default();
    if let Some(pid) = report::running(&layout)? {
        bail!(
            "a lab is running already (process {pid}). Use it with\n  export KUBECONFIG={}\nor end \
             it with\n  palisade lab down",
            layout.kubeconfig().display()
        );
    }
    companions()?;
    let options = &Options { data: options.data.as_deref().map(data).transpose()?, ..*options };
    if down::leftovers(&layout, &cgroups) {
        eprintln!("cleaning up after a lab that did not end properly");
        down::clean(&layout, &cgroups)?;
    }
    prepare(&layout)?;
    if foreground {
        return super::serve(options);
    }
    detached(options, &layout, json)
}

/// The directory for the cluster's objects, whole and existing.
fn data(directory: &Path) -> anyhow::Result<PathBuf> {
    if directory.exists() && !directory.is_dir() {
        bail!(
            "--data {}: this is no directory; name one, or a path that is free",
            directory.display()
        );
    }
    fs::create_dir_all(directory)
        .with_context(|| format!("--data: cannot create {}", directory.display()))?;
    Ok(directory.canonicalize()?)
}

fn companions() -> anyhow::Result<()> {
    let program = std::env::current_exe().context("cannot find this program's own path")?;
    for name in COMPANIONS {
        let path = program.with_file_name(name);
        if !path.is_file() {
            bail!("{} is missing; build everything with `make build`", path.display());
        }
    }
    Ok(())
}

fn prepare(layout: &Layout) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    // Keys lie in here. The proxies, which are nobody, find their own directories all the same.
    let directories =
        [(layout.run_dir().to_owned(), 0o711), (layout.logs(), 0o700), (layout.pods(), 0o700)];
    for (directory, mode) in directories {
        fs::create_dir_all(&directory)
            .and_then(|()| fs::set_permissions(&directory, fs::Permissions::from_mode(mode)))
            .with_context(|| format!("cannot create {}", directory.display()))?;
    }
    Ok(())
}

fn detached(options: &Options, layout: &Layout, json: bool) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let log = File::create(layout.daemon_log())?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("daemon").args(["--nodes", &options.nodes.to_string()]);
    command.args(["--routing", &options.routing.to_string()]);
    command.args(["--masquerade", &options.masquerade.to_string()]);
    if let Some(data) = &options.data {
        command.arg("--data").arg(data);
    }
    if let Some(port) = options.api_port {
        command.args(["--api-port", &port.to_string()]);
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .current_dir("/")
        .process_group(0)
        .spawn()
        .context("cannot start the lab's daemon")?;
    let stdout = child.stdout.take().context("no pipe to the daemon")?;
    for line in BufReader::new(stdout).lines() {
        match serde_json::from_str(&line?)? {
            Progress::Done(what) => {
                // With --output json, standard output is for the answer.
                let line = format!("  {what} ({:.1} s)", started.elapsed().as_secs_f64());
                if json {
                    eprintln!("{line}");
                } else {
                    println!("{line}");
                    std::io::stdout().flush()?;
                }
            }
            Progress::Ready => {
                greet(layout, started, json);
                return Ok(ExitCode::SUCCESS);
            }
            Progress::Failed(why) => {
                // It takes its half-built lab down before it ends.
                let _ = child.wait();
                bail!("{why}");
            }
        }
    }
    let status = child.wait()?;
    bail!("the lab's daemon ended ({status}); its log: {}", layout.daemon_log().display())
}

fn greet(layout: &Layout, started: Instant, json: bool) {
    if json {
        let seconds = started.elapsed().as_secs_f64();
        let answer = serde_json::json!({
            "running": true, "kubeconfig": layout.kubeconfig(), "seconds": seconds,
        });
        println!("{answer}");
        return;
    }
    println!(
        "The lab is up after {:.1} s. Next:\n  export KUBECONFIG={}\n  kubectl get nodes\n\
         End it with: palisade lab down",
        started.elapsed().as_secs_f64(),
        layout.kubeconfig().display()
    );
}
