//! Labels with a source: `k8s:app=web`, `reserved:host`.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

/// Labels of Kubernetes objects.
pub const SOURCE_K8S: &str = "k8s";
/// Labels that only this system gives out.
pub const SOURCE_RESERVED: &str = "reserved";
/// In a selector: whatever the source.
pub const SOURCE_ANY: &str = "any";

/// Key of the label that holds a pod's namespace.
pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
/// What the keys of a namespace's own labels are prefixed with.
pub const NAMESPACE_LABELS: &str = "io.cilium.k8s.namespace.labels.";
/// Key of the label that holds a pod's service account.
pub const SERVICE_ACCOUNT: &str = "io.cilium.k8s.policy.serviceaccount";
/// Key of the label that holds a pod's cluster.
pub const CLUSTER: &str = "io.cilium.k8s.policy.cluster";

/// One label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Label {
    /// Key.
    pub key: String,
    /// Who says so: [`SOURCE_K8S`], [`SOURCE_RESERVED`], …
    pub source: String,
    /// Value, often empty for reserved labels.
    pub value: String,
}

impl Label {
    /// A label of the given source.
    pub fn new(
        source: impl Into<String>,
        key: impl Into<String>,
        value: impl Into<String>,
    ) -> Self {
        Self { key: key.into(), source: source.into(), value: value.into() }
    }

    /// A Kubernetes label.
    pub fn k8s(key: impl Into<String>, value: impl Into<String>) -> Self {
        Self::new(SOURCE_K8S, key, value)
    }

    /// A reserved label.
    pub fn reserved(key: impl Into<String>) -> Self {
        Self::new(SOURCE_RESERVED, key, "")
    }

    /// Reads `source:key=value`, `source:key` or `key=value` (source `unspec`).
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let (name, value) = text.split_once('=').unwrap_or((text, ""));
        let (source, key) = name.split_once(':').unwrap_or(("unspec", name));
        Self::new(source, key, value)
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.source, self.key)?;
        if self.value.is_empty() {
            return Ok(());
        }
        write!(f, "={}", self.value)
    }
}

/// A set of labels: one value for each source and key, in the order of key and source.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Labels(Vec<Label>);

impl Labels {
    /// No labels.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Adds a label, in place of one with the same source and key.
    pub fn insert(&mut self, label: Label) {
        let found = self.0.binary_search_by(|other| {
            (other.key.as_str(), other.source.as_str()).cmp(&(&label.key, &label.source))
        });
        match found {
            Ok(at) => self.0[at] = label,
            Err(at) => self.0.insert(at, label),
        }
    }

    /// All labels with a key, of every source.
    #[must_use]
    pub fn with_key(&self, key: &str) -> &[Label] {
        let start = self.0.partition_point(|label| label.key.as_str() < key);
        let count = self.0[start..].iter().take_while(|label| label.key == key).count();
        &self.0[start..start + count]
    }

    /// The value of a label of exactly this source.
    #[must_use]
    pub fn get(&self, source: &str, key: &str) -> Option<&str> {
        self.with_key(key).iter().find(|l| l.source == source).map(|l| l.value.as_str())
    }

    /// The labels in order.
    pub fn iter(&self) -> core::slice::Iter<'_, Label> {
        self.0.iter()
    }

    /// How many labels.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The namespace of a pod.
    #[must_use]
    pub fn namespace(&self) -> Option<&str> {
        self.get(SOURCE_K8S, POD_NAMESPACE)
    }

    /// As `CiliumIdentity.security-labels` writes it: `source:key` to value.
    #[must_use]
    pub fn to_security_labels(&self) -> BTreeMap<String, String> {
        self.0
            .iter()
            .map(|label| (format!("{}:{}", label.source, label.key), label.value.clone()))
            .collect()
    }

    /// Reads what [`Labels::to_security_labels`] writes.
    #[must_use]
    pub fn from_security_labels(labels: &BTreeMap<String, String>) -> Self {
        labels
            .iter()
            .map(|(name, value)| {
                let (source, key) = name.split_once(':').unwrap_or(("unspec", name));
                Label::new(source, key, value)
            })
            .collect()
    }
}

impl FromIterator<Label> for Labels {
    fn from_iter<I: IntoIterator<Item = Label>>(labels: I) -> Self {
        let mut set = Self::new();
        for label in labels {
            set.insert(label);
        }
        set
    }
}

impl<'a> IntoIterator for &'a Labels {
    type Item = &'a Label;
    type IntoIter = core::slice::Iter<'a, Label>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Display for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, label) in self.0.iter().enumerate() {
            if n > 0 {
                f.write_str(",")?;
            }
            label.fmt(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_holds_one_value_for_each_source_and_key() {
        let labels: Labels =
            [Label::k8s("b", "1"), Label::new("any", "b", "2"), Label::k8s("b", "3")]
                .into_iter()
                .collect();
        assert_eq!(labels.to_string(), "any:b=2,k8s:b=3");
        assert_eq!(labels.get("k8s", "b"), Some("3"));
        assert_eq!(labels.get("k8s", "a"), None);
        assert_eq!(labels.with_key("b").len(), 2);
    }

    #[test]
    fn security_labels_survive_the_round_trip() {
        let labels: Labels =
            [Label::k8s("app", "x"), Label::reserved("host")].into_iter().collect();
        let map = labels.to_security_labels();
        assert_eq!(map.get("k8s:app").map(String::as_str), Some("x"));
        assert_eq!(Labels::from_security_labels(&map), labels);
    }

    #[test]
    fn parse_reads_what_display_writes() {
        for text in ["k8s:app=web", "reserved:host", "k8s:a=b=c"] {
            assert_eq!(Label::parse(text).to_string(), text);
        }
    }
}
