//! What the runtime says in environment variables.

use std::env::{self, VarError};
use std::path::PathBuf;

use palisade_api::cni::{Attachment, Code, ContainerId, Failure, IfName, Pod};

/// `/proc/<pid>/ns` entries and bind mounts of them.
const NSFS_MAGIC: u64 = 0x6e73_6673;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Command {
    pub(crate) fn from_environment() -> Result<Self, Failure> {
        match required("CNI_COMMAND")?.as_str() {
            "ADD" => Ok(Self::Add),
            "DEL" => Ok(Self::Del),
            "CHECK" => Ok(Self::Check),
            "GC" => Ok(Self::Gc),
            "STATUS" => Ok(Self::Status),
            "VERSION" => Ok(Self::Version),
            other => Err(invalid(format!(
                "CNI_COMMAND: {other:?} is none of ADD, DEL, CHECK, GC, STATUS, VERSION"
            ))),
        }
    }
}

/// The variables that the command needs, checked.
pub(crate) struct Environment {
    attachment: Option<Attachment>,
    netns: Option<PathBuf>,
}

impl Environment {
    pub(crate) fn read(command: Command) -> Result<Self, Failure> {
        let attachment = match command {
            Command::Add | Command::Del | Command::Check => Some(attachment()?),
            Command::Gc | Command::Status | Command::Version => None,
        };
        let netns = match command {
            Command::Add | Command::Check => Some(netns()?),
            _ => None,
        };
        if matches!(command, Command::Add | Command::Del | Command::Check | Command::Gc) {
            required("CNI_PATH")?;
        }
        Ok(Self { attachment, netns })
    }

    pub(crate) fn attachment(&self) -> Result<Attachment, Failure> {
        self.attachment.clone().ok_or_else(|| missing("CNI_CONTAINERID"))
    }

    pub(crate) fn netns(&self) -> Result<PathBuf, Failure> {
        self.netns.clone().ok_or_else(|| missing("CNI_NETNS"))
    }

    /// The pod, from the semicolon-separated pairs of `CNI_ARGS`.
    pub(crate) fn pod(&self) -> Result<Pod, Failure> {
        let args = required("CNI_ARGS")?;
        let value = |key: &str| {
            let pairs = args.split(';').filter_map(|pair| pair.split_once('='));
            pairs.filter(|(name, _)| *name == key).map(|(_, value)| value.to_owned()).next_back()
        };
        let needed = |key: &str| {
            value(key)
                .filter(|value| !value.is_empty())
                .ok_or_else(|| invalid(format!("CNI_ARGS: {key} is missing")))
        };
        Ok(Pod {
            namespace: needed("K8S_POD_NAMESPACE")?,
            name: needed("K8S_POD_NAME")?,
            uid: value("K8S_POD_UID").filter(|uid| !uid.is_empty()),
        })
    }
}

fn attachment() -> Result<Attachment, Failure> {
    let container_id = ContainerId::try_from(required("CNI_CONTAINERID")?)
        .map_err(|error| invalid(format!("CNI_CONTAINERID: {error}")))?;
    let ifname = IfName::try_from(required("CNI_IFNAME")?)
        .map_err(|error| invalid(format!("CNI_IFNAME: {error}")))?;
    Ok(Attachment { container_id, ifname })
}

/// The network namespace, which has to be one.
pub(crate) fn netns() -> Result<PathBuf, Failure> {
    let path = PathBuf::from(required("CNI_NETNS")?);
    match rustix::fs::statfs(&path) {
        Ok(fs) if u64::try_from(fs.f_type).is_ok_and(|magic| magic == NSFS_MAGIC) => Ok(path),
        Ok(_) => Err(invalid(format!("CNI_NETNS: {} is not a network namespace", path.display()))),
        Err(rustix::io::Errno::NOENT) => Err(Failure::new(
            Code::UnknownContainer,
            format!("CNI_NETNS: {} does not exist", path.display()),
        )),
        Err(errno) => Err(invalid(format!("CNI_NETNS: {}: {errno}", path.display()))),
    }
}

fn required(name: &str) -> Result<String, Failure> {
    match env::var(name) {
        Ok(value) if !value.is_empty() => Ok(value),
        Ok(_) | Err(VarError::NotPresent) => Err(missing(name)),
        Err(VarError::NotUnicode(_)) => Err(invalid(format!("{name} is not UTF-8 text"))),
    }
}

fn missing(name: &str) -> Failure {
    invalid(format!("environment variable {name} is missing"))
}

fn invalid(message: String) -> Failure {
    Failure::new(Code::InvalidEnvironment, message)
}
