//! What the kernel itself counts of our eBPF programs.

use std::{collections::BTreeMap, fs, os::fd::AsRawFd};

use anyhow::{Context, Result};
use aya::{
    programs::{ProgramInfo, loaded_programs},
    sys::{Stats, enable_stats},
};

use super::{
    load::{self, Work},
    paths::Path,
    report::{Goal, Row},
};

/// The programs that pods' packets run through.
const PROGRAMS: [&str; 2] = ["from_pod", "to_pod"];

/// Runs, and the time that they took.
#[derive(Clone, Copy, Default)]
struct Runs {
    count: u64,
    nanoseconds: u64,
}

impl Runs {
    /// All runs of the programs so far, while statistics were on.
    fn so_far() -> Result<Self> {
        let mut runs = Self::default();
        for program in programs() {
            let counters = counters(&program)?;
            let read = |name: &str| -> Result<u64> {
                Ok(counters
                    .get(name)
                    .with_context(|| format!("the kernel gives no {name}"))?
                    .parse()?)
            };
            runs.count += read("run_cnt")?;
            runs.nanoseconds += read("run_time_ns")?;
        }
        Ok(runs)
    }

    fn since(self, earlier: Self) -> Self {
        Self {
            count: self.count - earlier.count,
            nanoseconds: self.nanoseconds - earlier.nanoseconds,
        }
    }

    fn mean(self) -> f64 {
        self.nanoseconds as f64 / self.count as f64
    }
}

fn programs() -> impl Iterator<Item = ProgramInfo> {
    loaded_programs()
        .flatten()
        .filter(|program| program.name_as_str().is_some_and(|name| PROGRAMS.contains(&name)))
}

/// The lines of the program's `fdinfo` (`bpf_prog_show_fdinfo`, Linux 5.1 and later).
fn counters(program: &ProgramInfo) -> Result<BTreeMap<String, String>> {
    let fd = program.fd()?;
    let number = std::os::fd::AsFd::as_fd(&fd).as_raw_fd();
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{number}"))?;
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    Ok(pairs.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect())
}

/// Time in our programs, per packet and per connection. The kernel's own clock readings are in
/// it, about 30 ns a run.
pub(super) fn measure(path: &Path) -> Result<Vec<Row>> {
    let _statistics = enable_stats(Stats::RunTime)?;
    let during = |work: Work| -> Result<(u64, Runs)> {
        let before = Runs::so_far()?;
        let done = load::run(work, path)?;
        Ok((done.units, Runs::so_far()?.since(before)))
    };
    let (_, stream) = during(Work::Stream)?;
    let (_, exchanges) = during(Work::RequestResponse)?;
    let (connections, short) = during(Work::ConnectRequestClose)?;
    let each = |number: u64| number as f64 / connections as f64;
    let largest = programs().filter_map(|program| program.verified_instruction_count()).max();
    let mut rows = vec![
        Row::new("eBPF per packet, TCP stream", stream.mean(), "ns").goal(Goal::AtMost(350.0)),
        Row::new("eBPF per packet, TCP request/response", exchanges.mean(), "ns")
            .goal(Goal::AtMost(350.0)),
        Row::new("eBPF per packet, connect/request/close", short.mean(), "ns"),
        Row::new("eBPF per connection", each(short.nanoseconds), "ns").goal(Goal::AtMost(9_500.0)),
        Row::new("eBPF runs per connection", each(short.count), "runs"),
    ];
    rows.extend(largest.map(|instructions| {
        Row::new(
            "instructions that the verifier walks, largest program",
            f64::from(instructions),
            "",
        )
    }));
    Ok(rows)
}
