//! `palisade version`.

use std::collections::BTreeMap;

use anyhow::Result;
use palisade_api::admin::{Request, Response};
use serde::Serialize;

use crate::{
    agents,
    cli::Global,
    cluster,
    exit::Exit,
    output::{self, Format, say},
};

#[derive(Serialize)]
struct Versions {
    client: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    agents: Option<Vec<AgentVersion>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kubernetes: Option<String>,
    /// Images in the cluster, and how many pods run them.
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster: Option<BTreeMap<String, BTreeMap<String, usize>>>,
}

#[derive(Serialize)]
struct AgentVersion {
    node: String,
    version: String,
}

/// Parts that cannot be reached are left out: asking for the version is no health check.
pub(crate) fn run(global: &Global, client_only: bool) -> Result<Exit> {
    let mut versions = Versions {
        client: env!("CARGO_PKG_VERSION"),
        agents: None,
        kubernetes: None,
        cluster: None,
    };
    if !client_only {
        versions.agents = Some(agent_versions(global));
        if let Ok((kubernetes, installation)) = cluster::version(global) {
            versions.kubernetes = Some(kubernetes);
            versions.cluster = installation.map(|it| it.images());
        }
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
    say!("palisade:   v{}", versions.client);
    let Some(agents) = &versions.agents else { return };
    if agents.is_empty() && versions.cluster.is_none() {
        say!("agents:     none found on this machine");
    }
    for agent in agents {
        say!("agent:      v{} ({})", agent.version.trim_start_matches('v'), agent.node);
    }
    for (component, images) in versions.cluster.iter().flatten() {
        for (image, count) in images {
            say!("cluster:    {component}: {image} ({count})");
        }
    }
    say!("kubernetes: {}", versions.kubernetes.as_deref().unwrap_or("not reachable"));
}
