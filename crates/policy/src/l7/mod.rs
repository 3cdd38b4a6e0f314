//! What rules ask of the traffic inside a connection. Used by whoever reads policies, by the
//! proxy, and to explain either.

mod demand;
mod edit;
pub mod field;
mod http;
mod name;
mod pattern;
pub mod target;

pub use demand::Demand;
pub use edit::{Editable, Unwritable, edit};
pub use http::{
    Difference, HeaderChange, HeaderEdit, HeaderRule, HeaderValue, HttpMatcher, HttpRequest,
    HttpRule, L7Error, Match, Mismatch, SecretRef, Secrets,
};
pub use name::{NameError, NamePattern, server_name};
pub use pattern::{Pattern, PatternError};

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

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
/// node's own, a link's own, what stands for many, or what a cloud tells its machines.
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
                || is_metadata_v6(address)
                || address.to_ipv4_mapped().is_some())
        }
    }
}

/// Whether a cloud gives the credentials of its machines and pods away there, to whoever asks: over
/// IPv6 the addresses of that are unique local ones. A name that somebody outside makes lead there
/// must not open them, no more than 169.254.169.254.
fn is_metadata_v6(address: Ipv6Addr) -> bool {
    const AWS: [u16; 2] = [0xfd00, 0x0ec2];
    const GOOGLE: Ipv6Addr = Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254);
    address.segments().starts_with(&AWS) || address == GOOGLE
}

fn may_learn_v4(address: Ipv4Addr) -> bool {
    !(address.octets()[0] == 0
        || address.is_loopback()
        || address.is_link_local()
        || address.is_multicast()
        || address.is_broadcast())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_lead_to_metadata() {
        let may = |address: &str| may_learn(address.parse().unwrap());
        for metadata in ["169.254.169.254", "fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254"] {
            assert!(!may(metadata), "{metadata}");
        }
        for other in ["93.184.216.34", "fd00:ec3::254", "fd20:ce::255", "2606:2800::1"] {
            assert!(may(other), "{other}");
        }
    }
}
