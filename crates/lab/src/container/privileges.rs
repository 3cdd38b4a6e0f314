//! Who a container's command is, and what it may do.

use std::io::{stderr, stdin, stdout};
use std::os::fd::AsFd;

use anyhow::{Context, bail, ensure};
use k8s_openapi::api::core::v1::{PodSecurityContext, SecurityContext};
use rustix::process::{Gid, Uid};
use rustix::thread::{set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use serde::{Deserialize, Serialize};

use super::Capabilities;

/// User, groups and capabilities of a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Privileges {
    capabilities: Capabilities,
    user: u32,
    group: u32,
    groups: Vec<u32>,
    /// No program that it runs gets more than it has (`allowPrivilegeEscalation: false`).
    no_more: bool,
}

impl Privileges {
    /// What a container gets that asks for `wanted` in a pod that asks for `pod`.
    ///
    /// # Errors
    /// It asks for something that the lab does not do, or contradicts itself.
    pub fn granted(
        pod: Option<&PodSecurityContext>,
        wanted: Option<&SecurityContext>,
    ) -> anyhow::Result<Self> {
        let user = wanted.and_then(|w| w.run_as_user).or(pod.and_then(|p| p.run_as_user));
        let group = wanted.and_then(|w| w.run_as_group).or(pod.and_then(|p| p.run_as_group));
        let supplemental = pod.and_then(|p| p.supplemental_groups.as_deref()).unwrap_or_default();
        let groups = supplemental.iter().copied().chain(pod.and_then(|p| p.fs_group));
        if pod.and_then(|p| p.sysctls.as_deref()).is_some_and(|sysctls| !sysctls.is_empty()) {
            bail!("securityContext.sysctls: the lab sets no kernel parameters; remove the field");
        }
        let privileges = Self {
            capabilities: Capabilities::granted(wanted)?,
            user: number(user, "runAsUser")?,
            group: number(group, "runAsGroup")?,
            groups: groups
                .map(|group| number(Some(group), "supplementalGroups"))
                .collect::<anyhow::Result<_>>()?,
            no_more: wanted.and_then(|w| w.allow_privilege_escalation) == Some(false),
        };
        let not_root =
            wanted.and_then(|w| w.run_as_non_root).or(pod.and_then(|p| p.run_as_non_root));
        ensure!(
            not_root != Some(true) || privileges.user != 0,
            "container has runAsNonRoot and would run as root; set securityContext.runAsUser"
        );
        Ok(privileges)
    }

    /// Becomes what this says for good: this process, which has one thread, and all that it starts.
    pub(super) fn take(&self) -> anyhow::Result<()> {
        // Only as long as this is root.
        self.capabilities.bound().context("cannot give up capabilities")?;
        let (user, group) = (Uid::from_raw(self.user), Gid::from_raw(self.group));
        if self.user != 0 {
            // Who opens `/dev/stdout` again must own it. What cannot be owned is open to all.
            for stream in [stdin().as_fd(), stdout().as_fd(), stderr().as_fd()] {
                let _ = rustix::fs::fchown(stream, Some(user), None);
            }
        }
        let groups: Vec<Gid> = self.groups.iter().copied().map(Gid::from_raw).collect();
        set_thread_groups(&groups).context("cannot set supplementary groups")?;
        set_thread_res_gid(group, group, group)
            .with_context(|| format!("cannot become group {}", self.group))?;
        set_thread_res_uid(user, user, user)
            .with_context(|| format!("cannot become user {}", self.user))?;
        self.capabilities.limit().context("cannot give up capabilities")?;
        if self.no_more {
            set_no_new_privs(true).context("cannot give up further privileges")?;
        }
        Ok(())
    }

    /// The form in which it is handed to a process, see [`Self::parse`].
    pub(super) fn argument(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string(self)?)
    }

    /// Reads what [`Self::argument`] wrote.
    ///
    /// # Errors
    /// It is something else.
    pub fn parse(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }
}

/// A user's or group's number; root where nothing is said.
fn number(wanted: Option<i64>, field: &str) -> anyhow::Result<u32> {
    let wanted = wanted.unwrap_or_default();
    // The kernel's own word for "leave it as it is" is no number of anybody.
    let valid = u32::try_from(wanted).ok().filter(|number| *number != u32::MAX);
    valid.with_context(|| {
        format!("securityContext.{field}: {wanted} is not a number from 0 to {}", u32::MAX - 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(user: i64, not_root: bool) -> PodSecurityContext {
        PodSecurityContext {
            run_as_user: Some(user),
            run_as_non_root: Some(not_root),
            supplemental_groups: Some(vec![30, 40]),
            fs_group: Some(50),
            ..PodSecurityContext::default()
        }
    }

    #[test]
    fn a_container_goes_before_its_pod() {
        let container = SecurityContext {
            run_as_user: Some(7),
            run_as_group: Some(8),
            ..SecurityContext::default()
        };
        let both = Privileges::granted(Some(&pod(1000, false)), Some(&container)).unwrap();
        assert_eq!((both.user, both.group, both.groups), (7, 8, vec![30, 40, 50]));
        let alone = Privileges::granted(Some(&pod(1000, true)), None).unwrap();
        assert_eq!((alone.user, alone.group), (1000, 0));
    }

    #[test]
    fn contradictions_and_nonsense_are_refused() {
        let message = |pod: &PodSecurityContext| {
            Privileges::granted(Some(pod), None).unwrap_err().to_string()
        };
        assert!(message(&pod(0, true)).contains("runAsNonRoot"));
        assert!(message(&pod(-1, false)).contains("runAsUser: -1"));
        assert!(message(&pod(i64::from(u32::MAX), false)).contains("runAsUser"));
    }

    #[test]
    fn handed_over_as_text() {
        let privileges = Privileges::granted(Some(&pod(1000, true)), None).unwrap();
        assert_eq!(Privileges::parse(&privileges.argument().unwrap()).unwrap(), privileges);
    }
}
