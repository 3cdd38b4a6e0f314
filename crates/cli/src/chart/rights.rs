//! What service accounts may do by the roles of the chart is what `install/rights.txt` says.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::Chart;

const RIGHTS: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../install/rights.txt"));
/// Namespace of the installation.
const HOME: &str = "net";

/// That an account may do something; what is empty stands for all.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Right {
    account: String,
    verb: String,
    group: String,
    /// With its subresource.
    resource: String,
    name: String,
    namespace: String,
}

impl Right {
    fn covers(&self, other: &Self) -> bool {
        let same = |right: &Self| {
            let Self { account, verb, group, resource, .. } = right;
            [account.clone(), verb.clone(), group.clone(), resource.clone()]
        };
        let within = |all: &str, one: &str| all.is_empty() || all == one;
        same(self) == same(other)
            && within(&self.name, &other.name)
            && within(&self.namespace, &other.namespace)
    }
}

/// The questions of a line, and whether the answer is yes.
fn read(line: &str, secrets: &str) -> (Vec<Right>, bool) {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [account, answer, verbs, resources, rest @ ..] = words.as_slice() else { panic!("{line}") };
    let subresource = rest.iter().find_map(|word| word.strip_prefix("--subresource="));
    let namespace = rest.iter().skip_while(|word| **word != "-n").nth(1);
    let namespace = match namespace {
        Some(&"HOME") => HOME,
        Some(&"SECRETS") => secrets,
        other => other.copied().unwrap_or_default(),
    };
    let mut rights = Vec::new();
    for verb in verbs.split(',') {
        for resource in resources.split(',') {
            let (kind, name) = resource.split_once('/').unwrap_or((resource, ""));
            let (kind, group) = kind.split_once('.').unwrap_or((kind, ""));
            rights.push(Right {
                account: (*account).to_owned(),
                verb: verb.to_owned(),
                group: group.to_owned(),
                resource: subresource.map_or(kind.to_owned(), |it| format!("{kind}/{it}")),
                name: name.to_owned(),
                namespace: namespace.to_owned(),
            });
        }
    }
    let answer = match *answer {
        "yes" => true,
        "no" => false,
        other => panic!("{line}: {other}"),
    };
    (rights, answer)
}

/// What the bindings of the chart grant.
fn granted(objects: &[Value]) -> BTreeSet<Right> {
    let texts = |value: &Value| -> Vec<String> {
        let list = value.as_array().into_iter().flatten();
        list.map(|it| it.as_str().unwrap().to_owned()).collect()
    };
    let mut rights = BTreeSet::new();
    for binding in objects.iter().filter(|it| it["kind"].as_str().unwrap().ends_with("Binding")) {
        let role = objects
            .iter()
            .find(|it| {
                it["kind"] == binding["roleRef"]["kind"]
                    && it["metadata"]["name"] == binding["roleRef"]["name"]
                    && it["metadata"]["namespace"] == binding["metadata"]["namespace"]
            })
            .unwrap();
        let namespace = binding["metadata"]["namespace"].as_str().unwrap_or_default();
        for (subject, rule) in binding["subjects"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|it| role["rules"].as_array().unwrap().iter().map(move |rule| (it, rule)))
        {
            assert_eq!(subject["kind"], "ServiceAccount");
            assert_eq!(subject["namespace"], HOME);
            let names = match texts(&rule["resourceNames"]) {
                all if all.is_empty() => vec![String::new()],
                names => names,
            };
            for verb in texts(&rule["verbs"]) {
                for group in texts(&rule["apiGroups"]) {
                    for resource in texts(&rule["resources"]) {
                        rights.extend(names.iter().map(|name| Right {
                            account: subject["name"].as_str().unwrap().to_owned(),
                            verb: verb.clone(),
                            group: group.clone(),
                            resource: resource.clone(),
                            name: name.clone(),
                            namespace: namespace.to_owned(),
                        }));
                    }
                }
            }
        }
    }
    rights
}

#[test]
fn nothing_is_granted_that_is_not_written_down() {
    let chart = Chart::new(&json!({}), HOME).unwrap();
    let secrets = chart.values()["secrets"]["namespace"].as_str().unwrap();
    let granted = granted(&chart.objects().unwrap());
    let lines = RIGHTS.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let (yes, no): (Vec<_>, Vec<_>) =
        lines.map(|line| read(line, secrets)).partition(|(_, answer)| *answer);
    let all = |rights: Vec<(Vec<Right>, bool)>| -> BTreeSet<Right> {
        rights.into_iter().flat_map(|(rights, _)| rights).collect()
    };
    let (yes, no) = (all(yes), all(no));
    let unwritten: Vec<&Right> = granted.difference(&yes).collect();
    assert!(unwritten.is_empty(), "granted, and not written: {unwritten:?}");
    let missing: Vec<&Right> = yes.difference(&granted).collect();
    assert!(missing.is_empty(), "written, and not granted: {missing:?}");
    for right in &no {
        let by = granted.iter().find(|it| it.covers(right));
        assert!(by.is_none(), "{right:?} must not be, and is by {by:?}");
    }
    assert!(no.len() > 50 && yes.len() > 50);
    // A wildcard would grant what no line names.
    let wild = |right: &&Right| format!("{right:?}").contains('*');
    assert_eq!(granted.iter().find(wild), None);
}
