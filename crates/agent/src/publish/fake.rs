//! Of an API server, what a test wants to be asked.

use std::sync::Arc;

use kube::Client;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// A request, in lower case but for its body.
pub(super) struct Asked {
    pub(super) method: String,
    path: String,
    pub(super) body: Value,
}

impl Asked {
    /// The last part of the path: of an object its name.
    pub(super) fn name(&self) -> &str {
        let path = self.path.split('?').next().unwrap_or_default();
        path.rsplit('/').next().unwrap_or_default()
    }
}

/// Status and body.
pub(super) type Answer = (u16, Value);

pub(super) fn refused(code: u16) -> Answer {
    let status = json!({ "kind": "Status", "status": "Failure", "code": code, "reason": "away", "message": "away" });
    (code, status)
}

/// A client of a server that answers so.
pub(super) async fn server(answer: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Client {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let answer = Arc::new(answer);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, answer.clone()));
        }
    });
    client_of(&address.to_string()).await
}

/// As the agent itself connects.
pub(crate) async fn client_of(address: &str) -> Client {
    let name = format!("palisade-fake-{}-{address}", std::process::id());
    let file = std::env::temp_dir().join(name);
    let config = json!({ "apiVersion": "v1", "kind": "Config", "current-context": "a",
        "contexts": [{ "name": "a", "context": { "cluster": "a", "user": "a" } }],
        "clusters": [{ "name": "a", "cluster": { "server": format!("http://{address}") } }],
        "users": [{ "name": "a", "user": {} }] });
    std::fs::write(&file, config.to_string()).expect("a file");
    let client = palisade_api::client::client(Some(&file)).await.expect("a client");
    std::fs::remove_file(file).expect("it is there");
    client
}

async fn serve(mut stream: TcpStream, answer: Arc<impl Fn(&Asked) -> Answer>) {
    let asked = read(&mut stream).await;
    let (status, said) = answer(&asked);
    let answer = format!("HTTP/1.1 {status} x\r\nconnection: close\r\n\r\n{said}");
    stream.write_all(answer.as_bytes()).await.expect("an answer");
}

async fn read(stream: &mut TcpStream) -> Asked {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        head.push(stream.read_u8().await.expect("a head").into());
    }
    let head = head.to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().expect("a length"))];
    stream.read_exact(&mut body).await.expect("a body");
    let mut words = head.split(' ').map(str::to_owned);
    Asked {
        method: words.next().expect("a method"),
        path: words.next().expect("a path"),
        body: serde_json::from_slice(&body).unwrap_or_default(),
    }
}
