//! What rules ask of the traffic inside a connection. Used by whoever reads policies, by the
//! proxy, and to explain either.

mod demand;
pub mod field;
mod http;
mod name;
mod pattern;
pub mod target;

pub use demand::Demand;
pub use http::{
    Difference, HeaderChange, HeaderEdit, HeaderRule, HeaderValue, HttpMatcher, HttpRequest,
    HttpRule, L7Error, Match, Mismatch, SecretRef, Secrets,
};
pub use name::{NameError, NamePattern};
pub use pattern::{Pattern, PatternError};

use std::net::{IpAddr, Ipv4Addr};

use target::Malformed;

/// What somebody asks for inside a connection.
#[derive(Clone, Copy, Debug)]
pub enum Question<'a> {
    /// A request of HTTP, and the secrets that rules may compare its headers with.
    Http(HttpRequest<'a>, &'a Secrets),
    /// What is no request of HTTP to the proxy, which answers it itself.
    Malformed(Malformed),
    /// A name of DNS.
    Dns(&'a str),
    /// TLS, for a server name if the client gives one.
    Tls(Option<&'a str>),
}

/// Whether an address that DNS gave for a name may become reachable by that name. Never the
/// node's own, a link's own, or what stands for many.
#[must_use]
pub fn may_learn(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => may_learn_v4(address),
        IpAddr::V6(address) => {
            let segments = address.segments();
            !(address.is_loopback()
                || address.is_unspecified()
                || address.is_multicast()
                || segments[0] & 0xffc0 == 0xfe80
                || address.to_ipv4_mapped().is_some())
        }
    }
}

fn may_learn_v4(address: Ipv4Addr) -> bool {
    !(address.octets()[0] == 0
        || address.is_loopback()
        || address.is_link_local()
        || address.is_multicast()
        || address.is_broadcast())
}
