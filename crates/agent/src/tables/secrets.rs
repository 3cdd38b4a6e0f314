//! Values that rules on HTTP headers refer to.

use std::{collections::BTreeMap, fmt};

use palisade_policy::{
    l7::{HeaderValue, SecretRef, Secrets},
    model::{Application, Direction, Policy},
};

use super::{ObjectName, Row, Table, Tables, join, policies::PolicyContent};

/// A `v1 Secret`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    /// Its name.
    pub name: ObjectName,
    /// Values by key.
    pub data: BTreeMap<String, Vec<u8>>,
}

impl fmt::Debug for Secret {
    /// Without the values: what is printed for debugging ends in logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret {} {:?}", self.name, self.data.keys())
    }
}

impl Row for Secret {
    type Key = ObjectName;
    const TABLE: &'static str = "secrets";
    const COLUMNS: &'static [&'static str] = &["NAME", "KEYS"];

    fn key(&self) -> ObjectName {
        self.name.clone()
    }

    fn columns(&self) -> Vec<String> {
        let keys: Vec<&String> = self.data.keys().collect();
        vec![self.name.to_string(), join(&keys)]
    }
}

/// The values that headers are compared with.
pub fn values(secrets: &Table<Secret>) -> Secrets {
    palisade_api::secrets::values(secrets.rows().map(|secret| (&*secret.name.name, &secret.data)))
}

/// Whether a header rule of the policy refers to a Secret.
pub fn are_used_by(policy: &Policy) -> bool {
    used_by(policy).next().is_some()
}

/// What a policy lacks for its header rules: the field, what is missing, and how to bring it into
/// the namespace `home`.
pub fn missing(policy: &Policy, secrets: &Secrets, home: &str) -> Option<String> {
    let missing = used_by(policy).filter(|(_, _, secret)| secrets.get(secret).is_none());
    let problems = missing.map(|(path, header, secret)| {
        let SecretRef { namespace, name, key } = secret;
        let copy = secret.copy();
        let which = match key {
            Some(key) => format!("with one line of text under the key `{key}`"),
            None => "with one key and one line of text under it".to_owned(),
        };
        format!(
            "{path}: no value of header `{header}` is right, because there is no Secret `{copy}` \
             in namespace `{home}` {which}, without a line break at its end or blanks \
             around it; copy Secret `{namespace}/{name}` there under the name `{copy}`"
        )
    });
    let problems: Vec<String> = problems.collect();
    (!problems.is_empty()).then(|| problems.join("; "))
}

/// What stands while Secrets cannot be read, if any policy needs one. Nobody says then that a Secret
/// is gone, so the values that were read last stand; a Secret that is said to be gone has none.
pub fn unreadable(tables: &Tables) -> Option<String> {
    let Tables { secrets, secrets_namespace, policies, .. } = tables;
    let error = secrets.error()?;
    let users = policies.rows().filter(
        |row| matches!(&row.content, PolicyContent::Accepted(policy) if are_used_by(policy)),
    );
    let users: Vec<String> = users.map(|row| row.id.to_string()).collect();
    let stands = match secrets.is_complete() {
        true => "go on with the values that were read last",
        false => "match nothing",
    };
    (!users.is_empty()).then(|| {
        format!(
            "Secrets of namespace `{secrets_namespace}` cannot be read ({error}): until they can, \
             `headerMatches` that compare with one {stands}, in {}",
            users.join(", ")
        )
    })
}

/// Fields, headers, and what these are compared with.
fn used_by(policy: &Policy) -> impl Iterator<Item = (String, &str, &SecretRef)> {
    let sections = policy
        .rules
        .iter()
        .flat_map(|rule| Direction::BOTH.map(|direction| rule.section(direction)));
    let http = sections.flat_map(|section| &section.entries).filter_map(|entry| {
        match &entry.application {
            Application::Http(rules) => Some((entry.path.as_str(), rules)),
            _ => None,
        }
    });
    let rules = http.flat_map(|(path, rules)| {
        (0..).zip(rules).map(move |(n, rule): (usize, _)| (format!("{path}[{n}]"), rule))
    });
    rules.flat_map(|(path, rule)| {
        rule.headers.iter().filter_map(move |header| match &header.value {
            Some(HeaderValue::Secret(secret)) => {
                Some((format!("{path}.headerMatches"), header.name.as_str(), secret))
            }
            _ => None,
        })
    })
}
