//! `palisade policy get`.

use anyhow::Result;
use palisade_api::admin::{
    DirectionPolicy, EndpointPolicy, PolicyReport, PolicyState, Request, Response,
};

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
    objects(reports);
    for endpoint in reports.iter().flat_map(|(_, report)| &report.endpoints) {
        say!("");
        rules(endpoint);
    }
    Ok(())
}

/// Every agent follows the same objects; which of them a proxy lacks differs.
fn objects(reports: &[(String, PolicyReport)]) {
    let Some((_, first)) = reports.first() else { return };
    let rows = first.policies.iter().map(|policy| {
        let lacks = |report: &PolicyReport| {
            let mut same = report.policies.iter().filter(|one| one.policy == policy.policy);
            same.any(|one| one.awaits_proxy)
        };
        let waiting = reports.iter().filter(|(_, report)| lacks(report));
        let waiting: Vec<&str> = waiting.map(|(agent, _)| &**agent).collect();
        [
            policy.policy.clone(),
            policy.rules.to_string(),
            state(policy, &waiting),
            dash(policy.error.as_ref()),
        ]
    });
    output::table(&["POLICY", "RULES", "STATE", "ERROR"], rows);
}

/// `waiting`: the agents whose L7 proxy does not have the policy.
fn state(policy: &PolicyState, waiting: &[&str]) -> String {
    let state = match (policy.valid, policy.last_good_in_force) {
        (true, _) if !waiting.is_empty() => "accepted",
        (true, _) => "in force",
        (false, false) => "refused: its subject is locked down",
        (false, true) => "refused: locked down, with the last good version in force",
    };
    match waiting {
        [] => state.to_owned(),
        some => format!("{state}; not in force yet in the L7 proxy ({})", some.join(", ")),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_proxy_lacks_is_not_in_force() {
        let of = |valid, last_good_in_force| PolicyState {
            policy: "CiliumNetworkPolicy default/a".into(),
            valid,
            error: None,
            last_good_in_force,
            awaits_proxy: false,
            rules: 1,
        };
        assert_eq!(state(&of(true, false), &[]), "in force");
        let waiting = state(&of(true, false), &["node2"]);
        assert_eq!(waiting, "accepted; not in force yet in the L7 proxy (node2)");
        assert!(state(&of(false, true), &["node2"]).ends_with("(node2)"));
    }
}
