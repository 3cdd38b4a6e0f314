//! The Star Wars walk-through: who may land on the death star, and what else they may do there.

use std::{env, ffi::OsString, path::PathBuf, thread, time::Duration};

use anyhow::{Context, Result, anyhow};
use serde_json::Value;
use tokio::sync::oneshot;

use super::{
    lab::Lab,
    machine::Machine,
    script::{Destination, Expect, Probe, Script, eventually},
};
use crate::{
    cli::{Global, StarwarsArgs},
    cluster,
    exit::{Exit, Failure},
    interrupt::Interrupt,
    output::{self, note},
};

const APP: (&str, &str) =
    ("examples/starwars/app.yaml", include_str!("../../../../examples/starwars/app.yaml"));
const NATIVE: (&str, &str) = (
    "examples/starwars/native/networkpolicy.yaml",
    include_str!("../../../../examples/starwars/native/networkpolicy.yaml"),
);
const L4: (&str, &str) = (
    "examples/starwars/cilium/networkpolicy-L4.yaml",
    include_str!("../../../../examples/starwars/cilium/networkpolicy-L4.yaml"),
);
const L7: (&str, &str) = (
    "examples/starwars/cilium/networkpolicy-L7.yaml",
    include_str!("../../../../examples/starwars/cilium/networkpolicy-L7.yaml"),
);
/// The namespace in a cluster that has other things to do.
const NAMESPACE: &str = "palisade-starwars";
const LANDED: Expect<'_> = Expect::Answer(&["Ship landed"]);
/// What the proxy says in place of the death star.
const FORBIDDEN: Expect<'_> = Expect::Answer(&["Access denied"]);
/// What the death star says when it dies.
const PANIC: Expect<'_> =
    Expect::Answer(&["Panic: deathstar exploded", "goroutine 1 [running]:", "main.go"]);
/// An agent says that the newest version of the policy is in force.
const VALID: [&str; 4] = ["wait", "--for=condition=Valid", "cnp/rule1", "--timeout=30s"];
/// So long a container that died may take to run again.
const RESTART: Duration = Duration::from_secs(30);

/// Where the paths are.
fn service(script: &Script) -> String {
    format!("deathstar.{}.svc.cluster.local", script.namespace())
}

/// Brings a cluster up, runs the steps, takes it down and looks whether the machine is as before.
pub(crate) fn run(global: &Global, args: &StarwarsArgs) -> Result<Exit> {
    output::for_people_only(global.output, "Leave -o json away.")?;
    if args.in_cluster {
        return in_cluster(global, args.keep);
    }
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::refused("the demo needs root", "Run it with sudo.").into());
    }
    let path = path_with_kubectl()?;
    let in_lab = move |kubeconfig| Destination {
        path,
        kubeconfig: Some(kubeconfig),
        context: None,
        namespace: None,
    };
    let lab = Lab::find()?;
    if args.use_running {
        let kubeconfig = lab.kubeconfig()?.ok_or_else(|| {
            Failure::unreachable("no lab is running", "Start one with:  palisade lab up")
        })?;
        return tell(&walk(Script::new(in_lab(kubeconfig)))?);
    }
    if lab.kubeconfig()?.is_some() {
        return Err(Failure::refused(
            "a lab is running already, and the demo wants one of its own",
            "End it with:  palisade lab down\nor use it:    palisade demo starwars --use-running",
        )
        .into());
    }

    let before = Machine::look();
    lab.up(args.nodes, args.routing)?;
    let kubeconfig = lab.kubeconfig()?.context("the lab went away")?;
    let script = Script::new(in_lab(kubeconfig));
    let walked = until_interrupted(move || walk(script));
    if args.keep {
        note!("\nThe lab stays up. End it with:  palisade lab down");
        return tell(&walked?);
    }
    note!("");
    lab.down()?;
    let mut script = walked?;
    script.title("The machine is as it was before");
    let differences = Machine::look().differences(&before);
    differences.iter().for_each(|difference| note!("{difference}"));
    script
        .verdict(differences.is_empty(), "links, routes, rules, firewall, mounts, cgroups, bpffs");
    tell(&script)
}

/// Runs the steps in a namespace of their own, and takes that away.
fn in_cluster(global: &Global, keep: bool) -> Result<Exit> {
    let cluster = Destination {
        path: path_with_kubectl()?,
        kubeconfig: cluster::chosen(global.kubeconfig.as_deref()),
        context: global.context.clone(),
        namespace: Some(NAMESPACE),
    };
    let outside = Script::new(Destination { namespace: None, ..cluster.clone() });
    outside.json(&["version"])?;
    if outside.succeeds(&["get", "namespace", NAMESPACE])? {
        return Err(Failure::refused(
            format!("there is a namespace {NAMESPACE} already"),
            format!("If nobody needs it:  kubectl delete namespace {NAMESPACE}"),
        )
        .into());
    }
    let mut script = Script::new(cluster);
    script.title("A namespace of their own");
    script.check(&["create", "namespace", NAMESPACE], Expect::Answer(&["created"]))?;
    if script.failed > 0 {
        return tell(&script);
    }
    let label = ["label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=baseline"];
    script.check(&label, Expect::Answer(&["labeled"]))?;
    let walked = until_interrupted(move || walk(script));
    if !keep {
        let mut outside = outside;
        outside.title("The namespace goes, and all that is in it");
        outside.check(&["delete", "namespace", NAMESPACE], Expect::Answer(&["deleted"]))?;
        let mut script = walked?;
        script.passed += outside.passed;
        script.failed += outside.failed;
        return tell(&script);
    }
    tell(&walked?)
}

fn tell(script: &Script) -> Result<Exit> {
    let all = script.passed + script.failed;
    note!("\n{} of {all} checks passed", script.passed);
    Ok(if script.failed == 0 { Exit::Ok } else { Exit::No })
}

/// Runs `work` on a thread of its own; an interrupt ends the wait for it, so that the caller can
/// clean up.
fn until_interrupted<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (sender, done) = oneshot::channel();
        // Nobody waits for the result of work that was interrupted.
        thread::spawn(move || drop(sender.send(work())));
        let done = async { done.await.map_err(|_| anyhow!("the walk-through panicked"))? };
        Interrupt::new()?.or(done).await
    })
}

/// `PATH`, with the directory that set-up puts `kubectl` into where it is not there otherwise.
fn path_with_kubectl() -> Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<PathBuf> = env::split_paths(&path).collect();
    directories.push(PathBuf::from(".tools/bin"));
    if directories.iter().any(|directory| directory.join("kubectl").is_file()) {
        return Ok(env::join_paths(directories)?);
    }
    Err(Failure::refused(
        "there is no kubectl",
        "Run 'make setup', or put kubectl into a directory of PATH.",
    )
    .into())
}

fn walk(mut script: Script) -> Result<Script> {
    deploy(&mut script)?;
    // Whatever follows would fail, and say nothing.
    if script.failed > 0 {
        return Ok(script);
    }
    without_policy(&mut script)?;
    with_network_policy(&mut script)?;
    with_cilium_policy(&mut script)?;
    with_http_policy(&mut script)?;
    Ok(script)
}

fn deploy(script: &mut Script) -> Result<()> {
    script.title("Two death stars behind a Service, an imperial ship, a rebel ship");
    script.apply(APP.0, APP.1)?;
    let ready = Expect::Answer(&["successfully rolled out"]);
    script.check(&["rollout", "status", "deployment/deathstar", "--timeout=180s"], ready)?;
    let met = Expect::Answer(&["tiefighter condition met", "xwing condition met"]);
    let pods = ["pod/tiefighter", "pod/xwing"];
    let ready = ["wait", "--for=condition=Ready", pods[0], pods[1], "--timeout=180s"];
    script.check(&ready, met)?;
    script.check(&["get", "pods", "-o", "wide"], Expect::Answer(&["tiefighter", "xwing"]))?;
    script.check(&["get", "svc"], Expect::Answer(&["deathstar"]))
}

fn without_policy(script: &mut Script) -> Result<()> {
    script.title("Step 1: without a policy the tiefighter may land");
    land(script, "tiefighter")?;
    script.title("Step 2: and so may the xwing");
    land(script, "xwing")?;
    sweep(script, LANDING, LANDED, LANDED)
}

fn with_network_policy(script: &mut Script) -> Result<()> {
    script.title("Step 3: a NetworkPolicy admits the empire's ships");
    script.apply(NATIVE.0, NATIVE.1)?;
    script.check(&["get", "netpol"], Expect::Answer(&["policy"]))?;
    land(script, "tiefighter")?;
    script.title("Step 4: and no others");
    rebel(script)?;
    sweep(script, LANDING, LANDED, Expect::NoAnswer)?;

    script.title("Step 5: L4 does not see what an imperial ship asks for");
    let before = restarts(script)?;
    let exhaust = format!("{}/v1/exhaust-port", service(script));
    script.check(&["exec", "tiefighter", "--", "curl", "-s", "-XPUT", &exhaust], PANIC)?;
    let restarted = eventually(RESTART, || Ok(restarts(script)? > before))?;
    script.verdict(restarted, "the death star died, and its container was started again");
    let ready = Expect::Answer(&["condition met"]);
    let pods = ["wait", "--for=condition=Ready", "pod", "-l", "class=deathstar", "--timeout=180s"];
    script.check(&pods, ready)
}

fn with_cilium_policy(script: &mut Script) -> Result<()> {
    script.title("Step 6: the same with a CiliumNetworkPolicy");
    script.check(&["delete", "networkpolicy", "policy"], Expect::Answer(&["deleted"]))?;
    script.apply(L4.0, L4.1)?;
    script.check(&["get", "cnp"], Expect::Answer(&["rule1"]))?;
    script.check(&VALID, Expect::Answer(&["condition met"]))?;
    script.check(&["describe", "cnp", "rule1"], Expect::Answer(&["Valid"]))?;
    land(script, "tiefighter")?;
    rebel(script)?;
    sweep(script, LANDING, LANDED, Expect::NoAnswer)
}

fn with_http_policy(script: &mut Script) -> Result<()> {
    script.title("Step 7: a policy on HTTP keeps the empire's ships away from the exhaust port");
    script.apply(L7.0, L7.1)?;
    script.check(&VALID, Expect::Answer(&["condition met"]))?;
    script.check(&["describe", "cnp", "rule1"], Expect::Answer(&["request-landing", "Valid"]))?;
    let before = restarts(script)?;
    let exhaust = format!("{}/v1/exhaust-port", service(script));
    script.check(&["exec", "tiefighter", "--", "curl", "-s", "-XPUT", &exhaust], FORBIDDEN)?;
    sweep(script, SABOTAGE, FORBIDDEN, Expect::NoAnswer)?;
    script.verdict(restarts(script)? == before, "the death star lives on");

    script.title("Step 8: they still land, and rebels still do not");
    land(script, "tiefighter")?;
    rebel(script)?;
    sweep(script, LANDING, LANDED, Expect::NoAnswer)
}

fn land(script: &mut Script, ship: &str) -> Result<()> {
    let url = format!("{}/v1/request-landing", service(script));
    script.check(&["exec", ship, "--", "curl", "-s", "-XPOST", &url], LANDED)
}

fn rebel(script: &mut Script) -> Result<()> {
    let url = format!("{}/v1/request-landing", service(script));
    let curl = ["curl", "-s", "--connect-timeout", "2", "-XPOST", &url];
    script.check(&[&["exec", "xwing", "--"], &curl[..]].concat(), Expect::NoAnswer)
}

/// How often the death stars' containers were started again, all together.
fn restarts(script: &Script) -> Result<u64> {
    let pods = script.json(&["get", "pods", "-l", "class=deathstar"])?;
    let statuses = items(&pods).flat_map(|pod| array(&pod["status"]["containerStatuses"]));
    Ok(statuses.filter_map(|status| status["restartCount"].as_u64()).sum())
}

/// A method and a path.
type Request = (&'static str, &'static str);
const LANDING: Request = ("POST", "/v1/request-landing");
const SABOTAGE: Request = ("PUT", "/v1/exhaust-port");

/// Asks from both ships each replica, each ClusterIP and the Service's name, IPv4 and IPv6.
fn sweep(
    script: &mut Script,
    request: Request,
    tiefighter: Expect<'_>,
    xwing: Expect<'_>,
) -> Result<()> {
    note!("every way to each replica:");
    let targets = targets(script)?;
    let probes: Vec<Probe<'_>> = [("tiefighter", tiefighter), ("xwing", xwing)]
        .into_iter()
        .flat_map(|(from, expect)| {
            targets.iter().map(move |(to, family, host)| Probe {
                from,
                to: to.clone(),
                curl: curl(family, host, request),
                expect,
            })
        })
        .collect();
    script.sweep(&probes)
}

fn curl(family: &str, host: &str, (method, path): Request) -> Vec<String> {
    let url = format!("http://{host}{path}");
    ["-s", "-g", family, "--connect-timeout", "2", "--max-time", "10", "-X", method, &url]
        .map(str::to_owned)
        .to_vec()
}

/// Where to land: for people, the family's flag of `curl`, and the host of the URL.
fn targets(script: &Script) -> Result<Vec<(String, &'static str, String)>> {
    let pods = script.json(&["get", "pods", "-l", "class=deathstar"])?;
    let service_object = script.json(&["get", "service", "deathstar"])?;
    let pods = items(&pods).flat_map(|pod| {
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        let addresses = array(&pod["status"]["podIPs"]).filter_map(|ip| ip["ip"].as_str());
        addresses.map(move |ip| (format!("{name} {ip}"), ip))
    });
    let cluster_ips: Vec<&str> =
        array(&service_object["spec"]["clusterIPs"]).filter_map(Value::as_str).collect();
    let services = cluster_ips.iter().map(|ip| (format!("ClusterIP {ip}"), *ip));
    let addresses = pods.chain(services).map(|(to, ip)| match ip.contains(':') {
        true => (to, "-6", format!("[{ip}]")),
        false => (to, "-4", ip.to_owned()),
    });
    let name = service(script);
    let names = cluster_ips.iter().map(|ip| {
        let (flag, family) = if ip.contains(':') { ("-6", "IPv6") } else { ("-4", "IPv4") };
        (format!("{name} {family}"), flag, name.clone())
    });
    Ok(addresses.chain(names).collect())
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    array(&list["items"])
}

fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}
