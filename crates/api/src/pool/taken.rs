//! What a cluster has its networks for, besides pods.

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node, Service};
use kube::{
    Api, Client, ResourceExt,
    api::{DynamicObject, ListParams},
    core::{ApiResource, GroupVersionKind},
};

use super::Taken;

/// The networks of Services and the addresses of `nodes`.
///
/// # Errors
/// The API server does not answer, or refuses to.
pub async fn taken(client: &Client, nodes: &[Node]) -> kube::Result<Vec<Taken>> {
    let mut all = services(client).await?;
    for node in nodes {
        let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
        let internal = addresses.filter(|address| address.type_ == "InternalIP");
        let networks = internal.filter_map(|address| host(&address.address));
        let by = format!("the address of node {}", node.name_any());
        all.extend(networks.map(|network| Taken { by: by.clone(), network }));
    }
    Ok(all)
}

/// `ServiceCIDR`s; a cluster that has none tells at least the address of one Service.
async fn services(client: &Client) -> kube::Result<Vec<Taken>> {
    for version in ["v1", "v1beta1"] {
        let kind = GroupVersionKind::gvk("networking.k8s.io", version, "ServiceCIDR");
        let resource = ApiResource::from_gvk_with_plural(&kind, "servicecidrs");
        let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
        let listed = match api.list(&ListParams::default()).await {
            Err(kube::Error::Api(status)) if status.code == 404 => continue,
            listed => listed?.items,
        };
        let networks: Vec<IpNet> = listed
            .iter()
            .filter_map(|it| it.data.pointer("/spec/cidrs")?.as_array())
            .flatten()
            .filter_map(|network| network.as_str()?.parse().ok())
            .collect();
        if !networks.is_empty() {
            let by = |network| Taken { by: "the network of Services".to_owned(), network };
            return Ok(networks.into_iter().map(by).collect());
        }
    }
    let api: Api<Service> = Api::namespaced(client.clone(), "default");
    let service = api.get_opt("kubernetes").await?.and_then(|it| it.spec);
    let addresses = service.and_then(|it| it.cluster_ips).unwrap_or_default();
    let networks = addresses.iter().filter_map(|address| host(address));
    let by = |network| Taken { by: "the address of the Service kubernetes".to_owned(), network };
    Ok(networks.map(by).collect())
}

fn host(address: &str) -> Option<IpNet> {
    address.parse::<IpAddr>().ok().map(IpNet::from)
}
