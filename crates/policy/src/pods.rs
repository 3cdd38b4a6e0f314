//! Ports that pods declare by name.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use crate::{model::NamedPort, resolve::PodPorts};

/// Name and protocol of a port.
pub(crate) type PortName = (String, u8);

/// Ports of a name that one pod declares; as a rule, one.
pub(crate) type Numbers = BTreeSet<u16>;

#[derive(Debug)]
struct Pod {
    identity: u32,
    ports: BTreeMap<PortName, Numbers>,
}

/// Pods of one identity.
#[derive(Debug, Default)]
struct Crowd {
    addresses: BTreeSet<IpAddr>,
    /// How many pods declare which numbers for a name.
    declared: BTreeMap<PortName, BTreeMap<Numbers, usize>>,
}

/// What the pods of an identity say of a name.
pub(crate) enum Agreement<'a> {
    /// All the same.
    All(&'a Numbers),
    /// Not all the same: each pod on its own.
    Each(Vec<(IpAddr, &'a Numbers)>),
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Pods {
    pods: BTreeMap<IpAddr, Pod>,
    crowds: HashMap<u32, Crowd>,
    identities: HashMap<PortName, BTreeSet<u32>>,
    touched: BTreeSet<PortName>,
}

/// The ports of a pod by name.
pub(crate) fn by_name(ports: &[NamedPort]) -> BTreeMap<PortName, Numbers> {
    let mut names: BTreeMap<PortName, Numbers> = BTreeMap::new();
    for port in ports {
        names.entry((port.name.clone(), port.protocol)).or_default().insert(port.port);
    }
    names
}

impl Pods {
    pub(crate) fn set(&mut self, pod: &PodPorts) {
        let ports = by_name(&pod.ports);
        if let Some(old) = self.pods.get(&pod.ip)
            && old.identity == pod.identity
            && old.ports == ports
        {
            return;
        }
        self.remove(pod.ip);
        let crowd = self.crowds.entry(pod.identity).or_default();
        crowd.addresses.insert(pod.ip);
        for (name, numbers) in &ports {
            *crowd.declared.entry(name.clone()).or_default().entry(numbers.clone()).or_default() +=
                1;
            self.identities.entry(name.clone()).or_default().insert(pod.identity);
        }
        self.touched.extend(crowd.declared.keys().cloned());
        self.pods.insert(pod.ip, Pod { identity: pod.identity, ports });
    }

    pub(crate) fn remove(&mut self, ip: IpAddr) {
        let Some(pod) = self.pods.remove(&ip) else { return };
        let Some(crowd) = self.crowds.get_mut(&pod.identity) else { return };
        self.touched.extend(crowd.declared.keys().cloned());
        crowd.addresses.remove(&ip);
        for (name, numbers) in &pod.ports {
            let Some(counts) = crowd.declared.get_mut(name) else { continue };
            if let Some(count) = counts.get_mut(numbers) {
                *count -= 1;
                if *count == 0 {
                    counts.remove(numbers);
                }
            }
            if counts.is_empty() {
                crowd.declared.remove(name);
                if let Some(identities) = self.identities.get_mut(name) {
                    identities.remove(&pod.identity);
                }
            }
        }
        if crowd.addresses.is_empty() {
            self.crowds.remove(&pod.identity);
        }
    }

    /// Names whose meaning may have changed.
    pub(crate) fn take_touched(&mut self) -> BTreeSet<PortName> {
        std::mem::take(&mut self.touched)
    }

    /// What every identity that declares the name says of it.
    pub(crate) fn declaring<'a>(
        &'a self,
        name: &'a PortName,
    ) -> impl Iterator<Item = (u32, Agreement<'a>)> {
        self.identities.get(name).into_iter().flatten().filter_map(move |identity| {
            let crowd = self.crowds.get(identity)?;
            let counts = crowd.declared.get(name)?;
            let agreement = match counts.first_key_value() {
                Some((numbers, count)) if *count == crowd.addresses.len() => {
                    Agreement::All(numbers)
                }
                _ => Agreement::Each(self.each(crowd, name)),
            };
            Some((*identity, agreement))
        })
    }

    /// Addresses that declare a name, and the numbers they give it.
    pub(crate) fn addresses<'a>(
        &'a self,
        identity: u32,
        name: &'a PortName,
    ) -> Vec<(IpAddr, &'a Numbers)> {
        self.crowds.get(&identity).map(|crowd| self.each(crowd, name)).unwrap_or_default()
    }

    fn each<'a>(&'a self, crowd: &Crowd, name: &PortName) -> Vec<(IpAddr, &'a Numbers)> {
        crowd
            .addresses
            .iter()
            .filter_map(|ip| Some((*ip, self.pods.get(ip)?.ports.get(name)?)))
            .collect()
    }
}
