//! What the proxy judges by: the same tables that the kernel holds, under the same numbers.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use palisade_abi::{EndpointRow, EndpointValue, IpcacheValue, ROW_HOST, TABLE_ALLOW_ALL};
use palisade_api::proxy::{Endpoint, Peer, Rules, RulesDelta, TableId};
use palisade_policy::{
    CompiledPolicy, RuleSource,
    l7::Secrets,
    model::{Application, PolicyRef},
};

use crate::reconcile::mirror::{Mirror, Touched};

/// Compiled policies by the number of their table.
pub type Tables = BTreeMap<TableId, Arc<CompiledPolicy>>;

/// The proxy's rules. They are empty until a policy of this node asks for a proxy: a node without
/// such policies pays nothing for them. From then on they are kept, because connections that the
/// proxy carries outlive the policy that sent them there.
#[derive(Debug, Default)]
pub struct RuleBook {
    rules: Rules,
    /// The version that made an endpoint what it is.
    since: BTreeMap<u32, u64>,
    /// The version that brought a table.
    tables_since: BTreeMap<TableId, u64>,
}

impl RuleBook {
    /// The rules as they are now.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Takes over what the kernel holds by now, and says what differs from before.
    pub fn update(
        &mut self,
        mirror: &mut Mirror,
        tables: Tables,
        secrets: &Secrets,
    ) -> Option<RulesDelta> {
        let touched = mirror.take_touched();
        let delta = match self.rules.version {
            0 => self.begin(mirror, tables, secrets),
            _ => self.advance(mirror, &touched, tables, secrets),
        }?;
        for endpoint in delta.endpoints.values().flatten() {
            self.since.insert(endpoint.id, delta.version);
        }
        let known: BTreeSet<u32> = self.rules.endpoints.values().map(|known| known.id).collect();
        self.since.retain(|id, _| known.contains(id));
        for (table, policy) in &delta.tables {
            match policy {
                Some(_) => self.tables_since.insert(*table, delta.version),
                None => self.tables_since.remove(table),
            };
        }
        Some(delta)
    }

    /// Whether a policy asks for a proxy.
    pub fn is_needed(&self) -> bool {
        self.rules.tables.values().any(|policy| policy.has_redirects())
    }

    /// Policies with a word on what is inside connections, in tables that a proxy does not have which
    /// took over a version last.
    pub fn lacking(&self, acknowledged: u64) -> BTreeSet<PolicyRef> {
        let newer = self.tables_since.iter().filter(|(_, since)| **since > acknowledged);
        let tables = newer.filter_map(|(table, _)| self.rules.tables.get(table));
        let rules = tables.flat_map(|table| &table.rules);
        rules
            .filter(|rule| rule.application != Application::Any)
            .flat_map(|rule| std::iter::once(&rule.source).chain(&rule.also))
            .filter_map(|source| match source {
                RuleSource::Policy { policy, .. } => Some(policy.clone()),
                RuleSource::AllowLocalhost | RuleSource::NoDefaultDeny => None,
            })
            .collect()
    }

    /// The version that a proxy must have so that nothing reaches or leaves an endpoint which the
    /// endpoint's own policy would have it deny; none: its policy asks for no proxy.
    pub fn needed_by(&self, endpoint: u32) -> Option<u64> {
        let redirects = |table: Option<TableId>| {
            let policy = table.and_then(|table| self.rules.tables.get(&table));
            policy.is_some_and(|policy| policy.has_redirects())
        };
        let mut known = self.rules.endpoints.values().filter(|known| known.id == endpoint);
        let asks = known.any(|known| redirects(known.ingress) || redirects(known.egress));
        asks.then(|| self.since.get(&endpoint).copied()).flatten()
    }

    /// The first rules.
    fn begin(&mut self, mirror: &Mirror, tables: Tables, secrets: &Secrets) -> Option<RulesDelta> {
        if !tables.values().any(|policy| policy.has_redirects()) {
            return None;
        }
        let networks = mirror.prefixes.iter().map(|(net, value)| (*net, network(value)));
        let new = Rules {
            version: 1,
            endpoints: endpoints(mirror),
            tables,
            addresses: mirror.addresses.iter().map(|(ip, value)| (*ip, peer(value))).collect(),
            networks: networks.collect(),
            secrets: secrets.clone(),
        };
        let delta = RulesDelta::between(&self.rules, &new);
        self.rules = new;
        Some(delta)
    }

    /// Of the addresses, which may be many, only those that changed are looked at.
    fn advance(
        &mut self,
        mirror: &Mirror,
        touched: &Touched,
        tables: Tables,
        secrets: &Secrets,
    ) -> Option<RulesDelta> {
        let old = &self.rules;
        let small = |endpoints, tables, secrets: &Secrets| Rules {
            version: old.version,
            endpoints,
            tables,
            secrets: secrets.clone(),
            ..Rules::default()
        };
        let before = small(old.endpoints.clone(), old.tables.clone(), &old.secrets);
        let after = small(endpoints(mirror), tables, secrets);
        let mut delta = RulesDelta::between(&before, &after);
        for address in &touched.addresses {
            let now = mirror.addresses.get(address).map(peer);
            if old.addresses.get(address) != now.as_ref() {
                delta.addresses.insert(*address, now);
            }
        }
        for net in &touched.networks {
            let now = mirror.prefixes.get(net).map(network);
            if old.networks.get(net) != now.as_ref() {
                delta.networks.insert(*net, now);
            }
        }
        let same = before == after && delta.addresses.is_empty() && delta.networks.is_empty();
        if same {
            return None;
        }
        delta.version = old.version + 1;
        // It was made for these very rules.
        self.rules.apply(delta.clone()).ok()?;
        Some(delta)
    }
}

fn peer(value: &EndpointValue) -> Peer {
    Peer { identity: value.identity, prefix: value.prefix, host: value.row == ROW_HOST }
}

fn network(value: &IpcacheValue) -> Peer {
    Peer { identity: value.identity, prefix: value.prefix, host: false }
}

fn endpoints(mirror: &Mirror) -> BTreeMap<IpAddr, Endpoint> {
    let rows = mirror.rows.iter().filter(|(number, _)| **number != ROW_HOST);
    rows.flat_map(|(_, row)| addresses(row).map(|address| (address, endpoint(row)))).collect()
}

fn addresses(row: &EndpointRow) -> impl Iterator<Item = IpAddr> + use<> {
    let ipv4 = (row.ipv4 != [0; 4]).then(|| IpAddr::V4(Ipv4Addr::from(row.ipv4)));
    let ipv6 = (row.ipv6 != [0; 16]).then(|| IpAddr::V6(Ipv6Addr::from(row.ipv6)));
    ipv4.into_iter().chain(ipv6)
}

fn endpoint(row: &EndpointRow) -> Endpoint {
    // A table that is not there, as that of a row that was never programmed, admits nothing.
    let table = |number: u32| (number != TABLE_ALLOW_ALL).then_some(number);
    Endpoint {
        id: row.endpoint,
        identity: row.identity,
        ingress: table(row.ingress_table),
        egress: table(row.egress_table),
    }
}
