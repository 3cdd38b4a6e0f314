//! Service translation: which backend.

use core::cmp::Ordering;

use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use palisade_abi::{Address, BackendKey, BackendValue, ServiceKey, ServiceValue, limits};

use crate::{
    flow::halves,
    maps::{BACKENDS, SERVICES},
};

/// What stands behind a Service address.
pub enum Choice {
    /// Not a Service.
    NoService,
    /// A Service without backends.
    NoBackend,
    Backend(BackendValue),
}

/// A version may go between the look at the Service and the look at its backend. The Service then
/// names the next one already, and twice in a row that does not happen to anybody.
const ATTEMPTS: u32 = 2;

/// Looks for the Service at an address.
#[inline(always)]
pub fn find(address: &Address, port: u16, protocol: u8) -> Option<&'static ServiceValue> {
    let key = ServiceKey { address: *address, port, protocol, reserved: 0 };
    // SAFETY: not preallocated, so the value stays while this program runs.
    unsafe { SERVICES.get(&key) }
}

#[inline(always)]
pub fn choose(address: &Address, port: u16, protocol: u8) -> Choice {
    for _ in 0..ATTEMPTS {
        let Some(service) = find(address, port, protocol) else { return Choice::NoService };
        if service.backends == 0 {
            return Choice::NoBackend;
        }
        // SAFETY: the helper takes nothing and cannot fail.
        let index = unsafe { bpf_get_prandom_u32() } % service.backends;
        // SAFETY: as above.
        if let Some(backend) =
            unsafe { BACKENDS.get(&BackendKey { version: service.version, index }) }
        {
            return Choice::Backend(*backend);
        }
    }
    Choice::NoBackend
}

/// Whether a Service has a backend.
#[inline(always)]
pub fn has(service: &ServiceValue, address: &Address, port: u16) -> bool {
    let (high, low) = halves(address);
    service_has(service.version, service.backends, high, low, u16::from_be(port).into()) != 0
}

/// The search for a backend among those of a version, which are in ascending order. Its name and
/// numbers make it a function that the verifier walks through once, not at each call ("global",
/// `Documentation/bpf/verifier.rst`).
#[unsafe(no_mangle)]
extern "C" fn service_has(version: u32, backends: u32, high: u64, low: u64, port: u32) -> u32 {
    let (mut begin, mut end) = (0, backends);
    for _ in 0..=limits::BACKENDS.ilog2() {
        if begin >= end {
            return 0;
        }
        let index = begin + (end - begin) / 2;
        // SAFETY: as in `find`.
        let Some(backend) = (unsafe { BACKENDS.get(&BackendKey { version, index }) }) else {
            return 0;
        };
        let (found_high, found_low) = halves(&backend.address);
        let found = (found_high, found_low, u32::from(u16::from_be(backend.port)));
        match found.cmp(&(high, low, port)) {
            Ordering::Equal => return 1,
            Ordering::Less => begin = index + 1,
            Ordering::Greater => end = index,
        }
    }
    0
}
