//! Whether something would pass, from what the tables hold.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use palisade_abi::identity as number;
use palisade_api::{
    admin::{Explain, Explanation, Response, Translated},
    explain::{self, NamedEnd},
    service,
};
use palisade_policy::{
    evaluate::End,
    identity::{PodLabels, endpoint_labels},
    model::{Direction, Peer, Peers, Policy, PolicyRef},
};

use crate::{
    names,
    resolve::Scope,
    tables::{
        ObjectName, Tables,
        fqdns::LearnedNames,
        pods::Pod,
        policies::PolicyContent,
        secrets,
        services::{Frontend, Service, ServiceEntry},
    },
};

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum NoAnswer {
    /// An end is not known, or is none.
    Unknown(String),
    /// Only the agent of this node can tell.
    Elsewhere { node: String, why: String },
}

impl From<String> for NoAnswer {
    fn from(why: String) -> Self {
        Self::Unknown(why)
    }
}

impl From<NoAnswer> for Response {
    fn from(none: NoAnswer) -> Self {
        match none {
            NoAnswer::Unknown(why) => Self::Error(why),
            NoAnswer::Elsewhere { node, why } => Self::Elsewhere { node, why },
        }
    }
}

/// The answer.
pub(super) fn explain(
    scope: &Scope,
    tables: &Tables,
    last_good: &BTreeMap<PolicyRef, Arc<Policy>>,
    asked: &Explain,
) -> Result<Explanation, NoAnswer> {
    let in_force = tables.policies.rows().map(|row| match &row.content {
        PolicyContent::Accepted(policy) => (Some(policy), None),
        PolicyContent::Refused { lockdown, .. } => (last_good.get(&row.id), Some(lockdown)),
    });
    let spelled_out: Vec<Cow<'_, Policy>> = in_force
        .flat_map(|(good, lockdown)| good.map(Arc::as_ref).into_iter().chain(lockdown))
        .map(|policy| tables.api_servers.spelled_out(policy))
        .collect();
    let policies: Vec<&Policy> = spelled_out.iter().map(AsRef::as_ref).collect();
    let secrets = secrets::values(&tables.secrets);
    if let Some(service) = meant(tables, &asked.from)? {
        let why = "which opens no connections: name a pod, or an address of one";
        return Err(format!("{} is Service {}, {why}", asked.from, service.name).into());
    }
    let from = find(scope, tables, &asked.from)?;
    let judge = |mut to: NamedEnd, asked: &Explain| -> Result<_, NoAnswer> {
        if number::is_world(to.end.identity) && asks_for_names(&policies, &from) {
            to.end.names = learned(scope, tables, &from, to.end.address)?;
        }
        Ok(explain::explain(&policies, &secrets, &from, &to, asked))
    };
    let Some(entry) = translated(tables, from.end.address, asked)? else {
        return judge(find(scope, tables, &asked.to)?, asked);
    };
    let backends = entry.backends.iter().map(|backend| {
        let mut to = by_address(scope, tables, backend.ip());
        to.name = explain::backend_name(&to, backend.port());
        judge(to, &Explain { port: backend.port(), ..asked.clone() })
    });
    let service = Translated {
        name: entry.service.to_string(),
        frontend: entry.frontend.to_string(),
        backends: backends.collect::<Result<_, _>>()?,
    };
    Ok(explain::explain_service(&from, service))
}

/// The Service that is meant, if one is: it was named as such, or has the very name, or the address
/// as its own.
fn meant<'a>(tables: &'a Tables, text: &str) -> Result<Option<&'a Service>, String> {
    let is_namespace = |word: &str| tables.namespaces.get(&word.to_owned()).is_some();
    if let Some((namespace, name)) = explain::named_service(text, is_namespace) {
        let found = tables.services.get(&ObjectName::new(namespace, name));
        let found = found.ok_or_else(|| {
            format!("there is no Service {namespace}/{name}, or it stands for another name only")
        });
        return found.map(|service| Some(&**service));
    }
    if let Some(address) = service::address(text) {
        let mut rows = tables.services.rows();
        return Ok(rows.find(|row| row.addresses.own.contains(&address)).map(AsRef::as_ref));
    }
    let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
    let name = ObjectName::new(namespace, name);
    if tables.pods.get(&name).is_some() {
        return Ok(None);
    }
    Ok(tables.services.get(&name).map(AsRef::as_ref))
}

/// What the data path makes of the connection, if it is one to a Service: at the address that was
/// asked for, else at the Service's own of the sender's family.
fn translated<'a>(
    tables: &'a Tables,
    sender: IpAddr,
    asked: &Explain,
) -> Result<Option<&'a ServiceEntry>, String> {
    let at = |address| {
        let frontend = Frontend { address, port: asked.port, protocol: asked.protocol };
        tables.service_entries.get(&frontend).map(AsRef::as_ref)
    };
    // Whoever else has the address: for other ports it is still theirs.
    if let Some(entry) = service::address(&asked.to).and_then(at) {
        return Ok(Some(entry));
    }
    let Some(service) = meant(tables, &asked.to)? else { return Ok(None) };
    let Service { name, addresses, ports, .. } = service;
    let family = addresses.own.iter().find(|address| address.is_ipv4() == sender.is_ipv4());
    let Some(address) = family.or(addresses.own.first()) else {
        return Err(format!(
            "Service {name} is headless: clients reach its pods by their own addresses and ports; \
             name one of these pods, and its port"
        ));
    };
    if let Some(entry) = at(*address).filter(|entry| entry.service == *name) {
        return Ok(Some(entry));
    }
    let ports: Vec<String> = ports.iter().map(ToString::to_string).collect();
    Err(format!(
        "Service {name} has no port {}/{}; it has {}. For another port of its pods, name a pod",
        asked.port,
        names::protocol(asked.protocol),
        ports.join(", ")
    ))
}

fn find(scope: &Scope, tables: &Tables, text: &str) -> Result<NamedEnd, String> {
    if let Some(address) = service::address(text) {
        return Ok(by_address(scope, tables, address));
    }
    let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
    let exact = ObjectName::new(namespace, name);
    let pod = tables.pods.get(&exact).or_else(|| {
        let mut coming = tables.pods.rows_from(exact);
        coming
            .next()
            .filter(|pod| pod.name.namespace == namespace && pod.name.name.starts_with(name))
    });
    match pod {
        Some(pod) => Ok(named(scope, tables, pod)),
        None => Err(format!(
            "there is no pod and no Service {namespace}/{name}; name it as namespace/pod, \
             svc/namespace/name, or by an address"
        )),
    }
}

fn by_address(scope: &Scope, tables: &Tables, address: IpAddr) -> NamedEnd {
    let owner = tables.pods.rows().find(|pod| pod.addresses.contains(&address));
    if let Some(pod) = owner.filter(|pod| !pod.host_network) {
        let mut found = named(scope, tables, pod);
        found.end.address = address;
        return found;
    }
    let identity = tables.identity_of(address);
    let labels = (*tables.labels_of(identity)).clone();
    let end = End { identity, labels, address, named_ports: Vec::new(), names: BTreeSet::new() };
    NamedEnd { name: address.to_string(), end }
}

/// Whether the sender's policies speak of names.
fn asks_for_names(policies: &[&Policy], from: &NamedEnd) -> bool {
    let rules = policies.iter().flat_map(|policy| &policy.rules);
    let entries = rules
        .filter(|rule| rule.subject.matches(&from.end.labels))
        .flat_map(|rule| &rule.section(Direction::Egress).entries);
    let mut peers = entries.filter_map(|entry| match &entry.peers {
        Peers::Any => None,
        Peers::List(list) => Some(list),
    });
    peers.any(|list| list.iter().any(|peer| matches!(peer, Peer::Fqdn(_))))
}

/// Names that the address was given for to the sender, or to whom the very same rules select. Only
/// the sender's own node knows them.
fn learned(
    scope: &Scope,
    tables: &Tables,
    from: &NamedEnd,
    address: IpAddr,
) -> Result<BTreeSet<String>, NoAnswer> {
    let mut endpoints = tables.endpoints.rows();
    let Some(own) = endpoints.find(|one| one.addresses().any(|own| own == from.end.address)) else {
        return Err(without_names(scope, tables, from));
    };
    let group =
        |endpoint: &u32| tables.policy_entries.get(endpoint).and_then(|row| row.egress.group());
    let shared = group(&own.id);
    let counts = |row: &LearnedNames| {
        let same = row.endpoint == own.id || shared.is_some() && group(&row.endpoint) == shared;
        let endpoint = tables.endpoints.get(&row.endpoint);
        same && endpoint.is_some_and(|endpoint| endpoint.container_id == row.container)
    };
    let rows = tables.names.rows().filter(|row| counts(row));
    let names = rows.flat_map(|row| &row.names).filter(|(_, known)| known.contains(&address));
    Ok(names.map(|(name, _)| name.clone()).collect())
}

/// Of a pod that is no endpoint here.
fn without_names(scope: &Scope, tables: &Tables, from: &NamedEnd) -> NoAnswer {
    let mut pods = tables.pods.rows();
    let pod = pods.find(|pod| !pod.host_network && pod.addresses.contains(&from.end.address));
    let known = "policies allow names, and which addresses it learned for them is known";
    match pod.map(|pod| &pod.node) {
        Some(node) if *node != scope.node => NoAnswer::Elsewhere {
            node: node.clone(),
            why: format!("{}'s {known} on its own node only, {node}", from.name),
        },
        _ => NoAnswer::Unknown(format!(
            "{}'s {known} once it is connected: palisade endpoint list",
            from.name
        )),
    }
}

fn named(scope: &Scope, tables: &Tables, pod: &Pod) -> NamedEnd {
    let address = pod.addresses.first().copied().unwrap_or([0, 0, 0, 0].into());
    let known = tables.pod_identities.get(&pod.name).and_then(|row| row.identity);
    let namespace = tables.namespaces.get(&pod.name.namespace);
    let (identity, labels) = match (known, namespace) {
        _ if pod.host_network => (tables.identity_of(address), None),
        (Some(identity), Some(namespace)) => {
            let labels = endpoint_labels(&PodLabels {
                namespace: &pod.name.namespace,
                namespace_labels: Some(&namespace.labels),
                pod_labels: Some(&pod.labels),
                service_account: &pod.service_account,
                cluster: &scope.cluster,
            });
            (identity, Some(labels))
        }
        _ => (number::INIT, None),
    };
    let labels = labels.unwrap_or_else(|| (*tables.labels_of(identity)).clone());
    let named_ports = pod.ports.clone();
    let end = End { identity, labels, address, named_ports, names: BTreeSet::new() };
    NamedEnd { name: pod.name.to_string(), end }
}

#[cfg(test)]
mod tests;
