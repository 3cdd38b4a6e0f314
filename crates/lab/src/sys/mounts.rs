//! Reading the mount table.

use std::path::{Path, PathBuf};
use std::{fs, io};

/// One line of `/proc/self/mounts`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where it is mounted.
    pub target: PathBuf,
    /// The type of the file system.
    pub kind: String,
}

/// The mounts this process sees.
pub fn table() -> io::Result<Vec<Mount>> {
    Ok(parse(&fs::read_to_string("/proc/self/mounts")?))
}

/// Where the unified control group hierarchy is mounted.
pub fn cgroup2_root() -> io::Result<Option<PathBuf>> {
    Ok(table()?.into_iter().find(|m| m.kind == "cgroup2").map(|m| m.target))
}

/// The type of the file system mounted at exactly `target`, if any.
pub fn kind_at(target: &Path) -> io::Result<Option<String>> {
    Ok(table()?.into_iter().rev().find(|m| m.target == target).map(|m| m.kind))
}

/// The mount points at or below `dir`, deepest first.
pub fn below(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found: Vec<_> =
        table()?.into_iter().map(|m| m.target).filter(|t| t.starts_with(dir)).collect();
    found.sort_by_key(|t| std::cmp::Reverse(t.components().count()));
    Ok(found)
}

fn parse(text: &str) -> Vec<Mount> {
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let target = unescape(fields.nth(1)?);
            Some(Mount { target: target.into(), kind: fields.next()?.to_owned() })
        })
        .collect()
}

/// Blanks in paths are written as octal escapes.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_targets_with_blanks() {
        let mounts = parse("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\nx /a\\040b tmpfs rw 0 0\n");
        assert_eq!(mounts[0].kind, "cgroup2");
        assert_eq!(mounts[1].target, PathBuf::from("/a b"));
    }
}
