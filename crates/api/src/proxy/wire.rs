//! What the proxy saw, as its messages hold it. Their format has no names of fields, so that none
//! may be left out as it is where people read them.

use std::{io, net::IpAddr};

use serde::{Deserialize, Serialize};

use crate::flow;

/// Writes a value behind what is there.
///
/// # Errors
///
/// The serializer's; a part of it may be there.
pub(super) fn append(value: &impl Serialize, to: &mut Vec<u8>) -> io::Result<()> {
    struct End<'a>(&'a mut Vec<u8>);
    impl Extend<u8> for End<'_> {
        fn extend<I: IntoIterator<Item = u8>>(&mut self, bytes: I) {
            self.0.extend(bytes);
        }
    }
    postcard::to_extend(value, End(to)).map_err(io::Error::other)?;
    Ok(())
}

/// Bytes at one go; a list of them is written and read one by one.
pub(super) mod bytes {
    use std::fmt;

    use serde::{Deserializer, Serializer, de};

    pub(in super::super) fn serialize<S: Serializer>(
        bytes: &[u8],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<u8>, D::Error> {
        struct Bytes;
        impl de::Visitor<'_> for Bytes {
            type Value = Vec<u8>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.into())
            }
        }
        deserializer.deserialize_bytes(Bytes)
    }
}

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
