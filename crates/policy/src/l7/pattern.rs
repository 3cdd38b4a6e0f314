use std::{collections::HashMap, fmt, sync::Arc};

use regex_automata::{
    Input, MatchKind, PatternSet, meta::Regex, nfa::thompson::WhichCaptures, util::syntax,
};
use regex_syntax::hir::{Hir, HirKind, Look};
use serde::{Deserialize, Serialize};

/// Bytes that a compiled pattern may take.
const SIZE_LIMIT: usize = 256 << 10;
/// Bytes of a pattern's text.
const LENGTH_LIMIT: usize = 4096;

/// A regular expression over a whole string, in linear time: `/a` does not match `/ab`. Classes
/// such as `\d` and `\w` are ASCII, as in RE2.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern(String);

/// Why a text is no pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// It is no regular expression.
    #[error("not a regular expression: {0}")]
    Syntax(String),
    /// It would take too much memory.
    #[error("the regular expression is too large: {0}")]
    TooLarge(String),
}

impl Pattern {
    /// Checks a text.
    ///
    /// # Errors
    /// If it does not compile, or takes too much memory when it does.
    pub fn new(text: &str) -> Result<Self, PatternError> {
        Compiled::new(text, Case::Sensitive)?;
        Ok(Self(text.to_owned()))
    }

    /// As [`Self::new`], for hosts: they are matched without regard to case, which takes more memory.
    ///
    /// # Errors
    /// As there.
    pub fn host(text: &str) -> Result<Self, PatternError> {
        Compiled::new(text, Case::Ignored)?;
        Ok(Self(text.to_owned()))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it can match no other text than this.
    #[must_use]
    pub fn is_only(&self, text: &str) -> bool {
        let word = parse(&self.0, Case::Sensitive).ok().and_then(|hir| word(&hir));
        word.is_some_and(|word| word == text.as_bytes())
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A text that was a pattern before, where it was written down: it is read again, but compiled, which
/// tells whether it is too large, only by whoever matches with it.
impl TryFrom<String> for Pattern {
    type Error = PatternError;

    fn try_from(text: String) -> Result<Self, PatternError> {
        parse(&text, Case::Sensitive)?;
        Ok(Self(text))
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.0
    }
}

/// Whether letters differ by their case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Case {
    Sensitive,
    Ignored,
}

/// A pattern that is ready to match.
#[derive(Clone, Debug)]
pub(super) enum Compiled {
    /// Most patterns are plain words.
    Literal(Box<[u8]>, Case),
    Regex(Arc<Regex>),
}

impl Compiled {
    pub(super) fn new(text: &str, case: Case) -> Result<Self, PatternError> {
        let hir = parse(text, case)?;
        if let Some(word) = literal(&hir) {
            return Ok(Self::Literal(word, case));
        }
        Regex::builder()
            .configure(Regex::config().nfa_size_limit(Some(SIZE_LIMIT)).utf8_empty(false))
            .build_from_hir(&whole(hir))
            .map(|regex| Self::Regex(Arc::new(regex)))
            .map_err(|error| PatternError::TooLarge(one_line(&error.to_string())))
    }

    pub(super) fn matches(&self, text: &[u8]) -> bool {
        match self {
            Self::Literal(word, Case::Sensitive) => **word == *text,
            Self::Literal(word, Case::Ignored) => word.eq_ignore_ascii_case(text),
            Self::Regex(regex) => regex.is_match(text),
        }
    }
}

/// Patterns of many rules, asked in one pass over the text. A rule may have none.
#[derive(Clone, Debug)]
pub(super) struct Patterns {
    /// Of each rule, whether it has no pattern: it matches every text.
    free: Vec<bool>,
    /// The rules whose pattern is a plain word.
    words: HashMap<Box<[u8]>, Vec<usize>>,
    sets: Vec<Set>,
}

/// Regular expressions in one automaton, and the rules that they belong to.
#[derive(Clone, Debug)]
struct Set {
    regex: Regex,
    rules: Vec<usize>,
}

impl Patterns {
    /// A pattern that does not compile is told, and counts as none.
    pub(super) fn new<'p>(
        patterns: impl Iterator<Item = Option<&'p Pattern>>,
        mut note: impl FnMut(usize, PatternError),
    ) -> Self {
        let mut own = Self { free: Vec::new(), words: HashMap::new(), sets: Vec::new() };
        let (mut rules, mut regexes) = (Vec::new(), Vec::new());
        for (rule, pattern) in patterns.enumerate() {
            own.free.push(pattern.is_none());
            let Some(pattern) = pattern else { continue };
            match parse(&pattern.0, Case::Sensitive).map(|hir| (literal(&hir), hir)) {
                Ok((Some(word), _)) => own.words.entry(word).or_default().push(rule),
                Ok((None, hir)) => {
                    rules.push(rule);
                    regexes.push(whole(hir));
                }
                Err(error) => {
                    own.free[rule] = true;
                    note(rule, error);
                }
            }
        }
        own.add(&rules, &regexes, &mut note);
        own
    }

    /// No set takes more than a single pattern may: what does not fit is halved until it does.
    fn add(
        &mut self,
        rules: &[usize],
        regexes: &[Hir],
        note: &mut impl FnMut(usize, PatternError),
    ) {
        let [first, others @ ..] = rules else { return };
        let config = Regex::config()
            .match_kind(MatchKind::All)
            .which_captures(WhichCaptures::None)
            .nfa_size_limit(Some(SIZE_LIMIT))
            .utf8_empty(false);
        match Regex::builder().configure(config).build_many_from_hir(regexes) {
            Ok(regex) => self.sets.push(Set { regex, rules: rules.to_vec() }),
            Err(error) if others.is_empty() => {
                self.free[*first] = true;
                note(*first, PatternError::TooLarge(one_line(&error.to_string())));
            }
            Err(_) => {
                let half = rules.len() / 2;
                self.add(&rules[..half], &regexes[..half], note);
                self.add(&rules[half..], &regexes[half..], note);
            }
        }
    }

    /// Passes that a text takes.
    #[cfg(test)]
    pub(super) fn passes(&self) -> usize {
        self.sets.len()
    }

    /// Of each rule, whether its pattern matches.
    pub(super) fn matching(&self, text: &[u8]) -> Vec<bool> {
        let mut matching = self.free.clone();
        for rule in self.words.get(text).into_iter().flatten() {
            matching[*rule] = true;
        }
        for Set { regex, rules } in &self.sets {
            let mut found = PatternSet::new(rules.len());
            regex.which_overlapping_matches(&Input::new(text), &mut found);
            for pattern in found.iter() {
                matching[rules[pattern.as_usize()]] = true;
            }
        }
        matching
    }
}

fn parse(text: &str, case: Case) -> Result<Hir, PatternError> {
    if text.len() > LENGTH_LIMIT {
        let message = format!("{} characters, at most {LENGTH_LIMIT} are allowed", text.len());
        return Err(PatternError::TooLarge(message));
    }
    let config = syntax::Config::new()
        .unicode(false)
        .utf8(false)
        .case_insensitive(case == Case::Ignored)
        .nest_limit(100);
    syntax::parse_with(text, &config)
        .map_err(|error| PatternError::Syntax(one_line(&error.to_string())))
}

/// Built from the parsed form: no text can break out of the anchors.
fn whole(hir: Hir) -> Hir {
    Hir::concat(vec![Hir::look(Look::Start), hir, Hir::look(Look::End)])
}

/// Without a regular expression, the text that alone matches.
fn literal(hir: &Hir) -> Option<Box<[u8]>> {
    match hir.kind() {
        HirKind::Empty => Some(Box::default()),
        HirKind::Literal(word) => Some(word.0.clone()),
        _ => None,
    }
}

/// The one text that can match.
fn word(hir: &Hir) -> Option<Vec<u8>> {
    match hir.kind() {
        HirKind::Empty | HirKind::Look(_) => Some(Vec::new()),
        HirKind::Literal(word) => Some(word.0.to_vec()),
        HirKind::Capture(group) => word(&group.sub),
        HirKind::Concat(parts) => {
            let words: Option<Vec<_>> = parts.iter().map(word).collect();
            words.map(|words| words.concat())
        }
        HirKind::Class(_) | HirKind::Repetition(_) | HirKind::Alternation(_) => None,
    }
}

/// The parser points at the place with several lines; the last one says what is wrong.
fn one_line(message: &str) -> String {
    let last = message.lines().last().unwrap_or_default();
    last.trim_start_matches("error: ").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, text: &str) -> bool {
        Compiled::new(pattern, Case::Sensitive).is_ok_and(|found| found.matches(text.as_bytes()))
    }

    #[test]
    fn one_word_however_it_is_written() {
        for (pattern, only) in [
            ("CONNECT", true),
            ("^(CONN)(?:ECT)$", true),
            (r"CONNE\x43T", true),
            ("CONNECT|GET", false),
            ("(?i)connect", false),
            ("CONNECT?", false),
            ("C.*", false),
            ("GET", false),
            ("", false),
        ] {
            assert_eq!(Pattern::new(pattern).unwrap().is_only("CONNECT"), only, "{pattern}");
        }
    }

    #[test]
    fn the_whole_text_has_to_match() {
        for (pattern, yes, no) in [
            ("/public", "/public", "/public?x=1"),
            ("/public", "/public", "x/public"),
            ("/a|/ab", "/ab", "/abc"),
            ("GET|PUT", "PUT", "GETPUT"),
            ("^/a$", "/a", "/a\n"),
            ("(?m)^/a$", "/a", "/a\n/b"),
            ("/a.c", "/abc", "/a\nc"),
            ("[0-9]+", "12", "1\u{663}"),
            (r"\d", "1", "\u{663}"),
            (r"\w+", "a_1", "é"),
            ("(?i)/A", "/a", "/b"),
            ("", "", "x"),
            ("(?x) /a # )|.*", "/a", "/b"),
        ] {
            assert!(matches(pattern, yes), "{pattern} {yes}");
            assert!(!matches(pattern, no), "{pattern} {no}");
        }
    }

    #[test]
    fn what_does_not_compile_or_is_too_large_is_refused() {
        for text in ["[", "(", "a)|(b", "*", r"(\w)\1", "(?=a)", r"\p{Nonsense}"] {
            assert!(matches!(Pattern::new(text), Err(PatternError::Syntax(_))), "{text}");
        }
        let long = "a".repeat(LENGTH_LIMIT + 1);
        for text in [long.as_str(), "(a{1000}){1000}", "((a{100}){100}){100}"] {
            assert!(matches!(Pattern::new(text), Err(PatternError::TooLarge(_))), "{text:.20}");
        }
        let nested = format!("{}a{}", "(".repeat(500), ")".repeat(500));
        assert!(Pattern::new(&nested).is_err());
    }

    #[test]
    fn a_pattern_read_back_is_checked_again() {
        let json = serde_json::to_string(&Pattern::new("/a+").unwrap()).unwrap();
        assert_eq!(serde_json::from_str::<Pattern>(&json).unwrap().as_str(), "/a+");
        assert!(serde_json::from_str::<Pattern>("\"[\"").is_err());
    }

    #[test]
    fn no_pattern_takes_more_than_linear_time() {
        let evil = Compiled::new("(a+)+b", Case::Sensitive).unwrap();
        let text = "a".repeat(64 << 10);
        let start = std::time::Instant::now();
        assert!(!evil.matches(text.as_bytes()));
        assert!(start.elapsed() < std::time::Duration::from_millis(500));
    }
}
