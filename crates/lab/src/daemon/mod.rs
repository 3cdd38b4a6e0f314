//! The lab's process: what `up` starts, what `down` ends and cleans up.

mod down;
mod report;
mod serve;
mod up;

use std::path::PathBuf;

use palisade_api::routing::{Masquerade, Routing};
use serde::{Deserialize, Serialize};

pub use down::down;
pub use report::{running, status};
pub use serve::serve;
pub use up::up;

/// Exit code where no lab answers, the same as with `palisade`.
pub const NOT_RUNNING: u8 = 3;

/// What a lab is to be like.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// How many nodes
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=i64::from(crate::layout::MAX_NODES)))]
    pub nodes: u8,
    /// How pods of different nodes reach each other: native or overlay
    #[arg(long, default_value_t)]
    pub routing: Routing,
    /// Whether pods reach the outside with their node's address: auto (with overlay), always or
    /// never
    #[arg(long, default_value_t)]
    pub masquerade: Masquerade,
    /// Keep the cluster's objects in this directory; without it they end with the lab
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Port of the API server on 127.0.0.1 [default: 6443, or any free one where that is taken]
    #[arg(long, value_name = "PORT")]
    pub api_port: Option<u16>,
}

/// What a lab changed outside its own directories, and `down` must undo.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
struct Undo {
    /// A bpf file system that was not mounted before.
    bpffs: bool,
    /// The directory of network namespaces, made a mount of its own.
    netns_mount: bool,
    /// The directory of network namespaces, which did not exist.
    netns_dir: bool,
}

/// What the daemon tells `up` on the way, one line of JSON each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Progress {
    /// Something is done.
    Done(String),
    /// Everything is.
    Ready,
    /// It went wrong.
    Failed(String),
}
