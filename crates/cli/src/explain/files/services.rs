//! Services in files, and what stands behind them: the addresses of their `EndpointSlice`s, else the
//! pods that they select.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Result, anyhow, bail};
use k8s_openapi::{
    api::{
        core::v1::{Service, ServicePort},
        discovery::v1::{Endpoint, EndpointSlice},
    },
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};
use palisade_api::{
    admin::Explain,
    explain::{NamedEnd, backend_name, named_service},
    service::{self, Addresses},
};
use serde_json::Value;

use super::{Objects, Pod, outside};
use crate::exit::Failure;

const SERVICE_NAME: &str = "kubernetes.io/service-name";

#[derive(Default)]
pub(super) struct Services {
    services: Vec<Service>,
    slices: Vec<EndpointSlice>,
}

/// What a connection to a Service becomes.
pub(super) struct Target {
    /// `namespace/name` of the Service.
    pub(super) name: String,
    /// What clients connect to.
    pub(super) frontend: String,
    /// Ends and their ports.
    pub(super) backends: Vec<(NamedEnd, u16)>,
}

impl Services {
    /// Takes an object over, if it is one of these; whether it is.
    pub(super) fn add(&mut self, object: &Value) -> Result<bool> {
        let whole = object.clone();
        match (object["apiVersion"].as_str(), object["kind"].as_str()) {
            (Some("v1"), Some("Service")) => self.services.push(serde_json::from_value(whole)?),
            (Some("discovery.k8s.io/v1"), Some("EndpointSlice")) => {
                self.slices.push(serde_json::from_value(whole)?);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// What a connection becomes, if it is one to a Service: as the data path has it.
    pub(super) fn target(&self, objects: &Objects, asked: &Explain) -> Result<Option<Target>> {
        let given = service::address(&asked.to);
        let service = match given.and_then(|address| self.at(address, asked)) {
            Some(service) => Some(service),
            None => self.meant(objects, &asked.to)?,
        };
        service.map(|service| self.translate(objects, service, asked)).transpose()
    }

    /// The one of those with the address and the port that is reached there.
    fn at(&self, address: IpAddr, asked: &Explain) -> Option<&Service> {
        let tenants = self.services.iter().filter_map(|service| {
            let ports = service.spec.as_ref()?.ports.as_ref()?;
            ports.iter().find(|port| is_asked(port, asked))?;
            let ObjectMeta { namespace, name, .. } = &service.metadata;
            let tenure = Addresses::of(service).tenure(address)?;
            Some(((tenure, namespace_of(namespace.as_ref()), name), service))
        });
        tenants.min_by_key(|(order, _)| *order).map(|(_, service)| service)
    }

    /// The Service that is meant, if one is: as the agent finds it.
    pub(super) fn meant(&self, objects: &Objects, text: &str) -> Result<Option<&Service>> {
        let named = named_service(text, |word| objects.has_namespace(word));
        let (namespace, name) = match (named, service::address(text)) {
            (Some(named), _) => named,
            (None, Some(address)) => {
                let mut all = self.services.iter();
                return Ok(all.find(|service| Addresses::of(service).own.contains(&address)));
            }
            (None, None) => text.split_once('/').unwrap_or(("default", text)),
        };
        let is_pod = |pod: &Pod| !pod.is_made && pod.namespace == namespace && pod.name == name;
        if named.is_none() && objects.pods.iter().any(is_pod) {
            return Ok(None);
        }
        let mut all = self.services.iter();
        let found = all.find(|it| {
            namespace_of(it.metadata.namespace.as_ref()) == namespace
                && it.metadata.name.as_deref() == Some(name)
        });
        match (named, found) {
            (Some(_), None) => Err(anyhow!(Failure::not_found(format!(
                "the files have no Service {namespace}/{name}"
            )))),
            (_, found) => Ok(found),
        }
    }

    /// At the address that was asked for, or at its first own.
    fn translate(&self, objects: &Objects, service: &Service, asked: &Explain) -> Result<Target> {
        let name = full_name(service);
        let spec = service.spec.clone().unwrap_or_default();
        if spec.type_.as_deref() == Some("ExternalName") {
            bail!("Service {name} stands for another name only; name an address, or a pod");
        }
        if spec.cluster_ip.as_deref() == Some("None") {
            bail!(
                "Service {name} is headless: clients reach its pods by their own addresses and \
                 ports; name one of these pods, and its port"
            );
        }
        let ports = spec.ports.unwrap_or_default();
        let port = port(&name, &ports, asked)?;
        let own = Addresses::of(service).own;
        let address = service::address(&asked.to).or(own.first().copied());
        let slices: Vec<&EndpointSlice> = self.slices_of(service).collect();
        let selector = spec.selector.filter(|selector| !selector.is_empty());
        let backends = match (slices.is_empty(), &selector) {
            (false, _) => listed(objects, &slices, port, address)?,
            (true, Some(selector)) => {
                let namespace = namespace_of(service.metadata.namespace.as_ref());
                let pods = objects.pods.iter().filter(|pod| {
                    let has = |(key, value)| pod.labels.get(key) == Some(value);
                    pod.namespace == namespace && selector.iter().all(has)
                });
                selected(objects, pods, port)
            }
            (true, None) => bail!(
                "Service {name} selects nothing, and the files have no EndpointSlice of it: give \
                 one, with the label {SERVICE_NAME}"
            ),
        };
        if backends.is_empty() && slices.is_empty() {
            bail!(
                "the files have no pod, and nothing that makes pods, that Service {name} selects \
                 and whose containers have its target port; give these too"
            );
        }
        let protocol = port.protocol.as_deref().unwrap_or("TCP");
        let frontend = match address {
            Some(address) => format!("{}/{protocol}", SocketAddr::new(address, asked.port)),
            None => format!("{name}:{}", written(port)),
        };
        Ok(Target { name, frontend, backends })
    }

    fn slices_of(&self, service: &Service) -> impl Iterator<Item = &EndpointSlice> {
        let namespace = namespace_of(service.metadata.namespace.as_ref()).to_owned();
        let name = service.metadata.name.clone();
        self.slices.iter().filter(move |slice| {
            let labels = slice.metadata.labels.as_ref();
            namespace_of(slice.metadata.namespace.as_ref()) == namespace
                && labels.and_then(|labels| labels.get(SERVICE_NAME)) == name.as_ref()
        })
    }
}

fn port<'a>(name: &str, ports: &'a [ServicePort], asked: &Explain) -> Result<&'a ServicePort> {
    ports.iter().find(|port| is_asked(port, asked)).ok_or_else(|| {
        let ports: Vec<String> = ports.iter().map(written).collect();
        anyhow!(Failure::not_found(format!(
            "Service {name} has no such port; it has {}. For another port of its pods, name a pod",
            ports.join(", ")
        )))
    })
}

fn is_asked(port: &ServicePort, asked: &Explain) -> bool {
    port.port == i32::from(asked.port)
        && protocol_of(port.protocol.as_deref()) == Some(asked.protocol)
}

/// The ready ends of slices, of the front's family; when there is none, those that still serve.
fn listed(
    objects: &Objects,
    slices: &[&EndpointSlice],
    port: &ServicePort,
    front: Option<IpAddr>,
) -> Result<Vec<(NamedEnd, u16)>> {
    let name = |name: &Option<String>| name.clone().unwrap_or_default();
    let mut all = Vec::new();
    for slice in slices {
        let target = slice.ports.iter().flatten().find(|it| {
            name(&it.name) == name(&port.name)
                && protocol_of(it.protocol.as_deref()) == protocol_of(port.protocol.as_deref())
        });
        let Some(target) = target.and_then(|it| u16::try_from(it.port?).ok()) else { continue };
        for endpoint in slice.endpoints.iter().flatten() {
            let own = endpoint.addresses.iter().filter_map(|text| service::address(text));
            let family = |it: &IpAddr| front.is_none_or(|front| front.is_ipv4() == it.is_ipv4());
            for address in own.filter(family) {
                let mut end = behind(objects, endpoint, address)?;
                end.name = backend_name(&end, target);
                all.push((endpoint, (end, target)));
            }
        }
    }
    let is_ready = |it: &Endpoint| {
        it.conditions.as_ref().and_then(|conditions| conditions.ready).unwrap_or(true)
    };
    let serves = |it: &Endpoint| {
        let said = it.conditions.as_ref().and_then(|conditions| conditions.serving);
        said.unwrap_or_else(|| is_ready(it))
    };
    let any_ready = all.iter().any(|(endpoint, _)| is_ready(endpoint));
    let counts =
        |endpoint: &Endpoint| if any_ready { is_ready(endpoint) } else { serves(endpoint) };
    all.retain(|(endpoint, _)| counts(endpoint));
    Ok(all.into_iter().map(|(_, backend)| backend).collect())
}

/// Who has an address of a slice.
fn behind(objects: &Objects, endpoint: &Endpoint, address: IpAddr) -> Result<NamedEnd> {
    let target = endpoint.target_ref.as_ref();
    let named = target.filter(|target| target.kind.as_deref() == Some("Pod"));
    let is_it = |pod: &&Pod| {
        pod.addresses.contains(&address)
            || named.is_some_and(|it| {
                it.name.as_deref() == Some(&pod.name)
                    && namespace_of(it.namespace.as_ref()) == pod.namespace
                    && !pod.is_made
            })
    };
    let found = objects.pods.iter().find(is_it);
    if let Some(pod) = found {
        let mut end = objects.end(pod);
        end.end.address = address;
        return Ok(end);
    }
    if let Some(name) = named.and_then(|it| it.name.as_ref()) {
        bail!("{address} is that of pod {name}, which the files do not have: give it too");
    }
    Ok(outside(address))
}

/// Pods with the ports that the target port means.
fn selected<'a>(
    objects: &Objects,
    pods: impl Iterator<Item = &'a Pod>,
    port: &ServicePort,
) -> Vec<(NamedEnd, u16)> {
    let mut seen = BTreeSet::new();
    let backends = pods.filter_map(|pod| {
        let number = match &port.target_port {
            None => u16::try_from(port.port).ok()?,
            Some(IntOrString::Int(number)) => u16::try_from(*number).ok()?,
            Some(IntOrString::String(name)) => {
                let protocol = protocol_of(port.protocol.as_deref())?;
                let mut named = pod.ports.iter();
                named.find(|it| it.name == *name && it.protocol == protocol)?.port
            }
        };
        let mut end = objects.end(pod);
        end.name = match pod.addresses.is_empty() {
            true => format!("{} at port {number}", end.name),
            false => backend_name(&end, number),
        };
        seen.insert(end.name.clone()).then_some((end, number))
    });
    backends.collect()
}

pub(super) fn full_name(service: &Service) -> String {
    let name = service.metadata.name.as_deref().unwrap_or_default();
    format!("{}/{name}", namespace_of(service.metadata.namespace.as_ref()))
}

/// The API server would put it there.
fn namespace_of(namespace: Option<&String>) -> &str {
    namespace.map_or("default", String::as_str)
}

fn written(port: &ServicePort) -> String {
    format!("{}/{}", port.port, port.protocol.as_deref().unwrap_or("TCP"))
}

fn protocol_of(name: Option<&str>) -> Option<u8> {
    match name.unwrap_or("TCP") {
        "TCP" => Some(6),
        "UDP" => Some(17),
        "SCTP" => Some(132),
        _ => None,
    }
}
