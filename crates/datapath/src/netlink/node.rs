//! Settings of the node as a whole.

use std::ops::RangeInclusive;

use palisade_abi::MASQUERADE_FIRST_PORT;

use super::{Netlink, NetlinkError, sysctl};

/// Forwarding between pods and the outside without the kernel's own source check, which knows
/// nothing of pods.
///
/// Looking for the socket before the route, the kernel would meet the proxy's in packets that are
/// on their way to a pod, whose programs judge them first; and what has a socket it does not
/// forward. For a node that forwards, the look costs more than it saves anyway.
const SETTINGS: [(&str, &str); 6] = [
    ("ipv4/ip_forward", "1"),
    ("ipv6/conf/all/forwarding", "1"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv4/tcp_early_demux", "0"),
    ("ipv4/udp_early_demux", "0"),
];
/// Ports that the kernel gives no socket by itself: those of masqueraded flows are among them.
const RESERVED_PORTS: &str = "ipv4/ip_local_reserved_ports";

/// A setting that is not yet as it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettingChange {
    /// Its path below `/proc/sys/net`.
    pub name: &'static str,
    /// Its value.
    pub before: String,
    /// The value that it gets.
    pub after: String,
}

impl Netlink {
    /// Makes the node ready for pods, and for masquerading where that is asked for. `record` hears
    /// what is changed before it is. `self` is the node's namespace.
    pub async fn prepare_node(
        &self,
        masquerades: bool,
        record: impl FnOnce(Vec<SettingChange>) + Send + 'static,
    ) -> Result<(), NetlinkError> {
        self.run(move |_| {
            let changes = changes(masquerades)?;
            record(changes.clone());
            changes.iter().try_for_each(|change| sysctl::set(change.name, &change.after))
        })
        .await
    }
}

fn changes(masquerades: bool) -> Result<Vec<SettingChange>, NetlinkError> {
    let mut changes = Vec::new();
    for (name, after) in SETTINGS {
        let Some(before) = sysctl::get(name)? else { continue };
        changes.push(SettingChange { name, before, after: after.to_owned() });
    }
    if masquerades && let Some(before) = sysctl::get(RESERVED_PORTS)? {
        let after = with_ours(&before);
        changes.push(SettingChange { name: RESERVED_PORTS, before, after });
    }
    changes.retain(|change| change.before != change.after);
    Ok(changes)
}

/// The list with our ports, as the kernel writes it.
fn with_ours(reserved: &str) -> String {
    let ours = MASQUERADE_FIRST_PORT..=u16::MAX;
    let mut ranges: Vec<_> = reserved.split(',').filter_map(range).chain([ours]).collect();
    ranges.sort_by_key(|range| *range.start());
    let mut merged: Vec<RangeInclusive<u16>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if *range.start() <= last.end().saturating_add(1) => {
                *last = *last.start()..=*last.end().max(range.end());
            }
            _ => merged.push(range),
        }
    }
    merged.iter().map(entry).collect::<Vec<_>>().join(",")
}

fn range(entry: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = entry.split_once('-').unwrap_or((entry, entry));
    Some(first.parse().ok()?..=last.parse().ok()?)
}

fn entry(range: &RangeInclusive<u16>) -> String {
    if range.start() == range.end() {
        return range.start().to_string();
    }
    format!("{}-{}", range.start(), range.end())
}

#[cfg(test)]
mod tests {
    use super::with_ours;

    #[test]
    fn what_others_reserved_stays() {
        assert_eq!(with_ours(""), "49152-65535");
        assert_eq!(with_ours("8080,30000-32767"), "8080,30000-32767,49152-65535");
        assert_eq!(with_ours("8080,50000"), "8080,49152-65535");
        assert_eq!(with_ours("8080,49152-65535"), "8080,49152-65535");
        assert_eq!(with_ours("40000-49151"), "40000-65535");
        assert_eq!(with_ours("40000-65535"), "40000-65535");
    }
}
