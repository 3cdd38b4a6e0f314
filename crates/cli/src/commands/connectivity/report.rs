//! What the tests came to: for people, for programs, for continuous integration.

use std::{fmt::Write, time::Duration};

use anyhow::{Error, Result};
use serde_json::{Value, json};

use super::{
    Judgement,
    probe::{Answer, Finding, Outcome},
};
use crate::output;

/// What one test came to.
pub(super) struct Verdict {
    pub(super) name: &'static str,
    took: Duration,
    outcome: Judgement,
}

/// How many questions came to what.
#[derive(Default)]
struct Tally {
    allowed: usize,
    denied: usize,
    /// Got through, and must not.
    leaked: usize,
    /// Did not get through, and must.
    lost: usize,
    /// Could not be asked, or was denied in another way than it must be.
    errors: usize,
}

impl Tally {
    fn of(answers: &[Answer]) -> Self {
        let mut tally = Self::default();
        for answer in answers {
            *match answer.finding() {
                Finding::Allowed => &mut tally.allowed,
                Finding::Denied => &mut tally.denied,
                Finding::Leaked => &mut tally.leaked,
                Finding::Lost => &mut tally.lost,
                Finding::Error => &mut tally.errors,
            } += 1;
        }
        tally
    }
}

impl Verdict {
    pub(super) fn new(name: &'static str, took: Duration, outcome: Result<Judgement>) -> Self {
        let outcome = outcome.unwrap_or_else(|error| Judgement::Broken(format!("{error:#}")));
        Self { name, took, outcome }
    }

    /// Of a test that was not run to its end.
    pub(super) const fn unrun(name: &'static str) -> Self {
        Self { name, took: Duration::ZERO, outcome: Judgement::Unrun }
    }

    /// A skipped test did not fail.
    pub(super) fn passed(&self) -> bool {
        self.outcome.passed()
    }

    fn answers(&self) -> &[Answer] {
        match &self.outcome {
            Judgement::Asked(answers) => answers,
            Judgement::Broken(_) | Judgement::Skipped(_) | Judgement::Unrun => &[],
        }
    }

    /// One word, and what there is to say to it.
    fn result(&self) -> (&'static str, Vec<String>) {
        match &self.outcome {
            Judgement::Asked(_) if self.passed() => ("passed", Vec::new()),
            Judgement::Asked(answers) => {
                let wrong = answers.iter().filter(|it| !it.is_right());
                ("failed", wrong.map(Answer::complaint).collect())
            }
            Judgement::Broken(why) => ("failed", vec![why.clone()]),
            Judgement::Skipped(why) => ("skipped", vec![why.clone()]),
            Judgement::Unrun => ("not run", vec!["the tests ended before it had".to_owned()]),
        }
    }

    /// While the others still run.
    pub(super) fn line(&self) -> String {
        let took = self.took.as_secs_f64();
        let (result, why) = self.result();
        match result {
            "passed" => format!("OK    {} ({} ways, {took:.1} s)", self.name, self.answers().len()),
            "skipped" => format!("SKIP  {}: {}", self.name, why.join(", ")),
            _ => format!("FAIL  {} ({} ways)", self.name, why.len()),
        }
    }
}

pub(super) fn text(verdicts: &[Verdict]) -> String {
    let mut text = String::new();
    for verdict in verdicts.iter().filter(|it| it.result().0 == "failed") {
        // Writing to a string never fails.
        let _ = writeln!(text, "\n{}:", verdict.name);
        if !verdict.answers().is_empty() {
            let _ = writeln!(text, "{}\n", pairs(verdict.answers()));
        }
        for line in verdict.result().1 {
            let _ = writeln!(text, "  {line}");
        }
    }
    let rows = verdicts.iter().map(|verdict| {
        let Tally { allowed, denied, leaked, lost, errors } = Tally::of(verdict.answers());
        let counts = [allowed, denied, leaked, lost, errors].map(|count| match verdict.answers() {
            [] => "-".to_owned(),
            _ => count.to_string(),
        });
        [verdict.name.to_owned(), verdict.result().0.to_owned()].into_iter().chain(counts)
    });
    let titles = ["TEST", "RESULT", "ALLOWED", "DENIED", "LEAKED", "LOST", "ERRORS"];
    let _ = writeln!(text, "\n{}", output::render(&titles, rows));
    let count = |result| verdicts.iter().filter(|it| it.result().0 == result).count();
    let (passed, failed, skipped) = (count("passed"), count("failed"), count("skipped"));
    if failed > 0 {
        text.push_str(
            "\nLEAKED: got through, and must not. LOST: did not get through, and must.\n\
             ERROR: could not be asked, or was denied in another way than it must be.\n",
        );
    }
    let _ = write!(text, "\n{passed} passed, {failed} failed, {skipped} skipped");
    match count("not run") {
        0 => text.push('\n'),
        unrun => _ = writeln!(text, ", {unrun} not run"),
    }
    text
}

/// Who asked whom, one row each, with a mark for each thing asked for.
fn pairs(answers: &[Answer]) -> String {
    let (mut titles, mut rows) = (Vec::new(), Vec::new());
    for Answer { probe, .. } in answers {
        let (title, row) = (probe.what.to_string(), (probe.from, probe.to));
        if !titles.contains(&title) {
            titles.push(title);
        }
        if !rows.contains(&row) {
            rows.push(row);
        }
    }
    let mark = |row, title: &str| {
        let of = |it: &&Answer| {
            (it.probe.from, it.probe.to) == row && it.probe.what.to_string() == title
        };
        let Some(answer) = answers.iter().find(of) else { return String::new() };
        match answer.finding() {
            Finding::Allowed => "+",
            Finding::Denied => "-",
            Finding::Leaked => "LEAKED",
            Finding::Lost => "LOST",
            Finding::Error => "ERROR",
        }
        .to_owned()
    };
    let cells = rows.iter().map(|&(from, to)| {
        let marks = titles.iter().map(move |title| mark((from, to), title));
        [from.pod().to_owned(), to.to_string()].into_iter().chain(marks)
    });
    let titles: Vec<&str> =
        ["FROM", "TO"].into_iter().chain(titles.iter().map(String::as_str)).collect();
    output::render(&titles, cells)
}

pub(super) fn json(verdicts: &[Verdict]) -> Value {
    let results = verdicts.iter().map(|verdict| {
        let (result, why) = verdict.result();
        let Tally { allowed, denied, leaked, lost, errors } = Tally::of(verdict.answers());
        let probes = verdict.answers().iter().map(|answer| {
            json!({
                "from": answer.probe.from.pod(),
                "to": answer.probe.to.to_string(),
                "what": answer.probe.what.to_string(),
                "must": answer.must,
                "got": match answer.got {
                    Outcome::Reached => Some(true),
                    Outcome::Missed(_) => Some(false),
                    Outcome::Unasked(_) => None,
                },
            })
        });
        json!({
            "name": verdict.name,
            "result": result,
            "seconds": verdict.took.as_secs_f64(),
            "messages": why,
            "counts": { "allowed": allowed, "denied": denied, "leaked": leaked, "lost": lost, "errors": errors },
            "probes": probes.collect::<Vec<_>>(),
        })
    });
    json!({ "tests": results.collect::<Vec<_>>() })
}

/// The XML that JUnit writes. A run with a problem of its own is an error of its own: it is not good,
/// however many of its tests passed.
pub(super) fn junit(verdicts: &[Verdict], problem: Option<&Error>) -> String {
    let count = |result| verdicts.iter().filter(|it| it.result().0 == result).count();
    let (failures, skipped) = (count("failed"), count("skipped"));
    let of_run = usize::from(problem.is_some());
    let (tests, errors) = (verdicts.len() + of_run, count("not run") + of_run);
    let mut xml = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"palisade connectivity test\" \
         tests=\"{tests}\" failures=\"{failures}\" errors=\"{errors}\" skipped=\"{skipped}\">\n"
    );
    if let Some(problem) = problem {
        let inner = format!("<error message=\"{}\"/>", escape(&format!("{problem:#}")));
        xml.push_str(&case("the run itself", Duration::ZERO, &inner));
    }
    for verdict in verdicts {
        let (result, why) = verdict.result();
        let why = escape(&why.join("\n"));
        let inner = match result {
            "failed" => format!("<failure>{why}</failure>"),
            "skipped" => format!("<skipped message=\"{why}\"/>"),
            "not run" => format!("<error message=\"{why}\"/>"),
            _ => String::new(),
        };
        xml.push_str(&case(verdict.name, verdict.took, &inner));
    }
    xml.push_str("</testsuite>\n");
    xml
}

fn case(name: &str, took: Duration, inner: &str) -> String {
    let (name, took) = (escape(name), took.as_secs_f64());
    format!("  <testcase name=\"{name}\" time=\"{took:.3}\">{inner}</testcase>\n")
}

/// Text inside XML, without what XML cannot hold at all.
fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\n' | '\t' => escaped.push(character),
            control if control.is_control() => escaped.push('\u{fffd}'),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::{
        super::probe::{From, HTTP, Name, OTHER, Outcome, Probe, To, UDP, What},
        *,
    };

    fn answer(from: From, what: What, must: bool, got: Outcome) -> Answer {
        let probe = Probe { from, to: To::Name(Name::Echo), what };
        Answer { probe, must, refusal: None, got, was_right: false }
    }

    #[test]
    fn results_are_told_in_every_form() {
        let took = Duration::from_millis(1500);
        let missed = || Outcome::Missed("TIMEOUT <got> \"in\"\u{1}".into());
        let good = vec![
            answer(From::Client1, HTTP, true, Outcome::Reached),
            answer(From::Client1, UDP, false, missed()),
        ];
        let bad = vec![
            answer(From::Client1, HTTP, false, Outcome::Reached),
            answer(From::Client1, UDP, false, missed()),
            answer(From::Client2, HTTP, true, missed()),
            answer(From::Client2, UDP, true, Outcome::Reached),
            answer(From::Client2, OTHER, false, Outcome::Unasked("away".into())),
        ];
        let verdicts = [
            Verdict::new("good", took, Ok(Judgement::Asked(good))),
            Verdict::new("bad", took, Ok(Judgement::Asked(bad))),
            Verdict::new("other", took, Ok(Judgement::Skipped("not yet".into()))),
            Verdict::new("broken", took, Err(anyhow::anyhow!("away"))),
            Verdict::unrun("last"),
        ];
        assert_eq!(
            text(&verdicts),
            "
bad:
FROM      TO                       TCP 8080   UDP 8081   TCP 8082
client1   service echo (by name)   LEAKED     -
client2   service echo (by name)   LOST       +          ERROR

  client1 → service echo (by name), TCP 8080: got through, and must not
  client2 → service echo (by name), TCP 8080: did not get through (TIMEOUT <got> \"in\"\u{1}), and must
  client2 → service echo (by name), TCP 8082: could not be asked (away)

broken:
  away

TEST     RESULT    ALLOWED   DENIED   LEAKED   LOST   ERRORS
good     passed    1         1        0        0      0
bad      failed    1         1        1        1      1
other    skipped   -         -        -        -      -
broken   failed    -         -        -        -      -
last     not run   -         -        -        -      -

LEAKED: got through, and must not. LOST: did not get through, and must.
ERROR: could not be asked, or was denied in another way than it must be.

1 passed, 2 failed, 1 skipped, 1 not run
"
        );
        let xml = junit(&verdicts, None);
        let counts = "tests=\"5\" failures=\"2\" errors=\"1\" skipped=\"1\"";
        assert!(xml.contains(counts), "{xml}");
        let unrun =
            "name=\"last\" time=\"0.000\"><error message=\"the tests ended before it had\"/>";
        assert!(xml.contains(unrun), "{xml}");
        assert!(
            xml.contains("through (TIMEOUT &lt;got&gt; &quot;in&quot;\u{fffd}), and must\n"),
            "{xml}"
        );
        assert!(xml.contains("could not be asked (away)</failure>"), "{xml}");
        let told = &json(&verdicts)["tests"][1];
        assert_eq!(told["result"], "failed");
        assert_eq!(
            told["counts"],
            json!({"allowed": 1, "denied": 1, "leaked": 1, "lost": 1, "errors": 1})
        );
        assert_eq!(
            told["probes"][2],
            json!({
                "from": "client2",
                "to": "service echo (by name)",
                "what": "TCP 8080",
                "must": true,
                "got": false,
            })
        );
        assert_eq!(told["probes"][4]["got"], Value::Null);
        assert!(verdicts[2].passed() && !verdicts[3].passed() && !verdicts[4].passed());
    }

    #[test]
    fn a_run_that_did_not_go_well_is_an_error_though_all_its_tests_passed() {
        let verdict = Verdict::new("good", Duration::ZERO, Ok(Judgement::Asked(Vec::new())));
        let problem = anyhow::anyhow!("away").context("not all <clients> started");
        let xml = junit(&[verdict], Some(&problem));
        assert!(xml.contains("tests=\"2\" failures=\"0\" errors=\"1\" skipped=\"0\""), "{xml}");
        let error = "<error message=\"not all &lt;clients&gt; started: away\"/>";
        assert!(xml.contains(error), "{xml}");
    }
}
