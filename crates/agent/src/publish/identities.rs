//! Numbers for labels. The API server's atomic create is the only agreement between agents: all
//! try the same numbers in the same order.

use std::{sync::Arc, time::Duration};

use kube::{
    Api, Client,
    api::{DynamicObject, Patch, PatchParams, PostParams},
};
use palisade_api::crd::UNUSED_SINCE;
use palisade_policy::{identity::candidates, label::Labels};
use serde_json::json;
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::PAUSE;
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
    let mut pause: Duration = PAUSE.0;
    loop {
        match try_allocate(&api, &labels).await {
            Ok(Some(id)) => {
                info!(identity = id, %labels, "identity");
                let identity = Identity { id, labels: labels.clone() };
                if let Some(commands) = commands.upgrade() {
                    let intent = Intent::Identity(Change::Put(identity));
                    // The engine ended: nobody needs the number.
                    let _ = commands.send(Command::Intent(Box::new(intent))).await;
                }
                return labels;
            }
            Ok(None) => warn!(%labels, "every identity of the cluster is taken"),
            Err(error) => warn!(%labels, %error, "cannot allocate an identity yet"),
        }
        if commands.strong_count() == 0 {
            return labels;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

async fn try_allocate(api: &Api<DynamicObject>, labels: &Labels) -> kube::Result<Option<u32>> {
    for id in candidates(labels) {
        match api.create(&PostParams::default(), &object(id, labels)).await {
            Ok(_) => return Ok(Some(id)),
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(error),
        }
        let Some(taken) = api.get_opt(&id.to_string()).await? else { continue };
        if parse(&taken).is_none_or(|identity| *identity.labels != *labels) {
            continue;
        }
        if is_unused(&taken) {
            take_back(api, &taken).await?;
        }
        return Ok(Some(id));
    }
    Ok(None)
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
