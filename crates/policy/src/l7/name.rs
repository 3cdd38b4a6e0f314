use std::fmt;

use serde::{Deserialize, Serialize};

/// Which DNS names a rule means, for questions, answers and TLS server names. Compared without
/// regard to case and to a final dot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum NamePattern {
    /// This one: lower case, without a final dot.
    Name(String),
    /// Those that the pattern matches: `*` stands for any letters, digits, `-` and `_` inside one
    /// label, a leading `**.` for one label or more, `*` or `**` alone for every name.
    Pattern(String),
}

/// Why a text names nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// There is nothing.
    #[error("it is empty")]
    Empty,
    /// A label without a letter.
    #[error("it has an empty label: no name matches")]
    EmptyLabel,
    /// Longer than names are.
    #[error("it is longer than a name can be ({0}): no name matches")]
    TooLong(&'static str),
    /// No name has such a character.
    #[error("`{0}` is in no name: letters, digits, `-`, `_` and `.` are")]
    Character(char),
}

impl NamePattern {
    /// A name.
    ///
    /// # Errors
    /// If no name is like that.
    pub fn name(text: &str) -> Result<Self, NameError> {
        checked(text, "").map(Self::Name)
    }

    /// A pattern.
    ///
    /// # Errors
    /// If it can match no name.
    pub fn pattern(text: &str) -> Result<Self, NameError> {
        checked(text, "*").map(Self::Pattern)
    }

    /// Matches every name, the root included.
    #[must_use]
    pub fn everything() -> Self {
        Self::Pattern("*".into())
    }

    /// Whether a name is meant. Dots inside labels have to be escaped somehow.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        let name = name.strip_suffix('.').unwrap_or(name);
        match self {
            Self::Name(own) => own.eq_ignore_ascii_case(name),
            Self::Pattern(pattern) if is_everything(pattern) => true,
            Self::Pattern(pattern) => match pattern.strip_prefix("**.") {
                Some(rest) => any_suffix(rest, name),
                None => labels_match(pattern, name),
            },
        }
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        let (Self::Name(text) | Self::Pattern(text)) = self;
        text
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The name of a server as a TLS client hello may have it, in lower case: no final dot, nothing
/// but letters, digits, hyphens and underscores in the labels.
#[must_use]
pub fn server_name(bytes: &[u8]) -> Option<String> {
    let name = std::str::from_utf8(bytes).ok()?;
    let label = |label: &str| label.len() <= 63 && is_plain(label);
    (name.len() <= 253 && name.split('.').all(label)).then(|| name.to_ascii_lowercase())
}

fn is_everything(pattern: &str) -> bool {
    matches!(pattern, "*" | "**")
}

fn checked(text: &str, wildcard: &str) -> Result<String, NameError> {
    let text = text.strip_suffix('.').unwrap_or(text);
    if text.is_empty() {
        return Err(NameError::Empty);
    }
    let known = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c) || wildcard.contains(c);
    if let Some(stranger) = text.chars().find(|c| !known(*c)) {
        return Err(NameError::Character(stranger));
    }
    if text.split('.').any(str::is_empty) {
        return Err(NameError::EmptyLabel);
    }
    // A `*` may stand for nothing.
    let letters = |text: &str| text.chars().filter(|c| *c != '*').count();
    if text.split('.').any(|label| letters(label) > 63) {
        return Err(NameError::TooLong("63 characters a label"));
    }
    if letters(text) > 253 {
        return Err(NameError::TooLong("253 characters"));
    }
    Ok(text.to_ascii_lowercase())
}

/// Whether the rest of the pattern matches what is left of the name without one label or more.
fn any_suffix(rest: &str, name: &str) -> bool {
    name.match_indices('.').any(|(dot, _)| {
        let skipped = &name[..dot];
        skipped.split('.').all(is_plain) && labels_match(rest, &name[dot + 1..])
    })
}

fn is_plain(label: &str) -> bool {
    !label.is_empty() && label.bytes().all(is_label_byte)
}

const fn is_label_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')
}

fn labels_match(pattern: &str, name: &str) -> bool {
    let mut labels = name.split('.');
    pattern.split('.').all(|pattern| {
        labels.next().is_some_and(|label| {
            !label.is_empty() && label_matches(pattern.as_bytes(), label.as_bytes())
        })
    }) && labels.next().is_none()
}

/// One label against one with `*`. The last `*` met is where to go back to, so that it takes no
/// more than the product of both lengths.
fn label_matches(pattern: &[u8], label: &[u8]) -> bool {
    let (mut p, mut l) = (0, 0);
    let mut back: Option<(usize, usize)> = None;
    while l < label.len() {
        match pattern.get(p) {
            Some(b'*') => {
                back = Some((p + 1, l));
                p += 1;
            }
            Some(byte) if byte.eq_ignore_ascii_case(&label[l]) => {
                p += 1;
                l += 1;
            }
            _ => {
                let Some((after, taken)) = back.filter(|(_, taken)| is_label_byte(label[*taken]))
                else {
                    return false;
                };
                back = Some((after, taken + 1));
                (p, l) = (after, taken + 1);
            }
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stay_inside_labels() {
        for (pattern, yes, no) in [
            ("*.x.io", "a.x.io", "x.io"),
            ("*.x.io", "A.X.io.", "a.b.x.io"),
            ("*.x.io", "a-b_1.x.io", "a.x.io.evil.com"),
            ("a*.x.io", "a.x.io", "b.x.io"),
            ("*a*b.io", "xaxab.io", "xaxa.io"),
            ("**.x.io", "a.x.io", "x.io"),
            ("**.x.io", "a.b.c.x.io", "ax.io"),
            ("**.*.io", "a.b.io", "b.io"),
            ("x**y", "xaay", "xa.y"),
            ("*.*", "a.b", "a"),
            ("x.*", "x.b", "x."),
            ("*.io", "a.io", "a b.io"),
            ("*.io", "a.io", r"a\.b.io"),
            ("**.io", "a.io", r"a\b.c.io"),
            ("*.x.io", "a.x.io", ".x.io"),
            ("**.x.io", "a.x.io", "a..x.io"),
        ] {
            let pattern = NamePattern::pattern(pattern).unwrap();
            assert!(pattern.matches(yes), "{pattern} {yes}");
            assert!(!pattern.matches(no), "{pattern} {no}");
        }
        for everything in ["*", "**"] {
            let everything = NamePattern::pattern(everything).unwrap();
            assert!(["", ".", "a", "a.b.", "x y"].into_iter().all(|name| everything.matches(name)));
        }
        assert!(NamePattern::name("Deathstar.Empire.").unwrap().matches("deathstar.EMPIRE"));
        assert!(!NamePattern::name("a.b").unwrap().matches("a.b.c"));
    }

    #[test]
    fn servers_are_named_in_one_way() {
        assert_eq!(server_name(b"A.x-1_.io").as_deref(), Some("a.x-1_.io"));
        let long = [&b"a."[..], &[b'a'; 64]].concat();
        for bytes in [&b""[..], b".", b"a.com.", b".a", b"a..b", b"a b", b"*.a", b"\xff", &long] {
            assert_eq!(server_name(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn what_can_match_no_name_is_refused() {
        for text in ["", ".", "a..b", ".a", "a b", "a/b", "ä.de", &"a".repeat(64)] {
            assert!(NamePattern::pattern(text).is_err(), "{text}");
            assert!(NamePattern::name(text).is_err(), "{text}");
        }
        assert!(NamePattern::name("*.a").is_err());
        assert!(NamePattern::name(&"abc.".repeat(64)).is_err());
        assert!(NamePattern::pattern(&format!("**{}", "a".repeat(63))).is_ok());
    }
}
