//! Loading, attaching and pinning. A second agent finds the pins of the first and takes over:
//! maps are reused, links get the new programs in one step each, so there is no instant without
//! a program.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs, io,
    net::IpAddr,
    panic,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Array, MapError, RingBuf},
    programs::{
        CgroupAttachMode, CgroupSockAddr, LinkOrder, Program, ProgramError, ProgramInfo,
        SchedClassifier, TcAttachType, TestRun, TestRunOptions,
        links::{FdLink, LinkError, PinnedLink},
        tc::{SchedClassifierLink, TcAttachOptions},
    },
};
use palisade_abi::{IpcacheKey, MasqueradeSettings, TunnelValue, map};

use crate::{
    events::EventReader,
    grace::Expedited,
    maps::{FlowStats, Maps, Metrics},
    pins,
    step::Kernel,
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("PALISADE_EBPF_OBJECT"));

/// The socket programs, by name; each is of the cgroup hook of the same name.
const SOCKET_PROGRAMS: [&str; 8] = [
    "connect4",
    "connect6",
    "sendmsg4",
    "sendmsg6",
    "recvmsg4",
    "recvmsg6",
    "getpeername4",
    "getpeername6",
];
/// Those on the host side of a pod's veth.
const POD_PROGRAMS: [&str; 2] = ["from_pod", "to_pod"];
const PACKET_PROGRAMS: [&str; 7] =
    ["from_pod", "to_pod", "from_net", "from_underlay", "from_overlay", "to_net", "clock_probe"];

/// What an interface is to the node; its programs follow from that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The uplink, where pods of different nodes meet directly.
    Uplink,
    /// The uplink below an overlay.
    Underlay,
    /// The overlay itself.
    Overlay,
}

impl Side {
    /// Programs at the ingress and at the egress.
    const fn programs(self) -> [(&'static str, TcAttachType); 2] {
        let (ingress, egress) = match self {
            Self::Uplink => ("from_net", "to_net"),
            Self::Underlay => ("from_underlay", "to_net"),
            Self::Overlay => ("from_overlay", "to_net"),
        };
        [(ingress, TcAttachType::Ingress), (egress, TcAttachType::Egress)]
    }
}

/// Where a node keeps its eBPF objects.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directory in a bpffs, of this node alone.
    pub bpffs: PathBuf,
    /// cgroup v2 directory of the node's pods and processes.
    pub cgroup: PathBuf,
}

/// Why the data path cannot run.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum LoadError {
    #[error("cannot use {}: it must be a directory in a bpffs (mount -t bpf bpf /sys/fs/bpf)", path.display())]
    Bpffs { path: PathBuf, source: io::Error },
    #[error(
        "the kernel refuses the eBPF object (Linux 6.6 or later, root or CAP_BPF and CAP_NET_ADMIN are needed)"
    )]
    Object(#[from] EbpfError),
    #[error(
        "the kernel refuses the eBPF program {name} (Linux 6.6 or later, root or CAP_BPF and CAP_NET_ADMIN are needed)"
    )]
    Program { name: &'static str, source: ProgramError },
    #[error("the eBPF object has no {name}: it was built from other sources than this binary")]
    Missing { name: &'static str },
    #[error("the eBPF map {name}")]
    Map { name: &'static str, source: MapError },
    #[error("cannot use the cgroup {}: it must be a directory in a cgroup v2 hierarchy", path.display())]
    Cgroup { path: PathBuf, source: io::Error },
    #[error("cannot pin the link {}", path.display())]
    Pin { path: PathBuf, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("the interface {interface}: cannot attach {program}")]
    Attach { interface: String, program: &'static str, source: ProgramError },
    #[error("the event ring")]
    Events(#[source] io::Error),
}

/// A node's loaded programs and tables.
pub struct Datapath {
    object: Mutex<Ebpf>,
    maps: Arc<Maps>,
    links: PathBuf,
    cgroup: PathBuf,
    anew: bool,
    /// There while other tables are filled, see [`Self::is_anew`].
    begun: PathBuf,
}

impl Datapath {
    /// Loads the programs, with the tables that are pinned already where there are any, and
    /// attaches the socket programs, unless [`Self::is_anew`].
    ///
    /// # Errors
    /// See [`LoadError`].
    pub fn open(config: &Config) -> Result<Self, LoadError> {
        let tables = config.bpffs.join("maps");
        let links = config.bpffs.join("links");
        for path in [&tables, &links] {
            fs::create_dir_all(path)
                .map_err(|source| LoadError::Bpffs { path: path.clone(), source })?;
        }
        let begun = config.bpffs.join("anew");
        let anew = pins::make_way(OBJECT, &tables, &begun)?;
        let mut object = EbpfLoader::new().default_map_pin_directory(&tables).load(OBJECT)?;
        load_classifiers(&mut object)?;
        set_clock(&mut object)?;
        let maps = Arc::new(Maps::take(&mut object)?);
        let cgroup = config.cgroup.clone();
        let datapath = Self { object: Mutex::new(object), maps, links, cgroup, anew, begun };
        let maps = &datapath.maps;
        let revised = if anew { maps.begin_revisions() } else { maps.judge_again() };
        revised.map_err(|source| LoadError::Map { name: map::ENDPOINT_ROWS, source })?;
        if !anew {
            datapath.attach_sockets()?;
        }
        Ok(datapath)
    }

    /// Whether the tables are new and empty while programs of before judge by their own, of
    /// another layout. Then the programs here are to be attached when the tables are filled, which
    /// [`Self::taken_over`] ends.
    #[must_use]
    pub fn is_anew(&self) -> bool {
        self.anew
    }

    /// The programs here judge by their own tables everywhere: the next ones begin with these.
    ///
    /// # Errors
    /// [`LoadError::Bpffs`].
    pub fn taken_over(&self) -> Result<(), LoadError> {
        let path = self.begun.clone();
        fs::remove_dir(&path).map_err(|source| LoadError::Bpffs { path, source })
    }

    /// The tables.
    #[must_use]
    pub fn kernel(&self) -> Arc<dyn Kernel> {
        self.maps.clone()
    }

    /// Attaches the pod programs to the host side of a pod's veth. Repeating it is harmless.
    ///
    /// # Errors
    /// [`LoadError::Attach`] or [`LoadError::Pin`].
    pub fn attach_endpoint(&self, interface: &str) -> Result<(), LoadError> {
        let _expedited = Expedited::begin();
        self.attach_program(interface, "from_pod", TcAttachType::Ingress)?;
        self.attach_program(interface, "to_pod", TcAttachType::Egress)
    }

    /// Attaches the programs of an interface to other nodes, in place of those of another side.
    /// Repeating it is harmless.
    ///
    /// # Errors
    /// [`LoadError::Attach`], [`LoadError::Pin`] or [`LoadError::Map`].
    pub fn attach(&self, interface: &str, side: Side) -> Result<(), LoadError> {
        // Programs of before may keep masqueraded flows' ports elsewhere, and do so until the last.
        // Without the ports connections may be lost; without the programs nothing is judged.
        let recalled = self.recall_ports();
        for (program, direction) in side.programs() {
            self.attach_program(interface, program, direction)?;
        }
        recalled.and_then(|()| self.recall_ports())?;
        let old = match side {
            Side::Uplink => Side::Underlay,
            Side::Underlay => Side::Uplink,
            Side::Overlay => return Ok(()),
        };
        remove_pin(&self.pin(old.programs()[0].0, interface))
    }

    /// Removes the pins of an interface to other nodes that is gone.
    ///
    /// # Errors
    /// [`LoadError::Pin`].
    pub fn detach(&self, interface: &str, side: Side) -> Result<(), LoadError> {
        let mut programs = side.programs().into_iter();
        programs.try_for_each(|(program, _)| remove_pin(&self.pin(program, interface)))
    }

    /// Removes the pins of an interface that is gone or about to go.
    ///
    /// # Errors
    /// The pins cannot be removed.
    pub fn detach_endpoint(&self, interface: &str) -> io::Result<()> {
        for program in POD_PROGRAMS {
            match fs::remove_file(self.pin(program, interface)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether both pod programs are attached to the interface.
    #[must_use]
    pub fn is_attached(&self, interface: &str) -> bool {
        self.has_programs(
            interface,
            &[("from_pod", TcAttachType::Ingress), ("to_pod", TcAttachType::Egress)],
        )
    }

    /// Whether both programs of an interface to other nodes are attached to it.
    #[must_use]
    pub fn is_side_attached(&self, interface: &str, side: Side) -> bool {
        self.has_programs(interface, &side.programs())
    }

    /// Makes the table of tunnels hold exactly this: from which node alone which sources may come.
    ///
    /// # Errors
    /// The kernel refuses a read or a write.
    pub fn set_tunnels(&self, wanted: &BTreeMap<IpcacheKey, TunnelValue>) -> Result<(), LoadError> {
        self.maps
            .set_tunnels(wanted)
            .map_err(|source| LoadError::Map { name: map::TUNNELS, source })
    }

    /// Whether our programs, be they of before, judge what a pod's interface passes, both ways.
    #[must_use]
    pub fn is_judged(&self, interface: &str) -> bool {
        let directions = [TcAttachType::Ingress, TcAttachType::Egress];
        POD_PROGRAMS.into_iter().zip(directions).all(|(name, direction)| {
            let is_it = |info: &ProgramInfo| info.name_as_str() == Some(name);
            SchedClassifier::query_tcx(interface, direction)
                .is_ok_and(|(_, attached)| attached.iter().any(is_it))
        })
    }

    /// Says whether pods are masqueraded, and with which addresses.
    ///
    /// # Errors
    /// The kernel refuses a read or a write.
    pub fn set_masquerade(&self, wanted: &MasqueradeSettings) -> Result<(), LoadError> {
        self.maps
            .set_masquerade(wanted)
            .map_err(|source| LoadError::Map { name: map::MASQUERADE, source })
    }

    fn has_programs(&self, interface: &str, programs: &[(&str, TcAttachType)]) -> bool {
        let object = self.lock();
        programs.iter().all(|(name, direction)| {
            let Some(Program::SchedClassifier(program)) = object.program(name) else {
                return false;
            };
            let Ok(own) = program.info() else { return false };
            SchedClassifier::query_tcx(interface, *direction)
                .is_ok_and(|(_, attached)| attached.iter().any(|info| info.id() == own.id()))
        })
    }

    /// Interfaces of pods that have pins, be they gone.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn pinned_interfaces(&self) -> io::Result<HashSet<String>> {
        let mut interfaces = HashSet::new();
        for entry in fs::read_dir(&self.links)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let interface = POD_PROGRAMS.iter().find_map(|program| {
                name.strip_prefix(program).and_then(|rest| rest.strip_prefix('-'))
            });
            interfaces.extend(interface.map(str::to_owned));
        }
        Ok(interfaces)
    }

    /// A reader of the event ring.
    ///
    /// # Errors
    /// The ring was taken already, or cannot be polled.
    pub fn events(&self) -> Result<EventReader, LoadError> {
        let ring =
            self.lock().take_map(map::EVENTS).ok_or(LoadError::Missing { name: map::EVENTS })?;
        let ring = RingBuf::try_from(ring)
            .map_err(|source| LoadError::Map { name: map::EVENTS, source })?;
        EventReader::new(ring).map_err(LoadError::Events)
    }

    /// Removes expired TCP flows, and frees what they had.
    ///
    /// # Errors
    /// The kernel's clock or its counts cannot be read.
    pub fn collect_flows(&self) -> Result<FlowStats, LoadError> {
        let now = jiffies(&mut self.lock())?;
        self.maps
            .collect_flows(now, monotonic_nanos())
            .map_err(|source| LoadError::Map { name: map::FLOW_COUNTS, source })
    }

    fn recall_ports(&self) -> Result<(), LoadError> {
        let now = jiffies(&mut self.lock())?;
        self.maps
            .recall_ports(now)
            .map_err(|source| LoadError::Map { name: map::MASQUERADED_TCP, source })
    }

    /// The pairs of addresses that have a live flow, the lower address first.
    ///
    /// # Errors
    /// The kernel's clock cannot be read.
    pub fn live_pairs(&self) -> Result<BTreeSet<(IpAddr, IpAddr)>, LoadError> {
        let now = jiffies(&mut self.lock())?;
        Ok(self.maps.live_pairs(now))
    }

    /// Counters of the data path.
    ///
    /// # Errors
    /// The kernel refuses to read.
    pub fn metrics(&self) -> Result<Metrics, LoadError> {
        self.maps.metrics().map_err(|source| LoadError::Map { name: map::METRICS, source })
    }

    /// Runs a pod program on a packet without sending it (`BPF_PROG_TEST_RUN`), as if it had been
    /// met on interface `ifindex` of the caller's network namespace. Returns the tc action.
    ///
    /// # Errors
    /// The kernel refuses the run.
    pub fn test_run(
        &self,
        program: &'static str,
        ifindex: u32,
        frame: &[u8],
        repeat: u32,
    ) -> Result<(u32, Duration), LoadError> {
        // Offset of `ifindex` in `struct __sk_buff` (linux/bpf.h).
        const IFINDEX: usize = 40;
        let mut context = [0_u8; 192];
        context[IFINDEX..IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
        let mut object = self.lock();
        let options = TestRunOptions {
            data_in: Some(frame),
            ctx_in: Some(&context),
            repeat,
            ..TestRunOptions::new()
        };
        let result = classifier(&mut object, program)?
            .test_run(options)
            .map_err(|source| LoadError::Program { name: program, source })?;
        Ok((result.return_value, result.duration))
    }

    fn lock(&self) -> MutexGuard<'_, Ebpf> {
        self.object.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pin(&self, program: &str, target: &str) -> PathBuf {
        self.links.join(format!("{program}-{target}"))
    }

    fn attach_program(
        &self,
        interface: &str,
        name: &'static str,
        direction: TcAttachType,
    ) -> Result<(), LoadError> {
        let pin = self.pin(name, interface);
        let mut object = self.lock();
        let program = classifier(&mut object, name)?;
        if let Some(old) = pinned(&pin)?
            && let Ok(link) = SchedClassifierLink::try_from(old)
            && let Ok(id) = program.attach_to_link(link)
        {
            // The pin keeps the link; letting go of our handle changes nothing.
            drop(program.take_link(id));
            return Ok(());
        }
        let attach =
            |source| LoadError::Attach { interface: interface.to_owned(), program: name, source };
        let options = TcAttachOptions::TcxOrder(LinkOrder::first());
        let id = program.attach_with_options(interface, direction, options).map_err(attach)?;
        let link = program.take_link(id).map_err(attach)?;
        let link = FdLink::try_from(link).map_err(|error| pin_error(&pin, error))?;
        // What may be left is a pin that outlived its interface, or a link that cannot be updated:
        // it goes only now that another judges the packets.
        remove_pin(&pin)?;
        link.pin(&pin).map_err(|error| pin_error(&pin, error))?;
        Ok(())
    }

    /// Attaches the socket programs.
    ///
    /// # Errors
    /// [`LoadError::Cgroup`], [`LoadError::Program`] or [`LoadError::Pin`].
    pub fn attach_sockets(&self) -> Result<(), LoadError> {
        let directory = fs::File::open(&self.cgroup)
            .map_err(|source| LoadError::Cgroup { path: self.cgroup.clone(), source })?;
        let mut object = self.lock();
        for name in SOCKET_PROGRAMS {
            let pin = self.pin(name, "cgroup");
            let refused = |source| LoadError::Program { name, source };
            let program: &mut CgroupSockAddr = object
                .program_mut(name)
                .ok_or(LoadError::Missing { name })?
                .try_into()
                .map_err(refused)?;
            program.load().map_err(refused)?;
            // aya cannot update a cgroup link. A second link beside the first is harmless (an
            // address that is translated is no Service's any more), and the first goes when its
            // pin does.
            // A link always lets others attach beside it; the kernel wants no flag for that.
            let id = program.attach(&directory, CgroupAttachMode::Single).map_err(refused)?;
            let link = program.take_link(id).map_err(refused)?;
            let link = FdLink::try_from(link).map_err(|error| pin_error(&pin, error))?;
            remove_pin(&pin)?;
            link.pin(&pin).map_err(|error| pin_error(&pin, error))?;
        }
        Ok(())
    }
}

/// Loads the packet programs side by side: the kernel takes a large part of a second to verify them
/// all, and verifies those of a privileged user on as many cores as there are.
fn load_classifiers(object: &mut Ebpf) -> Result<(), LoadError> {
    let programs = object.programs_mut().filter_map(|(found, program)| {
        let name = PACKET_PROGRAMS.into_iter().find(|name| *name == found)?;
        Some((name, program))
    });
    thread::scope(|scope| {
        let load = |(name, program)| scope.spawn(move || load_classifier(name, program));
        let loads: Vec<_> = programs.map(load).collect();
        loads
            .into_iter()
            .try_for_each(|load| load.join().unwrap_or_else(|cause| panic::resume_unwind(cause)))
    })
}

fn load_classifier(name: &'static str, program: &mut Program) -> Result<(), LoadError> {
    let refused = |source| LoadError::Program { name, source };
    let program: &mut SchedClassifier = program.try_into().map_err(refused)?;
    program.load().map_err(refused)
}

fn classifier<'a>(
    object: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, LoadError> {
    object
        .program_mut(name)
        .ok_or(LoadError::Missing { name })?
        .try_into()
        .map_err(|source| LoadError::Program { name, source })
}

fn pin_error(
    path: &Path,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> LoadError {
    LoadError::Pin { path: path.to_owned(), source: source.into() }
}

fn pinned(path: &Path) -> Result<Option<FdLink>, LoadError> {
    match PinnedLink::from_pin(path) {
        Ok(link) => Ok(Some(link.into())),
        Err(LinkError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(error) => Err(pin_error(path, error)),
    }
}

pub(crate) fn remove_pin(path: &Path) -> Result<(), LoadError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(pin_error(path, error)),
        _ => Ok(()),
    }
}

/// The low 32 bits of the kernel's jiffies.
fn jiffies(object: &mut Ebpf) -> Result<u32, LoadError> {
    const NAME: &str = "clock_probe";
    // The kernel wants at least an Ethernet and an IP header to run a tc program on.
    let frame = [0_u8; 64];
    let options = TestRunOptions { data_in: Some(&frame), ..TestRunOptions::new() };
    let result = classifier(object, NAME)?
        .test_run(options)
        .map_err(|source| LoadError::Program { name: NAME, source })?;
    Ok(result.return_value)
}

fn monotonic_nanos() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let (seconds, nanos) = (time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs());
    seconds * 1_000_000_000 + nanos
}

/// Finds the kernel's timer frequency and tells it the programs. Jiffies start at −300 seconds
/// (`INITIAL_JIFFIES`, linux/jiffies.h), so that one reading and the monotonic clock suffice.
fn set_clock(object: &mut Ebpf) -> Result<(), LoadError> {
    const NAME: &str = "SETTINGS";
    let now = jiffies(object)?;
    let millis = monotonic_nanos() / 1_000_000;
    let hz = [100_u32, 250, 300, 1000]
        .into_iter()
        .min_by_key(|hz| {
            let expected = (millis * u64::from(*hz) / 1000) as u32;
            let expected = expected.wrapping_sub(300 * hz);
            now.wrapping_sub(expected).cast_signed().unsigned_abs()
        })
        .unwrap_or(250);
    let map = object.map_mut(NAME).ok_or(LoadError::Missing { name: NAME })?;
    let wrong = |source| LoadError::Map { name: NAME, source };
    let mut settings: Array<_, u32> = Array::try_from(map).map_err(wrong)?;
    settings.set(0, hz, 0).map_err(wrong)
}
