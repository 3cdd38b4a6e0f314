//! Questions to name servers, and their answers.
#![no_main]

use palisade_proxy::dns;

#[path = "../../tests/support/check_dns.rs"]
mod check_dns;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| check_dns::check(bytes));
