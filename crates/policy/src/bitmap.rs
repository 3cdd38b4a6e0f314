//! Bitmaps in messages: as two words, because not every format has numbers of 128 bits.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::compile::words;

fn join([low, high]: [u64; 2]) -> u128 {
    u128::from(high) << 64 | u128::from(low)
}

pub(crate) fn serialize<S: Serializer>(bitmap: &u128, to: S) -> Result<S::Ok, S::Error> {
    words(*bitmap).serialize(to)
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u128, D::Error> {
    <[u64; 2]>::deserialize(from).map(join)
}

/// Maps to bitmaps: as lists, because not every format has keys that are no strings.
pub(crate) mod map {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::{join, words};

    pub(crate) fn serialize<K: Serialize, S: Serializer>(
        map: &BTreeMap<K, u128>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_seq(map.iter().map(|(key, bitmap)| (key, words(*bitmap))))
    }

    pub(crate) fn deserialize<'de, K: Deserialize<'de> + Ord, D: Deserializer<'de>>(
        from: D,
    ) -> Result<BTreeMap<K, u128>, D::Error> {
        let pairs = Vec::<(K, [u64; 2])>::deserialize(from)?;
        Ok(pairs.into_iter().map(|(key, bitmap)| (key, join(bitmap))).collect())
    }
}
