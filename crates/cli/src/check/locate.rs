//! Where the fields of a YAML document are.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::Spanned;

/// The lines of a document's fields; values themselves are not kept.
pub(super) enum Lines {
    Fields(Vec<(String, usize, Lines)>),
    Items(Vec<(usize, Lines)>),
    Scalar,
}

impl Lines {
    /// `None` where the text is no YAML.
    pub(super) fn read(document: &str) -> Option<Self> {
        serde_saphyr::from_str(document).ok()
    }

    /// The line, from 1, of a field such as `spec.ingress[0].ports[1].port`; of the nearest one
    /// above it where it is missing.
    pub(super) fn of(&self, path: &str) -> usize {
        let mut line = 1;
        let mut here = self;
        let mut rest = path;
        while let Some((at, deeper, remaining)) = here.step(rest) {
            (line, here, rest) = (at, deeper, remaining);
        }
        line
    }

    fn step<'a>(&self, path: &'a str) -> Option<(usize, &Self, &'a str)> {
        match self {
            Self::Scalar => None,
            Self::Items(items) => {
                let (index, rest) = path.strip_prefix('[')?.split_once(']')?;
                let (line, item) = items.get(index.parse::<usize>().ok()?)?;
                Some((*line, item, rest))
            }
            // The names of labels have dots too: the longest name that fits is meant.
            Self::Fields(fields) => {
                let path = path.strip_prefix('.').unwrap_or(path);
                let fits = fields.iter().filter_map(|(name, line, value)| {
                    let rest = path.strip_prefix(name.as_str())?;
                    let ends = rest.is_empty() || rest.starts_with(['.', '[']);
                    ends.then_some((name.len(), (*line, value, rest)))
                });
                fits.max_by_key(|(length, _)| *length).map(|(_, found)| found)
            }
        }
    }
}

fn line<T>(spanned: &Spanned<T>) -> usize {
    usize::try_from(spanned.referenced.line()).unwrap_or(usize::MAX)
}

impl<'de> Deserialize<'de> for Lines {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Reader)
    }
}

struct Reader;

impl<'de> Visitor<'de> for Reader {
    type Value = Lines;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Lines, A::Error> {
        let mut fields = Vec::new();
        while let Some(key) = map.next_key::<Spanned<String>>()? {
            let at = line(&key);
            fields.push((key.value, at, map.next_value()?));
        }
        Ok(Lines::Fields(fields))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Lines, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element::<Spanned<Lines>>()? {
            items.push((line(&item), item.value));
        }
        Ok(Lines::Items(items))
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<Lines, D::Error> {
        IgnoredAny::deserialize(inner)?;
        Ok(Lines::Scalar)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Lines, E> {
        Ok(Lines::Scalar)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Lines, E> {
        Ok(Lines::Scalar)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Lines, E> {
        Ok(Lines::Scalar)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Lines, E> {
        Ok(Lines::Scalar)
    }

    fn visit_str<E>(self, _: &str) -> Result<Lines, E> {
        Ok(Lines::Scalar)
    }

    fn visit_unit<E>(self) -> Result<Lines, E> {
        Ok(Lines::Scalar)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENT: &str = "\
kind: NetworkPolicy
spec:
  podSelector:
    matchLabels:
      app.kubernetes.io/name: web
      app: web
  ingress:
  - ports:
    - {port: 80}
    - protocol: TCP
      port: 99999
";

    #[test]
    fn fields_are_found_and_missing_ones_near_by() {
        let lines = Lines::read(DOCUMENT).expect("YAML");
        for (path, line) in [
            ("kind", 1),
            ("spec", 2),
            ("spec.podSelector.matchLabels.app.kubernetes.io/name", 5),
            ("spec.podSelector.matchLabels.app", 6),
            ("spec.ingress[0].ports[0].port", 9),
            ("spec.ingress[0].ports[1].port", 11),
            ("spec.ingress[0].from", 8),
            ("metadata.name", 1),
        ] {
            assert_eq!(lines.of(path), line, "{path}");
        }
    }
}
