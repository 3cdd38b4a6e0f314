//! Netlink messages from and to plain values.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use ipnet::IpNet;
use palisade_abi::{ROUTE_PROTOCOL, VXLAN_PORT};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, InfoVxlan,
    LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteIp6Tunnel, RouteIpTunnel,
    RouteLwEnCapType, RouteLwTunnelEncap, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;

use super::overlay::{self, Traveller, Tunnel};
use super::socket::Call;
use super::{Address, Link, NetNs, Route, VethPair};

/// The main routing table.
pub(super) const TABLE_MAIN: u32 = RouteHeader::RT_TABLE_MAIN as u32;

pub(super) fn create_veth(pair: &VethPair, pod_netns: &NetNs) -> Call {
    let mut peer = LinkMessage::default();
    peer.attributes = side(&pair.pod, pair.pod_mac, pair);
    peer.attributes.push(LinkAttribute::NetNsFd(pod_netns.as_fd().as_raw_fd()));

    let mut message = LinkMessage::default();
    message.attributes = side(&pair.host, pair.host_mac, pair);
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
    ]));
    Call {
        what: format!("create interfaces {} and {}", pair.host, pair.pod),
        message: RouteNetlinkMessage::NewLink(message),
        flags: NLM_F_CREATE | NLM_F_EXCL,
        ignore: &[],
    }
}

fn side(name: &str, mac: [u8; 6], pair: &VethPair) -> Vec<LinkAttribute> {
    vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Address(mac.to_vec()),
        LinkAttribute::Mtu(pair.mtu),
    ]
}

/// One interface for all other nodes: who an envelope goes to is said by each route, and who it came
/// from with each packet. Without ARP a frame bears its sender's own address as destination.
pub(super) fn create_overlay(name: &str, mtu: u32) -> Call {
    let mut message = LinkMessage::default();
    message.header.flags = LinkFlags::Noarp;
    message.header.change_mask = LinkFlags::Noarp;
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Mtu(mtu),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vxlan),
            LinkInfo::Data(InfoData::Vxlan(vec![
                InfoVxlan::CollectMetadata(true),
                InfoVxlan::Learning(false),
                InfoVxlan::Port(VXLAN_PORT),
            ])),
        ]),
    ];
    Call {
        what: format!("create interface {name}"),
        message: RouteNetlinkMessage::NewLink(message),
        flags: NLM_F_CREATE | NLM_F_EXCL,
        ignore: &[],
    }
}

/// Whether it is as [`create_overlay`] makes it.
pub(super) fn is_overlay(message: &RouteNetlinkMessage) -> bool {
    let RouteNetlinkMessage::NewLink(link) = message else { return false };
    let data = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(info) => info.iter().find_map(|info| match info {
            LinkInfo::Data(InfoData::Vxlan(data)) => Some(data),
            _ => None,
        }),
        _ => None,
    });
    data.is_some_and(|data| {
        data.contains(&InfoVxlan::CollectMetadata(true))
            && data.contains(&InfoVxlan::Port(VXLAN_PORT))
            && link.header.flags.contains(LinkFlags::Noarp)
    })
}

pub(super) fn link_mtu(ifindex: u32, mtu: u32) -> Call {
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    message.attributes.push(LinkAttribute::Mtu(mtu));
    call(format!("set interface {ifindex}'s MTU"), RouteNetlinkMessage::SetLink(message))
}

pub(super) fn replace_tunnel(tunnel: &Tunnel, ifindex: u32) -> Call {
    Call {
        what: format!("add route {} through the overlay to {}", tunnel.dst, tunnel.remote),
        message: RouteNetlinkMessage::NewRoute(tunnel_message(tunnel, ifindex)),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        ignore: &[],
    }
}

pub(super) fn delete_tunnel(tunnel: &Tunnel, ifindex: u32) -> Call {
    Call {
        what: format!("delete route {} through the overlay", tunnel.dst),
        message: RouteNetlinkMessage::DelRoute(tunnel_message(tunnel, ifindex)),
        flags: 0,
        ignore: &[Errno::SRCH],
    }
}

fn tunnel_message(tunnel: &Tunnel, ifindex: u32) -> RouteMessage {
    let mut route = Route::direct(tunnel.dst, ifindex);
    route.source = tunnel.source;
    let mut message = route_message(&route);
    message.header.table = RouteHeader::RT_TABLE_UNSPEC;
    message.attributes.push(RouteAttribute::Table(tunnel.table()));
    let (kind, encap) = match (tunnel.remote, tunnel.local) {
        (IpAddr::V4(remote), IpAddr::V4(local)) => {
            let ends = [RouteIpTunnel::Destination(remote), RouteIpTunnel::Source(local)];
            (RouteLwEnCapType::Ip, ends.map(RouteLwTunnelEncap::Ip).to_vec())
        }
        (remote, local) => {
            let ends =
                [RouteIp6Tunnel::Destination(to_v6(remote)), RouteIp6Tunnel::Source(to_v6(local))];
            (RouteLwEnCapType::Ip6, ends.map(RouteLwTunnelEncap::Ip6).to_vec())
        }
    };
    message.attributes.extend([RouteAttribute::EncapType(kind), RouteAttribute::Encap(encap)]);
    message
}

fn to_v6(address: IpAddr) -> std::net::Ipv6Addr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

/// A route through the overlay.
pub(super) fn to_tunnel(message: &RouteNetlinkMessage, ifindex: u32) -> Option<Tunnel> {
    let RouteNetlinkMessage::NewRoute(message) = message else { return None };
    if u8::from(message.header.protocol) != ROUTE_PROTOCOL
        || !message.attributes.contains(&RouteAttribute::Oif(ifindex))
    {
        return None;
    }
    let mut table = u32::from(message.header.table);
    let (mut dst, mut source, mut remote, mut local) = (None, None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(value) => table = *value,
            RouteAttribute::Destination(value) => dst = to_ip(value),
            RouteAttribute::PrefSource(value) => source = to_ip(value),
            RouteAttribute::Encap(encap) => {
                for end in encap {
                    match end {
                        RouteLwTunnelEncap::Ip(RouteIpTunnel::Destination(ip)) => {
                            remote = Some(IpAddr::V4(*ip));
                        }
                        RouteLwTunnelEncap::Ip(RouteIpTunnel::Source(ip)) => {
                            local = Some(IpAddr::V4(*ip));
                        }
                        RouteLwTunnelEncap::Ip6(RouteIp6Tunnel::Destination(ip)) => {
                            remote = Some(IpAddr::V6(*ip));
                        }
                        RouteLwTunnelEncap::Ip6(RouteIp6Tunnel::Source(ip)) => {
                            local = Some(IpAddr::V6(*ip));
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let traveller = match table {
        TABLE_MAIN => Traveller::Anybody,
        overlay::TABLE => Traveller::Pods,
        _ => return None,
    };
    let dst = IpNet::new(dst?, message.header.destination_prefix_length).ok()?;
    Some(Tunnel { dst, remote: remote?, local: local?, source, traveller })
}

/// A rule: packets from a network use `table` first.
pub(super) fn source_rule(network: IpNet, table: u32, priority: u32) -> Call {
    let mut message = RuleMessage::default();
    message.header.family = family(network.addr());
    message.header.src_len = network.prefix_len();
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Priority(priority),
        RuleAttribute::Source(network.network()),
        RuleAttribute::Table(table),
        RuleAttribute::Protocol(RouteProtocol::from(ROUTE_PROTOCOL)),
    ];
    Call {
        what: format!("add a rule for {network} to table {table}"),
        message: RouteNetlinkMessage::NewRule(message),
        flags: NLM_F_CREATE | NLM_F_EXCL,
        ignore: &[Errno::EXIST],
    }
}

pub(super) fn all_rules(family: AddressFamily) -> RouteNetlinkMessage {
    let mut message = RuleMessage::default();
    message.header.family = family;
    RouteNetlinkMessage::GetRule(message)
}

/// Removes the rule if it leads to `table`.
pub(super) fn delete_rule_of(rule: RuleMessage, table: u32) -> Option<Call> {
    rule.attributes.contains(&RuleAttribute::Table(table)).then(|| Call {
        what: format!("delete a rule to table {table}"),
        message: RouteNetlinkMessage::DelRule(rule),
        flags: 0,
        ignore: &[Errno::NOENT],
    })
}

pub(super) fn get_link(name: &str) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    RouteNetlinkMessage::GetLink(message)
}

pub(super) fn delete_link(name: &str) -> Call {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    call(format!("delete interface {name}"), RouteNetlinkMessage::DelLink(message))
}

pub(super) fn link_up(ifindex: u32) -> Call {
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    call(format!("bring interface {ifindex} up"), RouteNetlinkMessage::SetLink(message))
}

pub(super) fn link_down(ifindex: u32) -> Call {
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    message.header.change_mask = LinkFlags::Up;
    call(format!("take interface {ifindex} down"), RouteNetlinkMessage::SetLink(message))
}

/// No automatic link-local address, hence no duplicate detection and no router solicitation.
pub(super) fn link_quiet(ifindex: u32) -> Call {
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    message.attributes.push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![
        AfSpecInet6::AddrGenMode(In6AddrGenMode::None),
    ])]));
    call(
        format!("set interface {ifindex}'s IPv6 address generation"),
        RouteNetlinkMessage::SetLink(message),
    )
}

pub(super) fn link_alias(ifindex: u32, alias: &str) -> Call {
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    message.attributes.push(LinkAttribute::IfAlias(alias.to_owned()));
    call(format!("set interface {ifindex}'s alias"), RouteNetlinkMessage::SetLink(message))
}

pub(super) fn add_address(ifindex: u32, address: IpNet) -> Call {
    let mut message = AddressMessage::default();
    message.header.family = family(address.addr());
    message.header.prefix_len = address.prefix_len();
    message.header.index = ifindex;
    if let IpAddr::V6(v6) = address.addr() {
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        if v6.is_unicast_link_local() {
            message.header.scope = AddressScope::Link;
        }
    }
    message.attributes.push(AddressAttribute::Local(address.addr()));
    message.attributes.push(AddressAttribute::Address(address.addr()));
    // Whoever cleans the node knows by this what is ours.
    message.attributes.push(AddressAttribute::Protocol(ROUTE_PROTOCOL.into()));
    Call {
        what: format!("add address {address} to interface {ifindex}"),
        message: RouteNetlinkMessage::NewAddress(message),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        ignore: &[Errno::EXIST],
    }
}

pub(super) fn permanent_neighbour(ifindex: u32, address: IpAddr, mac: [u8; 6]) -> Call {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = ifindex;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    let destination = match address {
        IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
        IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
    };
    message.attributes.push(NeighbourAttribute::Destination(destination));
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    Call {
        what: format!("add neighbour {address} to interface {ifindex}"),
        message: RouteNetlinkMessage::NewNeighbour(message),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        ignore: &[],
    }
}

pub(super) fn replace_route(route: &Route) -> Call {
    Call {
        what: format!("add route {route}"),
        message: RouteNetlinkMessage::NewRoute(route_message(route)),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        ignore: &[],
    }
}

pub(super) fn delete_route(route: &Route) -> Call {
    Call {
        what: format!("delete route {route}"),
        message: RouteNetlinkMessage::DelRoute(route_message(route)),
        flags: 0,
        ignore: &[Errno::SRCH],
    }
}

/// A route that delivers everything of the family of `unspecified` locally.
pub(super) fn local_route(unspecified: IpAddr, ifindex: u32, table: u32) -> Call {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: family(unspecified),
        table: RouteHeader::RT_TABLE_UNSPEC,
        protocol: RouteProtocol::from(ROUTE_PROTOCOL),
        scope: RouteScope::Host,
        kind: RouteType::Local,
        ..RouteHeader::default()
    };
    message.attributes = vec![RouteAttribute::Table(table), RouteAttribute::Oif(ifindex)];
    Call {
        what: format!("add a local route to table {table}"),
        message: RouteNetlinkMessage::NewRoute(message),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        ignore: &[],
    }
}

/// A rule: packets of the family of `unspecified` whose mark is `mark` under `mask` use `table`.
pub(super) fn mark_rule(
    unspecified: IpAddr,
    (mark, mask): (u32, u32),
    table: u32,
    priority: u32,
) -> Call {
    let mut message = RuleMessage::default();
    message.header.family = family(unspecified);
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Priority(priority),
        RuleAttribute::FwMark(mark),
        RuleAttribute::FwMask(mask),
        RuleAttribute::Table(table),
        RuleAttribute::Protocol(RouteProtocol::from(ROUTE_PROTOCOL)),
    ];
    Call {
        what: format!("add a rule for mark {mark:#x} to table {table}"),
        message: RouteNetlinkMessage::NewRule(message),
        flags: NLM_F_CREATE | NLM_F_EXCL,
        ignore: &[Errno::EXIST],
    }
}

fn route_message(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: family(route.dst.addr()),
        destination_prefix_length: route.dst.prefix_len(),
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::from(ROUTE_PROTOCOL),
        scope: match (route.gateway, route.dst) {
            (None, IpNet::V4(_)) => RouteScope::Link,
            _ => RouteScope::Universe,
        },
        kind: RouteType::Unicast,
        flags: if route.onlink { RouteFlags::Onlink } else { RouteFlags::empty() },
        ..RouteHeader::default()
    };
    if route.dst.prefix_len() > 0 {
        message.attributes.push(RouteAttribute::Destination(route.dst.network().into()));
    }
    if let Some(gateway) = route.gateway {
        message.attributes.push(RouteAttribute::Gateway(gateway.into()));
    }
    if let Some(ifindex) = route.ifindex {
        message.attributes.push(RouteAttribute::Oif(ifindex));
    }
    if let Some(source) = route.source {
        message.attributes.push(RouteAttribute::PrefSource(source.into()));
    }
    message
}

/// The question which way a packet to `address` takes.
pub(super) fn get_route(address: IpAddr) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(address);
    message.header.destination_prefix_length = IpNet::from(address).prefix_len();
    message.attributes.push(RouteAttribute::Destination(address.into()));
    RouteNetlinkMessage::GetRoute(message)
}

/// Whether the way ends here.
pub(super) fn is_local_route(message: &RouteNetlinkMessage) -> bool {
    matches!(message, RouteNetlinkMessage::NewRoute(route) if route.header.kind == RouteType::Local)
}

pub(super) fn all_links() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetLink(LinkMessage::default())
}

pub(super) fn all_addresses() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetAddress(AddressMessage::default())
}

pub(super) fn all_routes(family: AddressFamily) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    RouteNetlinkMessage::GetRoute(message)
}

pub(super) fn to_link(message: &LinkMessage) -> Option<Link> {
    let mut name = None;
    let mut mac = None;
    let mut mtu = 0;
    let mut alias = None;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name = Some(value.clone()),
            LinkAttribute::Address(value) => mac = <[u8; 6]>::try_from(value.as_slice()).ok(),
            LinkAttribute::Mtu(value) => mtu = *value,
            LinkAttribute::IfAlias(value) => alias = Some(value.clone()),
            _ => {}
        }
    }
    Some(Link {
        ifindex: message.header.index,
        name: name?,
        mac,
        mtu,
        alias,
        up: message.header.flags.contains(LinkFlags::Up),
        running: message.header.flags.contains(LinkFlags::Running),
    })
}

pub(super) fn to_address(message: &AddressMessage) -> Option<Address> {
    let mut local = None;
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(value) => local = Some(*value),
            AddressAttribute::Address(value) => address = Some(*value),
            _ => {}
        }
    }
    // IPv6 gives only `Address`; on point-to-point links that is the other end, `Local` is ours.
    let address = IpNet::new(local.or(address)?, message.header.prefix_len).ok()?;
    Some(Address { ifindex: message.header.index, address })
}

/// Unicast routes of the main table; everything else is none of our business.
pub(super) fn to_route(message: &RouteMessage) -> Option<Route> {
    let mut table = u32::from(message.header.table);
    let mut dst = None;
    let mut gateway = None;
    let mut ifindex = None;
    let mut source = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(value) => table = *value,
            RouteAttribute::Destination(value) => dst = to_ip(value),
            RouteAttribute::Gateway(value) => gateway = to_ip(value),
            RouteAttribute::Oif(value) => ifindex = Some(*value),
            RouteAttribute::PrefSource(value) => source = to_ip(value),
            _ => {}
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) || message.header.kind != RouteType::Unicast {
        return None;
    }
    let unspecified = match message.header.address_family {
        AddressFamily::Inet => IpAddr::from([0u8; 4]),
        AddressFamily::Inet6 => IpAddr::from([0u8; 16]),
        _ => return None,
    };
    let prefix = message.header.destination_prefix_length;
    Some(Route {
        dst: IpNet::new(dst.unwrap_or(unspecified), prefix).ok()?,
        gateway,
        ifindex,
        source,
        onlink: message.header.flags.contains(RouteFlags::Onlink),
        ours: u8::from(message.header.protocol) == ROUTE_PROTOCOL,
    })
}

fn to_ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn call(what: String, message: RouteNetlinkMessage) -> Call {
    Call { what, message, flags: 0, ignore: &[] }
}
