//! Settings of a node that the agent changed, and what they were before. Whoever takes Palisade off
//! the node puts them back.

use std::{collections::BTreeMap, fs, io, path::Path};

use serde::{Deserialize, Serialize};

use crate::{
    boot,
    replace::{Lasting, replace},
};

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

/// The file: settings are set anew with each start of the machine, so that what they were counts until
/// the next one only.
#[derive(Serialize, Deserialize)]
struct Record {
    boot: String,
    changes: Changes,
}

/// What is recorded of this start of the machine.
///
/// # Errors
/// The record cannot be read, or is none.
pub fn read(file: &Path) -> io::Result<Changes> {
    let record: Record = match fs::read(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Changes::new()),
        read => serde_json::from_slice(&read?)?,
    };
    Ok(if record.boot == boot::id()? { record.changes } else { Changes::new() })
}

/// Adds to the record. A setting that is changed once more was given another value by somebody
/// since: that value counts. A record that cannot be read is replaced.
///
/// # Errors
/// The record cannot be written.
pub fn record(file: &Path, new: Changes) -> io::Result<()> {
    if new.is_empty() {
        return Ok(());
    }
    let mut changes = read(file).unwrap_or_default();
    changes.extend(new);
    let record = serde_json::to_vec(&Record { boot: boot::id()?, changes })?;
    replace(file, &record, Lasting::Always).map(|_| ())
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
        assert!(read(&file).is_err());
        record(&file, change("a", "1", "0")).unwrap();
        assert_eq!(read(&file).unwrap(), change("a", "1", "0"));
        let text = fs::read_to_string(&file).unwrap();
        fs::write(&file, text.replace(&boot::id().unwrap(), "another")).unwrap();
        assert_eq!(read(&file).unwrap(), Changes::new());
        record(&file, change("b", "1", "0")).unwrap();
        assert_eq!(read(&file).unwrap(), change("b", "1", "0"));
        fs::remove_file(&file).unwrap();
    }
}
