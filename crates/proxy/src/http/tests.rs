//! Who does nothing for long: the time for that is short in these tests.

use std::{fs, future::poll_fn, net::SocketAddr, path::PathBuf, sync::Arc};

use bytes::Bytes;
use palisade_abi::protocol;
use palisade_api::proxy::{Endpoint, Peer, Rules};
use palisade_policy::{
    Chunk, CompiledPolicy, NamedPorts, RuleInfo, RuleSource,
    l7::HttpRule,
    model::{Action, Application},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};

use super::*;
use crate::Proxy;

/// Whatever is to happen happens long before.
const WAIT: Duration = Duration::from_secs(20);
const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";

/// The proxy's task that serves a client.
struct Bench {
    proxy: Arc<Proxy>,
    serving: JoinHandle<()>,
    directory: PathBuf,
}

impl Bench {
    /// With the client, whose every request to the origin is allowed.
    async fn new(name: &str, origin: SocketAddr) -> (Self, TcpStream) {
        let directory =
            std::env::temp_dir().join(format!("palisade-{name}-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let (proxy, _) = Proxy::alone(&directory);
        proxy.rules.put(rules(origin));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        // What nobody reads is soon too much for the kernel.
        socket2::SockRef::from(&listener).set_send_buffer_size(1 << 16).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        socket2::SockRef::from(&client).set_recv_buffer_size(1 << 16).unwrap();
        let (stream, peer) = listener.accept().await.unwrap();
        let gate = Gate::new(&proxy, protocol::TCP, peer, origin);
        let serving = tokio::spawn(async move { serve(&gate, stream).await });
        (Self { proxy, serving, directory }, client)
    }

    /// Takes the room for long heads, as other clients do.
    fn fill_room(&self) -> Vec<Share> {
        let all = &self.proxy.long_heads;
        let of = |n: u32| std::iter::from_fn(move || all.admit(n.to_be_bytes().into()));
        (0..).flat_map(of).take(MOST_LONG_HEADS).collect()
    }

    /// Waits until the proxy lets the client go, which is not before it has been idle.
    async fn let_go(self, begun: Instant) {
        while !self.serving.is_finished() {
            assert!(begun.elapsed() < WAIT, "the client is still served");
            tokio::time::sleep(IDLE_TIME / 20).await;
        }
        assert!(begun.elapsed() >= IDLE_TIME, "after {:?}", begun.elapsed());
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        _ = fs::remove_dir_all(&self.directory);
    }
}

fn rules(origin: SocketAddr) -> Rules {
    let rule = RuleInfo {
        action: Action::Allow,
        application: Application::Http(vec![HttpRule::default()]),
        ports: NamedPorts { every: true, ..NamedPorts::default() },
        source: RuleSource::NoDefaultDeny,
        also: Vec::new(),
    };
    let chunk = Chunk { default_peers: 1, default_ports: 1, redirect: 1, ..Chunk::default() };
    let table = CompiledPolicy {
        chunks: vec![chunk.into()],
        rules: vec![rule],
        ..CompiledPolicy::default()
    };
    let endpoint = Endpoint { id: 7, identity: 300, ingress: Some(2), egress: None };
    // It is on this very node.
    let peer = Peer { identity: 301, prefix: 0, host: true };
    Rules {
        version: 1,
        endpoints: [(origin.ip(), endpoint)].into(),
        tables: [(2, table.into())].into(),
        addresses: [(origin.ip(), peer)].into(),
        ..Rules::default()
    }
}

/// An origin that reads a head and does as it is told with the stream.
async fn origin<F: Future<Output = ()> + Send>(
    with: impl FnOnce(TcpStream) -> F + Send + 'static,
) -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        with(stream).await;
    });
    (address, serving)
}

async fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A reset is an end as well.
    _ = timeout(WAIT, stream.read_to_end(&mut bytes)).await.expect("the stream ends");
    bytes
}

#[tokio::test]
async fn an_answer_that_nobody_reads_is_given_up() {
    let (address, sending) = origin(|mut stream| async move {
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n").await.unwrap();
        while stream.write_all(&[b'x'; 1 << 16]).await.is_ok() {}
    })
    .await;
    let (bench, mut client) = Bench::new("unread", address).await;
    let begun = Instant::now();
    client.write_all(GET).await.unwrap();
    bench.let_go(begun).await;
    timeout(WAIT, sending).await.expect("the server may stop").unwrap();
}

#[tokio::test]
async fn interim_answers_that_nobody_reads_are_given_up() {
    let (address, sending) = origin(|mut stream| async move {
        let link = "x".repeat(syntax::MOST_HEAD - 100);
        let interim = format!("HTTP/1.1 103 Early Hints\r\nlink: {link}\r\n\r\n");
        for _ in 0..MOST_INTERIM {
            _ = stream.write_all(interim.as_bytes()).await;
        }
        rest(&mut stream).await;
    })
    .await;
    let (bench, mut client) = Bench::new("interim", address).await;
    let begun = Instant::now();
    client.write_all(GET).await.unwrap();
    bench.let_go(begun).await;
    timeout(WAIT, sending).await.expect("the server may stop").unwrap();
}

/// Nor are the proxy's own answers waited for without end.
#[tokio::test]
async fn refusals_that_nobody_reads_are_given_up() {
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let (bench, mut client) = Bench::new("refusals", nobody).await;
    let begun = Instant::now();
    let asking = tokio::spawn(async move { while client.write_all(GET).await.is_ok() {} });
    bench.let_go(begun).await;
    timeout(WAIT, asking).await.expect("the client hears of it").unwrap();
}

#[tokio::test]
async fn a_body_that_does_not_come_is_given_up() {
    let (address, waiting) = origin(|mut stream| async move {
        assert_eq!(rest(&mut stream).await, b"x", "and nothing that would end it");
    })
    .await;
    let (bench, mut client) = Bench::new("body", address).await;
    let begun = Instant::now();
    let head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nx";
    client.write_all(head).await.unwrap();
    bench.let_go(begun).await;
    timeout(WAIT, waiting).await.expect("the server may stop").unwrap();
}

#[tokio::test]
async fn an_answer_that_does_not_come_is_told() {
    let (address, waiting) = origin(|mut stream| async move { _ = rest(&mut stream).await }).await;
    let (_bench, mut client) = Bench::new("answer", address).await;
    client.write_all(GET).await.unwrap();
    let heard = rest(&mut client).await;
    assert!(heard.starts_with(b"HTTP/1.1 504 "), "{}", String::from_utf8_lossy(&heard));
    timeout(WAIT, waiting).await.expect("the server may stop").unwrap();
}

#[tokio::test]
async fn who_asks_no_more_is_let_go() {
    let (address, waiting) = origin(|mut stream| async move {
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
        rest(&mut stream).await;
    })
    .await;
    let (bench, mut client) = Bench::new("idle", address).await;
    let begun = Instant::now();
    client.write_all(GET).await.unwrap();
    assert!(rest(&mut client).await.ends_with(b"ok"));
    bench.let_go(begun).await;
    timeout(WAIT, waiting).await.expect("the server may stop").unwrap();
}

/// Long heads are refused that there is no room for, and short ones are not.
#[tokio::test]
async fn long_heads_have_a_bound() {
    let ok = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
    let (address, _serving) = origin(move |mut stream| async move {
        stream.write_all(ok).await.unwrap();
        rest(&mut stream).await;
    })
    .await;
    let (bench, mut client) = Bench::new("long", address).await;
    let _held = bench.fill_room();
    client.write_all(GET).await.unwrap();
    let mut heard = Vec::new();
    while !heard.ends_with(b"ok") {
        heard.push(client.read_u8().await.unwrap());
    }
    let field = "x".repeat(SHORT_HEAD);
    // It does not end.
    client.write_all(format!("GET / HTTP/1.1\r\nx: {field}").as_bytes()).await.unwrap();
    let heard = rest(&mut client).await;
    assert!(heard.starts_with(b"HTTP/1.1 503 "), "{}", String::from_utf8_lossy(&heard));

    let (address, _) = endless().await;
    let (bench, client) = Bench::new("long2", address).await;
    let (send, connection) = h2::client::handshake(client).await.unwrap();
    tokio::spawn(connection);
    let ask = async |field: &str| {
        let request = http::Request::get("http://a/small").header("x", field).body(()).unwrap();
        let (response, _) =
            send.clone().ready().await.unwrap().send_request(request, true).unwrap();
        response.await.unwrap().status().as_u16()
    };
    let held = bench.fill_room();
    assert_eq!((ask("x").await, ask(&field).await), (200, 503));
    drop(held);
    assert_eq!(ask(&field).await, 200);
}

fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags, 0, 0, 0, stream], payload].concat()
}

const CALM: [u8; 8] = [0, 0, 0, 0, 0, 0, 0, 11];

/// Over HTTP/2 a head takes room as it comes, although nobody knows yet what it asks.
#[tokio::test]
async fn long_heads_that_are_under_way_have_a_bound() {
    let text = |text: &[u8]| {
        let rest = text.len() - 127;
        [&[127, (rest & 127) as u8 | 128, (rest >> 7) as u8], text].concat()
    };
    // GET, http, a, /small, and a field that is not indexed.
    let asked =
        [&b"\x82\x86\x41\x01a\x04\x06/small\0\x01x"[..], &text(&[b'y'; SHORT_HEAD])].concat();
    let (begun, rest_of_head) = asked.split_at(asked.len() - 1);
    let opening = [PREFACE, &frame(4, 0, 0, &[]), &frame(1, 1, 1, begun)].concat();

    let (address, _) = endless().await;
    let (bench, mut client) = Bench::new("under1", address).await;
    let held = bench.fill_room();
    client.write_all(&opening).await.unwrap();
    let heard = rest(&mut client).await;
    assert!(heard.ends_with(&frame(7, 0, 0, &CALM)), "{heard:x?}");
    drop(held);

    let (bench, mut client) = Bench::new("under2", address).await;
    let _all_but_one = bench.fill_room().split_off(1);
    let is_free = || bench.proxy.long_heads.admit([10, 0, 0, 1].into()).is_some();
    let until = async |free| {
        let begun = Instant::now();
        while is_free() != free {
            assert!(begun.elapsed() < WAIT, "{free}");
            tokio::time::sleep(IDLE_TIME / 100).await;
        }
    };
    assert!(is_free());
    client.write_all(&opening).await.unwrap();
    until(false).await;
    client.write_all(&frame(9, 4, 1, rest_of_head)).await.unwrap();
    // The answer has the status 200, and its body ends.
    let mut heard = Vec::new();
    while !heard.ends_with(b"ok") {
        heard.push(client.read_u8().await.unwrap());
    }
    until(true).await;
}

/// Pseudo-headers in trailers, of more streams than anybody is told of.
#[tokio::test]
async fn what_the_crate_drops_has_a_bound() {
    let (address, _) = endless().await;
    let (_bench, mut client) = Bench::new("dropped", address).await;
    // POST, http, a, /small, and then a method.
    let post = |stream| frame(1, 4, stream, b"\x83\x86\x41\x01a\x04\x06/small");
    let both = |n: u8| [post(2 * n + 1), frame(1, 5, 2 * n + 1, b"\x83")].concat();
    let all: Vec<u8> = (0..=100).flat_map(both).collect();
    client.write_all(&[PREFACE, &frame(4, 0, 0, &[]), &all].concat()).await.unwrap();
    let heard = rest(&mut client).await;
    assert!(heard.ends_with(&frame(7, 0, 0, &CALM)), "{heard:x?}");
}

/// An origin over HTTP/2 that answers `/small` at once, and everything else without an end; it tells
/// when it may stop.
async fn endless() -> (SocketAddr, mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, stopped) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(stream).await.unwrap();
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            let mut down = respond.send_response(http::Response::new(()), false).unwrap();
            let (path, tell) = (request.uri().path().to_owned(), tell.clone());
            if path == "/small" {
                down.send_data(Bytes::from_static(b"ok"), true).unwrap();
                continue;
            }
            tokio::spawn(async move {
                loop {
                    down.reserve_capacity(1 << 16);
                    let Some(Ok(room)) = poll_fn(|cx| down.poll_capacity(cx)).await else { break };
                    _ = down.send_data(vec![b'x'; room].into(), false);
                }
                tell.send(path).unwrap();
            });
        }
    });
    (address, stopped)
}

/// A stream whose client makes no room for the answer is reset, and the server hears of it; one
/// whose client makes a little room now and then goes on.
#[tokio::test]
async fn streams_without_room_are_given_up() {
    let (address, mut stopped) = endless().await;
    let (_bench, client) = Bench::new("room", address).await;
    let mut closed = h2::client::Builder::new();
    closed.initial_window_size(8);
    let (send, connection) = closed.handshake::<_, Bytes>(client).await.unwrap();
    tokio::spawn(connection);
    let ask = async |path: &str| {
        let request = http::Request::get(format!("http://a{path}")).body(()).unwrap();
        let (response, _) =
            send.clone().ready().await.unwrap().send_request(request, true).unwrap();
        response.await.unwrap().into_body()
    };
    let begun = Instant::now();
    let mut stuck = ask("/stuck").await;
    let mut slow = ask("/slow").await;
    let slow = tokio::spawn(async move {
        while let Some(Ok(data)) = slow.data().await {
            tokio::time::sleep(IDLE_TIME / 4).await;
            slow.flow_control().release_capacity(data.len()).unwrap();
        }
    });
    let gone = async {
        loop {
            if let Err(error) = stuck.data().await.expect("the answer is not whole") {
                return error;
            }
        }
    };
    let gone = timeout(WAIT, gone).await.expect("it is given up");
    assert_eq!(gone.reason(), Some(h2::Reason::CANCEL));
    assert!(begun.elapsed() >= IDLE_TIME, "after {:?}", begun.elapsed());
    assert_eq!(timeout(WAIT, stopped.recv()).await.unwrap().unwrap(), "/stuck");
    assert!(!slow.is_finished());
    assert_eq!(ask("/small").await.data().await.unwrap().unwrap(), "ok");
    assert!(!slow.is_finished() && stopped.try_recv().is_err());
}

/// A client over HTTP/2 that asks nothing and answers nothing, not even the question whether it has
/// seen that the connection ends.
#[tokio::test]
async fn who_does_not_see_the_end_is_let_go() {
    let (address, _) = endless().await;
    let (bench, mut client) = Bench::new("silent", address).await;
    let begun = Instant::now();
    client.write_all(PREFACE).await.unwrap();
    // Its settings, of which there are none.
    client.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
    let heard = rest(&mut client).await;
    let goaway = |frame: &[u8]| frame[..4] == [0, 0, 8, 7];
    assert!(heard.windows(9).any(goaway), "{heard:x?}");
    bench.let_go(begun).await;
}

/// Bytes that take twice as long as nothing may go.
const SLOW: usize = 8;

/// Between two of them.
async fn pause() {
    tokio::time::sleep(IDLE_TIME / 4).await;
}

#[tokio::test]
async fn a_long_upload_is_no_silence_of_the_server() {
    let (address, serving) = origin(|mut stream| async move {
        stream.read_exact(&mut [0; SLOW]).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
        rest(&mut stream).await;
    })
    .await;
    let (_bench, mut client) = Bench::new("upload", address).await;
    let head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 8\r\n\r\n";
    client.write_all(head).await.unwrap();
    for _ in 0..SLOW {
        pause().await;
        client.write_all(b"x").await.unwrap();
    }
    let heard = rest(&mut client).await;
    assert!(heard.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&heard));
    timeout(WAIT, serving).await.expect("the server may stop").unwrap();
}

#[tokio::test]
async fn a_long_answer_is_no_silence_of_the_client() {
    let (address, serving) = origin(|mut stream| async move {
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n").await.unwrap();
        for _ in 0..SLOW {
            pause().await;
            stream.write_all(b"x").await.unwrap();
        }
        rest(&mut stream).await;
    })
    .await;
    let (_bench, mut client) = Bench::new("slow", address).await;
    // Its body does not come.
    let head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 8\r\n\r\n";
    client.write_all(head).await.unwrap();
    let heard = rest(&mut client).await;
    assert!(heard.ends_with(b"xxxxxxxx"), "{}", String::from_utf8_lossy(&heard));
    timeout(WAIT, serving).await.expect("the server may stop").unwrap();
}

/// Over HTTP/2 both ways are open for as long as one of them is in use.
#[tokio::test]
async fn one_way_of_a_stream_may_be_silent() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, mut told) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(stream).await.unwrap();
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            let (path, tell) = (request.uri().path().to_owned(), tell.clone());
            let (mut up, mut count) = (request.into_body(), 0);
            let mut down = respond.send_response(http::Response::new(()), false).unwrap();
            tokio::spawn(async move {
                if path == "/down" {
                    for _ in 0..SLOW {
                        pause().await;
                        down.send_data(Bytes::from_static(b"x"), false).unwrap();
                    }
                }
                while let Some(Ok(data)) = up.data().await {
                    count += data.len();
                }
                tell.send((path, count)).unwrap();
                _ = down.send_data(Bytes::new(), true);
            });
        }
    });
    let (_bench, client) = Bench::new("ways", address).await;
    let (send, connection) = h2::client::handshake(client).await.unwrap();
    tokio::spawn(connection);
    for (path, sent, heard) in [("/up", SLOW, 0), ("/down", 0, SLOW)] {
        let request = http::Request::post(format!("http://a{path}")).body(()).unwrap();
        let (response, mut up) =
            send.clone().ready().await.unwrap().send_request(request, false).unwrap();
        let mut down = response.await.unwrap().into_body();
        match path {
            "/up" => {
                for _ in 0..SLOW {
                    pause().await;
                    up.send_data(Bytes::from_static(b"x"), false).unwrap();
                }
            }
            _ => {
                for _ in 0..heard {
                    assert_eq!(down.data().await.unwrap().unwrap(), "x", "{path}");
                }
            }
        }
        up.send_data(Bytes::new(), true).unwrap();
        assert_eq!(timeout(WAIT, told.recv()).await.unwrap().unwrap(), (path.to_owned(), sent));
        assert!(down.data().await.is_none_or(|end| end.unwrap().is_empty()), "{path}");
    }
}
