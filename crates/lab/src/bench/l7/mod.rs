//! What a rule on HTTP costs: requests through the L7 proxy beside the same requests without it,
//! and beside Envoy with the same rule where that is installed. Where nginx and wrk are, requests from
//! the one to the other as well.

mod envoy;
mod http;
mod nginx;
mod program;

use std::{net::SocketAddr, path::PathBuf, time::Instant};

use anyhow::{Context, Result};

use self::http::{Load, Protocol, Server};
use super::{
    blocking,
    cluster::{Cluster, Pods},
    control::{cpu_time, resident},
    report::{Goal, Row, median},
};
use crate::sys::netns;

/// The port that the rule names.
pub(super) const RULED: u16 = 7780;
/// The same server, without a rule on HTTP.
pub(super) const PLAIN: u16 = 7781;
/// Connections, of each protocol.
const CONNECTIONS: [usize; 3] = [1, 16, 256];
/// Rounds; direct and ruled take turns.
const ROUNDS: usize = 5;

/// How requests get to the server.
#[derive(Clone)]
struct Way {
    name: &'static str,
    client: PathBuf,
    to: SocketAddr,
    /// The process whose time is taken.
    proxy: Option<u32>,
}

/// Measures all ways, round by round.
pub(super) async fn measure(cluster: &Cluster, pods: &Pods) -> Result<Vec<Row>> {
    let path = pods.path();
    let listen = [RULED, PLAIN].map(|port| SocketAddr::new(path.address, port));
    let [ruled, plain] = listen;
    let proxy = cluster.proxy().context("no palisade-proxy runs")?;
    let mut rows = vec![
        Row::new("L7 proxy memory (RSS), idle", resident(proxy)?, "MB").goal(Goal::AtMost(15.0)),
    ];
    let envoy = envoy::start(&cluster.node.netns_path(), plain)?;
    let pod = |name, to, proxy| Way { name, client: path.client.clone(), to, proxy };
    let mut ways = vec![pod("direct", plain, None), pod("L7 policy", ruled, Some(proxy))];
    ways.extend(envoy.as_ref().map(|envoy| Way {
        name: "Envoy",
        client: cluster.node.netns_path(),
        to: envoy::address(),
        proxy: Some(envoy.pid()),
    }));
    {
        let _servers = [Server::start(&path.server, ruled)?, Server::start(&path.server, plain)?];
        for protocol in [Protocol::Http1, Protocol::Http2] {
            rows.extend(compare_all(protocol, &ways).await?);
        }
    }
    let files = cluster.layout.run_dir().join("nginx");
    if let Some(_server) = nginx::start(&path.server, &files, listen)? {
        rows.extend(compare_all(Protocol::Wrk, &ways).await?);
    }
    rows.push(Row::new("L7 proxy memory (RSS), after the load", resident(proxy)?, "MB"));
    Ok(rows)
}

async fn compare_all(protocol: Protocol, ways: &[Way]) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for connections in CONNECTIONS {
        let (load, ways) = (Load { protocol, connections }, ways.to_owned());
        rows.extend(blocking(move || compare(load, &ways)).await?);
    }
    Ok(rows)
}

/// What one way did in the rounds.
#[derive(Default)]
struct Samples {
    rates: Vec<f64>,
    latencies: Vec<f64>,
    cpu: Vec<f64>,
}

fn compare(load: Load, ways: &[Way]) -> Result<Vec<Row>> {
    let mut samples: Vec<Samples> = ways.iter().map(|_| Samples::default()).collect();
    for _ in 0..ROUNDS {
        for (way, samples) in ways.iter().zip(&mut samples) {
            let before = way.proxy.map(cpu_time).transpose()?;
            let to = way.to;
            let begun = Instant::now();
            let done = netns::run_in(&way.client, move || load.run(to))
                .with_context(|| format!("{load} {}", way.name))?;
            samples.rates.push(done.requests as f64 / begun.elapsed().as_secs_f64());
            samples.latencies.push(done.median_latency.as_secs_f64() * 1e6);
            if let (Some(pid), Some(before)) = (way.proxy, before) {
                let used = cpu_time(pid)?.saturating_sub(before);
                samples.cpu.push(used.as_secs_f64() * 1e6 / done.requests as f64);
            }
        }
    }
    Ok(rows(load, ways, &mut samples))
}

fn rows(load: Load, ways: &[Way], samples: &mut [Samples]) -> Vec<Row> {
    let mut rows = Vec::new();
    let medians: Vec<[f64; 3]> = samples
        .iter_mut()
        .map(|s| [median(&mut s.rates), median(&mut s.latencies), median(&mut s.cpu)])
        .collect();
    for (way, [rate, latency, cpu]) in ways.iter().zip(&medians) {
        rows.push(Row::new(format!("{load}: {}", way.name), *rate, "/s"));
        rows.push(Row::new(format!("{load}: {}, median latency", way.name), *latency, "us"));
        if way.proxy.is_some() {
            rows.push(Row::new(format!("{load}: {}, proxy's CPU a request", way.name), *cpu, "us"));
        }
    }
    let [direct, ruled, ..] = medians[..] else { return rows };
    rows.push(
        Row::new(format!("{load}: L7 policy / direct"), ruled[0] / direct[0], "x")
            .goal(Goal::AtLeast(0.35)),
    );
    if let Some(envoy) = medians.get(2) {
        let cpu = Row::new(format!("{load}: CPU, L7 policy / Envoy"), ruled[2] / envoy[2], "x");
        rows.push(cpu.goal(Goal::AtMost(0.35)));
        let added = (ruled[1] - direct[1]) / (envoy[1] - direct[1]);
        let added = Row::new(format!("{load}: added latency, L7 policy / Envoy"), added, "x");
        rows.push(if load.connections == 1 { added.goal(Goal::AtMost(0.35)) } else { added });
    }
    rows
}
