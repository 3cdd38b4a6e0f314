//! A hash that is the same on every node, in every version and after every restart.

/// FNV-1a over 64 bits, with a finisher that spreads it over all bits.
#[derive(Clone, Copy)]
pub(crate) struct StableHasher(u64);

impl StableHasher {
    pub(crate) const fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// A string and its end, so that "a" + "bc" differs from "ab" + "c".
    pub(crate) fn write_str(&mut self, text: &str) {
        self.write(text.as_bytes());
        self.write(&[0xff]);
    }

    pub(crate) const fn finish(self) -> u64 {
        let mut hash = self.0;
        hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        hash ^ (hash >> 31)
    }
}

impl core::hash::Hasher for StableHasher {
    fn finish(&self) -> u64 {
        Self::finish(*self)
    }

    fn write(&mut self, bytes: &[u8]) {
        Self::write(self, bytes);
    }

    // The standard library's integers hash in the machine's byte order.
    fn write_u16(&mut self, number: u16) {
        Self::write(self, &number.to_le_bytes());
    }

    fn write_u32(&mut self, number: u32) {
        Self::write(self, &number.to_le_bytes());
    }

    fn write_u64(&mut self, number: u64) {
        Self::write(self, &number.to_le_bytes());
    }

    fn write_u128(&mut self, number: u128) {
        Self::write(self, &number.to_le_bytes());
    }

    fn write_usize(&mut self, number: usize) {
        Self::write(self, &(number as u64).to_le_bytes());
    }
}
