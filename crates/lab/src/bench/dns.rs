//! What a pod that floods a name server with questions does to those of another pod, where both
//! have a rule on DNS.

use std::{
    io::{self, ErrorKind},
    net::{SocketAddr, UdpSocket},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use super::{
    blocking,
    cluster::{Cluster, Pods},
    report::{Goal, Row, median},
};
use crate::sys::netns;

/// The port that the rule names.
pub(super) const PORT: u16 = 53;
/// Questions of the flood, each millisecond: 50,000 a second.
const FLOOD: u32 = 50;
/// From one question whose answer is awaited to the next, at least: what a pod may ask is not reached.
const PACE: Duration = Duration::from_micros(250);
/// Rounds; alone and beside the flood take turns.
const ROUNDS: usize = 5;
/// How long one measurement goes on.
const SLICE: Duration = Duration::from_millis(1000);
/// The flood has used up what it may ask at once.
const SETTLED: Duration = Duration::from_millis(200);
/// An answer that takes longer is lost.
const ANSWER: Duration = Duration::from_secs(2);
/// Whoever waits for datagrams looks this often whether it is over.
const PATIENCE: Duration = Duration::from_millis(100);
/// `www.bench.test`, its address, with recursion desired.
const QUESTION: &[u8] = b"\0\0\x01\0\0\x01\0\0\0\0\0\0\x03www\x05bench\x04test\0\0\x01\0\x01";
/// That of the question's name: 198.51.100.1, for a minute.
const RECORD: &[u8] = b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04\xc6\x33\x64\x01";

/// Asks from one pod, alone and beside a flood from another.
pub(super) async fn measure(cluster: &Cluster, pods: &Pods) -> Result<Vec<Row>> {
    let path = pods.path();
    let to = SocketAddr::new(path.address, PORT);
    let flooder = cluster.place("bystander").await?.netns;
    blocking(move || {
        let _server = serve(&path.server, to)?;
        let (mut alone, mut beside, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let quiet = ask(&path.client, to)?;
            let flood = flood(&flooder, to)?;
            thread::sleep(SETTLED);
            let loud = ask(&path.client, to)?;
            drop(flood);
            alone.push(quiet);
            beside.push(loud);
            ratios.push(loud / quiet);
        }
        Ok(vec![
            Row::new("DNS rule: a pod's question, 99th percentile", median(&mut alone), "us"),
            Row::new(
                "the same, beside 50,000 questions a second of another pod",
                median(&mut beside),
                "us",
            ),
            Row::new("DNS rule: beside the flood / alone", median(&mut ratios), "x")
                .goal(Goal::AtMost(2.0)),
        ])
    })
    .await
}

/// A thread that goes on until the value is dropped.
struct Running {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Running {
    fn start(mut turn: impl FnMut() -> io::Result<()> + Send + 'static) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&over);
        let thread = thread::spawn(move || {
            while !seen.load(Relaxed) {
                turn()?;
            }
            Ok(())
        });
        Self { over, thread: Some(thread) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.over.store(true, Relaxed);
        // What it died of shows in what the questions meet.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// A name server that knows one answer.
fn serve(netns: &Path, at: SocketAddr) -> io::Result<Running> {
    let socket = netns::run_in(netns, move || UdpSocket::bind(at))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut message = [0; 512];
    Ok(Running::start(move || {
        let (length, from) = match socket.recv_from(&mut message) {
            Err(error) if waited(&error) => return Ok(()),
            received => received?,
        };
        message[2] |= 0x80;
        message[7] = 1;
        let end = length + RECORD.len();
        message[length..end].copy_from_slice(RECORD);
        socket.send_to(&message[..end], from).map(|_| ())
    }))
}

/// Asks without waiting for answers.
fn flood(netns: &Path, to: SocketAddr) -> io::Result<Running> {
    let socket = connect(netns, to)?;
    let mut due = Instant::now();
    Ok(Running::start(move || {
        for _ in 0..FLOOD {
            // What the pod's own queue has no room for is as good as asked.
            let _ = socket.send(QUESTION);
        }
        due += Duration::from_millis(1);
        thread::sleep(due.saturating_duration_since(Instant::now()));
        Ok(())
    }))
}

/// Asks at the pace; the 99th percentile of the answers' times, in microseconds.
fn ask(netns: &Path, to: SocketAddr) -> Result<f64> {
    let socket = connect(netns, to)?;
    socket.set_read_timeout(Some(ANSWER))?;
    let (mut question, mut answer) = (QUESTION.to_vec(), [0; 512]);
    let mut times = Vec::new();
    let begun = Instant::now();
    while begun.elapsed() < SLICE {
        let id = u16::try_from(times.len() % 0x1_0000)?.to_be_bytes();
        question[..2].copy_from_slice(&id);
        let asked = Instant::now();
        socket.send(&question)?;
        let length = socket.recv(&mut answer).context("no answer to a question")?;
        ensure!(answer[..length].ends_with(RECORD) && answer[..2] == id, "another answer");
        times.push(asked.elapsed());
        thread::sleep(PACE.saturating_sub(asked.elapsed()));
    }
    times.sort_unstable();
    Ok(times[times.len() * 99 / 100].as_secs_f64() * 1e6)
}

fn connect(netns: &Path, to: SocketAddr) -> io::Result<UdpSocket> {
    netns::run_in(netns, move || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(to)?;
        Ok(socket)
    })
}

fn waited(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}
