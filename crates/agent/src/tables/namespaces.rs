//! Namespaces and their labels.

use std::collections::BTreeMap;

use super::{Row, join_map};

/// A namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Name.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

impl Row for Namespace {
    type Key = String;
    const TABLE: &'static str = "namespaces";
    const COLUMNS: &'static [&'static str] = &["NAME", "LABELS"];

    fn key(&self) -> String {
        self.name.clone()
    }

    fn columns(&self) -> Vec<String> {
        vec![self.name.clone(), join_map(&self.labels)]
    }
}
