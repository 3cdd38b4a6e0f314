//! `palisade node`: what Palisade's pods do on their node beside the agent itself. Their image holds
//! programs and nothing else, so there is no shell to do it.

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use futures::TryStreamExt;
use palisade_abi::{OVERLAY, ROUTE_PROTOCOL};
use palisade_api::{
    admin::{self, Client, Request, Response, Status},
    settings,
};
use rtnetlink::packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressMessage},
    route::{RouteAttribute, RouteMessage, RouteProtocol, RouteType},
    rule::{RuleAttribute, RuleMessage},
};
use rustix::{
    io::Errno,
    mount::{MountFlags, mount},
};

use crate::{
    exit::{Exit, Failure},
    output::{self, note},
};

const PLUGIN: &str = "palisade-cni";
/// Most runtimes ask for this plugin beside the network's; it may come with none of them.
const LOOPBACK: &str = "loopback";
/// Runtimes take the first by name.
const CONFLIST: &str = "05-palisade.conflist";
/// What other networks' files are called while they are put aside.
const ASIDE: &str = "palisade-aside";
const BPFFS: &str = "/sys/fs/bpf";
const BPF_FS_MAGIC: u32 = 0xcafe_4a11;
const CGROUP: &str = "/sys/fs/cgroup";
const CGROUP2_MAGIC: u32 = 0x6367_7270;
/// Where the kernel shows the settings of its network.
const SETTINGS: &str = "/proc/sys/net";
/// The agent's part of the records.
const AGENT: &str = "agent";
/// An agent that takes longer for an answer is not well.
const TIMEOUT: Duration = Duration::from_secs(3);

#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// Checks the node, and installs the CNI plugin and its configuration.
    Install {
        #[command(flatten)]
        cni: CniDirectories,
        /// The configuration to install.
        #[arg(long, value_name = "FILE")]
        conflist: PathBuf,
        /// Put the configuration of other networks aside.
        #[arg(long)]
        exclusive: bool,
    },
    /// Asks this node's agent whether pods can be connected.
    Probe {
        /// Only whether it answers.
        #[arg(long)]
        alive: bool,
        /// The agent's directory.
        #[arg(long, default_value = "/run/palisade", value_name = "DIR")]
        run_dir: PathBuf,
    },
    /// Prints what this node's agent says of itself, as `Ok`, or as `Err` why it says nothing.
    Status {
        /// The agent's directory.
        #[arg(long, default_value = "/run/palisade", value_name = "DIR")]
        run_dir: PathBuf,
    },
    /// Takes away what `install` and the agent left.
    Clean {
        #[command(flatten)]
        cni: CniDirectories,
        /// The agent's sockets.
        #[arg(long, value_name = "DIR")]
        run_dir: PathBuf,
        /// The agent's records.
        #[arg(long, value_name = "DIR")]
        state_dir: PathBuf,
        /// The agent's programs and tables.
        #[arg(long, value_name = "DIR")]
        bpffs: PathBuf,
    },
    /// Prints everything that this node's agent tells.
    Dump {
        /// The agent's directory.
        #[arg(long, default_value = "/run/palisade", value_name = "DIR")]
        run_dir: PathBuf,
    },
    /// Does nothing until it is ended.
    Idle,
}

/// Where the container runtime looks.
#[derive(Debug, Args)]
pub(crate) struct CniDirectories {
    /// For plugins.
    #[arg(long, value_name = "DIR")]
    cni_bin_dir: PathBuf,
    /// For their configuration.
    #[arg(long, value_name = "DIR")]
    cni_conf_dir: PathBuf,
}

pub(crate) fn run(command: NodeCommand) -> Result<Exit> {
    match command {
        NodeCommand::Install { cni, conflist, exclusive } => {
            check_kernel()?;
            let others = other_networks(&cni.cni_conf_dir)?;
            if !exclusive {
                refuse_others(&cni.cni_conf_dir, &others)?;
            }
            mount_bpffs()?;
            let plugin = std::env::current_exe()?.with_file_name(PLUGIN);
            install(&cni, &plugin, &conflist)?;
            put_aside(&others)?;
            Ok(Exit::Ok)
        }
        NodeCommand::Probe { alive, run_dir } => probe(&run_dir, alive),
        NodeCommand::Status { run_dir } => {
            output::json(&ask(&run_dir).map_err(|error| format!("{error:#}")))?;
            Ok(Exit::Ok)
        }
        NodeCommand::Clean { cni, run_dir, state_dir, bpffs } => {
            restore_settings(Path::new(SETTINGS), &state_dir.join(AGENT).join(settings::FILE))?;
            clean(&cni, &[bpffs, run_dir, state_dir])?;
            tokio::runtime::Runtime::new()?.block_on(clean_network())?;
            Ok(Exit::Ok)
        }
        NodeCommand::Dump { run_dir } => super::sysdump::dump(&run_dir),
        NodeCommand::Idle => loop {
            std::thread::park();
        },
    }
}

// ---------------------------------------------------------------- install

/// What the agent cannot work without is said before anything is changed.
fn check_kernel() -> Result<()> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    if version < (6, 6) {
        return Err(Failure::refused(
            format!("this node runs Linux {release}; attaching programs with tcx needs 6.6"),
            "Nothing was changed. Update the node's kernel, or keep Palisade off it with\n\
             agent.nodeSelector or agent.tolerations.",
        )
        .into());
    }
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        return Err(Failure::refused(
            format!("this node's Linux {release} has no BTF (/sys/kernel/btf/vmlinux)"),
            "Nothing was changed. The kernel needs CONFIG_DEBUG_INFO_BTF=y.",
        )
        .into());
    }
    let groups = rustix::fs::statfs(CGROUP).with_context(|| CGROUP.to_owned())?;
    if u32::try_from(groups.f_type).is_ok_and(|magic| magic != CGROUP2_MAGIC) {
        return Err(Failure::refused(
            format!("this node has the cgroup hierarchy of version 1 at {CGROUP}"),
            "Nothing was changed. Start the node with systemd.unified_cgroup_hierarchy=1.",
        )
        .into());
    }
    Ok(())
}

/// Configuration files in the directory that are not ours.
fn other_networks(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut others = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let path = entry?.path();
        let extension = path.extension().and_then(OsStr::to_str);
        let is_ours = path.file_name() == Some(OsStr::new(CONFLIST));
        if matches!(extension, Some("conflist" | "conf" | "json")) && !is_ours {
            others.push(path);
        }
    }
    others.sort();
    Ok(others)
}

fn refuse_others(directory: &Path, others: &[PathBuf]) -> Result<()> {
    if others.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = others.iter().filter_map(|it| it.file_name()?.to_str()).collect();
    Err(Failure::refused(
        format!(
            "this node has the configuration of another network in {}: {}",
            directory.display(),
            names.join(", ")
        ),
        "Nothing was changed. Remove that network, or let Palisade put its configuration aside with\n\
         --set cni.exclusive=true.",
    )
    .into())
}

fn mount_bpffs() -> Result<()> {
    let found = rustix::fs::statfs(BPFFS).with_context(|| BPFFS.to_owned())?;
    if u32::try_from(found.f_type).is_ok_and(|magic| magic == BPF_FS_MAGIC) {
        return Ok(());
    }
    mount("bpf", BPFFS, "bpf", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, None)
        .with_context(|| format!("cannot mount the BPF file system at {BPFFS}"))
}

/// The plugin before the configuration that names it; each is whole or not there.
fn install(cni: &CniDirectories, plugin: &Path, conflist: &Path) -> Result<()> {
    replace(plugin, &cni.cni_bin_dir.join(PLUGIN), 0o755)?;
    match symlink(PLUGIN, cni.cni_bin_dir.join(LOOPBACK)) {
        // Whoever it is from, it does the same.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        outcome => outcome.with_context(|| format!("cannot install the plugin {LOOPBACK}"))?,
    }
    replace(conflist, &cni.cni_conf_dir.join(CONFLIST), 0o644)
}

fn replace(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let name = to.file_name().and_then(OsStr::to_str).context("a path without a name")?;
    // No runtime takes a file of this name for a configuration.
    let aside = to.with_file_name(format!(".{name}.new"));
    let copy = || {
        fs::copy(from, &aside)?;
        fs::set_permissions(&aside, fs::Permissions::from_mode(mode))?;
        fs::File::open(&aside)?.sync_all()?;
        fs::rename(&aside, to)
    };
    copy().with_context(|| format!("cannot install {} as {}", from.display(), to.display()))?;
    note!("{} installed", to.display());
    Ok(())
}

fn put_aside(others: &[PathBuf]) -> Result<()> {
    for path in others {
        let aside = PathBuf::from(format!("{}.{ASIDE}", path.display()));
        fs::rename(path, &aside).with_context(|| format!("cannot put {} aside", path.display()))?;
        note!("{} put aside", path.display());
    }
    Ok(())
}

// ---------------------------------------------------------------- probe

fn probe(run_dir: &Path, alive: bool) -> Result<Exit> {
    let status = ask(run_dir)?;
    if alive || status.ready {
        return Ok(Exit::Ok);
    }
    let waiting = status.inputs.iter().filter(|input| !input.complete);
    let mut reasons: Vec<String> = waiting.map(|input| format!("no {} yet", input.kind)).collect();
    reasons.extend(status.problems);
    note!("not ready: {}", reasons.join("; "));
    Ok(Exit::No)
}

fn ask(run_dir: &Path) -> Result<Status> {
    let socket = run_dir.join(admin::SOCKET);
    let mut client = Client::connect(&socket).with_context(|| socket.display().to_string())?;
    client.set_timeout(Some(TIMEOUT))?;
    match client.request(&Request::Status).context("the agent does not answer")? {
        Response::Status(status) => Ok(*status),
        Response::Error(error) => bail!("the agent: {error}"),
        _ => bail!("the agent gave an answer of another kind"),
    }
}

// ---------------------------------------------------------------- clean

/// The configuration first, so that no pod is begun that cannot be finished.
fn clean(cni: &CniDirectories, directories: &[PathBuf]) -> Result<()> {
    remove(fs::remove_file(cni.cni_conf_dir.join(CONFLIST)), CONFLIST)?;
    for entry in fs::read_dir(&cni.cni_conf_dir)?.flatten() {
        let path = entry.path();
        if path.extension() == Some(OsStr::new(ASIDE)) {
            fs::rename(&path, path.with_extension(""))
                .with_context(|| format!("cannot put {} back", path.display()))?;
        }
    }
    let loopback = cni.cni_bin_dir.join(LOOPBACK);
    if fs::read_link(&loopback).is_ok_and(|target| target == Path::new(PLUGIN)) {
        remove(fs::remove_file(loopback), LOOPBACK)?;
    }
    remove(fs::remove_file(cni.cni_bin_dir.join(PLUGIN)), PLUGIN)?;
    for directory in directories {
        remove(fs::remove_dir_all(directory), &directory.display().to_string())?;
    }
    Ok(())
}

/// What the agent set is again what it was; what somebody has set since stays.
fn restore_settings(root: &Path, record: &Path) -> Result<()> {
    let changes = settings::read(record).unwrap_or_else(|error| {
        let record = record.display();
        eprintln!(
            "warning: settings stay as they are: cannot read what they were in {record}: {error}"
        );
        settings::Changes::new()
    });
    for (name, settings::Change { before, after }) in changes {
        let path = root.join(&name);
        let present = match fs::read_to_string(&path) {
            // The kernel has it no more, as with a family that was taken away.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            read => read.with_context(|| path.display().to_string())?,
        };
        if present.trim() == after {
            fs::write(&path, format!("{before}\n"))
                .with_context(|| format!("cannot set {}", path.display()))?;
            note!("{name} is {before:?} again");
        }
    }
    Ok(())
}

/// The overlay's interface, the router's addresses, the ways to other nodes and to the proxy, and the rules that lead there.
async fn clean_network() -> Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    tokio::spawn(connection);
    if let Ok(index) = fs::read_to_string(format!("/sys/class/net/{OVERLAY}/ifindex")) {
        let index = index.trim().parse().context("an interface's index is a number")?;
        let removed = handle.link().del(index).execute().await;
        removed.with_context(|| format!("cannot remove {OVERLAY}"))?;
        note!("{OVERLAY} removed");
    }
    let addresses: Vec<AddressMessage> = handle.address().get().execute().try_collect().await?;
    for address in addresses.into_iter().filter(is_router) {
        let removed = handle.address().del(address).execute().await;
        removed.context("cannot remove the addresses of the node's router")?;
    }
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut all = RouteMessage::default();
        all.header.address_family = family;
        let routes: Vec<RouteMessage> = handle.route().get(all).execute().try_collect().await?;
        for route in routes.into_iter().filter(leads_away) {
            let removed = handle.route().del(route).execute().await;
            removed.context("cannot remove the routes to other nodes and to the proxy")?;
        }
        let mut rule = RuleMessage::default();
        rule.header.family = family;
        rule.attributes.push(RuleAttribute::Protocol(ROUTE_PROTOCOL.into()));
        // The kernel removes one at a time.
        loop {
            match handle.rule().del(rule.clone()).execute().await {
                Ok(()) => {}
                Err(error) if means_none(&error) => break,
                Err(error) => return Err(error).context("cannot remove the rules for packets"),
            }
        }
    }
    Ok(())
}

/// An address of ours on the loopback interface, which is the first one everywhere.
fn is_router(address: &AddressMessage) -> bool {
    let ours = AddressAttribute::Protocol(ROUTE_PROTOCOL.into());
    address.header.index == 1 && address.attributes.contains(&ours)
}

/// A route of ours that does not lead to a pod of this node, which keeps its own.
fn leads_away(route: &RouteMessage) -> bool {
    let has_gateway = || route.attributes.iter().any(|it| matches!(it, RouteAttribute::Gateway(_)));
    let is_local = route.header.kind == RouteType::Local;
    route.header.protocol == RouteProtocol::Other(ROUTE_PROTOCOL) && (is_local || has_gateway())
}

/// There is no such rule, or the kernel does not know the family at all.
fn means_none(error: &rtnetlink::Error) -> bool {
    let rtnetlink::Error::NetlinkError(message) = error else { return false };
    let none = [Errno::NOENT, Errno::AFNOSUPPORT];
    none.iter().any(|none| message.raw_code() == -none.raw_os_error())
}

fn remove(outcome: io::Result<()>, what: &str) -> Result<()> {
    match outcome {
        Ok(()) => note!("{what} removed"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        // Somebody mounted something there, which is empty now.
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => note!("{what} emptied"),
        Err(error) => return Err(error).with_context(|| format!("cannot remove {what}")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("palisade-{name}-{}", std::process::id()));
            fs::create_dir_all(path.join("bin")).unwrap();
            fs::create_dir_all(path.join("conf")).unwrap();
            fs::write(path.join("plugin"), "program").unwrap();
            fs::write(path.join("conflist"), "{}").unwrap();
            Self(path)
        }

        fn cni(&self) -> CniDirectories {
            CniDirectories { cni_bin_dir: self.0.join("bin"), cni_conf_dir: self.0.join("conf") }
        }

        fn files(&self) -> Vec<String> {
            let mut names: Vec<_> = ["bin", "conf"]
                .iter()
                .flat_map(|name| fs::read_dir(self.0.join(name)).unwrap())
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn another_network_is_named_and_nothing_is_changed() {
        let directory = Directory::new("refuse");
        let cni = directory.cni();
        fs::write(cni.cni_conf_dir.join("10-flannel.conflist"), "{}").unwrap();
        fs::write(cni.cni_conf_dir.join("README"), "").unwrap();
        let others = other_networks(&cni.cni_conf_dir).unwrap();
        let error = refuse_others(&cni.cni_conf_dir, &others).unwrap_err().to_string();
        assert!(error.ends_with(": 10-flannel.conflist"), "{error}");
    }

    #[test]
    fn settings_are_again_what_they_were() {
        let directory = Directory::new("settings");
        let record = directory.0.join("record");
        let change = |before: &str, after: &str| settings::Change {
            before: before.to_owned(),
            after: after.to_owned(),
        };
        let changes =
            [("bin", change("1", "0")), ("conf", change("", "7")), ("own", change("1", "0"))];
        let changes = changes.map(|(name, change)| (format!("{name}/it"), change));
        settings::record(&record, settings::Changes::from(changes)).unwrap();
        fs::create_dir(directory.0.join("own")).unwrap();
        let read = |name: &str| fs::read_to_string(directory.0.join(name).join("it")).unwrap();
        for (name, value) in [("bin", "0\n"), ("conf", "7\n"), ("own", "2\n")] {
            fs::write(directory.0.join(name).join("it"), value).unwrap();
        }
        for _ in 0..2 {
            restore_settings(&directory.0, &record).unwrap();
            assert_eq!(["bin", "conf", "own"].map(read), ["1\n", "\n", "2\n"]);
        }
        restore_settings(&directory.0, &directory.0.join("none")).unwrap();
    }

    #[test]
    fn what_is_installed_and_put_aside_is_undone() {
        let directory = Directory::new("install");
        let cni = directory.cni();
        fs::write(cni.cni_conf_dir.join("10-flannel.conflist"), "other").unwrap();
        for _ in 0..2 {
            let others = other_networks(&cni.cni_conf_dir).unwrap();
            install(&cni, &directory.0.join("plugin"), &directory.0.join("conflist")).unwrap();
            put_aside(&others).unwrap();
            assert_eq!(
                directory.files(),
                [
                    "05-palisade.conflist",
                    "10-flannel.conflist.palisade-aside",
                    "loopback",
                    "palisade-cni"
                ]
            );
        }
        assert!(cni.cni_bin_dir.join(LOOPBACK).exists());
        let plugin = fs::metadata(cni.cni_bin_dir.join(PLUGIN)).unwrap();
        assert_eq!(plugin.permissions().mode() & 0o777, 0o755);
        let state = directory.0.join("state");
        fs::create_dir(&state).unwrap();
        for _ in 0..2 {
            clean(&cni, std::slice::from_ref(&state)).unwrap();
            assert_eq!(directory.files(), ["10-flannel.conflist"]);
            assert!(!state.exists());
        }
    }

    #[test]
    fn a_loopback_plugin_that_is_there_stays() {
        let directory = Directory::new("loopback");
        let cni = directory.cni();
        let theirs = cni.cni_bin_dir.join(LOOPBACK);
        fs::write(&theirs, "theirs").unwrap();
        install(&cni, &directory.0.join("plugin"), &directory.0.join("conflist")).unwrap();
        clean(&cni, &[]).unwrap();
        assert_eq!(fs::read_to_string(theirs).unwrap(), "theirs");
    }
}
