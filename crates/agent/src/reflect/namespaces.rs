//! `v1 Namespace`.

use k8s_openapi::api::core::v1::Namespace as Object;
use kube::ResourceExt;

use super::Parse;
use crate::tables::{Change, Intent, namespaces::Namespace};

/// Namespaces to rows.
pub(super) struct Reflect;

impl Parse for Reflect {
    type Object = Object;
    type Row = Namespace;

    fn key(&self, object: &Object) -> String {
        object.name_any()
    }

    fn parse(&self, object: Object) -> Option<Namespace> {
        Some(Namespace {
            name: object.name_any(),
            labels: object.metadata.labels.unwrap_or_default(),
        })
    }

    fn intent(&self, change: Change<Namespace>) -> Intent {
        Intent::Namespace(change)
    }
}
