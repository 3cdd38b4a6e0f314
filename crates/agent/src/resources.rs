//! The API's names of the objects that are read as plain JSON.

use kube::core::{ApiResource, GroupVersionKind};
use palisade_policy::model::PolicyKind;

/// A kind of `cilium.io/v2`.
pub(crate) fn cilium(kind: &str) -> ApiResource {
    let plural = match kind {
        "CiliumIdentity" => "ciliumidentities",
        "CiliumEndpoint" => "ciliumendpoints",
        "CiliumNode" => "ciliumnodes",
        "CiliumNetworkPolicy" => "ciliumnetworkpolicies",
        _ => "ciliumclusterwidenetworkpolicies",
    };
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("cilium.io", "v2", kind), plural)
}

/// A kind of policy.
pub(crate) fn policy(kind: PolicyKind) -> ApiResource {
    match kind {
        PolicyKind::NetworkPolicy => ApiResource::from_gvk_with_plural(
            &GroupVersionKind::gvk("networking.k8s.io", "v1", "NetworkPolicy"),
            "networkpolicies",
        ),
        PolicyKind::CiliumNetworkPolicy | PolicyKind::CiliumClusterwideNetworkPolicy => {
            cilium(kind.as_str())
        }
    }
}
