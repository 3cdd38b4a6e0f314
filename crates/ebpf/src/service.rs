//! Service translation: which backend.

use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use palisade_abi::{Address, BackendKey, BackendValue, ServiceKey};

use crate::maps::{BACKENDS, SERVICES};

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

#[inline(always)]
pub fn choose(address: &Address, port: u16, protocol: u8) -> Choice {
    let key = ServiceKey { address: *address, port, protocol, reserved: 0 };
    for _ in 0..ATTEMPTS {
        // SAFETY: not preallocated, so the value stays while this program runs.
        let Some(service) = (unsafe { SERVICES.get(&key) }) else { return Choice::NoService };
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
