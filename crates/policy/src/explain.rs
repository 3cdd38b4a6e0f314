//! Why a packet is allowed or denied.
