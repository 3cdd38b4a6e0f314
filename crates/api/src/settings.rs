//! Settings of a node that the agent changed, and what they were before. Whoever takes Palisade off
//! the node puts them back.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use serde::{Deserialize, Serialize};

/// The record's name in the directory of the agent's records.
pub const FILE: &str = "settings";

/// One setting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Its value before the agent came.
    pub before: String,
    /// What the agent made it.
    pub after: String,
}

/// Settings by their paths below `/proc/sys/net`.
pub type Changes = BTreeMap<String, Change>;

/// What is recorded; nothing where there is no record.
///
/// # Errors
/// The record cannot be read, or is none.
pub fn read(file: &Path) -> io::Result<Changes> {
    match fs::read(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Changes::new()),
        read => Ok(serde_json::from_slice(&read?)?),
    }
}

/// Adds to the record. A setting that is changed once more was given another value by somebody
/// since, or by a new start of the machine: that value counts.
///
/// # Errors
/// The record cannot be read or written.
pub fn record(file: &Path, changes: Changes) -> io::Result<()> {
    if changes.is_empty() {
        return Ok(());
    }
    let mut all = read(file)?;
    all.extend(changes);
    let partial = file.with_extension("partial");
    let mut aside = File::create(&partial)?;
    aside.write_all(&serde_json::to_vec(&all)?)?;
    aside.sync_all()?;
    fs::rename(&partial, file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(name: &str, before: &str, after: &str) -> Changes {
        let change = Change { before: before.into(), after: after.into() };
        Changes::from([(name.to_owned(), change)])
    }

    #[test]
    fn what_was_there_last_is_remembered() {
        let file = std::env::temp_dir().join(format!("palisade-settings-{}", std::process::id()));
        assert_eq!(read(&file).unwrap(), Changes::new());
        record(&file, change("a", "1", "0")).unwrap();
        record(&file, change("b", "2", "0")).unwrap();
        record(&file, Changes::new()).unwrap();
        record(&file, change("a", "3", "0")).unwrap();
        let mut expected = change("a", "3", "0");
        expected.extend(change("b", "2", "0"));
        assert_eq!(read(&file).unwrap(), expected);
        fs::write(&file, "no record").unwrap();
        assert!(read(&file).is_err() && record(&file, change("a", "1", "0")).is_err());
        fs::remove_file(&file).unwrap();
    }
}
