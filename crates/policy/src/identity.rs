//! Security identities: which labels make one, which number it gets.

use std::collections::BTreeMap;

use palisade_abi::identity as number;

use crate::{
    hash::StableHasher,
    label::{CLUSTER, Label, Labels, NAMESPACE_LABELS, POD_NAMESPACE, SERVICE_ACCOUNT},
};

/// What the labels of a pod come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodLabels<'a> {
    /// Namespace.
    pub namespace: &'a str,
    /// Labels of the namespace.
    pub namespace_labels: Option<&'a BTreeMap<String, String>>,
    /// Labels of the pod.
    pub pod_labels: Option<&'a BTreeMap<String, String>>,
    /// Service account, `default` where the pod names none.
    pub service_account: &'a str,
    /// Name of the cluster.
    pub cluster: &'a str,
}

/// Keys that a pod must not give itself: they say where it lives.
fn is_injected(key: &str) -> bool {
    key == POD_NAMESPACE || key.starts_with("io.cilium.k8s.")
}

/// Whether a pod label takes part in identities. Labels that differ from replica to replica do
/// not: each would cost an identity.
#[must_use]
pub fn is_relevant(key: &str) -> bool {
    const DROPPED: [&str; 14] = [
        "io.kubernetes",
        "kubernetes.io",
        "k8s.io",
        "statefulset.kubernetes.io/pod-name",
        "apps.kubernetes.io/pod-index",
        "batch.kubernetes.io/job-completion-index",
        "batch.kubernetes.io/controller-uid",
        "topology.kubernetes.io",
        "pod-template-generation",
        "pod-template-hash",
        "controller-revision-hash",
        "controller-uid",
        "annotation",
        "etcd_node",
    ];
    if is_injected(key) || key.starts_with("app.kubernetes.io") {
        return true;
    }
    !key.contains("beta.kubernetes.io") && !DROPPED.iter().any(|prefix| key.starts_with(prefix))
}

/// The labels that make a pod's identity.
#[must_use]
pub fn security_labels(pod: &PodLabels<'_>) -> Labels {
    collect(pod, is_relevant)
}

/// All labels of a pod, those too that take no part in its identity: what a policy's *subject*
/// is matched with, so that a policy never fails to select a pod on its own node.
#[must_use]
pub fn endpoint_labels(pod: &PodLabels<'_>) -> Labels {
    collect(pod, |_| true)
}

fn collect(pod: &PodLabels<'_>, keep: impl Fn(&str) -> bool) -> Labels {
    let own = pod.pod_labels.into_iter().flatten();
    let namespace = pod.namespace_labels.into_iter().flatten();
    own.filter(|(key, _)| !is_injected(key) && keep(key))
        .map(|(key, value)| Label::k8s(key, value))
        .chain(namespace.map(|(key, value)| Label::k8s(format!("{NAMESPACE_LABELS}{key}"), value)))
        .chain([
            Label::k8s(POD_NAMESPACE, pod.namespace),
            Label::k8s(SERVICE_ACCOUNT, pod.service_account),
            Label::k8s(CLUSTER, pod.cluster),
        ])
        .collect()
}

/// The numbers that a set of labels may have, best first: every node tries the same ones in the
/// same order, so that the API server's atomic create is the only agreement needed.
pub fn candidates(labels: &Labels) -> impl Iterator<Item = u32> + use<> {
    const COUNT: u32 = number::CLUSTER_MAX - number::CLUSTER_MIN + 1;
    let mut hasher = StableHasher::new();
    for label in labels {
        hasher.write_str(&label.source);
        hasher.write_str(&label.key);
        hasher.write_str(&label.value);
    }
    let start = u32::try_from(hasher.finish() % u64::from(COUNT)).unwrap_or_default();
    (0..COUNT).map(move |step| number::CLUSTER_MIN + (start + step) % COUNT)
}

/// All reserved identities, [`number::UNKNOWN`] left out.
pub const RESERVED: [u32; 10] = [
    number::HOST,
    number::WORLD,
    number::UNMANAGED,
    number::HEALTH,
    number::INIT,
    number::REMOTE_NODE,
    number::KUBE_APISERVER,
    number::INGRESS,
    number::WORLD_IPV4,
    number::WORLD_IPV6,
];

/// The labels of a reserved identity.
#[must_use]
pub fn reserved(identity: u32) -> Option<Labels> {
    let keys: &[&str] = match identity {
        number::UNKNOWN => &["unknown"],
        number::HOST => &["host"],
        number::WORLD => &["world"],
        number::UNMANAGED => &["unmanaged"],
        number::HEALTH => &["health"],
        number::INIT => &["init"],
        number::REMOTE_NODE => &["remote-node"],
        number::KUBE_APISERVER => &["kube-apiserver", "remote-node"],
        number::INGRESS => &["ingress"],
        // Either is the world as well: a selector means no less than the entity.
        number::WORLD_IPV4 => &["world", "world-ipv4"],
        number::WORLD_IPV6 => &["world", "world-ipv6"],
        _ => return None,
    };
    Some(keys.iter().copied().map(Label::reserved).collect())
}

/// The labels that a node's own pods see it under.
#[must_use]
pub fn host(runs_api_server: bool) -> Labels {
    let role = runs_api_server.then_some("kube-apiserver");
    ["host"].into_iter().chain(role).map(Label::reserved).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn a_pod_cannot_say_where_it_lives() {
        let spoofed = labels(&[
            ("app", "x"),
            ("io.kubernetes.pod.namespace", "kube-system"),
            ("io.cilium.k8s.namespace.labels.team", "ops"),
            ("io.cilium.k8s.policy.serviceaccount", "admin"),
            ("io.cilium.k8s.policy.cluster", "other"),
        ]);
        let pod = PodLabels {
            namespace: "z",
            namespace_labels: None,
            pod_labels: Some(&spoofed),
            service_account: "default",
            cluster: "default",
        };
        for set in [security_labels(&pod), endpoint_labels(&pod)] {
            assert_eq!(
                set.to_string(),
                "k8s:app=x,k8s:io.cilium.k8s.policy.cluster=default,\
                 k8s:io.cilium.k8s.policy.serviceaccount=default,\
                 k8s:io.kubernetes.pod.namespace=z"
            );
        }
    }

    #[test]
    fn noisy_labels_make_no_identity_but_select_subjects() {
        let own = labels(&[
            ("app.kubernetes.io/name", "x"),
            ("pod-template-hash", "1"),
            ("statefulset.kubernetes.io/pod-name", "web-0"),
            ("failure-domain.beta.kubernetes.io/zone", "a"),
            ("topology.kubernetes.io/zone", "a"),
            ("kubernetes.io/hostname", "n"),
        ]);
        let team = labels(&[("kubernetes.io/metadata.name", "z"), ("team", "ops")]);
        let pod = PodLabels {
            namespace: "z",
            namespace_labels: Some(&team),
            pod_labels: Some(&own),
            service_account: "sa",
            cluster: "default",
        };
        let security = security_labels(&pod);
        assert_eq!(security.len(), 6);
        assert_eq!(security.get("k8s", "app.kubernetes.io/name"), Some("x"));
        assert_eq!(
            security.get("k8s", "io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name"),
            Some("z")
        );
        assert_eq!(endpoint_labels(&pod).len(), 11);
    }

    #[test]
    fn candidates_are_stable_and_cover_the_whole_space_once() {
        let set: Labels = [Label::k8s("app", "x")].into_iter().collect();
        // A change of this number would give every identity of a running cluster a new number.
        assert_eq!(candidates(&set).next(), candidates(&set).next());
        let all: std::collections::BTreeSet<u32> = candidates(&set).collect();
        assert_eq!(all.len(), 65_280);
        assert_eq!(all.first(), Some(&256));
        assert_eq!(all.last(), Some(&65_535));
    }
}
