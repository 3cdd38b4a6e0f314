//! HTTP answers.

use std::convert::Infallible;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::Response;
use hyper::body::Frame;
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue, WARNING};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::error::ApiError;

/// Any answer's body.
pub(super) type Body = UnsyncBoxBody<Bytes, Infallible>;
/// An answer.
pub(super) type Reply = Response<Body>;

/// A whole body.
pub(super) fn full(code: u16, content_type: &str, bytes: impl Into<Bytes>) -> Reply {
    let mut reply = Response::new(Full::new(bytes.into()).boxed_unsync());
    *reply.status_mut() =
        hyper::StatusCode::from_u16(code).unwrap_or(hyper::StatusCode::INTERNAL_SERVER_ERROR);
    if let Ok(value) = HeaderValue::from_str(content_type) {
        reply.headers_mut().insert(CONTENT_TYPE, value);
    }
    reply.headers_mut().insert(
        HeaderName::from_static("cache-control"),
        HeaderValue::from_static("no-cache, private"),
    );
    reply
}

/// A JSON object, or the same as YAML.
pub(super) fn object(code: u16, value: &Value, yaml: bool) -> Reply {
    if yaml && let Ok(text) = serde_saphyr::to_string(value) {
        return full(code, "application/yaml", text);
    }
    // Faster than the same by way of `Display`, and it fails as little.
    let mut text = serde_json::to_vec(value).unwrap_or_default();
    text.push(b'\n');
    full(code, "application/json", text)
}

/// A refusal.
pub(super) fn error(error: &ApiError) -> Reply {
    object(error.code, &error.status(), false)
}

/// A body that is written while the client reads it. Ends when the sender is dropped, or when
/// the server shuts down.
pub(super) fn stream(
    content_type: &str,
    chunks: mpsc::Receiver<Bytes>,
    stop: CancellationToken,
) -> Reply {
    let frames = futures::stream::unfold((chunks, stop), |(mut chunks, stop)| async move {
        let chunk = tokio::select! {
            chunk = chunks.recv() => chunk?,
            () = stop.cancelled() => return None,
        };
        Some((Ok::<_, Infallible>(Frame::data(chunk)), (chunks, stop)))
    });
    let mut reply = full(200, content_type, Bytes::new());
    *reply.body_mut() = StreamBody::new(frames).boxed_unsync();
    reply
}

/// Adds `Warning: 299` headers.
pub(super) fn warn(mut reply: Reply, warnings: &[String]) -> Reply {
    for text in warnings {
        let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace(['\n', '\r'], " ");
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{text}\"")) {
            reply.headers_mut().append(WARNING, value);
        }
    }
    reply
}
