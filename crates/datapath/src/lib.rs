//! Kernel datapath.
