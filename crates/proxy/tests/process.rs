//! The process as a whole: what it gave up, what it relays, what becomes of headers.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod world;

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream},
    os::unix::fs::MetadataExt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use palisade_abi::PROXY_PORT;
use palisade_api::{
    flow::L7,
    proxy::{Endpoint, Peer, Rules, RulesDelta, ToProxy, USER},
};
use palisade_policy::{
    l7::{HeaderRule, HeaderValue, HttpRule, Mismatch, NamePattern, SecretRef},
    model::Application,
};
use rustix::{
    mount::{MountFlags, MountPropagationFlags},
    thread::{CpuSet, UnshareFlags},
};
use world::{
    CLIENT4, CLIENT6, Namespace, SERVER4, Then, WAIT, World,
    agent::{http, rules, rules_of},
    origin::Origin,
    rest, say, status, until,
};

const REQUEST: &[u8] = b"GET /public HTTP/1.1\r\nHost: a\r\n\r\n";

#[test]
fn the_process_keeps_no_more_than_it_needs() {
    let world = World::new(rules(1, &[http(&["* *"])]));
    let tasks = fs::read_dir(format!("/proc/{}/task", world.proxy.0.id())).unwrap();
    let mut count = 0;
    for task in tasks {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let value = |name: &str| field(&status, name);
        // CAP_NET_BIND_SERVICE is 10, CAP_NET_ADMIN is 12.
        let kept = 1u64 << 10 | 1 << 12;
        for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
            assert_eq!(u64::from_str_radix(&value(set), 16).unwrap(), kept, "{set}");
        }
        for set in ["CapInh:", "CapAmb:"] {
            assert_eq!(value(set), "0000000000000000", "{set}");
        }
        // Real, effective, saved, of the file system.
        for id in ["Uid:", "Gid:"] {
            assert_eq!(value(id), ["14240"; 4].join("\t"), "{id}");
        }
        assert_eq!(value("Groups:"), "");
        assert_eq!(value("NoNewPrivs:"), "1");
        assert_eq!(value("Seccomp:"), "2");
        count += 1;
    }
    assert!(count > 1, "the workers are meant, too");
    let kept = fs::metadata(world.directory.join("state/rules.json")).unwrap();
    assert_eq!((kept.uid(), kept.mode() & 0o777), (USER, 0o600), "secrets are in it");
}

#[test]
fn each_worker_stays_on_a_core_of_its_own() {
    let world = World::new(rules(1, &[http(&["* *"])]));
    let allowed = rustix::thread::sched_getaffinity(None).unwrap();
    let cores: Vec<_> = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core)).collect();
    if thread::available_parallelism().unwrap().get() < cores.len() {
        eprintln!("skipped: this process may not use all of its cores' time");
        return;
    }
    let wanted: BTreeSet<_> = cores.iter().map(ToString::to_string).collect();
    // Rules are acknowledged once each worker runs.
    assert_eq!(worker_cores(world.proxy.0.id()), wanted);
}

/// Where the workers of a proxy may run.
fn worker_cores(proxy: u32) -> BTreeSet<String> {
    let tasks = fs::read_dir(format!("/proc/{proxy}/task")).unwrap();
    let read = |task: io::Result<fs::DirEntry>| {
        fs::read_to_string(task.unwrap().path().join("status")).unwrap()
    };
    let workers = tasks.map(read).filter(|status| field(status, "Name:").starts_with("worker-"));
    workers.map(|status| field(&status, "Cpus_allowed_list:")).collect()
}

/// Of a thread's status.
fn field(status: &str, name: &str) -> String {
    status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned()
}

#[test]
fn rules_from_before_the_machine_started_are_none() {
    let mut world = World::new(rules(1, &[http(&["GET /public"])]));
    let origin = Origin::ok(&world.server);
    world.agent.hang_up();
    world.restart();
    world.await_listener();
    assert_eq!(status(&world.ask(REQUEST)), 200);
    let file = world.directory.join("state/rules.json");
    let kept = fs::read_to_string(&file).unwrap();
    let boot = palisade_api::boot::id().unwrap();
    // As proxies wrote it that took the line end for a part of it.
    let earlier = kept.replacen(&boot, &format!("{boot}\\n"), 1);
    assert_ne!(kept, earlier);
    fs::write(&file, earlier).unwrap();
    world.restart();
    world.await_listener();
    assert_eq!(status(&world.ask(REQUEST)), 200);
    let other = kept.replacen(&boot, "another", 1);
    assert_ne!(kept, other);
    fs::write(&file, other).unwrap();
    world.restart();
    world.await_listener();
    origin.forget();
    assert_eq!(world.ask(REQUEST), b"");
    assert_eq!(origin.seen().connections, 0);
    world.agent.come_back();
    // Of the first version there is an acknowledgement already.
    world.agent.put(rules(2, &[http(&["GET /public"])]));
    assert_eq!(status(&world.ask(REQUEST)), 200);
}

/// Rules count that the disk has no room for; a process that starts then has none, rather than
/// older ones.
#[test]
fn rules_that_a_full_disk_cannot_keep_are_in_force() {
    let mut world = World::new(rules(1, &[http(&["GET /public"])]));
    let origin = Origin::ok(&world.server);
    let state = world.directory.join("state");
    let place = state.clone();
    world.node.run(move || {
        unshare_mounts();
        let (flags, size) = (MountFlags::empty(), Some(c"size=64k"));
        rustix::mount::mount("tmpfs", &place, "tmpfs", flags, size).unwrap();
    });
    let is_kept = |world: &World| {
        let path = state.join("rules.json");
        world.node.run(move || path.exists())
    };
    let names = (0..4000).map(|n| NamePattern::name(&format!("n{n}.example.com")).unwrap());
    let long = Application::Tls(names.collect());
    world.restart();
    world.agent.accept();
    world.agent.put(rules(2, &[http(&["GET /public"])]));
    assert_eq!(status(&world.ask(REQUEST)), 200);
    assert!(is_kept(&world));
    world.agent.put(rules(3, &[http(&["GET /other"]), long.clone()]));
    assert_eq!(status(&world.ask(REQUEST)), 403);
    assert!(!is_kept(&world));
    world.agent.hang_up();
    world.restart();
    world.await_listener();
    origin.forget();
    assert_eq!(world.ask(REQUEST), b"");
    assert_eq!(origin.seen().connections, 0);
    // Once there is room they are kept, though they do not change again.
    world.agent.come_back();
    world.agent.put(rules(4, &[http(&["GET /public"]), long]));
    let place = state.clone();
    world.node.run(move || {
        let (flags, size) = (MountFlags::empty(), c"size=4m");
        rustix::mount::mount_remount(&place, flags, size).unwrap();
    });
    let begun = Instant::now();
    while !is_kept(&world) {
        assert!(begun.elapsed() < WAIT, "the rules are not kept");
        thread::sleep(Duration::from_millis(50));
    }
    world.agent.hang_up();
    world.restart();
    world.await_listener();
    assert_eq!(status(&world.ask(REQUEST)), 200);
}

#[expect(unsafe_code, reason = "rustix marks unshare unsafe for what may be done to file tables")]
fn unshare_mounts() {
    // SAFETY: only the mounts of this thread change, and its working directory is its own.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).unwrap();
}

/// The last policy that asks for a proxy is gone, and the agent knows of none any more.
#[test]
fn a_connection_that_no_rule_knows_any_more_ends_without_a_refusal() {
    let world = World::new(rules(1, &[http(&["GET /public"])]));
    let _origin = Origin::ok(&world.server);
    let mut idle = world.connect(SERVER4);
    idle.write_all(REQUEST).unwrap();
    until(&mut idle, "ok");
    world.agent.put(Rules { version: 2, ..Rules::default() });
    assert_eq!(rest(&mut idle), b"");
}

#[test]
fn what_is_allowed_whole_is_relayed_as_it_is() {
    let world = World::new(rules(1, &[Application::Any]));
    let origin = Origin::on(&world.server, 80, |_, _| true);
    let mut stream = world.connect(SERVER4);
    stream.write_all(b"\x16\x03 anything\n").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rest(&mut stream), b"");
    let seen = origin.wait(|seen| seen.ended == 1);
    assert_eq!(seen.bytes, b"\x16\x03 anything\n");
    let mut stream = world.connect(SERVER4);
    stream.write_all(b"x").unwrap();
    origin.wait(|seen| seen.connections == 2);
    world.agent.put(rules(2, &[]));
    assert_eq!(rest(&mut stream), b"");
    origin.wait(|seen| seen.ended == 2);
}

#[test]
fn who_is_unknown_gets_nothing() {
    let world = World::new(Rules { version: 1, ..Rules::default() });
    let origin = Origin::ok(&world.server);
    assert_eq!(world.ask(REQUEST), b"");
    // A policy of the client counts as well as one of the server.
    let mut both = rules_of(2, CLIENT4, CLIENT6, &[http(&["GET /public"])]);
    for endpoint in both.endpoints.values_mut() {
        *endpoint = Endpoint { ingress: None, egress: endpoint.ingress, ..*endpoint };
    }
    both.addresses = [(SERVER4, Peer { identity: 9, prefix: 0, host: false })].into();
    world.agent.put(both.clone());
    assert_eq!(status(&world.ask(REQUEST)), 200);
    let record = world.agent.record(|record| record.allowed);
    assert!(record.egress.is_some_and(|end| end.allowed) && record.ingress.is_none());
    // Both have to agree.
    let ingress = rules(3, &[http(&["POST /public"])]);
    let mut server = ingress.endpoints[&SERVER4];
    server.ingress = Some(3);
    both.version = 3;
    both.endpoints.insert(SERVER4, server);
    both.tables.insert(3, Arc::clone(&ingress.tables[&2]));
    world.agent.put(both);
    assert_eq!(status(&world.ask(REQUEST)), 403);
    assert_eq!(origin.text().matches("GET").count(), 1);
}

/// Nobody asks for the proxy itself: neither who is on its node, at its own port, nor a pod that
/// dials it at an address of the node.
#[test]
fn who_calls_the_proxy_itself_gets_nothing() {
    let world = World::new(rules(1, &[http(&["* *"])]));
    let origin = Origin::ok(&world.server);
    let call = |namespace: &Namespace, to: SocketAddr| {
        assert_eq!(say(namespace, to, REQUEST, Then::Wait), b"", "{to}");
    };
    for loopback in [IpAddr::V4(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
        call(&world.node, SocketAddr::new(loopback, PROXY_PORT));
    }
    for address in ["10.77.1.1", "fd77:1::1"] {
        for port in [PROXY_PORT, 80] {
            call(&world.client, SocketAddr::new(address.parse().unwrap(), port));
        }
    }
    assert_eq!(origin.seen().connections, 0);
    assert_eq!(status(&world.ask(REQUEST)), 200);
}

/// The kernel is a step ahead: it knows the policy of a pod whose address was nobody's, or another
/// pod's, in the rules at hand.
#[test]
fn what_the_rules_at_hand_would_not_send_here_gets_nothing() {
    let open = Endpoint { id: 8, identity: 301, ingress: None, egress: None };
    let mut rules = rules(1, &[http(&["GET /public"])]);
    let before = std::mem::take(&mut rules.endpoints);
    rules.endpoints = [(CLIENT4, open)].into();
    let world = World::new(rules.clone());
    let origin = Origin::ok(&world.server);
    assert_eq!(world.ask(REQUEST), b"", "to an unknown pod");
    rules.version = 2;
    rules.endpoints.insert(SERVER4, open);
    world.agent.put(rules.clone());
    assert_eq!(world.ask(REQUEST), b"", "to a pod that had no policy");
    assert_eq!(origin.seen().connections, 0);
    rules.version = 3;
    rules.endpoints.insert(SERVER4, before[&SERVER4]);
    world.agent.put(rules);
    assert_eq!(status(&world.ask(REQUEST)), 200);
}

#[test]
fn deltas_are_taken_and_a_wrong_one_ends_the_link() {
    let world = World::new(rules(1, &[http(&["GET /public"])]));
    let _origin = Origin::ok(&world.server);
    let closed = rules(2, &[http(&["GET /other"])]);
    let delta = RulesDelta::between(&rules(1, &[http(&["GET /public"])]), &closed);
    assert!(delta.endpoints.is_empty() && delta.tables.len() == 1);
    world.agent.send(&ToProxy::Delta(delta.clone()));
    world.agent.acknowledged(2);
    assert_eq!(status(&world.ask(REQUEST)), 403);
    world.agent.send(&ToProxy::Delta(delta));
    // The proxy comes again and asks for everything.
    world.agent.accept();
    world.agent.put(rules(7, &[http(&["GET /public"])]));
    assert_eq!(status(&world.ask(REQUEST)), 200);
}

/// Whoever asks while many rules come is judged by those before; whoever asks then does not wait
/// until they are ready, nor does a later version that has the same make them ready again.
#[test]
fn no_request_waits_for_rules_to_be_made_ready() {
    const SOON: Duration = Duration::from_millis(300);
    let patterns: Vec<String> =
        (0..2000).map(|n| format!("GET /api/v{n}/items/[0-9]+(/.*)?")).collect();
    let patterns: Vec<&str> = patterns.iter().map(String::as_str).collect();
    let many = http(&patterns);
    let world = World::new(rules(1, &[http(&["GET /api/v7/items/1"])]));
    let _origin = Origin::ok(&world.server);
    let mut stream = world.connect(SERVER4);
    let ask = |stream: &mut TcpStream, path: &str| {
        let begun = Instant::now();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).unwrap();
        let head = until(stream, "\r\n\r\n");
        until(stream, if head.contains(" 200 ") { "ok" } else { "denied\r\n" });
        (status(head.as_bytes()), begun.elapsed())
    };
    assert_eq!(ask(&mut stream, "/api/v7/items/1").0, 200);
    let all = rules(2, std::slice::from_ref(&many));
    let (over, mut times) = (AtomicBool::new(false), Vec::new());
    thread::scope(|scope| {
        scope.spawn(|| {
            world.agent.put(all);
            over.store(true, Relaxed);
        });
        let begun = Instant::now();
        while !over.load(Relaxed) && begun.elapsed() < world::WAIT {
            // By either version.
            let (status, time) = ask(&mut stream, "/api/v7/items/1");
            assert_eq!(status, 200);
            times.push(time);
        }
    });
    let slowest = times.iter().max().unwrap();
    assert!(*slowest < SOON, "{slowest:?} while the rules came");
    for (path, wanted) in [("/api/v1999/items/5/x", 200), ("/api/v2000/items/5", 403)] {
        let (status, time) = ask(&mut world.connect(SERVER4), path);
        assert_eq!(status, wanted);
        assert!(time < SOON, "{time:?} for {path}");
    }
    // What is said of something else makes nobody compile.
    let begun = Instant::now();
    let mut later = rules(3, &[many, Application::Tls(Vec::new())]);
    later.endpoints.insert(CLIENT4, Endpoint { id: 9, identity: 9, ingress: None, egress: None });
    world.agent.put(later);
    let (status, time) = ask(&mut world.connect(SERVER4), "/api/v0/items/5");
    assert_eq!(status, 200);
    println!("{:?} to take them over again, {time:?} for the first request", begun.elapsed());
}

#[test]
fn headers_are_matched_and_changed_as_the_rules_say() {
    let rule = |name: &str, value: Option<&str>, mismatch| HeaderRule {
        name: name.into(),
        value: value.map(|value| HeaderValue::Text(value.into())),
        mismatch,
    };
    let secret = SecretRef { namespace: "x".into(), name: "s".into(), key: None };
    let headers = vec![
        rule("x-role", Some("user"), Mismatch::Fail),
        rule("x-add", Some("1"), Mismatch::Add),
        rule("x-del", Some("1"), Mismatch::Delete),
        rule("x-rep", Some("1"), Mismatch::Replace),
        rule("x-log", Some("1"), Mismatch::Log),
        HeaderRule {
            name: "x-key".into(),
            value: Some(HeaderValue::Secret(secret.clone())),
            mismatch: Mismatch::Replace,
        },
    ];
    let mut all = rules(1, &[Application::Http(vec![HttpRule { headers, ..HttpRule::default() }])]);
    all.secrets = [(secret, "hidden".to_owned())].into_iter().collect();
    let world = World::new(all);
    let origin = Origin::ok(&world.server);
    let ask = |lines: &str| {
        status(&world.ask(format!("GET / HTTP/1.1\r\nHost: a\r\n{lines}\r\n").as_bytes()))
    };
    for lines in [
        "",
        "X-Role: admin\r\n",
        "X-Role: user\r\nX-Role: admin\r\n",
        "X-Role: user, admin\r\n",
        "X-Role: user\r\nConnection: x-role\r\n",
        "X_Role: user\r\n",
        "X-Role: user\u{fc}\r\n",
        "X-Role: \r\n",
        "X-Role: User\r\n",
    ] {
        assert_eq!(ask(lines), 403, "{lines:?}");
    }
    assert_eq!(ask("X-Role: admin\0x\r\n"), 400);
    assert_eq!(origin.seen().connections, 0);
    assert_eq!(
        ask("X-Role:  user\t\r\nX-Del: 2\r\nX-Del: 1\r\nX-Rep: 2\r\nX-Log: 2\r\nX-Key: 2\r\n"),
        200
    );
    assert_eq!(
        origin.text(),
        "GET / HTTP/1.1\r\nhost: a\r\nx-role: user\r\nx-del: 1\r\nx-log: 2\r\n\
         x-add: 1\r\nx-rep: 1\r\nx-key: hidden\r\n\r\n"
    );
    let record = world.agent.record(|record| record.allowed);
    let L7::Http(seen) = record.l7 else { panic!() };
    assert!(seen.mismatches.contains(&"x-log".into()), "{:?}", seen.mismatches);
}

/// Nothing that is denied gets through while the rules change and connections come and go.
#[test]
fn denied_requests_stay_denied_while_rules_change() {
    let world = World::new(rules(1, &[http(&["GET /public"])]));
    let origin = Origin::ok(&world.server);
    let stop = Arc::new(AtomicBool::new(false));
    thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let mut stream = world.connect(SERVER4);
                        for _ in 0..20 {
                            stream.write_all(b"GET /admin HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
                            until(&mut stream, "Access denied\r\n");
                        }
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            for version in 2.. {
                if stop.load(Relaxed) {
                    return;
                }
                let path = format!("GET /public/{version}");
                world.agent.put(rules(version, &[http(&["GET /public", &path])]));
                thread::sleep(Duration::from_millis(50));
            }
        });
        for worker in workers {
            worker.join().unwrap();
        }
        stop.store(true, Relaxed);
    });
    assert_eq!(origin.seen().connections, 0);
}
