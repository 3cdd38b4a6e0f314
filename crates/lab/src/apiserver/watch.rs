//! Watches: a stream of changes from a revision on.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::crud::serve_object;
use super::error::ApiError;
use super::http::Call;
use super::negotiate::Form;
use super::reply::{self, Reply};
use super::selector::Selector;
use super::store::Change;
use super::table;

const BOOKMARK_EVERY: Duration = Duration::from_secs(60);
/// How long a watch lasts if the client does not say.
const DEFAULT_TIMEOUT: u64 = 45 * 60;

struct Watcher {
    call: Call,
    selector: Selector,
    cursor: u64,
    /// The next table carries the column definitions.
    first: bool,
}

pub(super) fn serve(call: Call) -> Result<Reply, ApiError> {
    let mut selector = super::list::selector(&call)?;
    if let Some(name) = &call.target.name {
        let fields = format!("metadata.name={name}");
        selector = Selector::parse(&call.resource, call.query.get("labelSelector"), Some(&fields))?;
    }
    let asked = call.query.number("resourceVersion")?.unwrap_or(0);
    let initial = call.query.flag("sendInitialEvents");
    let bookmarks = call.query.flag("allowWatchBookmarks");
    if initial && call.query.get("resourceVersionMatch") != Some("NotOlderThan") {
        return Err(ApiError::bad_request(
            "sendInitialEvents needs resourceVersionMatch=NotOlderThan",
        ));
    }
    let timeout = call.query.number("timeoutSeconds")?.unwrap_or(DEFAULT_TIMEOUT);
    let end = Instant::now() + Duration::from_secs(timeout.min(24 * 3600));

    let changed = call.api.store.subscribe(&call.resource.storage);
    let mut watcher = Watcher { call, selector, cursor: asked, first: true };
    let mut opening = Vec::new();
    if asked == 0 || initial {
        watcher.replay(initial && bookmarks, &mut opening)?;
    } else {
        watcher.check_revision()?;
    }
    let (sender, chunks) = mpsc::channel(16);
    let stop = watcher.call.api.stop.clone();
    tokio::spawn(async move {
        if !opening.is_empty() && sender.send(opening.into()).await.is_err() {
            return;
        }
        watcher.run(changed, sender, end, bookmarks).await;
    });
    Ok(reply::stream("application/json", chunks, stop))
}

impl Watcher {
    fn check_revision(&self) -> Result<(), ApiError> {
        let current = self.call.api.store.revision();
        if self.cursor > current {
            // From another life of this cluster: the client must list again.
            return Err(ApiError::expired(self.cursor, current));
        }
        self.call.api.store.changes(&self.call.resource.storage, self.cursor).map(drop)
    }

    /// What exists, as `ADDED` events, and the mark that this is all.
    fn replay(&mut self, mark: bool, out: &mut Vec<u8>) -> Result<(), ApiError> {
        let namespace = self.call.target.namespace.as_deref();
        let snapshot = self.call.api.store.list(&self.call.resource.storage, namespace);
        if self.cursor > snapshot.revision {
            return Err(ApiError::expired(self.cursor, snapshot.revision));
        }
        for object in &snapshot.objects {
            if self.selector.matches(object) {
                self.write("ADDED", object, out);
            }
        }
        self.cursor = snapshot.revision;
        if mark {
            self.bookmark(true, out);
        }
        Ok(())
    }

    async fn run(
        mut self,
        mut changed: tokio::sync::watch::Receiver<u64>,
        sender: mpsc::Sender<Bytes>,
        end: Instant,
        bookmarks: bool,
    ) {
        let mut next_bookmark = Instant::now() + BOOKMARK_EVERY;
        loop {
            changed.borrow_and_update();
            let mut out = Vec::new();
            let more = self.drain(&mut out);
            if !out.is_empty() && sender.send(out.into()).await.is_err() || !more {
                return;
            }
            tokio::select! {
                result = changed.changed() => if result.is_err() { return },
                () = sender.closed() => return,
                () = sleep_until(end) => return,
                () = sleep_until(next_bookmark) => {
                    next_bookmark = Instant::now() + BOOKMARK_EVERY;
                    let mut out = Vec::new();
                    if bookmarks && self.drain(&mut out) {
                        self.bookmark(false, &mut out);
                    }
                    if !out.is_empty() && sender.send(out.into()).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// Writes what has changed since the cursor; false if that is no longer known.
    fn drain(&mut self, out: &mut Vec<u8>) -> bool {
        match self.call.api.store.changes(&self.call.resource.storage, self.cursor) {
            Ok(changes) => {
                for change in changes {
                    self.cursor = change.revision;
                    self.write_change(&change, out);
                }
                true
            }
            Err(error) => {
                line("ERROR", &error.status(), out);
                false
            }
        }
    }

    fn write_change(&mut self, change: &Change, out: &mut Vec<u8>) {
        if self.call.target.namespace.as_ref().is_some_and(|name| *name != change.namespace) {
            return;
        }
        let matches = |object: &Option<Arc<Value>>| {
            object.as_ref().is_some_and(|object| self.selector.matches(object))
        };
        let (before, after) = (matches(&change.old), matches(&change.new));
        match (before, after, &change.new, &change.last) {
            (false, true, Some(new), _) => self.write("ADDED", new, out),
            (true, true, Some(new), _) => self.write("MODIFIED", new, out),
            (true, false, Some(new), _) => self.write("DELETED", new, out),
            (true, _, None, Some(last)) => self.write("DELETED", last, out),
            _ => {}
        }
    }

    fn write(&mut self, kind: &str, object: &Value, out: &mut Vec<u8>) {
        let served = serve_object(&self.call.resource, object);
        let value = match self.call.accept.form {
            Form::Object => served,
            Form::Partial => table::partial(&served),
            Form::Table => {
                let metadata = json!({"resourceVersion": served["metadata"]["resourceVersion"]});
                let include = self.call.query.get("includeObject");
                let mut table = table::of(&self.call.resource, &[&served], metadata, include);
                if !std::mem::take(&mut self.first) {
                    table["columnDefinitions"] = Value::Null;
                }
                table
            }
        };
        line(kind, &value, out);
    }

    fn bookmark(&self, initial_end: bool, out: &mut Vec<u8>) {
        let (kind, version) = match self.call.accept.form {
            Form::Object => (self.call.resource.kind.clone(), self.call.resource.api_version()),
            Form::Partial => ("PartialObjectMetadata".to_owned(), "meta.k8s.io/v1".to_owned()),
            Form::Table => ("Table".to_owned(), "meta.k8s.io/v1".to_owned()),
        };
        let mut metadata = json!({"resourceVersion": self.cursor.to_string()});
        if self.call.accept.form == Form::Object {
            metadata["creationTimestamp"] = Value::Null;
        }
        if initial_end {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let mut object = json!({"kind": kind, "apiVersion": version, "metadata": metadata});
        if self.call.accept.form == Form::Table {
            object["columnDefinitions"] = Value::Null;
            // A table's own metadata has no annotations: the mark is on its one row's object.
            let partial = json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
                                 "metadata": metadata});
            object["metadata"] = json!({"resourceVersion": self.cursor.to_string()});
            object["rows"] = json!([{"cells": [], "object": partial}]);
        } else if self.call.resource.builtin_key() == "/pods" {
            object["spec"] = json!({"containers": []});
        }
        line("BOOKMARK", &object, out);
    }
}

fn line(kind: &str, object: &Value, out: &mut Vec<u8>) {
    let event = json!({"type": kind, "object": object});
    out.extend_from_slice(event.to_string().as_bytes());
    out.push(b'\n');
}
