//! The two shapes of events, and other differences between served and stored objects.

use serde_json::Value;

use super::registry::Resource;

/// (`v1`, `events.k8s.io/v1`) names of the same fields.
const NAMES: &[(&str, &str)] = &[
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("reportingComponent", "reportingController"),
];

/// Turns an object from the shape in which it is served into the stored one.
pub(super) fn to_stored(resource: &Resource, object: &mut Value) {
    if resource.is("events.k8s.io", "events") {
        for (stored, served) in NAMES {
            rename(object, served, stored);
        }
        object["apiVersion"] = "v1".into();
    }
}

/// Turns a stored object into the shape in which it is served.
pub(super) fn to_served(resource: &Resource, object: &mut Value) {
    if resource.is("events.k8s.io", "events") {
        for (stored, served) in NAMES {
            rename(object, stored, served);
        }
    }
    object["apiVersion"] = resource.api_version().into();
    object["kind"] = resource.kind.clone().into();
}

fn rename(object: &mut Value, from: &str, to: &str) {
    if let Some(fields) = object.as_object_mut()
        && let Some(value) = fields.remove(from)
    {
        fields.insert(to.to_owned(), value);
    }
}
