//! Where the API server is: what the entity `kube-apiserver` stands for.

use std::{borrow::Cow, collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use palisade_policy::model::{Cidr, Entity, Peer, Peers, Policy, Section};

/// Where the API server is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ApiServers {
    /// Whether one runs on this node.
    pub here: bool,
    /// Nodes that one runs on.
    pub nodes: BTreeSet<String>,
    /// Its addresses that are no node's. They are the world's, as others there are: an identity of
    /// their own would be nothing that an earlier version's programs know.
    pub outside: BTreeSet<IpAddr>,
}

impl ApiServers {
    /// The policy, where it names the entity with the addresses outside beside it.
    pub fn spelled_out<'a>(&self, policy: &'a Policy) -> Cow<'a, Policy> {
        if self.outside.is_empty() || !names_entity(policy) {
            return Cow::Borrowed(policy);
        }
        let mut policy = policy.clone();
        for rule in &mut policy.rules {
            self.spell_out(&mut rule.ingress);
            self.spell_out(&mut rule.egress);
        }
        Cow::Owned(policy)
    }

    fn spell_out(&self, section: &mut Section) {
        for entry in &mut section.entries {
            let Peers::List(peers) = &mut entry.peers else { continue };
            if !peers.iter().any(is_entity) {
                continue;
            }
            peers.extend(self.outside.iter().map(|address| {
                let net = IpNet::from(*address);
                Peer::Cidr(Cidr { net, except: Vec::new(), matches_pods: false })
            }));
        }
    }
}

/// Whether a policy names the entity.
pub fn names_entity(policy: &Policy) -> bool {
    let sections = policy.rules.iter().flat_map(|rule| [&rule.ingress, &rule.egress]);
    sections.flat_map(|section| &section.entries).any(|entry| match &entry.peers {
        Peers::Any => false,
        Peers::List(peers) => peers.iter().any(is_entity),
    })
}

fn is_entity(peer: &Peer) -> bool {
    matches!(peer, Peer::Entity(Entity::KubeApiserver))
}
