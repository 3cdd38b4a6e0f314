//! What an agent's own word of itself means to somebody who asks for the status.

use std::collections::{BTreeMap, BTreeSet};

use palisade_api::admin::Status;

/// What is wrong.
pub(super) fn problems(status: &Status) -> Vec<String> {
    let mut problems = status.problems.clone();
    // An API server that cannot be reached is one problem, not one of each kind.
    let mut errors: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for input in &status.inputs {
        if let Some(error) = &input.error {
            errors.entry(error).or_default().push(&input.kind);
        }
    }
    problems.extend(errors.into_iter().map(|(error, kinds)| match kinds.len() {
        few @ ..=3 => format!("{}: {error}", kinds[..few].join(", ")),
        many => format!("{many} kinds of objects ({}, …): {error}", kinds[..2].join(", ")),
    }));
    if !status.ready {
        let waiting: Vec<&str> = status
            .inputs
            .iter()
            .filter(|input| !input.complete)
            .map(|input| input.kind.as_str())
            .collect();
        let why =
            if waiting.is_empty() { String::new() } else { format!(": {}", waiting.join(", ")) };
        problems.push(format!("not ready{why}"));
    }
    problems
}

/// What somebody should look at.
pub(super) fn concerns(status: &Status) -> Vec<String> {
    let mut concerns = Vec::new();
    let stand = status.policies_last_good;
    let closed = status.policies_refused.saturating_sub(stand);
    if closed > 0 {
        concerns.push(format!(
            "{closed} policies are refused and their subjects locked down: palisade policy get"
        ));
    }
    if stand > 0 {
        concerns.push(format!(
            "{stand} policies are refused, with their last good versions in force: \
             palisade policy get"
        ));
    }
    if status.endpoints_not_ready > 0 {
        concerns.push(format!(
            "{} endpoints are not ready: palisade endpoint list",
            status.endpoints_not_ready
        ));
    }
    concerns
}

/// By agent, for people: what each of several agents says is said once.
pub(super) fn at_once(mut said: Vec<(String, String)>, agents: usize) -> Vec<(String, String)> {
    let mut told: BTreeMap<String, usize> = BTreeMap::new();
    for (_, text) in &said {
        *told.entry(text.clone()).or_default() += 1;
    }
    for (from, text) in &mut said {
        if agents > 1 && told[text.as_str()] == agents {
            *from = format!("all {agents} nodes");
        }
    }
    let mut seen = BTreeSet::new();
    said.retain(|one| seen.insert(one.clone()));
    said
}
