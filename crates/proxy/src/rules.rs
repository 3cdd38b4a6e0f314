//! The rules at hand: what the agent last said, prepared for judging, and kept on disk.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{self, Poll},
};

use anyhow::Context;
use arc_swap::{ArcSwap, Guard};
use ipnet::IpNet;
use palisade_api::{
    boot,
    proxy::{Peer, Rules},
    replace::{Lasting, replace},
};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::judge::Demands;

const FILE: &str = "rules.json";

/// What the file holds. The kernel's tables do not outlive the machine: addresses and numbers mean
/// others after it starts again.
#[derive(Serialize)]
struct Kept<'a> {
    boot: &'a str,
    rules: &'a Rules,
}

/// The rules in the file, if this machine has not started again since.
fn read(bytes: &[u8], boot: &str) -> Result<Rules, String> {
    /// As [`Kept`].
    #[derive(Deserialize)]
    struct Found {
        boot: String,
        rules: Rules,
    }
    let found: Found = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    // A proxy of before this version wrote the line end as well, and its rules are kept, too.
    match found.boot.trim_end() == boot {
        true => Ok(found.rules),
        false => Err("they are from before the machine started".into()),
    }
}

/// One version of the rules, prepared for judging.
#[derive(Default)]
pub struct Snapshot {
    /// What the agent said.
    pub rules: Rules,
    /// Counts the changes in this process; versions are the agent's, who may begin anew.
    pub(crate) generation: u64,
    networks: Networks,
    /// What was asked of connections under this version.
    pub(crate) demands: Demands,
}

impl Snapshot {
    fn new(rules: Rules, before: &Self) -> Self {
        Self {
            generation: before.generation + 1,
            networks: Networks::new(&rules.networks),
            demands: Demands::new(&rules, &before.demands, &before.rules),
            rules,
        }
    }

    /// What an address is; the unknown identity for one that no rule speaks of.
    #[must_use]
    pub fn peer(&self, address: IpAddr) -> Peer {
        let known = self.rules.addresses.get(&address).copied();
        known.or_else(|| self.networks.longest(address)).unwrap_or_default()
    }
}

/// Networks by their length, the longest first.
#[derive(Default)]
struct Networks(Vec<(u8, HashMap<IpNet, Peer>)>);

impl Networks {
    fn new(networks: &BTreeMap<IpNet, Peer>) -> Self {
        let mut lengths: BTreeMap<u8, HashMap<IpNet, Peer>> = BTreeMap::new();
        for (net, peer) in networks {
            lengths.entry(net.prefix_len()).or_default().insert(net.trunc(), *peer);
        }
        Self(lengths.into_iter().rev().collect())
    }

    fn longest(&self, address: IpAddr) -> Option<Peer> {
        self.0.iter().find_map(|(length, networks)| {
            networks.get(&IpNet::new(address, *length).ok()?.trunc()).copied()
        })
    }
}

/// Tells of changes of the rules. It waits for the next one as long as it lives, which costs less
/// than to begin to wait whenever something else is waited for as well.
pub struct Changes(Pin<Box<dyn Future<Output = watch::Receiver<u64>> + Send + Sync>>);

impl Changes {
    /// Of those that the receiver has not seen.
    pub(crate) fn new(mut receiver: watch::Receiver<u64>) -> Self {
        Self(Box::pin(async move {
            // The rules are there as long as whoever waits for others.
            _ = receiver.changed().await;
            receiver
        }))
    }

    /// Whether the rules changed since they were last said to have.
    pub fn poll(&mut self, cx: &mut task::Context<'_>) -> Poll<()> {
        self.0.as_mut().poll(cx).map(|receiver| *self = Self::new(receiver))
    }
}

/// Where the rules are: every judgement takes the newest.
pub struct Store {
    current: ArcSwap<Snapshot>,
    generation: watch::Sender<u64>,
    file: PathBuf,
    boot: String,
    /// The file has the newest rules.
    kept: AtomicBool,
}

impl Store {
    /// Begins with the rules that a former process left, or with none: then nothing is allowed.
    ///
    /// # Errors
    ///
    /// The file is there and cannot be read. What cannot be understood is as good as none.
    pub fn open(directory: &Path) -> anyhow::Result<Self> {
        let file = directory.join(FILE);
        let boot = boot::id().context("reading the boot id of the machine")?;
        let rules = match fs::read(&file) {
            Ok(bytes) => read(&bytes, &boot).unwrap_or_else(|why| {
                tracing::warn!(file = %file.display(), why, "starting without the last rules");
                Rules::default()
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Rules::default(),
            Err(error) => return Err(error).with_context(|| format!("reading {}", file.display())),
        };
        let snapshot = Snapshot::new(rules, &Snapshot::default());
        let generation = watch::Sender::new(snapshot.generation);
        let (current, kept) = (ArcSwap::from_pointee(snapshot), AtomicBool::new(true));
        Ok(Self { current, generation, file, boot, kept })
    }

    /// The newest rules.
    pub fn load(&self) -> Guard<Arc<Snapshot>> {
        self.current.load()
    }

    /// Tells of each change.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// From now on every judgement is made under these rules.
    pub fn put(&self, rules: Rules) {
        let snapshot = Snapshot::new(rules, &self.current.load());
        let generation = snapshot.generation;
        self.current.store(Arc::new(snapshot));
        self.generation.send_replace(generation);
    }

    /// Keeps the rules for the process that comes after this one. Where there is no room for them
    /// that one has none, rather than older ones, and denies until the agent is there.
    ///
    /// # Errors
    ///
    /// They cannot be written, and the older ones cannot be taken away.
    pub fn save(&self) -> io::Result<()> {
        let mut written = self.write();
        if written.is_err() {
            self.remove()?;
            // In the room that the older ones had.
            written = self.write();
        }
        self.kept.store(written.is_ok(), Ordering::Relaxed);
        if let Err(error) = written {
            tracing::error!(%error, "the rules cannot be kept: without the agent a restart denies");
        }
        Ok(())
    }

    fn remove(&self) -> io::Result<()> {
        match fs::remove_file(&self.file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Whether the rules were kept when that was tried last.
    pub fn is_kept(&self) -> bool {
        self.kept.load(Ordering::Relaxed)
    }

    fn write(&self) -> io::Result<()> {
        let snapshot = self.load();
        let kept = Kept { boot: &self.boot, rules: &snapshot.rules };
        replace(&self.file, &serde_json::to_vec(&kept)?, Lasting::UntilBoot).map(|_| ())
    }
}
