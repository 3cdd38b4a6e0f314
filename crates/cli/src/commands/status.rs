//! `palisade status`.

mod health;
mod installed;
mod report;

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use palisade_api::admin::{Endpoint, Request, Response, Status};

use self::{installed::Installed, report::Report};
use crate::{
    agents,
    cli::{Global, StatusArgs},
    cluster,
    exit::{Exit, Failure},
    output::{self, Format, say},
    progress::Progress,
};

/// Between two looks while waiting. A look is a few local requests.
const PAUSE: Duration = Duration::from_millis(200);
/// The same where every agent of a cluster was asked.
const PAUSE_OF_ALL: Duration = Duration::from_secs(3);

pub(crate) fn run(global: &Global, args: &StatusArgs) -> Result<Exit> {
    let report = if args.wait {
        let _progress = Progress::start("waiting for Palisade to be ready");
        wait(global, args.wait_duration)
    } else {
        let _progress = Progress::start("asking the agents and the API server");
        let mut report = collect(global);
        report.ask_agents(global);
        report
    };
    if let Summary::Agents(report) = &report
        && report.nothing_there()
    {
        return Err(Failure::unreachable(
            format!("nothing to tell the status of: {}", report.collection_errors().join("; ")),
            "Start a cluster on this machine with:  palisade lab up\n\
             or make Palisade a cluster's network:  palisade install\n\
             or, while an API server is away, ask on a node of its cluster",
        )
        .into());
    }
    match global.output {
        Format::Json => output::json(&report.json())?,
        Format::Table => say!("{}", report.text(args.verbose).trim_end()),
    }
    Ok(match (report.ok(), report.nobody_answered()) {
        (true, _) => Exit::Ok,
        (false, true) => Exit::Unreachable,
        (false, false) => Exit::No,
    })
}

/// Who tells the status.
enum Summary {
    /// The API server, of a cluster that Palisade is installed in.
    Installed(Installed),
    /// The agents of this machine.
    Agents(Report),
}

impl Summary {
    /// Adds what the agents of an installation say of themselves. Those of this machine have been
    /// asked.
    fn ask_agents(&mut self, global: &Global) {
        if let Self::Installed(installed) = self {
            let answers = cluster::agents::ask(global, installed.installation());
            installed.hear(answers, || cluster::pods(global));
        }
    }

    fn ok(&self) -> bool {
        match self {
            Self::Installed(installed) => installed.ok(),
            Self::Agents(report) => report.ok(),
        }
    }

    fn nobody_answered(&self) -> bool {
        matches!(self, Self::Agents(report) if report.nobody_answered())
    }

    fn text(&self, verbose: bool) -> String {
        match self {
            Self::Installed(installed) => installed.text(verbose),
            Self::Agents(report) => report.text(),
        }
    }

    fn json(&self) -> serde_json::Value {
        match self {
            Self::Installed(installed) => installed.json(),
            Self::Agents(report) => report.json(),
        }
    }
}

fn wait(global: &Global, at_most: Duration) -> Summary {
    let begun = Instant::now();
    loop {
        let mut report = collect(global);
        let late = begun.elapsed() >= at_most;
        // Every agent is asked only where nothing else is missing, or will be told.
        let asks = report.ok() || late;
        if asks {
            report.ask_agents(global);
        }
        if report.ok() || late {
            return report;
        }
        let agents = asks && matches!(report, Summary::Installed(_));
        thread::sleep(if agents { PAUSE_OF_ALL } else { PAUSE });
    }
}

fn collect(global: &Global) -> Summary {
    let cluster = cluster::read(global);
    let cluster = match cluster.map(Installed::of) {
        Ok(Ok(installed)) => return Summary::Installed(installed),
        Ok(Err(cluster)) => Ok(*cluster),
        Err(error) => Err(format!("{error:#}")),
    };
    let agents = agents::discover(&global.socket)
        .into_iter()
        .map(|agent| report::AgentState {
            name: agent.name.clone(),
            answer: ask(&agent).map_err(|error| format!("{error:#}")),
        })
        .collect();
    Summary::Agents(Report::new(agents, cluster))
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
