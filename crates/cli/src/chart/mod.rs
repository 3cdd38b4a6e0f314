//! The chart in `install/helm/palisade`, rendered without Helm to the very objects that `helm
//! template` gives.

#[cfg(test)]
mod rights;
mod schema;
mod template;
mod values;

use anyhow::{Context, Result};
use palisade_api::pool::{Fault, Pools};
use serde_json::{Map, Value, json};

use values::merge;
pub(crate) use values::{combine, parse_set};

use crate::exit::Failure;

macro_rules! chart {
    ($file:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../install/helm/palisade/", $file))
    };
}

const CHART: &str = chart!("Chart.yaml");
const VALUES: &str = chart!("values.yaml");
const SCHEMA: &str = chart!("values.schema.json");
const CLEAN: &str = chart!("clean.yaml");
const TEMPLATES: [(&str, &str); 5] = [
    ("agent-rbac.yaml", chart!("templates/agent-rbac.yaml")),
    ("operator-rbac.yaml", chart!("templates/operator-rbac.yaml")),
    ("config.yaml", chart!("templates/config.yaml")),
    ("agent.yaml", chart!("templates/agent.yaml")),
    ("operator.yaml", chart!("templates/operator.yaml")),
];

/// Kinds that others need come first.
const ORDER: [&str; 9] = [
    "Namespace",
    "ServiceAccount",
    "ClusterRole",
    "ClusterRoleBinding",
    "Role",
    "RoleBinding",
    "ConfigMap",
    "PodDisruptionBudget",
    "Deployment",
];

/// The chart with what was chosen.
pub(crate) struct Chart {
    root: Value,
    /// Networks for pods, where the operator gives them.
    pools: Option<Pools>,
}

impl Chart {
    /// Checks what was chosen.
    pub(crate) fn new(chosen: &Value, namespace: &str) -> Result<Self> {
        let mut chart = Self::of_record(chosen, namespace)?;
        let schema: Value = serde_json::from_str(SCHEMA).context("the chart's schema")?;
        let mut problems = schema::problems(&schema, chart.values())?;
        if problems.is_empty() {
            match pools(chart.values()) {
                Ok(pools) => chart.pools = pools,
                Err(fault) => problems.push(format!("config.{fault}")),
            }
        }
        // What templates refuse themselves, for Helm has to refuse it too.
        if problems.is_empty()
            && let Err(refusal) = chart.objects()
        {
            problems.push(refusal.root_cause().to_string());
        }
        if !problems.is_empty() {
            return Err(Failure::refused(
                format!("values that cannot be: {}", problems.join("\n       ")),
                "Every value is described in install/helm/palisade/values.yaml of the sources;\n\
                 --values takes a file of them, and --set KEY=VALUE one.",
            )
            .into());
        }
        Ok(chart)
    }

    /// With what was chosen once; to see it or to take it away it need not be right any more.
    pub(crate) fn of_record(chosen: &Value, namespace: &str) -> Result<Self> {
        let mut values: Value = serde_saphyr::from_str(VALUES).context("the chart's values")?;
        merge(&mut values, chosen.clone());
        let chart: Map<String, Value> = serde_saphyr::from_str(CHART).context("the chart")?;
        // Go has the chart's fields with capitals.
        let capital = |key: String| {
            let (first, rest) = key.split_at(1);
            format!("{}{rest}", first.to_uppercase())
        };
        let chart: Map<_, _> = chart.into_iter().map(|(key, it)| (capital(key), it)).collect();
        let root = json!({
            "Values": values,
            "Chart": chart,
            "Release": { "Name": "palisade", "Namespace": namespace },
        });
        Ok(Self { root, pools: None })
    }

    /// Version of the chart.
    pub(crate) fn version(&self) -> &str {
        self.root["Chart"]["Version"].as_str().unwrap_or_default()
    }

    /// The values in force: what was chosen over what the chart says.
    pub(crate) fn values(&self) -> &Value {
        &self.root["Values"]
    }

    /// The namespace that is made for Secrets.
    pub(crate) fn secrets_namespace(&self) -> &str {
        self.values()["secrets"]["namespace"].as_str().unwrap_or_default()
    }

    /// Networks for pods, where the operator gives them.
    pub(crate) const fn pools(&self) -> Option<&Pools> {
        self.pools.as_ref()
    }

    /// The objects, in the order in which they are applied.
    pub(crate) fn objects(&self) -> Result<Vec<Value>> {
        let mut objects = Vec::new();
        for (name, template) in TEMPLATES {
            objects.extend(self.render(template).with_context(|| format!("in {name}"))?);
        }
        let rank = |object: &Value| ORDER.iter().position(|kind| object["kind"] == *kind);
        objects.sort_by_key(|object| rank(object).unwrap_or(ORDER.len()));
        Ok(objects)
    }

    /// What cleans the nodes after everything else is gone.
    pub(crate) fn clean(&self) -> Result<Value> {
        let objects = self.render(CLEAN).context("in clean.yaml")?;
        objects.into_iter().next().context("clean.yaml is empty")
    }

    fn render(&self, template: &str) -> Result<Vec<Value>> {
        let text = template::render(template, &self.root)?;
        Ok(serde_saphyr::from_multiple(&text)?)
    }
}

/// As the operator will read them.
fn pools(values: &Value) -> Result<Option<Pools>, Fault> {
    let config = &values["config"];
    let text = |name: &str| config[name].as_str().unwrap_or_default();
    let mask = |name: &str| config[name].as_u64().and_then(|it| u8::try_from(it).ok()).unwrap_or(0);
    if text("ipam") != "cluster-pool" {
        return Ok(None);
    }
    let (v4, v6) = (mask("pool-ipv4-mask"), mask("pool-ipv6-mask"));
    Pools::parse(text("pool-ipv4"), v4, text("pool-ipv6"), v6).map(Some)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs, path::Path, process::Command};

    use super::*;

    const DIRECTORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../install/helm/palisade");

    /// Ways to choose that reach every branch of the templates.
    const CHOICES: [&[&str]; 9] = [
        &[],
        &["config.ipam=cluster-pool,config.pool-ipv6=fd00:10::/104,config.uplink=eth0"],
        &["apiServer.host=10.0.0.1,cni.exclusive=true,proxy.enabled=false,operator.replicas=1"],
        &["image.tag=v9,agent.maxUnavailable=25%,config.pool-ipv4-mask=26"],
        &[
            "image.repository=[fd00::1]:5000/a__b/c-d,image.tag=1@sha512:0123456789abcdef0123456789abcdef",
        ],
        &["image.repository=Registry.Example:5000/palisade"],
        &["agent.resources=null,agent.nodeSelector=null,agent.tolerations=null,config.uplink=null"],
        &[
            "proxy.enabled=null,proxy.resources=null,apiServer.host=null,config.pool-ipv6=null",
            "image.tag=null,image.pullSecrets=null,cni.exclusive=null,operator.resources=null",
        ],
        &["config.cluster-name=a-b", "agent.nodeSelector.zone=x,secrets.namespace=s"],
    ];

    /// What `--set` cannot say: lists of maps.
    const FILE: &str = r#"{"image": {"pullSecrets": [{"name": "a"}]}, "agent": {"tolerations": [
        {"key": "a", "operator": "Equal", "value": "b", "effect": "NoExecute", "tolerationSeconds": 5}],
        "resources": {"limits": {"memory": "1Gi"}}}, "operator": {"tolerations": []}, "config": {"cluster-name": "x"}}"#;

    fn chart(sets: &[&str]) -> Chart {
        let mut chosen = json!({});
        for set in sets {
            combine(&mut chosen, parse_set(set).unwrap());
        }
        Chart::new(&chosen, "net").unwrap()
    }

    fn by_name(objects: Vec<Value>) -> BTreeMap<String, Value> {
        let name = |it: &Value| {
            format!("{} {}/{}", it["kind"], it["metadata"]["namespace"], it["metadata"]["name"])
        };
        let count = objects.len();
        let map: BTreeMap<_, _> = objects.into_iter().map(|it| (name(&it), it)).collect();
        assert_eq!(map.len(), count, "two objects of one name");
        map
    }

    /// Helm, where set-up installed it or the machine has it.
    fn helm() -> Option<Command> {
        let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.tools/bin/helm");
        let program = if own.exists() { own } else { "helm".into() };
        Command::new(&program).arg("version").output().ok()?;
        Some(Command::new(program))
    }

    fn assert_same(ours: &Chart, choice: &[&str]) {
        let mut helm = helm().unwrap();
        helm.args(["template", "palisade", DIRECTORY, "--namespace", "net"]).args(choice);
        let output = helm.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        let helms = by_name(serde_saphyr::from_multiple(&text).unwrap());
        let ours = by_name(ours.objects().unwrap());
        let names = |objects: &BTreeMap<String, Value>| objects.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&ours), names(&helms), "{choice:?}");
        for (name, object) in ours {
            assert_eq!(object, helms[&name], "{name} with {choice:?}");
        }
    }

    #[test]
    fn helm_renders_the_very_same_objects() {
        if helm().is_none() {
            eprintln!("SKIPPED: there is no helm; `make setup` installs it");
            return;
        }
        for sets in CHOICES {
            let choice: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
            assert_same(&chart(sets), &choice);
        }
        let file = std::env::temp_dir().join(format!("palisade-values-{}", std::process::id()));
        fs::write(&file, FILE).unwrap();
        let chosen: Value = serde_saphyr::from_str(FILE).unwrap();
        let ours = Chart::new(&chosen, "net").unwrap();
        assert_same(&ours, &["--values", file.to_str().unwrap()]);
        fs::remove_file(file).unwrap();
    }

    #[test]
    fn helm_refuses_what_is_refused_here() {
        if helm().is_none() {
            eprintln!("SKIPPED: there is no helm; `make setup` installs it");
            return;
        }
        for set in [
            "config.ipam=dhcp",
            "config.pool-ipv4=10.0.0.0",
            "config.pool-ipv4-mask=64",
            "config.nothing=1",
            "apiServer.host=http://10.0.0.1",
            "apiServer.host=10.0.0.1:6443",
            "operator.replicas=0",
            "agent.maxUnavailable=0",
            "agent.maxUnavailable=0%",
            "agent.maxUnavailable=900%",
            "cni.exclusive=maybe",
            "image.pullPolicy=Sometimes",
            "image.tag=a b",
            "image.repository=",
            "image.repository=Name:v1",
            "secrets.namespace=default",
            "proxy=null",
            "config.log-level=null",
            "agent.maxUnavailable=null",
            "secrets.namespace=kube-public",
        ] {
            let error = Chart::new(&parse_set(set).unwrap(), "net").err().expect(set).to_string();
            assert!(error.contains(set.split('=').next().unwrap()), "{set}: {error}");
            let mut helm = helm().unwrap();
            let output = helm.args(["template", "palisade", DIRECTORY, "--set", set]).output();
            assert!(!output.unwrap().status.success(), "{set}");
        }
    }

    #[test]
    fn networks_that_the_operator_cannot_cut_are_refused() {
        let refused = |set: &str| {
            let chosen = parse_set(&format!("config.ipam=cluster-pool,{set}")).unwrap();
            Chart::new(&chosen, "net").err().expect(set).to_string()
        };
        for (set, says) in [
            ("config.pool-ipv4=999.0.0.0/16", "config.pool-ipv4: \"999.0.0.0/16\" is no network"),
            ("config.pool-ipv4=10.244.0.0/28", "/24, does not fit into 10.244.0.0/28"),
            (r"config.pool-ipv4=10.244.0.0/16\,10.244.1.0/24", "overlap"),
            ("config.pool-ipv6=fd00::/120,config.pool-ipv6-mask=64", "config.pool-ipv6: "),
            ("config.pool-ipv4=", "config.pool-ipv4: is empty"),
        ] {
            assert!(refused(set).contains(says), "{}", refused(set));
        }
        // Nobody reads them where Kubernetes gives the networks.
        assert!(chart(&["config.pool-ipv4=10.244.0.0/28"]).pools().is_none());
        assert!(chart(&["config.ipam=cluster-pool"]).pools().is_some());
    }

    #[test]
    fn every_template_is_embedded_and_whoever_is_needed_comes_first() {
        let mut files: Vec<String> = fs::read_dir(Path::new(DIRECTORY).join("templates"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        let mut embedded = TEMPLATES.map(|(name, _)| name);
        embedded.sort_unstable();
        assert_eq!(files, embedded);

        let objects = chart(&[]).objects().unwrap();
        let kinds: Vec<&str> = objects.iter().map(|it| it["kind"].as_str().unwrap()).collect();
        assert_eq!(kinds.first(), Some(&"Namespace"));
        assert_eq!(kinds.last(), Some(&"DaemonSet"));
        assert_eq!(chart(&[]).clean().unwrap()["kind"], "DaemonSet");
    }

    /// What the chart does not have would be null without a word.
    #[test]
    fn templates_name_values_of_the_chart_only() {
        let named = regex::Regex::new(r"\.Values((?:\.\w+)+)").unwrap();
        let chart = chart(&[]);
        for template in TEMPLATES.iter().map(|(_, text)| *text).chain([CLEAN]) {
            for found in named.captures_iter(template) {
                let pointer = found[1].replace('.', "/");
                assert!(chart.values().pointer(&pointer).is_some(), "{pointer}");
            }
        }
    }

    #[test]
    fn runtimes_old_and_new_can_read_the_network_configuration() {
        let objects = chart(&[]).objects().unwrap();
        let config = objects.into_iter().find(|it| it["kind"] == "ConfigMap").unwrap();
        let conflist = config["data"]["cni.conflist"].as_str().unwrap();
        let conflist: Value = serde_json::from_str(conflist).unwrap();
        assert_eq!(conflist["cniVersion"], "1.0.0", "all that containerd 1.6 and 1.7 read");
        assert_eq!(conflist["cniVersions"], json!(["1.0.0", "1.1.0"]));
    }

    /// Else nothing would make the nodes ready that wait for it.
    #[test]
    fn no_choice_keeps_palisade_from_nodes_that_have_no_network_yet() {
        let chosen = json!({ "key": "dedicated", "operator": "Exists" });
        let values = json!({ "tolerations": [chosen] });
        let chart = Chart::new(&json!({ "agent": values, "operator": values }), "net").unwrap();
        let objects = chart.objects().unwrap();
        let pods = objects.iter().filter_map(|it| it.pointer("/spec/template/spec/tolerations"));
        let pods: Vec<&Vec<Value>> = pods.filter_map(Value::as_array).collect();
        assert_eq!(pods.len(), 2);
        for tolerations in pods {
            for key in ["node.cilium.io/agent-not-ready", "node.kubernetes.io/not-ready"] {
                let toleration = json!({ "key": key, "operator": "Exists" });
                assert!(tolerations.contains(&toleration), "{key}: {tolerations:?}");
            }
            assert!(tolerations.contains(&chosen), "{tolerations:?}");
        }
    }

    /// Agents may have run where they are not wanted any more.
    #[test]
    fn every_linux_node_is_cleaned() {
        let chosen = json!({ "agent": { "tolerations": [], "nodeSelector": { "zone": "x" } } });
        let pods = Chart::new(&chosen, "net").unwrap().clean().unwrap()["spec"]["template"].take();
        assert_eq!(pods["spec"]["tolerations"], json!([{ "operator": "Exists" }]));
        assert_eq!(pods["spec"]["nodeSelector"], json!({ "kubernetes.io/os": "linux" }));
    }

    #[test]
    fn secrets_have_a_namespace_of_their_own() {
        let refused = |name: &str| {
            let chosen = json!({ "secrets": { "namespace": name } });
            Chart::new(&chosen, "net").err().expect(name).to_string()
        };
        assert!(refused("default").contains("for these Secrets alone"), "{}", refused("default"));
        let own = refused("net");
        assert!(
            own.contains("secrets.namespace: is the namespace of Palisade's own pods"),
            "{own}"
        );
        let Some(mut helm) = helm() else {
            eprintln!("SKIPPED: there is no helm; `make setup` installs it");
            return;
        };
        helm.args(["template", "palisade", DIRECTORY, "--namespace", "net"]);
        let output = helm.args(["--set", "secrets.namespace=net"]).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let words = own.strip_prefix("values that cannot be: ").unwrap();
        assert!(!output.status.success() && said.contains(words), "{said}");
    }

    #[test]
    fn agents_read_secrets_where_they_may() {
        let objects = chart(&["secrets.namespace=elsewhere"]).objects().unwrap();
        let find = |kind: &str| objects.iter().find(|it| it["kind"] == kind).unwrap();
        let env = &find("DaemonSet")["spec"]["template"]["spec"]["containers"][0]["env"];
        let told = json!({ "name": "PALISADE_AGENT_SECRETS_NAMESPACE", "value": "elsewhere" });
        assert!(env.as_array().unwrap().contains(&told), "{env}");
        let role =
            objects.iter().find(|it| it["kind"] == "Role" && it["metadata"]["name"] == "palisade");
        assert_eq!(role.unwrap()["metadata"]["namespace"], "elsewhere");
    }

    #[test]
    fn a_changed_setting_is_a_new_version_of_the_pods() {
        let version = |sets: &[&str]| {
            let objects = chart(sets).objects().unwrap();
            let agent = objects.into_iter().find(|it| it["kind"] == "DaemonSet").unwrap();
            agent["spec"]["template"]["metadata"]["annotations"]["palisade.io/config"].clone()
        };
        assert_ne!(version(&[]), version(&["config.log-level=debug"]));
    }
}
