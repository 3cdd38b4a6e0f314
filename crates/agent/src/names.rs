//! Words for numbers.

use std::borrow::Cow;

use palisade_abi::protocol as number;

/// Name of an IP protocol; its number where it has no name here.
pub(crate) fn protocol(protocol: u8) -> Cow<'static, str> {
    match protocol {
        number::TCP => "TCP".into(),
        number::UDP => "UDP".into(),
        number::SCTP => "SCTP".into(),
        number::ICMP => "ICMPv4".into(),
        number::ICMPV6 => "ICMPv6".into(),
        other => other.to_string().into(),
    }
}

/// Number of a protocol that Kubernetes names; TCP where it names none.
pub(crate) fn protocol_number(name: Option<&str>) -> Option<u8> {
    match name {
        None | Some("TCP") => Some(number::TCP),
        Some("UDP") => Some(number::UDP),
        Some("SCTP") => Some(number::SCTP),
        Some(_) => None,
    }
}
