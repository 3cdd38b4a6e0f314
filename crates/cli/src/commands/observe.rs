//! `palisade observe`.

mod line;

use std::{
    sync::mpsc::{self, Sender},
    thread,
};

use anyhow::{Context, Result};
use palisade_api::{
    admin::{FlowFilter, Observe, Request, Response},
    flow::Flow,
};

use super::table::on_node;
use crate::{
    agents::{self, Agent, mismatch},
    cli::{Global, ObserveArgs},
    exit::{Exit, Failure},
    output::{Format, say},
};

const DEFAULT_LAST: usize = 20;

pub(crate) fn run(global: &Global, args: ObserveArgs) -> Result<Exit> {
    let agents = on_node(agents::require(&global.socket)?, args.node.as_deref())?;
    let printer = Printer { format: global.output, node: agents.len() > 1 };
    let observe = Observe {
        last: args.last.or_else(|| (!args.follow).then_some(DEFAULT_LAST)),
        follow: args.follow,
        filter: filter(args),
    };
    if observe.follow {
        follow(&agents, &observe, &printer)?;
    } else {
        past(&agents, &observe, &printer)?;
    }
    Ok(Exit::Ok)
}

fn filter(args: ObserveArgs) -> FlowFilter {
    let namespaces = args.namespace.into_iter().map(|namespace| format!("{namespace}/"));
    FlowFilter {
        pod: args.pod.into_iter().map(qualified).chain(namespaces).collect(),
        from_pod: args.from_pod.into_iter().map(qualified).collect(),
        to_pod: args.to_pod.into_iter().map(qualified).collect(),
        ip: args.ip,
        identity: args.identity,
        label: args.label,
        port: args.port,
        protocol: args.protocol,
        verdict: args.verdict,
        kind: args.kind,
        http_method: args.http_method,
        http_path: args.http_path,
        http_status: args.http_status,
        dns_name: args.dns_name,
        server_name: args.server_name,
    }
}

/// A pod without a namespace is one of `default`.
fn qualified(pod: String) -> String {
    if pod.contains('/') { pod } else { format!("default/{pod}") }
}

/// The newest flows of all agents together, in the order of time.
fn past(agents: &[Agent], observe: &Observe, printer: &Printer) -> Result<()> {
    let mut flows = Vec::new();
    let mut answered = false;
    for agent in agents {
        match past_of(agent, observe) {
            Ok(some) => {
                answered = true;
                flows.extend(some);
            }
            Err(error) => eprintln!("warning: {error:#}"),
        }
    }
    if !answered {
        return Err(Failure::unreachable("no agent answered", "See:  palisade status").into());
    }
    flows.sort_by_key(|flow| flow.time);
    let surplus = flows.len().saturating_sub(observe.last.unwrap_or(usize::MAX));
    for flow in &flows[surplus..] {
        printer.flow(flow)?;
    }
    Ok(())
}

/// What an agent remembers.
pub(crate) fn past_of(agent: &Agent, observe: &Observe) -> Result<Vec<Flow>> {
    let mut client = agent.connect()?;
    client.send(&Request::Observe(observe.clone()))?;
    let mut flows = Vec::new();
    while let Some(answer) =
        client.next().with_context(|| format!("agent {} did not answer", agent.name))?
    {
        match answer {
            Response::Flow(flow) => flows.push(*flow),
            Response::Lost(_) => {}
            Response::End => break,
            Response::Error(message) => anyhow::bail!("agent {}: {message}", agent.name),
            _ => return Err(mismatch(&agent.name)),
        }
    }
    Ok(flows)
}

/// What the threads that read the agents tell the one that prints.
enum Told {
    Flow(Box<Flow>),
    Lost(String, u64),
    Ended(String),
}

/// Flows of all agents as they come, until the last agent is gone.
fn follow(agents: &[Agent], observe: &Observe, printer: &Printer) -> Result<()> {
    let (tell, told) = mpsc::channel();
    for agent in agents.iter().cloned() {
        let (tell, observe) = (tell.clone(), observe.clone());
        thread::spawn(move || {
            let end = match follow_one(&agent, observe, &tell) {
                Ok(()) => format!("agent {} closed the connection", agent.name),
                Err(error) => format!("{error:#}"),
            };
            // The printer may be gone, and then nobody wants to know.
            let _ = tell.send(Told::Ended(end));
        });
    }
    drop(tell);
    for told in told {
        match told {
            Told::Flow(flow) => printer.flow(&flow)?,
            Told::Lost(agent, flows) => eprintln!("EVENTS LOST: {agent}: {flows}"),
            Told::Ended(why) => eprintln!("warning: {why}"),
        }
    }
    Err(Failure::unreachable("no agent is left to follow", "See:  palisade status").into())
}

fn follow_one(agent: &Agent, observe: Observe, tell: &Sender<Told>) -> Result<()> {
    let mut client = agent.connect()?;
    // Nothing may happen for hours.
    client.set_timeout(None)?;
    client.send(&Request::Observe(observe))?;
    while let Some(answer) = client.next()? {
        let told = match answer {
            Response::Flow(flow) => Told::Flow(flow),
            Response::Lost(flows) => Told::Lost(agent.name.clone(), flows),
            Response::Error(message) => anyhow::bail!("agent {}: {message}", agent.name),
            _ => continue,
        };
        if tell.send(told).is_err() {
            break;
        }
    }
    Ok(())
}

struct Printer {
    format: Format,
    /// Several nodes: tell which.
    node: bool,
}

impl Printer {
    fn flow(&self, flow: &Flow) -> Result<()> {
        match self.format {
            Format::Json => say!("{}", serde_json::to_string(flow)?),
            Format::Table => say!("{}", line::compact(flow, self.node)),
        }
        Ok(())
    }
}
