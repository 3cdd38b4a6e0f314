//! Where a Service is reached from within the cluster.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Service, ServiceSpec};

/// Its own addresses, in their order, and then those that a load balancer has for it. Whoever asks
/// at any of them from within the cluster reaches every backend, whatever `externalTrafficPolicy`
/// says of callers from outside.
///
/// A load balancer's address is left to kube-proxy where packets have to go by the load balancer
/// (`ipMode: Proxy`), and where not everybody may ask (`loadBalancerSourceRanges`).
#[must_use]
pub fn addresses(service: &Service) -> Vec<IpAddr> {
    let Some(spec) = &service.spec else { return Vec::new() };
    let own = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip);
    let mut addresses: Vec<IpAddr> = own.filter_map(|text| text.parse().ok()).collect();
    addresses.sort();
    let lent = if is_for_everybody(spec) { load_balancers(service) } else { Vec::new() };
    addresses.extend(lent);
    addresses.dedup();
    addresses
}

fn is_for_everybody(spec: &ServiceSpec) -> bool {
    spec.load_balancer_source_ranges.as_ref().is_none_or(Vec::is_empty)
}

fn load_balancers(service: &Service) -> Vec<IpAddr> {
    let status = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = status.into_iter().flat_map(|status| status.ingress.iter().flatten());
    let direct = ingress.filter(|it| it.ip_mode.as_deref() != Some("Proxy"));
    direct.filter_map(|it| it.ip.as_ref()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn addresses_of(spec: Value, ingress: &Value) -> Vec<String> {
        let status = json!({ "loadBalancer": { "ingress": ingress } });
        let service = json!({ "spec": spec, "status": status });
        let addresses = addresses(&serde_json::from_value(service).unwrap());
        addresses.iter().map(ToString::to_string).collect()
    }

    fn spec(ranges: &[&str]) -> Value {
        let own = json!(["fd00::1", "10.96.0.1"]);
        let policy = "Local";
        json!({ "clusterIP": "10.96.0.1", "clusterIPs": own, "externalTrafficPolicy": policy,
            "loadBalancerSourceRanges": ranges })
    }

    #[test]
    fn a_load_balancer_lends_addresses_that_lead_straight_to_the_service() {
        let ingress = json!([
            { "ip": "10.0.0.9", "ipMode": "VIP" },
            { "ip": "fd31::9" },
            { "ip": "10.0.0.10", "ipMode": "Proxy" },
            { "hostname": "lb.example" },
        ]);
        let own = ["10.96.0.1", "fd00::1"];
        let all = ["10.96.0.1", "fd00::1", "10.0.0.9", "fd31::9"];
        assert_eq!(addresses_of(spec(&[]), &ingress), all);
        assert_eq!(addresses_of(spec(&["192.0.2.0/24"]), &ingress), own);
        assert_eq!(addresses_of(json!({ "clusterIP": "None" }), &json!([])), [""; 0]);
    }
}
