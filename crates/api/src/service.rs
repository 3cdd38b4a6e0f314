//! Where a Service is reached from within the cluster.

use std::{collections::BTreeSet, net::IpAddr};

use k8s_openapi::api::core::v1::{Service, ServiceSpec};
use palisade_policy::l7::may_learn;

/// How a Service has an address. Where several Services have one, with the same port, the first of
/// these comes first, and then the first by namespace and name: a load balancer takes nothing away
/// that somebody has of his own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tenure {
    /// The cluster gave it the address, for itself alone.
    Own,
    /// A load balancer has the address, and may have it for others too.
    Lent,
}

/// The addresses of a Service. Whoever asks at any of them from within the cluster reaches every
/// backend, whatever `externalTrafficPolicy` says of callers from outside.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// See [`Tenure::Own`]; a headless Service has none.
    pub own: BTreeSet<IpAddr>,
    /// See [`Tenure::Lent`].
    pub lent: BTreeSet<IpAddr>,
}

impl Addresses {
    /// A load balancer's address is left to kube-proxy where packets have to go by the load
    /// balancer (`ipMode: Proxy`), and where not everybody may ask (`loadBalancerSourceRanges`).
    #[must_use]
    pub fn of(service: &Service) -> Self {
        let Some(spec) = &service.spec else { return Self::default() };
        let own = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip);
        let own: BTreeSet<IpAddr> = own.filter_map(|text| address(text)).collect();
        let mut lent = if is_for_everybody(spec) { lent(service) } else { BTreeSet::new() };
        lent.retain(|address| !own.contains(address));
        Self { own, lent }
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (IpAddr, Tenure)> {
        let own = self.own.iter().map(|address| (*address, Tenure::Own));
        own.chain(self.lent.iter().map(|address| (*address, Tenure::Lent)))
    }

    /// How it has the address, if it does.
    #[must_use]
    pub fn tenure(&self, address: IpAddr) -> Option<Tenure> {
        self.iter().find(|(one, _)| *one == address).map(|(_, tenure)| tenure)
    }
}

/// An address as packets bear it: IPv4 is IPv4, also where it is written as IPv6.
#[must_use]
pub fn address(text: &str) -> Option<IpAddr> {
    text.parse().ok().map(|address: IpAddr| address.to_canonical())
}

fn is_for_everybody(spec: &ServiceSpec) -> bool {
    spec.load_balancer_source_ranges.as_ref().is_none_or(Vec::is_empty)
}

/// Some write where they listen on the machine itself: what has a meaning of its own on every node
/// is not theirs to lend.
fn lent(service: &Service) -> BTreeSet<IpAddr> {
    let status = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let ingress = status.into_iter().flat_map(|status| status.ingress.iter().flatten());
    let direct = ingress.filter(|it| it.ip_mode.as_deref() != Some("Proxy"));
    let addresses = direct.filter_map(|it| address(it.ip.as_ref()?));
    addresses.filter(|address| may_learn(*address)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn addresses_of(spec: Value, ingress: &Value) -> Vec<String> {
        let status = json!({ "loadBalancer": { "ingress": ingress } });
        let service = json!({ "spec": spec, "status": status });
        let addresses = Addresses::of(&serde_json::from_value(service).unwrap());
        let written = |(address, tenure)| match tenure {
            Tenure::Own => format!("{address}"),
            Tenure::Lent => format!("lent {address}"),
        };
        addresses.iter().map(written).collect()
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
            { "ip": "fd31::9" },
            { "ip": "10.0.0.9", "ipMode": "VIP" },
            { "ip": "10.0.0.10", "ipMode": "Proxy" },
            { "hostname": "lb.example" },
        ]);
        let own = ["10.96.0.1", "fd00::1"];
        let all = ["10.96.0.1", "fd00::1", "lent 10.0.0.9", "lent fd31::9"];
        assert_eq!(addresses_of(spec(&[]), &ingress), all);
        assert_eq!(addresses_of(spec(&["192.0.2.0/24"]), &ingress), own);
        assert_eq!(addresses_of(json!({ "clusterIP": "None" }), &json!([])), [""; 0]);
    }

    #[test]
    fn an_address_is_one_however_often_and_however_it_is_written() {
        let ingress = ["10.0.0.9", "fd31::9", "10.0.0.9", "::ffff:10.0.0.9", "fd31:0::9"];
        let own = ["10.96.0.1", "::ffff:10.96.0.1", "fd00::1"];
        let ingress = ingress.iter().chain(&own).map(|ip| json!({ "ip": ip }));
        let ingress = Value::Array(ingress.collect());
        let all = ["10.96.0.1", "fd00::1", "lent 10.0.0.9", "lent fd31::9"];
        assert_eq!(addresses_of(spec(&[]), &ingress), all);
        let mapped = json!({ "clusterIP": "::ffff:10.96.0.1" });
        assert_eq!(addresses_of(mapped, &json!([])), ["10.96.0.1"]);
    }

    #[test]
    fn what_means_something_else_on_every_node_is_not_lent() {
        for ip in [
            "127.0.0.1",
            "127.255.0.9",
            "0.0.0.0",
            "0.0.0.9",
            "169.254.169.254",
            "224.0.0.1",
            "239.1.2.3",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "febf::1",
            "ff02::1",
            "fd00:ec2::254",
            "::ffff:127.0.0.1",
            "::ffff:0.0.0.0",
            "::ffff:169.254.1.1",
            "::ffff:224.0.0.1",
            "::127.0.0.1%lo",
            "10.0.0.9/32",
            "",
        ] {
            let own = json!({ "clusterIP": "10.96.0.1" });
            assert_eq!(addresses_of(own, &json!([{ "ip": ip }])), ["10.96.0.1"], "{ip}");
        }
    }
}
