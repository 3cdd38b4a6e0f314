//! Steps 1 to 6 of the walk-through, with the real kubectl.

use std::{
    env,
    io::Write,
    process::{Command, Output, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::{
    cli::StarwarsArgs,
    exit::{Exit, Failure},
};

const APP: &str = include_str!("../../../../examples/starwars/app.yaml");
const NATIVE: &str = include_str!("../../../../examples/starwars/native/networkpolicy.yaml");
const L4: &str = include_str!("../../../../examples/starwars/cilium/networkpolicy-L4.yaml");
const LAND: &str = "deathstar.default.svc.cluster.local/v1/request-landing";
const EXHAUST: &str = "deathstar.default.svc.cluster.local/v1/exhaust-port";

/// Brings a lab up, runs the steps and takes the lab down, whatever came of them.
pub(crate) fn run(args: &StarwarsArgs) -> Result<Exit> {
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::refused("the demo needs root", "Run it with sudo.").into());
    }
    if !args.use_running {
        lab(&["up", "--nodes", &args.nodes.to_string()])?;
    }
    let passed = walk();
    if !args.use_running && !args.keep {
        lab(&["down"])?;
    }
    Ok(if passed? { Exit::Ok } else { Exit::No })
}

fn walk() -> Result<bool> {
    let mut passed = true;
    apply(APP)?;
    must(&["rollout", "status", "deployment/deathstar", "--timeout=60s"])?;
    must(&["wait", "--for=condition=Ready", "pod/tiefighter", "pod/xwing", "--timeout=60s"])?;
    passed &= probe("1", "tiefighter", "-XPOST", LAND, Some("Ship landed"))?;
    passed &= probe("2", "xwing", "-XPOST", LAND, Some("Ship landed"))?;
    apply(NATIVE)?;
    passed &= probe("3", "tiefighter", "-XPOST", LAND, Some("Ship landed"))?;
    passed &= probe("4", "xwing", "-XPOST", LAND, None)?;
    passed &= probe("5", "tiefighter", "-XPUT", EXHAUST, Some("Panic: deathstar exploded"))?;
    must(&["rollout", "status", "deployment/deathstar", "--timeout=60s"])?;
    must(&["delete", "networkpolicy", "policy"])?;
    apply(L4)?;
    passed &= probe("6", "tiefighter", "-XPOST", LAND, Some("Ship landed"))?;
    passed &= probe("6", "xwing", "-XPOST", LAND, None)?;
    Ok(passed)
}

/// `expected` is part of the answer; `None` is curl's time-out, exit code 28.
fn probe(step: &str, pod: &str, method: &str, url: &str, expected: Option<&str>) -> Result<bool> {
    let args = ["exec", pod, "--", "curl", "-s", "--connect-timeout", "2", method, url];
    let output = kubectl(&args)?.stdin(Stdio::null()).output().context("kubectl cannot be run")?;
    let answer = String::from_utf8_lossy(&output.stdout);
    let passed = match expected {
        Some(text) => output.status.success() && answer.contains(text),
        None => output.status.code() == Some(28) && answer.is_empty(),
    };
    println!("{step}  $ kubectl {}", args.join(" "));
    show(&output);
    println!("   {}", if passed { "PASS" } else { "FAIL" });
    Ok(passed)
}

fn must(args: &[&str]) -> Result<()> {
    println!("$ kubectl {}", args.join(" "));
    let output = kubectl(args)?.stdin(Stdio::null()).output().context("kubectl cannot be run")?;
    show(&output);
    ensure!(output.status.success(), "kubectl {} ended with {}", args.join(" "), output.status);
    Ok(())
}

fn apply(manifest: &str) -> Result<()> {
    println!("$ kubectl apply -f -");
    let mut child = kubectl(&["apply", "-f", "-"])?
        .stdin(Stdio::piped())
        .spawn()
        .context("kubectl cannot be run; install it with: make setup")?;
    child.stdin.take().context("kubectl has no input")?.write_all(manifest.as_bytes())?;
    let status = child.wait()?;
    ensure!(status.success(), "kubectl apply ended with {status}");
    Ok(())
}

fn show(output: &Output) {
    for text in [&output.stdout, &output.stderr] {
        for line in String::from_utf8_lossy(text).lines() {
            println!("   {line}");
        }
    }
}

fn kubectl(args: &[&str]) -> Result<Command> {
    let output = lab_command()?.arg("kubeconfig").output().context("palisade-lab cannot be run")?;
    ensure!(output.status.success(), "no lab is running");
    let mut command = Command::new("kubectl");
    command.args(args).env("KUBECONFIG", String::from_utf8(output.stdout)?.trim());
    Ok(command)
}

fn lab(args: &[&str]) -> Result<()> {
    let status = lab_command()?.args(args).status().context("palisade-lab cannot be run")?;
    ensure!(status.success(), "palisade lab {} ended with {status}", args.join(" "));
    Ok(())
}

fn lab_command() -> Result<Command> {
    let this = env::current_exe().context("this program's own path cannot be found")?;
    Ok(Command::new(this.with_file_name("palisade-lab")))
}
