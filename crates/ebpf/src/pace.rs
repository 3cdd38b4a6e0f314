//! How many questions a second an endpoint may ask of name servers behind the proxy, over both
//! families together.
//!
//! Those beyond are dropped here, on the sender's own time: the proxy, which has to receive a
//! datagram before it knows whose it is, has the others' questions to answer. Resolvers of programs
//! stay far below.

use aya_ebpf::{helpers::generated::bpf_ktime_get_ns, macros::map, maps::Array};
use palisade_abi::limits;

/// What an endpoint may ask at once after it asked nothing, as time that it takes at the pace.
const BURST: u64 = limits::QUESTIONS_AT_ONCE * limits::QUESTION_NANOS;

/// When each row has asked as much as it may (the generic cell rate algorithm, ITU-T I.371), in
/// nanoseconds of `CLOCK_MONOTONIC`. Not pinned, and not cleared for a row's next endpoint: it lies
/// no further ahead than a burst takes.
#[map]
static QUESTIONS_DUE: Array<u64> = Array::with_max_entries(limits::ENDPOINT_ROWS, 0);

/// Whether the endpoint may ask one more now.
#[inline(always)]
pub fn admit(row: u32) -> bool {
    let Some(due) = QUESTIONS_DUE.get_ptr_mut(row) else { return false };
    // SAFETY: the helper takes nothing and cannot fail; a live map value. Of two CPUs that write at
    // the same time one is forgotten, which is a question more.
    unsafe {
        let now = bpf_ktime_get_ns();
        let begins = (*due).max(now);
        if begins - now > BURST {
            return false;
        }
        *due = begins + limits::QUESTION_NANOS;
    }
    true
}
