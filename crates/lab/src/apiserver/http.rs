//! Connections, authentication, and the way of a request to its handler.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, IF_NONE_MATCH, USER_AGENT};
use hyper::{HeaderMap, Method, Request};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::error::ApiError;
use super::negotiate::{Accept, negotiate};
use super::registry::Resource;
use super::reply::{self, Reply};
use super::request::{Path, Query, Target, parse_path};
use super::{Api, crud, discovery, exec, list, logs, openapi, portforward, reviews, scale, watch};

/// Larger bodies are refused, as those of any API server.
const BODY_LIMIT: usize = 3 << 20;

/// A request for an object or a collection.
pub(super) struct Call {
    pub(super) api: Arc<Api>,
    pub(super) resource: Arc<Resource>,
    pub(super) target: Target,
    pub(super) query: Query,
    pub(super) accept: Accept,
    pub(super) content_type: String,
    pub(super) agent: String,
    pub(super) body: Bytes,
}

pub(super) async fn accept(api: Arc<Api>, tls: Arc<rustls::ServerConfig>, listener: TcpListener) {
    let acceptor = TlsAcceptor::from(tls);
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    continue;
                }
            },
            () = api.stop.cancelled() => return,
        };
        tokio::spawn(connection(api.clone(), acceptor.clone(), stream));
    }
}

async fn connection(api: Arc<Api>, acceptor: TlsAcceptor, stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let Ok(stream) = acceptor.accept(stream).await else { return };
    // A certificate that is present was verified against our own authority.
    let certified = stream.get_ref().1.peer_certificates().is_some_and(|chain| !chain.is_empty());
    let stop = api.stop.clone();
    let service = hyper::service::service_fn(move |request| {
        let api = api.clone();
        async move { Ok::<_, Infallible>(handle(api, certified, request).await) }
    });
    let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    tokio::select! {
        result = connection => if let Err(error) = result {
            tracing::debug!(%error, "connection ended");
        },
        () = stop.cancelled() => {}
    }
}

async fn handle(api: Arc<Api>, certified: bool, request: Request<Incoming>) -> Reply {
    let path = request.uri().path().to_owned();
    if let Some(reply) = open_paths(&path) {
        return reply;
    }
    if !certified && !has_token(&api, request.headers()) {
        return reply::error(&ApiError::unauthorized());
    }
    route(api, request, &path).await.unwrap_or_else(|error| reply::error(&error))
}

/// What anybody may ask.
fn open_paths(path: &str) -> Option<Reply> {
    match path.trim_end_matches('/') {
        "/healthz" | "/livez" | "/readyz" => Some(reply::full(200, "text/plain", "ok")),
        "/version" => Some(reply::object(200, &discovery::version(), false)),
        _ => None,
    }
}

fn has_token(api: &Api, headers: &HeaderMap) -> bool {
    let given = header(headers, &AUTHORIZATION).and_then(|value| value.strip_prefix("Bearer "));
    given.is_some_and(|token| reviews::is_known_token(api, token))
}

fn header<'a>(headers: &'a HeaderMap, name: &hyper::header::HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

async fn route(
    api: Arc<Api>,
    mut request: Request<Incoming>,
    path: &str,
) -> Result<Reply, ApiError> {
    let headers = request.headers().clone();
    let accept = header(&headers, &ACCEPT);
    let known = header(&headers, &IF_NONE_MATCH);
    let registry = api.registry();
    if path == "/" {
        return Ok(reply::object(200, &json!({"paths": discovery::root(&registry)}), false));
    }
    if path.starts_with("/openapi/") {
        return openapi::serve(&registry, path, accept, known);
    }
    match parse_path(path).ok_or_else(ApiError::no_such_path)? {
        Path::CoreVersions => Ok(discovery::core(&registry, accept, known)),
        Path::Groups => Ok(discovery::groups(&registry, accept, known)),
        Path::Group(group) => discovery::group(&registry, &group),
        Path::Resources { group, version } => discovery::resources(&registry, &group, &version),
        Path::Resource(target) => {
            let query = Query::parse(request.uri().query());
            let method = request.method().clone();
            if reviews::is_review(&target) {
                let body = read(request.body_mut()).await?;
                return reviews::answer(
                    &api,
                    &method,
                    &target,
                    &body,
                    header(&headers, &CONTENT_TYPE),
                );
            }
            let resource = registry
                .find(&target.group, &target.version, &target.resource)
                .ok_or_else(ApiError::no_such_path)?;
            check_place(&resource, &target)?;
            let body =
                if upgrades(&target) { Bytes::new() } else { read(request.body_mut()).await? };
            let call = Call {
                accept: negotiate(accept)
                    .or_else(|error| if streams(&target) { negotiate(None) } else { Err(error) })?,
                content_type: header(&headers, &CONTENT_TYPE).unwrap_or("").to_owned(),
                agent: header(&headers, &USER_AGENT).unwrap_or("").to_owned(),
                api,
                resource,
                target,
                query,
                body,
            };
            match call.subresource() {
                "exec" | "attach" => exec::serve(call, request),
                "portforward" => portforward::serve(&call, request),
                _ => dispatch(call, &method).await,
            }
        }
    }
}

/// Subresources whose requests become connections of another protocol.
fn upgrades(target: &Target) -> bool {
    matches!(target.subresource.as_deref(), Some("exec" | "attach" | "portforward"))
}

/// Subresources that do not answer with an object.
fn streams(target: &Target) -> bool {
    upgrades(target) || target.subresource.as_deref() == Some("log")
}

/// Namespaced objects need a namespace in their path, others must not have one.
fn check_place(resource: &Resource, target: &Target) -> Result<(), ApiError> {
    let placed = target.namespace.is_some();
    if resource.namespaced && !placed && target.name.is_some() || !resource.namespaced && placed {
        return Err(ApiError::no_such_path());
    }
    match &target.subresource {
        Some(subresource) if !resource.has(subresource) => Err(ApiError::no_such_path()),
        _ => Ok(()),
    }
}

async fn dispatch(call: Call, method: &Method) -> Result<Reply, ApiError> {
    let name = call.target.name.is_some();
    let subresource = call.target.subresource.clone();
    match (method.as_str(), name, subresource.as_deref()) {
        ("GET", true, Some("log")) => logs::serve(call).await,
        (_, true, Some("scale")) => scale::serve(&call, method),
        ("POST", true, Some("binding")) => crud::bind(&call),
        ("POST", true, Some("eviction")) => crud::evict(&call),
        ("POST", true, Some("token")) => reviews::token(&call),
        ("GET", true, None) if call.query.flag("watch") => watch::serve(call),
        ("GET", true, None | Some("status")) => crud::get(&call),
        ("PUT", true, None | Some("status" | "finalize")) => crud::replace(&call),
        ("PATCH", true, None | Some("status")) => crud::patch(&call),
        ("DELETE", true, None) => crud::delete(&call),
        ("GET", false, None) if call.query.flag("watch") => watch::serve(call),
        ("GET", false, None) => list::serve(&call),
        ("POST", false, None) => crud::create(&call),
        ("DELETE", false, None) => crud::delete_collection(&call),
        _ => Err(ApiError::method_not_allowed()),
    }
}

async fn read(body: &mut Incoming) -> Result<Bytes, ApiError> {
    match Limited::new(body, BODY_LIMIT).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(ApiError::too_large(BODY_LIMIT)),
        Err(error) => Err(ApiError::bad_request(format!("cannot read the body: {error}"))),
    }
}
