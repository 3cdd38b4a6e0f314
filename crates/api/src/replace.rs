//! Files that are replaced as a whole, whatever happens meanwhile.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

/// What a file is called before it stands in the other's place.
pub const ASIDE: &str = "partial";

/// Whether a file has to outlive the machine's present run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lasting {
    /// It is on disk before it counts.
    Always,
    /// It counts until the machine starts again.
    UntilBoot,
}

/// Puts a file with this content, which only its owner reads, in the place of the one at `path`,
/// and returns it, open for writing at its end.
///
/// # Errors
/// It cannot be written: the one before stands, and nothing is left beside it.
pub fn replace(path: &Path, content: &[u8], lasting: Lasting) -> io::Result<File> {
    let aside = path.with_extension(ASIDE);
    let replaced = write(&aside, content, lasting).and_then(|file| {
        fs::rename(&aside, path)?;
        Ok(file)
    });
    if replaced.is_err() {
        // It would take the last of the room on a disk that is full.
        _ = fs::remove_file(&aside);
    }
    replaced
}

fn write(aside: &Path, content: &[u8], lasting: Lasting) -> io::Result<File> {
    let mut file =
        File::options().write(true).create(true).truncate(true).mode(0o600).open(aside)?;
    file.write_all(content)?;
    if lasting == Lasting::Always {
        file.sync_all()?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn directory(name: &str) -> PathBuf {
        let name = format!("palisade-replace-{name}-{}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        fs::create_dir(&directory).unwrap();
        directory
    }

    #[test]
    fn a_file_is_replaced_as_a_whole() {
        let directory = directory("whole");
        let path = directory.join("file");
        let mut file = replace(&path, b"one", Lasting::UntilBoot).unwrap();
        file.write_all(b" more").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"one more");
        replace(&path, b"two", Lasting::Always).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn what_fails_leaves_nothing_beside_the_one_before() {
        let directory = directory("fails");
        let path = directory.join("file");
        // No file takes the place of a directory.
        fs::create_dir(&path).unwrap();
        replace(&path, b"one", Lasting::UntilBoot).unwrap_err();
        let left: Vec<_> = fs::read_dir(&directory).unwrap().map(|e| e.unwrap().path()).collect();
        assert_eq!(left, [path]);
        fs::remove_dir_all(directory).unwrap();
    }
}
