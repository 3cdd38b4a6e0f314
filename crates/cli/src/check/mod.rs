//! `palisade policy check`: reads policies as the cluster would, without one.

mod contradictions;
mod locate;

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use anyhow::Context;
use palisade_api::convert;
use serde::Serialize;
use serde_json::Value;

use self::locate::Lines;
use crate::{
    exit::Exit,
    output::{self, Format, say},
};

/// What is wrong, and where.
#[derive(Debug, Serialize)]
struct Finding {
    file: String,
    /// Line of the field, of the nearest one above it, or where the YAML breaks off.
    line: usize,
    object: String,
    field: String,
    message: String,
    suggestion: String,
}

/// Checks every document of `files` (`-`: standard input).
pub(crate) fn run(format: Format, files: &[PathBuf]) -> anyhow::Result<Exit> {
    let mut findings = Vec::new();
    let mut policies = 0;
    for file in files {
        let text = read(file)?;
        for (line, document) in documents(&text) {
            policies += check(file, line, document, &mut findings);
        }
    }
    match format {
        Format::Json => output::json(&findings)?,
        Format::Table => print(&findings, policies),
    }
    // Where a command before the pipe failed, nothing was checked.
    Ok(if findings.is_empty() && policies > 0 { Exit::Ok } else { Exit::No })
}

pub(crate) fn read(file: &Path) -> anyhow::Result<String> {
    if file == Path::new("-") {
        let mut text = String::new();
        io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
        return Ok(text);
    }
    fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))
}

/// The YAML documents of a file with the numbers of their first lines.
pub(crate) fn documents(text: &str) -> Vec<(usize, &str)> {
    let mut documents = Vec::new();
    let (mut start, mut first) = (0, 1);
    let mut offset = 0;
    for (number, line) in text.split_inclusive('\n').enumerate() {
        if line.trim_end() == "---" {
            documents.push((first, &text[start..offset]));
            start = offset + line.len();
            first = number + 2;
        }
        offset += line.len();
    }
    documents.push((first, &text[start..]));
    documents.retain(|(_, document)| document.lines().any(says_something));
    documents
}

fn says_something(line: &str) -> bool {
    let line = line.trim();
    !line.is_empty() && !line.starts_with('#')
}

/// The number of policies in the document, well-formed or not; `first` is its first line.
fn check(file: &Path, first: usize, document: &str, findings: &mut Vec<Finding>) -> usize {
    let file = file.display().to_string();
    let object: Value = match serde_saphyr::from_str(document) {
        Ok(object) => object,
        Err(error) => {
            let at = error.location().map_or(0, |location| location.line() as usize);
            findings.push(Finding {
                file,
                line: first + at.saturating_sub(1),
                object: "document".to_owned(),
                field: String::new(),
                message: without_place(&error.to_string()).to_owned(),
                suggestion: "write valid YAML".to_owned(),
            });
            return 1;
        }
    };
    let lines = Lines::read(document);
    let mut policies = 0;
    for (prefix, object) in objects(&object) {
        let Some(problems) = convert::check(object) else { continue };
        policies += 1;
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or("-");
        let name = format!("{} {}", text("/kind"), text("/metadata/name"));
        let finding = |field: String, message: String, suggestion: String| {
            let path = format!("{prefix}{field}");
            let line = first - 1 + lines.as_ref().map_or(1, |lines| lines.of(&path));
            Finding { file: file.clone(), line, object: name.clone(), field, message, suggestion }
        };
        findings.extend(
            problems
                .into_iter()
                .map(|problem| finding(problem.path, problem.message, problem.suggestion)),
        );
        findings.extend(contradictions::find(object).into_iter().map(|(field, label)| {
            let message = format!("selects nothing: what it asks of the label `{label}` cannot be");
            finding(field, message, "keep one of the requirements that contradict".to_owned())
        }));
    }
    policies
}

/// What is wrong, without where: `error: line 5 column 2: what`, and below it a picture.
fn without_place(error: &str) -> &str {
    let first = error.lines().next().unwrap_or_default();
    let after = first.split_once(" column ").and_then(|(_, rest)| rest.split_once(": "));
    after.map_or(first, |(_, what)| what)
}

/// The object, or the members of a list such as `kubectl get -o yaml` prints, each with the path
/// to it.
pub(crate) fn objects(object: &Value) -> Vec<(String, &Value)> {
    let is_list = object["kind"].as_str().is_some_and(|kind| kind.ends_with("List"));
    match object["items"].as_array() {
        Some(items) if is_list => {
            let paths = (0..).map(|index| format!("items[{index}]."));
            paths.zip(items).collect()
        }
        _ => vec![(String::new(), object)],
    }
}

fn print(findings: &[Finding], policies: usize) {
    for Finding { file, line, object, field, message, suggestion } in findings {
        let place = if field.is_empty() { String::new() } else { format!(" {field}:") };
        say!("{file}:{line}: {object}:{place} {message}");
        if !suggestion.is_empty() {
            say!("    {suggestion}");
        }
    }
    match (policies, findings.len()) {
        (0, _) => say!("no policy found"),
        (_, 0) => say!("{policies} checked, no problem"),
        (_, 1) => say!("{policies} checked, 1 problem"),
        (_, count) => say!("{policies} checked, {count} problems"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_know_their_lines() {
        let text = "a: 1\n---\n# nothing\n---\nb: 2\n";
        assert_eq!(documents(text), [(1, "a: 1\n"), (5, "b: 2\n")]);
    }

    fn findings(document: &str) -> Vec<Finding> {
        let mut findings = Vec::new();
        check(Path::new("policy.yaml"), 1, document, &mut findings);
        findings
    }

    const POLICY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: default}
spec:
  podSelector: {}
  ingress:
  - ports: [{port: PORT}]
";

    #[test]
    fn a_good_policy_has_no_findings_and_a_bad_port_is_named() {
        assert!(findings(&POLICY.replace("PORT", "80")).is_empty());
        let bad = findings(&POLICY.replace("PORT", "99999"));
        assert_eq!(bad.len(), 1);
        assert!(bad[0].field.contains("ports[0].port"), "{bad:?}");
        assert_eq!(bad[0].object, "NetworkPolicy web");
    }

    #[test]
    fn words_that_yaml_reads_as_something_else_are_to_be_quoted() {
        let named = |name: &str| findings(&POLICY.replace("PORT", "80").replace("web", name));
        for (name, kind) in [("n", "a boolean"), ("yes", "a boolean"), ("80", "a number")] {
            let bad = named(name);
            assert_eq!((bad.len(), bad[0].line), (1, 4), "{bad:?}");
            assert_eq!(bad[0].field, "metadata.name");
            assert_eq!(bad[0].message, format!("must be a string, is {kind}"));
            assert!(bad[0].suggestion.contains("in quotes"), "{bad:?}");
            assert!(named(&format!("'{name}'")).is_empty());
        }
        assert!(named("''")[0].message.contains("needs a name"));
    }

    #[test]
    fn a_problem_has_the_line_of_its_field() {
        assert_eq!(findings(&POLICY.replace("PORT", "99999"))[0].line, 8);
        let list = format!(
            "kind: List\nitems:\n-{}",
            POLICY.trim().replace("PORT", "99999").replace('\n', "\n  ").replacen("api", " api", 1)
        );
        let bad = findings(&list);
        assert_eq!((bad.len(), bad[0].line), (1, 9), "{list}{bad:?}");
        assert_eq!(bad[0].field, "spec.ingress[0].ports[0].port");
    }

    #[test]
    fn a_selector_that_contradicts_itself_is_named() {
        let selector =
            "{matchLabels: {a: b}, matchExpressions: [{key: a, operator: NotIn, values: [b]}]}";
        let bad = findings(
            &POLICY
                .replace("PORT", "80")
                .replace("podSelector: {}", &format!("podSelector: {selector}")),
        );
        assert_eq!((bad.len(), bad[0].line), (1, 6), "{bad:?}");
        assert_eq!(bad[0].field, "spec.podSelector");
        assert!(bad[0].message.contains("the label `a`"), "{bad:?}");
    }

    #[test]
    fn broken_yaml_is_a_finding_with_its_line() {
        let broken = findings("kind: NetworkPolicy\nspec: [\n");
        assert_eq!(broken.len(), 1);
        assert!(broken[0].line >= 2, "{broken:?}");
    }
}
