//! `NetworkPolicy`, `CiliumNetworkPolicy`, `CiliumClusterwideNetworkPolicy`.

use kube::{ResourceExt, api::DynamicObject};
use palisade_api::convert::convert;
use palisade_policy::model::{PolicyKind, PolicyRef};
use serde_json::{Value, json};

use super::Parse;
use crate::tables::{
    Change, Intent,
    policies::{Condition, Finding, PolicyContent, PolicyObject},
};

/// Policies of a kind to rows.
pub(super) struct Reflect {
    /// The kind.
    pub(super) kind: PolicyKind,
    /// The cluster's name.
    pub(super) cluster: String,
}

impl Parse for Reflect {
    type Object = DynamicObject;
    type Row = PolicyObject;

    fn key(&self, object: &DynamicObject) -> PolicyRef {
        PolicyRef { kind: self.kind, namespace: object.namespace(), name: object.name_any() }
    }

    fn parse(&self, object: DynamicObject) -> Option<PolicyObject> {
        let id = self.key(&object);
        let reported = object.data.pointer("/status/conditions").and_then(reported);
        let uid = object.uid().unwrap_or_default();
        let generation = object.metadata.generation.unwrap_or_default();
        let mut whole = object.data;
        if let Some(fields) = whole.as_object_mut() {
            let metadata = json!({ "name": id.name, "namespace": id.namespace, "uid": uid });
            fields.insert("metadata".into(), metadata);
        }
        let content = match convert(self.kind, &whole, &self.cluster) {
            Ok(policy) => PolicyContent::Accepted(policy.into()),
            Err(refusal) => PolicyContent::Refused {
                message: refusal.to_string(),
                lockdown: refusal.lockdown(),
            },
        };
        Some(PolicyObject { id, uid, generation, content, reported })
    }

    fn intent(&self, change: Change<PolicyObject>) -> Intent {
        Intent::Policy(self.kind, change)
    }
}

/// What the status says; nothing where it is not what any agent writes.
fn reported(conditions: &Value) -> Option<Condition> {
    let valid = conditions.as_array()?.iter().find(|condition| condition["type"] == "Valid")?;
    let finding = Finding::read(valid["reason"].as_str()?)?;
    let status = if finding.is_valid() { "True" } else { "False" };
    (valid["status"] == status).then(|| Condition {
        finding,
        message: valid["message"].as_str().unwrap_or_default().into(),
        generation: valid["observedGeneration"].as_i64(),
    })
}
