//! What the proxy saw, as its messages hold it. Their format has no names of fields, so that none
//! may be left out as it is where people read them.

use std::{borrow::Cow, fmt, io, net::IpAddr, sync::Arc};

use palisade_policy::RuleSource;

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, SeqAccess, Visitor},
};

use super::MOST_RECORDS;
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

/// Rules of records. A rule may be written in one byte and takes a hundred: no more are read than
/// the records of a message can name.
pub(super) fn rules<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<Arc<RuleSource>>, D::Error> {
    struct Rules;
    impl<'de> Visitor<'de> for Rules {
        type Value = Vec<Arc<RuleSource>>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("the rules of records")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let mut rules = Vec::new();
            while let Some(rule) = seq.next_element()? {
                if rules.len() == 2 * MOST_RECORDS {
                    return Err(de::Error::custom("more rules than records can name"));
                }
                rules.push(rule);
            }
            Ok(rules)
        }
    }
    deserializer.deserialize_seq(Rules)
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
    #[serde(deserialize_with = "word")]
    method: Cow<'static, str>,
    url: String,
    #[serde(deserialize_with = "word")]
    version: Cow<'static, str>,
    status: Option<u16>,
    grpc_status: Option<u16>,
    latency_ns: u64,
    mismatches: Vec<String>,
    error: Option<String>,
}

fn word<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Cow<'static, str>, D::Error> {
    <&str>::deserialize(deserializer).map(flow::word)
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
