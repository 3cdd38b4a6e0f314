//! `cilium.io/v2 CiliumIdentity`.

use std::{collections::BTreeMap, sync::Arc};

use kube::{ResourceExt, api::DynamicObject};
use palisade_abi::identity as number;
use palisade_api::crd::UNUSED_SINCE;
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
        // The operator is about to collect it: whoever needs the number takes it back first.
        if is_unused(&object) { None } else { parse(&object) }
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

/// Whether the operator found nobody who uses the identity.
pub(crate) fn is_unused(object: &DynamicObject) -> bool {
    object.annotations().contains_key(UNUSED_SINCE)
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

/// Whether Kubernetes takes this as a label of an object. Ours are longer than those that they are
/// made of: a label of a namespace has a prefix before its own.
fn is_object_label(key: &str, value: &str) -> bool {
    let (prefix, name) = key.rsplit_once('/').unwrap_or(("", key));
    let fits = prefix.len() <= 253 && name.len() <= 63 && value.len() <= 63;
    fits && !prefix.contains('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_long_for_a_label_is_told_in_the_security_labels_alone() {
        let namespace = "io.cilium.k8s.namespace.labels.";
        let short = format!("{namespace}example.com/team");
        let long = format!("{namespace}{}.com/team", "x".repeat(230));
        let labels: Labels =
            [&short, &long].into_iter().map(|key| Label::new("k8s", key, "a")).collect();
        let object = object(256, &labels);
        let told: Vec<String> =
            object.metadata.labels.clone().unwrap_or_default().into_keys().collect();
        assert_eq!(told, [short]);
        assert_eq!(parse(&object).map(|identity| identity.labels), Some(Arc::new(labels)));
    }
}
