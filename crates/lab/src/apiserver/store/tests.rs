use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::UnshareFlags;
use serde_json::json;

use super::*;

fn put(store: &Store, name: &str) -> u64 {
    let key = Key::new("/pods", "default", name);
    store
        .transact(|transaction| {
            transaction.put(key, json!({"metadata": {"name": name}}));
            Ok(())
        })
        .unwrap();
    store.revision()
}

#[test]
fn changes_after_a_revision_come_in_order() {
    let store = Store::in_memory();
    let first = put(&store, "a");
    put(&store, "b");
    put(&store, "a");
    let changes = store.changes("/pods", first).unwrap();
    assert_eq!(changes.len(), 2);
    assert!(changes[0].old.is_none());
    assert!(changes[1].old.is_some());
}

#[test]
fn old_revisions_expire() {
    let store = Store::in_memory();
    let first = put(&store, "a");
    for _ in 0..HISTORY {
        put(&store, "a");
    }
    assert!(store.changes("/pods", first).is_ok());
    put(&store, "a");
    assert_eq!(store.changes("/pods", first).unwrap_err().reason, "Expired");
}

#[test]
fn large_objects_shorten_the_history() {
    let store = Store::in_memory();
    let first = store.revision();
    let changes = HISTORY_BYTES / (512 << 10);
    for _ in 0..changes {
        put_large(&store, "large").unwrap();
    }
    assert!(store.changes("/configmaps", first).is_ok());
    for _ in 0..changes {
        put_large(&store, "large").unwrap();
    }
    assert_eq!(store.changes("/configmaps", first).unwrap_err().reason, "Expired");
    assert!(!store.changes("/configmaps", store.revision() - 1).unwrap().is_empty());
}

#[test]
fn a_failed_transaction_leaves_nothing() {
    let store = Store::in_memory();
    let before = store.revision();
    let answer: Result<(), _> = store.transact(|transaction| {
        transaction.put(Key::new("/pods", "default", "a"), json!({"metadata": {}}));
        Err(ApiError::bad_request("no"))
    });
    assert!(answer.is_err());
    assert_eq!(store.revision(), before);
    assert!(store.list("/pods", None).objects.is_empty());
}

#[test]
fn a_database_brings_objects_and_revision_back() {
    let path = std::env::temp_dir().join(format!("palisade-store-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let revision = put(&Store::open(&path).unwrap(), "a");
    let store = Store::open(&path).unwrap();
    assert_eq!(store.revision(), revision);
    assert_eq!(store.list("/pods", Some("default")).objects.len(), 1);
    assert_eq!(store.changes("/pods", revision - 1).unwrap_err().code, 410);
    std::fs::remove_file(&path).unwrap();
}

/// Gives a thread a file system of its own with little room.
fn small_disk(work: impl FnOnce(&Path) + Send + 'static) {
    let directory = std::env::temp_dir().join(format!("palisade-full-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.clone();
    let done = std::thread::spawn(move || {
        crate::sys::netns::unshare(UnshareFlags::NEWNS).unwrap();
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        rustix::mount::mount("tmpfs", &path, "tmpfs", MountFlags::empty(), Some(c"size=2m"))
            .unwrap();
        work(&path);
    });
    done.join().unwrap();
    std::fs::remove_dir(&directory).unwrap();
}

/// Puts an object that needs half a megabyte.
fn put_large(store: &Store, name: &str) -> Result<(), ApiError> {
    let key = Key::new("/configmaps", "default", name);
    let value = json!({"metadata": {"name": name}, "data": {"k": "x".repeat(512 << 10)}});
    store.transact(|transaction| {
        transaction.put(key, value);
        Ok(())
    })
}

#[test]
fn a_full_disk_refuses_changes_until_there_is_room() {
    small_disk(|directory| {
        let (path, ballast) = (directory.join("cluster"), directory.join("ballast"));
        let store = Store::open(&path).unwrap();
        put(&store, "kept");
        let filled = std::fs::write(&ballast, vec![0; 4 << 20]);
        assert!(filled.is_err(), "the disk has room for more than it should");
        let revision = store.revision();
        for _ in 0..2 {
            let refused = put_large(&store, "large").unwrap_err();
            assert_eq!(refused.code, 500);
            assert!(refused.message.contains("No space left"), "{}", refused.message);
            assert!(refused.message.contains("cluster"), "{}", refused.message);
        }
        assert_eq!(store.revision(), revision);
        assert!(store.list("/configmaps", None).objects.is_empty());
        assert_eq!(store.list("/pods", None).objects.len(), 1);

        std::fs::remove_file(&ballast).unwrap();
        put_large(&store, "large").unwrap();
        drop(store);
        let store = Store::open(&path).unwrap();
        assert_eq!(store.list("/configmaps", None).objects.len(), 1);
        assert_eq!(store.list("/pods", None).objects.len(), 1);
    });
}

#[test]
fn a_write_that_nobody_was_told_of_is_taken_back() {
    let path = std::env::temp_dir().join(format!("palisade-astray-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let store = Store::open(&path).unwrap();
    put(&store, "told");
    let ghost = Write {
        key: Key::new("/pods", "default", "ghost"),
        revision: store.revision() + 1,
        new: Some(Arc::new(json!({"metadata": {"name": "ghost"}}))),
        last: None,
    };
    let revisions = (store.revision(), store.revision() + 1);
    store.disk().unwrap().write(&[ghost], revisions, std::iter::empty()).unwrap();
    put(&store, "next");
    drop(store);
    let store = Store::open(&path).unwrap();
    let names: Vec<_> = store
        .list("/pods", None)
        .objects
        .iter()
        .map(|pod| pod["metadata"]["name"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(names, ["next", "told"]);
    std::fs::remove_file(&path).unwrap();
}
