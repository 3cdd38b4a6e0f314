//! `palisade status`.

mod report;

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use palisade_api::admin::{Endpoint, Request, Response, Status};

use self::report::Report;
use crate::{
    agents,
    cli::{Global, StatusArgs},
    cluster,
    exit::{Exit, Failure},
    output::{self, Format},
    progress::Progress,
};

/// Between two looks while waiting. A look is a few local requests.
const PAUSE: Duration = Duration::from_millis(200);

pub(crate) fn run(global: &Global, args: &StatusArgs) -> Result<Exit> {
    let report = if args.wait {
        let _progress = Progress::start("waiting for Palisade to be ready");
        wait(global, Duration::from_secs(args.wait_duration))
    } else {
        let _progress = Progress::start("asking the agents and the API server");
        collect(global)
    };
    if report.nothing_there() {
        return Err(Failure::unreachable(
            format!("nothing to tell the status of: {}", report.collection_errors().join("; ")),
            "Start a cluster on this machine with:  palisade lab up",
        )
        .into());
    }
    match global.output {
        Format::Json => output::json(&report.json())?,
        Format::Table => print!("{}", report.text()),
    }
    Ok(if report.ok() { Exit::Ok } else { Exit::No })
}

fn wait(global: &Global, at_most: Duration) -> Report {
    let begun = Instant::now();
    loop {
        let report = collect(global);
        if report.ok() || begun.elapsed() >= at_most {
            return report;
        }
        thread::sleep(PAUSE);
    }
}

fn collect(global: &Global) -> Report {
    let agents = agents::discover(&global.socket)
        .into_iter()
        .map(|agent| report::AgentState {
            name: agent.name.clone(),
            answer: ask(&agent).map_err(|error| format!("{error:#}")),
        })
        .collect();
    let cluster = cluster::read(global.kubeconfig.as_deref()).map_err(|error| format!("{error:#}"));
    Report::new(agents, cluster)
}

fn ask(agent: &agents::Agent) -> Result<(Status, Vec<Endpoint>)> {
    let Response::Status(status) = agent.ask(&Request::Status)? else {
        return Err(agents::mismatch(&agent.name));
    };
    let Response::Endpoints(endpoints) = agent.ask(&Request::EndpointList)? else {
        return Err(agents::mismatch(&agent.name));
    };
    Ok((*status, endpoints))
}
