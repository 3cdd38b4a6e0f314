//! `palisade uninstall`: everything that was applied, and what agents left on the nodes.

use std::{collections::BTreeSet, time::Duration};

use anyhow::Result;
use clap::Args;
use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        coordination::v1::Lease,
        core::v1::{Node, Pod, Secret},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams},
    core::{ApiResource, GroupVersionKind},
    runtime::{conditions::is_deleted, wait::await_condition},
};
use palisade_api::crd;
use serde_json::{Value, json};

use super::{
    Place, apply,
    record::{self, Record, Reference},
    rollout,
};
use crate::{
    chart::Chart,
    cli::{Global, duration},
    cluster,
    exit::{Exit, Failure},
    output::{self, note},
    progress::Progress,
};

const TAINT: &str = "node.cilium.io/agent-not-ready";
const CLEANER: &str = "palisade-clean";
/// Labels of pods.
const RUNNING: &str = "k8s-app in (palisade, palisade-operator)";
const CLEANING: &str = "k8s-app=palisade-clean";

#[derive(Debug, Args)]
pub(crate) struct UninstallArgs {
    #[command(flatten)]
    place: Place,
    /// Delete the policies of the group cilium.io too; without this they must be gone before.
    #[arg(long)]
    delete_policies: bool,
    /// Delete the Secrets in the namespace that agents read them from; without this they must be
    /// gone before.
    #[arg(long)]
    delete_secrets: bool,
    /// Leave the nodes as they are: their pods keep their connections, and the policies in force
    /// stay, until the nodes are started anew.
    #[arg(long)]
    keep_nodes: bool,
    /// How long to wait for the nodes at most, such as 90s or 5m.
    #[arg(long, default_value = "5m", value_name = "DURATION", value_parser = duration)]
    wait_duration: Duration,
}

pub(crate) fn uninstall(global: &Global, args: &UninstallArgs) -> Result<Exit> {
    output::for_people_only(global.output, "Leave -o json away.")?;
    cluster::on_runtime(None, async {
        let client = cluster::client(global).await?;
        let record = Record::require(&client, &args.place.namespace).await?;
        // What is in no namespace of its own belongs to the other one too, the nodes included.
        let other = super::other_installation(&client, &args.place.namespace).await?;
        let own = |it: &Reference| it.namespace.as_ref() == Some(&args.place.namespace);
        let mut ours = record.objects.clone();
        ours.retain(|it| other.is_none() || own(it));
        if !args.delete_policies && other.is_none() {
            let secrets = if args.delete_secrets { " --delete-secrets" } else { "" };
            let then = format!("palisade uninstall --delete-policies{secrets}");
            refuse_to_lose_policies(&client, &then).await?;
        }
        if !args.delete_secrets {
            let policies = if args.delete_policies { " --delete-policies" } else { "" };
            let then = format!("palisade uninstall{policies} --delete-secrets");
            refuse_to_lose_secrets(&client, &ours, &then).await?;
        }
        end_cleaning(&client, &args.place.namespace, args.wait_duration).await?;
        // The operator first: it would put back what goes.
        for object in ours.iter().rev() {
            delete(&client, object).await?;
        }
        let limit = args.wait_duration;
        let pods_end = gone(&client, &args.place.namespace, RUNNING);
        bounded("pods of Palisade are still there", limit, pods_end).await?;
        if let Some(other) = other {
            forget(&client, &args.place.namespace).await?;
            note!(
                "\nWhat Palisade in the namespace {other} uses is still there. Give it its rights \
                 again with:\n  palisade upgrade -n {other}"
            );
            return Ok(Exit::Ok);
        }
        if !args.keep_nodes {
            let chart = Chart::of_record(&record.values, &args.place.namespace)?;
            clean_nodes(&client, &chart, &args.place.namespace, limit).await?;
        }
        restore_nodes(&client).await?;
        delete_definitions(&client, limit).await?;
        forget(&client, &args.place.namespace).await?;
        note!("\nPalisade is gone. Pods that it connected need another network, and a new start.");
        Ok(Exit::Ok)
    })
}

/// The Lease and the record, last of all.
async fn forget(client: &Client, namespace: &str) -> Result<()> {
    let leases: Api<Lease> = Api::namespaced(client.clone(), namespace);
    gone_is_done(leases.delete("palisade-operator", &DeleteParams::default()).await)?;
    let own = Reference {
        api_version: "v1".into(),
        kind: "ConfigMap".into(),
        namespace: Some(namespace.to_owned()),
        name: record::NAME.into(),
    };
    delete(client, &own).await
}

/// Deletes one object, and waits for those that depend on it.
pub(super) async fn delete(client: &Client, object: &Reference) -> Result<()> {
    let api = apply::api(client, object)?;
    gone_is_done(api.delete(&object.name, &DeleteParams::background()).await)?;
    note!("{object} deleted");
    Ok(())
}

fn gone_is_done<T>(outcome: kube::Result<T>) -> kube::Result<()> {
    match outcome {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => other.map(drop),
    }
}

async fn bounded(
    what: &str,
    limit: Duration,
    work: impl Future<Output = Result<()>>,
) -> Result<()> {
    let _progress = Progress::start("waiting until it is gone");
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
        Err(Failure::refused(
            format!("after {} s, {what}", limit.as_secs()),
            "Run the command again: it goes on from there.",
        )
        .into())
    })
}

/// Policies are somebody's work: they do not go without a word.
async fn refuse_to_lose_policies(client: &Client, then: &str) -> Result<()> {
    let mut found = Vec::new();
    for (kind, plural) in [
        ("CiliumNetworkPolicy", "ciliumnetworkpolicies"),
        ("CiliumClusterwideNetworkPolicy", "ciliumclusterwidenetworkpolicies"),
    ] {
        let kind = GroupVersionKind::gvk(crd::GROUP, crd::VERSION, kind);
        let resource = ApiResource::from_gvk_with_plural(&kind, plural);
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
        match api.list(&ListParams::default()).await {
            Ok(list) if list.items.is_empty() => {}
            Ok(list) => found.push(format!("{} {plural}", list.items.len())),
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error.into()),
        }
    }
    if found.is_empty() {
        return Ok(());
    }
    Err(Failure::refused(
        format!("{} would be lost with their definitions", found.join(" and ")),
        format!(
            "Nothing was changed. Keep a copy with:  kubectl get cnp,ccnp -A -o yaml\n\
             and then:                             {then}"
        ),
    )
    .into())
}

/// Secrets that somebody put into a namespace which goes are lost with it.
pub(super) async fn refuse_to_lose_secrets(
    client: &Client,
    going: &[Reference],
    then: &str,
) -> Result<()> {
    for Reference { name, .. } in going.iter().filter(|object| object.kind == "Namespace") {
        let secrets: Api<Secret> = Api::namespaced(client.clone(), name);
        let count = secrets.list_metadata(&ListParams::default()).await?.items.len();
        if count > 0 {
            return Err(Failure::refused(
                format!("{count} secrets would be lost with the namespace {name}"),
                format!(
                    "Nothing was changed. Keep a copy with:  kubectl get secrets -n {name} -o yaml\n\
                     and then:                             {then}"
                ),
            )
            .into());
        }
    }
    Ok(())
}

/// Ends what an uninstallation that failed left behind: it is in no record, and would clean a node
/// beside its new agent. Of another namespace, too: the nodes are the same.
pub(super) async fn end_cleaning(client: &Client, namespace: &str, limit: Duration) -> Result<()> {
    let mut namespaces = BTreeSet::from([namespace.to_owned()]);
    let all: Api<DaemonSet> = Api::all(client.clone());
    let ours = ListParams::default()
        .labels(&format!("app.kubernetes.io/part-of=palisade,{CLEANING}"))
        .fields(&format!("metadata.name={CLEANER}"));
    for left in all.list(&ours).await?.items {
        let namespace = left.namespace().unwrap_or_default();
        let cleaner = Reference {
            api_version: "apps/v1".into(),
            kind: "DaemonSet".into(),
            namespace: Some(namespace.clone()),
            name: CLEANER.into(),
        };
        delete(client, &cleaner).await?;
        namespaces.insert(namespace);
    }
    let pods_end = async {
        for namespace in &namespaces {
            gone(client, namespace, CLEANING).await?;
        }
        Ok(())
    };
    bounded("pods that clean nodes are still there", limit, pods_end).await
}

/// Waits until no such pod runs: an agent would put back on its node what is cleaned there.
async fn gone(client: &Client, namespace: &str, pods: &str) -> Result<()> {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    for pod in api.list(&ListParams::default().labels(pods)).await?.items {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        await_condition(api.clone(), &pod.name_any(), is_deleted(&uid)).await?;
    }
    Ok(())
}

async fn clean_nodes(
    client: &Client,
    chart: &Chart,
    namespace: &str,
    limit: Duration,
) -> Result<()> {
    let cleaner = chart.clean()?;
    apply::apply(client, &cleaner).await?;
    let api: Api<DaemonSet> = Api::namespaced(client.clone(), namespace);
    let done = async {
        let done = |it: Option<&DaemonSet>| it.is_some_and(rollout::is_rolled_out);
        await_condition(api, CLEANER, done).await?;
        Ok(())
    };
    bounded(
        "some nodes are not cleaned; see the pods of the DaemonSet palisade-clean",
        limit,
        done,
    )
    .await?;
    delete(client, &Reference::of(&cleaner)).await
}

/// What the operator wrote into nodes: its taint, and that there is a network.
async fn restore_nodes(client: &Client) -> Result<()> {
    let api: Api<Node> = Api::all(client.clone());
    for node in api.list(&ListParams::default()).await?.items {
        untaint(&api, &node.name_any()).await?;
        if says_available(&node) {
            let gone = json!({ "$patch": "delete", "type": "NetworkUnavailable" });
            let patch = Patch::Strategic(json!({ "status": { "conditions": [gone] } }));
            let params = PatchParams::default();
            gone_is_done(api.patch_status(&node.name_any(), &params, &patch).await)?;
        }
    }
    Ok(())
}

/// Kubelets and controllers write nodes too: a conflict is no reason to give up.
async fn untaint(api: &Api<Node>, name: &str) -> Result<()> {
    const ATTEMPTS: usize = 10;
    let mut outcome = Ok(());
    for _ in 0..ATTEMPTS {
        let Some(patch) = api.get_opt(name).await?.as_ref().and_then(without_taint) else {
            return Ok(());
        };
        let params = PatchParams::default();
        outcome = gone_is_done(api.patch(name, &params, &Patch::Merge(&patch)).await);
        if !matches!(&outcome, Err(kube::Error::Api(status)) if status.code == 409) {
            break;
        }
    }
    Ok(outcome?)
}

/// The patch for exactly this version of the node, where it has our taint.
fn without_taint(node: &Node) -> Option<Value> {
    let taints = node.spec.as_ref()?.taints.as_ref()?;
    let others: Vec<_> = taints.iter().filter(|taint| taint.key != TAINT).collect();
    (others.len() < taints.len()).then(|| {
        json!({
            "metadata": { "resourceVersion": node.metadata.resource_version },
            "spec": { "taints": others },
        })
    })
}

/// The operator said so, not a cloud's controller.
fn says_available(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions
        .into_iter()
        .any(|it| it.type_ == "NetworkUnavailable" && it.reason.as_deref() == Some("PalisadeIsUp"))
}

/// They go once their objects are gone, which takes the API server a moment.
async fn delete_definitions(client: &Client, limit: Duration) -> Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let mut going = Vec::new();
    for definition in crd::all() {
        let name = definition.name_any();
        let deleted = api.delete(&name, &DeleteParams::default()).await;
        match deleted.map(|deleted| deleted.left()) {
            Ok(Some(found)) => going.push((name, found.uid().unwrap_or_default())),
            outcome => gone_is_done(outcome)?,
        }
    }
    let gone = async {
        for (name, uid) in &going {
            await_condition(api.clone(), name, is_deleted(uid)).await?;
            note!("customresourcedefinition/{name} deleted");
        }
        Ok(())
    };
    bounded("definitions of resources are still there", limit, gone).await
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    #[tokio::test]
    async fn a_conflict_is_followed_by_another_attempt_with_the_new_version() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", server.local_addr().unwrap()).parse().unwrap();
        let client = Client::try_from(kube::Config::new(url)).unwrap();
        let node = |version: &str, taints: Value| {
            json!({ "apiVersion": "v1", "kind": "Node", "spec": { "taints": taints },
                    "metadata": { "name": "a", "resourceVersion": version } })
        };
        let ours = json!([{ "key": TAINT, "effect": "NoSchedule" }]);
        let conflict = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure",
                               "reason": "Conflict", "message": "changed", "code": 409 });
        let script = [
            ("GET", 200, node("1", ours.clone())),
            ("PATCH", 409, conflict),
            ("GET", 200, node("2", ours)),
            ("PATCH", 200, node("3", json!([]))),
        ];
        let serving = tokio::spawn(async move {
            for (method, status, body) in script {
                let (mut stream, _) = server.accept().await.unwrap();
                let mut request = vec![0; 64 << 10];
                let length = stream.read(&mut request).await.unwrap();
                let request = String::from_utf8_lossy(&request[..length]).into_owned();
                assert!(request.starts_with(method), "{request}");
                let answer = format!("HTTP/1.1 {status} x\r\nconnection: close\r\n\r\n{body}");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        untaint(&Api::all(client), "a").await.unwrap();
        serving.await.unwrap();
    }
}
