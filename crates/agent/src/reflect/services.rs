//! `v1 Service` and `discovery.k8s.io/v1 EndpointSlice`.

use k8s_openapi::api::{
    core::v1::Service as ServiceObject,
    discovery::v1::{Endpoint, EndpointSlice as SliceObject},
};
use palisade_api::service::{Addresses, address};

use super::{Parse, object_name};
use crate::{
    names,
    tables::{
        Change, Intent, ObjectName,
        services::{EndpointSlice, Service, ServicePort, SliceBackend},
    },
};

/// As Kubernetes has it: an affinity lasts three hours unless said otherwise.
const AFFINITY_SECONDS: i32 = 10_800;
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Of slices that a controller makes; those of the API server's own Service bear none.
const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";

/// Services to rows.
pub(super) struct Services;

impl Parse for Services {
    type Object = ServiceObject;
    type Row = Service;

    fn key(&self, object: &ServiceObject) -> ObjectName {
        object_name(object)
    }

    fn parse(&self, object: ServiceObject) -> Option<Service> {
        let name = object_name(&object);
        let addresses = Addresses::of(&object);
        let spec = object.spec?;
        if spec.type_.as_deref() == Some("ExternalName") {
            return None;
        }
        let ports = spec.ports.iter().flatten();
        let affinity = (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
            let config = spec.session_affinity_config.and_then(|config| config.client_ip);
            let seconds = config.and_then(|config| config.timeout_seconds);
            u32::try_from(seconds.unwrap_or(AFFINITY_SECONDS)).unwrap_or_default()
        });
        Some(Service {
            name,
            addresses,
            ports: ports
                .filter_map(|port| {
                    Some(ServicePort {
                        name: port.name.clone().unwrap_or_default(),
                        protocol: names::protocol_number(port.protocol.as_deref())?,
                        port: u16::try_from(port.port).ok()?,
                    })
                })
                .collect(),
            affinity,
        })
    }

    fn intent(&self, change: Change<Service>) -> Intent {
        Intent::Service(change)
    }
}

/// Endpoint slices to rows.
pub(super) struct Slices;

impl Parse for Slices {
    type Object = SliceObject;
    type Row = EndpointSlice;

    fn key(&self, object: &SliceObject) -> ObjectName {
        object_name(object)
    }

    fn parse(&self, object: SliceObject) -> Option<EndpointSlice> {
        let name = object_name(&object);
        let mut labels = object.metadata.labels?;
        let service = labels.remove(SERVICE_NAME)?;
        let ports = object.ports.iter().flatten();
        Some(EndpointSlice {
            name,
            service,
            by_controller: labels.contains_key(MANAGED_BY),
            ports: ports
                .filter_map(|port| {
                    Some(ServicePort {
                        name: port.name.clone().unwrap_or_default(),
                        protocol: names::protocol_number(port.protocol.as_deref())?,
                        port: u16::try_from(port.port?).ok()?,
                    })
                })
                .collect(),
            backends: object.endpoints.iter().flatten().flat_map(backends).collect(),
        })
    }

    fn intent(&self, change: Change<EndpointSlice>) -> Intent {
        Intent::Slice(change)
    }
}

fn backends(endpoint: &Endpoint) -> Vec<SliceBackend> {
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    // An absent condition means "yes", as the API says.
    let ready = conditions.ready.unwrap_or(true);
    let serving = conditions.serving.unwrap_or(ready);
    let addresses = endpoint.addresses.iter().filter_map(|text| address(text));
    addresses.map(|address| SliceBackend { address, ready, serving }).collect()
}
