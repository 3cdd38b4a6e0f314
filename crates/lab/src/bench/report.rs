//! What is printed.

use std::{collections::BTreeMap, io::Write};

use anyhow::Result;
use serde::Serialize;

use super::{
    load::{Measured, Work},
    paths::Variant,
};

/// What a figure should be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Goal {
    AtMost(f64),
    AtLeast(f64),
}

impl Goal {
    fn met(self, value: f64) -> bool {
        match self {
            Self::AtMost(limit) => value <= limit,
            Self::AtLeast(limit) => value >= limit,
        }
    }
}

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    what: String,
    value: f64,
    unit: &'static str,
    /// Middle half of the rounds, where there were several.
    #[serde(skip_serializing_if = "Option::is_none")]
    quartiles: Option<[f64; 2]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    goal: Option<Goal>,
    #[serde(skip_serializing_if = "Option::is_none")]
    met: Option<bool>,
}

impl Row {
    pub(super) fn new(what: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self { what: what.into(), value, unit, quartiles: None, goal: None, met: None }
    }

    pub(super) fn goal(mut self, goal: Goal) -> Self {
        self.met = Some(goal.met(self.value));
        self.goal = Some(goal);
        self
    }
}

/// All figures of a run.
#[derive(Default)]
pub(super) struct Report {
    rows: Vec<Row>,
    rounds: Vec<Vec<Measured>>,
}

impl Report {
    pub(super) fn push(&mut self, row: Row) {
        self.rows.push(row);
    }

    pub(super) fn extend(&mut self, rows: Vec<Row>) {
        self.rows.extend(rows);
    }

    pub(super) fn round(&mut self, measured: Vec<Measured>) {
        self.rounds.push(measured);
    }

    pub(super) fn print(mut self, json: bool) -> Result<()> {
        let compared = self.compared();
        self.rows.extend(compared);
        let mut out = std::io::stdout().lock();
        if json {
            serde_json::to_writer_pretty(&mut out, &self.rows)?;
            return Ok(writeln!(out)?);
        }
        writeln!(out, "{:<58} {:>10} {:<8} {:>17}   GOAL", "WHAT", "VALUE", "", "MIDDLE HALF")?;
        for row in &self.rows {
            let between = row.quartiles.map_or_else(String::new, |[low, high]| {
                format!("{}..{}", number(low), number(high))
            });
            let goal = row.goal.map_or_else(String::new, |goal| {
                let verdict = if row.met == Some(true) { "yes" } else { "NO" };
                match goal {
                    Goal::AtMost(limit) => format!("<= {}  {verdict}", number(limit)),
                    Goal::AtLeast(limit) => format!(">= {}  {verdict}", number(limit)),
                }
            });
            let line = format!(
                "{:<58} {:>10} {:<8} {between:>17}   {goal}",
                row.what,
                number(row.value),
                row.unit
            );
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }

    /// Each path against the bare veth pair (streams: also against the routed pair) of the same
    /// round; medians over the rounds.
    fn compared(&self) -> Vec<Row> {
        let mut rates: BTreeMap<(Work, Variant), Vec<f64>> = BTreeMap::new();
        for measured in self.rounds.iter().flatten() {
            rates.entry((measured.work, measured.variant)).or_default().push(measured.rate);
        }
        let mut rows = Vec::new();
        for work in Work::ALL {
            let (name, unit, scale) = title(work);
            for variant in [Variant::Veth, Variant::Routed, Variant::Nftables, Variant::Palisade] {
                let Some(mine) = rates.get(&(work, variant)) else { continue };
                let scaled = mine.iter().map(|rate| rate * scale).collect();
                rows.push(spread(format!("{name}: {}", title_of(variant)), scaled, unit));
            }
            for (variant, base, goal) in ratios(work) {
                let (Some(mine), Some(base_rates)) =
                    (rates.get(&(work, variant)), rates.get(&(work, base)))
                else {
                    continue;
                };
                let ratio = mine.iter().zip(base_rates).map(|(mine, base)| mine / base).collect();
                let what = format!("{name}: {} / {}", title_of(variant), title_of(base));
                let row = spread(what, ratio, "x");
                rows.push(match goal {
                    Some(goal) => row.goal(goal),
                    None => row,
                });
            }
        }
        rows
    }
}

fn title(work: Work) -> (&'static str, &'static str, f64) {
    match work {
        Work::RequestResponse => ("TCP request/response", "/s", 1.0),
        Work::ConnectRequestClose => ("TCP connect/request/close", "/s", 1.0),
        Work::Datagrams => ("UDP, 64 bytes", "/s", 1.0),
        Work::Stream => ("TCP stream", "Gbit/s", 8e-9),
    }
}

fn title_of(variant: Variant) -> &'static str {
    match variant {
        Variant::Palisade => "pods with policies",
        Variant::Veth => "veth",
        Variant::Routed => "routed",
        Variant::Nftables => "nftables",
    }
}

/// What is put beside what, with the goal.
fn ratios(work: Work) -> Vec<(Variant, Variant, Option<Goal>)> {
    use Variant::{Nftables, Palisade, Routed, Veth};
    match work {
        Work::RequestResponse => {
            vec![(Palisade, Veth, Some(Goal::AtLeast(0.94))), (Nftables, Veth, None)]
        }
        Work::ConnectRequestClose => {
            vec![(Palisade, Veth, Some(Goal::AtLeast(0.95))), (Nftables, Veth, None)]
        }
        Work::Datagrams => {
            vec![(Palisade, Veth, Some(Goal::AtLeast(0.93))), (Nftables, Veth, None)]
        }
        Work::Stream => vec![
            (Palisade, Veth, Some(Goal::AtLeast(0.98))),
            (Palisade, Routed, Some(Goal::AtLeast(1.3))),
            (Nftables, Routed, None),
        ],
    }
}

fn spread(what: String, mut values: Vec<f64>, unit: &'static str) -> Row {
    let mut row = Row::new(what, median(&mut values), unit);
    if values.len() > 2 {
        row.quartiles = Some([values[values.len() / 4], values[values.len() * 3 / 4]]);
    }
    row
}

/// The middle value; sorts.
pub(super) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Three significant digits, or all of an integer's.
fn number(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_within_a_round() {
        let measured = |variant, rate| Measured { variant, work: Work::RequestResponse, rate };
        let mut report = Report::default();
        for base in [100.0, 200.0, 400.0] {
            report.round(vec![
                measured(Variant::Palisade, base * 0.95),
                measured(Variant::Veth, base),
            ]);
        }
        let rows = report.compared();
        let ratio = rows.iter().find(|row| row.unit == "x").unwrap();
        assert!((ratio.value - 0.95).abs() < 1e-9, "{ratio:?}");
        assert_eq!(ratio.met, Some(true));
    }

    #[test]
    fn a_goal_can_be_missed() {
        assert_eq!(Row::new("x", 11.0, "ms").goal(Goal::AtMost(10.0)).met, Some(false));
        assert_eq!(Row::new("x", 0.9, "x").goal(Goal::AtLeast(0.95)).met, Some(false));
    }
}
