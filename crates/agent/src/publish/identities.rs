//! Numbers for labels. The API server's atomic create is the only agreement between agents: all
//! try the same numbers in the same order.

use std::sync::Arc;

use anyhow::bail;
use kube::{
    Api, Client,
    api::{DynamicObject, Patch, PatchParams, PostParams},
};
use palisade_api::{
    client::{Patience, chain},
    crd::UNUSED_SINCE,
};
use palisade_policy::{identity::candidates, label::Labels};
use serde_json::json;
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::{
    engine::Command,
    reflect::identities::{is_unused, object, parse},
    resources,
    tables::{Change, Intent, identities::Identity},
};

/// Finds or makes the number for labels and tells the engine.
pub(super) async fn allocate(
    client: Client,
    labels: Arc<Labels>,
    commands: mpsc::WeakSender<Command>,
) -> Arc<Labels> {
    let api: Api<DynamicObject> = Api::all_with(client, &resources::cilium("CiliumIdentity"));
    let mut patience = Patience::default();
    loop {
        let error = match try_allocate(&api, &labels).await {
            Ok(id) => {
                info!(identity = id, %labels, "identity");
                let identity = Identity { id, labels: labels.clone() };
                if let Some(commands) = commands.upgrade() {
                    let intent = Intent::Identity(Change::Put(identity));
                    // The engine ended: nobody needs the number.
                    let _ = commands.send(Command::Intent(Box::new(intent))).await;
                }
                return labels;
            }
            Err(error) => error,
        };
        warn!(%labels, error = chain(&*error), "cannot allocate an identity yet");
        if commands.strong_count() == 0 {
            return labels;
        }
        tokio::time::sleep(patience.after(&*error)).await;
    }
}

async fn try_allocate(api: &Api<DynamicObject>, labels: &Labels) -> anyhow::Result<u32> {
    for id in candidates(labels) {
        match api.create(&PostParams::default(), &object(id, labels)).await {
            Ok(_) => return Ok(id),
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(error.into()),
        }
        let Some(taken) = api.get_opt(&id.to_string()).await? else { continue };
        if parse(&taken).is_none_or(|identity| *identity.labels != *labels) {
            continue;
        }
        if is_unused(&taken) {
            take_back(api, &taken).await?;
        }
        return Ok(id);
    }
    bail!("every identity of the cluster is taken")
}

/// Keeps the operator from collecting an identity. Should it have been faster, this fails.
async fn take_back(api: &Api<DynamicObject>, identity: &DynamicObject) -> kube::Result<()> {
    let patch = json!({ "metadata": {
        "uid": identity.metadata.uid,
        "resourceVersion": identity.metadata.resource_version,
        "annotations": { UNUSED_SINCE: null },
    }});
    let name = identity.metadata.name.as_deref().unwrap_or_default();
    api.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await.map(drop)
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        sync::{Mutex, PoisonError},
    };

    use palisade_policy::label::Label;
    use serde_json::Value;

    use super::{
        super::fake::{Answer, Asked, refused, server},
        *,
    };

    /// Identities by name: of an API server, what allocation relies on.
    type Objects = Arc<Mutex<BTreeMap<String, Value>>>;

    fn answer(asked: &Asked, objects: &Objects) -> Answer {
        let mut objects = objects.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.method == "get" {
            return objects.get(asked.name()).map_or_else(|| refused(404), |it| (200, it.clone()));
        }
        assert_eq!(asked.method, "post");
        let object = asked.body.clone();
        let name = object["metadata"]["name"].as_str().expect("a name").to_owned();
        if objects.contains_key(&name) {
            return refused(409);
        }
        objects.insert(name, object.clone());
        (201, object)
    }

    /// Many agents at the same moment, some for the same labels, and the numbers that all of them
    /// would rather have are somebody else's.
    #[tokio::test(flavor = "multi_thread")]
    async fn no_number_has_two_meanings_and_no_labels_have_two_numbers() {
        let labels = |app: &str| Labels::from_iter([Label::k8s("app", app)]);
        let sets: Vec<_> = (0..8).map(|n| labels(&n.to_string())).collect();
        let taken: Vec<u32> = sets.iter().flat_map(|set| candidates(set).take(2)).collect();
        let objects = Objects::default();
        for id in &taken {
            let object = serde_json::to_value(object(*id, &labels("other"))).expect("an object");
            objects.lock().expect("alone").insert(id.to_string(), object);
        }
        let shared = objects.clone();
        let client = server(move |asked| answer(asked, &shared)).await;
        let workers = (0..64).map(|worker| {
            let set = sets[worker % sets.len()].clone();
            let api = Api::all_with(client.clone(), &resources::cilium("CiliumIdentity"));
            tokio::spawn(async move { (worker, try_allocate(&api, &set).await) })
        });
        let mut numbers = BTreeMap::<usize, BTreeSet<u32>>::new();
        for worker in workers.collect::<Vec<_>>() {
            let (worker, number) = worker.await.expect("no panic");
            let number = number.expect("a number");
            numbers.entry(worker % sets.len()).or_default().insert(number);
        }
        assert!(numbers.values().all(|numbers| numbers.len() == 1), "{numbers:?}");
        let all: BTreeSet<u32> = numbers.values().flatten().copied().collect();
        assert!(all.len() == sets.len() && taken.iter().all(|id| !all.contains(id)), "{numbers:?}");
        let objects = objects.lock().expect("alone");
        assert_eq!(objects.len(), taken.iter().collect::<BTreeSet<_>>().len() + sets.len());
        for (set, numbers) in numbers {
            for number in numbers {
                let object = objects[&number.to_string()].clone();
                let known = parse(&serde_json::from_value(object).expect("an object"));
                assert_eq!(*known.expect("an identity").labels, sets[set], "{number}");
            }
        }
    }
}
