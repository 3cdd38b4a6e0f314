//! A small HTTP server for the built-in programs, on IPv4 and IPv6.

use std::convert::Infallible;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

/// What to answer, and whether to die of it.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) content_type: &'static str,
    pub(super) body: String,
    /// Exit code of the whole program once the answer is out.
    pub(super) exit: Option<i32>,
}

impl Answer {
    pub(super) fn text(body: impl Into<String>) -> Self {
        Self { status: StatusCode::OK, content_type: "text/plain", body: body.into(), exit: None }
    }

    pub(super) fn status(self, status: StatusCode) -> Self {
        Self { status, ..self }
    }
}

/// Serves until the program ends.
pub(super) async fn serve<F>(port: u16, answer: F) -> std::io::Result<()>
where
    F: Fn(&Request<Incoming>, SocketAddr) -> Answer + Send + Sync + 'static,
{
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await?;
    let answer = Arc::new(answer);
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            // The peer left before we looked; nothing to serve.
            Err(_) => continue,
        };
        tokio::spawn(connection(stream, peer, Arc::clone(&answer)));
    }
}

async fn connection<F>(stream: TcpStream, peer: SocketAddr, answer: Arc<F>)
where
    F: Fn(&Request<Incoming>, SocketAddr) -> Answer + Send + Sync + 'static,
{
    let exit = std::sync::OnceLock::new();
    let service = service_fn(|request| {
        let answer = answer(&request, peer);
        let last = answer.exit.is_some();
        if last {
            let _ = exit.set(answer.exit);
        }
        let mut response = Response::new(Full::new(Bytes::from(answer.body)));
        *response.status_mut() = answer.status;
        let headers = response.headers_mut();
        headers
            .insert("content-type", hyper::header::HeaderValue::from_static(answer.content_type));
        if last {
            headers.insert("connection", hyper::header::HeaderValue::from_static("close"));
        }
        std::future::ready(Ok::<_, Infallible>(response))
    });
    let served =
        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    // An error here is a client that went away.
    let _ = served.await;
    if let Some(Some(code)) = exit.get() {
        std::process::exit(*code);
    }
}
