//! `cilium.io/v2 CiliumIdentity`.

use std::{collections::BTreeMap, sync::Arc};

use kube::{ResourceExt, api::DynamicObject};
use palisade_abi::identity as number;
use palisade_policy::label::{Label, Labels};
use serde_json::Value;

use super::Parse;
use crate::tables::{Change, Intent, identities::Identity};

/// Identities to rows.
pub(super) struct Reflect;

impl Parse for Reflect {
    type Object = DynamicObject;
    type Row = Identity;

    fn key(&self, object: &DynamicObject) -> u32 {
        object.name_any().parse().unwrap_or_default()
    }

    fn parse(&self, object: DynamicObject) -> Option<Identity> {
        parse(&object)
    }

    fn intent(&self, change: Change<Identity>) -> Intent {
        Intent::Identity(change)
    }
}

/// The identity that an object stands for; none where its name or its labels make no sense.
pub(crate) fn parse(object: &DynamicObject) -> Option<Identity> {
    let id: u32 = object.name_any().parse().ok()?;
    if !(number::CLUSTER_MIN..=number::CLUSTER_MAX).contains(&id) {
        return None;
    }
    let map = object.data.get("security-labels").and_then(Value::as_object)?;
    let labels: Labels = map
        .iter()
        .map(|(name, value)| {
            let (source, key) = name.split_once(':').unwrap_or(("unspec", name));
            Label::new(source, key, value.as_str().unwrap_or_default())
        })
        .collect();
    Some(Identity { id, labels: Arc::new(labels) })
}

/// The object for an identity.
pub(crate) fn object(id: u32, labels: &Labels) -> DynamicObject {
    let mut object =
        DynamicObject::new(&id.to_string(), &crate::resources::cilium("CiliumIdentity"));
    let kubernetes: BTreeMap<String, String> = labels
        .iter()
        .filter(|label| label.source == "k8s" && is_object_label(&label.key, &label.value))
        .map(|label| (label.key.clone(), label.value.clone()))
        .collect();
    object.metadata.labels = Some(kubernetes);
    object.data = serde_json::json!({ "security-labels": labels.to_security_labels() });
    object
}

/// Whether Kubernetes takes this as a label of an object: a name of a namespace's label with a
/// prefix of its own has two slashes and is left out.
fn is_object_label(key: &str, value: &str) -> bool {
    let name = key.rsplit_once('/').map_or(key, |(_, name)| name);
    key.matches('/').count() <= 1 && name.len() <= 63 && value.len() <= 63
}
