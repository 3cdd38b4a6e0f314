//! The corpora of the fuzz targets, replayed.

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

#[path = "support/check_dns.rs"]
mod check_dns;

use std::fs;

use palisade_proxy::dns;

#[test]
fn dns() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/dns");
    let mut count = 0;
    for entry in fs::read_dir(directory).unwrap() {
        check_dns::check(&fs::read(entry.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count > 10, "only {count} files");
}
