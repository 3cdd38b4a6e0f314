//! Names as messages carry them.

use std::fmt;

/// Most bytes of a name on the wire, the root's label included.
const MAX_NAME: usize = 255;
/// Most bytes of a label.
const MAX_LABEL: usize = 63;

/// A name without compression, its letters in lower case: names that are the same are equal.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Box<[u8]>);

impl Name {
    /// The labels in their order, without the root's.
    pub fn labels(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = &*self.0;
        std::iter::from_fn(move || {
            let (length, tail) = rest.split_first()?;
            let (label, tail) = tail.split_at_checked(usize::from(*length))?;
            rest = tail;
            (!label.is_empty()).then_some(label)
        })
    }

    /// The name with its end `old` replaced by `new`; `None` unless `old` is a true suffix of it,
    /// and the result is a name.
    pub fn redirected(&self, old: &Self, new: &Self) -> Option<Self> {
        let mut start = 0;
        while self.0.len() - start > old.0.len() {
            start += usize::from(self.0[start]) + 1;
        }
        if start == 0 || self.0[start..] != *old.0 {
            return None;
        }
        let wire = [&self.0[..start], &new.0].concat();
        (wire.len() <= MAX_NAME).then(|| Self(wire.into()))
    }

    /// Lower case, dots between the labels and none at the end; the root is empty. Every byte that
    /// is no letter, digit, hyphen or underscore is `\NNN`: a dot is always the end of a label.
    pub fn text(&self) -> String {
        let mut text = String::with_capacity(self.0.len());
        for label in self.labels() {
            if !text.is_empty() {
                text.push('.');
            }
            for byte in label {
                match byte {
                    b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => text.push(char::from(*byte)),
                    _ => text.push_str(&format!("\\{byte:03}")),
                }
            }
        }
        text
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.", self.text())
    }
}

/// A name in the making.
#[derive(Default)]
pub(super) struct Labels(Vec<u8>);

impl Labels {
    /// Adds a label; `false` if the name would not be one any more.
    pub(super) fn push(&mut self, label: &[u8]) -> bool {
        let fits =
            (1..=MAX_LABEL).contains(&label.len()) && self.0.len() + label.len() + 2 <= MAX_NAME;
        if fits {
            self.0.push(label.len() as u8);
            self.0.extend(label.iter().map(u8::to_ascii_lowercase));
        }
        fits
    }

    pub(super) fn finish(mut self) -> Name {
        self.0.push(0);
        Name(self.0.into())
    }
}

#[cfg(test)]
pub(super) fn name(text: &str) -> Name {
    let mut labels = Labels::default();
    for label in text.split('.').filter(|label| !label.is_empty()) {
        assert!(labels.push(label.as_bytes()), "{text} is no name");
    }
    labels.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_in_labels_do_not_make_labels() {
        let mut labels = Labels::default();
        assert!(labels.push(b"api.example") && labels.push(b"com"));
        assert_eq!(labels.finish().text(), "api\\046example.com");
        let mut labels = Labels::default();
        assert!(labels.push(b"a\0b\\") && labels.push("\u{0430}pi".as_bytes()));
        assert_eq!(labels.finish().text(), "a\\000b\\092.\\208\\176pi");
        assert_eq!(name("").text(), "");
    }

    #[test]
    fn names_are_bounded() {
        let mut labels = Labels::default();
        assert!(!labels.push(&[b'a'; 64]) && !labels.push(b""));
        for _ in 0..3 {
            assert!(labels.push(&[b'a'; 63]));
        }
        assert!(!labels.push(&[b'a'; 62]));
        assert!(labels.push(&[b'a'; 61]));
        assert!(!labels.push(b"a"));
        assert_eq!(labels.finish().0.len(), MAX_NAME);
    }

    #[test]
    fn only_true_suffixes_are_redirected() {
        let redirected = |a: &str, old: &str, new: &str| {
            name(a).redirected(&name(old), &name(new)).map(|name| name.text())
        };
        assert_eq!(redirected("a.b.old.org", "old.org", "new.net"), Some("a.b.new.net".into()));
        assert_eq!(redirected("a.b", "", "c"), Some("a.b.c".into()));
        assert_eq!(redirected("old.org", "old.org", "new.net"), None);
        assert_eq!(redirected("xold.org", "old.org", "new.net"), None);
        assert_eq!(redirected("org", "old.org", "new.net"), None);
        let long = format!("{0}.{0}.{0}", "a".repeat(63));
        assert_eq!(redirected("c.b", "b", &format!("{long}.{}", "a".repeat(61))), None);
    }
}
