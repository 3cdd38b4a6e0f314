//! Envoy with the rule of the bench, where it is installed. It gets the shortest way there is: its
//! client runs beside it, and nothing redirects.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::Command,
};

use anyhow::Result;
use serde_json::{Value, json};

use super::program::{Program, find};

const PORT: u16 = 7790;

/// Where it listens, in its own network namespace.
pub(super) fn address() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, PORT).into()
}

/// Starts one in front of `upstream`; none where there is none on the search path.
pub(super) fn start(netns: &Path, upstream: SocketAddr) -> Result<Option<Program>> {
    let Some(program) = find("envoy") else { return Ok(None) };
    let mut command = Command::new(program);
    command.args(["--concurrency", "1", "--log-level", "error", "--use-dynamic-base-id"]).args([
        "--disable-hot-restart",
        "--config-yaml",
        &config(upstream).to_string(),
    ]);
    Program::start(netns, command, address()).map(Some)
}

/// One listener, one rule (method and path), one upstream.
fn config(upstream: SocketAddr) -> Value {
    let address =
        |ip: String, port: u16| json!({"socket_address": {"address": ip, "port_value": port}});
    let matcher = |header: &str, regex: &str| json!({"header": {"name": header, "string_match": {"safe_regex": {"regex": regex}}}});
    let typed = |name: &str| format!("type.googleapis.com/envoy.extensions.{name}");
    let rbac = json!({
        "@type": typed("filters.http.rbac.v3.RBAC"),
        "rules": {"action": "ALLOW", "policies": {"rule": {
            "principals": [{"any": true}],
            "permissions": [{"and_rules": {"rules": [
                matcher(":method", "GET"), matcher(":path", "/public(/.*)?"),
            ]}}],
        }}},
    });
    let http = json!({
        "@type": typed("filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "bench",
        "codec_type": "AUTO",
        "route_config": {"virtual_hosts": [{
            "name": "all", "domains": ["*"],
            "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "server"}}],
        }]},
        "http_filters": [
            {"name": "rbac", "typed_config": rbac},
            {"name": "router", "typed_config": {"@type": typed("filters.http.router.v3.Router")}},
        ],
    });
    let protocol = json!({
        "@type": typed("upstreams.http.v3.HttpProtocolOptions"),
        "use_downstream_protocol_config": {"http_protocol_options": {}, "http2_protocol_options": {}},
    });
    // Its defaults refuse what the load has open at once.
    let breakers = json!({"thresholds": [{
        "max_connections": 10_000, "max_pending_requests": 10_000, "max_requests": 10_000,
    }]});
    json!({"static_resources": {
        "listeners": [{
            "address": address(Ipv4Addr::LOCALHOST.to_string(), PORT),
            "filter_chains": [{"filters": [{"name": "http", "typed_config": http}]}],
        }],
        "clusters": [{
            "name": "server", "type": "STATIC", "connect_timeout": "2s",
            "circuit_breakers": breakers,
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": protocol,
            },
            "load_assignment": {"cluster_name": "server", "endpoints": [{"lb_endpoints": [
                {"endpoint": {"address": address(upstream.ip().to_string(), upstream.port())}},
            ]}]},
        }],
    }})
}
