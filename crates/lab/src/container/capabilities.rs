//! What root may do inside a container. The kernel's tables and programs belong to the whole
//! machine: a container that could reach them (`SYS_ADMIN`, `BPF`) could rewrite policy, and one
//! that makes device nodes could rewrite the disk.

use anyhow::{bail, ensure};
use k8s_openapi::api::core::v1::SecurityContext;
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities,
};
use serde::{Deserialize, Serialize};

/// What the usual runtimes leave, without `MKNOD`.
const DEFAULT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::AUDIT_WRITE);
/// What a container may ask for beside that: nothing that reaches out of its namespaces.
const GRANTABLE: CapabilitySet = DEFAULT
    .union(CapabilitySet::NET_ADMIN)
    .union(CapabilitySet::NET_BROADCAST)
    .union(CapabilitySet::IPC_LOCK)
    .union(CapabilitySet::SYS_NICE);

/// A set of capabilities, as the kernel counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Capabilities(u64);

impl Capabilities {
    /// What a container gets that asks for `wanted`.
    ///
    /// # Errors
    /// It asks for something that would reach out of it.
    pub(super) fn granted(wanted: Option<&SecurityContext>) -> anyhow::Result<Self> {
        let Some(wanted) = wanted else { return Ok(Self(DEFAULT.bits())) };
        if wanted.privileged == Some(true) {
            bail!(
                "securityContext.privileged: the lab runs no privileged containers, which could \
                 change the nodes' own programs and policies; remove the field"
            );
        }
        let Some(changes) = &wanted.capabilities else { return Ok(Self(DEFAULT.bits())) };
        let drop = changes.drop.as_deref().unwrap_or_default();
        let all = drop.iter().any(|name| name.eq_ignore_ascii_case("ALL"));
        let mut set = if all { CapabilitySet::empty() } else { DEFAULT };
        for name in changes.add.iter().flatten() {
            let known = named(name).filter(|one| GRANTABLE.contains(*one));
            let granted = GRANTABLE.iter_names().map(|(name, _)| name).collect::<Vec<_>>();
            ensure!(
                known.is_some(),
                "securityContext.capabilities.add: the lab does not give {name:?}; write one of {}",
                granted.join(", ")
            );
            set |= known.unwrap_or_else(CapabilitySet::empty);
        }
        for one in drop.iter().filter_map(|name| named(name)) {
            set -= one;
        }
        Ok(Self(set.bits()))
    }

    /// What the first process of a container needs: it forwards signals to the command.
    pub(super) const SUPERVISOR: Self = Self(CapabilitySet::KILL.bits());

    /// Lets nothing that this process starts have other capabilities, be it root.
    pub(super) fn bound(self) -> rustix::io::Result<()> {
        let keep = CapabilitySet::from_bits_retain(self.0);
        for bit in 0..u64::BITS {
            let one = CapabilitySet::from_bits_retain(1 << bit);
            if keep.contains(one) {
                continue;
            }
            match remove_capability_from_bounding_set(one) {
                // The kernel has no more capabilities than this.
                Err(Errno::INVAL) => break,
                other => other?,
            }
        }
        clear_ambient_capability_set()
    }

    /// Gives up every other capability that this process has.
    pub(super) fn limit(self) -> rustix::io::Result<()> {
        let keep = CapabilitySet::from_bits_retain(self.0);
        let left = keep & capabilities(None)?.permitted;
        let none = CapabilitySet::empty();
        set_capabilities(
            None,
            CapabilitySets { effective: left, permitted: left, inheritable: none },
        )
    }
}

/// A capability by its name in manifests, with or without `CAP_`.
fn named(name: &str) -> Option<CapabilitySet> {
    let name = name.to_ascii_uppercase();
    CapabilitySet::from_name(name.strip_prefix("CAP_").unwrap_or(&name))
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Capabilities as Wanted;

    use super::*;

    fn granted(add: &[&str], drop: &[&str]) -> anyhow::Result<CapabilitySet> {
        let names = |names: &[&str]| Some(names.iter().map(|&name| name.to_owned()).collect());
        let wanted = Wanted { add: names(add), drop: names(drop) };
        let context = SecurityContext { capabilities: Some(wanted), ..SecurityContext::default() };
        Ok(CapabilitySet::from_bits_retain(Capabilities::granted(Some(&context))?.0))
    }

    #[test]
    fn what_reaches_the_machine_is_never_granted() {
        for name in ["SYS_ADMIN", "CAP_BPF", "bpf", "PERFMON", "SYS_MODULE", "MKNOD", "SYS_PTRACE"]
        {
            let error = granted(&[name], &[]).unwrap_err().to_string();
            assert!(error.contains("capabilities.add") && error.contains("NET_ADMIN"), "{error}");
        }
        let privileged = SecurityContext { privileged: Some(true), ..SecurityContext::default() };
        assert!(Capabilities::granted(Some(&privileged)).is_err());
        assert!(!DEFAULT.intersects(CapabilitySet::SYS_ADMIN | CapabilitySet::BPF));
    }

    #[test]
    fn adding_and_dropping() {
        assert_eq!(granted(&[], &[]).unwrap(), DEFAULT);
        assert_eq!(granted(&["NET_RAW"], &["ALL"]).unwrap(), CapabilitySet::NET_RAW);
        assert_eq!(granted(&[], &["CAP_KILL"]).unwrap(), DEFAULT - CapabilitySet::KILL);
        let net_admin = DEFAULT | CapabilitySet::NET_ADMIN;
        assert_eq!(granted(&["net_admin"], &[]).unwrap(), net_admin);
    }
}
