//! `palisade get`.

use anyhow::Result;
use palisade_api::admin::{Request, Response};

use crate::{
    agents::{self, Agent, mismatch},
    cli::Global,
    exit::{Exit, Failure},
    output::{self, Format},
};

pub(crate) fn run(global: &Global, table: Option<String>, node: Option<&str>) -> Result<Exit> {
    let agents = on_node(agents::require(&global.socket)?, node)?;
    match table {
        None => names(global, &agents),
        Some(table) => rows(global, &agents, table),
    }
}

/// Those of one node, where one is named.
pub(crate) fn on_node(agents: Vec<Agent>, node: Option<&str>) -> Result<Vec<Agent>> {
    let Some(node) = node else { return Ok(agents) };
    let known: Vec<String> = agents.iter().map(|agent| agent.name.clone()).collect();
    let chosen: Vec<Agent> = agents.into_iter().filter(|agent| agent.name == node).collect();
    if chosen.is_empty() {
        let known = known.join(", ");
        return Err(
            Failure::not_found(format!("no agent of node {node}; there are: {known}")).into()
        );
    }
    Ok(chosen)
}

fn names(global: &Global, agents: &[Agent]) -> Result<Exit> {
    let Response::Tables(names) = agents::ask_until_known(agents, &Request::TableList)? else {
        return Err(mismatch("of the tables"));
    };
    match global.output {
        Format::Json => output::json(&names)?,
        Format::Table => output::table(&["TABLE"], names.into_iter().map(|name| [name])),
    }
    Ok(Exit::Ok)
}

fn rows(global: &Global, agents: &[Agent], table: String) -> Result<Exit> {
    // An unknown name is the same error everywhere; ask one agent before asking all.
    let request = Request::TableGet { table };
    agents::ask_until_known(agents, &request)?;
    let mut tables = Vec::new();
    for (agent, answer) in agents::ask_all(agents, &request)? {
        let Response::Table(table) = answer else { return Err(mismatch(&agent.name)) };
        tables.push((agent.name, table));
    }
    if global.output == Format::Json {
        let by_node: serde_json::Map<_, _> = tables
            .into_iter()
            .map(|(node, table)| Ok((node, serde_json::to_value(table)?)))
            .collect::<Result<_>>()?;
        output::json(&by_node)?;
        return Ok(Exit::Ok);
    }
    let Some((_, first)) = tables.first() else { return Ok(Exit::Ok) };
    let several = tables.len() > 1;
    let columns = first.columns.clone();
    let mut titles: Vec<&str> = columns.iter().map(String::as_str).collect();
    if several {
        titles.insert(0, "NODE");
    }
    let rows = tables.into_iter().flat_map(|(node, table)| {
        let node = several.then_some(node);
        table.rows.into_iter().map(move |row| node.clone().into_iter().chain(row))
    });
    output::table(&titles, rows);
    Ok(Exit::Ok)
}
