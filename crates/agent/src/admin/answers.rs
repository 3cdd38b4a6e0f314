//! One answer for each question.

use std::{collections::BTreeMap, fmt::Write};

use palisade_abi::{DropReason, TABLE_NONE, metric_index};
use palisade_api::admin::{
    DirectionPolicy, Endpoint, EndpointObject, EndpointPolicy, Identity, Input, PolicyReport,
    PolicyState, Request, Response, RuleState, Status, Table as TableDump,
};
use palisade_policy::identity::RESERVED;

use super::{Admin, explain::explain};
use crate::{
    engine::Progress,
    observer::rule_name,
    tables::{
        Row, Table, Tables,
        pods::Endpoint as EndpointRow,
        policies::{Enforcement, PolicyContent},
    },
};

/// Answers everything but `observe`.
pub(super) fn answer(admin: &Admin, request: &Request) -> Response {
    let progress = admin.progress.borrow().clone();
    let tables = admin.tables.read();
    match request {
        Request::Status => Response::Status(Box::new(status(admin, &tables, &progress))),
        Request::EndpointList => {
            let rows = tables.endpoints.rows();
            Response::Endpoints(rows.map(|row| endpoint(admin, &tables, &progress, row)).collect())
        }
        Request::EndpointGet { endpoint: text } => match tables.find_endpoint(text) {
            Some(row) => Response::Endpoint(Box::new(endpoint(admin, &tables, &progress, row))),
            None => no_endpoint(text),
        },
        Request::IdentityList => Response::Identities(identities(&tables)),
        Request::IdentityGet { id } => {
            match identities(&tables).into_iter().find(|known| known.id == *id) {
                Some(known) => Response::Identity(known),
                None => Response::Error(format!("there is no identity {id} in this cluster")),
            }
        }
        Request::PolicyGet { endpoint: None } => {
            Response::Policy(Box::new(policy(&tables, &progress, tables.endpoints.rows())))
        }
        Request::PolicyGet { endpoint: Some(text) } => match tables.find_endpoint(text) {
            Some(row) => {
                Response::Policy(Box::new(policy(&tables, &progress, std::iter::once(row))))
            }
            None => no_endpoint(text),
        },
        Request::Explain(asked) => match explain(&admin.scope, &tables, &progress.last_good, asked)
        {
            Ok(explanation) => Response::Explanation(Box::new(explanation)),
            Err(none) => none.into(),
        },
        Request::TableList => {
            Response::Tables(dumps(&tables).into_iter().map(|dump| dump.name).collect())
        }
        Request::TableGet { table } => {
            match dumps(&tables).into_iter().find(|dump| dump.name == *table) {
                Some(dump) => Response::Table(dump),
                None => Response::Error(format!(
                    "there is no table {table:?}; for the names: palisade get"
                )),
            }
        }
        Request::Metrics => Response::Metrics(metrics(admin, &tables)),
        Request::Observe(_) => Response::End,
    }
}

fn no_endpoint(text: &str) -> Response {
    Response::Error(format!(
        "there is no endpoint {text:?}; name it by number, namespace/pod or address: \
         palisade endpoint list"
    ))
}

fn status(admin: &Admin, tables: &Tables, progress: &Progress) -> Status {
    let refused = |row: &&std::sync::Arc<crate::tables::policies::PolicyObject>| {
        matches!(row.content, PolicyContent::Refused { .. })
    };
    let node = tables.node(&admin.scope.node);
    let ready_after = admin.readiness.after();
    let usage = admin.attachments.borrow().as_ref().map(|open| open.usage()).unwrap_or_default();
    let in_force = |row: &EndpointRow| {
        progress.endpoints.contains_key(&row.id) && !admin.health.has_problem(&row.interface)
    };
    Status {
        version: env!("CARGO_PKG_VERSION").into(),
        node: admin.scope.node.clone(),
        cluster: admin.scope.cluster.clone(),
        ready: ready_after.is_some(),
        ready_after_ms: ready_after.and_then(|after| u64::try_from(after.as_millis()).ok()),
        uptime_seconds: admin.begun.elapsed().as_secs(),
        pid: std::process::id(),
        inputs: tables
            .inputs()
            .into_iter()
            .map(|input| Input {
                kind: input.kind.into(),
                complete: input.complete,
                objects: input.rows,
                error: input.error,
            })
            .collect(),
        policy_revision: progress.revision,
        problems: progress.problems.iter().cloned().chain(admin.health.problems()).collect(),
        endpoints: tables.endpoints.len(),
        endpoints_not_ready: tables.endpoints.rows().filter(|row| !in_force(row)).count(),
        pods: tables.endpoints.is_complete().then(|| pods(admin, tables)),
        identities: tables.identities.len(),
        policies: tables.policies.rows().count(),
        policies_refused: tables.policies.rows().filter(refused).count(),
        policies_last_good: progress.last_good.len(),
        services: tables.service_entries.len(),
        addresses: node.map(|node| node.own_addresses().collect()).unwrap_or_default(),
        pod_cidrs: node
            .map(|node| node.pod_cidrs.iter().map(ToString::to_string).collect())
            .unwrap_or_default(),
        ipam: usage.iter().map(|(used, total)| format!("{used}/{total}")).collect(),
        remote_nodes: tables.nodes.rows().filter(|row| row.name != admin.scope.node).count(),
        l7_proxy: admin.proxy.acknowledged().is_some(),
    }
}

fn pods(admin: &Admin, tables: &Tables) -> BTreeMap<String, EndpointObject> {
    let attempts = admin.attempts.borrow();
    let object = |pod| match attempts.failure(pod) {
        None => EndpointObject::Current,
        Some(why) => EndpointObject::Unwritten(why.to_owned()),
    };
    tables.endpoints.rows().map(|row| (row.pod.to_string(), object(&row.pod))).collect()
}

fn endpoint(admin: &Admin, tables: &Tables, progress: &Progress, row: &EndpointRow) -> Endpoint {
    let now = progress.endpoints.get(&row.id);
    let entry = tables.policy_entries.get(&row.id);
    let identity = now.map_or(palisade_abi::identity::INIT, |now| now.identity);
    let state = match now {
        _ if admin.health.has_problem(&row.interface) => "not-ready",
        None => "not-ready",
        Some(now) if now.identity == palisade_abi::identity::INIT => "waiting-for-identity",
        Some(_) => "ready",
    };
    Endpoint {
        id: row.id,
        namespace: row.pod.namespace.clone(),
        pod: row.pod.name.clone(),
        container_id: row.container_id.clone(),
        state: state.into(),
        identity,
        labels: identities_labels(tables, identity),
        ipv4: row.ipv4.map(Into::into),
        ipv6: row.ipv6.map(Into::into),
        interface: row.interface.clone(),
        row: row.id,
        ingress_enforced: entry.is_some_and(|entry| entry.ingress.policy().is_some()),
        egress_enforced: entry.is_some_and(|entry| entry.egress.policy().is_some()),
        policy_revision: now.map(|now| now.revision).unwrap_or_default(),
    }
}

fn identities_labels(tables: &Tables, id: u32) -> Vec<String> {
    tables.labels_of(id).iter().map(ToString::to_string).collect()
}

fn identities(tables: &Tables) -> Vec<Identity> {
    let ids = RESERVED.into_iter().chain(tables.identities.rows().map(|row| row.id));
    ids.map(|id| Identity { id, labels: identities_labels(tables, id) }).collect()
}

fn policy<'a>(
    tables: &Tables,
    progress: &Progress,
    endpoints: impl Iterator<Item = &'a std::sync::Arc<EndpointRow>>,
) -> PolicyReport {
    let policies = tables.policies.rows().map(|row| {
        let (valid, error, rules) = match &row.content {
            PolicyContent::Accepted(policy) => (true, None, policy.rules.len()),
            PolicyContent::Refused { message, lockdown } => {
                (false, Some(message.clone()), lockdown.rules.len())
            }
        };
        PolicyState {
            policy: row.id.to_string(),
            valid,
            error,
            last_good_in_force: progress.last_good.contains_key(&row.id),
            awaits_proxy: progress.awaiting_proxy.contains(&row.id),
            rules,
        }
    });
    let endpoints = endpoints.map(|row| {
        let now = progress.endpoints.get(&row.id);
        let entry = tables.policy_entries.get(&row.id);
        EndpointPolicy {
            endpoint: row.id,
            pod: row.pod.to_string(),
            identity: now.map_or(palisade_abi::identity::INIT, |now| now.identity),
            ingress: direction(
                now.map_or(TABLE_NONE, |now| now.ingress_table),
                entry.map(|entry| &entry.ingress),
            ),
            egress: direction(
                now.map_or(TABLE_NONE, |now| now.egress_table),
                entry.map(|entry| &entry.egress),
            ),
        }
    });
    PolicyReport {
        revision: progress.revision,
        policies: policies.collect(),
        endpoints: endpoints.collect(),
    }
}

fn direction(table: u32, enforcement: Option<&Enforcement>) -> DirectionPolicy {
    let policy = enforcement.and_then(Enforcement::policy);
    let rules = policy.into_iter().flat_map(|policy| &policy.rules).map(|rule| {
        let name = rule_name(&rule.source);
        RuleState { action: rule.action.to_string(), policy: name.policy, path: name.path }
    });
    DirectionPolicy {
        enforced: policy.is_some(),
        table,
        default_deny_by: policy
            .into_iter()
            .flat_map(|policy| &policy.default_deny_by)
            .map(ToString::to_string)
            .collect(),
        rules: rules.collect(),
    }
}

fn dumps(tables: &Tables) -> Vec<TableDump> {
    let mut policies = TableDump {
        name: "policies".into(),
        revision: 0,
        complete: true,
        columns: Vec::new(),
        rows: Vec::new(),
    };
    for table in tables.policies.all() {
        let part = dump(table);
        policies.revision += part.revision;
        policies.complete &= part.complete;
        policies.columns = part.columns;
        policies.rows.extend(part.rows);
    }
    vec![
        dump(&tables.namespaces),
        dump(&tables.pods),
        policies,
        dump(&tables.services),
        dump(&tables.slices),
        dump(&tables.nodes),
        dump(&tables.identities),
        dump(&tables.endpoints),
        dump(&tables.pod_identities),
        dump(&tables.addresses),
        dump(&tables.prefixes),
        dump(&tables.names),
        dump(&tables.policy_entries),
        dump(&tables.service_entries),
        dump(&tables.routes),
    ]
}

fn dump<R: Row>(table: &Table<R>) -> TableDump {
    TableDump {
        name: R::TABLE.into(),
        revision: table.revision(),
        complete: table.is_complete(),
        columns: R::COLUMNS.iter().map(|&title| title.to_owned()).collect(),
        rows: table.rows().map(|row| row.columns()).collect(),
    }
}

fn metrics(admin: &Admin, tables: &Tables) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: u64| {
        // Writing to a string never fails.
        let _ = writeln!(text, "palisade_{name} {value}");
    };
    line("endpoint", tables.endpoints.len() as u64);
    line("policy", tables.policies.rows().count() as u64);
    line("identity", tables.identities.len() as u64);
    line("problems", admin.health.problems().len() as u64);
    line("endpoint_programs_reattached_total", admin.health.reattached());
    let Ok(counters) = admin.datapath.metrics() else { return text };
    for reason in DropReason::ALL {
        let value = counters.drops(reason);
        let label = format!("{{reason=\"{}\"}}", reason.as_str());
        line(&format!("drop_count_total{label}"), value.packets);
        line(&format!("drop_bytes_total{label}"), value.bytes);
    }
    line("flows_created_total", counters.slot(metric_index::FLOWS_CREATED).packets);
    line("flows_rejudged_total", counters.slot(metric_index::FLOWS_REJUDGED).packets);
    line("slow_path_total", counters.slot(metric_index::SLOW_PATH).packets);
    line("events_lost_total", counters.events_lost());
    text
}
