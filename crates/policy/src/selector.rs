//! Selectors over labels.

use std::{collections::BTreeSet, fmt};

use serde::{Deserialize, Serialize};

use crate::label::{Label, Labels, SOURCE_ANY};

/// What a requirement speaks of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Key {
    /// Source, `any` for every one.
    pub source: String,
    /// Key of the label.
    pub key: String,
}

impl Key {
    /// A key of labels of the given source.
    pub fn new(source: impl Into<String>, key: impl Into<String>) -> Self {
        Self { source: source.into(), key: key.into() }
    }

    fn covers(&self, label: &Label) -> bool {
        self.source == SOURCE_ANY || self.source == label.source
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.source, self.key)
    }
}

/// What a requirement asks of a label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Operator {
    /// The label is there, with one of these values.
    In(BTreeSet<String>),
    /// The label is not there, or with another value.
    NotIn(BTreeSet<String>),
    /// The label is there.
    Exists,
    /// The label is not there.
    DoesNotExist,
}

/// One requirement.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Requirement {
    /// Which label.
    pub key: Key,
    /// What about it.
    pub operator: Operator,
}

impl Requirement {
    /// The label has exactly this value.
    pub fn equals(key: Key, value: impl Into<String>) -> Self {
        Self { key, operator: Operator::In(BTreeSet::from([value.into()])) }
    }

    /// The label is there.
    #[must_use]
    pub const fn exists(key: Key) -> Self {
        Self { key, operator: Operator::Exists }
    }

    /// Whether the labels meet the requirement.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        let mut found = labels.with_key(&self.key.key).iter().filter(|l| self.key.covers(l));
        match &self.operator {
            Operator::In(values) => found.any(|label| values.contains(&label.value)),
            Operator::NotIn(values) => !found.any(|label| values.contains(&label.value)),
            Operator::Exists => found.next().is_some(),
            Operator::DoesNotExist => found.next().is_none(),
        }
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |values: &BTreeSet<String>| {
            values.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
        };
        match &self.operator {
            Operator::In(values) if values.len() == 1 => {
                let value = list(values);
                let equals = if value.is_empty() { "" } else { "=" };
                write!(f, "{}{equals}{value}", self.key)
            }
            Operator::In(values) => write!(f, "{} in ({})", self.key, list(values)),
            Operator::NotIn(values) => write!(f, "{} notin ({})", self.key, list(values)),
            Operator::Exists => write!(f, "{} exists", self.key),
            Operator::DoesNotExist => write!(f, "{} does not exist", self.key),
        }
    }
}

/// All requirements must be met; none at all is met by everybody.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Selector {
    /// The requirements.
    pub requirements: Vec<Requirement>,
}

impl Selector {
    /// A selector with the given requirements.
    #[must_use]
    pub fn new(mut requirements: Vec<Requirement>) -> Self {
        requirements.sort();
        requirements.dedup();
        Self { requirements }
    }

    /// Whether the labels meet every requirement.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        self.requirements.iter().all(|requirement| requirement.matches(labels))
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.requirements.is_empty() {
            return f.write_str("everybody");
        }
        for (n, requirement) in self.requirements.iter().enumerate() {
            if n > 0 {
                f.write_str(",")?;
            }
            requirement.fmt(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_on_present_and_absent_labels() {
        let labels: Labels =
            [Label::k8s("app", "x"), Label::reserved("host")].into_iter().collect();
        let values = |list: &[&str]| list.iter().map(|v| (*v).to_owned()).collect();
        let check = |source: &str, key: &str, operator: Operator| {
            Selector::new(vec![Requirement { key: Key::new(source, key), operator }])
                .matches(&labels)
        };
        assert!(check("k8s", "app", Operator::In(values(&["x", "y"]))));
        assert!(!check("k8s", "app", Operator::In(values(&["y"]))));
        assert!(!check("k8s", "gone", Operator::In(values(&["y"]))));
        assert!(!check("k8s", "app", Operator::NotIn(values(&["x"]))));
        assert!(check("k8s", "app", Operator::NotIn(values(&["y"]))));
        assert!(check("k8s", "gone", Operator::NotIn(values(&["y"]))));
        assert!(check("any", "app", Operator::Exists));
        assert!(!check("k8s", "gone", Operator::Exists));
        assert!(!check("k8s", "app", Operator::DoesNotExist));
        assert!(check("k8s", "gone", Operator::DoesNotExist));
        assert!(!check("k8s", "host", Operator::Exists), "sources are not mixed");
        assert!(check("any", "host", Operator::Exists));
        assert!(Selector::default().matches(&labels));
        assert!(Selector::default().matches(&Labels::new()));
    }
}
