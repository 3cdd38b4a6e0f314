//! One event to one flow: names of pods, labels, rules and the ground of a default deny.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
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
use palisade_policy::{RuleSource, identity::reserved, model::Action};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::watch;

use crate::{
    engine::Progress,
    names,
    reconcile::mirror::address_bytes,
    tables::{Tables, TablesReader},
};

/// Names what events are about, as the tables tell at that moment.
pub struct Namer {
    node: String,
    tables: TablesReader,
    progress: watch::Receiver<Progress>,
}

impl Namer {
    /// Names with these tables.
    pub fn new(node: String, tables: TablesReader, progress: watch::Receiver<Progress>) -> Self {
        Self { node, tables, progress }
    }

    /// The flows of events; those that no program of this version writes are left out.
    pub fn name_all(&self, events: &[Event]) -> Vec<Flow> {
        let clock = Clock::now();
        let tables = self.tables.read();
        let progress = self.progress.borrow();
        events.iter().filter_map(|event| self.name(event, &clock, &tables, &progress)).collect()
    }

    fn name(
        &self,
        event: &Event,
        clock: &Clock,
        tables: &Tables,
        progress: &Progress,
    ) -> Option<Flow> {
        let kind = match EventKind::from_u8(event.kind)? {
            EventKind::Open => FlowKind::Open,
            EventKind::Close => FlowKind::Close,
            EventKind::Drop => FlowKind::Drop,
        };
        let has = |flag: u8| event.flags & flag != 0;
        let end =
            |address: &Address, port, identity, row| self.end(tables, address, port, identity, row);
        let tcp = event.protocol == protocol::TCP;
        Some(Flow {
            time: clock.wall(event.time),
            node: self.node.clone(),
            kind,
            verdict: match kind {
                FlowKind::Drop => Verdict::Dropped,
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
            source: end(&event.source, event.source_port, event.source_identity, event.source_row),
            destination: end(
                &event.destination,
                event.destination_port,
                event.destination_identity,
                event.destination_row,
            ),
            egress: judgement(progress, event.egress_table, event.egress_rule),
            ingress: judgement(progress, event.ingress_table, event.ingress_rule),
            l7: None,
            counters: (kind == FlowKind::Close).then_some(Counters {
                packets: event.packets,
                bytes: event.bytes,
                reply_packets: event.reply_packets,
                reply_bytes: event.reply_bytes,
            }),
        })
    }

    /// The flows of requests, each told once it was answered.
    pub fn name_requests(&self, records: &[AccessRecord]) -> Vec<Flow> {
        let tables = self.tables.read();
        records.iter().map(|record| self.name_request(record, &tables)).collect()
    }

    fn name_request(&self, record: &AccessRecord, tables: &Tables) -> Flow {
        let end = |address: SocketAddr| {
            let bytes = address_bytes(address.ip());
            let entry = tables.addresses.get(&address.ip());
            let (identity, row) = entry.map_or((0, ROW_NONE), |entry| (entry.identity, entry.row));
            self.end(tables, &bytes, address.port(), identity, row)
        };
        let nanos = i128::from(record.time);
        let time = Timestamp::from_nanosecond(nanos).unwrap_or_else(|_| Timestamp::now());
        Flow {
            time: format!("{time:.9}"),
            node: self.node.clone(),
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
            source: end(record.client),
            destination: end(record.server),
            egress: record.egress.as_ref().map(request_judgement),
            ingress: record.ingress.as_ref().map(request_judgement),
            counters: None,
            l7: Some(record.l7.clone()),
        }
    }

    fn end(
        &self,
        tables: &Tables,
        address: &Address,
        port: u16,
        identity: u32,
        row: u32,
    ) -> FlowEnd {
        let v6 = Ipv6Addr::from(*address);
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
            ROW_HOST => Some(self.node.clone()),
            _ if pod.is_some() => None,
            _ => tables
                .all_nodes()
                .find(|node| node.own_addresses().any(|own| own == address))
                .map(|node| node.name.clone()),
        };
        let labels = match tables.identities.get(&identity) {
            Some(row) => row.labels.iter().map(ToString::to_string).collect(),
            None => reserved(identity)
                .map(|labels| labels.iter().map(ToString::to_string).collect())
                .unwrap_or_default(),
        };
        FlowEnd {
            address,
            port,
            identity,
            labels,
            namespace: pod.map(|pod| pod.namespace.clone()),
            pod: pod.map(|pod| pod.name.clone()),
            node,
            endpoint: endpoint.map(|endpoint| endpoint.id),
        }
    }
}

/// What a table said: the rule that decided, or the policies that close the endpoint.
fn judgement(progress: &Progress, table: u32, rule: u32) -> Option<Judgement> {
    let plain = |outcome| Judgement { outcome, rule: None, default_deny_by: Vec::new() };
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

fn request_judgement(end: &EndRecord) -> Judgement {
    let outcome = match (end.allowed, &end.rule) {
        (true, Some(_)) => Outcome::AllowedByRule,
        (true, None) => Outcome::NoPolicy,
        (false, Some(_)) => Outcome::DeniedByRule,
        (false, None) => Outcome::DefaultDeny,
    };
    Judgement { outcome, rule: end.rule.as_ref().map(rule_name), default_deny_by: Vec::new() }
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
    set.map(|(_, name)| *name).collect::<Vec<_>>().join(",")
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

    fn wall(&self, nanos: u64) -> String {
        let age = self.monotonic.saturating_sub(Duration::from_nanos(nanos));
        let wall = self.wall.checked_sub(age).unwrap_or(self.wall);
        format!("{wall:.9}")
    }
}
