//! The incremental engine: events in, changed tables out.
//!
//! # What the writer of the kernel's tables must know
//! * Feed a pod ([`Repository::set_pod`]) and its identity before any packet can carry it: never
//!   put an identity into `ENDPOINTS` that this repository does not know; write 0 (unknown).
//! * Write the tables of a [`Changes`] first, then new prefixes to `IPCACHE` and `ENDPOINTS`.
//!   A prefix that is no longer used stays in the tables until
//!   [`Repository::acknowledge_prefixes`] says that no address refers to it any more.
//! * After a restart, [`Repository::adopt_prefixes`] goes first, so that a number means the same
//!   network as in the tables that the kernel still uses.

mod section;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    iter::successors,
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use palisade_abi::{CHUNK_RULES, MAX_CHUNKS, PREFIX_POD_BIT, identity as number};

use self::section::{Section, SectionId};
use crate::{
    compile::{self, Bit, CompiledPolicy, PeerTables},
    identity::{self, RESERVED},
    index::{Anchored, Index, SelectorId},
    label::Labels,
    learned::{Learned, Names},
    model::{Direction, NamedPort, Policy, PolicyRef},
    pods::{self, Numbers, Pods, PortName},
    prefix::Prefixes,
    selector::Selector,
};

/// Number of a local endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointId(pub u32);

/// Number of a group: the endpoints that the same rules select, in one direction. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub u32);

/// What is known of a local endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointInfo {
    /// Security identity. With `INIT` the endpoint is closed both ways, whatever policies say.
    pub identity: u32,
    /// Labels that subjects are matched with, see [`crate::identity::endpoint_labels`].
    pub labels: Labels,
    /// Ports that it declares.
    pub named_ports: Vec<NamedPort>,
}

/// What is known of a pod anywhere in the cluster, for rules with named ports. Pods in a node's
/// own network namespace are left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPorts {
    /// One of its addresses.
    pub ip: IpAddr,
    /// Security identity.
    pub identity: u32,
    /// Ports that it declares; none is worth saying too.
    pub ports: Vec<NamedPort>,
}

/// Policy of an endpoint in one direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupDirection {
    /// No policy selects it: everything passes.
    AllowAll,
    /// The tables of its group.
    Enforced(GroupId, Arc<CompiledPolicy>),
}

/// Policy of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointPolicy {
    /// For traffic to it.
    pub ingress: GroupDirection,
    /// For traffic from it.
    pub egress: GroupDirection,
}

/// One entry of [`crate::Chunk::peers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerDelta {
    /// Chunk.
    pub chunk: u32,
    /// Identity or prefix number.
    pub id: u32,
    /// Its bitmap now; `None`: no entry any more.
    pub rules: Option<u128>,
}

/// What became of a group's tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupUpdate {
    /// A new group, or all of an old one's tables are new: write aside, then flip.
    Replaced(Arc<CompiledPolicy>),
    /// Only these peers differ, and no packet can carry them yet, or any more: write in place.
    Peers(Arc<CompiledPolicy>, Vec<PeerDelta>),
    /// No endpoint is in the group any more.
    Removed,
}

/// A change of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupChange {
    /// The group.
    pub group: GroupId,
    /// Its direction.
    pub direction: Direction,
    /// What became of it.
    pub update: GroupUpdate,
}

/// A group that has more rules than fit: closed altogether.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{direction} of {} endpoints is closed: {rules} rules select them, at most {limit} fit; \
     merge rules or split the workload (policies: {})",
    endpoints.len(),
    policies.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
)]
pub struct TooManyRules {
    /// The group.
    pub group: GroupId,
    /// Its direction.
    pub direction: Direction,
    /// Its endpoints.
    pub endpoints: Vec<EndpointId>,
    /// How many rules it has.
    pub rules: usize,
    /// How many it may have.
    pub limit: usize,
    /// The policies that select it.
    pub policies: Vec<PolicyRef>,
}

/// What changed since the last commit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Groups, the removed ones last.
    pub groups: Vec<GroupChange>,
    /// Endpoints that are new, in another group, or whose group's tables were replaced.
    pub endpoints: Vec<(EndpointId, EndpointPolicy)>,
    /// Whether [`Repository::prefixes`] gives another answer now.
    pub prefixes_changed: bool,
    /// Prefixes that are new.
    pub prefixes_added: Vec<(IpNet, u32)>,
    /// Prefixes that are no longer used.
    pub prefixes_removed: Vec<(IpNet, u32)>,
    /// Groups that could not be compiled and are closed; all of them, the old ones too.
    pub errors: Vec<TooManyRules>,
}

#[derive(Debug)]
struct Endpoint {
    info: EndpointInfo,
    sections: BTreeSet<SectionId>,
    groups: [Option<GroupId>; 2],
    learned: Names,
}

/// What makes a group: endpoints with equal keys share their tables.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct GroupKey {
    direction: Direction,
    /// Closed whatever the sections say, because the labels are not known.
    init: bool,
    /// In the order of their policies.
    sections: Vec<SectionId>,
    /// What the names that the sections use for the subject's own ports stand for.
    names: Vec<(PortName, Numbers)>,
}

#[derive(Debug)]
struct Group {
    key: GroupKey,
    endpoints: BTreeSet<EndpointId>,
    bits: Vec<Bit>,
    learned: Learned,
    compiled: Arc<CompiledPolicy>,
    /// All has to be compiled anew.
    stale: bool,
    /// Only these peers have to.
    stale_peers: BTreeSet<u32>,
    error: Option<TooManyRules>,
}

/// The engine. Methods note events; [`Repository::commit`] says what follows from them.
#[derive(Debug)]
pub struct Repository {
    policy_sections: BTreeMap<PolicyRef, BTreeMap<(usize, Direction), SectionId>>,
    sections: BTreeMap<SectionId, Section>,
    subjects: Anchored<SectionId>,
    endpoints: BTreeMap<EndpointId, Endpoint>,
    groups: BTreeMap<GroupId, Group>,
    group_ids: HashMap<GroupKey, GroupId>,
    index: Index,
    prefixes: Prefixes,
    pods: Pods,
    /// Sections in use by the selectors they use.
    selector_users: HashMap<SelectorId, BTreeSet<SectionId>>,
    /// Sections in use that name CIDRs.
    cidr_users: BTreeSet<SectionId>,
    /// Sections in use whose peers' named ports count.
    name_users: HashMap<PortName, BTreeSet<SectionId>>,
    stale_endpoints: BTreeSet<EndpointId>,
    stale_names: BTreeSet<SectionId>,
    emptied_groups: BTreeSet<GroupId>,
    next_section: u32,
    next_group: u32,
}

impl Default for Repository {
    fn default() -> Self {
        Self::new()
    }
}

impl Repository {
    /// Knows the reserved identities and nothing else.
    #[must_use]
    pub fn new() -> Self {
        let mut index = Index::default();
        for identity in RESERVED {
            let labels = identity::reserved(identity).unwrap_or_default();
            index.insert(identity, Arc::new(labels));
        }
        Self {
            policy_sections: BTreeMap::new(),
            sections: BTreeMap::new(),
            subjects: Anchored::default(),
            endpoints: BTreeMap::new(),
            groups: BTreeMap::new(),
            group_ids: HashMap::new(),
            index,
            prefixes: Prefixes::default(),
            pods: Pods::default(),
            selector_users: HashMap::new(),
            cidr_users: BTreeSet::new(),
            name_users: HashMap::new(),
            stale_endpoints: BTreeSet::new(),
            stale_names: BTreeSet::new(),
            emptied_groups: BTreeSet::new(),
            next_section: 0,
            next_group: 0,
        }
    }

    /// Numbers of prefixes that the kernel's tables use, from before a restart.
    pub fn adopt_prefixes(&mut self, prefixes: impl IntoIterator<Item = (IpNet, u32)>) {
        for (net, number) in prefixes {
            self.prefixes.adopt(net, number);
        }
    }

    /// A policy is new or was changed.
    pub fn upsert_policy(&mut self, policy: impl Into<Arc<Policy>>) {
        let policy = policy.into();
        let mut old = self.policy_sections.remove(&policy.id).unwrap_or_default();
        let mut new = BTreeMap::new();
        for n in 0..policy.rules.len() {
            for direction in Direction::BOTH {
                let section = Section::new(policy.clone(), n, direction);
                if section.said().is_empty() {
                    continue;
                }
                let kept = old.get(&(n, direction)).copied().filter(|id| {
                    self.sections.get(id).is_some_and(|old| old.says_the_same(&section))
                });
                if kept.is_some() {
                    old.remove(&(n, direction));
                }
                let id = kept.unwrap_or_else(|| self.add_section(section));
                new.insert((n, direction), id);
            }
        }
        for id in old.into_values() {
            self.remove_section(id);
        }
        self.policy_sections.insert(policy.id.clone(), new);
    }

    /// A policy is gone.
    pub fn remove_policy(&mut self, id: &PolicyRef) {
        for section in self.policy_sections.remove(id).unwrap_or_default().into_values() {
            self.remove_section(section);
        }
    }

    /// An identity is new, or its labels were changed.
    pub fn upsert_identity(&mut self, identity: u32, labels: impl Into<Arc<Labels>>) {
        let labels = labels.into();
        // The unknown identity is whatever has no labels: it is matched by rule, not by label.
        if identity == number::UNKNOWN || self.index.labels(identity) == Some(&*labels) {
            return;
        }
        let changed = self.index.labels(identity).is_some();
        let before = self.index.remove(identity);
        let after = self.index.insert(identity, labels);
        for selector in before.symmetric_difference(&after).copied().collect::<Vec<_>>() {
            self.selector_changed(selector, identity, changed);
        }
    }

    /// An identity is gone; no address carries it any more.
    pub fn remove_identity(&mut self, identity: u32) {
        if let Some(labels) = identity::reserved(identity) {
            self.upsert_identity(identity, labels);
            return;
        }
        for selector in self.index.remove(identity) {
            self.selector_changed(selector, identity, false);
        }
    }

    /// A local endpoint is new or was changed.
    pub fn upsert_endpoint(&mut self, id: EndpointId, info: EndpointInfo) {
        if self.endpoints.get(&id).is_some_and(|endpoint| endpoint.info == info) {
            return;
        }
        let sections: BTreeSet<SectionId> = self
            .subjects
            .candidates(&info.labels)
            .into_iter()
            .filter(|section| {
                self.sections.get(section).is_some_and(|s| s.subject().matches(&info.labels))
            })
            .collect();
        let old = self.endpoints.remove(&id);
        let groups = old.as_ref().map_or([None; 2], |old| old.groups);
        let (old_sections, learned) =
            old.map_or_else(Default::default, |old| (old.sections, old.learned));
        for section in old_sections {
            if let Some(section) = self.sections.get_mut(&section) {
                section.endpoints.remove(&id);
            }
        }
        for section in &sections {
            if let Some(section) = self.sections.get_mut(section) {
                section.endpoints.insert(id);
            }
        }
        self.endpoints.insert(id, Endpoint { info, sections, groups, learned });
        self.stale_endpoints.insert(id);
    }

    /// A local endpoint is gone.
    pub fn remove_endpoint(&mut self, id: EndpointId) {
        let Some(endpoint) = self.endpoints.remove(&id) else { return };
        self.stale_endpoints.remove(&id);
        for section in &endpoint.sections {
            if let Some(section) = self.sections.get_mut(section) {
                section.endpoints.remove(&id);
            }
        }
        for group in endpoint.groups.into_iter().flatten() {
            self.leave_group(group, id, &endpoint.learned);
        }
    }

    /// What a local endpoint learned from DNS, all of it: names in lower case without a final
    /// dot, and their addresses. An endpoint that is not known learns nothing.
    ///
    /// Only addresses outside the cluster ever match a name. One that the endpoint forgets is
    /// closed for new connections.
    pub fn set_learned(&mut self, id: EndpointId, names: Names) {
        let Some(endpoint) = self.endpoints.get_mut(&id) else { return };
        let old = std::mem::replace(&mut endpoint.learned, names);
        let new = &endpoint.learned;
        let without = |one: &Names, other: &Names| -> Names {
            one.iter()
                .filter_map(|(name, addresses)| {
                    let known = other.get(name);
                    let left: BTreeSet<IpAddr> = addresses
                        .iter()
                        .filter(|address| known.is_none_or(|known| !known.contains(address)))
                        .copied()
                        .collect();
                    (!left.is_empty()).then(|| (name.clone(), left))
                })
                .collect()
        };
        let (added, removed) = (without(new, &old), without(&old, new));
        for group in endpoint.groups.into_iter().flatten() {
            self.learn(group, &added);
            self.forget(group, &removed);
        }
    }

    fn learn(&mut self, group: GroupId, names: &Names) {
        let Some(group) = self.groups.get_mut(&group) else { return };
        for (name, address) in pairs(names) {
            let net = IpNet::from(address);
            if group.learned.add(name, address) {
                self.prefixes.acquire(net);
                group.stale_peers.extend(self.prefixes.number(net));
            }
        }
    }

    fn forget(&mut self, group: GroupId, names: &Names) {
        let Some(group) = self.groups.get_mut(&group) else { return };
        for (name, address) in pairs(names) {
            let net = IpNet::from(address);
            if group.learned.remove(name, address) {
                group.stale_peers.extend(self.prefixes.number(net));
                self.prefixes.release(net);
            }
        }
    }

    /// A pod, here or on another node, is new or was changed.
    #[expect(clippy::needless_pass_by_value, reason = "an event is handed over")]
    pub fn set_pod(&mut self, pod: PodPorts) {
        self.pods.set(&pod);
    }

    /// A pod's address is gone.
    pub fn remove_pod(&mut self, ip: IpAddr) {
        self.pods.remove(ip);
    }

    /// What follows from the events since the last commit.
    pub fn commit(&mut self) -> Changes {
        let mut changed = self.assign_groups();
        let removed = self.remove_empty_groups();
        self.resolve_names();
        let (added_prefixes, removed_prefixes) = self.prefixes.take_changes();
        self.prefixes_changed(&added_prefixes);
        let mut groups = self.compile_groups(&mut changed);
        groups.extend(removed);
        Changes {
            groups,
            endpoints: changed
                .into_iter()
                .filter_map(|id| Some((id, self.endpoint_policy(id)?)))
                .collect(),
            prefixes_changed: !added_prefixes.is_empty() || !removed_prefixes.is_empty(),
            prefixes_added: added_prefixes,
            prefixes_removed: removed_prefixes,
            errors: self.groups.values().filter_map(|group| group.error.clone()).collect(),
        }
    }

    /// No address refers to prefixes any more that the commits so far called removed. The next
    /// commit takes them out of the tables.
    pub fn acknowledge_prefixes(&mut self) {
        let forgotten = self.prefixes.forget_unused();
        self.prefixes_changed(&forgotten);
    }

    /// The prefixes in use and their numbers.
    pub fn prefixes(&self) -> impl Iterator<Item = (IpNet, u32)> + '_ {
        self.prefixes.used()
    }

    /// The number of the longest prefix in use that covers an address, 0 if none does.
    #[must_use]
    pub fn prefix_of(&self, address: IpAddr) -> u32 {
        self.prefixes.longest(address)
    }

    /// The policy of an endpoint as of the last commit.
    #[must_use]
    pub fn endpoint_policy(&self, id: EndpointId) -> Option<EndpointPolicy> {
        let [ingress, egress] = self.endpoints.get(&id)?.groups.map(|group| {
            match group.and_then(|id| Some((id, self.groups.get(&id)?))) {
                Some((id, group)) => GroupDirection::Enforced(id, Arc::clone(&group.compiled)),
                None => GroupDirection::AllowAll,
            }
        });
        Some(EndpointPolicy { ingress, egress })
    }

    /// What is known of an endpoint.
    #[must_use]
    pub fn endpoint(&self, id: EndpointId) -> Option<&EndpointInfo> {
        self.endpoints.get(&id).map(|endpoint| &endpoint.info)
    }

    /// The labels of an identity.
    #[must_use]
    pub fn identity(&self, identity: u32) -> Option<&Labels> {
        self.index.labels(identity)
    }

    /// The identities, in order.
    pub fn identities(&self) -> impl Iterator<Item = (u32, &Labels)> {
        self.index.identities()
    }

    /// The groups as of the last commit: number, direction, endpoints and tables.
    pub fn groups(
        &self,
    ) -> impl Iterator<Item = (GroupId, Direction, &BTreeSet<EndpointId>, &Arc<CompiledPolicy>)>
    {
        self.groups.iter().map(|(id, g)| (*id, g.key.direction, &g.endpoints, &g.compiled))
    }

    /// The peer selectors in use: how many rules use each, how many identities it matches.
    pub fn selectors(&self) -> impl Iterator<Item = (&Selector, usize, u64)> {
        self.index.selectors()
    }

    fn add_section(&mut self, mut section: Section) -> SectionId {
        let id = SectionId(self.next_section);
        self.next_section += 1;
        for (endpoint_id, endpoint) in &mut self.endpoints {
            if section.subject().matches(&endpoint.info.labels) {
                endpoint.sections.insert(id);
                section.endpoints.insert(*endpoint_id);
                self.stale_endpoints.insert(*endpoint_id);
            }
        }
        self.subjects.insert(section.subject(), id);
        self.sections.insert(id, section);
        id
    }

    fn remove_section(&mut self, id: SectionId) {
        let Some(section) = self.sections.get_mut(&id) else { return };
        self.subjects.remove(section.subject(), id);
        let endpoints = std::mem::take(&mut section.endpoints);
        for endpoint_id in endpoints {
            if let Some(endpoint) = self.endpoints.get_mut(&endpoint_id) {
                endpoint.sections.remove(&id);
                self.stale_endpoints.insert(endpoint_id);
            }
        }
        // Groups still refer to it until the next commit; the last one takes it along.
        section.removed = true;
        if section.groups.is_empty() {
            self.sections.remove(&id);
        }
    }

    fn selector_changed(&mut self, selector: SelectorId, identity: u32, relabelled: bool) {
        for id in self.selector_users.get(&selector).into_iter().flatten() {
            let Some(section) = self.sections.get(id) else { continue };
            if !section.names.is_empty() && section.direction == Direction::Egress {
                self.stale_names.insert(*id);
            }
            for group in &section.groups {
                if let Some(group) = self.groups.get_mut(group) {
                    group.stale |= relabelled;
                    group.stale_peers.insert(identity);
                }
            }
        }
    }

    fn prefixes_changed(&mut self, prefixes: &[(IpNet, u32)]) {
        if prefixes.is_empty() {
            return;
        }
        for id in &self.cidr_users {
            let Some(section) = self.sections.get(id) else { continue };
            // Each prefix looks up itself and the shorter ones, so that tens of thousands of
            // prefixes in a policy of as many do not take the square of that.
            let nets: HashSet<IpNet> = section.cidrs().map(|cidr| cidr.net.trunc()).collect();
            for (net, number) in prefixes {
                let mut covering = successors(Some(net.trunc()), IpNet::supernet);
                if !covering.any(|net| nets.contains(&net)) {
                    continue;
                }
                for group in &section.groups {
                    if let Some(group) = self.groups.get_mut(group) {
                        group.stale_peers.extend([*number, *number | PREFIX_POD_BIT]);
                    }
                }
            }
        }
    }

    fn join_group(&mut self, group_id: GroupId, endpoint: EndpointId, learned: &Names) {
        self.learn(group_id, learned);
        if let Some(group) = self.groups.get_mut(&group_id) {
            group.endpoints.insert(endpoint);
        }
    }

    fn leave_group(&mut self, group_id: GroupId, endpoint: EndpointId, learned: &Names) {
        self.forget(group_id, learned);
        if let Some(group) = self.groups.get_mut(&group_id) {
            group.endpoints.remove(&endpoint);
            if group.endpoints.is_empty() {
                self.emptied_groups.insert(group_id);
            }
        }
    }

    /// Puts every endpoint whose rules changed into its groups.
    fn assign_groups(&mut self) -> BTreeSet<EndpointId> {
        let mut changed = BTreeSet::new();
        for id in std::mem::take(&mut self.stale_endpoints) {
            let Some(endpoint) = self.endpoints.get(&id) else { continue };
            let (old, learned) = (endpoint.groups, endpoint.learned.clone());
            let new = Direction::BOTH
                .map(|direction| self.group_key(endpoint, direction))
                .map(|key| key.map(|key| self.group(key)));
            for (old, new) in old.into_iter().zip(new) {
                if old == new {
                    continue;
                }
                if let Some(group) = new {
                    self.join_group(group, id, &learned);
                }
                if let Some(group) = old {
                    self.leave_group(group, id, &learned);
                }
            }
            if let Some(endpoint) = self.endpoints.get_mut(&id) {
                endpoint.groups = new;
            }
            changed.insert(id);
        }
        changed
    }

    fn group_key(&self, endpoint: &Endpoint, direction: Direction) -> Option<GroupKey> {
        let init = endpoint.info.identity == number::INIT;
        let mut sections: Vec<(SectionId, &Section)> = endpoint
            .sections
            .iter()
            .filter_map(|id| Some((*id, self.sections.get(id)?)))
            .filter(|(_, section)| section.direction == direction)
            .collect();
        if sections.is_empty() && !init {
            return None;
        }
        sections.sort_by(|(_, a), (_, b)| a.order().cmp(&b.order()));
        let names = match direction {
            Direction::Egress => Vec::new(),
            Direction::Ingress => {
                let used: BTreeSet<&PortName> =
                    sections.iter().flat_map(|(_, section)| &section.names).collect();
                let mut own = pods::by_name(&endpoint.info.named_ports);
                own.retain(|name, _| used.contains(name));
                own.into_iter().collect()
            }
        };
        let sections = sections.into_iter().map(|(id, _)| id).collect();
        Some(GroupKey { direction, init, sections, names })
    }

    /// The group with a key, made if there is none.
    fn group(&mut self, key: GroupKey) -> GroupId {
        if let Some(id) = self.group_ids.get(&key) {
            return *id;
        }
        let id = GroupId(self.next_group);
        self.next_group += 1;
        for section in key.sections.clone() {
            self.use_section(section, id);
        }
        self.group_ids.insert(key.clone(), id);
        let patterns = key
            .sections
            .iter()
            .filter_map(|section| self.sections.get(section))
            .flat_map(|section| section.fqdns().cloned());
        let learned = Learned::new(patterns);
        let group = Group {
            key,
            learned,
            endpoints: BTreeSet::new(),
            bits: Vec::new(),
            compiled: Arc::default(),
            stale: true,
            stale_peers: BTreeSet::new(),
            error: None,
        };
        self.groups.insert(id, group);
        id
    }

    /// A group needs the section: from its first on, its selectors and prefixes are kept track of.
    fn use_section(&mut self, id: SectionId, group: GroupId) {
        let Some(section) = self.sections.get_mut(&id) else { return };
        section.groups.insert(group);
        if section.groups.len() > 1 {
            return;
        }
        section.resolve(&mut self.index, &mut self.prefixes);
        for selector in section.selectors() {
            self.selector_users.entry(selector).or_default().insert(id);
        }
        if section.cidrs().next().is_some() {
            self.cidr_users.insert(id);
        }
        if section.direction == Direction::Egress && !section.names.is_empty() {
            for name in &section.names {
                self.name_users.entry(name.clone()).or_default().insert(id);
            }
            self.stale_names.insert(id);
        }
    }

    /// A group does without the section; the last one lets go of all that it resolved to.
    fn unuse_section(&mut self, id: SectionId, group: GroupId) {
        let Some(section) = self.sections.get_mut(&id) else { return };
        section.groups.remove(&group);
        if !section.groups.is_empty() {
            return;
        }
        for selector in section.selectors() {
            if let Some(users) = self.selector_users.get_mut(&selector) {
                users.remove(&id);
                if users.is_empty() {
                    self.selector_users.remove(&selector);
                }
            }
        }
        for name in &section.names {
            if let Some(users) = self.name_users.get_mut(name) {
                users.remove(&id);
                if users.is_empty() {
                    self.name_users.remove(name);
                }
            }
        }
        section.unresolve(&mut self.index, &mut self.prefixes);
        self.cidr_users.remove(&id);
        self.stale_names.remove(&id);
        if section.removed {
            self.sections.remove(&id);
        }
    }

    fn remove_empty_groups(&mut self) -> Vec<GroupChange> {
        let mut changes = Vec::new();
        for id in std::mem::take(&mut self.emptied_groups) {
            if self.groups.get(&id).is_none_or(|group| !group.endpoints.is_empty()) {
                continue;
            }
            let Some(group) = self.groups.remove(&id) else { continue };
            for section in &group.key.sections {
                self.unuse_section(*section, id);
            }
            self.group_ids.remove(&group.key);
            let direction = group.key.direction;
            changes.push(GroupChange { group: id, direction, update: GroupUpdate::Removed });
        }
        changes
    }

    /// Resolves named ports of peers anew where pods or identities changed.
    fn resolve_names(&mut self) {
        for name in self.pods.take_touched() {
            self.stale_names.extend(self.name_users.get(&name).into_iter().flatten());
        }
        for id in std::mem::take(&mut self.stale_names) {
            let Some(section) = self.sections.get_mut(&id) else { continue };
            if !section.resolve_names(&self.index, &self.pods, &mut self.prefixes) {
                continue;
            }
            for group in &section.groups {
                if let Some(group) = self.groups.get_mut(group) {
                    group.stale = true;
                }
            }
        }
    }

    fn compile_groups(&mut self, changed: &mut BTreeSet<EndpointId>) -> Vec<GroupChange> {
        let mut changes = Vec::new();
        for (id, group) in &mut self.groups {
            let ids = std::mem::take(&mut group.stale_peers);
            let update = if std::mem::take(&mut group.stale) {
                group.compile(*id, &self.sections, &self.index, &self.prefixes);
                changed.extend(&group.endpoints);
                GroupUpdate::Replaced(Arc::clone(&group.compiled))
            } else if ids.is_empty() {
                continue;
            } else {
                let (index, prefixes, learned) = (&self.index, &self.prefixes, &group.learned);
                let tables = PeerTables { index, prefixes, learned };
                let (compiled, delta) = group.compiled.with_peers(&ids, &group.bits, &tables);
                if delta.is_empty() {
                    continue;
                }
                group.compiled = Arc::new(compiled);
                GroupUpdate::Peers(Arc::clone(&group.compiled), delta)
            };
            changes.push(GroupChange { group: *id, direction: group.key.direction, update });
        }
        changes
    }
}

impl Group {
    fn compile(
        &mut self,
        id: GroupId,
        sections: &BTreeMap<SectionId, Section>,
        index: &Index,
        prefixes: &Prefixes,
    ) {
        let selecting: Vec<&Section> =
            self.key.sections.iter().filter_map(|id| sections.get(id)).collect();
        let closed = |section: &&&Section| section.said().default_deny;
        let mut default_deny_by: Vec<PolicyRef> =
            selecting.iter().filter(closed).map(|section| section.policy.id.clone()).collect();
        default_deny_by.dedup();
        let open = !self.key.init && default_deny_by.is_empty();
        self.bits = section::bits(&selecting, &self.key.names, self.key.direction, open);
        self.error = None;
        let limit = (CHUNK_RULES * MAX_CHUNKS) as usize;
        if self.bits.len() > limit {
            let mut policies: Vec<PolicyRef> =
                selecting.iter().map(|section| section.policy.id.clone()).collect();
            policies.dedup();
            self.error = Some(TooManyRules {
                group: id,
                direction: self.key.direction,
                endpoints: self.endpoints.iter().copied().collect(),
                rules: self.bits.len(),
                limit,
                policies: policies.clone(),
            });
            default_deny_by = policies;
            self.bits = section::bits(&[], &[], self.key.direction, false);
        }
        let tables = PeerTables { index, prefixes, learned: &self.learned };
        self.compiled = Arc::new(compile::compile(&self.bits, default_deny_by, &tables));
    }
}

fn pairs(names: &Names) -> impl Iterator<Item = (&str, IpAddr)> {
    names
        .iter()
        .flat_map(|(name, addresses)| addresses.iter().map(|address| (name.as_str(), *address)))
}

#[cfg(test)]
mod tests;
