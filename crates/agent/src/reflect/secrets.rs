//! `v1 Secret`, of the one namespace that policies may refer to.

use k8s_openapi::api::core::v1::Secret as Object;

use super::{Parse, object_name};
use crate::tables::{Change, Intent, ObjectName, secrets::Secret};

/// Secrets to rows.
pub(super) struct Reflect;

impl Parse for Reflect {
    type Object = Object;
    type Row = Secret;

    fn key(&self, object: &Object) -> ObjectName {
        object_name(object)
    }

    fn parse(&self, object: Object) -> Option<Secret> {
        let name = object_name(&object);
        let data = object.data.unwrap_or_default();
        Some(Secret { name, data: data.into_iter().map(|(key, value)| (key, value.0)).collect() })
    }

    fn intent(&self, change: Change<Secret>) -> Intent {
        Intent::Secret(change)
    }
}
