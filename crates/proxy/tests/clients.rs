//! Clients that others wrote, and the protocols on top of HTTP that they speak.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod world;

use std::{
    io::Write,
    net::{IpAddr, Ipv6Addr, TcpListener, TcpStream},
    process::Command,
    sync::Arc,
    thread,
};

use futures::{SinkExt, StreamExt};
use http::Response;
use tokio::runtime::Runtime;
use tokio_tungstenite::{
    accept_async, client_async,
    tungstenite::{Error, Message},
};
use world::{
    Namespace, SERVER4, SERVER6, WAIT, World,
    agent::{http, rules},
    origin::{Origin, field},
};

fn world() -> World {
    World::new(rules(1, &[http(&["GET|POST /public(/.*)?"])]))
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// What a server does with each connection.
fn serve<F: Future<Output = ()> + Send>(
    namespace: &Namespace,
    with: impl Fn(tokio::net::TcpStream) -> F + Send + Sync + 'static,
) {
    let with = Arc::new(with);
    namespace.run(move || {
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 80)).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let with = Arc::clone(&with);
                thread::spawn(move || {
                    runtime().block_on(async { with(of_tokio(stream.unwrap())).await });
                });
            }
        });
    });
}

fn of_tokio(stream: TcpStream) -> tokio::net::TcpStream {
    stream.set_nonblocking(true).unwrap();
    tokio::net::TcpStream::from_std(stream).unwrap()
}

/// The status and the body that curl gets.
fn curl(world: &World, server: IpAddr, path: &str, options: &[&str]) -> (String, String) {
    let host = match server {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    };
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--max-time", &WAIT.as_secs().to_string()])
        .args(["--write-out", "\n%{http_version} %{http_code}"])
        .args(options)
        .arg(format!("http://{host}{path}"));
    let output = world.client.run(move || curl.output().unwrap());
    let text = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{path} {options:?}: {errors}");
    let (body, status) = text.rsplit_once('\n').unwrap();
    (status.to_owned(), body.to_owned())
}

fn says(status: &str, body: &str) -> (String, String) {
    (status.to_owned(), body.to_owned())
}

const DENIED: &str = "Access denied\r\n";

#[test]
fn curl_over_http1() {
    let world = world();
    let origin = Origin::ok(&world.server);
    for server in [SERVER4, SERVER6] {
        origin.forget();
        assert_eq!(curl(&world, server, "/public/a?b", &[]), says("1.1 200", "ok"));
        assert_eq!(curl(&world, server, "/public", &["-d", "a=b"]), says("1.1 200", "ok"));
        origin.wait(|seen| seen.bytes.ends_with(b"a=b"));
        let before = origin.text();
        assert_eq!(curl(&world, server, "/admin", &[]), says("1.1 403", DENIED));
        assert_eq!(curl(&world, server, "/public", &["-X", "PUT"]), says("1.1 403", DENIED));
        let climb = ["--path-as-is"];
        assert_eq!(curl(&world, server, "/public/../admin", &climb), says("1.1 403", DENIED));
        assert_eq!(origin.text(), before);
    }
}

#[test]
fn curl_waits_to_be_told_to_continue() {
    let world = world();
    let server = world.server.run(|| TcpListener::bind("[::]:80").unwrap());
    let length = 300_000;
    let file = world.directory.join("upload");
    std::fs::write(&file, vec![b'x'; length]).unwrap();
    let data = format!("@{}", file.display());
    // So long that only a word of the server, not the end of curl's patience, lets it send.
    let options = ["--expect100-timeout", "60", "-H", "Expect: 100-continue", "--data-binary"];
    let options = [&options[..], &[&data]].concat();
    let denied = curl(&world, SERVER4, "/admin", &options);
    assert_eq!(denied, says("1.1 403", DENIED));

    let told = thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        stream.set_read_timeout(Some(WAIT)).unwrap();
        let head = world::until(&mut stream, "\r\n\r\n");
        assert!(head.starts_with("POST /public HTTP/1.1\r\n"), "{head}");
        assert_eq!(field(&head, "expect"), Some("100-continue"));
        assert_eq!(field(&head, "content-length"), Some(length.to_string().as_str()));
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap();
        let mut body = vec![0; length];
        std::io::Read::read_exact(&mut stream, &mut body).unwrap();
        assert!(body.iter().all(|byte| *byte == b'x'));
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone").unwrap();
    });
    assert_eq!(curl(&world, SERVER4, "/public", &options), says("1.1 200", "done"));
    told.join().unwrap();
}

#[test]
fn curl_over_http2() {
    let world = world();
    serve(&world.server, |stream| async {
        let mut connection = h2::server::handshake(stream).await.unwrap();
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            tokio::spawn(async move {
                let text = format!("{} {}", request.method(), request.uri().path());
                assert!(text.ends_with(" /public/a"), "{text} reached the server");
                // Some versions of curl fail when they are answered before they have said all.
                let mut body = request.into_body();
                while let Some(data) = body.data().await {
                    assert_eq!(data.unwrap(), "a=b");
                }
                let mut send = respond.send_response(Response::new(()), false).unwrap();
                send.send_data(text.into(), true).unwrap();
            });
        }
    });
    let prior = "--http2-prior-knowledge";
    for server in [SERVER4, SERVER6] {
        assert_eq!(curl(&world, server, "/public/a", &[prior]), says("2 200", "GET /public/a"));
        let post = [prior, "-d", "a=b"];
        assert_eq!(curl(&world, server, "/public/a", &post), says("2 200", "POST /public/a"));
        assert_eq!(curl(&world, server, "/admin", &[prior]), says("2 403", DENIED));
        let put = [prior, "-X", "PUT"];
        assert_eq!(curl(&world, server, "/public/a", &put), says("2 403", DENIED));
    }
}

/// As browsers do: many streams on one connection, and a tree of priorities among them.
#[test]
fn many_streams_of_one_client() {
    let world = world();
    serve(&world.server, |stream| async {
        let mut connection = h2::server::handshake(stream).await.unwrap();
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            let path = request.uri().path().to_owned();
            assert!(path.starts_with("/public/"), "{path} reached the server");
            let mut send = respond.send_response(Response::new(()), false).unwrap();
            send.send_data(path.repeat(1000).into(), true).unwrap();
        }
    });
    for host in ["10.77.2.2", "[fd77:2::2]"] {
        let mut nghttp = Command::new("nghttp");
        nghttp.args(["--null-out", "--stat", "--timeout=10", "--window-bits=10"]);
        for n in 0..50 {
            nghttp.arg(format!("http://{host}/public/{n}"));
            nghttp.arg(format!("http://{host}/admin/{n}"));
        }
        let output = world.client.run(move || nghttp.output().unwrap());
        let text = String::from_utf8(output.stdout).unwrap();
        let with = |status: &str| text.lines().filter(|line| line.contains(status)).count();
        assert_eq!((with(" 200 "), with(" 403 ")), (50, 50), "{text}");
    }
}

#[test]
fn a_websocket_client() {
    let world = world();
    serve(&world.server, |stream| async {
        let mut socket = accept_async(stream).await.unwrap();
        while let Some(Ok(message)) = socket.next().await {
            if message.is_text() || message.is_binary() {
                socket.send(message).await.unwrap();
            }
        }
    });
    for server in [SERVER4, SERVER6] {
        let (open, denied) = (world.connect(server), world.connect(server));
        runtime().block_on(async {
            let (mut socket, _) =
                client_async("ws://server/public/chat", of_tokio(open)).await.unwrap();
            for message in [Message::text("hello"), Message::binary(vec![7; 200_000])] {
                socket.send(message.clone()).await.unwrap();
                assert_eq!(socket.next().await.unwrap().unwrap(), message);
            }
            socket.close(None).await.unwrap();
            while let Some(end) = socket.next().await {
                assert!(end.unwrap().is_close());
            }
            let refused = client_async("ws://server/admin", of_tokio(denied)).await;
            let Err(Error::Http(answer)) = refused else { panic!("it opened") };
            assert_eq!(answer.status(), 403);
        });
    }
}
