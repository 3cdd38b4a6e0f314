//! Policy objects to the policies in force, and endpoints to their compiled tables.

use std::{borrow::Cow, sync::Arc};

use palisade_policy::{
    l7::Secrets,
    model::{Policy, PolicyKind, PolicyRef},
    resolve::{Changes, GroupDirection},
};

use super::{Outcome, Resolver};
use crate::tables::{
    POLICY_KINDS, Tables,
    policies::{Condition, Enforcement, Finding, PolicyContent, PolicyEntry, PolicyObject},
    secrets,
};

impl Resolver {
    /// Takes over changed policy objects.
    pub(super) fn note_policies(&mut self, tables: &mut Tables, outcome: &mut Outcome) {
        let known = self.note_secrets(tables, outcome);
        for kind in POLICY_KINDS {
            for delta in tables.policies.of_mut(kind).take_changes() {
                let Some(after) = delta.after else {
                    if let Some(before) = delta.before {
                        self.last_good.forget(&before.id);
                        self.repository.remove_policy(&before.id);
                    }
                    continue;
                };
                let same = |before: &Arc<PolicyObject>| {
                    before.content == after.content && before.uid == after.uid
                };
                if !delta.before.as_ref().is_some_and(same) {
                    let policy = self.policy_in_force(&after);
                    self.upsert_policy(tables, policy);
                }
                if let Some(condition) = condition_to_report(tables, &after, known.as_ref()) {
                    outcome.conditions.push((after, condition));
                }
            }
        }
    }

    /// Takes over changed Secrets: what is said of the policies that use them may be wrong now.
    /// Returns what is known for sure; without that nothing is said of such policies, lest agents
    /// contradict each other.
    fn note_secrets(&mut self, tables: &mut Tables, outcome: &mut Outcome) -> Option<Secrets> {
        let changed = !tables.secrets.take_changes().is_empty();
        let known = known_secrets(tables);
        let again = !std::mem::replace(&mut self.secrets_known, known.is_some());
        if changed || again {
            for policy in tables.policies.rows().filter(|policy| uses_secrets(policy)) {
                if let Some(condition) = condition_to_report(tables, policy, known.as_ref()) {
                    outcome.conditions.push((policy.clone(), condition));
                }
            }
        }
        known
    }

    /// A policy object and the condition that its status should have and has not.
    pub fn condition(tables: &Tables, id: &PolicyRef) -> Option<(Arc<PolicyObject>, Condition)> {
        let object = tables.policies.of(id.kind).get(id)?;
        let condition = condition_to_report(tables, object, known_secrets(tables).as_ref())?;
        Some((object.clone(), condition))
    }

    /// Objects that were deleted while no agent ran have no last good version.
    pub(super) fn sweep_last_good(&mut self, tables: &Tables) {
        self.last_good.sweep(|id| tables.policies.of(id.kind).get(id).is_some());
    }

    pub(super) fn upsert_policy(&mut self, tables: &Tables, policy: Arc<Policy>) {
        let policy = match tables.api_servers.spelled_out(&policy) {
            Cow::Borrowed(_) => policy,
            Cow::Owned(spelled_out) => Arc::new(spelled_out),
        };
        self.repository.upsert_policy(policy);
    }

    /// A refused policy closes its subjects, and what its last good version said stands.
    pub(super) fn policy_in_force(&mut self, object: &PolicyObject) -> Arc<Policy> {
        match &object.content {
            PolicyContent::Accepted(policy) => {
                self.last_good.accept(&object.uid, policy);
                policy.clone()
            }
            PolicyContent::Refused { lockdown, .. } => {
                let good = self.last_good.stand_in(&object.id, &object.uid);
                let good = good.map(|policy| &policy.rules);
                let rules = good.into_iter().flatten().chain(&lockdown.rules).cloned().collect();
                Arc::new(Policy { id: object.id.clone(), rules })
            }
        }
    }

    /// The accepted version of a refused policy that is still in force.
    pub fn last_good(&self, object: &PolicyObject) -> Option<&Arc<Policy>> {
        let good = self.last_good.get(&object.id);
        good.filter(|_| matches!(object.content, PolicyContent::Refused { .. }))
    }

    /// Takes over what became of endpoints' policies.
    pub(super) fn resolve_policies(&self, tables: &mut Tables, changes: &Changes) {
        for (id, policy) in &changes.endpoints {
            if tables.endpoints.get(&id.0).is_some() {
                tables.policy_entries.put(PolicyEntry {
                    endpoint: id.0,
                    ingress: enforcement(&policy.ingress),
                    egress: enforcement(&policy.egress),
                });
            }
        }
        let gone: Vec<u32> = tables
            .policy_entries
            .rows()
            .map(|row| row.endpoint)
            .filter(|id| tables.endpoints.get(id).is_none())
            .collect();
        for id in gone {
            tables.policy_entries.delete(&id);
        }
    }
}

fn enforcement(direction: &GroupDirection) -> Enforcement {
    match direction {
        GroupDirection::AllowAll => Enforcement::AllowAll,
        GroupDirection::Enforced(group, policy) => Enforcement::Enforced(*group, policy.clone()),
    }
}

fn known_secrets(tables: &Tables) -> Option<Secrets> {
    let known = tables.secrets.is_complete() && tables.secrets.error().is_none();
    known.then(|| secrets::values(&tables.secrets))
}

fn uses_secrets(object: &PolicyObject) -> bool {
    matches!(&object.content, PolicyContent::Accepted(policy) if secrets::are_used_by(policy))
}

/// The condition that the object's status should have and has not. The status of a
/// `NetworkPolicy` has no conditions: only what is wrong with it is worth an event.
fn condition_to_report(
    tables: &Tables,
    object: &PolicyObject,
    known: Option<&Secrets>,
) -> Option<Condition> {
    let (finding, message) = match &object.content {
        PolicyContent::Refused { message, .. } => (Finding::Refused, message.clone()),
        PolicyContent::Accepted(policy) => {
            let missing = match secrets::are_used_by(policy) {
                true => secrets::missing(policy, known?, &tables.secrets_namespace),
                false => None,
            };
            missing.map_or_else(
                || (Finding::Accepted, "Policy validation succeeded".to_owned()),
                |missing| (Finding::SecretMissing, missing),
            )
        }
    };
    if object.id.kind == PolicyKind::NetworkPolicy && finding.is_valid() {
        return None;
    }
    let condition = Condition { finding, message, generation: Some(object.generation) };
    (object.reported.as_ref() != Some(&condition)).then_some(condition)
}
