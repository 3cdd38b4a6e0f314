//! lab library.
