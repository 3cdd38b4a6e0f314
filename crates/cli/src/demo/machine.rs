//! What a demonstration must leave as it was: the machine's own network, mounts, cgroups, bpffs.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

/// Listings of the machine's state, without counters and ages.
const COMMANDS: [(&str, &[&str]); 8] = [
    ("links", &["ip", "-br", "link"]),
    ("addresses", &["ip", "-br", "address"]),
    ("IPv4 routes", &["ip", "-4", "route", "show", "table", "all"]),
    ("IPv6 routes", &["ip", "-6", "route", "show", "table", "all"]),
    ("IPv4 rules", &["ip", "-4", "rule"]),
    ("IPv6 rules", &["ip", "-6", "rule"]),
    ("network namespaces", &["ip", "netns"]),
    ("firewall", &["nft", "list", "ruleset"]),
];
/// Files and directories: their content, or the names below them.
const PATHS: [(&str, &str); 6] = [
    ("IPv4 forwarding", "/proc/sys/net/ipv4/ip_forward"),
    ("IPv6 forwarding", "/proc/sys/net/ipv6/conf/all/forwarding"),
    ("resolver", "/etc/resolv.conf"),
    ("hosts", "/etc/hosts"),
    ("bpffs", "/sys/fs/bpf"),
    ("run directory", "/run/palisade"),
];

/// One look at the machine: a fact a line, with its kind.
pub(super) struct Machine(BTreeSet<(&'static str, String)>);

impl Machine {
    pub(super) fn look() -> Self {
        let commands = COMMANDS.iter().flat_map(|(kind, command)| facts(kind, &listing(command)));
        let paths = PATHS.iter().flat_map(|(kind, path)| facts(kind, &content(Path::new(path))));
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let mut all: BTreeSet<_> = commands.chain(paths).chain(passing(&mounts)).collect();
        for root in mounts.lines().filter_map(cgroup_root) {
            all.extend(facts("cgroups", &names(Path::new(root), 1).join("\n")));
        }
        Self(all)
    }

    /// What is here and was not in `before`, and what has gone.
    pub(super) fn differences(&self, before: &Self) -> Vec<String> {
        let new = self.0.difference(&before.0).map(|(kind, fact)| format!("{kind}: new: {fact}"));
        let gone = before.0.difference(&self.0).map(|(kind, fact)| format!("{kind}: gone: {fact}"));
        new.chain(gone).collect()
    }
}

fn facts(kind: &'static str, text: &str) -> Vec<(&'static str, String)> {
    text.lines().map(|line| (kind, without_age(line))).collect()
}

/// Mounts, but for that of the directory of network namespaces: whoever names the first one since the
/// machine started makes it a mount for good, as `ip netns` does.
fn passing(mounts: &str) -> Vec<(&'static str, String)> {
    let mut mounts = facts("mounts", mounts);
    mounts.retain(|(_, mount)| !mount.contains(" /run/netns "));
    mounts
}

/// Learned routes count down.
fn without_age(line: &str) -> String {
    let mut words = line.split_whitespace();
    let mut kept = Vec::new();
    while let Some(word) = words.next() {
        match word {
            "expires" => drop(words.next()),
            _ => kept.push(word),
        }
    }
    kept.join(" ")
}

/// Empty where the command is not installed: then nothing can have changed by it either.
fn listing(command: &[&str]) -> String {
    let output = Command::new(command[0]).args(&command[1..]).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

fn content(path: &Path) -> String {
    match path.is_dir() {
        true => names(path, 3).join("\n"),
        false => fs::read_to_string(path).unwrap_or_default(),
    }
}

fn cgroup_root(mount: &str) -> Option<&str> {
    let fields: Vec<&str> = mount.split(' ').collect();
    (fields.get(2) == Some(&"cgroup2")).then(|| fields[1])
}

/// Directories below `path`, and what else has a name there, so many levels deep.
fn names(path: &Path, depth: usize) -> Vec<String> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    let deeper = |path: std::path::PathBuf| {
        let below = if depth > 1 { names(&path, depth - 1) } else { Vec::new() };
        std::iter::once(path.display().to_string()).chain(below)
    };
    paths.flat_map(deeper).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_what_came_and_what_went() {
        let before = Machine(facts("links", "lo UP\neth0 UP").into_iter().collect());
        let after = Machine(facts("links", "lo UP\nlxc1 UP").into_iter().collect());
        assert_eq!(after.differences(&before), ["links: new: lxc1 UP", "links: gone: eth0 UP"]);
    }

    #[test]
    fn the_first_name_of_a_network_namespace_leaves_a_mount() {
        let mounts = "tmpfs /run tmpfs rw\ntmpfs /run/netns tmpfs rw\nnsfs /run/netns/a nsfs rw";
        let passing: Vec<String> = passing(mounts).into_iter().map(|(_, mount)| mount).collect();
        assert_eq!(passing, ["tmpfs /run tmpfs rw", "nsfs /run/netns/a nsfs rw"]);
    }

    #[test]
    fn ages_do_not_count() {
        let earlier = "fd00::/64 proto ra metric 100 expires 1799sec pref medium";
        let later = "fd00::/64 proto ra metric 100 expires 12sec pref medium";
        assert_eq!(without_age(earlier), without_age(later));
    }
}
