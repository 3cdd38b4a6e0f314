//! Records of attachments: one JSON file each, replaced atomically.
//!
//! They tell an agent that starts again what runs beside it, and the kernel keeps what is written
//! for that, however the agent before ended. Nothing is synced to the disk: what a record speaks of
//! ends with the machine, and what is left of records then is removed, whether it is whole or not.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use palisade_api::cni::{Attachment, ContainerId, IfName, Pod};
use palisade_api::replace::{ASIDE, Lasting, replace};
use serde::{Deserialize, Serialize};

use super::{Addresses, HostLink};

/// How far an attachment has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Phase {
    /// Under way: after a crash it is undone.
    Intended,
    /// Finished; the number is what [`Endpoints::add`](super::Endpoints::add) gave.
    Committed(u32),
}

/// All that is needed to check, restore or undo an attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Container and interface.
    pub attachment: Attachment,
    /// The network it was made for.
    pub network: String,
    /// The pod.
    pub pod: Pod,
    /// The pod's network namespace.
    pub netns: PathBuf,
    /// The interface on the node's side; its number is zero until it exists.
    pub host: HostLink,
    /// MAC address of the pod's side.
    pub mac: [u8; 6],
    /// The pod's addresses.
    pub addresses: Addresses,
    /// How far it has come.
    pub phase: Phase,
}

/// The directory of records, and beside it a mark ahead of all addresses that were given: what pods
/// had that are gone is known elsewhere as theirs for some time, also when the agent or the machine
/// starts again.
#[derive(Debug, Clone)]
pub(super) struct Store {
    directory: PathBuf,
}

impl Store {
    /// The directory is made with the first record: for a full disk pods need not be looked after
    /// any less.
    pub(super) fn open(directory: PathBuf) -> io::Result<Self> {
        for path in files_in(&directory)? {
            // An agent ended while it wrote this.
            if path.extension().is_some_and(|extension| extension == ASIDE) {
                fs::remove_file(path)?;
            }
        }
        Ok(Self { directory })
    }

    /// All records; files that are none are given by their attachment alone.
    pub(super) fn load(&self) -> io::Result<(Vec<Record>, Vec<Attachment>)> {
        let mut records = Vec::new();
        let mut unreadable = Vec::new();
        for attachment in attachments_in(&self.directory)? {
            let text = fs::read(self.path(&attachment))?;
            match serde_json::from_slice::<Record>(&text) {
                Ok(record) if record.attachment == attachment => records.push(record),
                _ => unreadable.push(attachment),
            }
        }
        Ok((records, unreadable))
    }

    /// Where the search for addresses goes on; `None` before any was given.
    pub(super) fn mark(&self) -> io::Result<Option<Addresses>> {
        match fs::read(self.mark_path()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            text => Ok(Some(serde_json::from_slice(&text?)?)),
        }
    }

    /// One at a time.
    pub(super) fn write_mark(&self, mark: &Addresses) -> io::Result<()> {
        fs::create_dir_all(&self.directory)?;
        replace(&self.mark_path(), &serde_json::to_vec(mark)?, Lasting::Always).map(|_| ())
    }

    pub(super) fn write(&self, record: &Record) -> io::Result<()> {
        fs::create_dir_all(&self.directory)?;
        let path = self.path(&record.attachment);
        replace(&path, &serde_json::to_vec(record)?, Lasting::UntilBoot).map(|_| ())
    }

    pub(super) fn remove(&self, attachment: &Attachment) -> io::Result<()> {
        match fs::remove_file(self.path(attachment)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn mark_path(&self) -> PathBuf {
        self.directory.with_file_name("next-addresses.json")
    }

    fn path(&self, attachment: &Attachment) -> PathBuf {
        self.directory.join(attachment.file_name())
    }
}

/// The attachments that the files of a directory are named after; other files are skipped.
pub(super) fn attachments_in(directory: &Path) -> io::Result<Vec<Attachment>> {
    let files = files_in(directory)?;
    let names = files.iter().filter_map(|path| path.file_name()?.to_str());
    Ok(names.filter_map(attachment_of).collect())
}

/// None where there is no directory.
fn files_in(directory: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries?.map(|entry| Ok(entry?.path())).collect(),
    }
}

fn attachment_of(file_name: &str) -> Option<Attachment> {
    let (container, ifname) = file_name.strip_suffix(".json")?.split_once('@')?;
    Some(Attachment {
        container_id: ContainerId::try_from(container.to_owned()).ok()?,
        ifname: IfName::try_from(ifname.to_owned()).ok()?,
    })
}
