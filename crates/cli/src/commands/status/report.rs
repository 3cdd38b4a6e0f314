//! From what the agents and the API server said to what people and programs read.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

use palisade_api::admin::{Endpoint, Status};
use serde_json::{Value, json};

use super::health;
use crate::cluster::Cluster;

/// A fence; the component summary stands beside it.
pub(super) const LOGO: [&str; 5] =
    ["  /\\ /\\ /\\    ", "  || || ||    ", " =||=||=||=   ", "  || || ||    ", " =||=||=||=   "];
pub(super) const DISABLED: &str = "disabled";

/// What one agent said.
pub(super) struct AgentState {
    pub(super) name: String,
    pub(super) answer: Result<(Status, Vec<Endpoint>), String>,
}

/// Everything that `status` knows.
pub(super) struct Report {
    agents: Vec<AgentState>,
    cluster: Result<Cluster, String>,
}

impl Report {
    pub(super) const fn new(agents: Vec<AgentState>, cluster: Result<Cluster, String>) -> Self {
        Self { agents, cluster }
    }

    /// No agent and no API server.
    pub(super) fn nothing_there(&self) -> bool {
        self.agents.is_empty() && self.cluster.is_err()
    }

    /// Neither an agent nor the API server said anything.
    pub(super) fn nobody_answered(&self) -> bool {
        self.available() == 0 && self.cluster.is_err()
    }

    /// All there and without errors.
    pub(super) fn ok(&self) -> bool {
        self.cluster.is_ok()
            && self.desired() > 0
            && self.ready() == self.desired()
            && self.errors().is_empty()
            && self.managed() == self.pods()
    }

    fn statuses(&self) -> impl Iterator<Item = &(Status, Vec<Endpoint>)> {
        self.agents.iter().filter_map(|agent| agent.answer.as_ref().ok())
    }

    /// One agent for each node.
    fn desired(&self) -> usize {
        let nodes = self.cluster.as_ref().map_or(0, |cluster| cluster.nodes.len());
        nodes.max(self.agents.len())
    }

    fn available(&self) -> usize {
        self.statuses().count()
    }

    fn ready(&self) -> usize {
        self.statuses().filter(|(status, _)| status.ready).count()
    }

    fn pods(&self) -> usize {
        match &self.cluster {
            Ok(cluster) => cluster.pods.len(),
            Err(_) => self.managed_names().len(),
        }
    }

    fn managed(&self) -> usize {
        let managed = self.managed_names();
        match &self.cluster {
            Ok(cluster) => cluster.pods.keys().filter(|pod| managed.contains(*pod)).count(),
            Err(_) => managed.len(),
        }
    }

    /// Pods whose policy is in force. The agents know best; where none can be asked, the API does.
    fn managed_names(&self) -> BTreeSet<String> {
        if self.available() > 0 {
            return self
                .statuses()
                .flat_map(|(_, endpoints)| endpoints)
                .filter(|endpoint| endpoint.state == "ready")
                .map(|endpoint| format!("{}/{}", endpoint.namespace, endpoint.pod))
                .collect();
        }
        let told = self.cluster.as_ref().ok().and_then(|cluster| cluster.endpoints.clone().ok());
        told.unwrap_or_default()
    }

    fn images(&self) -> BTreeMap<String, usize> {
        let mut images = BTreeMap::new();
        for (status, _) in self.statuses() {
            let version = status.version.trim_start_matches('v');
            *images.entry(format!("palisade-agent:v{version}")).or_default() += 1;
        }
        images
    }

    /// By agent: what is wrong.
    fn errors(&self) -> Vec<(String, String)> {
        let mut errors = Vec::new();
        for agent in &self.agents {
            match &agent.answer {
                Err(error) => errors.push((agent.name.clone(), error.clone())),
                Ok((status, _)) => errors.extend(
                    health::problems(status)
                        .into_iter()
                        .map(|problem| (status.node.clone(), problem)),
                ),
            }
        }
        let known: BTreeSet<&str> = self
            .statuses()
            .map(|(status, _)| status.node.as_str())
            .chain(self.agents.iter().map(|agent| agent.name.as_str()))
            .collect();
        if let Ok(cluster) = &self.cluster {
            let without = cluster.nodes.iter().filter(|node| !known.contains(node.as_str()));
            errors.extend(without.map(|node| {
                (node.clone(), "no agent of this node can be reached from here".to_owned())
            }));
        }
        errors
    }

    /// By agent: what somebody should look at.
    fn warnings(&self) -> Vec<(String, String)> {
        let mut warnings = Vec::new();
        for (status, _) in self.statuses() {
            let concerns = health::concerns(status).into_iter();
            warnings.extend(concerns.map(|text| (status.node.clone(), text)));
        }
        warnings
    }

    fn warnings_at_once(&self) -> Vec<(String, String)> {
        health::at_once(self.warnings(), self.desired())
    }

    /// What could not be asked.
    pub(super) fn collection_errors(&self) -> Vec<String> {
        let mut errors = Vec::new();
        if self.agents.is_empty() {
            errors.push("no agent's socket found on this machine".to_owned());
        }
        match &self.cluster {
            Ok(Cluster { endpoints: Ok(_), .. }) => {}
            Ok(Cluster { endpoints: Err(error), .. }) => {
                errors.push(format!("CiliumEndpoints: {error}"));
            }
            Err(error) => errors.push(format!("API server: {error}")),
        }
        errors
    }

    /// For people.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        self.write(&mut text).map_or_else(|_| String::new(), |()| text)
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let components = [
            ("Palisade:", self.palisade()),
            ("Operator:", self.operator().to_owned()),
            ("L7 proxy:", self.l7_proxy()),
            ("Hubble Relay:", DISABLED.to_owned()),
            ("ClusterMesh:", DISABLED.to_owned()),
        ];
        for (picture, (name, state)) in LOGO.iter().zip(components) {
            writeln!(out, "{picture}{name:<20}{state}")?;
        }
        let (desired, ready, available) = (self.desired(), self.ready(), self.available());
        writeln!(out)?;
        write!(
            out,
            "DaemonSet              palisade    Desired: {desired}, Ready: {ready}/{desired}, \
             Available: {available}/{desired}"
        )?;
        if available < desired {
            write!(out, ", Unavailable: {}/{desired}", desired - available)?;
        }
        writeln!(out, "\nContainers:            palisade    Running: {available}")?;
        writeln!(
            out,
            "Cluster Pods:          {}/{} managed by Palisade",
            self.managed(),
            self.pods()
        )?;
        if let Ok(cluster) = &self.cluster {
            writeln!(out, "Kubernetes version:    {}", cluster.version)?;
        }
        for (image, count) in self.images() {
            writeln!(out, "Image versions         palisade    {image}: {count}")?;
        }
        list(out, "Errors:", &self.errors())?;
        list(out, "Warnings:", &self.warnings_at_once())?;
        for error in self.collection_errors() {
            writeln!(out, "{:<23}{error}", "Not collected:")?;
        }
        Ok(())
    }

    /// Only the API server can tell of one; a cluster that nothing was installed in has none.
    const fn operator(&self) -> &'static str {
        match self.cluster {
            Ok(_) => DISABLED,
            Err(_) => "unknown: the API server cannot be asked",
        }
    }

    fn l7_proxy(&self) -> String {
        let missing = self.statuses().filter(|(status, _)| !status.l7_proxy).count();
        match (missing, self.available()) {
            (_, 0) => "unknown".to_owned(),
            (0, _) => "OK".to_owned(),
            (missing, nodes) => format!("not connected on {missing} of {nodes} nodes"),
        }
    }

    fn palisade(&self) -> String {
        let (errors, warnings) = (self.errors().len(), self.warnings_at_once().len());
        let not_ready = self.desired() - self.ready().min(self.desired());
        match (errors, warnings, not_ready) {
            (0, 0, 0) if self.desired() > 0 => "OK".to_owned(),
            (0, 0, 0) => "no agent found".to_owned(),
            (0, 0, _) => format!("{not_ready} not ready"),
            _ => format!("{errors} errors, {warnings} warnings"),
        }
    }

    /// For programs; the keys are those that scripts for such clusters know.
    pub(super) fn json(&self) -> Value {
        let count = |total: usize| json!({ "palisade": { "Running": total } });
        let mut errors: BTreeMap<String, (Vec<String>, Vec<String>)> = BTreeMap::new();
        for (name, error) in self.errors() {
            errors.entry(name).or_default().0.push(error);
        }
        for (name, warning) in self.warnings() {
            errors.entry(name).or_default().1.push(warning);
        }
        let errors: BTreeMap<_, _> = errors
            .into_iter()
            .map(|(name, (errors, warnings))| {
                (name, json!({ "Errors": errors, "Warnings": warnings, "Disabled": false }))
            })
            .collect();
        let (desired, available) = (self.desired(), self.available());
        json!({
            "image_count": { "palisade": self.images() },
            "phase_count": count(available),
            "pod_state": { "palisade": {
                "Type": "DaemonSet",
                "Desired": desired,
                "Ready": self.ready(),
                "Available": available,
                "Unavailable": desired - available,
            } },
            "pods_count": { "all": self.pods(), "by_cilium": self.managed() },
            "cilium_status": self.statuses()
                .map(|(status, _)| (status.node.clone(), json!(status)))
                .collect::<BTreeMap<_, _>>(),
            "cilium_endpoints": self.statuses()
                .map(|(status, endpoints)| (status.node.clone(), json!(endpoints)))
                .collect::<BTreeMap<_, _>>(),
            "errors": if errors.is_empty() { json!({}) } else { json!({ "palisade": errors }) },
            "collection_errors": self.collection_errors(),
            "config_errors": [],
            "helm_chart_version": "",
            "kubernetes_version": self.cluster.as_ref().ok().map(|cluster| &cluster.version),
        })
    }
}

fn list(out: &mut String, title: &str, entries: &[(String, String)]) -> std::fmt::Result {
    let mut title = title;
    for (name, text) in entries {
        writeln!(out, "{title:<23}palisade    {name}    {text}")?;
        title = "";
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests;
