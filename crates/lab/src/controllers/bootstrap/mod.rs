//! What every cluster has from the beginning.

mod earlier;

use std::path::PathBuf;

use k8s_openapi::api::core::v1::{Namespace, Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::layout::{
    API_PORT, DNS_V4, DNS_V6, FABRIC_V4, FABRIC_V6, KUBERNETES_V4, KUBERNETES_V6, NodePlan,
};
use crate::runner::DNS_IMAGE;

/// What the first objects are made from.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// The nodes.
    pub nodes: Vec<NodePlan>,
    /// Directory with the kubeconfig that the DNS server uses.
    pub kubeconfig_dir: PathBuf,
}

/// Creates the first objects; those that are there from an earlier run stay.
pub async fn bootstrap(client: &Client, cluster: &Cluster) -> anyhow::Result<()> {
    earlier::forget(client, cluster).await?;
    for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
        let namespace = json!({"metadata": {"name": name}});
        create(&Api::<Namespace>::all(client.clone()), namespace).await?;
    }
    for node in &cluster.nodes {
        create_node(client, node).await?;
    }
    kubernetes_service(client).await?;
    dns(client, cluster).await
}

async fn create<K>(api: &Api<K>, value: serde_json::Value) -> anyhow::Result<()>
where
    K: Clone + DeserializeOwned + Serialize + std::fmt::Debug + Resource<DynamicType = ()>,
{
    let object: K = serde_json::from_value(value)?;
    match api.create(&PostParams::default(), &object).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        Err(error) => {
            let name = object.meta().name.clone().unwrap_or_default();
            Err(anyhow::Error::new(error).context(format!("creating {} {name}", K::kind(&()))))
        }
    }
}

async fn create_node(client: &Client, node: &NodePlan) -> anyhow::Result<()> {
    let api = Api::<Node>::all(client.clone());
    let labels = json!({
        "kubernetes.io/hostname": node.name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": std::env::consts::ARCH.replace("x86_64", "amd64").replace("aarch64", "arm64"),
        "node.kubernetes.io/instance-type": "palisade-lab",
    });
    let object = json!({
        "metadata": {"name": node.name, "labels": labels},
        "spec": {
            "podCIDR": node.pods_v4(),
            "podCIDRs": [node.pods_v4().to_string(), node.pods_v6().to_string()],
            "providerID": format!("palisade-lab://{}", node.name),
        },
    });
    create(&api, object).await?;
    let found = api.get(&node.name).await?;
    anyhow::ensure!(
        found.spec.as_ref().and_then(|spec| spec.pod_cidrs.as_ref()).is_some_and(|c| c.len() == 2),
        "node {} has lost its podCIDRs",
        found.name_any()
    );
    Ok(())
}

async fn kubernetes_service(client: &Client) -> anyhow::Result<()> {
    let services = Api::<Service>::namespaced(client.clone(), "default");
    let labels = json!({"component": "apiserver", "provider": "kubernetes"});
    let service = json!({
        "metadata": {"name": "kubernetes", "labels": labels},
        "spec": {
            "clusterIP": KUBERNETES_V4,
            "clusterIPs": [KUBERNETES_V4.to_string(), KUBERNETES_V6.to_string()],
            "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "PreferDualStack",
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": API_PORT}],
        },
    });
    create(&services, service).await?;
    let slices = Api::<EndpointSlice>::namespaced(client.clone(), "default");
    let addresses = [("IPv4", FABRIC_V4.to_string()), ("IPv6", FABRIC_V6.to_string())];
    for (family, address) in addresses {
        let slice = json!({
            "metadata": {
                "name": format!("kubernetes-{}", family.to_lowercase()),
                "labels": {"kubernetes.io/service-name": "kubernetes"},
            },
            "addressType": family,
            "ports": [{"name": "https", "port": API_PORT, "protocol": "TCP"}],
            "endpoints": [{"addresses": [address], "conditions": {"ready": true}}],
        });
        create(&slices, slice).await?;
    }
    Ok(())
}

async fn dns(client: &Client, cluster: &Cluster) -> anyhow::Result<()> {
    let services = Api::<Service>::namespaced(client.clone(), "kube-system");
    let service = json!({
        "metadata": {
            "name": "kube-dns",
            "labels": {"k8s-app": "kube-dns", "kubernetes.io/name": "CoreDNS"},
        },
        "spec": {
            "clusterIP": DNS_V4,
            "clusterIPs": [DNS_V4.to_string(), DNS_V6.to_string()],
            "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "PreferDualStack",
            "selector": {"k8s-app": "kube-dns"},
            "ports": [
                {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": 53},
                {"name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": 53},
            ],
        },
    });
    create(&services, service).await?;
    let deployment = json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "kube-dns", "labels": {"k8s-app": "kube-dns"}},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": {"k8s-app": "kube-dns"}},
            "template": {
                "metadata": {"labels": {"k8s-app": "kube-dns"}},
                "spec": {
                    "priorityClassName": "system-cluster-critical",
                    "terminationGracePeriodSeconds": 5,
                    "containers": [{
                        "name": "dns",
                        "image": DNS_IMAGE,
                        "args": ["--kubeconfig", "/etc/palisade/kubeconfig"],
                        "ports": [
                            {"name": "dns", "containerPort": 53, "protocol": "UDP"},
                            {"name": "dns-tcp", "containerPort": 53, "protocol": "TCP"},
                            {"name": "ready", "containerPort": 8181, "protocol": "TCP"},
                        ],
                        "readinessProbe": {
                            "httpGet": {"path": "/ready", "port": 8181},
                            "periodSeconds": 5,
                        },
                        "volumeMounts": [
                            {"name": "kubeconfig", "mountPath": "/etc/palisade", "readOnly": true},
                        ],
                    }],
                    "volumes": [
                        {"name": "kubeconfig", "hostPath": {"path": cluster.kubeconfig_dir}},
                    ],
                },
            },
        },
    });
    // The machine's paths may have changed since an earlier run; everything else stays.
    let api =
        Api::<k8s_openapi::api::apps::v1::Deployment>::namespaced(client.clone(), "kube-system");
    create(&api, deployment).await?;
    let path = json!([{
        "op": "replace",
        "path": "/spec/template/spec/volumes/0/hostPath/path",
        "value": cluster.kubeconfig_dir,
    }]);
    let patch = Patch::Json::<()>(serde_json::from_value(path)?);
    api.patch("kube-dns", &PatchParams::default(), &patch).await?;
    Ok(())
}
