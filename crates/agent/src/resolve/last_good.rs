//! The newest accepted version of each policy, and those on disk that stand in for a refused one.
//!
//! Only what is in force in place of a refused version is kept on disk: the object in the API does
//! not say it any more. A policy that is edited into a refused one while no agent runs has no good
//! version; its subjects are closed.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use palisade_api::replace::{Lasting, replace};
use palisade_policy::model::{Policy, PolicyRef};
use serde::{Deserialize, Serialize};
use tracing::warn;

/// A version, and the object that it is of: another one may bear its name later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Version {
    uid: String,
    policy: Arc<Policy>,
    /// It is in force because a newer one is refused.
    #[serde(skip)]
    kept: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub struct LastGood {
    versions: BTreeMap<PolicyRef, Version>,
    directory: Option<PathBuf>,
    /// Versions of an earlier agent have not been compared with the objects yet.
    unswept: bool,
}

impl LastGood {
    /// Reads what an earlier agent kept in a directory. What cannot be read is left out: its
    /// subjects are closed then.
    ///
    /// # Errors
    /// The directory is there and cannot be read. It is made when something is kept: there may be
    /// no room for it now.
    pub fn open(directory: PathBuf) -> io::Result<Self> {
        let mut versions = BTreeMap::new();
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            entries => Some(entries?),
        };
        for entry in entries.into_iter().flatten() {
            let path = entry?.path();
            match read(&path) {
                Ok(version)
                    if file_name(&version.policy.id) == path.file_name().unwrap_or_default() =>
                {
                    versions.insert(version.policy.id.clone(), version);
                }
                Ok(_) => remove(&path),
                Err(error) => {
                    warn!(%error, file = %path.display(), "cannot read a policy's last good version");
                    remove(&path);
                }
            }
        }
        Ok(Self { versions, directory: Some(directory), unswept: true })
    }

    /// A version was accepted.
    pub(super) fn accept(&mut self, uid: &str, policy: &Arc<Policy>) {
        self.forget_file(&policy.id);
        let version = Version { uid: uid.to_owned(), policy: policy.clone(), kept: false };
        self.versions.insert(policy.id.clone(), version);
    }

    /// A version was refused; the one that stands, if there is any.
    pub(super) fn stand_in(&mut self, id: &PolicyRef, uid: &str) -> Option<&Policy> {
        if self.versions.get(id)?.uid != uid {
            self.forget(id);
            return None;
        }
        let path = self.directory.as_ref().map(|directory| directory.join(file_name(id)));
        let version = self.versions.get_mut(id)?;
        if let (Some(path), false) = (path, version.kept) {
            match write(&path, version) {
                Ok(()) => version.kept = true,
                // It stands for as long as this agent runs.
                Err(error) => warn!(policy = %id, %error, "cannot keep the last good version"),
            }
        }
        Some(&version.policy)
    }

    /// The object is gone.
    pub(super) fn forget(&mut self, id: &PolicyRef) {
        self.forget_file(id);
        self.versions.remove(id);
    }

    /// Takes out, once, what an earlier agent kept of objects that do not exist any more.
    pub(super) fn sweep(&mut self, exists: impl Fn(&PolicyRef) -> bool) {
        if !std::mem::take(&mut self.unswept) {
            return;
        }
        let gone: Vec<_> = self.versions.keys().filter(|id| !exists(id)).cloned().collect();
        for id in gone {
            self.forget(&id);
        }
    }

    pub(super) fn get(&self, id: &PolicyRef) -> Option<&Arc<Policy>> {
        self.versions.get(id).map(|version| &version.policy)
    }

    fn forget_file(&self, id: &PolicyRef) {
        let Some(version) = self.versions.get(id) else { return };
        if let (true, Some(directory)) = (version.kept, &self.directory) {
            remove(&directory.join(file_name(id)));
        }
    }
}

/// Names of objects have no slashes, and no dots at their ends.
fn file_name(id: &PolicyRef) -> PathBuf {
    let namespace = id.namespace.as_deref().unwrap_or_default();
    format!("{}_{namespace}_{}.json", id.kind, id.name).into()
}

fn read(path: &Path) -> io::Result<Version> {
    let mut version: Version = serde_json::from_slice(&fs::read(path)?)?;
    version.kept = true;
    Ok(version)
}

/// Whole or not at all, whatever happens to the machine.
fn write(path: &Path, version: &Version) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)?;
    replace(path, &serde_json::to_vec(version)?, Lasting::Always).map(|_| ())
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        warn!(%error, file = %path.display(), "cannot remove a policy's last good version");
    }
}

#[cfg(test)]
mod tests {
    use palisade_policy::model::{PolicyKind, Rule};

    use super::*;

    fn policy(name: &str) -> Arc<Policy> {
        let kind = PolicyKind::CiliumNetworkPolicy;
        let id = PolicyRef { kind, namespace: Some("default".into()), name: name.into() };
        Arc::new(Policy { id, rules: vec![Rule::default()] })
    }

    struct Directory(PathBuf);

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn directory(name: &str) -> Directory {
        let path = std::env::temp_dir().join(format!("palisade-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Directory(path)
    }

    fn open(directory: &Directory) -> LastGood {
        LastGood::open(directory.0.clone()).unwrap()
    }

    #[test]
    fn a_version_that_stands_in_outlives_the_agent() {
        let place = directory("last-good");
        let good = policy("a");
        let mut versions = open(&place);
        versions.accept("1", &good);
        assert!(open(&place).get(&good.id).is_none(), "nothing is refused yet");
        assert_eq!(versions.stand_in(&good.id, "1"), Some(&*good));
        assert_eq!(open(&place).stand_in(&good.id, "1"), Some(&*good));
        // Another object of the same name is not that one.
        assert_eq!(open(&place).stand_in(&good.id, "2"), None);
        assert!(open(&place).get(&good.id).is_none());
    }

    #[test]
    fn what_is_accepted_again_or_deleted_is_not_kept() {
        let place = directory("last-good-gone");
        let mut versions = open(&place);
        for name in ["accepted", "deleted", "vanished", "stays"] {
            versions.accept("1", &policy(name));
            versions.stand_in(&policy(name).id, "1");
        }
        versions.accept("1", &policy("accepted"));
        versions.forget(&policy("deleted").id);
        let mut versions = open(&place);
        versions.sweep(|id| id.name != "vanished");
        let versions = open(&place);
        let left: Vec<_> = versions.versions.keys().map(|id| id.name.as_str()).collect();
        assert_eq!(left, ["stays"]);
    }

    #[test]
    fn damaged_files_are_left_out() {
        let place = directory("last-good-damaged");
        let mut versions = open(&place);
        versions.accept("1", &policy("a"));
        versions.stand_in(&policy("a").id, "1");
        let path = place.0.join(file_name(&policy("a").id));
        fs::rename(&path, place.0.join(file_name(&policy("b").id))).unwrap();
        fs::write(&path, "{").unwrap();
        let versions = open(&place);
        assert!(versions.versions.is_empty());
        assert_eq!(fs::read_dir(&place.0).unwrap().count(), 0);
    }
}
