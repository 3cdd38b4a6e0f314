//! What the proxy judges by: the same tables that the kernel holds, under the same numbers.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use palisade_abi::{EndpointRow, EndpointValue, IpcacheValue, ROW_HOST, TABLE_ALLOW_ALL};
use palisade_api::proxy::{Endpoint, Peer, Rules, RulesDelta, TableId};
use palisade_policy::{CompiledPolicy, l7::Secrets};

use crate::reconcile::mirror::{Mirror, Touched};

/// Compiled policies by the number of their table.
pub type Tables = BTreeMap<TableId, Arc<CompiledPolicy>>;

/// The proxy's rules. They are empty while no policy of this node asks for a proxy: a node
/// without such policies pays nothing for them.
#[derive(Debug, Default)]
pub struct RuleBook {
    rules: Rules,
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
        let wanted = tables.values().any(|policy| policy.has_redirects());
        let had = !self.rules.tables.is_empty();
        let new = match (had, wanted) {
            (false, false) => return None,
            (true, false) => Rules::default(),
            (false, true) => Rules {
                addresses: mirror.addresses.iter().map(|(ip, value)| (*ip, peer(value))).collect(),
                networks: mirror
                    .prefixes
                    .iter()
                    .map(|(net, value)| (*net, network(value)))
                    .collect(),
                ..Rules::default()
            },
            (true, true) => return self.advance(mirror, &touched, tables, secrets),
        };
        let mut new = Rules { version: self.rules.version + 1, ..new };
        if wanted {
            new.endpoints = endpoints(mirror);
            new.tables = tables;
            new.secrets = secrets.clone();
        }
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
