//! One event to one flow: names of pods, labels, rules and the ground of a default deny.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use palisade_abi::{
    Address, DropReason, Event, EventKind, ROW_HOST, ROW_NONE, RULE_NONE, TABLE_ALLOW_ALL,
    TABLE_NONE, event_flags, protocol,
};
use palisade_api::{
    flow::{Counters, Direction, Flow, FlowEnd, FlowKind, Judgement, Outcome, RuleName, Verdict},
    proxy::{AccessRecord, EndRecord},
};
use palisade_policy::{RuleSource, model::Action};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::watch;

use crate::{
    engine::{InForce, Progress},
    names,
    reconcile::mirror::address_bytes,
    tables::{Tables, TablesReader},
};

/// Names what events are about, as the tables tell at that moment.
pub struct Namer {
    node: Arc<str>,
    tables: TablesReader,
    progress: watch::Receiver<Progress>,
}

impl Namer {
    /// Names with these tables.
    pub fn new(node: &str, tables: TablesReader, progress: watch::Receiver<Progress>) -> Self {
        Self { node: node.into(), tables, progress }
    }

    /// The flows of events; those that no program of this version writes are left out.
    pub fn name_all(&self, events: &[Event]) -> Vec<Arc<Flow>> {
        let clock = Clock::now();
        let (tables, progress) = (self.tables.read(), self.progress.borrow());
        let mut naming = Naming::new(&self.node, &tables, &progress);
        events.iter().filter_map(|event| naming.event(event, &clock)).map(Arc::new).collect()
    }

    /// The flows of requests, each told once it was answered.
    ///
    /// # Errors
    ///
    /// The first of the records'.
    pub fn name_requests(
        &self,
        records: impl Iterator<Item = io::Result<AccessRecord>>,
    ) -> io::Result<Vec<Arc<Flow>>> {
        let (tables, progress) = (self.tables.read(), self.progress.borrow());
        let mut naming = Naming::new(&self.node, &tables, &progress);
        records.map(|record| Ok(Arc::new(naming.request(record?)))).collect()
    }
}

/// The naming of what came together. Most of it is between the same few, so that a name is looked
/// for once and shared.
struct Naming<'a> {
    node: &'a Arc<str>,
    tables: &'a Tables,
    progress: &'a Progress,
    /// By address, identity and row; without ports.
    ends: HashMap<(Address, u32, u32), FlowEnd>,
    /// Of requests, by address; without ports.
    request_ends: HashMap<IpAddr, FlowEnd>,
    /// By table and rule.
    judgements: HashMap<(u32, u32), Option<Arc<Judgement>>>,
    /// By what the proxy said and the rule that it names, which records share.
    request_judgements: HashMap<(bool, *const RuleSource), Arc<Judgement>>,
}

impl<'a> Naming<'a> {
    fn new(node: &'a Arc<str>, tables: &'a Tables, progress: &'a Progress) -> Self {
        Self {
            node,
            tables,
            progress,
            ends: HashMap::new(),
            request_ends: HashMap::new(),
            judgements: HashMap::new(),
            request_judgements: HashMap::new(),
        }
    }

    fn event(&mut self, event: &Event, clock: &Clock) -> Option<Flow> {
        let kind = match EventKind::from_u8(event.kind)? {
            EventKind::Open => FlowKind::Open,
            EventKind::Close => FlowKind::Close,
            EventKind::Drop => FlowKind::Drop,
        };
        let has = |flag: u8| event.flags & flag != 0;
        let tcp = event.protocol == protocol::TCP;
        Some(Flow {
            time: clock.wall(event.time),
            node: Arc::clone(self.node),
            kind,
            verdict: match kind {
                FlowKind::Drop => Verdict::Dropped,
                _ if has(event_flags::PROXIED) => Verdict::Redirected,
                _ => Verdict::Forwarded,
            },
            drop_reason: DropReason::from_u8(event.reason).map(|reason| reason.as_str().into()),
            direction: match has(event_flags::EGRESS) {
                true => Direction::Egress,
                false => Direction::Ingress,
            },
            reply: has(event_flags::REPLY),
            rejudged: has(event_flags::REJUDGED),
            protocol: names::protocol(event.protocol),
            tcp_flags: if tcp { tcp_flags(event.tcp_flags) } else { String::new() },
            source: self.end(
                event.source,
                event.source_port,
                event.source_identity,
                event.source_row,
            ),
            destination: self.end(
                event.destination,
                event.destination_port,
                event.destination_identity,
                event.destination_row,
            ),
            egress: self.judgement(event.egress_table, event.egress_rule),
            ingress: self.judgement(event.ingress_table, event.ingress_rule),
            l7: None,
            counters: (kind == FlowKind::Close).then_some(Counters {
                packets: event.packets,
                bytes: event.bytes,
                reply_packets: event.reply_packets,
                reply_bytes: event.reply_bytes,
            }),
        })
    }

    fn request(&mut self, record: AccessRecord) -> Flow {
        let nanos = i128::from(record.time);
        Flow {
            time: Timestamp::from_nanosecond(nanos).unwrap_or_else(|_| Timestamp::now()),
            source: self.request_end(record.client),
            destination: self.request_end(record.server),
            node: Arc::clone(self.node),
            kind: FlowKind::Request,
            verdict: if record.allowed { Verdict::Forwarded } else { Verdict::Dropped },
            drop_reason: None,
            direction: match record.egress {
                Some(_) => Direction::Egress,
                None => Direction::Ingress,
            },
            reply: false,
            rejudged: false,
            protocol: names::protocol(record.protocol),
            tcp_flags: String::new(),
            egress: record.egress.map(|end| {
                self.request_judgement(&end, record.client, |endpoint| endpoint.egress_table)
            }),
            ingress: record.ingress.map(|end| {
                self.request_judgement(&end, record.server, |endpoint| endpoint.ingress_table)
            }),
            counters: None,
            l7: Some(record.l7),
        }
    }

    fn request_end(&mut self, address: SocketAddr) -> FlowEnd {
        let Self { node, tables, .. } = *self;
        let named = self.request_ends.entry(address.ip()).or_insert_with_key(|ip| {
            let entry = tables.addresses.get(ip);
            let (identity, row) = entry.map_or((0, ROW_NONE), |entry| (entry.identity, entry.row));
            name_end(node, tables, address_bytes(*ip), identity, row)
        });
        FlowEnd { port: address.port(), ..named.clone() }
    }

    /// What the policy of a pod said to a request. The proxy names the rule that decided; that none
    /// did is for the pod's `table` of now to explain.
    fn request_judgement(
        &mut self,
        end: &EndRecord,
        pod: SocketAddr,
        table: impl FnOnce(&InForce) -> u32,
    ) -> Arc<Judgement> {
        if let (false, None) = (end.allowed, &end.rule) {
            let entry = self.tables.addresses.get(&pod.ip());
            let endpoint = entry.and_then(|entry| self.progress.endpoints.get(&entry.row));
            let table =
                endpoint.map(table).filter(|table| self.progress.compiled.contains_key(table));
            let closed = table.and_then(|table| self.judgement(table, RULE_NONE));
            return closed.unwrap_or_else(|| Arc::new(Judgement::plain(Outcome::DefaultDeny)));
        }
        let rule = end.rule.as_deref();
        let said = (end.allowed, rule.map_or(std::ptr::null(), std::ptr::from_ref));
        let judgement = self.request_judgements.entry(said).or_insert_with(|| {
            let outcome = match (end.allowed, rule) {
                (true, Some(_)) => Outcome::AllowedByRule,
                (true, None) => Outcome::NoPolicy,
                (false, _) => Outcome::DeniedByRule,
            };
            Arc::new(Judgement { rule: rule.map(rule_name), ..Judgement::plain(outcome) })
        });
        Arc::clone(judgement)
    }

    fn end(&mut self, address: Address, port: u16, identity: u32, row: u32) -> FlowEnd {
        let Self { node, tables, .. } = *self;
        let named = self.ends.entry((address, identity, row));
        let named = named.or_insert_with(|| name_end(node, tables, address, identity, row));
        FlowEnd { port, ..named.clone() }
    }

    fn judgement(&mut self, table: u32, rule: u32) -> Option<Arc<Judgement>> {
        let progress = self.progress;
        let said = self.judgements.entry((table, rule));
        said.or_insert_with(|| judgement(progress, table, rule).map(Arc::new)).clone()
    }
}

/// Who has the address, of the identity and the row that the kernel knew it by.
fn name_end(
    own_node: &Arc<str>,
    tables: &Tables,
    address: Address,
    identity: u32,
    row: u32,
) -> FlowEnd {
    let v6 = Ipv6Addr::from(address);
    let address = v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4);
    let endpoint = tables.endpoints.get(&row);
    let pod = match endpoint {
        Some(endpoint) => Some(&endpoint.pod),
        None => tables
            .pods
            .rows()
            .filter(|pod| !pod.host_network)
            .find(|pod| pod.addresses.contains(&address))
            .map(|pod| &pod.name),
    };
    let node = match row {
        ROW_HOST => Some(Arc::clone(own_node)),
        _ if pod.is_some() => None,
        _ => tables
            .all_nodes()
            .find(|node| node.own_addresses().any(|own| own == address))
            .map(|node| node.name.as_str().into()),
    };
    let labels = tables.labels_of(identity).iter().map(ToString::to_string).collect();
    FlowEnd {
        address,
        port: 0,
        identity,
        labels,
        namespace: pod.map(|pod| pod.namespace.as_str().into()),
        pod: pod.map(|pod| pod.name.as_str().into()),
        node,
        endpoint: endpoint.map(|endpoint| endpoint.id),
    }
}

/// What a table said: the rule that decided, or the policies that close the endpoint.
fn judgement(progress: &Progress, table: u32, rule: u32) -> Option<Judgement> {
    let plain = Judgement::plain;
    match table {
        TABLE_NONE => return None,
        TABLE_ALLOW_ALL => return Some(plain(Outcome::NoPolicy)),
        _ => {}
    }
    let Some(policy) = progress.compiled.get(&table) else { return Some(plain(Outcome::Unknown)) };
    if rule == RULE_NONE {
        let by = policy.default_deny_by.iter().map(ToString::to_string).collect();
        return Some(Judgement { default_deny_by: by, ..plain(Outcome::DefaultDeny) });
    }
    let Some(rule) = policy.rule(rule) else { return Some(plain(Outcome::Unknown)) };
    let outcome = match rule.action {
        Action::Allow => Outcome::AllowedByRule,
        Action::Deny => Outcome::DeniedByRule,
    };
    Some(Judgement { rule: Some(rule_name(&rule.source)), ..plain(outcome) })
}

/// A rule's policy and field.
pub(crate) fn rule_name(source: &RuleSource) -> RuleName {
    match source {
        RuleSource::Policy { policy, path } => {
            RuleName { policy: policy.to_string(), path: path.clone() }
        }
        RuleSource::AllowLocalhost => {
            RuleName { policy: "allow-localhost-ingress".into(), path: String::new() }
        }
        RuleSource::NoDefaultDeny => RuleName { policy: "allow-any".into(), path: String::new() },
    }
}

fn tcp_flags(flags: u8) -> String {
    const NAMES: [&str; 6] = ["FIN", "SYN", "RST", "PSH", "ACK", "URG"];
    let set = NAMES.iter().enumerate().filter(|(bit, _)| flags & (1 << bit) != 0);
    set.fold(String::new(), |names, (_, name)| match names.as_str() {
        "" => (*name).to_owned(),
        _ => names + "," + name,
    })
}

/// The kernel's clock beside the wall's.
struct Clock {
    monotonic: Duration,
    wall: Timestamp,
}

impl Clock {
    fn now() -> Self {
        let now = clock_gettime(ClockId::Monotonic);
        let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
        let nanos = u32::try_from(now.tv_nsec).unwrap_or_default();
        Self { monotonic: Duration::new(seconds, nanos), wall: Timestamp::now() }
    }

    fn wall(&self, nanos: u64) -> Timestamp {
        let age = self.monotonic.saturating_sub(Duration::from_nanos(nanos));
        self.wall.checked_sub(age).unwrap_or(self.wall)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use palisade_api::flow::L7;
    use palisade_policy::{
        CompiledPolicy,
        model::{PolicyKind, PolicyRef},
    };

    use super::*;
    use crate::tables::{TablesWriter, identities::AddressEntry};

    const ROW: u32 = 7;

    fn closed_by(name: &str) -> Arc<CompiledPolicy> {
        let kind = PolicyKind::CiliumNetworkPolicy;
        let id = PolicyRef { kind, namespace: Some("default".into()), name: name.into() };
        Arc::new(CompiledPolicy { default_deny_by: vec![id], ..CompiledPolicy::default() })
    }

    /// Names for a node whose one pod is `10.0.0.7`.
    fn namer() -> Namer {
        let mut tables = TablesWriter::default();
        let address = [10, 0, 0, 7].into();
        let entry = AddressEntry { address, identity: 300, prefix: 0, row: ROW, node: 0 };
        tables.write().addresses.put(entry);
        let row =
            InForce { identity: 300, ifindex: 1, ingress_table: 11, egress_table: 12, revision: 1 };
        let compiled = BTreeMap::from([(11, closed_by("in")), (12, closed_by("out"))]);
        let progress = Progress {
            endpoints: BTreeMap::from([(ROW, row)]),
            compiled: Arc::new(compiled),
            ..Progress::default()
        };
        Namer::new("node1", tables.reader(), watch::channel(progress).1)
    }

    fn record(egress: Option<EndRecord>, ingress: Option<EndRecord>) -> AccessRecord {
        let (client, server) = ("10.0.0.7:4000", "10.0.0.7:80");
        AccessRecord {
            time: 1,
            protocol: protocol::TCP,
            client: client.parse().unwrap(),
            server: server.parse().unwrap(),
            allowed: false,
            egress,
            ingress,
            l7: L7::Tls { server_name: None, error: None },
        }
    }

    #[test]
    fn a_request_that_no_rule_matches_names_what_closes_the_end() {
        let unmatched = || Some(EndRecord { allowed: false, rule: None });
        let by = |end: &Option<Arc<Judgement>>| {
            end.as_ref().map(|end| (end.outcome, end.default_deny_by.clone()))
        };
        let closed = |name: &str| {
            let policy = format!("CiliumNetworkPolicy default/{name}");
            Some((Outcome::DefaultDeny, vec![policy]))
        };
        let namer = namer();
        let records = [
            record(unmatched(), None),
            record(None, unmatched()),
            AccessRecord { server: "10.0.0.8:80".parse().unwrap(), ..record(None, unmatched()) },
        ];
        let mut flows = namer.name_requests(records.into_iter().map(Ok)).unwrap();
        let strange = flows.pop().unwrap();
        assert_eq!(by(&strange.ingress), Some((Outcome::DefaultDeny, Vec::new())));
        let ingress = flows.pop().unwrap();
        assert_eq!((by(&ingress.egress), by(&ingress.ingress)), (None, closed("in")));
        let egress = flows.pop().unwrap();
        assert_eq!((by(&egress.egress), by(&egress.ingress)), (closed("out"), None));
    }

    #[test]
    fn what_goes_to_the_proxy_is_redirected_unless_it_is_dropped() {
        let event = |kind: EventKind, flags| Event {
            time: 1,
            source: [0; 16],
            destination: [0; 16],
            source_port: 4000,
            destination_port: 80,
            protocol: protocol::TCP,
            kind: kind as u8,
            reason: 0,
            flags,
            source_identity: 300,
            destination_identity: 300,
            source_row: ROW_NONE,
            destination_row: ROW,
            egress_table: TABLE_NONE,
            egress_rule: RULE_NONE,
            ingress_table: 11,
            ingress_rule: RULE_NONE,
            tcp_flags: 2,
            reserved: [0; 7],
            packets: 1,
            bytes: 60,
            reply_packets: 0,
            reply_bytes: 0,
        };
        let events = [
            event(EventKind::Open, 0),
            event(EventKind::Open, event_flags::PROXIED),
            event(EventKind::Close, event_flags::PROXIED),
            event(EventKind::Drop, event_flags::PROXIED),
        ];
        let verdicts: Vec<Verdict> =
            namer().name_all(&events).into_iter().map(|flow| flow.verdict).collect();
        let [plain, open, close, drop] = verdicts[..] else { panic!("{verdicts:?}") };
        assert_eq!((plain, drop), (Verdict::Forwarded, Verdict::Dropped));
        assert_eq!((open, close), (Verdict::Redirected, Verdict::Redirected));
    }
}
