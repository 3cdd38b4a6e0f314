//! `palisade connectivity test`: clients and servers of its own, and who may talk to whom under each
//! kind of policy.

mod place;
mod probe;
mod report;
mod suite;

use std::{
    collections::{BTreeMap, VecDeque},
    io::Write,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use kube::Client;
use regex::Regex;
use tokio::{sync::Semaphore, task::JoinSet};

use self::{
    place::{Outside, Place, Plan},
    probe::{Answer, Outcome, Probe},
    report::Verdict,
    suite::Test,
};
use crate::{
    cli::Global,
    cluster,
    exit::{Exit, Failure},
    interrupt::Interrupt,
    output::{Format, note, warn},
    progress::Progress,
};

#[derive(Debug, Subcommand)]
pub(crate) enum ConnectivityCommand {
    /// Runs every test and prints what was not as it must be.
    #[command(
        after_help = "Examples:\n  palisade connectivity test\n  palisade connectivity test --test 'ingress|l7' --junit-file results.xml\n  palisade connectivity test --external-target one.one.one.one --external-ip 1.1.1.1,2606:4700:4700::1111"
    )]
    Test(TestArgs),
}

#[derive(Debug, Args)]
pub(crate) struct TestArgs {
    /// Only tests whose names match.
    #[arg(long, value_name = "REGEX")]
    test: Option<Regex>,
    /// Namespaces in which tests run side by side.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=16))]
    test_concurrency: u16,
    /// Image of clients and servers: agnhost, wherever it is to be pulled from.
    #[arg(long, default_value = "registry.k8s.io/e2e-test-images/agnhost:2.47")]
    image: String,
    /// Beginning of the names of the namespaces.
    #[arg(long, default_value = "palisade-test", value_name = "NAME")]
    test_namespace: String,
    #[command(flatten)]
    outside: Outside,
    /// Write the results as JUnit's XML, too.
    #[arg(long, value_name = "FILE")]
    junit_file: Option<PathBuf>,
    /// Leave clients and servers as they are at the end.
    #[arg(long)]
    keep: bool,
    /// Collect what is known of the cluster when the first test fails, while its pods and policies
    /// are still there; see `palisade sysdump`.
    #[arg(long)]
    collect_sysdump_on_failure: bool,
}

/// So many questions of a test are under way at once; most of those that are denied only wait.
const AT_ONCE: usize = 16;
/// A policy must be in force after so long, and stay so.
const SETTLE: Duration = Duration::from_secs(15);

pub(crate) fn run(global: &Global, command: ConnectivityCommand) -> Result<Exit> {
    let ConnectivityCommand::Test(args) = command;
    let wanted = |test: &&Test| args.test.as_ref().is_none_or(|it| it.is_match(test.name));
    let tests: Vec<&'static Test> = suite::TESTS.iter().filter(wanted).collect();
    if tests.is_empty() {
        let names: Vec<&str> = suite::TESTS.iter().map(|test| test.name).collect();
        return Err(Failure::not_found(format!(
            "no test has such a name; there are {}",
            names.join(", ")
        ))
        .into());
    }
    // A file that cannot be written is told of now and not after all tests.
    let junit = args.junit_file.as_deref().map(|file| {
        // What is there stays until there are results.
        let file_options =
            || std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(file);
        file_options().with_context(|| format!("cannot write {}", file.display()))
    });
    let junit = junit.transpose()?;
    let agenda = Arc::new(Agenda::new(&tests));
    let ended = cluster::on_runtime(None, async {
        let client = cluster::client(global).await?;
        let dump = args.collect_sysdump_on_failure.then(|| FirstFailure::new(global.clone()));
        let mut interrupt = Interrupt::new()?;
        let mut interrupted = true;
        let all = async {
            let ended = run_all(&client, &args, &agenda, dump.map(Arc::new)).await;
            interrupted = false;
            ended
        };
        let ended = interrupt.or(all).await;
        if interrupted && !args.keep {
            warn(format_args!("interrupted; taking away clients, servers and policies"));
            return Ok(interrupt.or(remove_all(&client, &args)).await.and(ended));
        }
        Ok(ended)
    });
    let begun = ended.is_ok();
    let ended = ended.flatten();
    let verdicts = agenda.verdicts(&tests);
    if let Some(mut file) = junit {
        let results = report::junit(&verdicts, ended.as_ref().err());
        file.set_len(0).context("--junit-file")?;
        file.write_all(results.as_bytes()).context("--junit-file")?;
    }
    // Whether anybody reads on or not, the exit code is that of the tests.
    match global.output {
        _ if !begun => {}
        Format::Json => note!("{}", serde_json::to_string_pretty(&report::json(&verdicts))?),
        Format::Table => note!("{}", report::text(&verdicts).trim_end()),
    }
    ended?;
    Ok(if verdicts.iter().all(Verdict::passed) { Exit::Ok } else { Exit::No })
}

/// What there is to do, and what came of what was done.
struct Agenda {
    queue: Mutex<VecDeque<&'static Test>>,
    seen: Mutex<Vec<Verdict>>,
}

impl Agenda {
    fn new(tests: &[&'static Test]) -> Self {
        Self { queue: Mutex::new(tests.iter().copied().collect()), seen: Mutex::default() }
    }

    fn left(&self) -> usize {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn next(&self) -> Option<&'static Test> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    fn note(&self, verdict: Verdict) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).push(verdict);
    }

    /// One for each test, in their order. Takes what was noted.
    fn verdicts(&self, tests: &[&'static Test]) -> Vec<Verdict> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut seen: BTreeMap<_, _> = seen.drain(..).map(|it| (it.name, it)).collect();
        let of = |name| seen.remove(name).unwrap_or_else(|| Verdict::unrun(name));
        tests.iter().map(|test| test.name).map(of).collect()
    }
}

/// Collects once, whatever fails after that: later on others' policies have come and gone.
struct FirstFailure {
    global: Global,
    seen: AtomicBool,
}

impl FirstFailure {
    fn new(global: Global) -> Self {
        Self { global, seen: AtomicBool::new(false) }
    }

    async fn collect(&self) {
        if self.seen.swap(true, Ordering::Relaxed) {
            return;
        }
        let global = self.global.clone();
        // It waits for agents and has a runtime of its own.
        let collected = tokio::task::spawn_blocking(move || super::sysdump::collect(&global, None));
        match collected.await.map_err(Into::into).flatten() {
            // The results alone are for standard output.
            Ok(told) => warn(format_args!("{told}")),
            Err(error) => warn(format_args!("warning: nothing is collected: {error:#}")),
        }
    }
}

/// Places take tests off the agenda. Fails, after all tests that can be run, if a place did not start.
async fn run_all(
    client: &Client,
    args: &TestArgs,
    agenda: &Arc<Agenda>,
    dump: Option<Arc<FirstFailure>>,
) -> Result<()> {
    let quiet = Progress::start("starting clients and servers");
    let plan = Plan {
        name: args.test_namespace.clone(),
        image: args.image.clone(),
        outside: args.outside.clone(),
    };
    let count = u16::try_from(agenda.left())
        .map_or(args.test_concurrency, |it| it.min(args.test_concurrency));
    let mut starts = JoinSet::new();
    for number in 1..=count {
        starts.spawn(Place::start(client.clone(), plan.clone(), number));
    }
    let started = starts.join_all().await;
    drop(quiet);
    if let Some(Ok(place)) = started.first() {
        for address in place.out_of_reach() {
            warn(format_args!(
                "warning: {address}: pods have no address of its family to ask from"
            ));
        }
    }
    let mut workers = JoinSet::new();
    let mut problem = None;
    for place in started {
        match place {
            Ok(place) => {
                workers.spawn(work(place, agenda.clone(), args.keep, dump.clone()));
            }
            Err(error) => {
                if let Some(dump) = &dump {
                    dump.collect().await;
                }
                problem = problem.or(Some(error));
            }
        }
    }
    workers.join_all().await;
    let Some(problem) = problem else { return Ok(()) };
    // What did start of a place goes, too.
    if !args.keep
        && let Err(error) = remove_all(client, args).await
    {
        warn(format_args!("warning: {error:#}"));
    }
    Err(problem.context("not all clients and servers started"))
}

/// Takes away what was begun, whatever has become of it.
async fn remove_all(client: &Client, args: &TestArgs) -> Result<()> {
    let mut outcome = Ok(());
    for number in 1..=args.test_concurrency {
        let name = place::namespace(&args.test_namespace, number);
        outcome = outcome.and(place::clear(client, &name).await);
    }
    outcome
}

async fn work(place: Place, agenda: Arc<Agenda>, keep: bool, dump: Option<Arc<FirstFailure>>) {
    while let Some(test) = agenda.next() {
        let begun = Instant::now();
        let mut outcome = judge(&place, test).await;
        if let Some(dump) = &dump
            && !outcome.as_ref().is_ok_and(Judgement::passed)
        {
            dump.collect().await;
        }
        if let Err(error) = place.withdraw(test.policies).await {
            outcome = outcome.and(Err(error.context("its policies stay")));
        }
        let verdict = Verdict::new(test.name, begun.elapsed(), outcome);
        warn(format_args!("{}", verdict.line()));
        agenda.note(verdict);
    }
    if !keep && let Err(error) = place.remove().await {
        warn(format_args!("warning: {error:#}"));
    }
}

/// What a test came to.
enum Judgement {
    /// Every question was asked.
    Asked(Vec<Answer>),
    /// Nothing could be asked.
    Broken(String),
    /// The policy or whom to ask cannot be had here, and that is allowed.
    Skipped(String),
    /// The tests ended before it had.
    Unrun,
}

impl Judgement {
    fn passed(&self) -> bool {
        match self {
            Self::Asked(answers) => answers.iter().all(Answer::is_right),
            Self::Broken(_) | Self::Unrun => false,
            Self::Skipped(_) => true,
        }
    }
}

async fn judge(place: &Place, test: &'static Test) -> Result<Judgement> {
    if place.probes(test.kinds).is_empty() {
        let why: Vec<String> = test.kinds.iter().map(|kind| place.absence(*kind)).collect();
        return Ok(Judgement::Skipped(why.join(", ")));
    }
    let refusal = place.apply(test.policies).await?;
    match refusal {
        Some(why) if test.optional => Ok(Judgement::Skipped(why)),
        Some(why) => Ok(Judgement::Broken(format!("the policy is refused: {why}"))),
        None => settle(place, test).await,
    }
}

/// First until everything is as it must be, then once more: it must stay so.
async fn settle(place: &Place, test: &Test) -> Result<Judgement> {
    let all = place.probes(test.kinds);
    let mut answers = ask(place, test, all.clone()).await;
    // From here on: where one round takes long, the state of before it is no answer for good.
    let begun = Instant::now();
    while answers.iter().any(|it| !it.is_right()) {
        if begun.elapsed() > SETTLE {
            return Ok(Judgement::Asked(answers));
        }
        let (right, wrong): (Vec<_>, Vec<_>) = answers.into_iter().partition(Answer::is_right);
        let again = wrong.into_iter().map(|answer| answer.probe).collect();
        answers = right;
        answers.extend(ask(place, test, again).await);
        answers.sort_by_key(|answer| all.iter().position(|probe| *probe == answer.probe));
    }
    let mut answers = ask(place, test, all).await;
    for answer in &mut answers {
        answer.was_right = true;
    }
    Ok(Judgement::Asked(answers))
}

/// Asks every question once; the answers are in the order of the questions.
async fn ask(place: &Place, test: &Test, probes: Vec<Probe>) -> Vec<Answer> {
    let mut results = run_probes(place, probes.clone()).await;
    results.sort_by_key(|(asked, _)| probes.iter().position(|probe| probe == asked));
    let answer = |(probe, got)| {
        let must = (test.allows)(&probe);
        Answer { probe, must, refusal: test.refusal, got, was_right: false }
    };
    results.into_iter().map(answer).collect()
}

async fn run_probes(place: &Place, probes: Vec<Probe>) -> Vec<(Probe, Outcome)> {
    let mut running = JoinSet::new();
    let permits = Arc::new(Semaphore::new(AT_ONCE));
    for probe in probes {
        let (place, permits) = (place.clone(), permits.clone());
        running.spawn(async move {
            // Nobody closes the semaphore.
            let _permit = permits.acquire().await;
            (probe, probe.run(&place).await)
        });
    }
    running.join_all().await
}
