//! An API server with two nodes, a pod of one that is lost, and nothing else. Nobody may write the
//! first node.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
};

use hyper::{Method, Request, Response, StatusCode};
use kube::{Client, client::Body};
use serde_json::{Value, json};

/// The paths that were written to.
pub(crate) type Written = Arc<Mutex<Vec<String>>>;

pub(crate) fn api() -> (Client, Written) {
    let written = Written::default();
    let note = Arc::clone(&written);
    let service = tower::service_fn(move |request: Request<Body>| {
        let path = request.uri().path().to_owned();
        let (status, answer) = match *request.method() {
            Method::GET if path.ends_with("/nodes") => (StatusCode::OK, nodes()),
            Method::GET if path == "/api/v1/pods" => (StatusCode::OK, pods()),
            Method::GET => (StatusCode::OK, json!({ "metadata": {}, "items": [] })),
            _ if path.ends_with("/first") => (StatusCode::FORBIDDEN, denial()),
            _ => (StatusCode::OK, json!({ "metadata": { "name": "second" } })),
        };
        if request.method() != Method::GET {
            note.lock().unwrap().push(path);
        }
        let mut response = Response::new(Body::from(answer.to_string().into_bytes()));
        *response.status_mut() = status;
        std::future::ready(Ok::<_, Infallible>(response))
    });
    (Client::new(service, "default"), written)
}

fn nodes() -> Value {
    let node = |name| json!({ "metadata": { "name": name, "resourceVersion": "1" } });
    json!({ "metadata": {}, "items": [node("first"), node("second")] })
}

fn pods() -> Value {
    let status = json!({ "podIPs": [{ "ip": "10.0.9.7" }] });
    json!({ "metadata": {}, "items": [{ "metadata": { "name": "left" }, "status": status }] })
}

fn denial() -> Value {
    json!({ "kind": "Status", "status": "Failure", "reason": "Forbidden", "code": 403 })
}
