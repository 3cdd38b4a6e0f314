//! Objects of the cluster.

use std::fmt::Debug;

use kube::{
    Api,
    api::ListParams,
    core::{ApiResource, GroupVersionKind},
};
use serde::de::DeserializeOwned;

/// Objects are read in pages of this size.
const PAGE: u32 = 500;

/// A kind of the group that policies are of.
pub(crate) fn resource(kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("cilium.io", "v2", kind), plural)
}

/// All objects, as the API server has them now.
pub(crate) async fn list<K>(api: &Api<K>) -> kube::Result<Vec<K>>
where
    K: Clone + Debug + DeserializeOwned,
{
    let mut params = ListParams::default().limit(PAGE);
    let mut all = Vec::new();
    loop {
        let page = api.list(&params).await?;
        all.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(all),
        }
    }
}
