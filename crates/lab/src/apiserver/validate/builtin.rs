//! Rules of the built-in kinds.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::names;
use crate::apiserver::error::Cause;
use crate::apiserver::selector::label_selector_matches;

type Causes = Vec<Cause>;

pub(super) fn check(kind: &str, object: &Value, old: Option<&Value>, causes: &mut Causes) {
    match kind {
        "/pods" => pod(object, old, causes),
        "/services" => service(&object["spec"], causes),
        "/configmaps" => {
            // On no field in particular, which is how a real API server writes that.
            data_size("[]", plain(&object["data"]) + decoded(&object["binaryData"]), causes);
            data(object, old, causes);
        }
        "/secrets" => {
            data_size("data", decoded(&object["data"]), causes);
            data(object, old, causes);
        }
        "networking.k8s.io/networkpolicies" => network_policy(&object["spec"], causes),
        "apps/deployments" | "apps/replicasets" | "apps/statefulsets" | "apps/daemonsets" => {
            workload(kind, &object["spec"], old.map(|old| &old["spec"]), causes);
        }
        "apiextensions.k8s.io/customresourcedefinitions" => crd(object, old, causes),
        _ => {}
    }
}

fn items<'a>(value: &'a Value, field: &str) -> impl Iterator<Item = (usize, &'a Value)> {
    value[field].as_array().into_iter().flatten().enumerate()
}

fn one_of(value: &Value, path: &str, allowed: &[&str], causes: &mut Causes) {
    if !value.is_null() && !allowed.iter().any(|known| value == known) {
        causes.push(Cause::not_supported(path, value, allowed));
    }
}

fn pod(object: &Value, old: Option<&Value>, causes: &mut Causes) {
    pod_spec(&object["spec"], "spec", causes);
    let Some(old) = old else { return };
    // A pod's containers and place are what it is; only images and tolerations may change.
    let essence = |object: &Value| {
        let mut spec = object["spec"].clone();
        for field in ["containers", "initContainers"] {
            for container in spec[field].as_array_mut().into_iter().flatten() {
                container["image"] = Value::Null;
                container["resources"] = Value::Null;
            }
        }
        for field in [
            "tolerations",
            "activeDeadlineSeconds",
            "terminationGracePeriodSeconds",
            "schedulingGates",
            "ephemeralContainers",
        ] {
            spec[field] = Value::Null;
        }
        if object["spec"]["initContainers"].is_null() {
            spec["initContainers"] = Value::Null;
        }
        spec
    };
    if essence(object) != essence(old) {
        let hint = "pod updates may not change fields other than `spec.containers[*].image`,\
            `spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only \
            additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to \
            be set to 1 if it was previously negative)";
        causes.push(Cause::forbidden("spec", hint));
    }
}

fn pod_spec(spec: &Value, path: &str, causes: &mut Causes) {
    if items(spec, "containers").next().is_none() {
        causes.push(Cause::required(format!("{path}.containers"), ""));
    }
    let mut seen = Vec::new();
    for field in ["containers", "initContainers"] {
        for (index, container) in items(spec, field) {
            let path = format!("{path}.{field}[{index}]");
            one_container(container, &path, &mut seen, causes);
        }
    }
    let volumes: Vec<&Value> = items(spec, "volumes").map(|(_, volume)| &volume["name"]).collect();
    for (index, container) in items(spec, "containers") {
        for (mount_index, mount) in items(container, "volumeMounts") {
            if !volumes.contains(&&mount["name"]) {
                let path = format!("{path}.containers[{index}].volumeMounts[{mount_index}].name");
                let message = format!("Not found: {}", mount["name"]);
                causes.push(Cause { reason: "FieldValueNotFound", field: path, message });
            }
        }
    }
    one_of(
        &spec["restartPolicy"],
        &format!("{path}.restartPolicy"),
        &["Always", "Never", "OnFailure"],
        causes,
    );
    one_of(
        &spec["dnsPolicy"],
        &format!("{path}.dnsPolicy"),
        &["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"],
        causes,
    );
}

fn one_container(container: &Value, path: &str, seen: &mut Vec<String>, causes: &mut Causes) {
    match container["name"].as_str().filter(|name| !name.is_empty()) {
        None => causes.push(Cause::required(format!("{path}.name"), "")),
        Some(name) => {
            if let Some(hint) = names::wrong_label(name) {
                causes.push(Cause::invalid(format!("{path}.name"), &name.into(), &hint));
            }
            if seen.iter().any(|known| known == name) {
                causes.push(Cause::duplicate(format!("{path}.name"), &name.into()));
            }
            seen.push(name.to_owned());
        }
    }
    if container["image"].as_str().is_none_or(str::is_empty) {
        causes.push(Cause::required(format!("{path}.image"), ""));
    }
    one_of(
        &container["imagePullPolicy"],
        &format!("{path}.imagePullPolicy"),
        &["Always", "IfNotPresent", "Never"],
        causes,
    );
    for (index, port) in items(container, "ports") {
        let path = format!("{path}.ports[{index}]");
        if port["containerPort"].is_null() {
            causes.push(Cause::required(format!("{path}.containerPort"), ""));
        } else {
            number(&port["containerPort"], &format!("{path}.containerPort"), causes);
        }
        protocol(&port["protocol"], &format!("{path}.protocol"), causes);
    }
    for (index, variable) in items(container, "env") {
        if variable["name"].as_str().is_none_or(str::is_empty) {
            causes.push(Cause::required(format!("{path}.env[{index}].name"), ""));
        }
    }
}

fn number(port: &Value, path: &str, causes: &mut Causes) {
    if !port.as_i64().is_some_and(|port| (1..=65535).contains(&port)) {
        causes.push(Cause::invalid(path, port, "must be between 1 and 65535, inclusive"));
    }
}

fn named_or_number(port: &Value, path: &str, causes: &mut Causes) {
    let Some(name) = port.as_str() else { return number(port, path, causes) };
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty()
        || name.len() > 15
        || !name.chars().all(good)
        || !name.contains(|c: char| c.is_ascii_lowercase())
        || name.starts_with('-')
        || name.ends_with('-')
        || name.contains("--")
    {
        let hint = "must be a port name: at most 15 lower case letters, digits and single '-', \
                    with at least one letter";
        causes.push(Cause::invalid(path, port, hint));
    }
}

fn protocol(value: &Value, path: &str, causes: &mut Causes) {
    one_of(value, path, &["SCTP", "TCP", "UDP"], causes);
}

fn service(spec: &Value, causes: &mut Causes) {
    one_of(
        &spec["type"],
        "spec.type",
        &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"],
        causes,
    );
    one_of(&spec["sessionAffinity"], "spec.sessionAffinity", &["ClientIP", "None"], causes);
    one_of(
        &spec["ipFamilyPolicy"],
        "spec.ipFamilyPolicy",
        &["SingleStack", "PreferDualStack", "RequireDualStack"],
        causes,
    );
    let ports: Vec<(usize, &Value)> = items(spec, "ports").collect();
    if ports.is_empty() && spec["clusterIP"] != "None" && spec["type"] != "ExternalName" {
        causes.push(Cause::required("spec.ports", ""));
    }
    if spec["type"] == "ExternalName" && spec["externalName"].as_str().is_none_or(str::is_empty) {
        causes.push(Cause::required("spec.externalName", ""));
    }
    let mut names_seen = Vec::new();
    let mut ports_seen = Vec::new();
    for (index, port) in &ports {
        let path = format!("spec.ports[{index}]");
        match port["name"].as_str().filter(|name| !name.is_empty()) {
            None if ports.len() > 1 => causes.push(Cause::required(format!("{path}.name"), "")),
            None => {}
            Some(name) => {
                if let Some(hint) = names::wrong_label(name) {
                    causes.push(Cause::invalid(format!("{path}.name"), &name.into(), &hint));
                }
                if names_seen.contains(&name) {
                    causes.push(Cause::duplicate(format!("{path}.name"), &name.into()));
                }
                names_seen.push(name);
            }
        }
        number(&port["port"], &format!("{path}.port"), causes);
        if !port["targetPort"].is_null() {
            named_or_number(&port["targetPort"], &format!("{path}.targetPort"), causes);
        }
        protocol(&port["protocol"], &format!("{path}.protocol"), causes);
        let key = (&port["protocol"], &port["port"]);
        if ports_seen.contains(&key) {
            let value = json!({"protocol": port["protocol"], "port": port["port"]});
            causes.push(Cause::duplicate(path, &value));
        }
        ports_seen.push(key);
    }
    names::labels("spec.selector", spec["selector"].as_object(), causes);
}

/// The values of a ConfigMap or Secret together.
fn data_size(field: &str, bytes: usize, causes: &mut Causes) {
    const LIMIT: usize = 1 << 20;
    if bytes > LIMIT {
        causes.push(Cause::too_long(field, LIMIT));
    }
}

/// Bytes of all texts in an object.
fn plain(texts: &Value) -> usize {
    texts_in(texts).map(str::len).sum()
}

/// The same, where the texts are base64.
fn decoded(texts: &Value) -> usize {
    texts_in(texts).map(|text| text.trim_end_matches('=').len() * 3 / 4).sum()
}

fn texts_in(object: &Value) -> impl Iterator<Item = &str> {
    object.as_object().into_iter().flat_map(|fields| fields.values()).filter_map(Value::as_str)
}

fn data(object: &Value, old: Option<&Value>, causes: &mut Causes) {
    for field in ["data", "binaryData"] {
        for key in object[field].as_object().into_iter().flatten().map(|(key, _)| key) {
            let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            if key.is_empty()
                || key.len() > 253
                || !key.chars().all(good)
                || key == "."
                || key == ".."
            {
                let hint = "a valid config key must consist of alphanumeric characters, '-', '_' \
                            or '.'";
                causes.push(Cause::invalid(format!("{field}[{key}]"), &key.as_str().into(), hint));
            }
        }
    }
    let Some(old) = old.filter(|old| old["immutable"] == true) else { return };
    if object["data"] != old["data"] || object["immutable"] != true {
        causes.push(Cause::forbidden("data", "field is immutable when `immutable` is set"));
    }
}

fn selector(value: &Value, path: &str, causes: &mut Causes) {
    names::labels(&format!("{path}.matchLabels"), value["matchLabels"].as_object(), causes);
    for (index, expression) in items(value, "matchExpressions") {
        let path = format!("{path}.matchExpressions[{index}]");
        let key = expression["key"].as_str().unwrap_or("");
        if let Some(hint) = names::wrong_label_key(key) {
            causes.push(Cause::invalid(format!("{path}.key"), &key.into(), &hint));
        }
        let values = expression["values"].as_array().is_some_and(|values| !values.is_empty());
        match expression["operator"].as_str() {
            Some("In" | "NotIn") if !values => causes.push(Cause::required(
                format!("{path}.values"),
                "must be specified when `operator` is 'In' or 'NotIn'",
            )),
            Some("Exists" | "DoesNotExist") if values => causes.push(Cause::forbidden(
                format!("{path}.values"),
                "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
            )),
            Some("In" | "NotIn" | "Exists" | "DoesNotExist") => {}
            _ => causes.push(Cause::invalid(
                format!("{path}.operator"),
                &expression["operator"],
                "not a valid selector operator",
            )),
        }
        for (value_index, value) in items(expression, "values") {
            if let Some(hint) = value.as_str().and_then(names::wrong_label_value) {
                causes.push(Cause::invalid(format!("{path}.values[{value_index}]"), value, &hint));
            }
        }
    }
}

fn network_policy(spec: &Value, causes: &mut Causes) {
    selector(&spec["podSelector"], "spec.podSelector", causes);
    for (field, peers) in [("ingress", "from"), ("egress", "to")] {
        for (index, rule) in items(spec, field) {
            let path = format!("spec.{field}[{index}]");
            for (port_index, port) in items(rule, "ports") {
                policy_port(port, &format!("{path}.ports[{port_index}]"), causes);
            }
            for (peer_index, peer) in items(rule, peers) {
                policy_peer(peer, &format!("{path}.{peers}[{peer_index}]"), causes);
            }
        }
    }
    if spec["policyTypes"].as_array().is_some_and(|types| types.len() > 2) {
        causes.push(Cause::invalid(
            "spec.policyTypes",
            &spec["policyTypes"],
            "may not specify more than two policyTypes",
        ));
    }
    for (index, kind) in items(spec, "policyTypes") {
        one_of(kind, &format!("spec.policyTypes[{index}]"), &["Egress", "Ingress"], causes);
    }
}

fn policy_port(port: &Value, path: &str, causes: &mut Causes) {
    protocol(&port["protocol"], &format!("{path}.protocol"), causes);
    if !port["port"].is_null() {
        named_or_number(&port["port"], &format!("{path}.port"), causes);
    }
    let Some(end) = port["endPort"].as_i64() else { return };
    let path_end = format!("{path}.endPort");
    match port["port"].as_i64() {
        None if port["port"].is_null() => {
            causes
                .push(Cause::required(format!("{path}.port"), "must be specified with `endPort`"));
        }
        None => causes
            .push(Cause::forbidden(path_end, "may not be specified when `port` is non-numeric")),
        Some(first) if end < first => {
            causes.push(Cause::invalid(
                path_end,
                &port["endPort"],
                "must be greater than or equal to `port`",
            ));
        }
        Some(_) => number(&port["endPort"], &path_end, causes),
    }
}

fn policy_peer(peer: &Value, path: &str, causes: &mut Causes) {
    let selects = !peer["podSelector"].is_null() || !peer["namespaceSelector"].is_null();
    let block = &peer["ipBlock"];
    if !selects && block.is_null() {
        causes.push(Cause::required(path, "must specify a peer"));
        return;
    }
    if selects && !block.is_null() {
        causes.push(Cause::forbidden(path, "may not specify both ipBlock and another peer"));
    }
    for field in ["podSelector", "namespaceSelector"] {
        selector(&peer[field], &format!("{path}.{field}"), causes);
    }
    if block.is_null() {
        return;
    }
    let path = format!("{path}.ipBlock");
    let Some(cidr) = block["cidr"].as_str().filter(|cidr| !cidr.is_empty()) else {
        causes.push(Cause::required(format!("{path}.cidr"), ""));
        return;
    };
    let hint = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)";
    let Some(whole) = parse_cidr(cidr) else {
        causes.push(Cause::invalid(format!("{path}.cidr"), &cidr.into(), hint));
        return;
    };
    for (index, except) in items(block, "except") {
        let path = format!("{path}.except[{index}]");
        match except.as_str().and_then(parse_cidr) {
            None => causes.push(Cause::invalid(path, except, hint)),
            Some(part) if !whole.contains(&part) || part.prefix_len() <= whole.prefix_len() => {
                causes.push(Cause::invalid(path, except, "must be a strict subset of `cidr`"));
            }
            Some(_) => {}
        }
    }
}

fn parse_cidr(text: &str) -> Option<ipnet::IpNet> {
    let (address, _) = text.split_once('/')?;
    address.parse::<IpAddr>().ok()?;
    text.parse().ok()
}

fn workload(kind: &str, spec: &Value, old: Option<&Value>, causes: &mut Causes) {
    if spec["replicas"].as_i64().is_some_and(|replicas| replicas < 0) {
        causes.push(Cause::invalid(
            "spec.replicas",
            &spec["replicas"],
            "must be greater than or equal to 0",
        ));
    }
    let wanted = &spec["selector"];
    if wanted.is_null() {
        causes.push(Cause::required("spec.selector", ""));
    } else {
        selector(wanted, "spec.selector", causes);
        let empty = ["matchLabels", "matchExpressions"].iter().all(|field| {
            wanted[*field].as_object().is_none_or(serde_json::Map::is_empty)
                && wanted[*field].as_array().is_none_or(Vec::is_empty)
        });
        if empty {
            causes.push(Cause::invalid("spec.selector", wanted, "empty selector is invalid"));
        } else if !label_selector_matches(wanted, &spec["template"]["metadata"]["labels"]) {
            causes.push(Cause::invalid(
                "spec.template.metadata.labels",
                &spec["template"]["metadata"]["labels"],
                "`selector` does not match template `labels`",
            ));
        }
    }
    names::labels(
        "spec.template.metadata.labels",
        spec["template"]["metadata"]["labels"].as_object(),
        causes,
    );
    pod_spec(&spec["template"]["spec"], "spec.template.spec", causes);
    let policy = &spec["template"]["spec"]["restartPolicy"];
    if policy != "Always" {
        causes.push(Cause::not_supported("spec.template.spec.restartPolicy", policy, &["Always"]));
    }
    let Some(old) = old else { return };
    if old["selector"] != *wanted {
        causes.push(Cause::invalid("spec.selector", wanted, "field is immutable"));
    }
    if kind == "apps/statefulsets" && old["serviceName"] != spec["serviceName"] {
        let hint = "updates to statefulset spec for fields other than 'replicas', 'ordinals', \
            'template', 'updateStrategy', 'revisionHistoryLimit', \
            'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden";
        causes.push(Cause::forbidden("spec", hint));
    }
}

fn crd(object: &Value, old: Option<&Value>, causes: &mut Causes) {
    let spec = &object["spec"];
    let text = |value: &Value| value.as_str().unwrap_or("").to_owned();
    let (group, plural) = (text(&spec["group"]), text(&spec["names"]["plural"]));
    for (path, value) in [
        ("spec.group", &group),
        ("spec.names.plural", &plural),
        ("spec.names.kind", &text(&spec["names"]["kind"])),
        ("spec.scope", &text(&spec["scope"])),
    ] {
        if value.is_empty() {
            causes.push(Cause::required(path, ""));
        }
    }
    let expected = format!("{plural}.{group}");
    if object["metadata"]["name"] != expected.as_str() {
        let hint = "must be spec.names.plural+\".\"+spec.group";
        causes.push(Cause::invalid("metadata.name", &object["metadata"]["name"], hint));
    }
    one_of(&spec["scope"], "spec.scope", &["Cluster", "Namespaced"], causes);
    let taken = crate::apiserver::builtin::KINDS.iter().any(|kind| kind.group == group);
    if taken {
        let hint = "is the group of a built-in API";
        causes.push(Cause::invalid("spec.group", &group.as_str().into(), hint));
    }
    if spec["conversion"]["strategy"] == "Webhook" {
        causes.push(Cause::not_supported(
            "spec.conversion.strategy",
            &spec["conversion"]["strategy"],
            &["None"],
        ));
    }
    let stored = items(spec, "versions").filter(|(_, version)| version["storage"] == true).count();
    if stored != 1 {
        causes.push(Cause::invalid(
            "spec.versions",
            &json!(stored),
            "must have exactly one version marked as storage version",
        ));
    }
    for (index, version) in items(spec, "versions") {
        if !version["schema"]["openAPIV3Schema"].is_object() {
            let path = format!("spec.versions[{index}].schema.openAPIV3Schema");
            causes.push(Cause::required(path, "schemas are required"));
        }
    }
    if let Some(old) = old {
        for (field, pointer) in [("spec.scope", "/scope"), ("spec.names.kind", "/names/kind")] {
            if old["spec"].pointer(pointer) != spec.pointer(pointer) {
                let value = spec.pointer(pointer).unwrap_or(&Value::Null);
                causes.push(Cause::invalid(field, value, "field is immutable"));
            }
        }
    }
}
