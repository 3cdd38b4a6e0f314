//! What the process gives up once it has started: it reads what strangers say.

use std::{
    collections::BTreeMap,
    os::unix::fs::{DirBuilderExt, chown},
    path::Path,
};

use anyhow::Context;
use landlock::{
    ABI, Access, AccessFs, Ruleset, RulesetAttr, RulesetCreatedAttr, path_beneath_rules,
};
use palisade_api::proxy::USER;
use rustix::{
    process::{Gid, Resource, Rlimit, Uid, getrlimit, setrlimit},
    thread::{
        CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
        remove_capability_from_bounding_set, set_capabilities, set_keep_capabilities,
        set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    },
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

/// To speak in the names of others and to mark packets; to take their ports, too.
const KEPT: CapabilitySet = CapabilitySet::NET_ADMIN.union(CapabilitySet::NET_BIND_SERVICE);

/// Becomes a user to whom nothing belongs but the `directory`, which is made, and gives up the
/// capabilities that the process does not need. Threads inherit it, so none may run yet.
///
/// # Errors
///
/// The process may not: it takes `CAP_CHOWN`, `CAP_SETGID` and `CAP_SETUID`.
pub(crate) fn become_nobody(directory: &Path) -> anyhow::Result<()> {
    let name = directory.display();
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(directory)
        .with_context(|| format!("creating {name}"))?;
    chown(directory, Some(USER), Some(USER)).with_context(|| format!("owning {name}"))?;
    change_user().with_context(|| format!("becoming user {USER}"))?;
    drop_capabilities().context("dropping capabilities")
}

fn change_user() -> rustix::io::Result<()> {
    // Else the kernel takes all of them from whoever stops being root.
    set_keep_capabilities(true)?;
    let (user, group) = (Uid::from_raw(USER), Gid::from_raw(USER));
    set_thread_groups(&[])?;
    set_thread_res_gid(group, group, group)?;
    set_thread_res_uid(user, user, user)
}

/// Gives up files other than those in `directory`, and system calls. Threads inherit it, so none
/// may run yet.
///
/// # Errors
///
/// The kernel refuses. Where it knows no Landlock, files stay guarded by their permissions.
pub(crate) fn enter(directory: &Path) -> anyhow::Result<()> {
    set_no_new_privs(true).context("giving up new privileges")?;
    restrict_files(directory).context("restricting files")?;
    let filter = filter().context("building the filter of system calls")?;
    seccompiler::apply_filter(&filter).context("restricting system calls")
}

/// As many descriptors as the process may have: each connection takes two.
pub(crate) fn raise_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

fn drop_capabilities() -> rustix::io::Result<()> {
    clear_ambient_capability_set()?;
    let CapabilitySets { permitted, .. } = capabilities(None)?;
    let inheritable = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: permitted, permitted, inheritable })?;
    // Capabilities that the kernel does not know are not there to be dropped.
    for capability in CapabilitySet::all().difference(KEPT).iter() {
        _ = remove_capability_from_bounding_set(capability);
    }
    set_capabilities(None, CapabilitySets { effective: KEPT, permitted: KEPT, inheritable })
}

fn restrict_files(directory: &Path) -> anyhow::Result<()> {
    let all = AccessFs::from_all(ABI::V3);
    Ruleset::default()
        .handle_access(all)?
        .create()?
        .add_rules(path_beneath_rules([directory], all))?
        .restrict_self()?;
    Ok(())
}

fn filter() -> anyhow::Result<BpfProgram> {
    let rules = CALLS.iter().chain(OLD_CALLS).map(|call| (*call, Vec::new()));
    let refuse = SeccompAction::Errno(rustix::io::Errno::PERM.raw_os_error().cast_unsigned());
    let filter = SeccompFilter::new(
        rules.collect::<BTreeMap<_, _>>(),
        refuse,
        SeccompAction::Allow,
        std::env::consts::ARCH.try_into()?,
    )?;
    Ok(filter.try_into()?)
}

/// Sockets, memory, time, threads, and the one file. Nothing that starts a program.
const CALLS: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_close,
    libc::SYS_connect,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getpeername,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_gettid,
    libc::SYS_ioctl,
    libc::SYS_listen,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_ppoll,
    libc::SYS_prctl,
    libc::SYS_prlimit64,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_statx,
    libc::SYS_tgkill,
    libc::SYS_unlinkat,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Older names for some of these, which the C library prefers where they exist.
#[cfg(target_arch = "x86_64")]
const OLD_CALLS: &[i64] =
    &[libc::SYS_epoll_wait, libc::SYS_poll, libc::SYS_rename, libc::SYS_unlink];
#[cfg(not(target_arch = "x86_64"))]
const OLD_CALLS: &[i64] = &[];
