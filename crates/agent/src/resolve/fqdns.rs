//! What endpoints learned from DNS, for the policies that speak of names.

use palisade_policy::resolve::EndpointId;

use super::{Dirty, Resolver, both};
use crate::tables::Tables;

impl Resolver {
    /// Takes over learned names. What another container learned under the same number does not
    /// count.
    pub(super) fn note_names(&mut self, tables: &mut Tables, dirty: &Dirty) {
        let mut endpoints = dirty.endpoints.clone();
        for delta in tables.names.take_changes() {
            endpoints.extend(both(&delta).map(|row| row.endpoint));
        }
        for id in endpoints {
            let container = tables.endpoints.get(&id).map(|endpoint| &endpoint.container_id);
            let learned = tables.names.get(&id).filter(|row| Some(&row.container) == container);
            let mut names = learned.map(|row| row.names.clone()).unwrap_or_default();
            // It may have moved to where a name led before.
            for addresses in names.values_mut() {
                addresses.retain(|address| !tables.api_servers.outside.contains(address));
            }
            self.repository.set_learned(EndpointId(id), names);
        }
    }
}
