//! The status of an installation, from what the API server says of its pods, and its agents of
//! themselves.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

use anyhow::Result;
use palisade_api::{
    admin::{EndpointObject, Status},
    client::chain,
};
use serde_json::{Value, json};

use super::{
    health,
    report::{DISABLED, LOGO},
};
use crate::cluster::{
    Cluster, ClusterPod, Container, Installation, PodState, Pods, Replicas,
    agents::{Answer, Asked},
};

const AGENTS: &str = "palisade";
const OPERATORS: &str = "palisade-operator";
/// So many pods are named where all of them could be too many.
const NAMED: usize = 5;

/// Something that somebody should look at.
struct Remark {
    component: &'static str,
    /// The pod or object that it comes from.
    from: String,
    text: String,
}

/// Everything that is known.
pub(super) struct Installed {
    cluster: Box<Cluster>,
    installation: Installation,
    /// What agents said of themselves, as far as they were asked.
    agents: Vec<Status>,
    errors: Vec<Remark>,
    warnings: Vec<Remark>,
    /// Why agents could not be asked.
    not_collected: BTreeSet<String>,
}

impl Installed {
    /// Of a cluster that has an installation; others come back.
    pub(super) fn of(mut cluster: Cluster) -> Result<Self, Box<Cluster>> {
        let Some(installation) = cluster.installation.take() else {
            return Err(Box::new(cluster));
        };
        let errors = errors(&cluster, &installation);
        let warnings = warnings(&installation);
        let unread = cluster.endpoints.as_ref().err();
        let not_collected = unread.map(|why| format!("CiliumEndpoints: {why}")).into_iter();
        Ok(Self {
            cluster: Box::new(cluster),
            installation,
            agents: Vec::new(),
            errors,
            warnings,
            not_collected: not_collected.collect(),
        })
    }

    pub(super) const fn installation(&self) -> &Installation {
        &self.installation
    }

    /// Takes over what the agents said. `again`: the pods after that.
    pub(super) fn hear(&mut self, asked: Result<Vec<Asked>>, again: impl FnOnce() -> Result<Pods>) {
        let asked = asked.unwrap_or_else(|error| {
            self.not_collected.insert(format!("agents: {}", chain(&*error)));
            Vec::new()
        });
        for Asked { pod, answer } in asked {
            let remark = |text| Remark { component: AGENTS, from: pod.clone(), text };
            match answer {
                Answer::Status(status) => {
                    self.errors.extend(health::problems(&status).into_iter().map(remark));
                    self.warnings.extend(health::concerns(&status).into_iter().map(remark));
                    self.agents.push(*status);
                }
                Answer::None(said) => {
                    self.errors.push(remark(format!("does not say how it is: {said}")));
                }
                Answer::Unasked(why) => {
                    self.not_collected.insert(format!("what agents say of themselves: {why}"));
                }
            }
        }
        let texts = self.pods_to_look_at(again);
        let remark = |text| Remark { component: AGENTS, from: AGENTS.to_owned(), text };
        self.warnings.extend(texts.into_iter().map(remark));
    }

    /// By node: the pods that its agent told.
    fn told(&self) -> BTreeMap<&str, &BTreeMap<String, EndpointObject>> {
        let told = self.agents.iter();
        told.filter_map(|status| Some((&*status.node, status.pods.as_ref()?))).collect()
    }

    /// Every pod, and whose it is.
    fn keepers(&self) -> impl Iterator<Item = (&str, &ClusterPod, Keeper<'_>)> {
        let told = self.told();
        self.cluster.pods.iter().map(move |(name, pod)| {
            let keeper = match pod.node.as_deref().and_then(|node| told.get(node).copied()) {
                Some(pods) => pods.get(name).map_or(Keeper::Other, Keeper::Agent),
                None => Keeper::Untold,
            };
            (&**name, pod, keeper)
        })
    }

    fn has_object(&self, pod: &str) -> bool {
        self.cluster.endpoints.as_ref().is_ok_and(|objects| objects.contains(pod))
    }

    fn pods_to_look_at(&mut self, again: impl FnOnce() -> Result<Pods>) -> Vec<String> {
        let objects_known = self.cluster.endpoints.is_ok();
        let (mut reasons, mut untold) = (BTreeMap::<&str, usize>::new(), 0);
        let mut strangers = BTreeMap::new();
        for (name, pod, keeper) in self.keepers().filter(|(_, pod, _)| pod.connected) {
            let wants_object = || objects_known && !self.has_object(name);
            match keeper {
                Keeper::Agent(EndpointObject::Unwritten(why)) if wants_object() => {
                    *reasons.entry(why).or_default() += 1;
                }
                Keeper::Agent(_) => {}
                Keeper::Other => _ = strangers.insert(name.to_owned(), pod.clone()),
                Keeper::Untold => untold += usize::from(wants_object()),
            }
        }
        let mut texts: Vec<String> = reasons.into_iter().map(unwritten).collect();
        texts.extend((untold > 0).then(|| of_untold(untold)));
        texts.extend(of_strangers(&self.those_that_stay(strangers, again)));
        texts
    }

    /// Those that are the same as before the agents were asked: of others who came and went
    /// meanwhile nothing is known.
    fn those_that_stay(&mut self, mut pods: Pods, again: impl FnOnce() -> Result<Pods>) -> Pods {
        if pods.is_empty() {
            return pods;
        }
        let now = again().unwrap_or_else(|error| {
            self.not_collected.insert(format!("pods once more: {}", chain(&*error)));
            Pods::new()
        });
        pods.retain(|name, pod| now.get(name) == Some(pod));
        pods
    }

    /// Agents on every node of the newest version, an operator, and no errors.
    pub(super) fn ok(&self) -> bool {
        let agents = self.installation.agents;
        agents.current
            && agents.desired > 0
            && agents.ready == agents.desired
            && self.installation.operators.is_some_and(|it| it.available > 0)
            && self.errors.is_empty()
    }

    /// The object says so only of pods whose agent does not.
    fn managed(&self) -> usize {
        let ours = |(name, _, keeper): &(&str, _, Keeper<'_>)| match keeper {
            Keeper::Agent(_) => true,
            Keeper::Other => false,
            Keeper::Untold => self.has_object(name),
        };
        self.keepers().filter(ours).count()
    }

    fn state(&self, component: &str, replicas: Replicas) -> String {
        let of = |remarks: &[Remark]| remarks.iter().filter(|it| it.component == component).count();
        match (of(&self.errors), of(&self.warnings), replicas.desired - replicas.ready) {
            (0, 0, 0) if replicas.desired > 0 => "OK".to_owned(),
            (0, 0, 0) => "on no node".to_owned(),
            (0, 0, missing) => format!("{missing} not ready"),
            (errors, warnings, _) => format!("{errors} errors, {warnings} warnings"),
        }
    }

    fn proxy(&self) -> String {
        if !self.installation.proxy {
            return DISABLED.to_owned();
        }
        let containers = self.installation.pods.iter().flat_map(|pod| &pod.containers);
        let running = containers.filter(|it| it.name == "proxy" && it.running).count();
        let desired = self.installation.agents.desired;
        let lonely = self.agents.iter().filter(|status| !status.l7_proxy).count();
        match (desired - i32::try_from(running).unwrap_or_default(), lonely) {
            (..=0, 0) if desired > 0 => "OK".to_owned(),
            (..=0, 0) => "on no node".to_owned(),
            (..=0, lonely) => format!("not connected on {lonely} of {} nodes", self.agents.len()),
            (missing, _) => format!("{missing} not running"),
        }
    }

    /// For people.
    pub(super) fn text(&self, verbose: bool) -> String {
        let mut text = String::new();
        self.write(&mut text, verbose).map_or_else(|_| String::new(), |()| text)
    }

    fn write(&self, out: &mut String, verbose: bool) -> std::fmt::Result {
        let Installation { agents, operators, .. } = &self.installation;
        let operator = operators.map_or_else(
            || "not installed".to_owned(),
            |operators| self.state(OPERATORS, operators),
        );
        let components = [
            ("Palisade:", self.state(AGENTS, *agents)),
            ("Operator:", operator),
            ("L7 proxy:", self.proxy()),
            ("Hubble Relay:", DISABLED.to_owned()),
            ("ClusterMesh:", DISABLED.to_owned()),
        ];
        for (picture, (name, state)) in LOGO.iter().zip(components) {
            writeln!(out, "{picture}{name:<20}{state}")?;
        }
        writeln!(out)?;
        replicas(out, "DaemonSet", AGENTS, *agents)?;
        if let Some(operators) = operators {
            replicas(out, "Deployment", OPERATORS, *operators)?;
        }
        let running = |component: &str| self.running(component);
        let counts = [AGENTS, OPERATORS].map(|it| (it, format!("Running: {}", running(it))));
        lines(out, "Containers:", counts.iter().map(|(name, text)| (*name, text.as_str())))?;
        let (managed, pods) = (self.managed(), self.cluster.pods.len());
        writeln!(out, "{:<23}{managed}/{pods} managed by Palisade", "Cluster Pods:")?;
        if !self.installation.version.is_empty() {
            writeln!(out, "{:<23}{}", "Helm chart version:", self.installation.version)?;
        }
        writeln!(out, "{:<23}{}", "Kubernetes version:", self.cluster.version)?;
        let images = self.installation.images();
        let images: Vec<(&str, String)> = images
            .iter()
            .flat_map(|(component, images)| images.iter().map(move |image| (component, image)))
            .map(|(component, (image, count))| (component.as_str(), format!("{image}: {count}")))
            .collect();
        lines(out, "Image versions", images.iter().map(|(name, text)| (*name, text.as_str())))?;
        self.remarks(out, "Errors:", &self.errors)?;
        self.remarks(out, "Warnings:", &self.warnings)?;
        for why in &self.not_collected {
            writeln!(out, "{:<23}{why}", "Not collected:")?;
        }
        if verbose { self.pods(out) } else { Ok(()) }
    }

    fn remarks(&self, out: &mut String, title: &str, remarks: &[Remark]) -> std::fmt::Result {
        let mut title = title;
        let of = |name: &str| {
            let remarks = remarks.iter().filter(|remark| remark.component == name);
            remarks.map(|it| (it.from.clone(), it.text.clone())).collect::<Vec<_>>()
        };
        let nodes = usize::try_from(self.installation.agents.desired).unwrap_or_default();
        for (name, said) in
            [(AGENTS, health::at_once(of(AGENTS), nodes)), (OPERATORS, of(OPERATORS))]
        {
            for (from, text) in said {
                writeln!(out, "{title:<23}{name:<21}{from}    {text}")?;
                title = "";
            }
        }
        Ok(())
    }

    fn pods(&self, out: &mut String) -> std::fmt::Result {
        writeln!(out)?;
        for pod in &self.installation.pods {
            let node = pod.node.as_deref().unwrap_or("on no node");
            writeln!(out, "{:<40} {:<20} {}", pod.name, node, pod.phase)?;
            for it in &pod.containers {
                let state = it.problem.as_deref().unwrap_or(match (it.running, it.ready) {
                    (true, true) => "ready",
                    (true, false) => "running",
                    (false, _) => "beginning",
                });
                let Container { name, restarts, image, .. } = it;
                let restarts = restarted(*restarts);
                writeln!(out, "  {name:<12} {state}, {restarts}, {image}")?;
            }
        }
        Ok(())
    }

    fn running(&self, component: &str) -> usize {
        let pods = self.installation.pods.iter();
        pods.filter(|pod| pod.component == component && pod.phase == "Running").count()
    }

    /// For programs; the keys are those that scripts for such clusters know.
    pub(super) fn json(&self) -> Value {
        let mut phases: BTreeMap<&str, BTreeMap<&str, usize>> = BTreeMap::new();
        for pod in &self.installation.pods {
            let of_component = phases.entry(&pod.component).or_default();
            *of_component.entry(&pod.phase).or_default() += 1;
        }
        let mut state = BTreeMap::from([(AGENTS, counts("DaemonSet", self.installation.agents))]);
        if let Some(operators) = self.installation.operators {
            state.insert(OPERATORS, counts("Deployment", operators));
        }
        let mut errors: BTreeMap<&str, BTreeMap<&str, [Vec<&str>; 2]>> = BTreeMap::new();
        for (index, remarks) in [&self.errors, &self.warnings].into_iter().enumerate() {
            for remark in remarks {
                let of_component = errors.entry(remark.component).or_default();
                of_component.entry(&remark.from).or_default()[index].push(&remark.text);
            }
        }
        let errors: BTreeMap<_, BTreeMap<_, _>> = errors
            .into_iter()
            .map(|(component, all)| {
                let all = all.into_iter().map(|(from, [errors, warnings])| {
                    (from, json!({ "Errors": errors, "Warnings": warnings, "Disabled": false }))
                });
                (component, all.collect())
            })
            .collect();
        json!({
            "image_count": self.installation.images(),
            "phase_count": phases,
            "pod_state": state,
            "pods_count": { "all": self.cluster.pods.len(), "by_cilium": self.managed() },
            "cilium_status": self.agents.iter()
                .map(|status| (status.node.as_str(), status))
                .collect::<BTreeMap<_, _>>(),
            "cilium_endpoints": {},
            "errors": errors,
            "collection_errors": self.not_collected,
            "config_errors": [],
            "helm_chart_version": self.installation.version,
            "kubernetes_version": self.cluster.version,
        })
    }
}

/// Who gave a pod its address.
enum Keeper<'a> {
    /// The agent of its node, which tells this of the pod's object.
    Agent(&'a EndpointObject),
    /// Not the agent of its node.
    Other,
    /// That agent does not tell, or there is none.
    Untold,
}

fn unwritten((why, count): (&str, usize)) -> String {
    let pods = counted(count, "pod is", "pods are");
    format!("{pods} managed by Palisade, but without a CiliumEndpoint yet: {why}")
}

fn of_untold(count: usize) -> String {
    let pods = counted(count, "pod has", "pods have");
    format!(
        "{pods} an address and no CiliumEndpoint, on nodes where no agent said which pods are its own"
    )
}

/// With the names of some of them: they are to be deleted.
fn of_strangers(pods: &Pods) -> Option<String> {
    let mut names: Vec<&str> = pods.keys().take(NAMED).map(String::as_str).collect();
    let more = format!("and {} more", pods.len() - names.len());
    names.extend((pods.len() > NAMED).then_some(&*more));
    let count = counted(pods.len(), "pod has", "pods have");
    (!pods.is_empty()).then(|| {
        format!(
            "{count} an address that Palisade did not give, and no policy; delete such pods, and \
             what manages them starts them anew: {}",
            names.join(", ")
        )
    })
}

fn restarted(times: i32) -> String {
    counted(times.unsigned_abs() as usize, "restart", "restarts")
}

fn counted(count: usize, one: &str, more: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { more })
}

fn counts(kind: &str, replicas: Replicas) -> Value {
    json!({
        "Type": kind,
        "Desired": replicas.desired,
        "Ready": replicas.ready,
        "Available": replicas.available,
        "Unavailable": replicas.desired - replicas.available,
    })
}

fn errors(cluster: &Cluster, installation: &Installation) -> Vec<Remark> {
    let mut errors = Vec::new();
    for pod in &installation.pods {
        for container in &pod.containers {
            let Some(problem) = &container.problem else { continue };
            errors.push(Remark {
                component: component(pod),
                from: pod.name.clone(),
                text: format!("container {}: {problem}", container.name),
            });
        }
        if let (Some(why), AGENTS) = (&pod.unschedulable, component(pod)) {
            errors.push(Remark { component: AGENTS, from: pod.name.clone(), text: why.clone() });
        }
    }
    errors.extend(cluster.without_network.iter().map(|node| {
        Remark {
            component: AGENTS,
            from: node.clone(),
            text: "the node has no pod network (Node.spec.podCIDRs): start the controller manager \
               with --allocate-node-cidrs, or: palisade config set ipam=cluster-pool"
                .to_owned(),
        }
    }));
    if installation.operators.is_none() {
        errors.push(Remark {
            component: OPERATORS,
            from: OPERATORS.to_owned(),
            text: "the Deployment is not there: palisade upgrade puts it back".to_owned(),
        });
    }
    errors
}

fn warnings(installation: &Installation) -> Vec<Remark> {
    let mut warnings = Vec::new();
    if !installation.agents.current {
        warnings.push(Remark {
            component: AGENTS,
            from: AGENTS.to_owned(),
            text: "not every node has the newest version yet".to_owned(),
        });
    }
    for pod in &installation.pods {
        if let (Some(why), OPERATORS) = (&pod.unschedulable, component(pod)) {
            warnings.push(Remark {
                component: OPERATORS,
                from: pod.name.clone(),
                text: format!("waits for a node of its own: {why}"),
            });
        }
        for container in pod.containers.iter().filter(|it| it.running && it.restarts > 0) {
            let Container { name, restarts, .. } = container;
            // It may be nothing to worry about: an operator that lost its Lease ends, too.
            let after = container.ended.as_ref().map(|how| format!(", the last one after: {how}"));
            warnings.push(Remark {
                component: component(pod),
                from: pod.name.clone(),
                text: format!(
                    "container {name}: {}{}",
                    restarted(*restarts),
                    after.unwrap_or_default()
                ),
            });
        }
    }
    warnings
}

fn component(pod: &PodState) -> &'static str {
    if pod.component == OPERATORS { OPERATORS } else { AGENTS }
}

fn replicas(out: &mut String, kind: &str, name: &str, it: Replicas) -> std::fmt::Result {
    let Replicas { desired, ready, available, .. } = it;
    write!(
        out,
        "{kind:<23}{name:<21}Desired: {desired}, Ready: {ready}/{desired}, \
         Available: {available}/{desired}"
    )?;
    if available < desired {
        write!(out, ", Unavailable: {}/{desired}", desired - available)?;
    }
    writeln!(out)
}

fn lines<'a>(
    out: &mut String,
    title: &str,
    entries: impl Iterator<Item = (&'a str, &'a str)>,
) -> std::fmt::Result {
    let mut title = title;
    for (name, text) in entries {
        writeln!(out, "{title:<23}{name:<21}{text}")?;
        title = "";
    }
    Ok(())
}

#[cfg(test)]
mod tests;
