//! Ports that the node's own sockets must not get: those of masqueraded flows.

use std::ops::RangeInclusive;

use palisade_abi::MASQUERADE_FIRST_PORT;

use super::{Netlink, NetlinkError, sysctl};

const SETTING: &str = "ipv4/ip_local_reserved_ports";

impl Netlink {
    /// Keeps the kernel from giving a socket a port of masqueraded flows by itself; what was
    /// reserved stays so. `self` is the node's namespace.
    pub async fn reserve_ports(&self) -> Result<(), NetlinkError> {
        self.run(|_| {
            let reserved = sysctl::get(SETTING)?;
            match with_ours(&reserved) {
                Some(wanted) => sysctl::set(SETTING, &wanted),
                None => Ok(()),
            }
        })
        .await
    }
}

/// The list with our ports, unless they are in it.
fn with_ours(reserved: &str) -> Option<String> {
    let ours = MASQUERADE_FIRST_PORT..=u16::MAX;
    let entries = reserved.split(',').map(str::trim).filter(|entry| !entry.is_empty());
    if entries.clone().filter_map(range).any(|range| contains(&range, &ours)) {
        return None;
    }
    let own = format!("{}-{}", ours.start(), ours.end());
    Some(entries.chain([own.as_str()]).collect::<Vec<_>>().join(","))
}

fn range(entry: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = entry.split_once('-').unwrap_or((entry, entry));
    Some(first.parse().ok()?..=last.parse().ok()?)
}

fn contains(outer: &RangeInclusive<u16>, inner: &RangeInclusive<u16>) -> bool {
    outer.contains(inner.start()) && outer.contains(inner.end())
}

#[cfg(test)]
mod tests {
    use super::with_ours;

    #[test]
    fn what_others_reserved_stays() {
        assert_eq!(with_ours("").as_deref(), Some("49152-65535"));
        assert_eq!(
            with_ours("8080,30000-32767\n").as_deref(),
            Some("8080,30000-32767,49152-65535")
        );
        assert_eq!(with_ours("50000").as_deref(), Some("50000,49152-65535"));
        assert_eq!(with_ours("8080,49152-65535\n"), None);
        assert_eq!(with_ours("40000-65535"), None);
    }
}
