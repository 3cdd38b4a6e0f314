//! Collection of identities that nobody uses.
//!
//! Agents find an identity by its labels and use its number at once, so a number must never be
//! freed under them. In use is what a `CiliumEndpoint` names and what the labels of a pod make, be
//! the pod started or not. What is neither gets a mark; agents do not know identities with a mark,
//! and take the mark off before they use one. What kept its mark for the whole grace is deleted, in
//! exactly the version that was read: an agent that was faster has changed it.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use k8s_openapi::{
    api::core::v1::{Namespace, Pod},
    jiff::Timestamp,
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, DynamicObject, Patch, PatchParams, Preconditions},
};
use palisade_abi::identity as number;
use palisade_api::{
    client::{Patience, chain},
    crd::UNUSED_SINCE,
};
use palisade_policy::{
    identity::{PodLabels, security_labels},
    label::Labels,
};
use serde_json::{Value, json};
use tracing::{info, warn};

use crate::{
    leader::Watch,
    metrics::Metrics,
    objects::{list, resource},
};

/// Between two rounds: a part of the grace, within these bounds.
const ROUNDS_PER_GRACE: u32 = 6;
const PERIOD: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));

/// What is known at the begin of a round.
#[derive(Debug, Default)]
struct InUse {
    numbers: HashSet<u32>,
    labels: HashSet<Labels>,
}

/// What is to be done with an identity.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Keep,
    Mark,
    Unmark,
    Delete,
}

/// Collects for one cluster.
pub(crate) struct Collector {
    client: Client,
    cluster: String,
    grace: Duration,
}

impl Collector {
    pub(crate) fn new(client: Client, cluster: &str, grace: Duration) -> Self {
        Self { client, cluster: cluster.to_owned(), grace }
    }

    /// Collects until it is dropped.
    pub(crate) async fn run(self, term: Watch, metrics: Arc<Metrics>) {
        let period = (self.grace / ROUNDS_PER_GRACE).clamp(PERIOD.0, PERIOD.1);
        let mut patience = Patience::default();
        loop {
            let mut pause = period;
            if let Err(error) = self.round(&term, &metrics).await {
                metrics.failed();
                warn!(error = chain(&*error), "cannot collect identities yet");
                pause = pause.max(patience.after(&*error));
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn round(&self, term: &Watch, metrics: &Metrics) -> anyhow::Result<()> {
        // Identities first: one that is made meanwhile is not among them, and the pod that uses
        // one of these is found after.
        let api: Api<DynamicObject> =
            Api::all_with(self.client.clone(), &resource("CiliumIdentity", "ciliumidentities"));
        let identities = list(&api).await?;
        let in_use = self.in_use().await?;
        let now = Timestamp::now();
        let (mut total, mut unused) = (0, 0);
        for identity in &identities {
            let step = step(identity, &in_use, now, self.grace);
            total += 1;
            unused += u64::from(matches!(step, Step::Mark | Step::Delete) || is_marked(identity));
            anyhow::ensure!(term.leads(), "another one may lead by now");
            match step {
                Step::Keep => {}
                Step::Mark => mark(&api, identity, json!(now.to_string())).await?,
                Step::Unmark => mark(&api, identity, Value::Null).await?,
                Step::Delete => {
                    if delete(&api, identity).await? {
                        (total, unused) = (total - 1, unused - 1);
                        info!(
                            identity = identity.name_any(),
                            "nobody used the identity; it is gone"
                        );
                        metrics.identities_collected.fetch_add(1, Relaxed);
                    }
                }
            }
        }
        metrics.identities.store(total, Relaxed);
        metrics.identities_unused.store(unused, Relaxed);
        Ok(())
    }

    async fn in_use(&self) -> anyhow::Result<InUse> {
        let endpoints: Api<DynamicObject> =
            Api::all_with(self.client.clone(), &resource("CiliumEndpoint", "ciliumendpoints"));
        let endpoints = list(&endpoints).await?;
        let ids =
            endpoints.iter().filter_map(|it| it.data.pointer("/status/identity/id")?.as_u64());
        let numbers = ids.filter_map(|id| u32::try_from(id).ok()).collect();
        let namespaces = list(&Api::<Namespace>::all(self.client.clone())).await?;
        let namespaces: BTreeMap<String, BTreeMap<String, String>> = namespaces
            .into_iter()
            .map(|it| (it.name_any(), it.metadata.labels.unwrap_or_default()))
            .collect();
        let pods = list(&Api::<Pod>::all(self.client.clone())).await?;
        let labels = pods.iter().map(|pod| self.labels(pod, &namespaces)).collect();
        Ok(InUse { numbers, labels })
    }

    fn labels(&self, pod: &Pod, namespaces: &BTreeMap<String, BTreeMap<String, String>>) -> Labels {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.as_deref());
        security_labels(&PodLabels {
            namespace,
            namespace_labels: namespaces.get(namespace),
            pod_labels: pod.metadata.labels.as_ref(),
            service_account: account.filter(|name| !name.is_empty()).unwrap_or("default"),
            cluster: &self.cluster,
        })
    }
}

fn is_marked(identity: &DynamicObject) -> bool {
    identity.annotations().contains_key(UNUSED_SINCE)
}

fn step(identity: &DynamicObject, in_use: &InUse, now: Timestamp, grace: Duration) -> Step {
    let Some(id) = identity.name_any().parse().ok() else { return Step::Keep };
    if !(number::CLUSTER_MIN..=number::CLUSTER_MAX).contains(&id) {
        return Step::Keep;
    }
    // Labels that nobody can read belong to nobody.
    let labels = identity.data.get("security-labels").cloned().unwrap_or_default();
    let labels = serde_json::from_value(labels).map(|it| Labels::from_security_labels(&it)).ok();
    let used = in_use.numbers.contains(&id)
        || labels.is_some_and(|labels| in_use.labels.contains(&labels));
    let Some(since) = identity.annotations().get(UNUSED_SINCE) else {
        return if used { Step::Keep } else { Step::Mark };
    };
    if used {
        return Step::Unmark;
    }
    let Ok(since) = since.parse::<Timestamp>() else { return Step::Mark };
    let unused = Duration::try_from(now.duration_since(since)).unwrap_or_default();
    if unused < grace { Step::Keep } else { Step::Delete }
}

/// Sets or removes the mark, on exactly the version that was read.
async fn mark(
    api: &Api<DynamicObject>,
    identity: &DynamicObject,
    since: Value,
) -> kube::Result<()> {
    let patch = json!({ "metadata": {
        "uid": identity.metadata.uid,
        "resourceVersion": identity.metadata.resource_version,
        "annotations": { UNUSED_SINCE: since },
    }});
    let params = PatchParams::default();
    changed_is_done(api.patch(&identity.name_any(), &params, &Patch::Merge(&patch)).await.map(drop))
        .map(drop)
}

/// Whether it is gone by this call.
async fn delete(api: &Api<DynamicObject>, identity: &DynamicObject) -> kube::Result<bool> {
    let version = Preconditions {
        uid: identity.metadata.uid.clone(),
        resource_version: identity.metadata.resource_version.clone(),
    };
    let params = DeleteParams::default().preconditions(version);
    changed_is_done(api.delete(&identity.name_any(), &params).await.map(drop))
}

/// Somebody was faster: the next round sees what it is now. Otherwise, whether it was done.
fn changed_is_done(outcome: kube::Result<()>) -> kube::Result<bool> {
    match outcome {
        Ok(()) => Ok(true),
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(60);

    fn identity(name: &str, app: &str, since: Option<&str>) -> DynamicObject {
        let mut object = DynamicObject::new(name, &resource("CiliumIdentity", "ciliumidentities"));
        object.data = json!({ "security-labels": { "k8s:app": app } });
        if let Some(since) = since {
            object.annotations_mut().insert(UNUSED_SINCE.into(), since.into());
        }
        object
    }

    #[test]
    fn a_number_goes_only_after_the_grace_and_only_when_nobody_uses_it() {
        let now: Timestamp = "2026-01-01T00:02:00Z".parse().unwrap();
        let used = InUse {
            numbers: HashSet::from([300]),
            labels: HashSet::from([Labels::from_security_labels(&BTreeMap::from([(
                "k8s:app".into(),
                "web".into(),
            )]))]),
        };
        let step = |name, app, since| step(&identity(name, app, since), &used, now, GRACE);
        let (recent, old) = (Some("2026-01-01T00:01:01Z"), Some("2026-01-01T00:00:59Z"));
        assert_eq!(step("400", "gone", None), Step::Mark);
        assert_eq!(step("400", "gone", recent), Step::Keep);
        assert_eq!(step("400", "gone", old), Step::Delete);
        // By number, as an endpoint names it, and by labels, as a pod has them.
        for (name, app) in [("300", "gone"), ("400", "web")] {
            assert_eq!(step(name, app, None), Step::Keep);
            assert_eq!(step(name, app, old), Step::Unmark);
        }
        // A mark that nobody can read is written again; a clock that goes backwards waits.
        assert_eq!(step("400", "gone", Some("yesterday")), Step::Mark);
        assert_eq!(step("400", "gone", Some("2027-01-01T00:00:00Z")), Step::Keep);
        // What is no number of ours is not ours.
        assert_eq!(step("1", "gone", old), Step::Keep);
        assert_eq!(step("kube-system", "gone", old), Step::Keep);
    }
}
