//! `palisade identity`.

use std::collections::BTreeMap;

use anyhow::Result;
use palisade_api::admin::{Identity, Request, Response};

use crate::{
    agents::{self, mismatch},
    cli::{Global, IdentityCommand},
    exit::Exit,
    output::{self, Format},
};

pub(crate) fn run(global: &Global, command: IdentityCommand) -> Result<Exit> {
    let agents = agents::require(&global.socket)?;
    let identities = match command {
        IdentityCommand::List => {
            // Agents agree on identities, so one of each number is enough.
            let mut identities = BTreeMap::new();
            for (agent, answer) in agents::ask_all(&agents, &Request::IdentityList)? {
                let Response::Identities(list) = answer else { return Err(mismatch(&agent.name)) };
                identities.extend(list.into_iter().map(|identity| (identity.id, identity)));
            }
            identities.into_values().collect()
        }
        IdentityCommand::Get { id } => {
            match agents::ask_until_known(&agents, &Request::IdentityGet { id })? {
                Response::Identity(identity) => vec![identity],
                _ => return Err(mismatch("of the identity")),
            }
        }
    };
    list(global.output, &identities)?;
    Ok(Exit::Ok)
}

fn list(format: Format, identities: &[Identity]) -> Result<()> {
    match format {
        Format::Json => output::json(&identities)?,
        Format::Table => output::table(
            &["ID", "LABELS"],
            identities.iter().map(|identity| [identity.id.to_string(), identity.labels.join("\n")]),
        ),
    }
    Ok(())
}
