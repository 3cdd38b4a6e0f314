//! The values of Secrets that rules on HTTP headers refer to.

use std::collections::BTreeMap;

use palisade_policy::l7::{SecretRef, Secrets, field};

/// The namespace of the Secrets that policies may use, unless another is configured.
pub const NAMESPACE: &str = "palisade-secrets";

/// The values that the proxy may compare headers with, of Secrets by their names in that namespace
/// and their values by key: those that are text and that a header can have. Whoever wants a policy
/// to use a Secret of another namespace copies it, as [`SecretRef::copy`] has it. A reference names
/// no key where there is only one.
#[must_use]
pub fn values<'a>(
    secrets: impl IntoIterator<Item = (&'a str, &'a BTreeMap<String, Vec<u8>>)>,
) -> Secrets {
    let mut values = Vec::new();
    for (name, data) in secrets {
        let Some((namespace, name)) = name.split_once('.') else { continue };
        let reference = |key: Option<&String>| SecretRef {
            namespace: namespace.into(),
            name: name.into(),
            key: key.cloned(),
        };
        for (key, value) in data {
            let text = std::str::from_utf8(value).ok();
            let Some(value) = text.filter(|text| field::is_value(text.as_bytes())) else {
                continue;
            };
            values.push((reference(Some(key)), value.to_owned()));
            if data.len() == 1 {
                values.push((reference(None), value.to_owned()));
            }
        }
    }
    values.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_copies_that_headers_can_have() {
        let data = |pairs: &[(&str, &[u8])]| -> BTreeMap<String, Vec<u8>> {
            pairs.iter().map(|(key, value)| ((*key).to_owned(), value.to_vec())).collect()
        };
        let one = data(&[("a", b"1")]);
        let two = data(&[("a", b"1"), ("b", b"2\n")]);
        let binary = data(&[("a", b"\xff")]);
        let all = [("x.one", &one), ("x.t.wo", &two), ("x.binary", &binary), ("plain", &one)];
        let values = values(all);
        let get = |name: &str, key: Option<&str>| {
            let key = key.map(str::to_owned);
            let secret = SecretRef { namespace: "x".into(), name: name.into(), key };
            assert_eq!(secret.copy(), format!("x.{name}"));
            values.get(&secret).map(str::to_owned)
        };
        assert_eq!(get("one", None).as_deref(), Some("1"));
        assert_eq!(get("one", Some("a")).as_deref(), Some("1"));
        assert_eq!(get("t.wo", Some("a")).as_deref(), Some("1"));
        assert_eq!(get("t.wo", None), None, "which of them?");
        assert_eq!(get("t.wo", Some("b")), None, "a line break is none of a header");
        assert_eq!((get("binary", None), get("plain", None)), (None, None));
    }
}
