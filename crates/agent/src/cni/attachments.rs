//! The CNI operations. An attachment is made in steps, each recorded once it is done; a failure
//! undoes them in reverse, and a restarted agent finds what a crash left half done.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use ipnet::IpNet;
use palisade_api::cni::{
    Add, Address, Attached, Attachment, Check, Code, ContainerId, Failure, Gc, Interface, Route,
    deletion_queue,
};
use palisade_datapath::netlink::{
    LINK_LOCAL_ROUTER, NamespaceError, NetNs, Netlink, NetlinkError, PodAddress, PodLink, VethPair,
};
use tokio::sync::OwnedMutexGuard;
use tracing::{info, warn};

use super::store::{Phase, Record, Store, attachments_in};
use super::{Addresses, Endpoints, HostLink, NewEndpoint, Readiness};
use crate::ipam::{Ipam, IpamError};

/// What is left of the plugin's patience for undoing and answering.
const MARGIN: Duration = Duration::from_secs(2);
/// The mark of which addresses come next is set each time that so many were given, twice as far ahead.
const MARK_EACH: u32 = 16;

/// Where the server keeps its things.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The node's name, for people.
    pub node: String,
    /// The socket that the plugin connects to.
    pub socket: PathBuf,
    /// The directory of records; it outlives the agent.
    pub records: PathBuf,
    /// The largest packet of pods' interfaces.
    pub mtu: u32,
}

/// What an earlier agent left.
#[derive(Debug, Default)]
pub struct Restored {
    /// Attachments in force: program them again.
    pub live: Vec<Record>,
    /// Attachments that are gone; their links and addresses are cleaned up already.
    pub gone: Vec<Record>,
}

/// All attachments of the node, before there is anybody to program them.
pub struct Attachments {
    pub(super) settings: Settings,
    node: Netlink,
    ipam: Mutex<Ipam>,
    store: Store,
    records: Mutex<HashMap<Attachment, Record>>,
    /// Addresses that the kernel still routes to interfaces without a record, by the interface's
    /// name: they stay taken until the interface goes.
    unrecorded: Mutex<HashMap<String, Vec<Addresses>>>,
    locks: Mutex<HashMap<ContainerId, Weak<tokio::sync::Mutex<()>>>>,
    /// How many ADDs were given addresses.
    given: tokio::sync::Mutex<u32>,
}

/// A finished step of an ADD.
#[derive(Debug, Clone, Copy)]
enum Step {
    Recorded,
    Linked,
    Programmed,
}

impl Attachments {
    /// Takes over what an earlier agent recorded: finished attachments whose interface exists
    /// stay, everything else is undone. Deletions queued meanwhile are carried out.
    pub async fn restore(
        settings: Settings,
        ipam: Ipam,
        node: Netlink,
    ) -> Result<(Self, Restored), Failure> {
        let store = Store::open(settings.records.clone()).map_err(state_error)?;
        let (records, unreadable) = store.load().map_err(state_error)?;
        let queue = deletion_queue(&settings.socket);
        let queued = attachments_in(&queue).map_err(state_error)?;
        let links = node.links().await.map_err(kernel_error)?;
        let this = Self {
            settings,
            node,
            ipam: Mutex::new(ipam),
            store,
            records: Mutex::default(),
            unrecorded: Mutex::default(),
            locks: Mutex::default(),
            given: tokio::sync::Mutex::default(),
        };
        for attachment in unreadable {
            warn!("the record of {attachment} is damaged: its interface is removed");
            this.node.delete_link(&host_ifname(&attachment)).await.map_err(kernel_error)?;
            this.store.remove(&attachment).map_err(state_error)?;
        }
        let mut restored = Restored::default();
        for mut record in records {
            let link = links.iter().find(|link| link.name == record.host.name);
            let finished = matches!(record.phase, Phase::Committed(_));
            match link {
                Some(link) if finished && !queued.contains(&record.attachment) => {
                    record.host.ifindex = link.ifindex;
                    this.ipam().restore(&record.addresses).map_err(|error| {
                        Failure::new(Code::Failed, format!("{}: {error}", record.attachment))
                    })?;
                    this.records().insert(record.attachment.clone(), record.clone());
                    restored.live.push(record);
                }
                _ => {
                    this.node.delete_link(&record.host.name).await.map_err(kernel_error)?;
                    this.store.remove(&record.attachment).map_err(state_error)?;
                    restored.gone.push(record);
                }
            }
        }
        this.hold_back(&restored.gone);
        for attachment in queued {
            if !this.records().contains_key(&attachment) {
                this.unlink(&host_ifname(&attachment)).await?;
            }
            this.unqueue(&attachment).map_err(state_error)?;
        }
        this.keep_unrecorded_addresses().await?;
        match this.store.mark() {
            Ok(mark) => mark.iter().for_each(|mark| this.ipam().go_on_at(mark)),
            Err(error) => {
                warn!(%error, "cannot read which addresses come next: they may come again too soon");
            }
        }
        Ok((this, restored))
    }

    /// What pods had that are gone is given again last of all: other nodes may not have heard yet.
    fn hold_back(&self, gone: &[Record]) {
        for record in gone {
            let mut ipam = self.ipam();
            // A pod that lives may have them by now.
            if ipam.restore(&record.addresses).is_ok() {
                ipam.release(&record.addresses);
            }
        }
    }

    /// Records can be lost while pods run: an address that the kernel routes to an interface is
    /// in use, whatever the records say.
    async fn keep_unrecorded_addresses(&self) -> Result<(), Failure> {
        let links = self.node.links().await.map_err(kernel_error)?;
        let recorded: HashSet<u32> = self.records().values().map(|r| r.host.ifindex).collect();
        for route in self.node.routes().await.map_err(kernel_error)? {
            let Some(addresses) = host_address(route.dst) else { continue };
            let link = links.iter().find(|link| Some(link.ifindex) == route.ifindex);
            // The routers' own addresses lie on the loopback interface.
            let unrecorded = |link: &&palisade_datapath::netlink::Link| {
                !recorded.contains(&link.ifindex) && link.name != "lo"
            };
            let Some(link) = link.filter(unrecorded) else { continue };
            let (name, dst) = (&link.name, route.dst);
            match self.ipam().restore(&addresses) {
                Ok(()) => warn!("{dst} leads to {name}, which has no record: it stays taken"),
                Err(error) => {
                    warn!("{dst} leads to {name}, which has no record: {error}");
                    continue;
                }
            }
            guard(&self.unrecorded).entry(name.clone()).or_default().push(addresses);
        }
        Ok(())
    }

    /// The interface is gone, and with it its routes.
    fn release_unrecorded(&self, name: &str) {
        let released = guard(&self.unrecorded).remove(name).unwrap_or_default();
        for addresses in &released {
            self.ipam().release(addresses);
        }
    }

    /// The records of finished attachments.
    pub fn list(&self) -> Vec<Record> {
        let committed = |record: &&Record| matches!(record.phase, Phase::Committed(_));
        self.records().values().filter(committed).cloned().collect()
    }

    /// Pod addresses in use and in total of each family.
    pub fn usage(&self) -> Vec<(usize, u128)> {
        self.ipam().usage()
    }

    #[cfg(test)]
    pub(super) fn used_addresses(&self) -> usize {
        self.ipam().used()
    }

    pub(super) async fn add<E: Endpoints>(
        &self,
        endpoints: &E,
        add: Add,
        patience: Duration,
    ) -> Result<Attached, Failure> {
        let _lock = self.lock(&add.attachment.container_id).await;
        let attachment = &add.attachment;
        if self.records().contains_key(attachment) {
            return Err(exists(attachment));
        }
        let netns = Arc::new(NetNs::open(&add.netns).map_err(namespace_error)?);
        let pod = Netlink::of(netns).map_err(kernel_error)?;
        if pod.id() == self.node.id() {
            let path = add.netns.display();
            let message = format!("CNI_NETNS: {path} is the node's own network namespace");
            return Err(Failure::new(Code::InvalidEnvironment, message));
        }
        if pod.link(attachment.ifname.as_str()).await.map_err(kernel_error)?.is_some() {
            return Err(exists(attachment));
        }
        self.unqueue(attachment).map_err(state_error)?;
        let mut record = self.intend(&add)?;
        let mut done = Vec::new();
        let deadline = patience.saturating_sub(MARGIN);
        match self.attach(endpoints, &mut record, &pod, deadline, &mut done).await {
            Ok(()) => Ok(self.describe(&record)),
            Err(failure) => {
                self.undo(endpoints, &record, &done).await;
                Err(failure)
            }
        }
    }

    fn intend(&self, add: &Add) -> Result<Record, Failure> {
        let allocated = self.ipam().allocate();
        let addresses = allocated.map_err(|error| self.no_address(Code::TryAgain, &error))?;
        let attachment = add.attachment.clone();
        let [host_mac, mac] = macs(&attachment);
        Ok(Record {
            network: add.network.clone(),
            pod: add.pod.clone(),
            netns: add.netns.clone(),
            host: HostLink { name: host_ifname(&attachment), ifindex: 0, mac: host_mac },
            mac,
            addresses,
            phase: Phase::Intended,
            attachment,
        })
    }

    /// The order is what makes it safe: the interface is down and without addresses until its
    /// programs and its policy are in force.
    async fn attach<E: Endpoints>(
        &self,
        endpoints: &E,
        record: &mut Record,
        pod: &Netlink,
        deadline: Duration,
        done: &mut Vec<Step>,
    ) -> Result<(), Failure> {
        done.push(Step::Recorded);
        self.save(record).await?;
        self.set_mark().await;

        done.push(Step::Linked);
        let host = self.create_link(record, pod).await.map_err(kernel_error)?;
        record.host.ifindex = host.ifindex;

        done.push(Step::Programmed);
        let endpoint = NewEndpoint {
            attachment: record.attachment.clone(),
            pod: record.pod.clone(),
            host: record.host.clone(),
            mac: record.mac,
            addresses: record.addresses,
            netns: record.netns.clone(),
        };
        let number = tokio::time::timeout(deadline, endpoints.add(endpoint))
            .await
            .map_err(|_| {
                let secs = deadline.as_secs();
                let pod = format!("{}/{}", record.pod.namespace, record.pod.name);
                let message = format!("the policy of pod {pod} was not in force within {secs} s");
                Failure::new(Code::TryAgain, message)
            })?
            .map_err(Failure::from)?;

        let link = PodLink {
            host,
            host_mac: record.host.mac,
            pod: record.attachment.ifname.to_string(),
            pod_mac: record.mac,
            addresses: self.pod_addresses(record),
            alias: alias_of(&record.attachment),
        };
        self.node.configure_pod(&link, pod).await.map_err(kernel_error)?;
        record.phase = Phase::Committed(number);
        self.save(record).await
    }

    async fn create_link(
        &self,
        record: &Record,
        pod: &Netlink,
    ) -> Result<palisade_datapath::netlink::Link, NetlinkError> {
        let pair = VethPair {
            host: record.host.name.clone(),
            host_mac: record.host.mac,
            pod: record.attachment.ifname.to_string(),
            pod_mac: record.mac,
            mtu: self.settings.mtu,
        };
        match self.node.create_veth(pair.clone(), pod.netns()).await {
            // The name is made from the attachment, which has no record: a leftover.
            Err(error) if error.is_exists() => {
                self.node.delete_link(&record.host.name).await?;
                self.release_unrecorded(&record.host.name);
                self.node.create_veth(pair, pod.netns()).await
            }
            result => result,
        }
    }

    async fn undo<E: Endpoints>(&self, endpoints: &E, record: &Record, done: &[Step]) {
        for step in done.iter().rev() {
            let undone = match step {
                // The interface may be up already, and must not outlive its programs.
                Step::Programmed => match self.unlink(&record.host.name).await {
                    Ok(()) => endpoints.remove(&record.attachment).await.map_err(Failure::from),
                    Err(failure) => Err(failure),
                },
                Step::Linked => self.unlink(&record.host.name).await,
                Step::Recorded => self.forget(record),
            };
            if let Err(failure) = undone {
                // The record stays, and with it the address: DEL, GC or a restart finish this.
                warn!("cannot undo step {step:?} of {}: {failure}", record.attachment);
                return;
            }
        }
    }

    pub(super) async fn del<E: Endpoints>(
        &self,
        endpoints: &E,
        attachment: &Attachment,
    ) -> Result<(), Failure> {
        let _lock = self.lock(&attachment.container_id).await;
        self.del_locked(endpoints, attachment).await
    }

    async fn del_locked<E: Endpoints>(
        &self,
        endpoints: &E,
        attachment: &Attachment,
    ) -> Result<(), Failure> {
        let record = self.records().get(attachment).cloned();
        // The interface first: it must not be up for a moment without its programs.
        self.unlink(&host_ifname(attachment)).await?;
        endpoints.remove(attachment).await?;
        if let Some(record) = record {
            self.forget(&record)?;
        }
        self.unqueue(attachment).map_err(state_error)
    }

    pub(super) async fn check<E: Endpoints>(
        &self,
        endpoints: &E,
        check: Check,
    ) -> Result<(), Failure> {
        let attachment = &check.attachment;
        let _lock = self.lock(&attachment.container_id).await;
        let record = self.records().get(attachment).cloned();
        let Some(record) = record.filter(|r| matches!(r.phase, Phase::Committed(_))) else {
            return Err(Failure::new(Code::UnknownContainer, format!("{attachment} is unknown")));
        };
        let pod = Netlink::of(Arc::new(NetNs::open(&check.netns).map_err(namespace_error)?))
            .map_err(kernel_error)?;
        self.check_pod_side(&pod, &record, &check).await?;
        // Before the node's side: an interface that cannot be guarded is taken down.
        endpoints.check(attachment).await?;
        self.check_host_side(&record).await
    }

    async fn check_pod_side(
        &self,
        pod: &Netlink,
        record: &Record,
        check: &Check,
    ) -> Result<(), Failure> {
        let name = record.attachment.ifname.as_str();
        let Some(link) = pod.link(name).await.map_err(kernel_error)? else {
            return Err(differs(format!("interface {name} is missing in the pod")));
        };
        let expected = check.mac.clone().unwrap_or_else(|| mac_text(record.mac));
        if !link.mac.is_some_and(|mac| mac_text(mac).eq_ignore_ascii_case(&expected)) {
            return Err(differs(format!("interface {name} does not have MAC address {expected}")));
        }
        if !link.up {
            return Err(differs(format!("interface {name} is down")));
        }
        let present = pod.addresses().await.map_err(kernel_error)?;
        let ours = self.pod_addresses(record);
        let own = ours.iter().map(|pod| IpNet::from(pod.address));
        for address in own.chain(check.addresses.iter().copied()) {
            if !present.iter().any(|a| a.ifindex == link.ifindex && a.address == address) {
                return Err(differs(format!("interface {name} does not have address {address}")));
            }
        }
        let routes = pod.routes().await.map_err(kernel_error)?;
        for route in default_routes(&ours).iter().chain(&check.routes) {
            let matches = |r: &palisade_datapath::netlink::Route| {
                r.dst == route.dst.trunc() && (route.gw.is_none() || r.gateway == route.gw)
            };
            if !routes.iter().any(matches) {
                return Err(differs(format!("the route to {} is missing in the pod", route.dst)));
            }
        }
        Ok(())
    }

    async fn check_host_side(&self, record: &Record) -> Result<(), Failure> {
        let name = &record.host.name;
        match self.node.link(name).await.map_err(kernel_error)? {
            Some(link) if link.up && link.ifindex == record.host.ifindex => {}
            Some(link) if link.up => {
                return Err(differs(format!("interface {name} is another one now")));
            }
            Some(_) => return Err(differs(format!("interface {name} is down"))),
            None => return Err(differs(format!("interface {name} is missing on the node"))),
        }
        let routes = self.node.routes().await.map_err(kernel_error)?;
        for pod in self.pod_addresses(record) {
            let dst = IpNet::from(pod.address);
            if !routes.iter().any(|r| r.dst == dst && r.ifindex == Some(record.host.ifindex)) {
                return Err(differs(format!("the route to {dst} is missing on the node")));
            }
        }
        Ok(())
    }

    /// Goes on after an error; the first one is reported.
    pub(super) async fn gc<E: Endpoints>(&self, endpoints: &E, gc: Gc) -> Result<(), Failure> {
        let stale: Vec<Attachment> = self
            .records()
            .values()
            .filter(|record| record.network == gc.network)
            .map(|record| record.attachment.clone())
            .filter(|attachment| !gc.valid.contains(attachment))
            .collect();
        let mut first = Ok(());
        for attachment in stale {
            info!("garbage collection removes {attachment}");
            first = first.and(self.del(endpoints, &attachment).await);
        }
        first
    }

    pub(super) async fn status<E: Endpoints>(&self, endpoints: &E) -> Result<(), Failure> {
        match endpoints.readiness().await {
            Readiness::Ready => {}
            Readiness::NotReady(why) => return Err(Failure::new(Code::NotAvailable, why)),
            Readiness::Impaired(why) => return Err(Failure::new(Code::LimitedConnectivity, why)),
        }
        let free = self.ipam().check_free();
        free.map_err(|error| self.no_address(Code::NotAvailable, &error))
    }

    /// Carries out the deletions that the plugin queued while nobody answered.
    pub(super) async fn drain<E: Endpoints>(&self, endpoints: &E) {
        let queued = match attachments_in(&deletion_queue(&self.settings.socket)) {
            Ok(queued) => queued,
            Err(error) => return warn!("cannot read the queue of deletions: {error}"),
        };
        for attachment in queued {
            let _lock = self.lock(&attachment.container_id).await;
            // Who attached the container since, took its deletion out.
            if !self.queued(&attachment).exists() {
                continue;
            }
            if let Err(failure) = self.del_locked(endpoints, &attachment).await {
                warn!("queued deletion of {attachment}: {failure}");
            }
        }
    }

    /// Where the plugin leaves the attachment's deletion.
    fn queued(&self, attachment: &Attachment) -> PathBuf {
        deletion_queue(&self.settings.socket).join(attachment.file_name())
    }

    fn unqueue(&self, attachment: &Attachment) -> io::Result<()> {
        match std::fs::remove_file(self.queued(attachment)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    async fn save(&self, record: &Record) -> Result<(), Failure> {
        let (store, copy) = (self.store.clone(), record.clone());
        let written = tokio::task::spawn_blocking(move || store.write(&copy)).await;
        written.map_err(|error| state_error(io::Error::other(error)))?.map_err(state_error)?;
        self.records().insert(record.attachment.clone(), record.clone());
        Ok(())
    }

    /// Sees to it that an agent that starts again begins ahead of all addresses that were given.
    async fn set_mark(&self) {
        let mut given = self.given.lock().await;
        if given.is_multiple_of(MARK_EACH) {
            let (store, mark) = (self.store.clone(), self.ipam().ahead(2 * MARK_EACH));
            let written = tokio::task::spawn_blocking(move || store.write_mark(&mark)).await;
            if let Err(error) = written.map_err(io::Error::other).flatten() {
                warn!(%error, "cannot write which addresses come next: they may come again too soon");
                return;
            }
        }
        *given = given.wrapping_add(1);
    }

    fn forget(&self, record: &Record) -> Result<(), Failure> {
        self.store.remove(&record.attachment).map_err(state_error)?;
        self.records().remove(&record.attachment);
        self.ipam().release(&record.addresses);
        Ok(())
    }

    async fn unlink(&self, name: &str) -> Result<(), Failure> {
        self.node.delete_link(name).await.map_err(kernel_error)?;
        self.release_unrecorded(name);
        Ok(())
    }

    fn describe(&self, record: &Record) -> Attached {
        let mtu = self.settings.mtu;
        let addresses = self.pod_addresses(record);
        Attached {
            host: Interface { name: record.host.name.clone(), mac: mac_text(record.host.mac), mtu },
            pod: Interface {
                name: record.attachment.ifname.to_string(),
                mac: mac_text(record.mac),
                mtu,
            },
            routes: default_routes(&addresses),
            addresses: addresses
                .iter()
                .map(|pod| Address { address: IpNet::from(pod.address), gateway: pod.router })
                .collect(),
        }
    }

    fn pod_addresses(&self, record: &Record) -> Vec<PodAddress> {
        let router = self.ipam().routers().into_iter().find(IpAddr::is_ipv4);
        let v4 = record.addresses.ipv4.zip(router);
        let v4 = v4.map(|(address, router)| PodAddress { address: address.into(), router });
        let v6 = record.addresses.ipv6.map(|address| PodAddress {
            address: address.into(),
            router: LINK_LOCAL_ROUTER.into(),
        });
        v4.into_iter().chain(v6).collect()
    }

    /// One operation at a time for each container.
    async fn lock(&self, container: &ContainerId) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = guard(&self.locks);
            locks.retain(|_, lock| lock.strong_count() > 0);
            let lock = locks.get(container).and_then(Weak::upgrade).unwrap_or_default();
            locks.insert(container.clone(), Arc::downgrade(&lock));
            lock
        };
        lock.lock_owned().await
    }

    fn no_address(&self, code: Code, error: &IpamError) -> Failure {
        Failure::new(code, format!("node {}: {error}", self.settings.node))
    }

    fn ipam(&self) -> MutexGuard<'_, Ipam> {
        guard(&self.ipam)
    }

    fn records(&self) -> MutexGuard<'_, HashMap<Attachment, Record>> {
        guard(&self.records)
    }
}

/// The address of a route to one host.
fn host_address(dst: IpNet) -> Option<Addresses> {
    if dst.prefix_len() != dst.max_prefix_len() {
        return None;
    }
    Some(match dst.addr() {
        IpAddr::V4(address) => Addresses { ipv4: Some(address), ipv6: None },
        IpAddr::V6(address) => Addresses { ipv4: None, ipv6: Some(address) },
    })
}

/// No code panics while it holds one of these locks for more than one write.
fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The finished attachments whose interface exists, before any of them is touched: what must be
/// judged from the very start, whatever else the agent has to wait for.
///
/// # Errors
/// The records or the interfaces cannot be read.
pub async fn recorded(directory: PathBuf, node: &Netlink) -> Result<Vec<Record>, Failure> {
    let store = Store::open(directory).map_err(state_error)?;
    let (mut records, _) = store.load().map_err(state_error)?;
    let links = node.links().await.map_err(kernel_error)?;
    records.retain_mut(|record| {
        let link = links.iter().find(|link| link.name == record.host.name);
        record.host.ifindex = link.map_or(0, |link| link.ifindex);
        link.is_some() && matches!(record.phase, Phase::Committed(_))
    });
    Ok(records)
}

/// The name of the node's side of an attachment's veth pair.
pub fn host_ifname(attachment: &Attachment) -> String {
    format!("lxc{:010x}", hash(attachment) >> 24)
}

/// The text on the node's side of an attachment's veth pair.
pub fn alias_of(attachment: &Attachment) -> String {
    format!("palisade {attachment}")
}

fn macs(attachment: &Attachment) -> [[u8; 6]; 2] {
    let [a, b, c, d, ..] = hash(attachment).to_be_bytes();
    // Locally administered, unicast; the ends differ in the second byte.
    [[2, 0, a, b, c, d], [2, 1, a, b, c, d]]
}

/// FNV-1a with a final mix, so that the upper bits are as good as the lower ones.
fn hash(attachment: &Attachment) -> u64 {
    let text = attachment.file_name();
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^ (hash >> 33)
}

fn mac_text(mac: [u8; 6]) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

fn default_routes(addresses: &[PodAddress]) -> Vec<Route> {
    addresses
        .iter()
        .map(|pod| {
            let everywhere = match pod.address {
                IpAddr::V4(_) => IpNet::new_assert(Ipv4Addr::UNSPECIFIED.into(), 0),
                IpAddr::V6(_) => IpNet::new_assert(Ipv6Addr::UNSPECIFIED.into(), 0),
            };
            Route { dst: everywhere, gw: Some(pod.router) }
        })
        .collect()
}

fn exists(attachment: &Attachment) -> Failure {
    Failure::new(Code::AlreadyExists, format!("{attachment} exists already; DEL it first"))
}

fn differs(message: String) -> Failure {
    Failure::new(Code::Differs, message)
}

fn namespace_error(error: NamespaceError) -> Failure {
    let code = match &error {
        NamespaceError::NotFound(_) => Code::UnknownContainer,
        NamespaceError::WrongKind(_) => Code::InvalidEnvironment,
        NamespaceError::Open { .. } => Code::TryAgain,
    };
    Failure::new(code, format!("CNI_NETNS: {error}"))
}

fn kernel_error(error: NetlinkError) -> Failure {
    Failure::new(Code::Failed, error.to_string())
}

fn state_error(error: io::Error) -> Failure {
    let message = format!("the agent cannot write its records of attachments: {error}");
    Failure::new(Code::TryAgain, message)
}
