//! `palisade demo`.

/// The Star Wars walk-through.
pub(crate) mod starwars;
