//! The private network between the nodes: a bridge in a network namespace of its own.

use std::future::Future;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::{fs, io};

use anyhow::Context;
use futures::TryStreamExt;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressScope,
};
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth, RouteMessageBuilder};

use crate::layout::{API_PORT, FABRIC_NETNS, FABRIC_V4, FABRIC_V6, MTU, NodePlan};
use crate::sys::netns;

const BRIDGE: &str = "fabric";
/// The nodes' interface to the fabric.
pub const UPLINK: &str = "eth0";

/// Creates the fabric and the nodes' network namespaces.
pub fn create(nodes: &[NodePlan]) -> anyhow::Result<()> {
    let path = netns::create(FABRIC_NETNS).context("cannot create the fabric's namespace")?;
    within(&path, build_bridge).context("cannot build the fabric")?;
    for node in nodes {
        add_node(&path, node).with_context(|| format!("cannot build {}", node.name))?;
    }
    Ok(())
}

async fn build_bridge() -> anyhow::Result<()> {
    settings()?;
    let handle = connect()?;
    up(&handle, "lo").await?;
    handle.link().add(LinkBridge::new(BRIDGE).mtu(MTU).up().build()).execute().await?;
    let bridge = index(&handle, BRIDGE).await?;
    for (address, length) in [(IpAddr::from(FABRIC_V4), 24), (FABRIC_V6.into(), 64)] {
        add_address(&handle, bridge, address, length).await?;
    }
    Ok(())
}

fn add_node(fabric: &Path, node: &NodePlan) -> anyhow::Result<()> {
    let path = netns::create(&node.netns())?;
    // An interface takes the defaults of its namespace when it comes in, so they are set before.
    within(&path, || async { Ok(settings()?) })?;
    let target = fs::File::open(&path)?;
    let plan = node.clone();
    within(fabric, move || async move {
        let handle = connect()?;
        let port = plan.name.as_str();
        let bridge = index(&handle, BRIDGE).await?;
        let veth = LinkVeth::new(port, UPLINK).mtu(MTU).controller(bridge).up().build();
        handle.link().add(veth).execute().await.context("veth")?;
        // The other end is made here under a name that may stand for another node's for a moment.
        let peer = index(&handle, UPLINK).await?;
        let moved = LinkUnspec::new_with_index(peer).setns_by_fd(target.as_raw_fd()).build();
        handle.link().set(moved).execute().await.context("moving the uplink")?;
        // What the machine sends to pods goes by way of their node.
        let (v4, v6) = (plan.pods_v4(), plan.pods_v6());
        let route = RouteMessageBuilder::<std::net::Ipv4Addr>::new()
            .destination_prefix(v4.addr(), v4.prefix_len())
            .gateway(plan.v4())
            .build();
        handle.route().add(route).execute().await.context("route")?;
        let route = RouteMessageBuilder::<std::net::Ipv6Addr>::new()
            .destination_prefix(v6.addr(), v6.prefix_len())
            .gateway(plan.v6())
            .build();
        handle.route().add(route).execute().await.context("route")?;
        Ok(())
    })?;
    let plan = node.clone();
    within(&path, move || async move {
        let handle = connect()?;
        up(&handle, "lo").await?;
        let uplink = index(&handle, UPLINK).await?;
        handle
            .link()
            .set(LinkUnspec::new_with_index(uplink).mtu(MTU).up().build())
            .execute()
            .await?;
        for (address, length) in [(IpAddr::from(plan.v4()), 24), (plan.v6().into(), 64)] {
            add_address(&handle, uplink, address, length).await?;
        }
        Ok(())
    })
}

/// Forwarding, and addresses that work at once instead of after duplicate detection.
fn settings() -> io::Result<()> {
    for (name, value) in [
        ("ipv4/ip_forward", "1"),
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
        ("ipv6/conf/all/disable_ipv6", "0"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv6/conf/default/forwarding", "1"),
        ("ipv6/conf/all/accept_ra", "0"),
        ("ipv6/conf/default/accept_ra", "0"),
        ("ipv6/conf/all/accept_dad", "0"),
        ("ipv6/conf/default/accept_dad", "0"),
    ] {
        fs::write(Path::new("/proc/sys/net").join(name), value)
            .map_err(|error| io::Error::new(error.kind(), format!("net/{name}: {error}")))?;
    }
    Ok(())
}

fn connect() -> io::Result<Handle> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    tokio::spawn(connection);
    Ok(handle)
}

async fn up(handle: &Handle, name: &str) -> anyhow::Result<()> {
    let link = LinkUnspec::new_with_index(index(handle, name).await?).up().build();
    handle.link().set(link).execute().await.with_context(|| format!("setting {name} up"))
}

/// Without duplicate detection: even one that is switched off leaves the address unusable until the
/// kernel gets round to it.
async fn add_address(
    handle: &Handle,
    interface: u32,
    address: IpAddr,
    length: u8,
) -> anyhow::Result<()> {
    let mut request = handle.address().add(interface, address, length);
    let message = request.message_mut();
    message.header.flags = AddressHeaderFlags::Nodad;
    message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    Ok(request.execute().await?)
}

async fn index(handle: &Handle, name: &str) -> anyhow::Result<u32> {
    let link = handle.link().get().match_name(name.to_owned()).execute().try_next().await?;
    Ok(link.with_context(|| format!("no interface {name}"))?.header.index)
}

/// The addresses at which a node is reached, IPv4 first.
pub fn addresses(node: &NodePlan) -> anyhow::Result<Vec<IpAddr>> {
    within(&node.netns_path(), || async {
        let handle = connect()?;
        let uplink = index(&handle, UPLINK).await?;
        let request = handle.address().get().set_link_index_filter(uplink);
        let found: Vec<_> = request.execute().try_collect().await?;
        let of_message = |attributes: Vec<AddressAttribute>| {
            attributes.into_iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(address),
                _ => None,
            })
        };
        let global = found.into_iter().filter(|it| it.header.scope == AddressScope::Universe);
        let mut addresses: Vec<IpAddr> =
            global.filter_map(|message| of_message(message.attributes)).collect();
        addresses.sort_by_key(IpAddr::is_ipv6);
        Ok(addresses)
    })
}

/// Runs `work` in the network namespace at `path`, with a runtime of its own.
fn within<T, F, W>(path: &Path, work: W) -> anyhow::Result<T>
where
    T: Send + 'static,
    F: Future<Output = anyhow::Result<T>>,
    W: FnOnce() -> F + Send + 'static,
{
    netns::run_in(path, move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(work()))
    })?
}

/// Listens for the nodes: the sockets belong to the fabric for ever.
pub fn listen() -> anyhow::Result<Vec<TcpListener>> {
    let addresses =
        [SocketAddr::from((FABRIC_V4, API_PORT)), SocketAddr::from((FABRIC_V6, API_PORT))];
    Ok(netns::run_in(&netns::path(FABRIC_NETNS), move || {
        addresses.into_iter().map(TcpListener::bind).collect()
    })?)
}
