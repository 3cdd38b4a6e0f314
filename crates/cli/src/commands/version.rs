//! `palisade version`.

use anyhow::Result;
use palisade_api::admin::{Request, Response};
use serde::Serialize;

use crate::{
    agents,
    cli::Global,
    cluster,
    exit::Exit,
    output::{self, Format},
};

#[derive(Serialize)]
struct Versions {
    client: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    agents: Option<Vec<AgentVersion>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kubernetes: Option<String>,
}

#[derive(Serialize)]
struct AgentVersion {
    node: String,
    version: String,
}

/// Parts that cannot be reached are left out: asking for the version is no health check.
pub(crate) fn run(global: &Global, client_only: bool) -> Result<Exit> {
    let mut versions =
        Versions { client: env!("CARGO_PKG_VERSION"), agents: None, kubernetes: None };
    if !client_only {
        versions.agents = Some(agent_versions(global));
        versions.kubernetes = cluster::version(global.kubeconfig.as_deref()).ok();
    }
    match global.output {
        Format::Json => output::json(&versions)?,
        Format::Table => print(&versions),
    }
    Ok(Exit::Ok)
}

fn agent_versions(global: &Global) -> Vec<AgentVersion> {
    agents::discover(&global.socket)
        .iter()
        .filter_map(|agent| match agent.ask(&Request::Status).ok()? {
            Response::Status(status) => {
                Some(AgentVersion { node: status.node, version: status.version })
            }
            _ => None,
        })
        .collect()
}

fn print(versions: &Versions) {
    println!("palisade:   v{}", versions.client);
    let Some(agents) = &versions.agents else { return };
    if agents.is_empty() {
        println!("agents:     none found on this machine");
    }
    for agent in agents {
        println!("agent:      v{} ({})", agent.version.trim_start_matches('v'), agent.node);
    }
    println!("kubernetes: {}", versions.kubernetes.as_deref().unwrap_or("not reachable"));
}
