//! What the tests came to: for people, for programs, for continuous integration.

use std::{fmt::Write, time::Duration};

use anyhow::Result;
use serde_json::{Value, json};

use super::Judgement;

/// What one test came to.
pub(super) struct Verdict {
    pub(super) name: &'static str,
    took: Duration,
    outcome: Outcome,
}

enum Outcome {
    Passed(usize),
    Failed(Vec<String>),
    Skipped(String),
}

impl Verdict {
    pub(super) fn new(name: &'static str, took: Duration, outcome: Result<Judgement>) -> Self {
        let outcome = match outcome {
            Ok(Judgement::Passed(count)) => Outcome::Passed(count),
            Ok(Judgement::Failed(why)) => Outcome::Failed(why),
            Ok(Judgement::Skipped(why)) => Outcome::Skipped(why),
            Err(error) => Outcome::Failed(vec![format!("{error:#}")]),
        };
        Self { name, took, outcome }
    }

    /// A skipped test did not fail.
    pub(super) const fn passed(&self) -> bool {
        !matches!(self.outcome, Outcome::Failed(_))
    }

    /// While the others still run.
    pub(super) fn line(&self) -> String {
        let took = self.took.as_secs_f64();
        match &self.outcome {
            Outcome::Passed(count) => format!("OK    {} ({count} ways, {took:.1} s)", self.name),
            Outcome::Failed(why) => format!("FAIL  {} ({} ways)", self.name, why.len()),
            Outcome::Skipped(why) => format!("SKIP  {}: {why}", self.name),
        }
    }
}

pub(super) fn text(verdicts: &[Verdict]) -> String {
    let mut text = String::new();
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for verdict in verdicts {
        match &verdict.outcome {
            Outcome::Passed(_) => passed += 1,
            Outcome::Skipped(_) => skipped += 1,
            Outcome::Failed(why) => {
                failed += 1;
                // Writing to a string never fails.
                let _ = writeln!(text, "\n{}:", verdict.name);
                for line in why {
                    let _ = writeln!(text, "  {line}");
                }
            }
        }
    }
    let _ = writeln!(text, "\n{passed} passed, {failed} failed, {skipped} skipped");
    text
}

pub(super) fn json(verdicts: &[Verdict]) -> Value {
    let results = verdicts.iter().map(|verdict| {
        let (result, why) = match &verdict.outcome {
            Outcome::Passed(_) => ("passed", Vec::new()),
            Outcome::Failed(why) => ("failed", why.clone()),
            Outcome::Skipped(why) => ("skipped", vec![why.clone()]),
        };
        json!({
            "name": verdict.name,
            "result": result,
            "seconds": verdict.took.as_secs_f64(),
            "messages": why,
        })
    });
    json!({ "tests": results.collect::<Vec<_>>() })
}

/// The XML that JUnit writes.
pub(super) fn junit(verdicts: &[Verdict]) -> String {
    let count =
        |wanted: fn(&Outcome) -> bool| verdicts.iter().filter(|it| wanted(&it.outcome)).count();
    let failures = count(|it| matches!(it, Outcome::Failed(_)));
    let skipped = count(|it| matches!(it, Outcome::Skipped(_)));
    let mut xml = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"palisade connectivity test\" \
         tests=\"{}\" failures=\"{failures}\" skipped=\"{skipped}\">\n",
        verdicts.len()
    );
    for verdict in verdicts {
        let (name, took) = (escape(verdict.name), verdict.took.as_secs_f64());
        let inner = match &verdict.outcome {
            Outcome::Passed(_) => String::new(),
            Outcome::Failed(why) => format!("<failure>{}</failure>", escape(&why.join("\n"))),
            Outcome::Skipped(why) => format!("<skipped message=\"{}\"/>", escape(why)),
        };
        let _ = writeln!(xml, "  <testcase name=\"{name}\" time=\"{took:.3}\">{inner}</testcase>");
    }
    xml.push_str("</testsuite>\n");
    xml
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
    use super::*;

    #[test]
    fn results_are_told_in_every_form() {
        let took = Duration::from_millis(1500);
        let verdicts = [
            Verdict::new("good", took, Ok(Judgement::Passed(3))),
            Verdict::new(
                "bad",
                took,
                Ok(Judgement::Failed(vec!["a → b: <got> \"in\"\u{1}".into()])),
            ),
            Verdict::new("other", took, Ok(Judgement::Skipped("not yet".into()))),
            Verdict::new("broken", took, Err(anyhow::anyhow!("away"))),
        ];
        assert_eq!(
            text(&verdicts),
            "\nbad:\n  a → b: <got> \"in\"\u{1}\n\nbroken:\n  away\n\n1 passed, 2 failed, 1 skipped\n"
        );
        let xml = junit(&verdicts);
        assert!(xml.contains("tests=\"4\" failures=\"2\" skipped=\"1\""), "{xml}");
        assert!(
            xml.contains("<failure>a → b: &lt;got&gt; &quot;in&quot;\u{fffd}</failure>"),
            "{xml}"
        );
        assert_eq!(json(&verdicts)["tests"][1]["result"], "failed");
        assert!(verdicts[2].passed() && !verdicts[3].passed());
    }
}
