//! What HTTP/2 can be made to mean, and what the origin gets of it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod world;

use std::{
    future::poll_fn,
    io::{Read, Write},
    net::{IpAddr, Ipv6Addr, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use h2::{Reason, client::SendRequest};
use http::{HeaderMap, Request, Response};
use palisade_api::flow::L7;
use palisade_policy::{
    l7::{HeaderRule, HeaderValue, HttpRule, Mismatch, SecretRef},
    model::Application,
};
use palisade_proxy::http::PREFACE;
use tokio::runtime::Runtime;
use world::{
    Namespace, SERVER4, SERVER6, World,
    agent::{http, rules, rules_of},
    frames::{
        CONTINUATION, DATA, END_HEADERS, END_STREAM, GET, GOAWAY, HEADERS, PING, PRIORITY,
        RST_STREAM, SETTINGS, WINDOW_UPDATE, block, frame, next, outcome, raw,
    },
};

fn public() -> World {
    World::new(rules(1, &[http(&["GET|POST|OPTIONS /public(/.*)?", "POST /pkg.Svc/Method"])]))
}

/// An origin that keeps what it is asked.
#[derive(Clone, Default)]
struct Origin {
    asked: Arc<Mutex<Vec<String>>>,
    connections: Arc<Mutex<usize>>,
    told: Arc<tokio::sync::Notify>,
}

impl Origin {
    fn new(namespace: &Namespace) -> Self {
        let origin = Self::default();
        let own = origin.clone();
        namespace.run(move || {
            let listener = std::net::TcpListener::bind((Ipv6Addr::UNSPECIFIED, 80)).unwrap();
            thread::spawn(move || runtime().block_on(own.serve(listener)));
        });
        origin
    }

    async fn serve(self, listener: std::net::TcpListener) {
        listener.set_nonblocking(true).unwrap();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            *self.connections.lock().unwrap() += 1;
            let own = self.clone();
            tokio::spawn(async move {
                let Ok(mut connection) = h2::server::handshake(stream).await else { return };
                while let Some(Ok((request, respond))) = connection.accept().await {
                    tokio::spawn(own.clone().answer(request, respond));
                }
            });
        }
    }

    /// The body comes back, and a trailer after it.
    async fn answer(
        self,
        request: Request<h2::RecvStream>,
        mut respond: h2::server::SendResponse<Bytes>,
    ) {
        let (parts, mut body) = request.into_parts();
        self.asked
            .lock()
            .unwrap()
            .push(format!("{} {} {:?}", parts.method, parts.uri, parts.headers));
        let Ok(mut send) = respond.send_response(Response::new(()), false) else { return };
        while let Some(data) = body.data().await {
            let Ok(data) = data else {
                self.told.notify_one();
                return;
            };
            _ = body.flow_control().release_capacity(data.len());
            send.reserve_capacity(data.len());
            _ = send.send_data(data, false);
        }
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().unwrap());
        trailers.insert("host", "evil".parse().unwrap());
        _ = send.send_trailers(trailers);
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

async fn client(stream: TcpStream) -> SendRequest<Bytes> {
    stream.set_nonblocking(true).unwrap();
    let stream = tokio::net::TcpStream::from_std(stream).unwrap();
    let (send, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    send
}

fn get(path: &str) -> Request<()> {
    Request::get(format!("http://a{path}")).body(()).unwrap()
}

/// Status, headers, body and trailers.
async fn ask(
    send: &SendRequest<Bytes>,
    request: Request<()>,
    body: &'static str,
) -> Result<(u16, HeaderMap, String, Option<HeaderMap>), h2::Error> {
    let mut send = send.clone().ready().await?;
    let (response, mut up) = send.send_request(request, body.is_empty())?;
    if !body.is_empty() {
        up.send_data(Bytes::from_static(body.as_bytes()), true)?;
    }
    let (parts, mut body) = response.await?.into_parts();
    let mut text = String::new();
    while let Some(data) = body.data().await {
        let data = data?;
        text.push_str(std::str::from_utf8(&data).unwrap());
        _ = body.flow_control().release_capacity(data.len());
    }
    Ok((parts.status.as_u16(), parts.headers, text, body.trailers().await?))
}

#[test]
fn each_stream_has_its_own_verdict() {
    let world = public();
    let origin = Origin::new(&world.server);
    let stream = world.connect(SERVER4);
    runtime().block_on(async {
        let send = client(stream).await;
        let all = (0..100).map(|n| {
            let path = if n % 2 == 0 { format!("/public/{n}") } else { format!("/admin/{n}") };
            let send = &send;
            async move { (n, ask(send, get(&path), "").await.unwrap()) }
        });
        for (n, (status, headers, body, trailers)) in futures::future::join_all(all).await {
            if n % 2 == 0 {
                assert_eq!(status, 200);
                let trailers = trailers.unwrap();
                assert!(trailers.contains_key("grpc-status") && !trailers.contains_key("host"));
            } else {
                assert_eq!((status, body.as_str()), (403, "Access denied\r\n"));
                assert_eq!(headers["content-type"], "text/plain");
                assert_eq!(headers["server"], "envoy");
            }
        }
    });
    let asked = origin.asked();
    assert_eq!(asked.len(), 50);
    assert!(asked.iter().all(|asked| asked.starts_with("GET http://a/public/")), "{asked:?}");
    assert_eq!(*origin.connections.lock().unwrap(), 1);
    let record = world.agent.record(|record| record.allowed);
    let L7::Http(seen) = record.l7 else { panic!() };
    assert_eq!((&*seen.version, seen.status), ("HTTP/2", Some(200)));
}

/// The same forms as over HTTP/1, although others read the frames.
#[test]
fn paths_are_judged_and_forwarded_in_one_form() {
    let world = public();
    let origin = Origin::new(&world.server);
    for (path, wanted) in [
        ("/public/../admin", None),
        ("/public/./../admin", None),
        ("/public/%2e%2e/admin", None),
        ("/public/.%2E/admin", None),
        ("/public%2f..%2fadmin", None),
        ("/public/..%5cadmin", None),
        (r"/public\..\admin", None),
        ("/public/%2F", None),
        ("//admin", None),
        ("/public//../admin", None),
        ("/admin/.", None),
        ("/public/..;/admin", None),
        ("/public/;x", None),
        ("/public;a=b/..;/admin", None),
        ("/public/%3b", None),
        ("/%61dmin", None),
        ("/%2561dmin", None),
        ("/public/%2561", Some("/public/%2561")),
        ("/%70ublic", Some("/public")),
        ("/public/%00", None),
        ("/public/%0d%0a", None),
        ("/public/%zz", None),
        ("/public/%2", None),
        ("/public/%c0%ae", None),
        ("/public/%ff", None),
        ("/public/%u002e", None),
        ("/public/／", None),
        ("/public/\u{80}", None),
        ("/public/\x01", None),
        ("/public/\x7f", None),
        ("/public/\t", None),
        ("/PUBLIC", None),
        ("/public.", None),
        ("/public%20", None),
        ("/publicx", None),
        ("/public/?x=/../admin", Some("/public/?x=/../admin")),
        ("/public/..?x", None),
        ("/?x=/public", None),
        ("/public/?", Some("/public/?")),
        ("/public/?%00", Some("/public/?%00")),
        ("/public/a/../b/./c//d", Some("/public/b/c/d")),
        ("/public/%e2%82%ac", Some("/public/%E2%82%AC")),
        ("/../../public", Some("/public")),
        ("/public/...", Some("/public/...")),
        ("/public/a%2e", Some("/public/a.")),
        ("/admin#", None),
        ("/admin#/../public", None),
        ("/public#/../admin", None),
        ("/public#", None),
        ("/public/?a#/admin", None),
    ] {
        let before = origin.asked().len();
        let mut stream = raw(&world);
        let fields = [&GET[..3], &[(":path", path)]].concat();
        stream.write_all(&frame(HEADERS, END_STREAM | END_HEADERS, 1, &block(&fields))).unwrap();
        let allowed = match outcome(&mut stream) {
            Some((HEADERS, 1, block)) => !refuses(&block),
            Some((RST_STREAM | GOAWAY, ..)) | None => false,
            other => panic!("{path}: {other:?}"),
        };
        assert_eq!(allowed, wanted.is_some(), "{path}");
        let seen = origin.asked().split_off(before);
        let wanted: Vec<_> = wanted.iter().map(|path| format!("GET http://a{path} {{}}")).collect();
        assert_eq!(seen, wanted, "{path}");
    }
}

/// What rules say of headers, over a reader and a writer that are not those of HTTP/1.
#[test]
fn headers_are_matched_and_changed_as_the_rules_say() {
    let rule = |name: &str, value, mismatch| HeaderRule {
        name: name.into(),
        value: Some(value),
        mismatch,
    };
    let text = |value: &str| HeaderValue::Text(value.into());
    let secret = SecretRef { namespace: "x".into(), name: "s".into(), key: None };
    let headers = vec![
        rule("x-role", text("user"), Mismatch::Fail),
        rule("x-add", text("1"), Mismatch::Add),
        rule("x-rep", text("1"), Mismatch::Replace),
        rule("x-log", text("1"), Mismatch::Log),
        rule("x-key", HeaderValue::Secret(secret.clone()), Mismatch::Replace),
    ];
    let mut all = rules(1, &[Application::Http(vec![HttpRule { headers, ..HttpRule::default() }])]);
    all.secrets = [(secret, "hidden".to_owned())].into_iter().collect();
    let world = World::new(all);
    let origin = Origin::new(&world.server);
    let stream = world.connect(SERVER4);
    runtime().block_on(async {
        let send = client(stream).await;
        let with = |fields: &[(&str, &[u8])]| {
            let mut request = get("/");
            for (name, value) in fields {
                let name: http::HeaderName = name.parse().unwrap();
                request.headers_mut().append(name, http::HeaderValue::from_bytes(value).unwrap());
            }
            request
        };
        let denied: [&[(&str, &[u8])]; 9] = [
            &[],
            &[("x-role", b"admin")],
            &[("x-role", b"user"), ("x-role", b"admin")],
            &[("x-role", b"admin"), ("x-role", b"user")],
            &[("x-role", b"user, admin")],
            &[("x_role", b"user")],
            &[("x-role", b"user\xfc")],
            &[("x-role", b"")],
            &[("x-role", b"User")],
        ];
        for fields in denied {
            let status = ask(&send, with(fields), "").await.unwrap().0;
            assert_eq!(status, 403, "{fields:?}");
        }
        assert_eq!(origin.asked(), [""; 0]);
        let fields: &[(&str, &[u8])] = &[
            ("x-role", b"user"),
            ("x_role", b"admin"),
            ("x-rep", b"2"),
            ("x-rep", b"3"),
            ("x-log", b"2"),
            ("x-key", b"guess"),
        ];
        assert_eq!(ask(&send, with(fields), "").await.unwrap().0, 200);
    });
    let asked = origin.asked();
    let fields = asked[0].strip_prefix("GET http://a/ {").and_then(|it| it.strip_suffix('}'));
    let mut fields: Vec<&str> = fields.unwrap().split(", ").collect();
    fields.sort_unstable();
    let wanted = [
        r#""x-add": "1""#,
        r#""x-key": "hidden""#,
        r#""x-log": "2""#,
        r#""x-rep": "1""#,
        r#""x-role": "user""#,
    ];
    assert_eq!(fields, wanted);
}

/// Nothing that a rule would put into a request is left out of it without a word, and nothing else
/// than a header of the request is put into it.
#[test]
fn what_cannot_be_written_passes_nothing() {
    let world = public();
    let origin = Origin::new(&world.server);
    for (version, (name, value, mismatch)) in (2..).zip([
        ("x", "1\n", Mismatch::Add),
        ("x", "1\r\ny: z", Mismatch::Replace),
        ("x", " 1", Mismatch::Add),
        ("x y", "1", Mismatch::Add),
        ("te", "trailers", Mismatch::Add),
        ("transfer-encoding", "chunked", Mismatch::Add),
        ("content-length", "7", Mismatch::Replace),
        ("content-length", "7", Mismatch::Delete),
        ("host", "b", Mismatch::Add),
    ]) {
        let value = Some(HeaderValue::Text(value.into()));
        let header = HeaderRule { name: name.into(), value, mismatch };
        let rule = HttpRule { headers: vec![header], ..HttpRule::default() };
        world.agent.put(rules(version, &[Application::Http(vec![rule])]));
        let stream = world.connect(SERVER4);
        let status = runtime().block_on(async {
            let send = client(stream).await;
            let mut request = get("/");
            request.headers_mut().insert("content-length", 2.into());
            ask(&send, request, "ok").await.unwrap().0
        });
        assert_eq!(status, 403, "{name}");
    }
    assert_eq!(origin.asked(), [""; 0]);
}

#[test]
fn what_is_refused_is_told_of() {
    let world = public();
    let _origin = Origin::new(&world.server);
    let stream = world.connect(SERVER4);
    runtime().block_on(async {
        let send = client(stream).await;
        let refused = get("/public/%zz?token=s3cret");
        assert_eq!(ask(&send, refused, "").await.unwrap().0, 400);
    });
    let L7::Http(told) = world.agent.record(|record| !record.allowed).l7 else { panic!() };
    assert_eq!((&*told.method, &*told.url), ("GET", "http://a/public/%zz?token=[redacted]"));
    assert_eq!(told.status, Some(400));
}

#[test]
fn grpc_is_denied_in_its_own_words() {
    let world = public();
    let origin = Origin::new(&world.server);
    let stream = world.connect(SERVER4);
    runtime().block_on(async {
        let send = client(stream).await;
        let call = |path: &str| {
            let request = Request::post(format!("http://a{path}"));
            let request = request.header("content-type", "application/grpc+proto");
            request.header("te", "trailers").body(()).unwrap()
        };
        let (status, headers, body, trailers) =
            ask(&send, call("/pkg.Svc/Method"), "\0\0\0\0\0").await.unwrap();
        assert_eq!((status, body.as_str()), (200, "\0\0\0\0\0"));
        assert_eq!(trailers.unwrap()["grpc-status"], "0");
        assert!(!headers.contains_key("grpc-status"));
        for path in [
            "/pkg.Svc/method",
            "/pkg.Svc/Method/",
            "/pkg.Svc/Other",
            "/PKG.Svc/Method",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        ] {
            let (status, headers, body, _) = ask(&send, call(path), "").await.unwrap();
            assert_eq!((status, body.as_str()), (200, ""), "{path}");
            assert_eq!(headers["grpc-status"], "7");
            assert_eq!(headers["grpc-message"], "Access denied%0D%0A");
            assert_eq!(headers["content-type"], "application/grpc");
        }
        for path in ["//pkg.Svc/Method", "/pkg%2eSvc/Method"] {
            assert_eq!(ask(&send, call(path), "x").await.unwrap().2, "x", "{path}");
        }
    });
    // What only begins like gRPC is denied in the words of HTTP.
    let stream = world.connect(SERVER4);
    runtime().block_on(async {
        let send = client(stream).await;
        for (kind, status) in [
            ("application/grpc", 200),
            ("application/grpc; charset=utf-8", 200),
            ("application/grpc+json", 200),
            ("application/grpc-web", 403),
            ("application/grpc-web+proto", 403),
            ("application/grpcx", 403),
        ] {
            let request = Request::post("http://a/pkg.Svc/Other").header("content-type", kind);
            let answer = ask(&send, request.body(()).unwrap(), "").await.unwrap();
            assert_eq!(answer.0, status, "{kind}");
        }
    });
    let asked = origin.asked();
    assert_eq!(asked.len(), 3);
    assert!(
        asked.iter().all(|asked| asked.starts_with("POST http://a/pkg.Svc/Method ")),
        "{asked:?}"
    );
    assert!(asked[0].contains("\"te\": \"trailers\""), "{asked:?}");
}

/// What is packed stays so: nobody can make the proxy unpack much of little.
#[test]
fn packed_messages_pass_as_they_are() {
    let world = public();
    let origin = Origin::new(&world.server);
    let packed = world::bomb();
    let length = u32::try_from(packed.len()).unwrap().to_be_bytes();
    let message = Bytes::from([&[1][..], &length, &packed].concat());
    let stream = world.connect(SERVER4);
    let before = world.proxy.memory();
    runtime().block_on(async {
        let mut ready = client(stream).await.ready().await.unwrap();
        let call = Request::post("http://a/pkg.Svc/Method")
            .header("content-type", "application/grpc")
            .header("grpc-encoding", "gzip")
            .header("content-encoding", "gzip")
            .header("te", "trailers");
        let (response, mut up) = ready.send_request(call.body(()).unwrap(), false).unwrap();
        let mut rest = message.clone();
        let upload = tokio::spawn(async move {
            while !rest.is_empty() {
                up.reserve_capacity(rest.len());
                let room = poll_fn(|cx| up.poll_capacity(cx)).await.unwrap().unwrap();
                let part = rest.split_to(room.min(rest.len()));
                up.send_data(part, rest.is_empty()).unwrap();
            }
        });
        // The origin sends back what it gets.
        let mut body = response.await.unwrap().into_body();
        let mut echo = Vec::new();
        while let Some(data) = body.data().await {
            let data = data.unwrap();
            body.flow_control().release_capacity(data.len()).unwrap();
            echo.extend(data);
        }
        upload.await.unwrap();
        assert!(echo == message, "{} of {} bytes came back", echo.len(), message.len());
        assert_eq!(body.trailers().await.unwrap().unwrap()["grpc-status"], "0");
    });
    let after = world.proxy.memory();
    assert!(after < before + (8 << 10), "{before} KiB, then {after} KiB");
    let asked = origin.asked();
    for field in ["\"grpc-encoding\": \"gzip\"", "\"content-encoding\": \"gzip\""] {
        assert!(asked[0].contains(field), "{asked:?}");
    }
}

#[test]
fn long_streams_end_with_the_permission() {
    let world = public();
    let origin = Origin::new(&world.server);
    let stream = world.connect(SERVER4);
    runtime().block_on(async {
        let send = client(stream).await;
        let mut ready = send.clone().ready().await.unwrap();
        let post = Request::post("http://a/public").body(()).unwrap();
        let (response, mut up) = ready.send_request(post, false).unwrap();
        up.send_data(Bytes::from_static(b"first"), false).unwrap();
        let mut body = response.await.unwrap().into_body();
        assert_eq!(body.data().await.unwrap().unwrap(), "first");
        let begun = Instant::now();
        let agent = &world.agent;
        agent.put(rules(2, &[http(&["GET /other"])]));
        let error = body.data().await.unwrap().unwrap_err();
        assert_eq!(error.reason(), Some(Reason::CANCEL));
        assert_eq!(ask(&send, get("/public"), "").await.unwrap().0, 403);
        origin.told.notified().await;
        assert!(begun.elapsed() < Duration::from_secs(1));
    });
}

#[test]
fn the_server_hears_that_a_client_is_gone() {
    let world = public();
    let origin = Origin::new(&world.server);
    let stream = world.connect(SERVER4);
    runtime().block_on(async {
        let send = client(stream).await;
        let mut ready = send.clone().ready().await.unwrap();
        let post = Request::post("http://a/public").body(()).unwrap();
        let (response, mut up) = ready.send_request(post, false).unwrap();
        response.await.unwrap();
        up.send_reset(Reason::CANCEL);
        origin.told.notified().await;
        assert_eq!(ask(&send, get("/public"), "").await.unwrap().0, 200, "others are unharmed");
    });
}

#[test]
fn large_bodies_flow_in_little_memory() {
    let world = public();
    let _origin = Origin::new(&world.server);
    let stream = world.connect(SERVER4);
    runtime().block_on(async {
        let send = client(stream).await;
        let mut ready = send.ready().await.unwrap();
        let post = Request::post("http://a/public").body(()).unwrap();
        let (response, mut up) = ready.send_request(post, false).unwrap();
        let total = 64usize << 20;
        let upload = tokio::spawn(async move {
            let mut left = total;
            while left > 0 {
                up.reserve_capacity(left.min(1 << 16));
                let room = poll_fn(|cx| up.poll_capacity(cx)).await.unwrap().unwrap().min(left);
                left -= room;
                up.send_data(vec![b'x'; room].into(), left == 0).unwrap();
            }
        });
        let mut body = response.await.unwrap().into_body();
        let mut got = 0;
        while let Some(data) = body.data().await {
            let data = data.unwrap();
            got += data.len();
            body.flow_control().release_capacity(data.len()).unwrap();
        }
        upload.await.unwrap();
        assert_eq!(got, total);
    });
}

/// Streams that ask for much and make no room for it.
#[test]
fn answers_without_room_stay_with_the_server() {
    let world = public();
    let _origin = Origin::new(&world.server);
    let (stream, other) = (world.connect(SERVER4), world.connect(SERVER4));
    let before = world.proxy.memory();
    runtime().block_on(async {
        stream.set_nonblocking(true).unwrap();
        let stream = tokio::net::TcpStream::from_std(stream).unwrap();
        let mut closed = h2::client::Builder::new();
        closed.initial_window_size(0);
        let (send, connection) = closed.handshake::<_, Bytes>(stream).await.unwrap();
        tokio::spawn(connection);
        let mut kept = Vec::new();
        for _ in 0..100 {
            let post = Request::post("http://a/public").body(()).unwrap();
            let mut ready = send.clone().ready().await.unwrap();
            let (response, mut up) = ready.send_request(post, false).unwrap();
            let answer = response.await.unwrap();
            // The origin sends back all that it gets.
            tokio::spawn(async move {
                loop {
                    up.reserve_capacity(1 << 16);
                    let room = poll_fn(|cx| up.poll_capacity(cx)).await;
                    let Some(Ok(room)) = room else { return };
                    if up.send_data(vec![b'x'; room].into(), false).is_err() {
                        return;
                    }
                }
            });
            kept.push(answer);
        }
        // What is asked on another connection takes its turn after all of that.
        let send = client(other).await;
        for _ in 0..20 {
            assert_eq!(ask(&send, get("/public"), "").await.unwrap().0, 200);
        }
    });
    let after = world.proxy.memory();
    assert!(after < before + (32 << 10), "{before} KiB, then {after} KiB");
}

// Raw frames, for what no library sends.

/// An origin that says the same to every request, in frames of stream 1, and keeps what it got. It
/// hands out each connection once it has answered on it.
fn saying(namespace: &Namespace, frames: Vec<u8>) -> std::sync::mpsc::Receiver<TcpStream> {
    let (hand, handed) = std::sync::mpsc::channel();
    namespace.run(move || {
        let listener = std::net::TcpListener::bind((Ipv6Addr::UNSPECIFIED, 80)).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut preface = [0; PREFACE.len()];
                stream.read_exact(&mut preface).unwrap();
                stream.write_all(&frame(SETTINGS, 0, 0, &[])).unwrap();
                assert!(matches!(outcome(&mut stream), Some((HEADERS, 1, _))));
                stream.write_all(&frames).unwrap();
                _ = hand.send(stream);
            }
        });
    });
    handed
}

/// A server may answer before it has all of the request, and end the stream then.
#[test]
fn an_early_answer_is_whole() {
    let reset = |reason| frame(RST_STREAM, 0, 1, &[0, 0, 0, reason]);
    let data = |flags| frame(DATA, flags, 1, &[b'x'; 1000]);
    let trailers = frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(&[("grpc-status", "9")]));
    let gone = [frame(GOAWAY, 0, 0, &[0; 8]), reset(8)].concat();
    for (name, frames, whole) in [
        ("ended", [data(END_STREAM), reset(0)], true),
        ("with trailers", [[data(0), trailers].concat(), reset(0)], true),
        ("taken back", [data(0), reset(8)], false),
        ("given up", [data(0), gone], false),
    ] {
        let world = public();
        let head = frame(HEADERS, END_HEADERS, 1, &block(&[(":status", "200")]));
        let _kept = saying(&world.server, [&[head], &frames[..]].concat().concat());
        let stream = world.connect(SERVER4);
        runtime().block_on(async {
            let mut ready = client(stream).await.ready().await.unwrap();
            let post = Request::post("http://a/public").body(()).unwrap();
            let (response, _up) = ready.send_request(post, false).unwrap();
            // What is taken back may be so before any of it is forwarded.
            let Ok(answer) = response.await else { return assert!(!whole, "{name}") };
            let mut body = answer.into_body();
            let (mut length, mut broken) = (0, false);
            while let Some(data) = body.data().await {
                broken |= data.is_err();
                length += data.map_or(0, |data| data.len());
            }
            assert_eq!(length == 1000 && !broken, whole, "{name}: {length} bytes");
            if name == "with trailers" {
                assert_eq!(body.trailers().await.unwrap().unwrap()["grpc-status"], "9");
            }
        });
    }
}

/// Whoever wants nobody to see what it asks for could else take it back once the server has it.
#[test]
fn what_is_taken_back_from_the_server_is_told_of() {
    let cancel = frame(RST_STREAM, 0, 1, &[0, 0, 0, 8]);
    let trailers = frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(&[("connection", "close")]));
    for (name, then) in
        [("taken back", cancel), ("hung up", Vec::new()), ("malformed in the end", trailers)]
    {
        let world = public();
        let servers = saying(&world.server, Vec::new());
        let mut stream = raw(&world);
        let fields = [&[(":method", "POST")], &GET[1..]].concat();
        stream.write_all(&frame(HEADERS, END_HEADERS, 1, &block(&fields))).unwrap();
        let _server = servers.recv_timeout(world::WAIT).unwrap();
        stream.write_all(&then).unwrap();
        if then.is_empty() {
            drop(stream);
        }
        let record = world.agent.record(|record| matches!(record.l7, L7::Http(_)));
        let L7::Http(http) = &record.l7 else { panic!("{name}: {record:?}") };
        assert!(record.allowed, "{name}: {record:?}");
        assert_eq!((http.status, http.error.is_some()), (None, true), "{name}: {record:?}");
    }
}

/// They have no window, so whoever sends many to a client that reads none would fill the memory.
#[test]
fn interim_answers_have_a_bound() {
    for (interims, status) in [(8, 200), (9, 502)] {
        let world = public();
        let head = |flags, status| frame(HEADERS, flags, 1, &block(&[(":status", status)]));
        let mut frames = vec![head(END_HEADERS, "103"); interims];
        frames.push(head(END_HEADERS | END_STREAM, "200"));
        let _kept = saying(&world.server, frames.concat());
        let stream = world.connect(SERVER4);
        let answered =
            runtime().block_on(async { ask(&client(stream).await, get("/public"), "").await });
        assert_eq!(answered.unwrap().0, status, "{interims}");
    }
}

/// Whether a header block begins with a status that refuses: not one of the static 200 to 304.
fn refuses(block: &[u8]) -> bool {
    !matches!(block.first(), Some(0x88..=0x8b))
}

#[test]
fn malformed_requests_reach_nobody() {
    let world = public();
    let origin = Origin::new(&world.server);
    let plain = |name: &'static str, value: &'static str| [&GET[..], &[(name, value)]].concat();
    let without = |name: &str| GET.iter().copied().filter(|(own, _)| *own != name).collect();
    let path = |path: &'static str| -> Vec<_> {
        GET.iter()
            .map(|&(name, value)| (name, if name == ":path" { path } else { value }))
            .collect()
    };
    let scheme = |scheme: &'static str| -> Vec<_> {
        GET.iter()
            .map(|&(name, value)| (name, if name == ":scheme" { scheme } else { value }))
            .collect()
    };
    let cases: Vec<(&str, Vec<(&str, &str)>)> = vec![
        ("no method", without(":method")),
        ("no scheme", without(":scheme")),
        ("no path", without(":path")),
        ("no authority", without(":authority")),
        ("method twice", plain(":method", "GET")),
        ("path twice", plain(":path", "/public")),
        ("unknown pseudo", plain(":other", "x")),
        ("status", plain(":status", "200")),
        ("pseudo after regular", [&[("x", "y")], &GET[..]].concat()),
        ("empty path", path("")),
        ("no slash", path("public")),
        ("URL", path("http://a/public")),
        ("space", path("/public/ x")),
        ("CR LF", path("/public/\r\nx: y")),
        ("NUL", path("/public/\0")),
        ("dots", path("/public/../admin")),
        ("encoded slash", path("/public%2f")),
        ("semicolon", path("/public;x")),
        ("asterisk", path("*")),
        ("backslash", path("/public\\x")),
        ("upper case", plain("X-Role", "x")),
        ("connection", plain("connection", "close")),
        ("keep-alive", plain("keep-alive", "5")),
        ("proxy-connection", plain("proxy-connection", "x")),
        ("coding", plain("transfer-encoding", "chunked")),
        ("upgrade", plain("upgrade", "websocket")),
        ("te", plain("te", "gzip")),
        ("colon", plain("a:b", "x")),
        ("empty name", plain("", "x")),
        ("CR LF in a value", plain("x", "a\r\nb: c")),
        ("NUL in a value", plain("x", "a\0b")),
        ("space in a name", plain("a b", "x")),
        ("LF in a value", plain("x", "a\nb")),
        ("quote in a name", plain("a\"b", "x")),
        ("space before a value", plain("x", " a")),
        ("tab after a value", plain("x", "a\t")),
        ("another host", plain("host", "b")),
        ("mixed scheme", scheme("htTp")),
        ("https", scheme("https")),
        ("userinfo", [&GET[..2], &[(":authority", "u@a"), (":path", "/public")]].concat()),
        ("two hosts in one", [&GET[..2], &[(":authority", "a,b"), (":path", "/public")]].concat()),
        ("CONNECT", vec![(":method", "CONNECT"), (":authority", "a:80")]),
        (
            "extended CONNECT",
            vec![
                (":method", "CONNECT"),
                (":protocol", "websocket"),
                (":scheme", "http"),
                (":path", "/public"),
                (":authority", "a"),
            ],
        ),
        (
            "CONNECT with a path",
            vec![
                (":method", "CONNECT"),
                (":authority", "a"),
                (":path", "/public"),
                (":scheme", "http"),
            ],
        ),
        ("two lengths", [&GET[..], &[("content-length", "0"), ("content-length", "1")]].concat()),
        ("bad length", plain("content-length", "+1")),
        ("empty length", plain("content-length", "")),
        ("length without a body", plain("content-length", "5")),
        ("lower case method", [&[(":method", "get")], &GET[1..]].concat()),
    ];
    for (name, fields) in cases {
        let mut stream = raw(&world);
        let request = frame(HEADERS, END_STREAM | END_HEADERS, 1, &block(&fields));
        stream.write_all(&request).unwrap();
        match outcome(&mut stream) {
            Some((HEADERS, 1, block)) => assert!(refuses(&block), "{name}: {block:x?}"),
            Some((RST_STREAM | GOAWAY, ..)) | None => {}
            other => panic!("{name}: {other:?}"),
        }
        assert_eq!(origin.asked(), [""; 0], "{name}");
    }
    // The frames themselves are fine: the same without a fault passes.
    let mut stream = raw(&world);
    stream.write_all(&frame(HEADERS, END_STREAM | END_HEADERS, 1, &block(&GET))).unwrap();
    assert!(matches!(outcome(&mut stream), Some((HEADERS, 1, block)) if !refuses(&block)));
    assert_eq!(origin.asked().len(), 1);
}

#[test]
fn bodies_are_as_long_as_they_say() {
    let world = public();
    let _origin = Origin::new(&world.server);
    let post = |length: &'static str| {
        block(&[&[(":method", "POST")], &GET[1..], &[("content-length", length)]].concat())
    };
    for (name, frames) in [
        (
            "longer",
            [frame(HEADERS, END_HEADERS, 1, &post("3")), frame(DATA, END_STREAM, 1, b"12345")],
        ),
        (
            "shorter",
            [frame(HEADERS, END_HEADERS, 1, &post("9")), frame(DATA, END_STREAM, 1, b"12345")],
        ),
        (
            "after the end",
            [
                frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(&GET)),
                frame(DATA, END_STREAM, 1, b"12345"),
            ],
        ),
        (
            "trailers that do not end",
            [
                frame(HEADERS, END_HEADERS, 1, &post("0")),
                frame(HEADERS, END_HEADERS, 1, &block(&[("x", "y")])),
            ],
        ),
    ] {
        println!("{name}");
        let mut stream = raw(&world);
        _ = stream.write_all(&frames.concat());
        loop {
            match outcome(&mut stream) {
                // What was right before the fault may be answered.
                Some((HEADERS, ..)) => {}
                Some((RST_STREAM | GOAWAY, ..)) | None => break,
                other => panic!("{name}: {other:?}"),
            }
        }
    }
    let stream = world.connect(SERVER4);
    let status = runtime()
        .block_on(async { ask(&client(stream).await, get("/public"), "").await.unwrap().0 });
    assert_eq!(status, 200, "the proxy lives");
}

/// The crate drops these before anybody sees them. Streams beside them are unharmed.
#[test]
fn what_the_crate_drops_is_refused() {
    let world = public();
    let origin = Origin::new(&world.server);
    let post = [&[(":method", "POST")], &GET[1..]].concat();
    let without_path = block(&GET[..3]);
    // As its index, by the index of its name, as text, as text in Huffman's code, by the index of
    // what the table keeps.
    let trailers: [(&str, &[u8]); 5] = [
        ("index", b"\x84"),
        ("name", b"\x04\x06/admin"),
        ("text", b"\0\x05:path\x06/admin"),
        ("code", b"\0\x84\xb9\x58\xd3\x3f\x06/admin"),
        ("table", b"\xbe"),
    ];
    let heads: [(&str, &[u8]); 5] = [
        ("text", b"\x04\x09/public#x"),
        ("name as text", b"\0\x05:path\x09/public#x"),
        ("name in code", b"\0\x84\xb9\x58\xd3\x3f\x09/public#x"),
        ("code", b"\x04\x83\x63\xfe\xbf"),
        ("table", b"\xbe"),
    ];
    // A path for the table, of a request that is refused for it.
    let kept = [&without_path[..], b"\x44\x09/public#x"].concat();
    let kept = frame(HEADERS, END_HEADERS | END_STREAM, 1, &kept);
    let trailers = trailers.iter().map(|(name, end)| {
        let head = frame(HEADERS, END_HEADERS, 3, &block(&post));
        (name, [head, frame(HEADERS, END_HEADERS | END_STREAM, 3, end)].concat())
    });
    let heads = heads.iter().map(|(name, path)| {
        let head = [&without_path[..], path].concat();
        (name, frame(HEADERS, END_HEADERS | END_STREAM, 3, &head))
    });
    for (name, frames) in trailers.chain(heads) {
        let mut stream = raw(&world);
        let other = frame(HEADERS, END_HEADERS | END_STREAM, 5, &block(&GET));
        stream.write_all(&[&kept[..], &frames, &other].concat()).unwrap();
        let (mut refused, mut answered) = (Vec::new(), false);
        while refused.len() < 2 || !answered {
            match outcome(&mut stream) {
                Some((RST_STREAM, stream, code)) => refused.push((stream, code)),
                Some((HEADERS, 5, block)) => answered = !refuses(&block),
                other => panic!("{name}: {other:?}"),
            }
        }
        refused.sort_unstable();
        assert_eq!(refused, [(1, vec![0, 0, 0, 1]), (3, vec![0, 0, 0, 1])], "{name}");
        assert!(origin.asked().iter().all(|asked| asked.starts_with("GET http://a/public {")));
    }
}

/// A block is refused for what is in it, wherever it is cut: what is malformed in a part that ends
/// within a field, the crate drops. A cut between two fields may cost the connection.
#[test]
fn a_block_is_refused_whatever_its_parts() {
    const CODE: [u8; 4] = [0, 0, 0, 1];
    let world = public();
    let origin = Origin::new(&world.server);
    let plain = |name, value| block(&[(name, value)]);
    let cases: [(&str, Vec<u8>); 14] = [
        ("connection", plain("connection", "close")),
        ("keep-alive", plain("keep-alive", "5")),
        ("proxy-connection", plain("proxy-connection", "x")),
        ("coding", plain("transfer-encoding", "chunked")),
        ("coding by the index of its name", b"\x0f\x2a\x07chunked".to_vec()),
        ("coding by its index", b"\xb9".to_vec()),
        ("upgrade", plain("upgrade", "websocket")),
        ("connection in code", b"\0\x87\x21\xea\xa8\xa4\x49\x8f\x57\x01x".to_vec()),
        ("te", plain("te", "gzip")),
        ("te with more", plain("te", "trailers, gzip")),
        ("method twice", plain(":method", "GET")),
        ("another path", plain(":path", "/public/x")),
        ("path after a field", [plain("x", "y"), plain(":path", "/public")].concat()),
        ("what the table keeps", b"\xbe".to_vec()),
    ];
    // A field for the table, of a request that is refused for it.
    let kept = [&block(&GET)[..], b"\x40\x0aconnection\x05close"].concat();
    let kept = frame(HEADERS, END_HEADERS | END_STREAM, 1, &kept);
    let other = frame(HEADERS, END_HEADERS | END_STREAM, 5, &block(&GET));
    let head = block(&GET);
    let post = block(&[&[(":method", "POST")], &GET[1..]].concat());
    let post = frame(HEADERS, END_HEADERS, 3, &post);
    for (name, field) in &cases {
        let request = [&head[..], field, &plain("x", "y")].concat();
        let trailers = [&field[..], &plain("x", "y")].concat();
        let requests = (head.len() + 1..request.len()).map(|cut| (&[][..], &request, cut));
        let trailers = (1..trailers.len()).map(|cut| (&post[..], &trailers, cut));
        for (before, block, cut) in requests.chain(trailers) {
            let (first, second) = block.split_at(cut);
            let first = frame(HEADERS, END_STREAM, 3, first);
            let second = frame(CONTINUATION, END_HEADERS, 3, second);
            let mut stream = raw(&world);
            _ = stream.write_all(&[&kept[..], before, &first, &second, &other].concat());
            let within_a_field = cut + 1 == block.len();
            let (mut refused, mut answered) = (false, false);
            while !refused || within_a_field && !answered {
                match outcome(&mut stream) {
                    Some((RST_STREAM, 1, _)) => {}
                    Some((RST_STREAM, 3, code)) if code == CODE => refused = true,
                    Some((GOAWAY, _, why)) if !within_a_field && why[4..8] == CODE => {
                        refused = true
                    }
                    Some((HEADERS, 5, block)) if !refuses(&block) => answered = true,
                    other => panic!("{name}, cut at {cut}: {other:?}"),
                }
            }
        }
    }
    assert!(origin.asked().iter().all(|asked| asked.starts_with("GET http://a/public {")));
}

/// A fault that comes when the server has the beginning: what it has never looks whole.
#[test]
fn a_body_that_turns_out_wrong_is_taken_back_from_the_server() {
    let world = public();
    let origin = Origin::new(&world.server);
    let head = |length: &'static [(&str, &str)]| {
        let fields = [&[(":method", "POST")], &GET[1..], length].concat();
        frame(HEADERS, END_HEADERS, 1, &block(&fields))
    };
    let trailers = |flags, field| frame(HEADERS, END_HEADERS | flags, 1, &block(&[field]));
    for (name, length, rest) in [
        ("longer", &[("content-length", "3")][..], frame(DATA, END_STREAM, 1, b"12345")),
        ("shorter", &[("content-length", "9")], frame(DATA, END_STREAM, 1, b"12345")),
        ("trailers that do not end", &[], trailers(0, ("x", "y"))),
        ("trailers of the connection", &[], trailers(END_STREAM, ("connection", "close"))),
        ("a pseudo-header in trailers", &[], trailers(END_STREAM, (":path", "/admin"))),
    ] {
        let mut stream = raw(&world);
        stream.write_all(&head(length)).unwrap();
        assert!(matches!(outcome(&mut stream), Some((HEADERS, 1, _))), "{name}");
        stream.write_all(&rest).unwrap();
        let ended = outcome(&mut stream);
        assert!(matches!(ended, Some((RST_STREAM | GOAWAY, ..)) | None), "{name}: {ended:?}");
        let told = runtime()
            .block_on(async { tokio::time::timeout(world::WAIT, origin.told.notified()).await });
        assert!(told.is_ok(), "{name}: it looks whole to the server");
    }
}

/// The error code of the connection's end.
fn ends(stream: &mut TcpStream) -> Option<u32> {
    loop {
        match outcome(stream) {
            Some((GOAWAY, _, payload)) => {
                let code = u32::from_be_bytes(payload[4..8].try_into().unwrap());
                if code != 0 {
                    return Some(code);
                }
            }
            Some(_) => {}
            None => return None,
        }
    }
}

const ENHANCE_YOUR_CALM: Option<u32> = Some(11);
const PROTOCOL_ERROR: Option<u32> = Some(1);

/// A head that does not come to its end has no more time than over HTTP/1; a short one is nothing to
/// wait for, but keeps no connection longer than silence does.
#[test]
fn a_head_that_stalls_is_let_go() {
    let world = public();
    let _origin = Origin::new(&world.server);
    let (mut alone, mut beside) = (raw(&world), raw(&world));
    // A stream that does not end.
    let post = block(&[&[(":method", "POST")], &GET[1..]].concat());
    beside.write_all(&frame(HEADERS, END_HEADERS, 1, &post)).unwrap();
    assert!(matches!(outcome(&mut beside), Some((HEADERS, 1, _))));
    let long = block(&[("x", "y".repeat(120).as_str())].repeat(100));
    let begun = [frame(HEADERS, END_STREAM, 3, &block(&GET)), frame(CONTINUATION, 0, 3, &long)];
    for stream in [&mut alone, &mut beside] {
        stream.write_all(&begun.concat()).unwrap();
    }
    let L7::Http(told) = world.agent.record(|record| !record.allowed).l7 else { panic!() };
    assert_eq!((told.status, told.error.as_deref()), (Some(408), Some("the head took too long")));
    assert_eq!((ends(&mut alone), ends(&mut beside)), (None, None));
}

#[test]
fn floods_end_the_connection_and_no_other() {
    let world = public();
    let _origin = Origin::new(&world.server);
    let other = world.connect(SERVER4);
    let reset = |number| {
        let mut both = frame(HEADERS, END_HEADERS, number, &block(&GET));
        both.extend(frame(RST_STREAM, 0, number, &[0, 0, 0, 8]));
        both
    };
    let provoke = |number| {
        let mut both = frame(HEADERS, END_HEADERS | END_STREAM, number, &block(&GET));
        both.extend(frame(WINDOW_UPDATE, 0, number, &[0; 4]));
        both
    };
    type Step<'a> = &'a dyn Fn(u32) -> Vec<u8>;
    let steps: [(&str, Step<'_>); 2] = [("rapid reset", &reset), ("provoked resets", &provoke)];
    for (name, step) in steps {
        let mut stream = raw(&world);
        let mut writer = stream.try_clone().unwrap();
        let frames: Vec<Vec<u8>> = (0..10_000).map(|n| step(n * 2 + 1)).collect();
        let writing =
            thread::spawn(move || frames.iter().all(|bytes| writer.write_all(bytes).is_ok()));
        let ended = ends(&mut stream);
        let wanted = [ENHANCE_YOUR_CALM, PROTOCOL_ERROR, None];
        assert!(wanted.contains(&ended), "{name}: {ended:?}");
        drop(stream);
        assert!(!writing.join().unwrap() || ended.is_some(), "{name}");
    }
    // A head without an end.
    let mut stream = raw(&world);
    let mut writer = stream.try_clone().unwrap();
    let writing = thread::spawn(move || {
        let long = block(&[("x", "y".repeat(120).as_str())].repeat(100));
        _ = writer.write_all(&frame(HEADERS, END_STREAM, 1, &block(&GET)));
        (0..10_000).all(|_| writer.write_all(&frame(CONTINUATION, 0, 1, &long)).is_ok())
    });
    ends(&mut stream);
    drop(stream);
    assert!(!writing.join().unwrap(), "all of the flood was taken");
    runtime().block_on(async {
        let send = client(other).await;
        assert_eq!(ask(&send, get("/public"), "").await.unwrap().0, 200);
    });
}

/// Requests that are taken back while the server does not take the connection count as such.
#[test]
fn what_waits_for_a_server_may_be_taken_back() {
    let away = IpAddr::from([10, 77, 2, 9]);
    let world = World::new(rules_of(1, away, SERVER6, &[http(&["GET /public"])]));
    world.node.ip("neigh replace 10.77.2.9 lladdr 02:00:00:00:02:99 dev s0 nud permanent");
    let mut stream = world.connect(away);
    let begun = Instant::now();
    stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).unwrap();
    let mut ended = None;
    for n in 0..1000 {
        let asked = frame(HEADERS, END_STREAM | END_HEADERS, n * 2 + 1, &block(&GET));
        let both = [asked, frame(PING, 0, 0, &[0; 8])].concat();
        // The connection may be gone before its last frame was read.
        ended = None;
        if stream.write_all(&both).is_err() {
            break;
        }
        // Until the request is under way.
        let heard = std::iter::from_fn(|| next(&mut stream));
        ended = heard.map(|(kind, ..)| kind).find(|kind| [PING, GOAWAY].contains(kind));
        if ended != Some(PING) {
            break;
        }
        _ = stream.write_all(&frame(RST_STREAM, 0, n * 2 + 1, &[0, 0, 0, 8]));
    }
    assert_ne!(ended, Some(PING), "all were taken");
    assert!(begun.elapsed() < Duration::from_secs(4), "after {:?}", begun.elapsed());
}

/// Requests that the server has, and that the client has the proxy take back, count as such.
#[test]
fn what_the_proxy_is_made_to_take_back_counts() {
    let world = public();
    let _origin = Origin::new(&world.server);
    let mut stream = raw(&world);
    let post = block(&[&[(":method", "POST")], &GET[1..]].concat());
    for first in (1..2000).step_by(100) {
        let each = |flags, block: &[u8]| -> Vec<u8> {
            let numbers = (first..first + 100).step_by(2);
            numbers.flat_map(|number| frame(HEADERS, END_HEADERS | flags, number, block)).collect()
        };
        for (said, heard) in [(each(0, &post), HEADERS), (each(END_STREAM, b"\x84"), RST_STREAM)] {
            _ = stream.write_all(&said);
            for _ in 0..50 {
                let (kind, _, payload) = outcome(&mut stream).unwrap();
                if kind == GOAWAY {
                    assert_eq!(payload[4..8], [0, 0, 0, 11]);
                    return;
                }
                assert_eq!(kind, heard);
            }
        }
    }
    panic!("all were taken");
}

/// Clients that take back all that they ask, one after the other and without a pause.
#[test]
fn floods_cost_others_little() {
    let world = public();
    let origin = Origin::new(&world.server);
    let (other, before) = (world.connect(SERVER4), world.proxy.memory());
    let flood: Vec<u8> = (0..10_000u32)
        .flat_map(|n| {
            let asked = frame(HEADERS, END_HEADERS, n * 2 + 1, &block(&GET));
            [asked, frame(RST_STREAM, 0, n * 2 + 1, &[0, 0, 0, 8])].concat()
        })
        .collect();
    let (over, floods) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let begun = Instant::now();
                while !over.load(Relaxed) && begun.elapsed() < world::WAIT {
                    let mut stream = raw(&world);
                    // It ends before it has all of it.
                    _ = stream.write_all(&flood);
                    floods.fetch_add(1, Relaxed);
                }
            });
        }
        let mut times = runtime().block_on(async {
            let send = client(other).await;
            let mut times = Vec::new();
            while times.len() < 200 || floods.load(Relaxed) < 20 {
                let begun = Instant::now();
                assert_eq!(ask(&send, get("/public/other"), "").await.unwrap().0, 200);
                times.push(begun.elapsed());
            }
            times
        });
        over.store(true, Relaxed);
        times.sort_unstable();
        let slow = times[times.len() * 99 / 100];
        assert!(slow < Duration::from_millis(500), "{slow:?} of {}", times.len());
    });
    let after = world.proxy.memory();
    assert!(after < before + (64 << 10), "{before} KiB, then {after} KiB");
    // A client may take back some at once; far from all of what was said arrives.
    let arrived = origin.asked().iter().filter(|asked| !asked.contains("other")).count();
    assert!(arrived < (floods.load(Relaxed) + 2) * 300, "{arrived} of {floods:?} floods");
}

/// Few bytes that stand for many: a field in the table, named again and again.
#[test]
fn fields_that_unpack_to_much_are_refused() {
    let world = public();
    let origin = Origin::new(&world.server);
    let value = [b'y'; 3900];
    // A literal for the table; lengths over 126 take more bytes.
    let long = (value.len() - 127) as u16;
    let mut bomb = vec![0x40, 1, b'x', 127, (long & 127) as u8 | 128, (long >> 7) as u8];
    bomb.extend(value);
    bomb.extend([0xbe; 8000]);
    let bomb = [block(&GET), bomb].concat();
    let before = world.proxy.memory();
    let kept: Vec<TcpStream> = (0..20)
        .map(|_| {
            let mut stream = raw(&world);
            stream.write_all(&frame(HEADERS, END_STREAM | END_HEADERS, 1, &bomb)).unwrap();
            match outcome(&mut stream) {
                Some((HEADERS, 1, block)) => assert!(refuses(&block), "{block:x?}"),
                Some((RST_STREAM | GOAWAY, ..)) | None => {}
                other => panic!("{other:?}"),
            }
            stream
        })
        .collect();
    let after = world.proxy.memory();
    assert!(after < before + (16 << 10), "{before} KiB, then {after} KiB");
    assert_eq!(origin.asked(), [""; 0]);
    drop(kept);
}

/// Connections that begin something and say that they are over leave nothing behind.
#[test]
fn what_is_taken_back_and_given_up_leaves_nothing() {
    let world = public();
    let _origin = Origin::new(&world.server);
    let descriptors =
        || std::fs::read_dir(format!("/proc/{}/fd", world.proxy.0.id())).unwrap().count();
    let before = descriptors();
    let last = [
        frame(HEADERS, END_HEADERS, 1, &block(&GET)),
        frame(RST_STREAM, 0, 1, &[0, 0, 0, 8]),
        frame(GOAWAY, 0, 0, &[0; 8]),
    ];
    let kept: Vec<TcpStream> = (0..200)
        .map(|_| {
            let mut stream = raw(&world);
            stream.write_all(&last.concat()).unwrap();
            stream
        })
        .collect();
    let begun = Instant::now();
    while descriptors() > before + 4 {
        assert!(begun.elapsed() < world::WAIT, "{} descriptors are still open", descriptors());
        thread::yield_now();
    }
    drop(kept);
}

#[test]
fn small_frames_do_no_harm() {
    let world = public();
    let origin = Origin::new(&world.server);
    let before = world.proxy.memory();
    // A stream that policy denies, and whose body goes on.
    let open =
        frame(HEADERS, END_HEADERS, 1, &block(&[&GET[..3], &[(":path", "/admin")]].concat()));
    let begun = frame(HEADERS, END_STREAM, 1, &block(&GET));
    for (first, payload) in [
        (vec![], frame(SETTINGS, 0, 0, &[])),
        (vec![], frame(PING, 0, 0, &[0; 8])),
        (vec![], frame(PRIORITY, 0, 1, &[0, 0, 0, 3, 1])),
        (vec![], frame(SETTINGS, 0, 0, &[0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 16, 0])),
        (vec![], frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1])),
        (open.clone(), frame(DATA, 0, 1, &[])),
        (open.clone(), frame(WINDOW_UPDATE, 0, 1, &[0, 0, 0, 1])),
        (open, frame(HEADERS, END_HEADERS, 1, &[])),
        (begun, frame(CONTINUATION, 0, 1, &[])),
    ] {
        let mut stream = raw(&world);
        // The proxy's answers are never read.
        stream.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
        _ = stream.write_all(&[first, payload.repeat(20_000)].concat());
    }
    let after = world.proxy.memory();
    assert!(after < before + (64 << 10), "{before} KiB, then {after} KiB");
    for bad in [
        &b"\xff\xff\xff\xff\xff\xff\xff"[..],
        b"\xbe",
        b"\x00\x85\xff\xff\xff\xff\xff\x01y",
        b"\x3f\xff\xff\xff\xff\x0f",
        b"\x00\x01",
        b"\x80",
    ] {
        let mut stream = raw(&world);
        stream.write_all(&frame(HEADERS, END_STREAM | END_HEADERS, 1, bad)).unwrap();
        let ended = ends(&mut stream);
        assert!(matches!(ended, Some(9 | 1)) || ended.is_none(), "{bad:x?}: {ended:?}");
    }
    assert_eq!(origin.asked(), [""; 0]);
}

/// The last policy that asks for a proxy is gone, and the agent knows of none any more.
#[test]
fn a_connection_that_no_rule_knows_any_more_ends_without_a_refusal() {
    let world = public();
    let origin = Origin::new(&world.server);
    let stream = world.connect(SERVER4);
    runtime().block_on(async {
        stream.set_nonblocking(true).unwrap();
        let stream = tokio::net::TcpStream::from_std(stream).unwrap();
        let (mut send, connection) = h2::client::handshake(stream).await.unwrap();
        let connection = tokio::spawn(connection);
        let (response, _) = send.send_request(get("/public"), true).unwrap();
        assert_eq!(response.await.unwrap().status(), 200);
        world.agent.put(palisade_api::proxy::Rules { version: 2, ..Default::default() });
        let ended = tokio::time::timeout(Duration::from_secs(10), connection).await;
        ended.expect("the connection ends").unwrap().expect("in order");
    });
    assert_eq!(origin.asked().len(), 1);
}
