//! Records for the flow log. A slow reader costs records, which are counted, never packets.

use aya_ebpf::{
    bindings::{BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::generated::bpf_ktime_get_ns,
    macros::map,
    maps::PerCpuArray,
};
use palisade_abi::{DropReason, Event, EventKind, metric_index};

use crate::{
    clock,
    maps::{EVENTS, METRICS},
};

/// Drop records per CPU and second; what is above only counts in the metrics.
const DROPS_PER_SECOND: u32 = 2000;

#[repr(C)]
struct Bucket {
    refilled: u32,
    tokens: u32,
}

#[map]
static DROP_BUDGET: PerCpuArray<Bucket> = PerCpuArray::with_max_entries(1, 0);

/// When this CPU last woke the reader.
#[map]
static WOKEN: PerCpuArray<u32> = PerCpuArray::with_max_entries(1, 0);

#[inline(always)]
pub fn count(index: u32, bytes: u32) {
    let Some(slot) = METRICS.get_ptr_mut(index) else { return };
    // SAFETY: a live per-CPU slot; programs of one CPU do not interrupt each other here.
    unsafe {
        (*slot).packets += 1;
        (*slot).bytes += u64::from(bytes);
    }
}

#[inline(always)]
pub fn count_drop(reason: DropReason, bytes: u32) {
    count(reason as u32, bytes);
}

/// Whether a drop may still be recorded in this second.
#[inline(always)]
pub fn drop_budget() -> bool {
    let Some(bucket) = DROP_BUDGET.get_ptr_mut(0) else { return false };
    let now = clock::now();
    // SAFETY: as in `count`.
    unsafe {
        if clock::passed((*bucket).refilled.wrapping_add(clock::seconds(1)), now)
            || (*bucket).refilled == 0
        {
            (*bucket).refilled = now | 1;
            (*bucket).tokens = DROPS_PER_SECOND;
        }
        if (*bucket).tokens == 0 {
            count(metric_index::EVENTS_LIMITED, 0);
            return false;
        }
        (*bucket).tokens -= 1;
    }
    true
}

/// Writes a record: `fill` gets it with time and kind set and everything else zero.
#[inline(always)]
pub fn emit(kind: EventKind, fill: impl FnOnce(&mut Event)) {
    let Some(mut entry) = EVENTS.reserve::<Event>(0) else {
        count(metric_index::EVENTS_LOST, 0);
        return;
    };
    // SAFETY: `Event` is plain integers, all of which may be zero.
    let event = unsafe {
        core::ptr::write_bytes(entry.as_mut_ptr(), 0, 1);
        &mut *entry.as_mut_ptr()
    };
    // SAFETY: the helper takes nothing and cannot fail.
    event.time = unsafe { bpf_ktime_get_ns() };
    event.kind = kind as u8;
    fill(event);
    entry.submit(wake_up());
}

/// Whether a record wakes the reader. Waking interrupts this CPU, which costs more than all the
/// rest that a new connection does (on virtual machines it leaves the guest), so it is done at
/// most 64 times a second: a reader that was woken reads once more when that time is over, see
/// `EventReader` on the host's side.
#[inline(always)]
fn wake_up() -> u64 {
    let force = u64::from(BPF_RB_FORCE_WAKEUP);
    let Some(woken) = WOKEN.get_ptr_mut(0) else { return force };
    let now = clock::now();
    // SAFETY: as in `count`.
    unsafe {
        if now.wrapping_sub(*woken) < clock::seconds(1) / 64 {
            return u64::from(BPF_RB_NO_WAKEUP);
        }
        *woken = now;
    }
    force
}
