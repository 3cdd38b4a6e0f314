use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use super::{
    edit::{Unwritable, edit},
    pattern::{Case, Compiled, Pattern, PatternError, Patterns},
};

/// Matches a request if all that it says is true of it; the default matches every request.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct HttpRule {
    /// The method, whose letters have a case.
    pub method: Option<Pattern>,
    /// Path and query.
    pub path: Option<Pattern>,
    /// The host that the client asks for, with its port if it names one or without; letters have
    /// no case.
    pub host: Option<Pattern>,
    /// The headers.
    pub headers: Vec<HeaderRule>,
}

impl fmt::Display for HttpRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { method, path, host, headers } = self;
        let mut said: Vec<String> = Vec::new();
        said.extend(method.as_ref().map(Pattern::to_string));
        said.extend(path.as_ref().map(Pattern::to_string));
        said.extend(host.as_ref().map(|host| format!("to host {host}")));
        said.extend(
            headers
                .iter()
                .filter(|header| header.mismatch == Mismatch::Fail)
                .map(|header| format!("with header {header}")),
        );
        if said.is_empty() {
            return f.write_str("any request");
        }
        f.write_str(&said.join(" "))
    }
}

impl HttpRule {
    /// What keeps a rule from admitting a request.
    #[must_use]
    pub fn difference(&self, request: &HttpRequest<'_>, secrets: &Secrets) -> Difference {
        let matcher = |rule| HttpMatcher::new(&[rule], secrets).0;
        if matcher(self.clone()).wants_secret(request) {
            return Difference::Secret;
        }
        let matches = |rule| matcher(rule).judge(request).is_some();
        let method = matches(Self { method: self.method.clone(), ..Self::default() });
        let path = matches(Self { path: self.path.clone(), ..Self::default() });
        match (path, method) {
            (true, true) => Difference::Rest,
            (true, false) => Difference::Method,
            (false, true) => Difference::Path,
            (false, false) => Difference::Both,
        }
    }

    /// A value that is not there, and without which the rule admits nothing that has not the header
    /// already.
    #[must_use]
    pub fn lacks(&self, secrets: &Secrets) -> Option<&SecretRef> {
        let admitting = |header: &&HeaderRule| {
            matches!(header.mismatch, Mismatch::Fail | Mismatch::Add | Mismatch::Replace)
        };
        let mut values = self.headers.iter().filter(admitting).map(|header| &header.value);
        values.find_map(|value| match value {
            Some(HeaderValue::Secret(secret)) if secrets.get(secret).is_none() => Some(secret),
            _ => None,
        })
    }
}

/// What a request is not as a rule says; the least first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Difference {
    /// Nothing, but a value that the rule would write into it is not there.
    Secret,
    /// The host or a header.
    Rest,
    /// The method of a path that matches.
    Method,
    /// The path.
    Path,
    /// Method and path.
    Both,
}

/// What one header has to be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct HeaderRule {
    /// Name, lower case.
    pub name: String,
    /// The value of every header of this name; `None`: one is there, whatever it says.
    pub value: Option<HeaderValue>,
    /// What becomes of a request of which that is not true.
    pub mismatch: Mismatch,
}

impl fmt::Display for HeaderRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            None => f.write_str(&self.name),
            Some(HeaderValue::Text(text)) => write!(f, "{}: {text}", self.name),
            Some(HeaderValue::Secret(secret)) => write!(f, "{} as in {secret}", self.name),
        }
    }
}

/// The value of a header.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum HeaderValue {
    /// This one.
    Text(String),
    /// What a secret holds; while it is not there, no header equals it.
    Secret(SecretRef),
}

/// Names a value in a `Secret`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SecretRef {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Key; `None`: the only one.
    pub key: Option<String>,
}

impl SecretRef {
    /// The name of the copy that is read: policies are given Secrets of one namespace only.
    /// Namespaces have no dots.
    #[must_use]
    pub fn copy(&self) -> String {
        format!("{}.{}", self.namespace, self.name)
    }
}

impl fmt::Display for SecretRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret {}/{}", self.namespace, self.name)?;
        match &self.key {
            Some(key) => write!(f, " (key `{key}`)"),
            None => Ok(()),
        }
    }
}

/// What becomes of a request whose header is not as a rule says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Mismatch {
    /// The rule does not match.
    Fail,
    /// The rule matches all the same, and the access log says so.
    Log,
    /// A header with the value is added.
    Add,
    /// The headers that differ are removed.
    Delete,
    /// The headers are replaced by one with the value.
    Replace,
}

impl Mismatch {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Fail, Self::Log, Self::Add, Self::Delete, Self::Replace];
}

/// Values of the secrets that rules refer to.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<(SecretRef, String)>", into = "Vec<(SecretRef, String)>")]
pub struct Secrets(BTreeMap<SecretRef, String>);

impl Secrets {
    /// A value, if it is there.
    #[must_use]
    pub fn get(&self, secret: &SecretRef) -> Option<&str> {
        self.0.get(secret).map(String::as_str)
    }
}

impl FromIterator<(SecretRef, String)> for Secrets {
    fn from_iter<T: IntoIterator<Item = (SecretRef, String)>>(pairs: T) -> Self {
        Self(pairs.into_iter().collect())
    }
}

impl From<Vec<(SecretRef, String)>> for Secrets {
    fn from(pairs: Vec<(SecretRef, String)>) -> Self {
        pairs.into_iter().collect()
    }
}

impl From<Secrets> for Vec<(SecretRef, String)> {
    fn from(secrets: Secrets) -> Self {
        secrets.0.into_iter().collect()
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// A request, as the proxy understood it and is about to send it on.
#[derive(Clone, Copy, Debug)]
pub struct HttpRequest<'a> {
    /// Method.
    pub method: &'a str,
    /// Path and query, normalised.
    pub target: &'a str,
    /// Host that the client asks for, with the port if the client named one.
    pub host: &'a str,
    /// Headers, names in lower case.
    pub headers: &'a [(&'a str, &'a [u8])],
}

impl HttpRequest<'_> {
    /// The headers as changes leave them.
    ///
    /// # Errors
    ///
    /// The request must not be sent.
    pub fn edited(&self, edits: &[HeaderEdit]) -> Result<Vec<(String, Vec<u8>)>, Unwritable> {
        let owned = self.headers.iter().map(|(name, value)| ((*name).into(), value.to_vec()));
        let mut headers = owned.collect();
        edit(edits, &mut headers)?;
        Ok(headers)
    }
}

/// Which rule lets a request pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Match {
    /// Its place in the list.
    pub rule: usize,
    /// What has to be done to the request, of all rules that match it.
    pub edits: Vec<HeaderEdit>,
}

/// What has to be done to a header.
#[derive(Clone, PartialEq, Eq)]
pub struct HeaderEdit {
    /// Name, lower case.
    pub name: String,
    /// What.
    pub change: HeaderChange,
}

/// What has to be done to the headers of one name. Values may be secret: never log them.
#[derive(Clone, PartialEq, Eq)]
pub enum HeaderChange {
    /// Say in the access log that they differ.
    Log,
    /// Add one with this value.
    Add(String),
    /// Remove them, but for those with this value.
    Remove {
        /// The value.
        except: Option<String>,
    },
    /// Remove them and add one with this value.
    Replace(String),
}

impl HeaderEdit {
    /// Whether the server sees another request for it, of one with these headers that other edits
    /// change first.
    fn is_felt<'a>(
        &'a self,
        headers: &[(&str, &'a [u8])],
        first: impl Iterator<Item = &'a HeaderEdit>,
    ) -> bool {
        let own = headers.iter().filter(|(name, _)| *name == self.name);
        let mut values: Vec<&[u8]> = own.map(|(_, value)| *value).collect();
        for edit in first.filter(|edit| edit.name == self.name) {
            edit.change.apply(&mut values);
        }
        let unchanged = values.clone();
        self.change.apply(&mut values);
        values != unchanged
    }
}

impl HeaderChange {
    /// Makes it of the values of the name.
    fn apply<'a>(&'a self, values: &mut Vec<&'a [u8]>) {
        match self {
            Self::Log => {}
            Self::Add(value) => values.push(value.as_bytes()),
            Self::Remove { except } => {
                values.retain(|value| except.as_ref().is_some_and(|it| it.as_bytes() == *value));
            }
            Self::Replace(value) => *values = vec![value.as_bytes()],
        }
    }
}

impl fmt::Debug for HeaderEdit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match &self.change {
            HeaderChange::Log => "log",
            HeaderChange::Add(_) => "add",
            HeaderChange::Remove { .. } => "remove",
            HeaderChange::Replace(_) => "replace",
        };
        write!(f, "{word} {}", self.name)
    }
}

/// Why a rule cannot be made ready to match.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{field}`: {error}")]
pub struct L7Error {
    /// Its place in the list.
    pub rule: usize,
    /// Which of its patterns.
    pub field: &'static str,
    /// What is wrong.
    pub error: PatternError,
}

/// Rules, ready to match.
#[derive(Clone, Debug)]
pub struct HttpMatcher {
    rules: Vec<Ready>,
    /// Their paths: most of what tells many rules apart.
    paths: Patterns,
    /// Whether any rule may change a request: then all of them have to be asked.
    edits: bool,
}

/// A rule but for its path.
#[derive(Clone, Debug)]
struct Ready {
    /// A pattern of it does not compile, and counts as none here.
    broken: bool,
    method: Option<Compiled>,
    host: Option<Compiled>,
    headers: Vec<ReadyHeader>,
}

/// What a rule says to a request.
enum Said {
    /// It does not match.
    Nothing,
    /// It matches, and this has to be done.
    Edits(Vec<HeaderEdit>),
    /// It matches, and the value that it would have the server see is not there. What another rule
    /// allows must not pass with the client's own value in its place.
    Unknown,
}

#[derive(Clone)]
struct ReadyHeader {
    name: String,
    value: Wanted,
    mismatch: Mismatch,
}

#[derive(Clone)]
enum Wanted {
    Anything,
    Value(String),
    /// The secret is not there.
    Nothing,
}

impl fmt::Debug for ReadyHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:?})", self.name, self.mismatch)
    }
}

impl HttpMatcher {
    /// Makes rules ready, and tells which patterns do not compile. A rule with such a pattern allows
    /// nothing; what it might change, if the pattern matched, is denied.
    #[must_use]
    pub fn new(rules: &[HttpRule], secrets: &Secrets) -> (Self, Vec<L7Error>) {
        let mut errors = Vec::new();
        let mut note = |rule, field, error| errors.push(L7Error { rule, field, error });
        let paths = rules.iter().map(|rule| rule.path.as_ref());
        let paths = Patterns::new(paths, |rule, error| note(rule, "path", error));
        let mut ready: Vec<Ready> = Vec::new();
        for (n, rule) in rules.iter().enumerate() {
            ready.push(Ready::new(rule, secrets, |field, error| note(n, field, error)));
        }
        for error in &errors {
            ready[error.rule].broken = true;
        }
        let edits = |header: &HeaderRule| header.mismatch != Mismatch::Fail;
        let edits = rules.iter().flat_map(|rule| &rule.headers).any(edits);
        (Self { rules: ready, paths, edits }, errors)
    }

    /// The first rule that matches a request; `None` denies it.
    #[must_use]
    pub fn judge(&self, request: &HttpRequest<'_>) -> Option<Match> {
        self.judge_by(request, |_| true)
    }

    /// As [`Self::judge`], by those of the rules that count.
    #[must_use]
    pub fn judge_by(
        &self,
        request: &HttpRequest<'_>,
        counts: impl Fn(usize) -> bool,
    ) -> Option<Match> {
        let mut found: Option<Match> = None;
        let paths = self.paths.matching(request.target.as_bytes());
        let rules = self.rules.iter().enumerate().filter(|(rule, _)| paths[*rule] && counts(*rule));
        for (rule, ready) in rules {
            let edits = match ready.judge(request) {
                Said::Nothing => continue,
                Said::Unknown => return None,
                Said::Edits(edits) => edits,
            };
            if ready.broken {
                let first = found.iter().flat_map(|found| &found.edits);
                if edits.iter().any(|edit| edit.is_felt(request.headers, first.clone())) {
                    return None;
                }
                continue;
            }
            let found = found.get_or_insert_with(|| Match { rule, edits: Vec::new() });
            if !self.edits {
                break;
            }
            for edit in edits {
                if !found.edits.contains(&edit) {
                    found.edits.push(edit);
                }
            }
        }
        found
    }

    /// Whether a rule matches a request for which it would need a value that is not there: then
    /// nothing lets the request pass.
    fn wants_secret(&self, request: &HttpRequest<'_>) -> bool {
        let paths = self.paths.matching(request.target.as_bytes());
        let mut rules = self.rules.iter().enumerate().filter(|(rule, _)| paths[*rule]);
        rules.any(|(_, ready)| matches!(ready.judge(request), Said::Unknown))
    }
}

impl Ready {
    fn new(
        rule: &HttpRule,
        secrets: &Secrets,
        mut note: impl FnMut(&'static str, PatternError),
    ) -> Self {
        let mut compile = |field, pattern: &Option<Pattern>, case| {
            let compiled = Compiled::new(pattern.as_ref()?.as_str(), case);
            compiled.map_err(|error| note(field, error)).ok()
        };
        let header = |rule: &HeaderRule| ReadyHeader {
            name: rule.name.clone(),
            value: match &rule.value {
                None => Wanted::Anything,
                Some(HeaderValue::Text(text)) => Wanted::Value(text.clone()),
                Some(HeaderValue::Secret(secret)) => secrets
                    .get(secret)
                    .map_or(Wanted::Nothing, |value| Wanted::Value(value.to_owned())),
            },
            mismatch: rule.mismatch,
        };
        Self {
            broken: false,
            method: compile("method", &rule.method, Case::Sensitive),
            host: compile("host", &rule.host, Case::Ignored),
            headers: rule.headers.iter().map(header).collect(),
        }
    }

    /// What it says to a request whose path matches.
    fn judge(&self, request: &HttpRequest<'_>) -> Said {
        let matches = |pattern: &Option<Compiled>, text: &str| {
            pattern.as_ref().is_none_or(|pattern| pattern.matches(text.as_bytes()))
        };
        let plain = matches(&self.method, request.method)
            && (matches(&self.host, request.host)
                || matches(&self.host, without_port(request.host)));
        if !plain {
            return Said::Nothing;
        }
        let mut edits = Vec::new();
        let mut known = true;
        for header in self.headers.iter().filter(|header| !header.is_satisfied(request.headers)) {
            if header.mismatch == Mismatch::Fail {
                return Said::Nothing;
            }
            match header.change() {
                Some(change) => edits.push(HeaderEdit { name: header.name.clone(), change }),
                None => known = false,
            }
        }
        if known { Said::Edits(edits) } else { Said::Unknown }
    }
}

impl ReadyHeader {
    /// Whether the header is there, and none of its name says anything else.
    fn is_satisfied(&self, headers: &[(&str, &[u8])]) -> bool {
        let mut own = headers.iter().filter(|(name, _)| *name == self.name).peekable();
        let there = own.peek().is_some();
        there
            && match &self.value {
                Wanted::Anything => true,
                Wanted::Nothing => false,
                Wanted::Value(value) => own.all(|(_, found)| *found == value.as_bytes()),
            }
    }

    /// What a mismatch asks for; `None`: nothing can be done, for want of the value.
    fn change(&self) -> Option<HeaderChange> {
        let value = match &self.value {
            Wanted::Value(value) => Some(value.clone()),
            Wanted::Anything | Wanted::Nothing => None,
        };
        match self.mismatch {
            Mismatch::Fail => None,
            Mismatch::Log => Some(HeaderChange::Log),
            Mismatch::Add => value.map(HeaderChange::Add),
            Mismatch::Delete => Some(HeaderChange::Remove { except: value }),
            Mismatch::Replace => value.map(HeaderChange::Replace),
        }
    }
}

/// A host without its port; an IPv6 address keeps its brackets.
fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arbitrary::Random;

    /// A rule whose path is matched by itself.
    struct Alone(Option<Compiled>, Ready);

    impl Alone {
        fn new(rule: &HttpRule) -> Self {
            let path = rule.path.as_ref();
            let path = path.map(|path| Compiled::new(path.as_str(), Case::Sensitive)).transpose();
            let mut broken = path.is_err();
            let mut rest = Ready::new(rule, &Secrets::default(), |_, _| broken = true);
            rest.broken = broken;
            Self(path.ok().flatten(), rest)
        }
    }

    /// What is read, but does not compile.
    fn too_large() -> Option<Pattern> {
        Some(Pattern::try_from("[ab]{9999}".to_owned()).expect("it is read"))
    }

    /// The headers after an edit.
    fn edited(mut headers: Vec<(String, String)>, edit: &HeaderEdit) -> Vec<(String, String)> {
        let others = |name: &String| *name != edit.name;
        match &edit.change {
            HeaderChange::Log => {}
            HeaderChange::Add(value) => headers.push((edit.name.clone(), value.clone())),
            HeaderChange::Remove { except } => {
                headers.retain(|(name, value)| others(name) || Some(value) == except.as_ref());
            }
            HeaderChange::Replace(value) => {
                headers.retain(|(name, _)| others(name));
                headers.push((edit.name.clone(), value.clone()));
            }
        }
        headers
    }

    /// Rule after rule: what [`HttpMatcher::judge_by`] has to come to.
    fn one_by_one(rules: &[Alone], counts: &[bool], request: &HttpRequest<'_>) -> Option<Match> {
        let headers = request.headers.iter().map(|(name, value)| {
            ((*name).to_owned(), String::from_utf8(value.to_vec()).expect("text"))
        });
        let mut headers: Vec<(String, String)> = headers.collect();
        let mut found: Option<Match> = None;
        for (n, Alone(path, rest)) in rules.iter().enumerate().filter(|(n, _)| counts[*n]) {
            if !path.as_ref().is_none_or(|path| path.matches(request.target.as_bytes())) {
                continue;
            }
            let edits = match rest.judge(request) {
                Said::Nothing => continue,
                Said::Unknown => return None,
                Said::Edits(edits) => edits,
            };
            if rest.broken {
                if edits.iter().any(|edit| edited(headers.clone(), edit) != headers) {
                    return None;
                }
                continue;
            }
            let found = found.get_or_insert_with(|| Match { rule: n, edits: Vec::new() });
            for edit in edits {
                if !found.edits.contains(&edit) {
                    headers = edited(headers, &edit);
                    found.edits.push(edit);
                }
            }
        }
        found
    }

    fn pattern(random: &mut Random) -> Option<Pattern> {
        const PIECES: [&str; 16] = [
            "/a",
            "/b",
            "/ab",
            "a",
            ".*",
            "[ab]+",
            "(/b)?",
            "(a|/)",
            "a{1,3}",
            "(?i:B)",
            "^",
            "$",
            "\\d",
            "|",
            "[^a]",
            "(/[ab]{40,80})?",
        ];
        if random.once_in(6) {
            return None;
        }
        if random.once_in(40) {
            return too_large();
        }
        let text: String = (0..random.below(5)).map(|_| *random.pick(&PIECES)).collect();
        Pattern::new(&text).ok()
    }

    fn digit(random: &mut Random) -> String {
        (*random.pick(&["1", "2"])).to_owned()
    }

    fn rule(random: &mut Random) -> HttpRule {
        let word = |random: &mut Random, words: &[&str]| match random.below(120) {
            0 => too_large(),
            1..40 => Some(Pattern::new(random.pick::<&str>(words)).expect("a pattern")),
            _ => None,
        };
        let header = |random: &mut Random| HeaderRule {
            name: "x".into(),
            value: random.once_in(2).then(|| HeaderValue::Text(digit(random))),
            mismatch: *random.pick(&Mismatch::ALL),
        };
        HttpRule {
            method: word(random, &["GET", "GET|PUT", "PUT"]),
            path: pattern(random),
            host: word(random, &["a", "A.*", "b:80"]),
            headers: (0..random.below(4) / 3).map(|_| header(random)).collect(),
        }
    }

    #[test]
    fn all_paths_at_once_say_what_each_says() {
        const PIECES: [&str; 8] = ["/a", "/b", "a", "b", "/", "B", "1", "\n"];
        let mut random = Random::new(7);
        let (mut allowed, mut denied) = (0, 0);
        for _ in 0..100 {
            let count = random.below(30);
            let rules: Vec<HttpRule> = (0..count).map(|_| rule(&mut random)).collect();
            let (matcher, _) = HttpMatcher::new(&rules, &Secrets::default());
            let alone: Vec<Alone> = rules.iter().map(Alone::new).collect();
            for _ in 0..30 {
                let target: String = (0..random.below(5)).map(|_| *random.pick(&PIECES)).collect();
                let headers: [(&str, &[u8]); 1] = [("x", *random.pick(&[b"1", b"2"]))];
                let request = HttpRequest {
                    method: random.pick::<&str>(&["GET", "PUT"]),
                    target: &target,
                    host: random.pick::<&str>(&["a", "a:80", "b:80", "c"]),
                    headers: if random.once_in(2) { &headers } else { &[] },
                };
                let found = matcher.judge(&request);
                let all = vec![true; count];
                let wanted = one_by_one(&alone, &all, &request);
                assert_eq!(found, wanted, "{rules:?} {request:?}");
                let some: Vec<bool> = (0..count).map(|_| random.once_in(2)).collect();
                let of_some = matcher.judge_by(&request, |rule| some[rule]);
                let wanted = one_by_one(&alone, &some, &request);
                assert_eq!(of_some, wanted, "{some:?} of {rules:?} {request:?}");
                *if found.is_some() { &mut allowed } else { &mut denied } += 1;
            }
        }
        assert!(allowed > 300 && denied > 300, "{allowed} {denied}");
    }

    #[test]
    fn what_is_too_large_for_one_pass_takes_several() {
        let rule = |n| HttpRule {
            path: Some(Pattern::new(&format!("/{n}/([a-z]{{90}})+|/all")).expect("a pattern")),
            ..HttpRule::default()
        };
        let rules: Vec<HttpRule> = (0..100).map(rule).collect();
        let (matcher, errors) = HttpMatcher::new(&rules, &Secrets::default());
        assert!(errors.is_empty() && matcher.paths.passes() > 1);
        let word = "w".repeat(90);
        let judge = |target: &str| {
            let request = HttpRequest { method: "GET", target, host: "a", headers: &[] };
            matcher.judge(&request).map(|found| found.rule)
        };
        for n in 0..100 {
            assert_eq!(judge(&format!("/{n}/{word}")), Some(n));
            assert_eq!(judge(&format!("/{n}/{word}w")), None);
        }
        assert_eq!(judge("/all"), Some(0));
    }

    /// `GET /good`, and a rule for everything that says something of a header and does not compile
    /// because of a field.
    fn good_and_broken(field: &str, mismatch: Mismatch) -> [HttpRule; 2] {
        let pattern = |text| Some(Pattern::new(text).expect("a pattern"));
        let header =
            HeaderRule { name: "x".into(), value: Some(HeaderValue::Text("1".into())), mismatch };
        let mut broken = HttpRule { headers: vec![header], ..HttpRule::default() };
        match field {
            "method" => broken.method = too_large(),
            "path" => broken.path = too_large(),
            _ => broken.host = too_large(),
        }
        [HttpRule { method: pattern("GET"), path: pattern("/good"), ..HttpRule::default() }, broken]
    }

    #[test]
    fn a_rule_that_does_not_compile_is_left_out() {
        for (field, mismatch) in ["method", "path", "host"]
            .into_iter()
            .flat_map(|field| Mismatch::ALL.map(|one| (field, one)))
        {
            let mut rules = good_and_broken(field, mismatch);
            for (good, broken) in [(0, 1), (1, 0)] {
                let (matcher, errors) = HttpMatcher::new(&rules, &Secrets::default());
                let [L7Error { rule, field: found, error: PatternError::TooLarge(_) }] =
                    &errors[..]
                else {
                    panic!("{field}: {errors:?}")
                };
                assert_eq!((*rule, *found), (broken, field));
                let judge = |method, target, headers: &[(&str, &[u8])], counts: &[usize]| {
                    let request = HttpRequest { method, target, host: "a", headers };
                    matcher.judge_by(&request, |rule| counts.contains(&rule))
                };
                let right: [(&str, &[u8]); 1] = [("x", b"1")];
                let wrong: [(&str, &[u8]); 1] = [("x", b"2")];
                let allowed = Some(Match { rule: good, edits: Vec::new() });
                // What it says nothing of, or agrees with, is as if it were not there.
                for headers in [&right[..], &wrong, &[]] {
                    assert_eq!(judge("GET", "/good", headers, &[good]), allowed, "{field}");
                    assert_eq!(judge("GET", "/other", headers, &[good, broken]), None, "{field}");
                    assert_eq!(judge("GET", "/good", headers, &[broken]), None, "{field}");
                }
                assert_eq!(judge("GET", "/good", &right, &[good, broken]), allowed, "{field}");
                // What it might change does not pass unchanged; where there is nothing to remove, it
                // changes nothing.
                let harmless = matches!(mismatch, Mismatch::Fail | Mismatch::Log);
                let removes = mismatch == Mismatch::Delete;
                for (headers, passes) in [(&wrong[..], harmless), (&[], harmless || removes)] {
                    let found = judge("GET", "/good", headers, &[good, broken]);
                    assert_eq!(found, allowed.clone().filter(|_| passes), "{field} {mismatch:?}");
                }
                rules.swap(0, 1);
            }
        }
    }

    #[test]
    fn what_a_missing_secret_would_change_does_not_pass_unchanged() {
        let secret = SecretRef { namespace: "a".into(), name: "s".into(), key: None };
        let there = Secrets::from_iter([(secret.clone(), "right".to_owned())]);
        let forged: [(&str, &[u8]); 1] = [("x", b"forged")];
        let headers = &forged[..];
        let request = HttpRequest { method: "GET", target: "/", host: "a", headers };
        for mismatch in Mismatch::ALL {
            let value = Some(HeaderValue::Secret(secret.clone()));
            let header = HeaderRule { name: "x".into(), value, mismatch };
            let rule = HttpRule { headers: vec![header], ..HttpRule::default() };
            let judge = |rules: &[HttpRule], secrets: &Secrets| {
                HttpMatcher::new(rules, secrets).0.judge(&request)
            };
            let both = [HttpRule::default(), rule.clone()];
            assert!(judge(&both, &there).is_some(), "{mismatch:?}");
            let changes = matches!(mismatch, Mismatch::Add | Mismatch::Replace);
            let without = judge(&both, &Secrets::default());
            assert_eq!(without.is_none(), changes, "{mismatch:?}");
            let alone = judge(&[rule], &Secrets::default());
            let opens = matches!(mismatch, Mismatch::Log | Mismatch::Delete);
            assert_eq!(alone.is_some(), opens, "{mismatch:?}");
            // A header that the rule demands besides says first whether the rule matches at all.
            let demanded = HeaderRule { name: "y".into(), value: None, mismatch: Mismatch::Fail };
            let mut other = both;
            other[1].headers.push(demanded);
            assert!(judge(&other, &Secrets::default()).is_some(), "{mismatch:?}");
        }
    }

    #[test]
    fn a_rule_tells_the_secret_that_it_lacks() {
        let secret = SecretRef { namespace: "a".into(), name: "s".into(), key: Some("k".into()) };
        assert_eq!(secret.to_string(), "Secret a/s (key `k`)");
        let there = Secrets::from_iter([(secret.clone(), "right".to_owned())]);
        let request = HttpRequest { method: "GET", target: "/", host: "a", headers: &[] };
        for mismatch in Mismatch::ALL {
            let value = Some(HeaderValue::Secret(secret.clone()));
            let header = HeaderRule { name: "x".into(), value, mismatch };
            let rule = HttpRule { headers: vec![header], ..HttpRule::default() };
            assert_eq!(rule.lacks(&there), None);
            let harmless = matches!(mismatch, Mismatch::Log | Mismatch::Delete);
            assert_eq!(rule.lacks(&Secrets::default()), Some(&secret).filter(|_| !harmless));
            let writes = matches!(mismatch, Mismatch::Add | Mismatch::Replace);
            let wants = rule.difference(&request, &Secrets::default()) == Difference::Secret;
            assert_eq!(wants, writes, "{mismatch:?}");
            assert_ne!(rule.difference(&request, &there), Difference::Secret);
        }
    }

    #[test]
    fn what_compiles_of_a_broken_rule_says_what_it_is_not_about() {
        let mut rules = good_and_broken("host", Mismatch::Replace);
        rules[1].method = Some(Pattern::new("PUT").expect("a pattern"));
        let (matcher, _) = HttpMatcher::new(&rules, &Secrets::default());
        let request = HttpRequest { method: "GET", target: "/good", host: "a", headers: &[] };
        assert!(matcher.judge(&request).is_some());
    }
}
