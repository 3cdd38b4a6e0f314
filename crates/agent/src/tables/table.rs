//! The one kind of table that the agent has.

use std::{collections::BTreeMap, fmt::Display, sync::Arc};

/// An immutable row.
pub trait Row: Send + Sync + Sized + PartialEq + 'static {
    /// What the row is found by.
    type Key: Ord + Clone + Display + Send + Sync;
    /// Name of the table.
    const TABLE: &'static str;
    /// Titles of [`Self::columns`].
    const COLUMNS: &'static [&'static str];

    /// The row's key.
    fn key(&self) -> Self::Key;
    /// The row for people, as many cells as [`Self::COLUMNS`].
    fn columns(&self) -> Vec<String>;
}

/// What happened to a table's source.
#[derive(Debug)]
pub enum Change<R: Row> {
    /// This row is new, or replaces the one of its key.
    Put(R),
    /// The row is gone.
    Delete(R::Key),
    /// These are all the rows there are: the table is complete.
    Replace(Vec<R>),
    /// The source cannot be read; what was known stands.
    Failed(String),
    /// The source can be read again, and nothing changed meanwhile.
    Recovered,
}

/// A row before and after the changes since they were last taken. Never both none.
#[derive(Debug)]
pub struct Delta<R> {
    /// The row that the last taker saw.
    pub before: Option<Arc<R>>,
    /// The row as it is now.
    pub after: Option<Arc<R>>,
}

/// Rows in the order of their keys, with what changed since the one consumer looked.
#[derive(Debug)]
pub struct Table<R: Row> {
    rows: BTreeMap<R::Key, Arc<R>>,
    /// Changed keys with the row that the consumer knows.
    changed: BTreeMap<R::Key, Option<Arc<R>>>,
    revision: u64,
    complete: bool,
    error: Option<String>,
}

impl<R: Row> Default for Table<R> {
    fn default() -> Self {
        Self {
            rows: BTreeMap::new(),
            changed: BTreeMap::new(),
            revision: 0,
            complete: false,
            error: None,
        }
    }
}

impl<R: Row> Table<R> {
    /// Takes over a change.
    pub fn apply(&mut self, change: Change<R>) {
        match change {
            Change::Put(row) => self.put(row),
            Change::Delete(key) => self.delete(&key),
            Change::Replace(rows) => self.replace(rows),
            Change::Failed(error) => {
                self.error = Some(error);
                return;
            }
            Change::Recovered => {}
        }
        self.error = None;
    }

    /// Adds or replaces a row; an equal row changes nothing.
    pub fn put(&mut self, row: R) {
        let key = row.key();
        if self.rows.get(&key).is_some_and(|old| **old == row) {
            return;
        }
        let before = self.rows.insert(key.clone(), Arc::new(row));
        self.note(key, before);
    }

    /// Removes a row, if it is there.
    pub fn delete(&mut self, key: &R::Key) {
        if let Some(before) = self.rows.remove(key) {
            self.note(key.clone(), Some(before));
        }
    }

    /// Makes `rows` all that there is.
    pub fn replace(&mut self, rows: Vec<R>) {
        let mut gone: std::collections::BTreeSet<R::Key> = self.rows.keys().cloned().collect();
        for row in rows {
            gone.remove(&row.key());
            self.put(row);
        }
        for key in gone {
            self.delete(&key);
        }
        self.complete = true;
    }

    /// Says that all that belongs in the table is in it.
    pub fn set_complete(&mut self) {
        self.complete = true;
    }

    /// What changed since the last call, each key once; a row that went and came back is not told.
    pub fn take_changes(&mut self) -> Vec<Delta<R>> {
        std::mem::take(&mut self.changed)
            .into_iter()
            .map(|(key, before)| Delta { before, after: self.rows.get(&key).cloned() })
            .filter(|delta| match (&delta.before, &delta.after) {
                (None, None) => false,
                (Some(before), Some(after)) => before != after,
                _ => true,
            })
            .collect()
    }

    /// The row with this key.
    pub fn get(&self, key: &R::Key) -> Option<&Arc<R>> {
        self.rows.get(key)
    }

    /// All rows.
    pub fn rows(&self) -> impl Iterator<Item = &Arc<R>> {
        self.rows.values()
    }

    /// The rows from `start` on, in the order of their keys.
    pub fn rows_from(&self, start: R::Key) -> impl Iterator<Item = &Arc<R>> {
        self.rows.range(start..).map(|(_, row)| row)
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Goes up with each change.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Whether all that belongs in the table is in it.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Why the newest attempt to read the source failed.
    pub fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    fn note(&mut self, key: R::Key, before: Option<Arc<R>>) {
        self.revision += 1;
        self.changed.entry(key).or_insert(before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Debug, PartialEq)]
    struct Pair(u8, u8);

    impl Row for Pair {
        type Key = u8;
        const TABLE: &'static str = "pairs";
        const COLUMNS: &'static [&'static str] = &["KEY", "VALUE"];
        fn key(&self) -> u8 {
            self.0
        }
        fn columns(&self) -> Vec<String> {
            vec![self.0.to_string(), self.1.to_string()]
        }
    }

    fn told(table: &mut Table<Pair>) -> Vec<(Option<u8>, Option<u8>)> {
        let value = |row: Option<Arc<Pair>>| row.map(|row| row.1);
        table.take_changes().into_iter().map(|d| (value(d.before), value(d.after))).collect()
    }

    #[test]
    fn several_changes_of_a_row_are_told_as_one() {
        let mut table = Table::default();
        table.put(Pair(1, 1));
        assert_eq!(told(&mut table), [(None, Some(1))]);
        table.put(Pair(1, 2));
        table.put(Pair(1, 3));
        table.put(Pair(2, 9));
        table.delete(&2);
        assert_eq!(told(&mut table), [(Some(1), Some(3))]);
        table.put(Pair(1, 4));
        table.put(Pair(1, 3));
        assert_eq!(told(&mut table), []);
    }

    #[test]
    fn a_new_list_removes_what_it_lacks_and_completes_the_table() {
        let mut table = Table::default();
        table.put(Pair(1, 1));
        table.put(Pair(2, 2));
        told(&mut table);
        assert!(!table.is_complete());
        table.apply(Change::Replace(vec![Pair(2, 2), Pair(3, 3)]));
        assert!(table.is_complete());
        assert_eq!(told(&mut table), [(Some(1), None), (None, Some(3))]);
    }

    #[test]
    fn a_failed_source_changes_no_row() {
        let mut table = Table::default();
        table.apply(Change::Replace(vec![Pair(1, 1)]));
        table.apply(Change::Failed("gone".into()));
        assert_eq!((table.len(), table.is_complete(), table.error()), (1, true, Some("gone")));
        table.apply(Change::Put(Pair(1, 2)));
        assert_eq!(table.error(), None);
        table.apply(Change::Failed("gone again".into()));
        table.apply(Change::Recovered);
        assert_eq!((table.len(), table.error()), (1, None));
    }
}
