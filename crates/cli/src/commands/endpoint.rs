//! `palisade endpoint`.

use anyhow::Result;
use palisade_api::admin::{Endpoint, Request, Response};

use crate::{
    agents::{self, mismatch},
    cli::{EndpointCommand, Global},
    exit::Exit,
    output::{self, Format, dash, say},
};

const TITLES: [&str; 9] = [
    "ENDPOINT",
    "POLICY (ingress)",
    "POLICY (egress)",
    "IDENTITY",
    "POD",
    "LABELS (source:key[=value])",
    "IPv6",
    "IPv4",
    "STATUS",
];

pub(crate) fn run(global: &Global, command: EndpointCommand) -> Result<Exit> {
    let agents = agents::require(&global.socket)?;
    match command {
        EndpointCommand::List => {
            let mut endpoints = Vec::new();
            for (agent, answer) in agents::ask_all(&agents, &Request::EndpointList)? {
                let Response::Endpoints(list) = answer else { return Err(mismatch(&agent.name)) };
                endpoints.extend(list);
            }
            list(global.output, &endpoints)?;
        }
        EndpointCommand::Get { endpoint } => {
            let request = Request::EndpointGet { endpoint };
            let Response::Endpoint(endpoint) = agents::ask_until_known(&agents, &request)? else {
                return Err(mismatch("of the endpoint"));
            };
            get(global.output, &endpoint)?;
        }
    }
    Ok(Exit::Ok)
}

fn list(format: Format, endpoints: &[Endpoint]) -> Result<()> {
    match format {
        Format::Json => output::json(&endpoints)?,
        Format::Table => output::table(&TITLES, endpoints.iter().map(row)),
    }
    Ok(())
}

fn row(endpoint: &Endpoint) -> [String; 9] {
    [
        endpoint.id.to_string(),
        enforcement(endpoint.ingress_enforced).to_owned(),
        enforcement(endpoint.egress_enforced).to_owned(),
        endpoint.identity.to_string(),
        format!("{}/{}", endpoint.namespace, endpoint.pod),
        endpoint.labels.join("\n"),
        dash(endpoint.ipv6),
        dash(endpoint.ipv4),
        endpoint.state.clone(),
    ]
}

const fn enforcement(enforced: bool) -> &'static str {
    if enforced { "Enabled" } else { "Disabled" }
}

fn get(format: Format, endpoint: &Endpoint) -> Result<()> {
    if format == Format::Json {
        return output::json(endpoint);
    }
    say!("Endpoint:         {}", endpoint.id);
    say!("Pod:              {}/{}", endpoint.namespace, endpoint.pod);
    say!("Status:           {}", endpoint.state);
    say!("IPv4:             {}", dash(endpoint.ipv4));
    say!("IPv6:             {}", dash(endpoint.ipv6));
    say!("Identity:         {}", endpoint.identity);
    say!("Labels:           {}", endpoint.labels.join("\n                  "));
    say!("Policy (ingress): {}", enforcement(endpoint.ingress_enforced));
    say!("Policy (egress):  {}", enforcement(endpoint.egress_enforced));
    say!("Policy revision:  {}", endpoint.policy_revision);
    say!("Interface:        {} (row {})", endpoint.interface, endpoint.row);
    say!("Container:        {}", endpoint.container_id);
    Ok(())
}
