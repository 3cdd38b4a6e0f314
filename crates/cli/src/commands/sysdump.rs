//! `palisade sysdump`: what is known of a cluster's network, in files, for whoever looks for a
//! fault. No Secret is read, and values of environment variables are left out.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use clap::Args;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, ResourceExt,
    api::{ApiResource, DynamicObject, ListParams, LogParams},
    core::GroupVersionKind,
};
use palisade_api::admin::{Observe, Request, Response};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    agents::{self, Agent},
    cli::Global,
    cluster,
    commands::observe,
    exit::Exit,
    output::{self, Format, note},
    progress::Progress,
};

#[derive(Debug, Args)]
pub(crate) struct SysdumpArgs {
    /// Directory to write to; a new one with the time in its name by default.
    #[arg(long, value_name = "DIR")]
    output_directory: Option<PathBuf>,
}

/// Group, version, kind, plural.
const KINDS: [(&str, &str, &str, &str); 17] = [
    ("", "v1", "Node", "nodes"),
    ("", "v1", "Namespace", "namespaces"),
    ("", "v1", "Pod", "pods"),
    ("", "v1", "Service", "services"),
    ("", "v1", "Event", "events"),
    ("apps", "v1", "DaemonSet", "daemonsets"),
    ("apps", "v1", "Deployment", "deployments"),
    ("coordination.k8s.io", "v1", "Lease", "leases"),
    ("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices"),
    ("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies"),
    ("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    ("cilium.io", "v2", "CiliumNetworkPolicy", "ciliumnetworkpolicies"),
    ("cilium.io", "v2", "CiliumClusterwideNetworkPolicy", "ciliumclusterwidenetworkpolicies"),
    ("cilium.io", "v2", "CiliumEndpoint", "ciliumendpoints"),
    ("cilium.io", "v2", "CiliumIdentity", "ciliumidentities"),
    ("cilium.io", "v2", "CiliumNode", "ciliumnodes"),
    ("", "v1", "ConfigMap", "configmaps"),
];
/// The only ConfigMaps that are ours to show.
const CONFIG: [&str; 2] = ["palisade-config", "palisade-install"];
const PODS: &str = "k8s-app in (palisade, palisade-operator)";
const LOG_BYTES: i64 = 8 << 20;
const FLOWS: usize = 2000;

pub(crate) fn run(global: &Global, args: SysdumpArgs) -> Result<Exit> {
    let collected = collect(global, args.output_directory)?;
    match global.output {
        Format::Json => output::json(&collected)?,
        Format::Table => note!("{collected}"),
    }
    Ok(Exit::Ok)
}

/// What was collected, where.
#[derive(Serialize)]
pub(crate) struct Collected {
    directory: PathBuf,
    errors: Vec<String>,
}

impl fmt::Display for Collected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Collected in {} ({} errors)", self.directory.display(), self.errors.len())
    }
}

/// Writes everything that can be had; what cannot is in `errors.txt`.
pub(crate) fn collect(global: &Global, directory: Option<PathBuf>) -> Result<Collected> {
    let directory = directory.unwrap_or_else(|| {
        let now = jiff::Zoned::now().strftime("%Y%m%d-%H%M%S");
        PathBuf::from(format!("palisade-sysdump-{now}"))
    });
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let _progress = Progress::start("collecting");
    let mut dump = Collected { directory, errors: Vec::new() };
    for agent in agents::discover(&global.socket) {
        let name = format!("agent-{}.json", agent.name.replace('/', "-"));
        dump.write(&name, agent_state(&agent));
    }
    let read = cluster::on_runtime(None, async {
        let client = cluster::client(global).await?;
        dump.objects(&client).await;
        dump.pods(&client).await
    });
    if let Err(error) = read {
        dump.errors.push(format!("{error:#}"));
    }
    let errors = dump.errors.join("\n");
    fs::write(dump.directory.join("errors.txt"), format!("{errors}\n"))?;
    Ok(dump)
}

impl Collected {
    fn write(&mut self, name: &str, content: Result<impl Serialize>) {
        let path = self.directory.join(name);
        let written =
            content.and_then(|content| Ok(fs::write(&path, serde_json::to_vec_pretty(&content)?)?));
        self.note(name, written);
    }

    fn note(&mut self, name: &str, outcome: Result<()>) {
        if let Err(error) = outcome {
            self.errors.push(format!("{name}: {error:#}"));
        }
    }

    async fn objects(&mut self, client: &Client) {
        for (group, version, kind, plural) in KINDS {
            let kind = GroupVersionKind::gvk(group, version, kind);
            let resource = ApiResource::from_gvk_with_plural(&kind, plural);
            let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
            let objects = api.list(&ListParams::default()).await.map(|list| {
                let ours = |it: &DynamicObject| CONFIG.contains(&it.name_any().as_str());
                let shown = list.items.into_iter().filter(|it| plural != "configmaps" || ours(it));
                shown.map(|object| redacted(json!(object))).collect::<Vec<_>>()
            });
            self.write(&format!("{plural}.json"), objects.map_err(Into::into));
        }
    }

    /// Logs of our pods, and what agents there say of themselves.
    async fn pods(&mut self, client: &Client) -> Result<()> {
        let all: Api<Pod> = Api::all(client.clone());
        for pod in all.list(&ListParams::default().labels(PODS)).await?.items {
            let name = pod.name_any();
            let api: Api<Pod> =
                Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
            let spec = pod.spec.as_ref();
            let before = spec.and_then(|spec| spec.init_containers.as_deref()).unwrap_or_default();
            let main = spec.map(|spec| spec.containers.as_slice()).unwrap_or_default();
            for container in before.iter().chain(main) {
                for previous in [false, true] {
                    self.log(&api, &name, &container.name, previous).await;
                }
            }
            if main.iter().any(|container| container.name == "agent") {
                let command = ["/palisade", "node", "dump"].map(str::to_owned).to_vec();
                let said = cluster::exec(&api, &name, Some("agent"), command, None).await;
                let state = said.and_then(|(_, text)| {
                    serde_json::from_str::<Value>(&text).context("unreadable answer")
                });
                self.write(&format!("agent-{name}.json"), state);
            }
        }
        Ok(())
    }

    async fn log(&mut self, api: &Api<Pod>, pod: &str, container: &str, previous: bool) {
        let params = LogParams {
            container: Some(container.to_owned()),
            limit_bytes: Some(LOG_BYTES),
            previous,
            timestamps: true,
            ..LogParams::default()
        };
        let name = format!("{pod}-{container}{}.log", if previous { "-previous" } else { "" });
        match api.logs(pod, &params).await {
            Ok(log) => {
                let written = fs::write(self.directory.join(&name), log).map_err(Into::into);
                self.note(&name, written);
            }
            // Most containers have no previous life.
            Err(_) if previous => {}
            Err(error) => self.note(&name, Err(error.into())),
        }
    }
}

/// Everything that an agent tells.
pub(crate) fn agent_state(agent: &Agent) -> Result<Value> {
    let mut state = json!({
        "status": agent.ask(&Request::Status)?,
        "endpoints": agent.ask(&Request::EndpointList)?,
        "policy": agent.ask(&Request::PolicyGet { endpoint: None })?,
        "metrics": agent.ask(&Request::Metrics)?,
        "flows": observe::past_of(agent, &Observe { last: Some(FLOWS), ..Observe::default() })?,
    });
    if let Response::Tables(tables) = agent.ask(&Request::TableList)? {
        for table in tables {
            state["tables"][&table] =
                json!(agent.ask(&Request::TableGet { table: table.clone() })?);
        }
    }
    Ok(state)
}

/// Without what might be a secret, and without what nobody reads.
fn redacted(mut object: Value) -> Value {
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.remove("managedFields");
        if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
            annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
        }
    }
    redact_environment(&mut object);
    object
}

fn redact_environment(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                if name == "env" {
                    for variable in field.as_array_mut().into_iter().flatten() {
                        if let Some(value) = variable.get_mut("value") {
                            *value = "…".into();
                        }
                    }
                }
                redact_environment(field);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(redact_environment),
        _ => {}
    }
}

/// What `palisade node dump` prints.
pub(crate) fn dump(run_dir: &Path) -> Result<Exit> {
    let socket = run_dir.join(palisade_api::admin::SOCKET);
    let agents = agents::discover(&[socket]);
    let agent = agents.first().context("no socket")?;
    output::json(&agent_state(agent)?)?;
    Ok(Exit::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_the_environment_are_left_out() {
        let object = json!({
            "metadata": {
                "managedFields": [1],
                "annotations": {
                    "kubectl.kubernetes.io/last-applied-configuration": "secret",
                    "a": "b",
                },
            },
            "spec": { "template": { "spec": { "containers": [{ "env": [
                { "name": "A", "value": "secret" },
                { "name": "B", "valueFrom": { "fieldRef": { "fieldPath": "x" } } },
            ]}]}}},
        });
        let shown = redacted(object).to_string();
        assert!(!shown.contains("secret") && !shown.contains("managedFields"), "{shown}");
        assert!(shown.contains("\"a\":\"b\"") && shown.contains("fieldPath"), "{shown}");
    }
}
