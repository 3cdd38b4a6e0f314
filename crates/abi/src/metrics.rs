use core::mem::size_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Value of `METRICS`, per CPU.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct MetricsValue {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Slots of `METRICS`: 0 to 31 count drops by [`crate::DropReason`] number; then see
/// [`metric_index`].
pub const METRICS_LEN: u32 = 64;

/// Slots of `METRICS` that are not drop reasons.
pub mod metric_index {
    /// Packets that took the slow path and were allowed.
    pub const SLOW_PATH: u32 = 32;
    /// Events lost because the ring was full.
    pub const EVENTS_LOST: u32 = 33;
    /// Drop events not written because of the rate limit; the drops themselves are counted.
    pub const EVENTS_LIMITED: u32 = 34;
    /// Flows created.
    pub const FLOWS_CREATED: u32 = 35;
    /// Flows judged again after a change.
    pub const FLOWS_REJUDGED: u32 = 36;
}

const _: () = assert!(size_of::<MetricsValue>() == 16);
