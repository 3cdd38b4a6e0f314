//! What the proxy saw, as its messages hold it. Their format has no names of fields, so that none
//! may be left out as it is where people read them.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::flow;

#[derive(Serialize, Deserialize)]
#[serde(remote = "flow::L7")]
pub(super) enum L7 {
    Http(#[serde(with = "Http")] flow::Http),
    Dns(#[serde(with = "Dns")] flow::Dns),
    Tls { server_name: Option<String>, error: Option<String> },
    Stream { error: String },
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "flow::Http")]
struct Http {
    method: String,
    url: String,
    version: String,
    status: Option<u16>,
    grpc_status: Option<u16>,
    latency_ns: u64,
    mismatches: Vec<String>,
    error: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "flow::Dns")]
struct Dns {
    query: String,
    qtype: String,
    rcode: Option<String>,
    addresses: Vec<IpAddr>,
    ttl: Option<u32>,
    latency_ns: u64,
    error: Option<String>,
}
