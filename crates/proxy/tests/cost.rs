//! What a request costs the proxy. Run on a quiet machine: `cargo test --release -p palisade-proxy
//! --test cost -- --ignored --nocapture`.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod world;

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use palisade_policy::model::Application;
use world::{
    SERVER4, World,
    agent::{http, rules},
};

const REQUEST: &[u8] =
    b"GET /public/item?id=42 HTTP/1.1\r\nHost: web.x\r\nUser-Agent: load/1.0\r\n\
    Accept: */*\r\nAccept-Encoding: gzip\r\nX-Request-Id: 0123456789abcdef\r\n\r\n";

/// Microseconds of CPU that a process has used: its own, and the kernel's for it.
fn cpu(process: u32) -> [u64; 2] {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    let ticks = |n: usize| fields[n].parse::<u64>().unwrap();
    [ticks(11) * 10_000, ticks(12) * 10_000]
}

fn origin(length: usize) -> impl FnOnce() + Send + 'static {
    move || {
        let listener = TcpListener::bind("[::]:80").unwrap();
        let mut answer = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\nserver: x\r\ncontent-length: {length}\r\n\r\n"
        );
        answer += &"x".repeat(length);
        let answer: Arc<[u8]> = answer.into_bytes().into();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let answer = Arc::clone(&answer);
                thread::spawn(move || serve(stream.unwrap(), &answer));
            }
        });
    }
}

fn serve(mut stream: TcpStream, answer: &[u8]) {
    let mut part = [0; 4096];
    stream.set_nodelay(true).unwrap();
    while let Ok(count @ 1..) = stream.read(&mut part) {
        if part[..count].ends_with(b"\r\n\r\n") && stream.write_all(answer).is_err() {
            return;
        }
    }
}

#[test]
#[ignore = "measures; needs a quiet machine and a release build"]
fn a_request_over_http_1() {
    for (rules_count, length, connections) in
        [(0, 12, 16), (1, 12, 1), (1, 12, 16), (1, 1024, 16), (100, 12, 16), (1, 65536, 4)]
    {
        let mut all: Vec<String> = (1..rules_count).map(|n| format!("GET /other/{n}/.*")).collect();
        all.push("GET /public/.*".into());
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        // Without rules: the bytes are relayed, which is the least that any proxy costs.
        let application = if rules_count == 0 { Application::Any } else { http(&all) };
        let world = World::new(rules(1, &[application]));
        let process = world.proxy.0.id();
        world.server.run(origin(length));
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let clients: Vec<_> = (0..connections)
            .map(|_| {
                let mut stream = world.connect(SERVER4);
                let (stop, count) = (Arc::clone(&stop), Arc::clone(&count));
                thread::spawn(move || {
                    let mut part = vec![0; 70_000];
                    while !stop.load(Relaxed) {
                        stream.write_all(REQUEST).unwrap();
                        let mut got = 0;
                        let mut wanted = usize::MAX;
                        while got < wanted {
                            got += stream.read(&mut part[got..]).unwrap();
                            let head = part[..got].windows(4).position(|end| end == b"\r\n\r\n");
                            wanted = head.map_or(usize::MAX, |end| end + 4 + length);
                        }
                        assert_eq!(&part[..12], b"HTTP/1.1 200");
                        count.fetch_add(1, Relaxed);
                    }
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(300));
        let (cpu_before, count_before, begun) = (cpu(process), count.load(Relaxed), Instant::now());
        thread::sleep(Duration::from_secs(3));
        let requests = count.load(Relaxed) - count_before;
        let used = cpu(process);
        let rate = requests as f64 / begun.elapsed().as_secs_f64();
        stop.store(true, Relaxed);
        for client in clients {
            client.join().unwrap();
        }
        let each = |n: usize| (used[n] - cpu_before[n]) as f64 / requests as f64;
        let (own, kernel) = (each(0), each(1));
        println!(
            "{rules_count} rules, {length} B, {connections} connections: \
             {own:.1} + {kernel:.1} us CPU a request, {rate:.0} a second"
        );
    }
}

/// From the rules' being sent to their acknowledgement, and then for the first request: new ones, one
/// more of them, and the same for other peers.
#[test]
#[ignore = "measures; needs a quiet machine and a release build"]
fn rules_that_change() {
    for count in [1, 100, 1000, 10_000] {
        let all: Vec<String> =
            (0..=count).map(|n| format!("GET /v{n}/items/[0-9]+(/.*)?")).collect();
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let world = World::new(rules(1, &[http(&["GET /public"])]));
        world.server.run(origin(12));
        let (some, more) = (http(&all[1..]), http(&all));
        let mut elsewhere = rules(4, std::slice::from_ref(&more));
        elsewhere.addresses.remove(&world::CLIENT6);
        let versions =
            [("new", rules(2, &[some])), ("one more", rules(3, &[more])), ("the same", elsewhere)];
        for (what, rules) in versions {
            let begun = Instant::now();
            world.agent.put(rules);
            let taken = begun.elapsed();
            let mut stream = world.connect(SERVER4);
            let asked = Instant::now();
            stream.write_all(b"GET /v1/items/5 HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
            let answer = world::until(&mut stream, "xxxxxxxxxxxx");
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            println!("{count} rules, {what}: {taken:?} to take over, {:?} to ask", asked.elapsed());
        }
    }
}
