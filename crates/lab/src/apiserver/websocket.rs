//! Requests that become WebSockets.

use std::future::Future;

use base64::Engine as _;
use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderName, HeaderValue, UPGRADE};
use hyper::{HeaderMap, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role};

use super::error::ApiError;
use super::reply::{self, Reply};

/// A connection that messages go over.
pub(super) type Socket = WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>;

/// Agrees to the upgrade and hands the connection to `session`. The first of `protocols` that the
/// client offers is spoken.
pub(super) fn accept<F: Future<Output = ()> + Send + 'static>(
    mut request: Request<Incoming>,
    protocols: &[&'static str],
    session: impl FnOnce(Socket) -> F + Send + 'static,
) -> Result<Reply, ApiError> {
    let (key, protocol) = handshake(request.headers(), protocols)?;
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let Ok(upgraded) = upgrade.await else { return };
        let io = TokioIo::new(upgraded);
        session(WebSocketStream::from_raw_socket(io, Role::Server, None).await).await;
    });
    let mut answer = reply::full(101, "text/plain", Bytes::new());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.clear();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(
        HeaderName::from_static("sec-websocket-protocol"),
        HeaderValue::from_static(protocol),
    );
    if let Ok(value) = HeaderValue::from_str(&derive_accept_key(key.as_bytes())) {
        headers.insert(HeaderName::from_static("sec-websocket-accept"), value);
    }
    Ok(answer)
}

/// The client's key and the protocol that both speak.
fn handshake(
    headers: &HeaderMap,
    protocols: &[&'static str],
) -> Result<(String, &'static str), ApiError> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("");
    if !text("upgrade").eq_ignore_ascii_case("websocket") {
        return Err(ApiError::bad_request(
            "Upgrade request required: exec, attach and port-forward are served over WebSocket \
             only; use kubectl 1.31 or newer",
        ));
    }
    let offered: Vec<&str> = headers
        .get_all("sec-websocket-protocol")
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .collect();
    let shared = protocols.iter().find(|known| offered.contains(known));
    let protocol = *shared.ok_or_else(|| {
        ApiError::bad_request(format!(
            "unable to upgrade: none of the offered protocols {offered:?} is one of {protocols:?}"
        ))
    })?;
    let key = text("sec-websocket-key");
    if base64::engine::general_purpose::STANDARD.decode(key).is_err() || key.is_empty() {
        return Err(ApiError::bad_request("Sec-WebSocket-Key is missing or malformed"));
    }
    Ok((key.to_owned(), protocol))
}

/// The last message. Without a code clients take the end for a failure.
pub(super) fn end() -> Message {
    Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() }))
}
