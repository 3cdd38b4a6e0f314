//! What `kubectl get` shows.

use serde_json::{Map, Value, json};

use super::registry::Resource;
use super::scale::selector_text;

struct Column {
    name: &'static str,
    kind: &'static str,
    /// Shown with `-o wide` only.
    wide: bool,
    cell: fn(&Value) -> Value,
}

const fn column(name: &'static str, cell: fn(&Value) -> Value) -> Column {
    Column { name, kind: "string", wide: false, cell }
}

const fn number(name: &'static str, cell: fn(&Value) -> Value) -> Column {
    Column { name, kind: "integer", wide: false, cell }
}

const fn wide(name: &'static str, cell: fn(&Value) -> Value) -> Column {
    Column { name, kind: "string", wide: true, cell }
}

/// Only `metadata`.
pub(super) fn partial(object: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
           "metadata": object["metadata"]})
}

/// A table of objects. `include`: what of the objects goes along (`None`, `Metadata`, `Object`).
pub(super) fn of(
    resource: &Resource,
    objects: &[&Value],
    metadata: Value,
    include: Option<&str>,
) -> Value {
    let rows: Vec<Value> = objects
        .iter()
        .map(|object| {
            let mut row = json!({"cells": cells(resource, object)});
            match include {
                Some("None") => {}
                Some("Object") => row["object"] = (*object).clone(),
                _ => row["object"] = partial(object),
            }
            row
        })
        .collect();
    json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
           "columnDefinitions": definitions(resource), "rows": rows})
}

fn definitions(resource: &Resource) -> Vec<Value> {
    let definition = |name: &str, kind: &str, format: &str, wide: i64, description: &str| {
        json!({"name": name, "type": kind, "format": format, "description": description,
               "priority": wide})
    };
    let name = |wide| definition("Name", "string", "name", wide, "Name of the object.");
    // Names of events say nothing to people.
    let named_last = resource.builtin_key() == "/events";
    let mut list = if named_last { Vec::new() } else { vec![name(0)] };
    match &resource.custom {
        None => list.extend(
            columns(resource.builtin_key())
                .iter()
                .map(|column| definition(column.name, column.kind, "", column.wide.into(), "")),
        ),
        Some(custom) if custom.columns.is_empty() => {
            list.push(definition("Age", "date", "", 0, "Age of the object."));
        }
        Some(custom) => list.extend(custom.columns.iter().map(|column| {
            let text = |field: &str| column[field].as_str().unwrap_or("").to_owned();
            let priority = column["priority"].as_i64().unwrap_or(0);
            definition(
                &text("name"),
                &text("type"),
                &text("format"),
                priority,
                &text("description"),
            )
        })),
    }
    if named_last {
        list.push(name(1));
    }
    list
}

fn cells(resource: &Resource, object: &Value) -> Vec<Value> {
    let mut cells = vec![object["metadata"]["name"].clone()];
    match &resource.custom {
        None => {
            cells
                .extend(columns(resource.builtin_key()).iter().map(|column| (column.cell)(object)));
            if resource.builtin_key() == "/events" {
                cells.rotate_left(1);
            }
        }
        Some(custom) if custom.columns.is_empty() => cells.push(age(object)),
        Some(custom) => {
            cells.extend(custom.columns.iter().map(|column| custom_cell(column, object)))
        }
    }
    cells
}

fn custom_cell(column: &Value, object: &Value) -> Value {
    let found = json_path(object, column["jsonPath"].as_str().unwrap_or(""));
    if column["type"] == "date" {
        return match found.first().and_then(|value| value.as_str()) {
            Some(time) => since(time).into(),
            None => "<unknown>".into(),
        };
    }
    match (found.as_slice(), column["type"].as_str()) {
        ([], _) => Value::Null,
        ([one], Some("string")) => match one {
            Value::String(_) => (*one).clone(),
            other => other.to_string().into(),
        },
        ([one], _) => (*one).clone(),
        (many, _) => {
            let texts: Vec<String> = many
                .iter()
                .map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned))
                .collect();
            texts.join(",").into()
        }
    }
}

/// Kubernetes' JSON path: `.a.b`, `.a\.b`, `['a.b']`, `[0]`, `[*]`, `[?(@.type=="Ready")]`.
fn json_path<'a>(object: &'a Value, path: &str) -> Vec<&'a Value> {
    let mut found = vec![object];
    let mut rest =
        path.trim().trim_start_matches('{').trim_end_matches('}').trim_start_matches('$');
    while !rest.is_empty() {
        if let Some(inner) = rest.strip_prefix('[') {
            let filter = inner.starts_with('?');
            let Some((index, after)) = inner.split_once(if filter { ")]" } else { "]" }) else {
                return Vec::new();
            };
            rest = after;
            found = found.into_iter().flat_map(|value| pick(value, index)).collect();
        } else {
            let start = rest.trim_start_matches('.');
            let is_end = |(at, _): &(usize, &str)| !start[..*at].ends_with('\\');
            let end = start.match_indices(['.', '[']).find(is_end).map_or(start.len(), |end| end.0);
            let name = start[..end].replace("\\.", ".");
            rest = &start[end..];
            found = found
                .into_iter()
                .flat_map(|value| match (name.as_str(), value) {
                    ("*", Value::Object(fields)) => fields.values().collect(),
                    ("*", Value::Array(items)) => items.iter().collect(),
                    _ => value.get(&name).into_iter().collect::<Vec<_>>(),
                })
                .collect();
            if name.is_empty() && !rest.starts_with('[') {
                break;
            }
        }
    }
    found.retain(|value| !value.is_null());
    found
}

fn pick<'a>(value: &'a Value, index: &str) -> Vec<&'a Value> {
    if let Some(name) = index.strip_prefix('\'').and_then(|name| name.strip_suffix('\'')) {
        return value.get(name).into_iter().collect();
    }
    let Some(items) = value.as_array() else { return Vec::new() };
    if index == "*" {
        return items.iter().collect();
    }
    if let Some(condition) = index.strip_prefix("?(@.") {
        let Some((field, wanted)) = condition.split_once("==") else { return Vec::new() };
        let wanted = wanted.trim().trim_matches(['"', '\'']);
        let matches = |item: &&Value| item[field.trim()].as_str() == Some(wanted);
        return items.iter().filter(matches).collect();
    }
    index.parse::<usize>().ok().and_then(|index| items.get(index)).into_iter().collect()
}

fn columns(kind: &str) -> Vec<Column> {
    const AGE: Column = column("Age", age);
    const CONTAINERS: Column = wide("Containers", |o| containers(o, "name"));
    const IMAGES: Column = wide("Images", |o| containers(o, "image"));
    const SELECTOR: Column = wide("Selector", |o| or_none(selector_text(&o["spec"]["selector"])));
    match kind {
        "/pods" => vec![
            column("Ready", pod_ready),
            column("Status", pod_status),
            column("Restarts", pod_restarts),
            AGE,
            wide("IP", |o| text_or_none(&o["status"]["podIP"])),
            wide("Node", |o| text_or_none(&o["spec"]["nodeName"])),
            wide("Nominated Node", |o| text_or_none(&o["status"]["nominatedNodeName"])),
            wide("Readiness Gates", |_| "<none>".into()),
        ],
        "/services" => vec![
            column("Type", |o| o["spec"]["type"].clone()),
            column("Cluster-IP", |o| text_or_none(&o["spec"]["clusterIP"])),
            column("External-IP", external_ip),
            column("Port(s)", service_ports),
            AGE,
            wide("Selector", |o| or_none(pairs(&o["spec"]["selector"]))),
        ],
        "/namespaces" => vec![column("Status", |o| o["status"]["phase"].clone()), AGE],
        "/nodes" => vec![
            column("Status", node_status),
            column("Roles", node_roles),
            AGE,
            column("Version", |o| o["status"]["nodeInfo"]["kubeletVersion"].clone()),
            wide("Internal-IP", |o| node_address(o, "InternalIP")),
            wide("External-IP", |o| node_address(o, "ExternalIP")),
            wide("OS-Image", |o| text_or_unknown(&o["status"]["nodeInfo"]["osImage"])),
            wide("Kernel-Version", |o| text_or_unknown(&o["status"]["nodeInfo"]["kernelVersion"])),
            wide("Container-Runtime", |o| {
                text_or_unknown(&o["status"]["nodeInfo"]["containerRuntimeVersion"])
            }),
        ],
        "/configmaps" => {
            vec![number("Data", |o| (size(&o["data"]) + size(&o["binaryData"])).into()), AGE]
        }
        "/secrets" => vec![
            column("Type", |o| o["type"].clone()),
            number("Data", |o| size(&o["data"]).into()),
            AGE,
        ],
        "/serviceaccounts" => vec![AGE],
        "/endpoints" => vec![column("Endpoints", endpoints), AGE],
        "/events" => vec![
            column("Last Seen", last_seen),
            column("Type", |o| o["type"].clone()),
            column("Reason", |o| o["reason"].clone()),
            column("Object", event_object),
            wide("Subobject", |o| text_or_empty(&event_subject(o)["fieldPath"])),
            wide("Source", |o| {
                text_or_empty(first(&[
                    &o["source"]["component"],
                    &o["reportingComponent"],
                    &o["reportingController"],
                ]))
            }),
            column("Message", |o| first(&[&o["message"], &o["note"]]).clone()),
        ],
        "apps/deployments" => vec![
            column("Ready", |o| fraction(o, "readyReplicas")),
            number("Up-to-date", |o| count(&o["status"]["updatedReplicas"])),
            number("Available", |o| count(&o["status"]["availableReplicas"])),
            AGE,
            CONTAINERS,
            IMAGES,
            SELECTOR,
        ],
        "apps/replicasets" => vec![
            number("Desired", |o| count(&o["spec"]["replicas"])),
            number("Current", |o| count(&o["status"]["replicas"])),
            number("Ready", |o| count(&o["status"]["readyReplicas"])),
            AGE,
            CONTAINERS,
            IMAGES,
            SELECTOR,
        ],
        "apps/statefulsets" => {
            vec![column("Ready", |o| fraction(o, "readyReplicas")), AGE, CONTAINERS, IMAGES]
        }
        "apps/daemonsets" => vec![
            number("Desired", |o| count(&o["status"]["desiredNumberScheduled"])),
            number("Current", |o| count(&o["status"]["currentNumberScheduled"])),
            number("Ready", |o| count(&o["status"]["numberReady"])),
            number("Up-to-date", |o| count(&o["status"]["updatedNumberScheduled"])),
            number("Available", |o| count(&o["status"]["numberAvailable"])),
            column("Node Selector", |o| {
                or_none(pairs(&o["spec"]["template"]["spec"]["nodeSelector"]))
            }),
            AGE,
            CONTAINERS,
            IMAGES,
            SELECTOR,
        ],
        "discovery.k8s.io/endpointslices" => vec![
            column("AddressType", |o| o["addressType"].clone()),
            column("Ports", |o| joined(&o["ports"], |port| port["port"].to_string(), "<unset>")),
            column("Endpoints", |o| {
                joined(
                    &o["endpoints"],
                    |end| end["addresses"][0].as_str().unwrap_or("").to_owned(),
                    "<unset>",
                )
            }),
            AGE,
        ],
        "networking.k8s.io/networkpolicies" => {
            vec![column("Pod-Selector", |o| or_none(selector_text(&o["spec"]["podSelector"]))), AGE]
        }
        "coordination.k8s.io/leases" => {
            vec![column("Holder", |o| text_or_empty(&o["spec"]["holderIdentity"])), AGE]
        }
        "apiextensions.k8s.io/customresourcedefinitions" => {
            vec![column("Created At", |o| o["metadata"]["creationTimestamp"].clone())]
        }
        "rbac.authorization.k8s.io/roles" | "rbac.authorization.k8s.io/clusterroles" => {
            vec![column("Created At", |o| o["metadata"]["creationTimestamp"].clone())]
        }
        "rbac.authorization.k8s.io/rolebindings"
        | "rbac.authorization.k8s.io/clusterrolebindings" => vec![
            column("Role", |o| {
                let text = |field: &str| o["roleRef"][field].as_str().unwrap_or("").to_owned();
                format!("{}/{}", text("kind"), text("name")).into()
            }),
            AGE,
        ],
        _ => vec![AGE],
    }
}

fn age(object: &Value) -> Value {
    match object["metadata"]["creationTimestamp"].as_str() {
        Some(time) => since(time).into(),
        None => "<unknown>".into(),
    }
}

/// Time since, as Kubernetes abbreviates it.
fn since(time: &str) -> String {
    let Ok(time) = time.parse::<jiff::Timestamp>() else { return "<invalid>".to_owned() };
    let seconds = jiff::Timestamp::now().duration_since(time).as_secs();
    human(seconds)
}

fn human(seconds: i64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    let with = |large: i64, unit: char, small: i64, rest: char| {
        if small == 0 { format!("{large}{unit}") } else { format!("{large}{unit}{small}{rest}") }
    };
    match seconds {
        ..-1 => "<invalid>".to_owned(),
        -1..0 => "0s".to_owned(),
        0..120 => format!("{seconds}s"),
        120..600 => with(minutes, 'm', seconds % 60, 's'),
        600..10800 => format!("{minutes}m"),
        10800..28800 => with(hours, 'h', minutes % 60, 'm'),
        28800..172_800 => format!("{hours}h"),
        172_800..691_200 => with(days, 'd', hours % 24, 'h'),
        691_200..63_072_000 => format!("{days}d"),
        63_072_000..252_288_000 => with(days / 365, 'y', days % 365, 'd'),
        _ => format!("{}y", days / 365),
    }
}

fn count(value: &Value) -> Value {
    value.as_i64().unwrap_or(0).into()
}

fn size(value: &Value) -> usize {
    value.as_object().map_or(0, Map::len)
}

fn fraction(object: &Value, ready: &str) -> Value {
    let ready = object["status"][ready].as_i64().unwrap_or(0);
    format!("{ready}/{}", object["spec"]["replicas"].as_i64().unwrap_or(0)).into()
}

fn first<'a>(values: &[&'a Value]) -> &'a Value {
    static NOTHING: Value = Value::Null;
    values
        .iter()
        .find(|value| value.as_str().is_some_and(|text| !text.is_empty()))
        .copied()
        .unwrap_or(&NOTHING)
}

fn or_none(text: String) -> Value {
    if text.is_empty() { "<none>".into() } else { text.into() }
}

fn text_or_none(value: &Value) -> Value {
    or_none(value.as_str().unwrap_or("").to_owned())
}

fn text_or_unknown(value: &Value) -> Value {
    value.as_str().unwrap_or("<unknown>").into()
}

fn text_or_empty(value: &Value) -> Value {
    value.as_str().unwrap_or("").into()
}

fn pairs(map: &Value) -> String {
    let pairs = map.as_object().into_iter().flatten();
    pairs
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or("")))
        .collect::<Vec<_>>()
        .join(",")
}

fn joined(list: &Value, text: impl Fn(&Value) -> String, none: &str) -> Value {
    let all: Vec<String> = list.as_array().into_iter().flatten().map(text).collect();
    match all.len() {
        0 => none.into(),
        1..=3 => all.join(",").into(),
        more => format!("{} + {} more...", all[..3].join(","), more - 3).into(),
    }
}

fn containers(object: &Value, field: &str) -> Value {
    let list = object["spec"]["template"]["spec"]["containers"].as_array();
    let names: Vec<&str> = list.into_iter().flatten().filter_map(|c| c[field].as_str()).collect();
    names.join(",").into()
}

fn statuses<'a>(pod: &'a Value, field: &str) -> impl Iterator<Item = &'a Value> + use<'a> {
    pod["status"][field].as_array().into_iter().flatten()
}

fn pod_ready(pod: &Value) -> Value {
    let ready = statuses(pod, "containerStatuses").filter(|status| status["ready"] == true).count();
    let total = pod["spec"]["containers"].as_array().map_or(0, Vec::len);
    format!("{ready}/{total}").into()
}

fn pod_status(pod: &Value) -> Value {
    if pod["metadata"]["deletionTimestamp"].is_string() {
        return "Terminating".into();
    }
    let mut reason = first(&[&pod["status"]["reason"], &pod["status"]["phase"]]).clone();
    let state = |status: &Value| -> Option<Value> {
        let waiting = &status["state"]["waiting"]["reason"];
        let ended = &status["state"]["terminated"];
        if waiting.is_string() {
            return Some(waiting.clone());
        }
        if ended["reason"].is_string() {
            return Some(ended["reason"].clone());
        }
        ended["exitCode"].as_i64().map(|code| format!("ExitCode:{code}").into())
    };
    for (index, status) in statuses(pod, "initContainerStatuses").enumerate() {
        if status["state"]["terminated"]["exitCode"] == 0 {
            continue;
        }
        let total = pod["spec"]["initContainers"].as_array().map_or(0, Vec::len);
        return match state(status).filter(|reason| reason != "PodInitializing") {
            Some(reason) => format!("Init:{}", reason.as_str().unwrap_or("")).into(),
            None => format!("Init:{index}/{total}").into(),
        };
    }
    let mut running = false;
    for status in statuses(pod, "containerStatuses") {
        match state(status) {
            Some(found) => reason = found,
            None => running |= status["ready"] == true && status["state"]["running"].is_object(),
        }
    }
    if reason == "Completed" && running { "Running".into() } else { reason }
}

fn pod_restarts(pod: &Value) -> Value {
    let restarts: i64 = statuses(pod, "containerStatuses")
        .filter_map(|status| status["restartCount"].as_i64())
        .sum();
    let last = statuses(pod, "containerStatuses")
        .filter_map(|status| status["lastState"]["terminated"]["finishedAt"].as_str())
        .max();
    match last {
        Some(time) if restarts > 0 => format!("{restarts} ({} ago)", since(time)).into(),
        _ => restarts.to_string().into(),
    }
}

fn external_ip(service: &Value) -> Value {
    let spec = &service["spec"];
    if spec["type"] == "ExternalName" {
        return text_or_none(&spec["externalName"]);
    }
    let ingress = service["status"]["loadBalancer"]["ingress"].as_array();
    let listed: Vec<&str> = ingress
        .into_iter()
        .flatten()
        .filter_map(|entry| entry["ip"].as_str())
        .chain(spec["externalIPs"].as_array().into_iter().flatten().filter_map(Value::as_str))
        .collect();
    match (listed.is_empty(), spec["type"] == "LoadBalancer") {
        (false, _) => listed.join(",").into(),
        (true, true) => "<pending>".into(),
        (true, false) => "<none>".into(),
    }
}

fn service_ports(service: &Value) -> Value {
    let ports = service["spec"]["ports"].as_array().into_iter().flatten().map(|port| {
        let protocol = port["protocol"].as_str().unwrap_or("TCP");
        match port["nodePort"].as_i64().filter(|port| *port > 0) {
            Some(node) => format!("{}:{node}/{protocol}", port["port"]),
            None => format!("{}/{protocol}", port["port"]),
        }
    });
    or_none(ports.collect::<Vec<_>>().join(","))
}

fn node_status(node: &Value) -> Value {
    let conditions = node["status"]["conditions"].as_array().into_iter().flatten();
    let ready = conditions.clone().find(|condition| condition["type"] == "Ready");
    let mut text = match ready.map(|condition| condition["status"] == "True") {
        Some(true) => "Ready",
        Some(false) => "NotReady",
        None => "Unknown",
    }
    .to_owned();
    if node["spec"]["unschedulable"] == true {
        text.push_str(",SchedulingDisabled");
    }
    text.into()
}

fn node_roles(node: &Value) -> Value {
    let labels = node["metadata"]["labels"].as_object().into_iter().flatten();
    let roles: Vec<&str> =
        labels.filter_map(|(key, _)| key.strip_prefix("node-role.kubernetes.io/")).collect();
    or_none(roles.join(","))
}

fn node_address(node: &Value, kind: &str) -> Value {
    let addresses = node["status"]["addresses"].as_array().into_iter().flatten();
    let found = addresses.clone().find(|address| address["type"] == kind);
    text_or_none(found.map_or(&Value::Null, |address| &address["address"]))
}

fn endpoints(object: &Value) -> Value {
    let mut all = Vec::new();
    for subset in object["subsets"].as_array().into_iter().flatten() {
        for address in subset["addresses"].as_array().into_iter().flatten() {
            let ip = address["ip"].as_str().unwrap_or("");
            for port in subset["ports"].as_array().into_iter().flatten() {
                all.push(json!(format!("{ip}:{}", port["port"])));
            }
        }
    }
    joined(&all.into(), |text| text.as_str().unwrap_or("").to_owned(), "<none>")
}

fn last_seen(event: &Value) -> Value {
    let time = first(&[
        &event["series"]["lastObservedTime"],
        &event["lastTimestamp"],
        &event["deprecatedLastTimestamp"],
        &event["eventTime"],
        &event["firstTimestamp"],
        &event["metadata"]["creationTimestamp"],
    ]);
    time.as_str().map_or_else(|| "<unknown>".into(), |time| since(time).into())
}

fn event_subject(event: &Value) -> &Value {
    if event["involvedObject"].is_object() { &event["involvedObject"] } else { &event["regarding"] }
}

fn event_object(event: &Value) -> Value {
    let subject = event_subject(event);
    let kind = subject["kind"].as_str().unwrap_or("").to_lowercase();
    format!("{kind}/{}", subject["name"].as_str().unwrap_or("")).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages() {
        assert_eq!(human(5), "5s");
        assert_eq!(human(130), "2m10s");
        assert_eq!(human(3600), "60m");
        assert_eq!(human(4 * 3600 + 60), "4h1m");
        assert_eq!(human(3 * 86400), "3d");
    }

    #[test]
    fn paths() {
        let object = json!({"status": {"conditions": [{"type": "A"}, {"type": "Valid", "status": "True"}]},
            "metadata": {"labels": {"a.b": "c"}}});
        let text = |path| json_path(&object, path).first().and_then(|v| v.as_str()).unwrap_or("");
        assert_eq!(text(".status.conditions[?(@.type=='Valid')].status"), "True");
        assert_eq!(text(".metadata.labels['a.b']"), "c");
        assert_eq!(text(r".metadata.labels.a\.b"), "c");
        assert_eq!(text(".status.conditions[0].type"), "A");
    }
}
