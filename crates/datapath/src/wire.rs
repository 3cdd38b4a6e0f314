//! The one bridge between the ABI types and aya's maps.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A value as the kernel stores it.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Wire<T>(pub(crate) T);

// SAFETY: `Pod` wants a type that may be copied to and from the kernel as bytes. zerocopy's
// derives prove just that: no padding (`IntoBytes`), every bit pattern valid (`FromBytes`), no
// interior mutability (`Immutable`).
#[expect(unsafe_code, reason = "the trait is unsafe to implement; the bounds carry the proof")]
unsafe impl<T: FromBytes + IntoBytes + Immutable + Copy + 'static> aya::Pod for Wire<T> {}
