//! `cilium.io/v2` `CiliumNetworkPolicy` and `CiliumClusterwideNetworkPolicy`.

mod application;

use palisade_abi::protocol;
use palisade_policy::{
    identity::is_relevant,
    label::{CLUSTER, NAMESPACE_LABELS, POD_NAMESPACE, SOURCE_ANY, SOURCE_K8S, SOURCE_RESERVED},
    model::{
        Action, Application, Cidr, Direction, Entity, Entry, Peer, Peers, PolicyRef, PortMatch,
        PortSpec, Ports, Rule, Section,
    },
    selector::{Key, Operator, Requirement, Selector},
};
use serde_json::{Map, Value};

use self::application::fqdn;
use super::{
    Converted, RefusedSubject, everybody,
    kubernetes::{IRRELEVANT_SUGGESTION, irrelevant},
    read::{Reader, Written, present},
};

/// What the readers of the parts need to know of the whole.
struct Context<'a> {
    id: &'a PolicyRef,
    cluster: &'a str,
    /// The subject is made of endpoints whose labels are not known yet.
    init: bool,
}

/// One of the four lists of a rule.
#[derive(Clone, Copy)]
struct List {
    field: &'static str,
    direction: Direction,
    action: Action,
}

const LISTS: [List; 4] = [
    List { field: "ingressDeny", direction: Direction::Ingress, action: Action::Deny },
    List { field: "ingress", direction: Direction::Ingress, action: Action::Allow },
    List { field: "egressDeny", direction: Direction::Egress, action: Action::Deny },
    List { field: "egress", direction: Direction::Egress, action: Action::Allow },
];

/// Of one item of `toPorts` or `icmps`.
const MOST_PORTS: usize = 40;

const RULE_FIELDS: [&str; 10] = [
    "endpointSelector",
    "nodeSelector",
    "ingress",
    "ingressDeny",
    "egress",
    "egressDeny",
    "enableDefaultDeny",
    "labels",
    "description",
    "log",
];

const ENTITIES: [&str; 11] = [
    "all",
    "world",
    "cluster",
    "host",
    "init",
    "ingress",
    "unmanaged",
    "remote-node",
    "health",
    "none",
    "kube-apiserver",
];

pub(super) fn read(
    reader: &mut Reader,
    id: &PolicyRef,
    object: &Value,
    cluster: &str,
) -> Converted {
    let mut converted = Converted::default();
    let known = ["apiVersion", "kind", "metadata", "spec", "specs", "status"];
    let Some(object) = reader.object(object, "", &known) else { return converted };
    if let Some(spec) = present(object, "spec") {
        rule(reader, spec, "spec", id, cluster, &mut converted);
    }
    for (spec, path) in reader.list(object, "specs", "").unwrap_or_default() {
        rule(reader, spec, &path, id, cluster, &mut converted);
    }
    if converted.rules.is_empty() && reader.problems.is_empty() {
        reader.problem("spec", "is missing", "write one rule in `spec`, or several in `specs`");
    }
    converted
}

fn rule(
    reader: &mut Reader,
    value: &Value,
    path: &str,
    id: &PolicyRef,
    cluster: &str,
    converted: &mut Converted,
) {
    let Some(map) = reader.object(value, path, &RULE_FIELDS) else {
        let subject = everybody(id);
        converted.subjects.push(RefusedSubject { subject, ingress: true, egress: true });
        return;
    };
    if present(map, "nodeSelector").is_some() {
        let suggestion = "select pods with an endpointSelector";
        let message = "policies of nodes are not supported";
        reader.problem(format!("{path}.nodeSelector"), message, suggestion);
        if present(map, "endpointSelector").is_none() {
            return;
        }
    }
    remarks(reader, map, path);
    let subject = subject(reader, map, path, id);
    let init = Key::new(SOURCE_RESERVED, "init");
    let context = Context { id, cluster, init: subject.requirements.iter().any(|r| r.key == init) };
    let mut sections = [Section::default(), Section::default()];
    let mut named = [false; 2];
    let mut empty = true;
    for list in LISTS {
        named[list.direction as usize] |= map.contains_key(list.field);
        let items = reader.list(map, list.field, path).unwrap_or_default();
        empty &= items.is_empty();
        let section = &mut sections[list.direction as usize];
        section.default_deny |= !items.is_empty();
        for (item, path) in items {
            section.entries.extend(entry(reader, item, path, list, &context));
        }
    }
    for section in &sections {
        application::contradictions(reader, &section.entries);
    }
    if let Some(value) = present(map, "enableDefaultDeny") {
        let path = format!("{path}.enableDefaultDeny");
        if let Some(map) = reader.object(value, &path, &["ingress", "egress"]) {
            for (field, section) in ["ingress", "egress"].into_iter().zip(&mut sections) {
                if let Some(wanted) = reader.boolean(map, field, &path) {
                    section.default_deny = wanted;
                }
            }
        }
    }
    if empty {
        let suggestion = "to close an endpoint write one empty rule: `ingress: [{}]`";
        reader.problem(path, "no list of rules has a rule in it", suggestion);
    }
    let [ingress, egress] = sections;
    converted.subjects.push(RefusedSubject {
        subject: subject.clone(),
        ingress: named[0] || ingress.default_deny,
        egress: named[1] || egress.default_deny,
    });
    converted.rules.push(Rule { subject, ingress, egress });
}

/// What a rule says about itself, and nothing goes by.
fn remarks(reader: &mut Reader, rule: &Map<String, Value>, path: &str) {
    if let Some(value) = present(rule, "description") {
        reader.text(value, &format!("{path}.description"));
    }
    for (item, path) in reader.list(rule, "labels", path).unwrap_or_default() {
        let Some(map) = reader.object(item, &path, &["key", "value", "source"]) else { continue };
        if present(map, "key").is_none() {
            reader.problem(format!("{path}.key"), "is missing", "name the label");
        }
        for (field, value) in map.iter().filter(|(_, value)| !value.is_null()) {
            reader.text(value, &format!("{path}.{field}"));
        }
    }
    let path = format!("{path}.log");
    let Some(map) = present(rule, "log").and_then(|log| reader.object(log, &path, &["value"]))
    else {
        return;
    };
    let path = format!("{path}.value");
    let text = present(map, "value").and_then(|value| reader.text(value, &path));
    if text.is_some_and(|text| text.chars().count() > 32 || text.chars().any(char::is_control)) {
        reader.problem(path, "is no short remark", "write up to 32 printable characters");
    }
}

/// The subject. A namespaced policy is kept to its own namespace, whatever it asks for.
fn subject(reader: &mut Reader, rule: &Map<String, Value>, path: &str, id: &PolicyRef) -> Selector {
    let path = format!("{path}.endpointSelector");
    let Some(value) = present(rule, "endpointSelector") else {
        reader.problem(&path, "is missing", "write `endpointSelector: {}` for every pod");
        return everybody(id);
    };
    let written = reader.label_selector(value, &path);
    let mut requirements = requirements(reader, written, false);
    if let Some(namespace) = &id.namespace {
        for (requirement, path) in &requirements {
            if requirement.key.source == SOURCE_RESERVED {
                let message = "a policy in a namespace selects no reserved endpoints";
                let kind = "write a CiliumClusterwideNetworkPolicy";
                reader.problem(path, message, kind);
            }
            if is_namespace(&requirement.key) && !accepts(&requirement.operator, namespace) {
                let message =
                    format!("a policy in namespace `{namespace}` selects only pods there");
                reader.problem(path, message, "leave the namespace out");
            }
        }
        requirements.retain(|(requirement, _)| {
            !is_namespace(&requirement.key) && requirement.key.source != SOURCE_RESERVED
        });
        let own = Requirement::equals(Key::new(SOURCE_K8S, POD_NAMESPACE), namespace);
        requirements.push((own, String::new()));
    }
    Selector::new(requirements.into_iter().map(|(requirement, _)| requirement).collect())
}

fn is_namespace(key: &Key) -> bool {
    key.key == POD_NAMESPACE && key.source != SOURCE_RESERVED
}

fn accepts(operator: &Operator, value: &str) -> bool {
    match operator {
        Operator::In(values) => values.contains(value),
        Operator::NotIn(values) => !values.contains(value),
        Operator::Exists => true,
        Operator::DoesNotExist => false,
    }
}

/// Splits the sources off the keys.
fn requirements(
    reader: &mut Reader,
    written: Vec<Written>,
    peer: bool,
) -> Vec<(Requirement, String)> {
    written
        .into_iter()
        .filter_map(|Written { key, operator, path }| {
            let (source, key) = key.split_once(':').unwrap_or((SOURCE_ANY, &key));
            if ![SOURCE_K8S, SOURCE_ANY, SOURCE_RESERVED].contains(&source) {
                let message = format!("labels of the source `{source}` are not supported");
                reader.problem(path, message, "write k8s:, any:, reserved: or no source at all");
                return None;
            }
            if peer && source != SOURCE_RESERVED && !is_relevant(key) {
                reader.problem(path, irrelevant(key), IRRELEVANT_SUGGESTION);
                return None;
            }
            Some((Requirement { key: Key::new(source, key), operator }, path))
        })
        .collect()
}

/// A selector of peers, kept to the policy's namespace and cluster unless it names others.
fn peer_selector(
    reader: &mut Reader,
    value: &Value,
    path: &str,
    context: &Context<'_>,
) -> Option<Selector> {
    let before = reader.problems.len();
    let written = reader.label_selector(value, path);
    let found = requirements(reader, written, true);
    if reader.problems.len() > before {
        return None;
    }
    let positive = |operator: &Operator| matches!(operator, Operator::In(_) | Operator::Exists);
    let mut requirements: Vec<Requirement> = found.into_iter().map(|(one, _)| one).collect();
    let reserved: Vec<bool> = requirements
        .iter()
        .filter(|one| one.key.source == SOURCE_RESERVED)
        .map(|one| positive(&one.operator))
        .collect();
    if reserved.contains(&true) {
        return Some(Selector::new(requirements));
    }
    if !reserved.is_empty() {
        let message = "\"not this reserved peer\" would be nearly everybody";
        reader.problem(path, message, "name the peers that you mean, or their entities");
        return None;
    }
    let namespace = || Key::new(SOURCE_K8S, POD_NAMESPACE);
    let names_namespace = requirements
        .iter()
        .any(|one| is_namespace(&one.key) || one.key.key.starts_with(NAMESPACE_LABELS));
    let names_cluster = requirements.iter().any(|one| one.key.key == CLUSTER);
    match &context.id.namespace {
        Some(name) if !names_namespace => {
            requirements.push(Requirement::equals(namespace(), name));
        }
        None if context.init => {}
        // Else "not in that namespace" would be met by whatever is not a pod.
        _ => requirements.push(Requirement::exists(namespace())),
    }
    if !names_cluster {
        let cluster = Key::new(SOURCE_K8S, CLUSTER);
        requirements.push(Requirement::equals(cluster, context.cluster));
    }
    Some(Selector::new(requirements))
}

/// Fields of an entry, in the order in which they are read.
fn members(list: List) -> &'static [&'static str] {
    match (list.direction, list.action) {
        (Direction::Ingress, _) => {
            &["fromEndpoints", "fromCIDR", "fromCIDRSet", "fromEntities", "fromNodes", "fromGroups"]
        }
        (Direction::Egress, Action::Deny) => &[
            "toEndpoints",
            "toCIDR",
            "toCIDRSet",
            "toEntities",
            "toNodes",
            "toGroups",
            "toServices",
        ],
        (Direction::Egress, Action::Allow) => &[
            "toEndpoints",
            "toCIDR",
            "toCIDRSet",
            "toEntities",
            "toNodes",
            "toGroups",
            "toServices",
            "toFQDNs",
        ],
    }
}

fn entry(
    reader: &mut Reader,
    value: &Value,
    path: String,
    list: List,
    context: &Context<'_>,
) -> Vec<Entry> {
    entries(reader, value, path, list, context).unwrap_or_default()
}

/// Ports of an entry that ask the same of what is inside.
struct PortGroup {
    ports: Ports,
    application: Application,
    path: String,
}

/// One for the ports that ask nothing, and one for each item of `toPorts` that does.
fn entries(
    reader: &mut Reader,
    value: &Value,
    path: String,
    list: List,
    context: &Context<'_>,
) -> Option<Vec<Entry>> {
    let members = members(list);
    let requires = match list.direction {
        Direction::Ingress => "fromRequires",
        Direction::Egress => "toRequires",
    };
    let mut known = members.to_vec();
    known.extend([requires, "toPorts", "icmps"]);
    if list.action == Action::Allow {
        known.push("authentication");
    }
    let map = reader.object(value, &path, &known)?;
    if reader.list(map, requires, &path).is_some_and(|items| !items.is_empty()) {
        let suggestion = "write the requirement into every selector of the rule";
        reader.problem(format!("{path}.{requires}"), "was removed from this API", suggestion);
    }
    if let Some(authentication) = present(map, "authentication")
        && authentication.get("mode").and_then(Value::as_str) != Some("disabled")
    {
        let message = "authentication of peers is not supported";
        reader.problem(format!("{path}.authentication"), message, "leave it out");
    }
    let written: Vec<&str> =
        members.iter().copied().filter(|member| present(map, member).is_some()).collect();
    if let [first, second, ..] = written[..] {
        let message = format!("`{first}` and `{second}` cannot be in one rule");
        reader.problem(&path, message, "make two rules of it");
        return None;
    }
    let groups = ports(reader, map, &path, list, context)?;
    let peers = match written.first() {
        // Without a word on peers, ports are open for everybody; without ports too, for nobody.
        None if groups.iter().any(|group| group.ports == Ports::Any) => Peers::NOBODY,
        None => Peers::Any,
        Some(member) => peers(reader, map, member, &path, context),
    };
    let entry = |PortGroup { ports, application, path }| Entry {
        action: list.action,
        peers: peers.clone(),
        ports,
        application,
        path,
    };
    Some(groups.into_iter().map(entry).collect())
}

fn peers(
    reader: &mut Reader,
    map: &Map<String, Value>,
    member: &'static str,
    path: &str,
    context: &Context<'_>,
) -> Peers {
    let items = reader.list(map, member, path).unwrap_or_default();
    let kind = member.trim_start_matches("from").trim_start_matches("to");
    let mut found = Vec::new();
    for (item, path) in items {
        match kind {
            "Endpoints" => {
                found.extend(peer_selector(reader, item, &path, context).map(Peer::Selector));
            }
            "CIDR" => found.extend(
                reader
                    .net(item, &path)
                    .map(|net| Peer::Cidr(Cidr { net, except: Vec::new(), matches_pods: false })),
            ),
            "CIDRSet" => found.extend(cidr_set(reader, item, &path).map(Peer::Cidr)),
            "FQDNs" => found.extend(fqdn(reader, item, &path).map(Peer::Fqdn)),
            "Entities" => match reader.word(item, &path, &ENTITIES) {
                Some("all") => return Peers::Any,
                Some(word) => found.push(Peer::Entity(entity(word, context.cluster))),
                None => {}
            },
            _ => {
                let suggestion = match kind {
                    "Nodes" => "use the entities `host` and `remote-node`",
                    "Services" => "select the pods behind the service with toEndpoints",
                    _ => "use CIDRs",
                };
                reader.problem(path, "is not supported", suggestion);
                break;
            }
        }
    }
    Peers::List(found)
}

fn entity(word: &str, cluster: &str) -> Entity {
    match word {
        "world" => Entity::World,
        "cluster" => Entity::Cluster(cluster.to_owned()),
        "host" => Entity::Host,
        "init" => Entity::Init,
        "ingress" => Entity::Ingress,
        "unmanaged" => Entity::Unmanaged,
        "remote-node" => Entity::RemoteNode,
        "health" => Entity::Health,
        "kube-apiserver" => Entity::KubeApiserver,
        _ => Entity::None,
    }
}

fn cidr_set(reader: &mut Reader, value: &Value, path: &str) -> Option<Cidr> {
    let known = ["cidr", "cidrGroupRef", "cidrGroupSelector", "except"];
    let map = reader.object(value, path, &known)?;
    for group in ["cidrGroupRef", "cidrGroupSelector"] {
        if present(map, group).is_some() {
            let message = "groups of CIDRs are not supported";
            reader.problem(format!("{path}.{group}"), message, "write the networks as `cidr`");
            return None;
        }
    }
    reader.cidr(map, path, false)
}

/// The ports of an entry; `None` if they cannot be read.
fn ports(
    reader: &mut Reader,
    map: &Map<String, Value>,
    path: &str,
    list: List,
    context: &Context<'_>,
) -> Option<Vec<PortGroup>> {
    let to_ports = reader.list(map, "toPorts", path).unwrap_or_default();
    let icmps = reader.list(map, "icmps", path).unwrap_or_default();
    if !to_ports.is_empty() && !icmps.is_empty() {
        reader.problem(path, "`toPorts` and `icmps` cannot be in one rule", "make two rules of it");
        return None;
    }
    let plain = |ports| PortGroup { ports, application: Application::Any, path: path.to_owned() };
    if to_ports.is_empty() && icmps.is_empty() {
        return Some(vec![plain(Ports::Any)]);
    }
    let mut open = Vec::new();
    let mut groups = Vec::new();
    for (item, path) in to_ports {
        let Some((ports, application, path)) = port_rule(reader, item, &path, list, context) else {
            continue;
        };
        match application {
            Application::Any => open.extend(ports),
            _ => groups.push(PortGroup { ports: Ports::List(ports), application, path }),
        }
    }
    for (item, path) in icmps {
        let Some(map) = reader.object(item, &path, &["fields"]) else { continue };
        let fields = reader.list(map, "fields", &path).unwrap_or_default();
        reader.at_most(&fields, &format!("{path}.fields"), MOST_PORTS);
        for (item, path) in fields {
            open.extend(icmp(reader, item, &path));
        }
    }
    if !open.is_empty() || groups.is_empty() {
        groups.push(plain(Ports::List(open)));
    }
    Some(groups)
}

/// The ports of an item, what it asks of the traffic inside, and where it says so.
fn port_rule(
    reader: &mut Reader,
    value: &Value,
    path: &str,
    list: List,
    context: &Context<'_>,
) -> Option<(Vec<PortMatch>, Application, String)> {
    let mut known = vec!["ports"];
    known.extend(application::FIELDS);
    let map = reader.object(value, path, &known)?;
    let ports = reader.list(map, "ports", path).unwrap_or_default();
    reader.at_most(&ports, &format!("{path}.ports"), MOST_PORTS);
    if ports.is_empty() && list.action == Action::Deny {
        let suggestion = "name the ports, or leave out `toPorts` to deny them all";
        reader.problem(format!("{path}.ports"), "a deny without ports denies nothing", suggestion);
    }
    let mut found = Vec::new();
    for (item, path) in ports {
        port(reader, item, &path, &mut found);
    }
    let (application, path) =
        application::application(reader, map, path, list, context, &mut found);
    Some((found, application, path))
}

fn port(reader: &mut Reader, value: &Value, path: &str, found: &mut Vec<PortMatch>) {
    let Some(map) = reader.object(value, path, &["port", "endPort", "protocol"]) else { return };
    let known = ["TCP", "UDP", "SCTP", "ANY", "VRRP", "IGMP"];
    let protocols: &[u8] = match present(map, "protocol") {
        None => &[protocol::TCP, protocol::UDP, protocol::SCTP],
        Some(value) => match reader.word(value, &format!("{path}.protocol"), &known) {
            Some("ANY") => &[protocol::TCP, protocol::UDP, protocol::SCTP],
            Some("TCP") => &[protocol::TCP],
            Some("UDP") => &[protocol::UDP],
            Some("SCTP") => &[protocol::SCTP],
            Some(other) => {
                let message = format!("{other} is not supported");
                reader.problem(format!("{path}.protocol"), message, "write TCP, UDP, SCTP or ANY");
                return;
            }
            None => return,
        },
    };
    let Some(spec) = port_spec(reader, map, path) else { return };
    found.extend(protocols.iter().map(|&protocol| PortMatch { protocol, port: spec.clone() }));
}

fn port_spec(reader: &mut Reader, map: &Map<String, Value>, path: &str) -> Option<PortSpec> {
    let port_path = format!("{path}.port");
    let text = match present(map, "port") {
        None => {
            reader.problem(port_path, "is missing", "write \"0\" for all ports of the protocol");
            return None;
        }
        Some(Value::Number(number)) => {
            reader.problem(port_path, "must be a string", format!("write \"{number}\""));
            return None;
        }
        Some(value) => reader.text(value, &port_path)?,
    };
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return reader.port_name(&text.to_lowercase(), &port_path);
    }
    let Ok(first) = text.parse::<u16>() else {
        reader.problem(port_path, format!("`{text}` is not a number from 0 to 65535"), "");
        return None;
    };
    let end_path = format!("{path}.endPort");
    let last = match present(map, "endPort") {
        Some(end) => reader.number(end, &end_path, 0)?,
        None => 0,
    };
    match (first, last) {
        (0, 0) => Some(PortSpec::All),
        (0, _) => {
            let message = "port 0 stands for all ports and starts no range";
            reader.problem(port_path, message, "write \"1\"");
            None
        }
        (first, last) => Some(PortSpec::Range(first, last.max(first))),
    }
}

fn icmp(reader: &mut Reader, value: &Value, path: &str) -> Option<PortMatch> {
    let map = reader.object(value, path, &["family", "type"])?;
    let family = match present(map, "family") {
        None => "IPv4",
        Some(value) => reader.word(value, &format!("{path}.family"), &["IPv4", "IPv6"])?,
    };
    let (protocol, names): (u8, &[(&'static str, u8)]) = match family {
        "IPv4" => (protocol::ICMP, &ICMPV4),
        _ => (protocol::ICMPV6, &ICMPV6),
    };
    let path = format!("{path}.type");
    let found = match present(map, "type") {
        None => {
            reader.problem(path, "is missing", "write a type such as EchoRequest");
            return None;
        }
        Some(Value::String(text)) => match text.parse::<u8>() {
            Ok(number) => Some(number),
            Err(_) => {
                let words: Vec<&'static str> = names.iter().map(|(name, _)| *name).collect();
                let word = reader.word(&Value::from(text.as_str()), &path, &words)?;
                names.iter().find(|(name, _)| *name == word).map(|(_, number)| *number)
            }
        },
        Some(value) => {
            let number = value.as_u64().and_then(|number| u8::try_from(number).ok());
            if number.is_none() {
                reader.problem(path, format!("`{value}` is not a number from 0 to 255"), "");
            }
            number
        }
    };
    let number = u16::from(found?);
    Some(PortMatch { protocol, port: PortSpec::Range(number, number) })
}

const ICMPV4: [(&str, u8); 14] = [
    ("EchoReply", 0),
    ("DestinationUnreachable", 3),
    ("Redirect", 5),
    ("Echo", 8),
    ("EchoRequest", 8),
    ("RouterAdvertisement", 9),
    ("RouterSelection", 10),
    ("TimeExceeded", 11),
    ("ParameterProblem", 12),
    ("Timestamp", 13),
    ("TimestampReply", 14),
    ("Photuris", 40),
    ("ExtendedEchoRequest", 42),
    ("ExtendedEchoReply", 43),
];

const ICMPV6: [(&str, u8); 27] = [
    ("DestinationUnreachable", 1),
    ("PacketTooBig", 2),
    ("TimeExceeded", 3),
    ("ParameterProblem", 4),
    ("EchoRequest", 128),
    ("EchoReply", 129),
    ("MulticastListenerQuery", 130),
    ("MulticastListenerReport", 131),
    ("MulticastListenerDone", 132),
    ("RouterSolicitation", 133),
    ("RouterAdvertisement", 134),
    ("NeighborSolicitation", 135),
    ("NeighborAdvertisement", 136),
    ("RedirectMessage", 137),
    ("RouterRenumbering", 138),
    ("ICMPNodeInformationQuery", 139),
    ("ICMPNodeInformationResponse", 140),
    ("InverseNeighborDiscoverySolicitation", 141),
    ("InverseNeighborDiscoveryAdvertisement", 142),
    ("HomeAgentAddressDiscoveryRequest", 144),
    ("HomeAgentAddressDiscoveryReply", 145),
    ("MobilePrefixSolicitation", 146),
    ("MobilePrefixAdvertisement", 147),
    ("DuplicateAddressRequestCodeSuffix", 157),
    ("DuplicateAddressConfirmationCodeSuffix", 158),
    ("ExtendedEchoRequest", 160),
    ("ExtendedEchoReply", 161),
];
