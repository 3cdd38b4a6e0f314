//! Values that rules on HTTP headers refer to.

use std::{collections::BTreeMap, fmt};

use palisade_policy::l7::{SecretRef, Secrets};

use super::{ObjectName, Row, Table, join};

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

/// The values that the proxy may compare headers with: those that are text. Whoever wants a policy
/// to use the Secret `NAME` of a namespace copies it as `NAMESPACE.NAME` (namespaces have no dots).
/// A reference names no key where there is only one.
pub fn values(secrets: &Table<Secret>) -> Secrets {
    let mut values = Vec::new();
    for secret in secrets.rows() {
        let Some((namespace, name)) = secret.name.name.split_once('.') else { continue };
        let reference = |key: Option<&String>| SecretRef {
            namespace: namespace.into(),
            name: name.into(),
            key: key.cloned(),
        };
        for (key, value) in &secret.data {
            let Ok(value) = std::str::from_utf8(value) else { continue };
            values.push((reference(Some(key)), value.to_owned()));
            if secret.data.len() == 1 {
                values.push((reference(None), value.to_owned()));
            }
        }
    }
    values.into()
}
