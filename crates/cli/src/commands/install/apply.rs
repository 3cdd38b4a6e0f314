//! One object to the API server.

use anyhow::{Context, Result};
use kube::{
    Api, Client,
    api::{DynamicObject, Patch, PatchParams},
    core::{ApiResource, GroupVersionKind, TypeMeta},
};
use serde_json::Value;

use super::record::Reference;
use crate::{exit::Failure, output::note};

/// Owner of the fields that are applied.
const MANAGER: &str = "palisade";

/// Creates or changes the object by server-side apply, and says so.
pub(super) async fn apply(client: &Client, object: &Value) -> Result<()> {
    quietly(client, object).await?;
    note!("{} applied", Reference::of(object));
    Ok(())
}

/// As [`apply`], without a word.
pub(crate) async fn quietly(client: &Client, object: &Value) -> Result<()> {
    let reference = Reference::of(object);
    let api = api(client, &reference)?;
    match api.patch(&reference.name, &PatchParams::apply(MANAGER), &Patch::Apply(object)).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 409 => Err(Failure::refused(
            format!("{reference}: {}", status.message),
            "Somebody else changed these fields. Give them up there, or, if Helm installed \
             Palisade, go on with helm.",
        )
        .into()),
        Err(error) => Err(error).with_context(|| reference.to_string()),
    }
}

/// The API of an object's kind and namespace.
pub(crate) fn api_of(client: &Client, object: &Value) -> Result<Api<DynamicObject>> {
    api(client, &Reference::of(object))
}

/// As [`api_of`].
pub(super) fn api(client: &Client, reference: &Reference) -> Result<Api<DynamicObject>> {
    let types =
        TypeMeta { api_version: reference.api_version.clone(), kind: reference.kind.clone() };
    let kind = GroupVersionKind::try_from(&types)?;
    let resource = ApiResource::from_gvk(&kind);
    Ok(match &reference.namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    })
}
