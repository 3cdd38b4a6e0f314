//! `palisade policy get`.

use anyhow::Result;
use palisade_api::admin::{DirectionPolicy, EndpointPolicy, PolicyReport, Request, Response};

use crate::{
    agents::{self, mismatch},
    cli::Global,
    exit::Exit,
    output::{self, Format, dash, say},
};

pub(crate) fn get(global: &Global, endpoint: Option<String>) -> Result<Exit> {
    let agents = agents::require(&global.socket)?;
    let request = Request::PolicyGet { endpoint: endpoint.clone() };
    let answers = match endpoint {
        Some(_) => vec![("the endpoint's".to_owned(), agents::ask_until_known(&agents, &request)?)],
        None => agents::ask_all(&agents, &request)?
            .into_iter()
            .map(|(agent, answer)| (agent.name, answer))
            .collect(),
    };
    let mut reports = Vec::new();
    for (agent, answer) in answers {
        let Response::Policy(report) = answer else { return Err(mismatch(&agent)) };
        reports.push((agent, *report));
    }
    print(global.output, &reports)?;
    Ok(Exit::Ok)
}

fn print(format: Format, reports: &[(String, PolicyReport)]) -> Result<()> {
    if format == Format::Json {
        let by_agent: std::collections::BTreeMap<_, _> =
            reports.iter().map(|(agent, report)| (agent, report)).collect();
        return output::json(&by_agent);
    }
    // Every agent follows the same objects.
    if let Some((_, report)) = reports.first() {
        objects(report);
    }
    for endpoint in reports.iter().flat_map(|(_, report)| &report.endpoints) {
        say!("");
        rules(endpoint);
    }
    Ok(())
}

fn objects(report: &PolicyReport) {
    let rows = report.policies.iter().map(|policy| {
        let state = match (policy.valid, policy.last_good_in_force) {
            (true, _) => "in force",
            (false, false) => "refused: its subject is locked down",
            (false, true) => "refused: locked down, with the last good version in force",
        };
        [
            policy.policy.clone(),
            policy.rules.to_string(),
            state.to_owned(),
            dash(policy.error.as_ref()),
        ]
    });
    output::table(&["POLICY", "RULES", "STATE", "ERROR"], rows);
}

fn rules(endpoint: &EndpointPolicy) {
    say!("{} (endpoint {}, identity {})", endpoint.pod, endpoint.endpoint, endpoint.identity);
    direction("ingress", &endpoint.ingress);
    direction("egress", &endpoint.egress);
}

fn direction(name: &str, policy: &DirectionPolicy) {
    if !policy.enforced {
        say!("  {name}: everything is allowed, no policy selects it");
        return;
    }
    say!("  {name}: (table {})", policy.table);
    for rule in &policy.rules {
        say!("    {:<6} {} {}", rule.action, rule.policy, rule.path);
    }
    if !policy.default_deny_by.is_empty() {
        say!("    deny   everything else, by {}", policy.default_deny_by.join(", "));
    }
}
