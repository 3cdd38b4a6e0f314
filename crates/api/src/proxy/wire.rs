//! What the proxy saw, as its messages hold it. Their format has no names of fields, so that none
//! may be left out as it is where people read them.

use std::{borrow::Cow, fmt, io, marker::PhantomData, net::IpAddr};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, SeqAccess, Visitor},
};

use super::{MOST_ADDRESSES, MOST_NAMES};
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

/// A list of no more than so many. A thing may be written in one byte and take a hundred.
pub(super) fn few<'de, D: Deserializer<'de>, T: Deserialize<'de>, const MOST: usize>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    struct Few<T, const MOST: usize>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>, const MOST: usize> Visitor<'de> for Few<T, MOST> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list of at most {MOST}")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
            let mut list = Vec::new();
            while let Some(one) = seq.next_element()? {
                if list.len() == MOST {
                    return Err(de::Error::invalid_length(MOST + 1, &self));
                }
                list.push(one);
            }
            Ok(list)
        }
    }
    deserializer.deserialize_seq(Few::<T, MOST>(PhantomData))
}

/// A name: at most 255 bytes (RFC 1035 section 2.3.4), each of which may be written as four.
pub(super) fn name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let name = <&str>::deserialize(deserializer)?;
    match name.len() {
        0..=1020 => Ok(name.to_owned()),
        long => Err(de::Error::invalid_length(long, &"a name of at most 1020 bytes")),
    }
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
    #[serde(deserialize_with = "few::<_, _, MOST_NAMES>")]
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
    #[serde(deserialize_with = "few::<_, _, MOST_ADDRESSES>")]
    addresses: Vec<IpAddr>,
    ttl: Option<u32>,
    latency_ns: u64,
    error: Option<String>,
}
