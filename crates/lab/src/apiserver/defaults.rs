//! What Kubernetes fills into objects that do not say.

use serde_json::{Map, Value, json};

/// Fills in the defaults of a built-in kind (`group/plural`).
pub(super) fn apply(kind: &str, object: &mut Value) {
    match kind {
        "/pods" => pod_spec(&mut object["spec"], true),
        "/services" => service(&mut object["spec"]),
        "/secrets" => secret(object),
        "/namespaces" => namespace(object),
        "/configmaps" | "/serviceaccounts" => {}
        "apps/deployments" => deployment(&mut object["spec"]),
        "apps/replicasets" => {
            set(&mut object["spec"], "replicas", 1);
            template(&mut object["spec"]);
        }
        "apps/statefulsets" => stateful_set(&mut object["spec"]),
        "apps/daemonsets" => daemon_set(&mut object["spec"]),
        "networking.k8s.io/networkpolicies" => network_policy(&mut object["spec"]),
        "discovery.k8s.io/endpointslices" => endpoint_slice(object),
        "apiextensions.k8s.io/customresourcedefinitions" => crd(&mut object["spec"]),
        _ => {}
    }
}

/// Sets a field that is absent.
fn set(object: &mut Value, field: &str, default: impl Into<Value>) {
    if object.is_null() {
        *object = Value::Object(Map::new());
    }
    if let Some(fields) = object.as_object_mut()
        && fields.get(field).is_none_or(Value::is_null)
    {
        fields.insert(field.to_owned(), default.into());
    }
}

fn each(object: &mut Value, field: &str, apply: impl FnMut(&mut Value)) {
    if let Some(items) = object.get_mut(field).and_then(Value::as_array_mut) {
        items.iter_mut().for_each(apply);
    }
}

fn pod_spec(spec: &mut Value, is_pod: bool) {
    set(spec, "restartPolicy", "Always");
    set(spec, "dnsPolicy", "ClusterFirst");
    set(spec, "terminationGracePeriodSeconds", 30);
    set(spec, "schedulerName", "default-scheduler");
    set(spec, "securityContext", json!({}));
    let account = spec.get("serviceAccountName").and_then(Value::as_str).unwrap_or("").to_owned();
    if is_pod {
        set(spec, "enableServiceLinks", true);
        set(spec, "preemptionPolicy", "PreemptLowerPriority");
        set(spec, "priority", 0);
        if account.is_empty() {
            spec["serviceAccountName"] = "default".into();
        }
        if spec.get("tolerations").is_none() {
            spec["tolerations"] = ["not-ready", "unreachable"]
                .map(|state| {
                    json!({"key": format!("node.kubernetes.io/{state}"), "operator": "Exists",
                           "effect": "NoExecute", "tolerationSeconds": 300})
                })
                .to_vec()
                .into();
        }
    }
    if let Some(account) = spec.get("serviceAccountName").cloned() {
        set(spec, "serviceAccount", account);
    }
    for field in ["containers", "initContainers", "ephemeralContainers"] {
        each(spec, field, container);
    }
    each(spec, "volumes", volume);
}

fn container(container: &mut Value) {
    set(container, "terminationMessagePath", "/dev/termination-log");
    set(container, "terminationMessagePolicy", "File");
    set(container, "resources", json!({}));
    let image = container.get("image").and_then(Value::as_str).unwrap_or("").to_owned();
    set(container, "imagePullPolicy", pull_policy(&image));
    each(container, "ports", |port| set(port, "protocol", "TCP"));
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let Some(probe) = container.get_mut(probe).filter(|probe| probe.is_object()) else {
            continue;
        };
        set(probe, "timeoutSeconds", 1);
        set(probe, "periodSeconds", 10);
        set(probe, "successThreshold", 1);
        set(probe, "failureThreshold", 3);
        if let Some(get) = probe.get_mut("httpGet").filter(|get| get.is_object()) {
            set(get, "path", "/");
            set(get, "scheme", "HTTP");
        }
    }
    each(container, "env", |variable| {
        if let Some(reference) =
            variable.get_mut("valueFrom").and_then(|from| from.get_mut("fieldRef"))
        {
            set(reference, "apiVersion", "v1");
        }
    });
}

fn pull_policy(image: &str) -> &'static str {
    let last = image.rsplit('/').next().unwrap_or("");
    let tag = last.split_once(':').map_or("latest", |(_, tag)| tag);
    if tag == "latest" && !last.contains('@') { "Always" } else { "IfNotPresent" }
}

fn volume(volume: &mut Value) {
    let only_name = volume.as_object().is_some_and(|fields| fields.keys().all(|key| key == "name"));
    if only_name {
        set(volume, "emptyDir", json!({}));
    }
    for source in ["configMap", "secret", "projected", "downwardAPI"] {
        if let Some(source) = volume.get_mut(source).filter(|source| source.is_object()) {
            set(source, "defaultMode", 420);
        }
    }
    if let Some(source) = volume.get_mut("hostPath").filter(|source| source.is_object()) {
        set(source, "type", "");
    }
}

fn template(spec: &mut Value) {
    if let Some(spec) = spec.get_mut("template").and_then(|template| template.get_mut("spec")) {
        pod_spec(spec, false);
    }
}

fn deployment(spec: &mut Value) {
    set(spec, "replicas", 1);
    set(spec, "revisionHistoryLimit", 10);
    set(spec, "progressDeadlineSeconds", 600);
    set(spec, "strategy", json!({}));
    set(&mut spec["strategy"], "type", "RollingUpdate");
    if spec["strategy"]["type"] == "RollingUpdate" {
        set(&mut spec["strategy"], "rollingUpdate", json!({}));
        set(&mut spec["strategy"]["rollingUpdate"], "maxUnavailable", "25%");
        set(&mut spec["strategy"]["rollingUpdate"], "maxSurge", "25%");
    }
    template(spec);
}

fn stateful_set(spec: &mut Value) {
    set(spec, "replicas", 1);
    set(spec, "revisionHistoryLimit", 10);
    set(spec, "podManagementPolicy", "OrderedReady");
    set(spec, "updateStrategy", json!({}));
    set(&mut spec["updateStrategy"], "type", "RollingUpdate");
    if spec["updateStrategy"]["type"] == "RollingUpdate" {
        set(&mut spec["updateStrategy"], "rollingUpdate", json!({}));
        set(&mut spec["updateStrategy"]["rollingUpdate"], "partition", 0);
    }
    let keep = json!({"whenDeleted": "Retain", "whenScaled": "Retain"});
    set(spec, "persistentVolumeClaimRetentionPolicy", keep);
    template(spec);
}

fn daemon_set(spec: &mut Value) {
    set(spec, "revisionHistoryLimit", 10);
    set(spec, "updateStrategy", json!({}));
    set(&mut spec["updateStrategy"], "type", "RollingUpdate");
    if spec["updateStrategy"]["type"] == "RollingUpdate" {
        set(&mut spec["updateStrategy"], "rollingUpdate", json!({}));
        set(&mut spec["updateStrategy"]["rollingUpdate"], "maxUnavailable", 1);
        set(&mut spec["updateStrategy"]["rollingUpdate"], "maxSurge", 0);
    }
    template(spec);
}

fn service(spec: &mut Value) {
    set(spec, "type", "ClusterIP");
    set(spec, "sessionAffinity", "None");
    if spec["sessionAffinity"] == "ClientIP" {
        set(spec, "sessionAffinityConfig", json!({"clientIP": {"timeoutSeconds": 10800}}));
    }
    if spec["type"] != "ExternalName" {
        set(spec, "internalTrafficPolicy", "Cluster");
    }
    if matches!(spec["type"].as_str(), Some("NodePort" | "LoadBalancer")) {
        set(spec, "externalTrafficPolicy", "Cluster");
    }
    if spec["type"] == "LoadBalancer" {
        set(spec, "allocateLoadBalancerNodePorts", true);
    }
    each(spec, "ports", |port| {
        set(port, "protocol", "TCP");
        let number = port.get("port").cloned().unwrap_or(Value::Null);
        if !number.is_null() {
            let target = port.get("targetPort");
            if target.is_none_or(|target| *target == json!(0) || *target == json!("")) {
                port["targetPort"] = number;
            }
        }
    });
}

fn secret(object: &mut Value) {
    use base64::Engine as _;
    set(object, "type", "Opaque");
    // `stringData` is a convenience for writing only.
    let Some(plain) = object.as_object_mut().and_then(|fields| fields.remove("stringData")) else {
        return;
    };
    for (name, text) in plain.as_object().into_iter().flatten() {
        let encoded = base64::engine::general_purpose::STANDARD.encode(text.as_str().unwrap_or(""));
        set(object, "data", json!({}));
        object["data"][name] = encoded.into();
    }
}

fn namespace(object: &mut Value) {
    let name = object["metadata"]["name"].clone();
    set(&mut object["metadata"], "labels", json!({}));
    object["metadata"]["labels"]["kubernetes.io/metadata.name"] = name;
    set(&mut object["status"], "phase", "Active");
}

fn network_policy(spec: &mut Value) {
    set(spec, "podSelector", json!({}));
    if spec.get("policyTypes").is_none_or(|types| types.as_array().is_some_and(Vec::is_empty)) {
        let egress =
            spec.get("egress").and_then(Value::as_array).is_some_and(|rules| !rules.is_empty());
        spec["policyTypes"] =
            if egress { json!(["Ingress", "Egress"]) } else { json!(["Ingress"]) };
    }
    for direction in ["ingress", "egress"] {
        each(spec, direction, |rule| each(rule, "ports", |port| set(port, "protocol", "TCP")));
    }
}

fn endpoint_slice(object: &mut Value) {
    each(object, "ports", |port| {
        set(port, "protocol", "TCP");
        set(port, "name", "");
    });
}

fn crd(spec: &mut Value) {
    let kind = spec["names"]["kind"].as_str().unwrap_or("").to_owned();
    if kind.is_empty() {
        return;
    }
    set(&mut spec["names"], "singular", kind.to_lowercase());
    set(&mut spec["names"], "listKind", format!("{kind}List"));
    set(spec, "conversion", json!({"strategy": "None"}));
}
