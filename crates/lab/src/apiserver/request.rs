//! What a request asks for, read from its method, path and query.

use std::collections::HashMap;

use super::error::ApiError;

/// The parts of an API path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Target {
    /// Group; empty for core.
    pub group: String,
    /// Version.
    pub version: String,
    /// Namespace, if the path names one.
    pub namespace: Option<String>,
    /// Plural.
    pub resource: String,
    /// Object, if the path names one.
    pub name: Option<String>,
    /// Subresource, if any.
    pub subresource: Option<String>,
}

/// Paths under `/api` and `/apis`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Path {
    /// `/api`.
    CoreVersions,
    /// `/apis`.
    Groups,
    /// `/apis/GROUP`.
    Group(String),
    /// `/api/v1`, `/apis/GROUP/VERSION`.
    Resources {
        /// Group.
        group: String,
        /// Version.
        version: String,
    },
    /// An object, a collection, or a subresource.
    Resource(Target),
}

/// Reads a path; `None` if it is not one of an API.
pub(super) fn parse_path(path: &str) -> Option<Path> {
    let mut segments = Vec::new();
    for segment in path.split('/').filter(|segment| !segment.is_empty()) {
        segments.push(percent_decode(segment)?);
    }
    let parts: Vec<&str> = segments.iter().map(String::as_str).collect();
    match parts.as_slice() {
        ["api"] => Some(Path::CoreVersions),
        ["apis"] => Some(Path::Groups),
        ["apis", group] => Some(Path::Group((*group).to_owned())),
        ["api", version] => {
            Some(Path::Resources { group: String::new(), version: (*version).to_owned() })
        }
        ["apis", group, version] => {
            Some(Path::Resources { group: (*group).to_owned(), version: (*version).to_owned() })
        }
        ["api", version, rest @ ..] => target("", version, rest).map(Path::Resource),
        ["apis", group, version, rest @ ..] => target(group, version, rest).map(Path::Resource),
        _ => None,
    }
}

fn target(group: &str, version: &str, rest: &[&str]) -> Option<Target> {
    // `/namespaces/NAME/status` is about the namespace itself.
    let (namespace, rest) = match rest {
        ["namespaces", _] | ["namespaces", _, "status" | "finalize"] => (None, rest),
        ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (Some(*namespace), rest),
        _ => (None, rest),
    };
    let (resource, name, subresource) = match rest {
        [resource] => (*resource, None, None),
        [resource, name] => (*resource, Some(*name), None),
        [resource, name, subresource] => (*resource, Some(*name), Some(*subresource)),
        _ => return None,
    };
    Some(Target {
        group: group.to_owned(),
        version: version.to_owned(),
        namespace: namespace.map(str::to_owned),
        resource: resource.to_owned(),
        name: name.map(str::to_owned),
        subresource: subresource.map(str::to_owned),
    })
}

/// Undoes `%XX`; `None` if malformed or not UTF-8.
pub(super) fn percent_decode(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut index = 0;
    while index < bytes.len() {
        if bytes[index] == b'%' {
            let hex = text.get(index + 1..index + 3)?;
            out.push(u8::from_str_radix(hex, 16).ok()?);
            index += 3;
        } else {
            out.push(bytes[index]);
            index += 1;
        }
    }
    String::from_utf8(out).ok()
}

/// A query string.
#[derive(Clone, Debug, Default)]
pub(super) struct Query(HashMap<String, Vec<String>>);

impl Query {
    /// Reads `a=b&c=d`.
    pub(super) fn parse(query: Option<&str>) -> Self {
        let mut values: HashMap<String, Vec<String>> = HashMap::new();
        for pair in query.unwrap_or("").split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let decode = |text: &str| percent_decode(&text.replace('+', " "));
            if let (Some(name), Some(value)) = (decode(name), decode(value)) {
                values.entry(name).or_default().push(value);
            }
        }
        Self(values)
    }

    /// The first value, if not empty.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        let value = self.0.get(name)?.first()?;
        (!value.is_empty()).then_some(value.as_str())
    }

    /// All values.
    pub(super) fn all(&self, name: &str) -> &[String] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    /// A flag: present and not false.
    pub(super) fn flag(&self, name: &str) -> bool {
        match self.0.get(name).and_then(|values| values.first()) {
            None => false,
            Some(value) => !matches!(value.as_str(), "false" | "0"),
        }
    }

    /// A number.
    pub(super) fn number(&self, name: &str) -> Result<Option<u64>, ApiError> {
        let Some(text) = self.get(name) else { return Ok(None) };
        match text.parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(ApiError::bad_request(format!(
                "query parameter {name:?}: {text:?} is not a non-negative number"
            ))),
        }
    }

    /// `dryRun=All`.
    pub(super) fn dry_run(&self) -> Result<bool, ApiError> {
        match self.all("dryRun") {
            [] => Ok(false),
            values if values.iter().all(|value| value == "All") => Ok(true),
            _ => {
                Err(ApiError::bad_request("query parameter \"dryRun\": only \"All\" is supported"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(path: &str) -> Target {
        match parse_path(path) {
            Some(Path::Resource(target)) => target,
            other => panic!("{path}: {other:?}"),
        }
    }

    #[test]
    fn paths_of_objects() {
        let target = resource("/api/v1/namespaces/default/pods/a/log");
        assert_eq!(target.namespace.as_deref(), Some("default"));
        assert_eq!(target.resource, "pods");
        assert_eq!(target.subresource.as_deref(), Some("log"));
        let target = resource("/api/v1/namespaces/default");
        assert_eq!(
            (target.resource.as_str(), target.name.as_deref()),
            ("namespaces", Some("default"))
        );
        let target = resource("/api/v1/namespaces/default/finalize");
        assert_eq!(target.subresource.as_deref(), Some("finalize"));
        let target = resource("/apis/apps/v1/deployments");
        assert_eq!((target.group.as_str(), target.resource.as_str()), ("apps", "deployments"));
        assert_eq!(target.namespace, None);
    }

    #[test]
    fn queries_are_decoded() {
        let query = Query::parse(Some("labelSelector=a%3Db%2Cc&watch&x=false"));
        assert_eq!(query.get("labelSelector"), Some("a=b,c"));
        assert!(query.flag("watch"));
        assert!(!query.flag("x"));
        assert!(!query.flag("y"));
    }
}
