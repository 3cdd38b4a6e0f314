//! Which kinds are served, and under which paths.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use super::builtin::{self, Builtin};
use super::crd::Custom;
use super::schema::{Definitions, Schema};

/// A kind as it is served in one version.
#[derive(Debug)]
pub struct Resource {
    /// API group; empty for core.
    pub group: String,
    /// Version.
    pub version: String,
    /// Kind.
    pub kind: String,
    /// Kind of its lists.
    pub list_kind: String,
    /// Plural, as in URLs.
    pub plural: String,
    /// Singular.
    pub singular: String,
    /// Short names.
    pub short_names: Vec<String>,
    /// Groups of resources, such as `all`.
    pub categories: Vec<String>,
    /// In namespaces?
    pub namespaced: bool,
    /// Subresources.
    pub subresources: Vec<String>,
    /// Where its objects are stored: `group/plural`.
    pub storage: Arc<str>,
    /// Name of its schema.
    pub definition: String,
    /// All schemas that it can refer to.
    pub definitions: Arc<Definitions>,
    /// `metadata.generation` counts changes of the specification.
    pub generation: bool,
    /// What only custom resources have.
    pub custom: Option<Custom>,
}

static NOTHING: Value = Value::Null;

impl Resource {
    fn builtin(kind: &Builtin) -> Self {
        Self {
            group: kind.group.to_owned(),
            version: kind.version.to_owned(),
            kind: kind.kind.to_owned(),
            list_kind: format!("{}List", kind.kind),
            plural: kind.plural.to_owned(),
            singular: kind.kind.to_lowercase(),
            short_names: kind.short.iter().map(|&name| name.to_owned()).collect(),
            categories: if kind.all { vec!["all".to_owned()] } else { Vec::new() },
            namespaced: kind.namespaced,
            subresources: kind.subresources.iter().map(|&name| name.to_owned()).collect(),
            storage: format!("{}/{}", storage_group(kind), kind.plural).into(),
            definition: kind.definition.to_owned(),
            definitions: builtin::DEFINITIONS.clone(),
            generation: kind.generation,
            custom: None,
        }
    }

    /// `v1`, `apps/v1`.
    pub fn api_version(&self) -> String {
        group_version(&self.group, &self.version)
    }

    /// The kind's schema.
    pub fn schema(&self) -> Schema<'_> {
        let node = self.definitions.get(&self.definition).unwrap_or(&NOTHING);
        Schema::new(node, &self.definitions)
    }

    /// Is this subresource served?
    pub fn has(&self, subresource: &str) -> bool {
        self.subresources.iter().any(|name| name == subresource)
    }

    /// Is this the built-in kind `plural` of `group`?
    pub fn is(&self, group: &str, plural: &str) -> bool {
        self.custom.is_none() && self.group == group && self.plural == plural
    }

    /// `group/plural` if built in, else empty: what per-kind behaviour is chosen by.
    pub fn builtin_key(&self) -> &str {
        if self.custom.is_some() { "" } else { &self.storage }
    }
}

/// Events of `core` and `events.k8s.io` are the same objects in two shapes.
fn storage_group(kind: &Builtin) -> &'static str {
    if kind.plural == "events" { "" } else { kind.group }
}

/// `v1`, `apps/v1`.
pub fn group_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

/// The served kinds at one moment.
#[derive(Debug, Default)]
pub struct Registry {
    /// (group, version, plural) → resource.
    resources: BTreeMap<(String, String, String), Arc<Resource>>,
}

impl Registry {
    /// The built-in kinds and those of the given definitions.
    pub fn new(custom: impl IntoIterator<Item = Resource>) -> Self {
        let builtin = builtin::KINDS.iter().map(Resource::builtin);
        let resources = builtin.chain(custom).map(|resource| {
            let key = (resource.group.clone(), resource.version.clone(), resource.plural.clone());
            (key, Arc::new(resource))
        });
        Self { resources: resources.collect() }
    }

    /// A kind by its path.
    pub fn find(&self, group: &str, version: &str, plural: &str) -> Option<Arc<Resource>> {
        self.resources.get(&(group.into(), version.into(), plural.into())).cloned()
    }

    /// A kind by group and plural, in whichever version.
    pub fn any_version(&self, group: &str, plural: &str) -> Option<Arc<Resource>> {
        self.iter().find(|found| found.group == group && found.plural == plural).cloned()
    }

    /// All kinds, in order of group and version.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.resources.values()
    }

    /// One entry per stored kind (a kind may be served in several versions).
    pub fn stored(&self) -> BTreeMap<Arc<str>, Arc<Resource>> {
        self.iter().map(|resource| (resource.storage.clone(), resource.clone())).collect()
    }

    /// Groups with their versions, core first, the most stable version first.
    pub fn groups(&self) -> Vec<(String, Vec<String>)> {
        let mut groups: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        let served = self.iter().map(|found| (found.group.as_str(), found.version.as_str()));
        for (group, version) in served.chain(REVIEWS.iter().map(|r| (r.group, r.version))) {
            let versions = groups.entry(group).or_default();
            if !versions.contains(&version) {
                versions.push(version);
            }
        }
        let sorted = groups.into_iter().map(|(group, mut versions)| {
            versions.sort_by_key(|version| std::cmp::Reverse(priority(version)));
            (group.to_owned(), versions.into_iter().map(str::to_owned).collect())
        });
        sorted.collect()
    }
}

/// A kind that is only ever created, to ask a question.
#[derive(Debug)]
pub struct Review {
    /// API group.
    pub group: &'static str,
    /// Version.
    pub version: &'static str,
    /// Kind.
    pub kind: &'static str,
    /// Plural.
    pub plural: &'static str,
    /// In namespaces?
    pub namespaced: bool,
}

const fn review(group: &'static str, kind: &'static str, plural: &'static str) -> Review {
    Review { group, version: "v1", kind, plural, namespaced: false }
}

/// The reviews that are answered.
pub const REVIEWS: &[Review] = &[
    review("authentication.k8s.io", "SelfSubjectReview", "selfsubjectreviews"),
    review("authentication.k8s.io", "TokenReview", "tokenreviews"),
    Review {
        namespaced: true,
        ..review("authorization.k8s.io", "LocalSubjectAccessReview", "localsubjectaccessreviews")
    },
    review("authorization.k8s.io", "SelfSubjectAccessReview", "selfsubjectaccessreviews"),
    review("authorization.k8s.io", "SelfSubjectRulesReview", "selfsubjectrulesreviews"),
    review("authorization.k8s.io", "SubjectAccessReview", "subjectaccessreviews"),
];

/// Order of versions: v2 before v1 before v1beta2 before v1alpha1 before anything else.
pub fn priority(version: &str) -> (u8, u32, u32) {
    fn parse(version: &str) -> Option<(u8, u32, u32)> {
        let rest = version.strip_prefix('v')?;
        for (stage, marker) in [(1, "alpha"), (2, "beta")] {
            if let Some((major, minor)) = rest.split_once(marker) {
                return Some((stage, major.parse().ok()?, minor.parse().ok()?));
            }
        }
        Some((3, rest.parse().ok()?, 0))
    }
    parse(version).unwrap_or((0, 0, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_by_stability() {
        let mut versions = vec!["v1alpha1", "v2beta1", "v1", "foo", "v2", "v2beta2"];
        versions.sort_by_key(|version| std::cmp::Reverse(priority(version)));
        assert_eq!(versions, ["v2", "v1", "v2beta2", "v2beta1", "v1alpha1", "foo"]);
    }
}
