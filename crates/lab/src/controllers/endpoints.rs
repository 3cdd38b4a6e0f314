//! EndpointSlices: which pods stand behind a Service, one slice for each address family.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::{DeleteParams, PostParams};
use kube::{Api, Resource, ResourceExt};
use serde_json::{Value, json};

use super::replicas::ready;
use super::{Context, fingerprint, settled};

const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
const CONTROLLER: &str = "endpointslice-controller.k8s.io";
const SERVICE_NAME: &str = "kubernetes.io/service-name";

pub(super) async fn reconcile(context: &Context) -> kube::Result<()> {
    let pods = context.pods.state();
    let slices = context.slices.state();
    for service in context.services.state() {
        if service.metadata.deletion_timestamp.is_none() {
            reconcile_one(context, &service, &pods, &slices).await?;
        }
    }
    Ok(())
}

async fn reconcile_one(
    context: &Context,
    service: &Service,
    pods: &[Arc<Pod>],
    slices: &[Arc<EndpointSlice>],
) -> kube::Result<()> {
    let namespace = service.namespace().unwrap_or_default();
    let name = service.name_any();
    let api = Api::<EndpointSlice>::namespaced(context.client.clone(), &namespace);
    let wanted = desired(service, pods);
    let existing: Vec<_> = slices
        .iter()
        .filter(|slice| {
            slice.namespace().as_deref() == Some(namespace.as_str())
                && slice.labels().get(SERVICE_NAME) == Some(&name)
                && slice.labels().get(MANAGED_BY).is_some_and(|by| by == CONTROLLER)
        })
        .collect();
    for slice in &wanted {
        let Some(found) = existing.iter().find(|old| old.name_any() == slice.name_any()) else {
            if let Err(kube::Error::Api(status)) = api.create(&PostParams::default(), slice).await
                && status.code != 409
            {
                return Err(kube::Error::Api(status));
            }
            continue;
        };
        if found.endpoints == slice.endpoints
            && found.ports == slice.ports
            && found.metadata.labels == slice.metadata.labels
        {
            continue;
        }
        let mut new = slice.clone();
        new.metadata.resource_version = found.resource_version();
        settled(api.replace(&slice.name_any(), &PostParams::default(), &new).await)?;
    }
    for old in existing {
        let surplus = !wanted.iter().any(|slice| slice.name_any() == old.name_any());
        if surplus && old.metadata.deletion_timestamp.is_none() {
            settled(api.delete(&old.name_any(), &DeleteParams::default()).await)?;
        }
    }
    Ok(())
}

/// The slices of a Service. Services without a selector keep what people wrote.
fn desired(service: &Service, pods: &[Arc<Pod>]) -> Vec<EndpointSlice> {
    let Some(spec) = &service.spec else { return Vec::new() };
    let selector = spec.selector.clone().unwrap_or_default();
    if selector.is_empty() || spec.type_.as_deref() == Some("ExternalName") {
        return Vec::new();
    }
    let namespace = service.namespace();
    let mut selected: Vec<&Pod> = pods
        .iter()
        .map(|pod| &**pod)
        .filter(|pod| {
            pod.namespace() == namespace
                && selector.iter().all(|(key, value)| pod.labels().get(key) == Some(value))
        })
        .collect();
    selected.sort_by_key(|pod| pod.name_any());
    let families = spec.ip_families.clone().unwrap_or_else(|| vec!["IPv4".to_owned()]);
    families.iter().flat_map(|family| slices(service, family, &selected)).collect()
}

/// Pods may give a named target port different numbers: each set of numbers is a slice of its own.
fn slices(service: &Service, family: &str, pods: &[&Pod]) -> Vec<EndpointSlice> {
    let ports = service.spec.as_ref().and_then(|spec| spec.ports.clone()).unwrap_or_default();
    let mut groups: BTreeMap<String, (Vec<Value>, Vec<Value>)> = BTreeMap::new();
    for pod in pods {
        let Some(endpoint) = endpoint(service, family, pod) else { continue };
        let numbers: Vec<Value> = ports.iter().filter_map(|port| resolved(port, pod)).collect();
        let key = Value::from(numbers.clone()).to_string();
        groups.entry(key).or_insert_with(|| (numbers, Vec::new())).1.push(endpoint);
    }
    if groups.is_empty() {
        groups.insert(String::new(), Default::default());
    }
    let several = groups.len() > 1;
    let base = format!("{}-{}", service.name_any(), family.to_lowercase());
    groups
        .into_iter()
        .filter_map(|(key, (numbers, endpoints))| {
            let name = if several {
                let suffix: String = fingerprint(&key).chars().take(5).collect();
                format!("{base}-{suffix}")
            } else {
                base.clone()
            };
            let mut labels = service.metadata.labels.clone().unwrap_or_default();
            labels.insert(SERVICE_NAME.to_owned(), service.name_any());
            labels.insert(MANAGED_BY.to_owned(), CONTROLLER.to_owned());
            let headless =
                service.spec.as_ref().and_then(|s| s.cluster_ip.as_deref()) == Some("None");
            if headless {
                labels.insert("service.kubernetes.io/headless".to_owned(), String::new());
            }
            let slice = json!({
                "metadata": {
                    "name": name,
                    "namespace": service.namespace(),
                    "labels": labels,
                    "ownerReferences": [service.controller_owner_ref(&())],
                },
                "addressType": family,
                "endpoints": endpoints,
                "ports": numbers,
            });
            serde_json::from_value(slice).ok()
        })
        .collect()
}

fn resolved(port: &ServicePort, pod: &Pod) -> Option<Value> {
    let protocol = port.protocol.as_deref().unwrap_or("TCP");
    let number = match &port.target_port {
        None | Some(IntOrString::Int(0)) => port.port,
        Some(IntOrString::Int(number)) => *number,
        Some(IntOrString::String(name)) => {
            pod.spec
                .iter()
                .flat_map(|spec| &spec.containers)
                .flat_map(|container| container.ports.iter().flatten())
                .find(|found| {
                    found.name.as_ref() == Some(name)
                        && found.protocol.as_deref().unwrap_or("TCP") == protocol
                })?
                .container_port
        }
    };
    let mut out = json!({
        "name": port.name.clone().unwrap_or_default(),
        "port": number,
        "protocol": protocol,
    });
    if let Some(app) = &port.app_protocol {
        out["appProtocol"] = app.as_str().into();
    }
    Some(out)
}

fn endpoint(service: &Service, family: &str, pod: &Pod) -> Option<Value> {
    let status = pod.status.as_ref()?;
    if matches!(status.phase.as_deref(), Some("Failed" | "Succeeded")) {
        return None;
    }
    let address = status
        .pod_ips
        .iter()
        .flatten()
        .map(|ip| ip.ip.as_str())
        .find(|ip| ip.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv4() == (family == "IPv4")))?;
    let terminating = pod.metadata.deletion_timestamp.is_some();
    let serving = ready(pod);
    let published = service.spec.as_ref().and_then(|s| s.publish_not_ready_addresses) == Some(true);
    let mut endpoint = json!({
        "addresses": [address],
        "conditions": {
            "ready": published || (serving && !terminating),
            "serving": serving,
            "terminating": terminating,
        },
        "targetRef": {
            "kind": "Pod",
            "name": pod.name_any(),
            "namespace": pod.namespace(),
            "uid": pod.uid(),
        },
    });
    if let Some(node) = pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref()) {
        endpoint["nodeName"] = node.as_str().into();
    }
    let spec = pod.spec.as_ref()?;
    if let Some(hostname) = &spec.hostname
        && spec.subdomain.as_deref() == Some(service.name_any().as_str())
    {
        endpoint["hostname"] = hostname.as_str().into();
    }
    Some(endpoint)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, container_port: i32, ready: bool) -> Arc<Pod> {
        let status = if ready { "True" } else { "False" };
        let value = json!({
            "metadata": {"name": name, "namespace": "default", "labels": {"app": "a"}},
            "spec": {"nodeName": "node1", "containers": [
                {"name": "c", "ports": [{"name": "web", "containerPort": container_port}]}]},
            "status": {"phase": "Running",
                "podIPs": [{"ip": "10.244.1.2"}, {"ip": "fd44:0:0:1::2"}],
                "conditions": [{"type": "Ready", "status": status}]},
        });
        Arc::new(serde_json::from_value(value).unwrap())
    }

    fn service() -> Service {
        serde_json::from_value(json!({
            "metadata": {"name": "s", "namespace": "default", "uid": "1"},
            "spec": {"selector": {"app": "a"}, "ipFamilies": ["IPv4", "IPv6"],
                     "ports": [{"port": 80, "targetPort": "web"}]},
        }))
        .unwrap()
    }

    #[test]
    fn one_slice_for_each_family() {
        let slices = desired(&service(), &[pod("x", 8080, true)]);
        let types: Vec<_> = slices.iter().map(|slice| slice.address_type.as_str()).collect();
        assert_eq!(types, ["IPv4", "IPv6"]);
        let ports = slices[0].ports.clone().unwrap();
        assert_eq!(ports[0].port, Some(8080));
    }

    #[test]
    fn named_ports_are_each_pods_own() {
        let slices = desired(&service(), &[pod("x", 8080, true), pod("y", 9090, false)]);
        assert_eq!(slices.len(), 4);
    }

    #[test]
    fn no_pods_make_an_empty_slice() {
        let slices = desired(&service(), &[]);
        assert_eq!(slices.len(), 2);
        assert_eq!(slices[0].name_any(), "s-ipv4");
    }
}
