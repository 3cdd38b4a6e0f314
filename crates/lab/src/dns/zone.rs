//! The cluster's names, made from Services and EndpointSlices.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt;

use super::TTL;
use super::wire::{Answer, Data, Name, Query, Record, number};
use crate::layout::CLUSTER_DOMAIN;

/// Version of the naming scheme that this server follows.
const SCHEMA_VERSION: &str = "1.1.0";
/// Aliases followed inside the cluster.
const MAX_ALIASES: usize = 8;

/// Every name the cluster has at one moment.
#[derive(Debug, Default)]
pub struct Zone {
    records: HashMap<String, Vec<Data>>,
    /// Names that exist only because something below them does.
    parents: HashSet<String>,
    namespaces: HashSet<String>,
    serial: u32,
}

impl Zone {
    /// The zone of these objects.
    pub fn build<'a>(
        services: impl IntoIterator<Item = &'a Service>,
        slices: impl IntoIterator<Item = &'a EndpointSlice>,
        serial: u32,
    ) -> Self {
        let mut by_service: HashMap<(String, String), Vec<&EndpointSlice>> = HashMap::new();
        for slice in slices {
            if let Some(service) = slice.labels().get("kubernetes.io/service-name") {
                let key = (slice.namespace().unwrap_or_default(), service.clone());
                by_service.entry(key).or_default().push(slice);
            }
        }
        let mut zone = Self { serial, ..Self::default() };
        zone.add(CLUSTER_DOMAIN, Data::Ns(zone.primary()));
        zone.add(&format!("dns-version.{CLUSTER_DOMAIN}"), Data::Txt(SCHEMA_VERSION.into()));
        for service in services {
            let key = (service.namespace().unwrap_or_default(), service.name_any());
            let slices = by_service.remove(&key).unwrap_or_default();
            zone.add_service(service, &key.0, &slices);
        }
        zone
    }

    fn primary(&self) -> Name {
        Name::parse(&format!("ns.dns.{CLUSTER_DOMAIN}")).unwrap_or_default()
    }

    fn add(&mut self, name: &str, data: Data) {
        let mut parent = name;
        while let Some((_, rest)) = parent.split_once('.') {
            if !self.parents.insert(rest.to_owned()) {
                break;
            }
            parent = rest;
        }
        let records = self.records.entry(name.to_owned()).or_default();
        if !records.contains(&data) {
            records.push(data);
        }
    }

    fn add_address(&mut self, name: &str, address: IpAddr) {
        match address {
            IpAddr::V4(address) => self.add(name, Data::A(address)),
            IpAddr::V6(address) => self.add(name, Data::Aaaa(address)),
        }
    }

    fn add_pointer(&mut self, address: IpAddr, name: &str) {
        if let Some(target) = Name::parse(name) {
            self.add(&reverse(address), Data::Ptr(target));
        }
    }

    fn add_service(&mut self, service: &Service, namespace: &str, slices: &[&EndpointSlice]) {
        let Some(spec) = &service.spec else { return };
        self.namespaces.insert(namespace.to_owned());
        let base = format!("{}.{namespace}.svc.{CLUSTER_DOMAIN}", service.name_any());
        if spec.type_.as_deref() == Some("ExternalName") {
            if let Some(target) = spec.external_name.as_deref().and_then(Name::parse) {
                self.add(&base, Data::Cname(target));
            }
            return;
        }
        let addresses: BTreeSet<IpAddr> = spec
            .cluster_ips
            .iter()
            .flatten()
            .chain(&spec.cluster_ip)
            .filter_map(|ip| ip.parse().ok())
            .collect();
        if addresses.is_empty() {
            let not_ready = spec.publish_not_ready_addresses == Some(true);
            return self.add_headless(&base, slices, not_ready);
        }
        for address in addresses {
            self.add_address(&base, address);
            self.add_pointer(address, &base);
        }
        for port in spec.ports.iter().flatten() {
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            self.add_port(&base, port.name.as_deref(), protocol, port.port, &base);
        }
    }

    fn add_port(&mut self, base: &str, name: Option<&str>, protocol: &str, port: i32, to: &str) {
        let Some(name) = name.filter(|name| !name.is_empty()) else { return };
        if let (Ok(port), Some(target)) = (u16::try_from(port), Name::parse(to)) {
            let owner = format!("_{name}._{protocol}.{base}").to_ascii_lowercase();
            self.add(&owner, Data::Srv { port, target });
        }
    }

    fn add_headless(&mut self, base: &str, slices: &[&EndpointSlice], not_ready: bool) {
        for slice in slices {
            for endpoint in slice.endpoints.iter().flatten() {
                let ready = endpoint.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true);
                if !ready && !not_ready {
                    continue;
                }
                for address in endpoint.addresses.iter().filter_map(|a| a.parse().ok()) {
                    self.add_address(base, address);
                    let label = endpoint.hostname.clone().unwrap_or_else(|| dashed(address));
                    let host = format!("{label}.{base}");
                    self.add_address(&host, address);
                    self.add_pointer(address, &host);
                    for port in slice.ports.iter().flatten() {
                        let protocol = port.protocol.as_deref().unwrap_or("TCP");
                        let number = port.port.unwrap_or(0);
                        self.add_port(base, port.name.as_deref(), protocol, number, &host);
                    }
                }
            }
        }
    }

    /// Answers a question.
    pub fn answer(&self, query: &Query) -> Answer {
        if query.has_bad_version() {
            return Answer::code(number::BAD_VERSION);
        }
        let key = query.name.key();
        let Some(apex) = authority_of(&key) else { return Answer::code(number::REFUSED) };
        if !query.is_internet() {
            return Answer::code(number::REFUSED);
        }
        let mut answer = Answer { authoritative: true, ..Answer::default() };
        let exists = self.collect(&key, query, &mut answer);
        if answer.answers.is_empty() {
            answer.code = if exists { number::NO_ERROR } else { number::NAME_ERROR };
            answer.authority.push(self.soa(apex));
        }
        self.add_hosts(&mut answer);
        answer
    }

    /// Collects what `key` has of the wanted type, along aliases; whether the name exists.
    fn collect(&self, key: &str, query: &Query, answer: &mut Answer) -> bool {
        let mut key = key.to_owned();
        let mut owner = query.name.clone();
        for _ in 0..MAX_ALIASES {
            if key == CLUSTER_DOMAIN && query.kind == number::SOA {
                answer.answers.push(self.soa(CLUSTER_DOMAIN));
                return true;
            }
            let Some(records) = self.lookup(&key) else { return !answer.answers.is_empty() };
            let wanted = |data: &&Data| query.kind == number::ANY || data.kind() == query.kind;
            let record = |data: &Data| Record { name: owner.clone(), ttl: TTL, data: data.clone() };
            let found: Vec<_> = records.iter().filter(wanted).map(record).collect();
            if !found.is_empty() {
                answer.answers.extend(found);
                return true;
            }
            let alias = records.iter().find_map(|data| match data {
                Data::Cname(target) => Some(target.clone()),
                _ => None,
            });
            let Some(target) = alias else { return true };
            answer.answers.push(record(&Data::Cname(target.clone())));
            key = target.key();
            owner = target;
        }
        true
    }

    fn lookup(&self, key: &str) -> Option<Vec<Data>> {
        if let Some(records) = self.records.get(key) {
            return Some(records.clone());
        }
        if self.parents.contains(key) {
            return Some(Vec::new());
        }
        self.pod_name(key)
    }

    /// `10-244-1-5.default.pod.cluster.local` carries its own address.
    fn pod_name(&self, key: &str) -> Option<Vec<Data>> {
        let rest = key.strip_suffix(CLUSTER_DOMAIN)?.strip_suffix(".pod.")?;
        let Some((label, namespace)) = rest.split_once('.') else {
            return self.namespaces.contains(rest).then(Vec::new);
        };
        if !self.namespaces.contains(namespace) {
            return None;
        }
        if let Ok(address) = label.replace('-', ".").parse::<Ipv4Addr>() {
            return Some(vec![Data::A(address)]);
        }
        let address = label.replace('-', ":").parse::<Ipv6Addr>().ok()?;
        Some(vec![Data::Aaaa(address)])
    }

    fn soa(&self, apex: &str) -> Record {
        Record {
            name: Name::parse(apex).unwrap_or_default(),
            ttl: TTL,
            data: Data::Soa { primary: self.primary(), serial: self.serial },
        }
    }

    /// The addresses of the hosts that SRV records name.
    fn add_hosts(&self, answer: &mut Answer) {
        let targets: Vec<Name> = answer
            .answers
            .iter()
            .filter_map(|record| match &record.data {
                Data::Srv { target, .. } => Some(target.clone()),
                _ => None,
            })
            .collect();
        for target in targets {
            for data in self.records.get(&target.key()).into_iter().flatten() {
                let record = Record { name: target.clone(), ttl: TTL, data: data.clone() };
                let address = matches!(data, Data::A(_) | Data::Aaaa(_));
                if address && !answer.additional.contains(&record) {
                    answer.additional.push(record);
                }
            }
        }
    }
}

/// The zone that `key` falls in, if it is ours: the cluster's domain and the reverse zones of its
/// address ranges.
fn authority_of(key: &str) -> Option<&'static str> {
    const ZONES: [&str; 5] = [
        CLUSTER_DOMAIN,
        "96.10.in-addr.arpa",
        "244.10.in-addr.arpa",
        "6.9.d.f.ip6.arpa",
        "4.4.d.f.ip6.arpa",
    ];
    ZONES.into_iter().find(|zone| {
        key.strip_suffix(zone).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    })
}

fn dashed(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string().replace('.', "-"),
        IpAddr::V6(address) => address.segments().map(|s| format!("{s:x}")).join("-"),
    }
}

/// The name under which the reverse of an address is found.
pub fn reverse(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => {
            let [a, b, c, d] = address.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa")
        }
        IpAddr::V6(address) => {
            let nibbles = address.octets().into_iter().rev().flat_map(|b| [b & 15, b >> 4]);
            let labels: String = nibbles.map(|nibble| format!("{nibble:x}.")).collect();
            format!("{labels}ip6.arpa")
        }
    }
}

#[cfg(test)]
mod tests;
