//! What only the agent of another node knows: it is asked in its pod, with the very same question.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, ResourceExt, api::ListParams};
use palisade_api::admin::Explanation;

use crate::{
    cli::{ExplainArgs, Global},
    cluster,
    exit::Failure,
};

const AGENTS: &str = "k8s-app=palisade";
/// They are on standard input.
const HEADERS: &str = "--header=-";
const TIMEOUT: Duration = Duration::from_secs(30);

/// `headers`: those of the request. `why`: what is known on that node only.
pub(super) fn ask(
    global: &Global,
    args: &ExplainArgs,
    headers: &[String],
    node: &str,
    why: &str,
) -> Result<Explanation> {
    let mut there = None;
    let asking = in_its_pod(global, args, headers, node, &mut there);
    cluster::on_runtime(Some(TIMEOUT), asking).map_err(|error| {
        let failure = format!("{why}, whose agent cannot be asked from here: {error:#}");
        Failure::refused(failure, advice(&command(args), node, there)).into()
    })
}

fn advice(command: &[String], node: &str, pod: Option<(String, String)>) -> String {
    let question = command.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
    let mut advice = match pod {
        None => format!("Ask on node {node}, in the container `agent` of its pod:\n  {question}"),
        Some((namespace, pod)) => {
            format!("Ask there:\n  kubectl -n {namespace} exec -i {pod} -c agent -- {question}")
        }
    };
    if command.iter().any(|word| word == HEADERS) {
        advice.push_str("\nIt reads the headers, one a line, and then an empty line.");
    }
    advice
}

/// `there`: the pod, as soon as it is known.
async fn in_its_pod(
    global: &Global,
    args: &ExplainArgs,
    headers: &[String],
    node: &str,
    there: &mut Option<(String, String)>,
) -> Result<Explanation> {
    let client = cluster::client(global).await?;
    let of_node = ListParams::default().labels(AGENTS).fields(&format!("spec.nodeName={node}"));
    let pods = Api::<Pod>::all(client.clone()).list(&of_node).await.context("its pod")?;
    let Some(pod) = pods.items.into_iter().next() else {
        bail!("no pod with the label {AGENTS} is on node {node}");
    };
    let (namespace, name) = there.insert((pod.namespace().unwrap_or_default(), pod.name_any()));
    let pods = Api::<Pod>::namespaced(client, namespace);
    let input: String = headers.iter().map(|header| format!("{header}\n")).collect();
    let input = (!headers.is_empty()).then(|| input + "\n");
    let command = command(args);
    let (_, said) = cluster::exec(&pods, name, Some("agent"), command, input.as_deref()).await?;
    // That it is denied is an answer too.
    serde_json::from_str(&said).map_err(|_| anyhow::anyhow!("it said: {said}"))
}

/// As a shell reads it.
fn quoted(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./:=,@%+".contains(&byte);
    match word.bytes().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

/// The question as it was asked. What headers say may be secret, and a command stands in the address
/// of a request, which servers record.
fn command(args: &ExplainArgs) -> Vec<String> {
    let ExplainArgs { from, to, port, protocol, http, header, dns, server_name, file: _ } = args;
    let ask = ["/palisade", "--output=json", "policy", "explain"].map(str::to_owned);
    let ends = [format!("--from={from}"), format!("--to={to}"), format!("--port={port}")];
    let more = [("protocol", protocol), ("http", http), ("dns", dns), ("server-name", server_name)];
    let more =
        more.into_iter().filter_map(|(name, value)| Some(format!("--{name}={}", value.as_ref()?)));
    let headers = (!header.is_empty()).then(|| HEADERS.to_owned());
    ask.into_iter().chain(ends).chain(more).chain(headers).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command, PolicyCommand};

    #[test]
    fn a_shell_reads_what_was_meant() {
        assert_eq!(quoted("--from=a/b"), "--from=a/b");
        assert_eq!(quoted("--http=GET /a'b"), r"'--http=GET /a'\''b'");
    }

    #[test]
    fn the_same_question_is_asked_there() {
        let asked = |line: &[String]| {
            let cli = Cli::try_parse_from(line).unwrap();
            let Command::Policy(PolicyCommand::Explain(args)) = cli.command else { panic!() };
            args
        };
        let words =
            "palisade policy explain --from a/b --to svc/c --port 53 --protocol udp --dns x.io";
        let words: Vec<String> = words.split(' ').map(str::to_owned).collect();
        let once = asked(&words);
        assert_eq!(format!("{:?}", asked(&command(&once))), format!("{once:?}"));
        let mut request: Vec<String> = words[..9].to_vec();
        request.extend(["--http=GET /a b", "--header=x: y", "--header=a:b"].map(str::to_owned));
        let once = command(&asked(&request));
        assert_eq!(asked(&once).http.as_deref(), Some("GET /a b"));
        assert_eq!(asked(&once).header, ["-"]);
        let there = Some(("kube-system".to_owned(), "palisade-1".to_owned()));
        let advice = advice(&once, "node1", there);
        let begins =
            "Ask there:\n  kubectl -n kube-system exec -i palisade-1 -c agent -- /palisade ";
        assert!(advice.starts_with(begins) && advice.ends_with("an empty line."), "{advice}");
    }
}
