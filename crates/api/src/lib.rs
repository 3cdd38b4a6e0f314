//! Messages between processes.
