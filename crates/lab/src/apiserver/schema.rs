//! A view on JSON schemas as Kubernetes writes them: references, list types, merge keys.
//!
//! Everything that treats objects generically (validation, pruning, defaults, patches, field
//! ownership) walks values along a [`Schema`].

use std::collections::BTreeMap;

use serde_json::Value;

/// Named schemas that `$ref`s point to.
pub(super) type Definitions = BTreeMap<String, Value>;

/// How the items of a list are told apart when two writers' lists are merged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListKind {
    /// The list is one value.
    Atomic,
    /// Scalars, each at most once.
    Set,
    /// Objects told apart by these fields.
    Map(Vec<String>),
}

/// A schema at some place of an object.
#[derive(Clone, Copy, Debug)]
pub struct Schema<'a> {
    /// The node at the place of use; it may say more than what it refers to.
    place: &'a Value,
    /// The node that it refers to, or itself.
    node: &'a Value,
    definitions: &'a Definitions,
}

impl<'a> Schema<'a> {
    /// The schema `node`, whose references are looked up in `definitions`.
    pub fn new(node: &'a Value, definitions: &'a Definitions) -> Self {
        let mut target = node;
        // Definitions never refer to themselves directly; the bound only guards a bad table.
        for _ in 0..8 {
            let Some(name) = reference(target) else { break };
            let Some(found) = definitions.get(name) else { break };
            target = found;
        }
        Self { place: node, node: target, definitions }
    }

    fn at(self, node: &'a Value) -> Self {
        Self::new(node, self.definitions)
    }

    /// A schema within this one.
    pub fn branch(self, node: &'a Value) -> Self {
        self.at(node)
    }

    /// A keyword, as given at the place of use or in what it refers to.
    pub fn keyword(self, name: &str) -> Option<&'a Value> {
        self.place.get(name).or_else(|| self.node.get(name))
    }

    fn flag(self, name: &str) -> bool {
        self.keyword(name).and_then(Value::as_bool).unwrap_or(false)
    }

    fn text(self, name: &str) -> Option<&'a str> {
        self.keyword(name).and_then(Value::as_str)
    }

    /// The resolved node.
    pub fn node(self) -> &'a Value {
        self.node
    }

    /// The name of the definition that the place of use refers to.
    pub fn name(self) -> Option<&'a str> {
        reference(self.place)
    }

    /// The declared format, if any.
    pub fn format(self) -> Option<&'a str> {
        self.text("format")
    }

    /// The declared type, if any.
    pub fn kind(self) -> Option<&'a str> {
        self.text("type")
    }

    /// A declared property.
    pub fn property(self, name: &str) -> Option<Self> {
        Some(self.at(self.node.get("properties")?.get(name)?))
    }

    /// All declared properties.
    pub fn properties(self) -> impl Iterator<Item = (&'a str, Self)> {
        let properties = self.node.get("properties").and_then(Value::as_object);
        properties.into_iter().flatten().map(move |(name, node)| (name.as_str(), self.at(node)))
    }

    /// The schema of the values of a map.
    pub fn additional(self) -> Option<Self> {
        let node = self.node.get("additionalProperties")?;
        node.is_object().then(|| self.at(node))
    }

    /// The schema of a field, declared or of a map.
    pub fn field(self, name: &str) -> Option<Self> {
        self.property(name).or_else(|| self.additional())
    }

    /// The schema of a list's items.
    pub fn items(self) -> Option<Self> {
        Some(self.at(self.node.get("items")?))
    }

    /// Unknown fields are kept here.
    pub fn keeps_unknown(self) -> bool {
        self.flag("x-kubernetes-preserve-unknown-fields")
            || self.node.get("additionalProperties").is_some_and(|node| *node != Value::Bool(false))
            || self.is_untyped()
    }

    /// The schema says nothing about fields: raw JSON.
    pub fn is_untyped(self) -> bool {
        self.node.get("properties").is_none()
            && self.node.get("additionalProperties").is_none()
            && matches!(self.kind(), None | Some("object"))
            && !self.is_int_or_string()
    }

    /// A whole object with its own `apiVersion`, `kind` and `metadata`.
    pub fn is_embedded(self) -> bool {
        self.flag("x-kubernetes-embedded-resource")
    }

    /// Both integers and strings are right here.
    pub fn is_int_or_string(self) -> bool {
        self.flag("x-kubernetes-int-or-string") || self.text("format") == Some("int-or-string")
    }

    /// The object is one value when merged.
    pub fn is_atomic(self) -> bool {
        self.text("x-kubernetes-map-type") == Some("atomic") || self.is_untyped()
    }

    /// How list items are told apart.
    pub fn list_kind(self) -> ListKind {
        match self.text("x-kubernetes-list-type") {
            Some("set") => ListKind::Set,
            Some("map") => {
                let keys = self.keyword("x-kubernetes-list-map-keys").and_then(Value::as_array);
                let keys = keys.into_iter().flatten().filter_map(Value::as_str);
                ListKind::Map(keys.map(str::to_owned).collect())
            }
            _ => ListKind::Atomic,
        }
    }

    /// Key by which a strategic merge tells list items apart.
    pub fn patch_merge_key(self) -> Option<&'a str> {
        self.text("x-kubernetes-patch-merge-key")
    }

    /// Does a strategic merge of this list (or map) have the given strategy?
    pub fn has_patch_strategy(self, strategy: &str) -> bool {
        let list = self.text("x-kubernetes-patch-strategy").unwrap_or("");
        list.split(',').any(|entry| entry == strategy)
    }

    /// The value that the field has when absent.
    pub fn default(self) -> Option<&'a Value> {
        self.keyword("default")
    }
}

/// The name in `{"$ref": "#/components/schemas/NAME"}` or in an `allOf` around just that.
fn reference(node: &Value) -> Option<&str> {
    let target = match node.get("allOf").and_then(Value::as_array).map(Vec::as_slice) {
        Some([only]) => only,
        _ => node,
    };
    target.get("$ref")?.as_str()?.rsplit('/').next()
}
