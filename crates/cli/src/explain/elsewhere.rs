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
const TIMEOUT: Duration = Duration::from_secs(30);

/// `why`: what is known on that node only.
pub(super) fn ask(
    global: &Global,
    args: &ExplainArgs,
    node: &str,
    why: &str,
) -> Result<Explanation> {
    let mut there = None;
    cluster::on_runtime(Some(TIMEOUT), in_its_pod(global, args, node, &mut there)).map_err(
        |error| {
            let question =
                command(args).iter().map(|word| quoted(&told(word))).collect::<Vec<_>>().join(" ");
            let advice = there.map_or_else(
                || {
                    format!(
                        "Ask on node {node}, in the container `agent` of its pod:\n  {question}"
                    )
                },
                |(namespace, pod)| {
                    format!(
                        "Ask there:\n  kubectl -n {namespace} exec {pod} -c agent -- {question}"
                    )
                },
            );
            let failure = format!("{why}, whose agent cannot be asked from here: {error:#}");
            Failure::refused(failure, advice).into()
        },
    )
}

/// `there`: the pod, as soon as it is known.
async fn in_its_pod(
    global: &Global,
    args: &ExplainArgs,
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
    let (_, said) = cluster::exec(&pods, name, Some("agent"), command(args)).await?;
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

/// Without the value of a header, which may be a secret.
fn told(word: &str) -> String {
    match word.strip_prefix("--header=").and_then(|header| header.split_once(':')) {
        Some((name, _)) => format!("--header={name}: VALUE"),
        None => word.to_owned(),
    }
}

/// The question as it was asked.
fn command(args: &ExplainArgs) -> Vec<String> {
    let ExplainArgs { from, to, port, protocol, http, header, dns, server_name, file: _ } = args;
    let ask = ["/palisade", "--output=json", "policy", "explain"].map(str::to_owned);
    let ends = [format!("--from={from}"), format!("--to={to}"), format!("--port={port}")];
    let more = [("protocol", protocol), ("http", http), ("dns", dns), ("server-name", server_name)];
    let more =
        more.into_iter().filter_map(|(name, value)| Some(format!("--{name}={}", value.as_ref()?)));
    let headers = header.iter().map(|header| format!("--header={header}"));
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
        assert_eq!(told("--header=x: s3cret"), "--header=x: VALUE");
        assert_eq!(told("--http=GET http://a/"), "--http=GET http://a/");
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
        request.extend(["--http=GET /a b", "--header=x: y z", "--header=a:b"].map(str::to_owned));
        let once = asked(&request);
        assert_eq!(asked(&command(&once)).http.as_deref(), Some("GET /a b"));
        assert_eq!(asked(&command(&once)).header, ["x: y z", "a:b"]);
    }
}
