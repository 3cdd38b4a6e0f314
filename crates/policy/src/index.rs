//! Which selectors match which identities, kept up to date one event at a time.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use roaring::RoaringBitmap;

use crate::{
    label::{CLUSTER, Labels, POD_NAMESPACE},
    selector::{Operator, Selector},
};

/// Number of a selector that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SelectorId(u32);

/// Things filed under a label that their selector asks for, so that one identity or endpoint
/// meets only the few selectors that may match it.
#[derive(Debug)]
pub(crate) struct Anchored<T> {
    by_label: HashMap<(String, String), BTreeSet<T>>,
    rest: BTreeSet<T>,
}

impl<T> Default for Anchored<T> {
    fn default() -> Self {
        Self { by_label: HashMap::new(), rest: BTreeSet::new() }
    }
}

impl<T: Ord + Copy> Anchored<T> {
    pub(crate) fn insert(&mut self, selector: &Selector, item: T) {
        match anchor(selector) {
            Some(label) => self.by_label.entry(label).or_default().insert(item),
            None => self.rest.insert(item),
        };
    }

    pub(crate) fn remove(&mut self, selector: &Selector, item: T) {
        let Some(label) = anchor(selector) else {
            self.rest.remove(&item);
            return;
        };
        if let Some(items) = self.by_label.get_mut(&label) {
            items.remove(&item);
            if items.is_empty() {
                self.by_label.remove(&label);
            }
        }
    }

    /// What may match these labels; nothing else does.
    pub(crate) fn candidates(&self, labels: &Labels) -> Vec<T> {
        let anchored = labels
            .iter()
            .filter_map(|label| self.by_label.get(&(label.key.clone(), label.value.clone())))
            .flatten();
        self.rest.iter().chain(anchored).copied().collect()
    }
}

/// The label to file a selector under: one that it cannot do without, the rarer the better.
fn anchor(selector: &Selector) -> Option<(String, String)> {
    selector
        .requirements
        .iter()
        .filter_map(|requirement| match &requirement.operator {
            Operator::In(values) if values.len() == 1 => {
                values.first().map(|value| (requirement.key.key.clone(), value.clone()))
            }
            _ => None,
        })
        .min_by_key(|(key, _)| match key.as_str() {
            CLUSTER => 2,
            POD_NAMESPACE => 1,
            _ => 0,
        })
}

/// A selector and whom it matches.
#[derive(Debug)]
struct Entry {
    selector: Selector,
    matches: RoaringBitmap,
    uses: usize,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Index {
    numbers: HashMap<Selector, SelectorId>,
    entries: HashMap<SelectorId, Entry>,
    anchored: Anchored<SelectorId>,
    next: u32,
    identities: BTreeMap<u32, Arc<Labels>>,
    by_label: HashMap<(String, String), RoaringBitmap>,
}

impl Index {
    /// Starts, or goes on, to keep track of a selector.
    pub(crate) fn acquire(&mut self, selector: &Selector) -> SelectorId {
        if let Some(id) = self.numbers.get(selector) {
            if let Some(entry) = self.entries.get_mut(id) {
                entry.uses += 1;
            }
            return *id;
        }
        let id = SelectorId(self.next);
        self.next += 1;
        let entry = Entry { selector: selector.clone(), matches: self.evaluate(selector), uses: 1 };
        self.numbers.insert(selector.clone(), id);
        self.entries.insert(id, entry);
        self.anchored.insert(selector, id);
        id
    }

    /// Undoes one [`Index::acquire`].
    pub(crate) fn release(&mut self, id: SelectorId) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.uses -= 1;
        if entry.uses > 0 {
            return;
        }
        if let Some(entry) = self.entries.remove(&id) {
            self.numbers.remove(&entry.selector);
            self.anchored.remove(&entry.selector, id);
        }
    }

    fn evaluate(&self, selector: &Selector) -> RoaringBitmap {
        let matches =
            |id: &u32| self.identities.get(id).is_some_and(|labels| selector.matches(labels));
        match anchor(selector) {
            Some(label) => {
                self.by_label.get(&label).into_iter().flatten().filter(matches).collect()
            }
            None => self.identities.keys().copied().filter(matches).collect(),
        }
    }

    /// Adds an identity; returns the selectors that match it.
    pub(crate) fn insert(&mut self, identity: u32, labels: Arc<Labels>) -> BTreeSet<SelectorId> {
        let mut matched = BTreeSet::new();
        for id in self.anchored.candidates(&labels) {
            let Some(entry) = self.entries.get_mut(&id) else { continue };
            if entry.selector.matches(&labels) {
                entry.matches.insert(identity);
                matched.insert(id);
            }
        }
        for label in &*labels {
            let key = (label.key.clone(), label.value.clone());
            self.by_label.entry(key).or_default().insert(identity);
        }
        self.identities.insert(identity, labels);
        matched
    }

    /// Removes an identity; returns the selectors that matched it.
    pub(crate) fn remove(&mut self, identity: u32) -> BTreeSet<SelectorId> {
        let Some(labels) = self.identities.remove(&identity) else { return BTreeSet::new() };
        for label in &*labels {
            let key = (label.key.clone(), label.value.clone());
            if let Some(identities) = self.by_label.get_mut(&key) {
                identities.remove(identity);
                if identities.is_empty() {
                    self.by_label.remove(&key);
                }
            }
        }
        let candidates = self.anchored.candidates(&labels);
        candidates
            .into_iter()
            .filter(|id| {
                self.entries.get_mut(id).is_some_and(|entry| entry.matches.remove(identity))
            })
            .collect()
    }

    pub(crate) fn labels(&self, identity: u32) -> Option<&Labels> {
        self.identities.get(&identity).map(Arc::as_ref)
    }

    pub(crate) fn identities(&self) -> impl Iterator<Item = (u32, &Labels)> {
        self.identities.iter().map(|(id, labels)| (*id, labels.as_ref()))
    }

    /// Identities that a selector matches.
    pub(crate) fn matches(&self, id: SelectorId) -> impl Iterator<Item = u32> + '_ {
        self.entries.get(&id).into_iter().flat_map(|entry| &entry.matches)
    }

    /// Whether a selector matches an identity.
    pub(crate) fn contains(&self, id: SelectorId, identity: u32) -> bool {
        self.entries.get(&id).is_some_and(|entry| entry.matches.contains(identity))
    }

    /// Selectors in use: how often, and how many identities each matches.
    pub(crate) fn selectors(&self) -> impl Iterator<Item = (&Selector, usize, u64)> {
        self.entries.values().map(|entry| (&entry.selector, entry.uses, entry.matches.len()))
    }
}
