//! The custom resources' definitions.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Client, ResourceExt,
    api::{Patch, PatchParams},
    runtime::{conditions::is_crd_established, wait::await_condition},
};
use palisade_api::{
    client::{Patience, chain},
    crd,
};
use tracing::{info, warn};

/// Applies every definition and waits until the API server serves it; tries until it succeeds.
pub(crate) async fn apply(client: &Client) {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let mut patience = Patience::default();
    for definition in crd::all() {
        let name = definition.name_any();
        while let Err(error) = apply_one(&api, &name, &definition).await {
            warn!(name, error = chain(&*error), "cannot install the definition yet");
            tokio::time::sleep(patience.after(&*error)).await;
        }
    }
    info!("the definitions of custom resources are in place");
}

async fn apply_one(
    api: &Api<CustomResourceDefinition>,
    name: &str,
    definition: &CustomResourceDefinition,
) -> anyhow::Result<()> {
    // Definitions of another installation become ours: there is one of each in a cluster.
    let params = PatchParams::apply("palisade-operator").force();
    api.patch(name, &params, &Patch::Apply(definition)).await?;
    await_condition(api.clone(), name, is_crd_established()).await?;
    Ok(())
}
