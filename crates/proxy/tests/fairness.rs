//! What one client does to the proxy, others do not notice: the slowest in a hundred of what they
//! ask takes at most twice as long as when they are alone.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "support/dns_message.rs"]
mod message;
#[path = "support/name_server.rs"]
mod name_server;
#[path = "support/dns_pods.rs"]
mod pods;
mod world;

use std::{
    io::Write,
    net::{Shutdown, TcpStream, UdpSocket},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc::{Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use message::{A, Message};
use name_server::NameServer;
use pods::{OTHER4, plain, query, rcode, receive};
use world::{
    CLIENT4, PORT, SERVER4, WAIT, World,
    agent::{http, rules},
    frames::{END_HEADERS, GET, HEADERS, RST_STREAM, block, frame, raw},
    origin::Origin,
    until,
};

const SAMPLE: Duration = Duration::from_secs(2);
/// Below this it is the machine's other work that is seen.
const UNSEEN: Duration = Duration::from_millis(if cfg!(debug_assertions) { 100 } else { 1 });

/// What the slowest in a hundred takes.
fn slow(ask: &mut impl FnMut()) -> Duration {
    let mut times = Vec::new();
    let begun = Instant::now();
    while begun.elapsed() < SAMPLE {
        let asked = Instant::now();
        ask();
        times.push(asked.elapsed());
    }
    times.sort_unstable();
    times[times.len() * 99 / 100]
}

/// Compares what somebody else asks, alone and while the flood goes on, which says when it begins,
/// goes on until it is over, and then tells how often it did what it does.
#[track_caller]
fn is_hardly_noticed(
    what: &str,
    mut ask: impl FnMut(),
    flood: impl FnOnce(Sender<()>, &AtomicBool) -> u64 + Send,
) {
    let alone = slow(&mut ask);
    let over = AtomicBool::new(false);
    let (begins, begun) = channel();
    let (beside, done) = thread::scope(|scope| {
        let flood = scope.spawn(|| flood(begins, &over));
        let beside = begun.recv().map(|()| slow(&mut ask));
        over.store(true, Relaxed);
        (beside.unwrap(), flood.join().unwrap())
    });
    assert!(done >= 1000, "{what}: only {done}");
    println!("{what}: the slowest in a hundred {alone:?} alone, {beside:?} beside it");
    assert!(beside <= UNSEEN.max(2 * alone), "{what}: {alone:?} alone, {beside:?} beside it");
}

/// Does something so many times a second until it is over; how often it was done.
fn pace(over: &AtomicBool, a_second: u64, mut step: impl FnMut(u64)) -> u64 {
    let begun = Instant::now();
    let mut done = 0;
    while !over.load(Relaxed) && begun.elapsed() < WAIT {
        let due = begun.elapsed().as_millis() as u64 * a_second / 1000;
        if done >= due {
            thread::sleep(Duration::from_millis(1));
            continue;
        }
        step(done);
        done += 1;
    }
    done
}

/// Tests here measure: one at a time.
static MEASURING: Mutex<()> = Mutex::new(());

fn public() -> World {
    World::new(rules(1, &[http(&["GET|POST /public(/.*)?"])]))
}

fn origin(world: &World) -> Origin {
    Origin::new(&world.server, |head, stream| {
        let answer = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nyes!";
        // A part of a body is no request.
        !head.starts_with("GET") || stream.write_all(answer.as_bytes()).is_ok()
    })
}

/// Somebody who asks over a connection that it keeps.
fn asker(world: &World) -> impl FnMut() + use<> {
    let mut stream = world.connect(SERVER4);
    move || {
        stream.write_all(b"GET /public/other HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        assert!(until(&mut stream, "yes!").starts_with("HTTP/1.1 200"));
    }
}

/// So many connections that say something.
fn many(world: &World, count: usize, say: &'static [u8]) -> Vec<TcpStream> {
    world.client.run(move || {
        let connect = move |_| {
            let mut stream = TcpStream::connect((SERVER4, PORT)).ok()?;
            stream.write_all(say).ok()?;
            Some(stream)
        };
        (0..count).filter_map(connect).collect()
    })
}

#[test]
fn heads_that_do_not_end() {
    let _alone = MEASURING.lock().unwrap_or_else(PoisonError::into_inner);
    let world = public();
    let _origin = origin(&world);
    let ask = asker(&world);
    is_hardly_noticed("10,000 heads without an end", ask, |begins, over| {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let count = limit.map_or(10_000, |limit| 10_000.min(limit as usize / 2));
        let mut streams = many(&world, count, b"GET /pub");
        begins.send(()).unwrap();
        let count = streams.len();
        // Many of them are ended by now.
        pace(over, 1000, |n| _ = streams[n as usize % count].write_all(b"l"))
    });
}

#[test]
fn bodies_that_come_byte_by_byte() {
    let _alone = MEASURING.lock().unwrap_or_else(PoisonError::into_inner);
    let world = public();
    let _origin = origin(&world);
    let ask = asker(&world);
    is_hardly_noticed("1,000 bodies, a byte a second", ask, |begins, over| {
        let head = b"POST /public HTTP/1.1\r\nHost: a\r\nContent-Length: 10000\r\n\r\n";
        let mut streams = many(&world, 1000, head);
        begins.send(()).unwrap();
        let count = streams.len();
        pace(over, 1000, |n| _ = streams[n as usize % count].write_all(b"x"))
    });
}

#[test]
fn requests_that_are_taken_back() {
    let _alone = MEASURING.lock().unwrap_or_else(PoisonError::into_inner);
    let world = public();
    let _origin = origin(&world);
    let ask = asker(&world);
    is_hardly_noticed("1,000 requests a second that are taken back", ask, |begins, over| {
        let mut stream = raw(&world);
        let mut number = 1;
        begins.send(()).unwrap();
        pace(over, 1000, |_| {
            let asked = frame(HEADERS, END_HEADERS, number, &block(&GET));
            let taken = frame(RST_STREAM, 0, number, &[0, 0, 0, 8]);
            number += 2;
            // The proxy ends it after a while, and another begins.
            if stream.write_all(&[asked, taken].concat()).is_err() {
                stream = raw(&world);
                number = 1;
            }
        })
    });
}

/// What is denied is answered at once, so there is always a next request to answer.
#[test]
fn denied_requests_without_a_pause() {
    const AT_ONCE: usize = 1000;
    let _alone = MEASURING.lock().unwrap_or_else(PoisonError::into_inner);
    let world = public();
    let _origin = origin(&world);
    let ask = asker(&world);
    let denied = b"GET /secret HTTP/1.1\r\nHost: a\r\n\r\n".repeat(AT_ONCE);
    is_hardly_noticed("denied requests without a pause", ask, |begins, over| {
        let streams = many(&world, thread::available_parallelism().map_or(1, usize::from), b"");
        begins.send(()).unwrap();
        let (denied, asked) = (&denied, &AtomicU64::new(0));
        thread::scope(|scope| {
            for mut stream in &streams {
                scope.spawn(move || {
                    while stream.write_all(denied).is_ok() {
                        asked.fetch_add(AT_ONCE as u64, Relaxed);
                    }
                });
                scope.spawn(move || std::io::copy(&mut stream, &mut std::io::sink()));
            }
            while !over.load(Relaxed) {
                thread::sleep(Duration::from_millis(1));
            }
            streams.iter().for_each(|stream| _ = stream.shutdown(Shutdown::Both));
        });
        asked.load(Relaxed)
    });
}

#[test]
fn questions_without_an_end() {
    const A_SECOND: u64 = 50_000;
    let _alone = MEASURING.lock().unwrap_or_else(PoisonError::into_inner);
    for name in ["evil.org", "mute.cdn.example.com"] {
        let world = pods::world(pods::usual());
        let _server = NameServer::new(&world.server, |asked| {
            if asked.name() == "api.example.com" { plain(asked) } else { Vec::new() }
        });
        let other = pods::socket(&world, OTHER4, SERVER4);
        let ask = || {
            other.send(&query("api.example.com")).unwrap();
            assert_eq!(rcode(&receive(&other)), 0);
        };
        is_hardly_noticed(&format!("50,000 questions a second for {name}"), ask, |begins, over| {
            let greedy: UdpSocket = pods::socket(&world, CLIENT4, SERVER4);
            begins.send(()).unwrap();
            pace(over, A_SECOND, |n| {
                greedy.send(&Message::query(n as u16, name, A).bytes()).unwrap();
            })
        });
    }
}
