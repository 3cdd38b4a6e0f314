//! Commands, their answers, and whether those are the expected ones.

use std::{
    ffi::OsString,
    io::Write,
    path::PathBuf,
    process::{Command, Output, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{output::note, progress::Progress};

/// What must come back.
#[derive(Clone, Copy)]
pub(super) enum Expect<'a> {
    /// Success, and every one of these texts.
    Answer(&'a [&'a str]),
    /// Silence: `curl` gives up connecting, which is its exit code 28.
    NoAnswer,
}

/// Exit code of a `curl` that ran into a time limit.
const CURL_TIMED_OUT: i32 = 28;

impl Expect<'_> {
    fn met_by(self, output: &Output) -> bool {
        let text = String::from_utf8_lossy(&output.stdout);
        match self {
            Self::Answer(wanted) => {
                output.status.success() && wanted.iter().all(|wanted| text.contains(wanted))
            }
            Self::NoAnswer => {
                output.status.code() == Some(CURL_TIMED_OUT) && output.stdout.is_empty()
            }
        }
    }
}

/// A probe of a sweep: who asks, what for people, and the arguments of `curl`.
pub(super) struct Probe<'a> {
    pub(super) from: &'a str,
    pub(super) to: String,
    pub(super) curl: Vec<String>,
    pub(super) expect: Expect<'a>,
}

/// Where commands go.
#[derive(Clone)]
pub(super) struct Destination {
    /// Where programs are, as `PATH`.
    pub(super) path: OsString,
    /// None where `kubectl` finds it by itself.
    pub(super) kubeconfig: Option<PathBuf>,
    pub(super) context: Option<String>,
    /// None for the namespace of the kubeconfig's context.
    pub(super) namespace: Option<&'static str>,
}

/// Runs and prints commands, and counts.
pub(super) struct Script {
    to: Destination,
    /// Goes before the arguments of every command.
    flags: Vec<String>,
    pub(super) passed: usize,
    pub(super) failed: usize,
}

impl Script {
    pub(super) fn new(to: Destination) -> Self {
        let context = to.context.iter().flat_map(|it| ["--context".to_owned(), it.clone()]);
        let namespace = to.namespace.iter().flat_map(|&it| ["-n".to_owned(), it.to_owned()]);
        let flags = context.chain(namespace).collect();
        Self { to, flags, passed: 0, failed: 0 }
    }

    pub(super) fn namespace(&self) -> &'static str {
        self.to.namespace.unwrap_or("default")
    }

    /// A command, for people.
    fn words(&self, args: &[&str]) -> String {
        let flags = self.flags.iter().map(String::as_str);
        ["kubectl"]
            .into_iter()
            .chain(flags)
            .chain(args.iter().copied())
            .collect::<Vec<_>>()
            .join(" ")
    }

    pub(super) fn title(&self, text: &str) {
        note!("\n── {text}");
    }

    /// Counts one check and says how it went.
    pub(super) fn verdict(&mut self, passed: bool, what: &str) {
        *(if passed { &mut self.passed } else { &mut self.failed }) += 1;
        note!("{}  {what}", if passed { "PASS" } else { "FAIL" });
    }

    /// One command, its answer and PASS or FAIL.
    pub(super) fn check(&mut self, args: &[&str], expect: Expect<'_>) -> Result<()> {
        let command = self.words(args);
        note!("$ {command}");
        let waiting = Progress::start(&command);
        let output = self.kubectl(args, None)?;
        drop(waiting);
        show(&output);
        self.verdict(expect.met_by(&output), "");
        Ok(())
    }

    /// Applies a manifest of this program's own.
    pub(super) fn apply(&mut self, file: &str, manifest: &str) -> Result<()> {
        note!("$ {}", self.words(&["apply", "-f", file]));
        let here = format!("namespace: {}", self.namespace());
        let manifest = manifest.replace("namespace: default", &here);
        let output = self.kubectl(&["apply", "-f", "-"], Some(&manifest))?;
        show(&output);
        self.verdict(output.status.success(), "");
        Ok(())
    }

    /// Many probes at once, a line each.
    pub(super) fn sweep(&mut self, probes: &[Probe<'_>]) -> Result<()> {
        let waiting = Progress::start("probing");
        let this = &*self;
        let outputs: Vec<Result<Output>> = thread::scope(|scope| {
            let run = |probe: &Probe<'_>| {
                let mut args = vec!["exec", probe.from, "--", "curl"];
                args.extend(probe.curl.iter().map(String::as_str));
                this.kubectl(&args, None)
            };
            let threads: Vec<_> =
                probes.iter().map(|probe| scope.spawn(move || run(probe))).collect();
            threads.into_iter().map(join).collect()
        });
        drop(waiting);
        for (probe, output) in probes.iter().zip(outputs) {
            let output = output?;
            let answer = String::from_utf8_lossy(&output.stdout);
            let answer = match (answer.lines().next(), output.status.code()) {
                (Some(line), _) => line.to_owned(),
                (None, Some(CURL_TIMED_OUT)) => "no answer".to_owned(),
                (None, code) => format!("no answer, exit code {}", code.unwrap_or(-1)),
            };
            let line = format!("{:<10} → {:<52} {answer}", probe.from, probe.to);
            self.verdict(probe.expect.met_by(&output), &line);
        }
        Ok(())
    }

    /// Whether a command succeeds; nobody sees it.
    pub(super) fn succeeds(&self, args: &[&str]) -> Result<bool> {
        Ok(self.kubectl(args, None)?.status.success())
    }

    /// An object or a list, as JSON.
    pub(super) fn json(&self, args: &[&str]) -> Result<Value> {
        let args = [args, &["-o", "json"]].concat();
        let output = self.kubectl(&args, None)?;
        if !output.status.success() {
            bail!("{}: {}", self.words(&args), String::from_utf8_lossy(&output.stderr));
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    fn kubectl(&self, args: &[&str], input: Option<&str>) -> Result<Output> {
        let mut command = Command::new("kubectl");
        if let Some(kubeconfig) = &self.to.kubeconfig {
            command.env("KUBECONFIG", kubeconfig);
        }
        let mut child = command
            .args(&self.flags)
            .args(args)
            .env("PATH", &self.to.path)
            .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("kubectl cannot be started")?;
        if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
            stdin.write_all(input.as_bytes())?;
        }
        Ok(child.wait_with_output()?)
    }
}

/// Asks again until `ask` answers yes; no after `limit`.
pub(super) fn eventually(limit: Duration, mut ask: impl FnMut() -> Result<bool>) -> Result<bool> {
    const PAUSE: Duration = Duration::from_millis(100);
    let begun = std::time::Instant::now();
    while !ask()? {
        if begun.elapsed() > limit {
            return Ok(false);
        }
        thread::sleep(PAUSE);
    }
    Ok(true)
}

fn join<T>(thread: thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|_| bail!("a probe panicked"))
}

fn show(output: &Output) {
    for text in [&output.stdout, &output.stderr] {
        for line in String::from_utf8_lossy(text).lines() {
            note!("{line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    fn output(code: i32, text: &str) -> Output {
        let status = std::process::ExitStatus::from_raw(code << 8);
        Output { status, stdout: text.into(), stderr: Vec::new() }
    }

    #[test]
    fn an_answer_needs_success_and_every_text() {
        let landed = Expect::Answer(&["Ship", "landed"]);
        assert!(landed.met_by(&output(0, "Ship landed\n")));
        assert!(!landed.met_by(&output(0, "Ship lost\n")));
        assert!(!landed.met_by(&output(1, "Ship landed\n")));
    }

    #[test]
    fn silence_is_a_time_out_and_nothing_else() {
        assert!(Expect::NoAnswer.met_by(&output(28, "")));
        assert!(!Expect::NoAnswer.met_by(&output(28, "Ship")), "a byte came through");
        assert!(!Expect::NoAnswer.met_by(&output(7, "")), "refused is an answer");
        assert!(!Expect::NoAnswer.met_by(&output(0, "")));
    }
}
