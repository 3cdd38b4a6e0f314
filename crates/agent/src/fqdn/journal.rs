//! What was learned, on disk: a file with a line for each answer, written anew as a whole now and
//! then. It counts until the machine starts again, for so does the clock.

use std::{
    fs::{self, File},
    io::{self, Write},
    net::IpAddr,
    path::{Path, PathBuf},
};

use palisade_api::replace::{Lasting, replace};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::cache::{Cache, Owner};

/// So many lines more than are needed make the file worth writing anew.
const EXCESS: usize = 4096;

/// The first line.
#[derive(Serialize, Deserialize)]
struct Header {
    boot: String,
}

/// Any other line.
#[derive(Serialize, Deserialize)]
struct Line {
    endpoint: u32,
    container: String,
    name: String,
    addresses: Vec<IpAddr>,
    expiry: u64,
}

/// The file.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    boot: String,
    /// Where lines are added, or why it could not be begun: what is there is an earlier agent's.
    file: Result<File, io::ErrorKind>,
    lines: usize,
    /// It may end in the half of a line: the disk was full.
    torn: bool,
}

impl Journal {
    /// Reads what is there. Nothing is added to it before it was written anew with what still
    /// counts.
    ///
    /// # Errors
    /// Nobody knows when the machine started. What cannot be read or understood is left out.
    pub(super) fn open(path: PathBuf) -> io::Result<(Self, Cache)> {
        let boot = palisade_api::boot::id()?;
        let bytes = fs::read(&path).unwrap_or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                warn!(%error, "cannot read the learned names: pods have to ask anew");
            }
            Vec::new()
        });
        let cache = replay(&String::from_utf8_lossy(&bytes), &boot);
        let file = Err(io::ErrorKind::NotFound);
        Ok((Self { path, boot, file, lines: 0, torn: false }, cache))
    }

    /// Adds an answer.
    ///
    /// # Errors
    /// It cannot be written; the next one may be.
    pub(super) fn append(
        &mut self,
        owner: &Owner,
        name: &str,
        addresses: &[IpAddr],
        expiry: u64,
    ) -> io::Result<()> {
        let line = Line {
            endpoint: owner.endpoint,
            container: owner.container.clone(),
            name: name.to_owned(),
            addresses: addresses.to_vec(),
            expiry,
        };
        let file = self.file.as_mut().map_err(|why| *why)?;
        // What was torn must not take the next line with it.
        let mut text = if self.torn { vec![b'\n'] } else { Vec::new() };
        text.extend(encoded(&line)?);
        self.lines += 1;
        let written = file.write_all(&text);
        self.torn = written.is_err();
        written
    }

    /// Whether the file has grown far beyond what it has to say.
    pub(super) fn is_long(&self, cache: &Cache) -> bool {
        self.lines > cache.len() * 2 + EXCESS
    }

    /// Makes the file say what is known now, and nothing else.
    ///
    /// # Errors
    /// It cannot be written.
    pub(super) fn rewrite(&mut self, cache: &Cache) -> io::Result<()> {
        match rewrite(&self.path, &self.boot, cache) {
            Ok(file) => self.file = Ok(file),
            Err(error) => {
                if let Err(why) = &mut self.file {
                    *why = error.kind();
                }
                return Err(error);
            }
        }
        self.lines = cache.len();
        self.torn = false;
        Ok(())
    }

    /// One on a disk that has no room left.
    #[cfg(test)]
    pub(super) fn on_full_disk() -> Self {
        let full = PathBuf::from("/dev/full");
        let file = Ok(File::options().append(true).open(&full).unwrap());
        Self { path: full.join("names"), boot: String::new(), file, lines: 0, torn: false }
    }
}

fn replay(text: &str, boot: &str) -> Cache {
    let mut cache = Cache::default();
    let mut lines = text.lines();
    let header = lines.next().and_then(|line| serde_json::from_str::<Header>(line).ok());
    if header.is_none_or(|header| header.boot != boot) {
        return cache;
    }
    for line in lines {
        // The last line may be the beginning of one: its answer was never released.
        let Ok(line) = serde_json::from_str::<Line>(line) else {
            warn!("a line in the file of learned names says nothing");
            continue;
        };
        let owner = Owner { endpoint: line.endpoint, container: line.container };
        cache.learn(&owner, &line.name, line.addresses, line.expiry);
    }
    cache
}

fn rewrite(path: &Path, boot: &str, cache: &Cache) -> io::Result<File> {
    let mut content = encoded(&Header { boot: boot.to_owned() })?;
    for (owner, name, address, expiry) in cache.entries() {
        content.extend(encoded(&Line {
            endpoint: owner.endpoint,
            container: owner.container,
            name: name.to_owned(),
            addresses: vec![address],
            expiry,
        })?);
    }
    replace(path, &content, Lasting::UntilBoot)
}

fn encoded(value: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn owner() -> Owner {
        Owner { endpoint: 2, container: "c".into() }
    }

    fn address(n: u8) -> IpAddr {
        IpAddr::from([93, 184, 216, n])
    }

    fn directory(name: &str) -> PathBuf {
        let directory =
            std::env::temp_dir().join(format!("palisade-{name}-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        directory
    }

    /// As an agent that starts.
    fn start(path: &Path) -> (Journal, Cache) {
        let (mut journal, cache) = Journal::open(path.to_owned()).unwrap();
        journal.rewrite(&cache).unwrap();
        (journal, cache)
    }

    fn known(cache: &Cache) -> Vec<(String, IpAddr, u64)> {
        let mut known: Vec<_> =
            cache.entries().map(|(_, name, ip, expiry)| (name.to_owned(), ip, expiry)).collect();
        known.sort();
        known
    }

    #[test]
    fn what_was_learned_is_there_after_a_restart() {
        let directory = directory("names");
        let path = directory.join("names");
        let (mut journal, mut cache) = start(&path);
        assert!(cache.is_empty());
        for (name, n, expiry) in [("x.org", 1, 50), ("x.org", 1, 90), ("y.org", 2, 60)] {
            cache.learn(&owner(), name, [address(n)], expiry);
            journal.append(&owner(), name, &[address(n)], expiry).unwrap();
        }
        // A process that dies may leave half a line.
        fs::write(&path, [fs::read(&path).unwrap(), b"{\"endpo".to_vec()].concat()).unwrap();
        let (mut journal, restored) = start(&path);
        assert_eq!(known(&restored), known(&cache));

        // What was forgotten does not come back.
        let mut cache = restored;
        cache.expire(60, &Default::default());
        journal.rewrite(&cache).unwrap();
        journal.append(&owner(), "z.org", &[address(3)], 99).unwrap();
        cache.learn(&owner(), "z.org", [address(3)], 99);
        assert_eq!(known(&start(&path).1), known(&cache));
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn half_a_line_does_not_take_the_next_one_with_it() {
        let directory = directory("torn");
        let path = directory.join("names");
        let (mut journal, _) = start(&path);
        journal.append(&owner(), "x.org", &[address(1)], 50).unwrap();
        journal.file.as_mut().unwrap().write_all(b"{\"endpo").unwrap();
        let file = std::mem::replace(&mut journal.file, Journal::on_full_disk().file);
        journal.append(&owner(), "y.org", &[address(2)], 50).unwrap_err();
        journal.file = file;
        for (name, n) in [("y.org", 2), ("z.org", 3)] {
            journal.append(&owner(), name, &[address(n)], 50).unwrap();
        }
        let wanted = [("x.org", 1), ("y.org", 2), ("z.org", 3)];
        let wanted = wanted.map(|(name, n)| (name.to_owned(), address(n), 50));
        assert_eq!(known(&start(&path).1), wanted);
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn another_boot_has_another_clock() {
        let directory = directory("boots");
        let path = directory.join("names");
        let (mut journal, _) = start(&path);
        journal.append(&owner(), "x.org", &[address(1)], 50).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(!replay(&text, &journal.boot).is_empty());
        assert!(replay(&text, "another").is_empty());
        assert!(replay("garbage\n", &journal.boot).is_empty());
        fs::remove_dir_all(directory).unwrap();
    }
}
