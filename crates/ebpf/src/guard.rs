//! What an endpoint may say below and beside IP flows: ARP and neighbour discovery about itself,
//! nothing about others, and nothing that configures hosts.

use aya_ebpf::bindings::__sk_buff;
use palisade_abi::{Address, DropReason, EndpointRow, protocol};

use crate::packet::{ETH_LEN, Packet, load};

const ROUTER_SOLICITATION: u8 = 133;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// Neighbour messages come from the link itself: nobody can have forwarded them (RFC 4861, 7.1).
const ON_LINK_HOP_LIMIT: u8 = 255;

/// What the guard says of a packet that is no ordinary traffic.
pub enum Ruling {
    /// Ordinary traffic: policy decides.
    Judge,
    /// Link-local upkeep between the endpoint and its node: pass.
    Pass,
    /// Noise that every IPv6 host makes: drop without a record.
    DropQuietly,
}

/// Frames from an endpoint bear its MAC address.
#[inline(always)]
pub fn source_mac(skb: *mut __sk_buff, row: &EndpointRow) -> Result<(), DropReason> {
    let source: [u8; 6] = load(skb, 6)?;
    if source == row.mac { Ok(()) } else { Err(DropReason::Spoofed) }
}

/// ARP from an endpoint speaks for its own addresses only (RFC 826; a probe has sender 0).
#[inline(always)]
pub fn arp(skb: *mut __sk_buff, row: &EndpointRow) -> Result<(), DropReason> {
    let kind: [u8; 8] = load(skb, ETH_LEN)?;
    if kind[..6] != [0, 1, 8, 0, 6, 4] {
        return Err(DropReason::ForbiddenProtocol);
    }
    let sender_mac: [u8; 6] = load(skb, ETH_LEN + 8)?;
    let sender: [u8; 4] = load(skb, ETH_LEN + 14)?;
    if sender_mac != row.mac || (sender != row.ipv4 && sender != [0; 4]) {
        return Err(DropReason::Spoofed);
    }
    Ok(())
}

/// The link-local address that follows from a MAC address (RFC 4291, appendix A).
#[inline(always)]
fn link_local(mac: [u8; 6]) -> Address {
    [0xfe, 0x80, 0, 0, 0, 0, 0, 0, mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]]
}

/// Rules on ICMPv6 from an endpoint that is not end-to-end traffic.
#[inline(always)]
pub fn icmpv6_from(
    skb: *mut __sk_buff,
    packet: &Packet,
    row: &EndpointRow,
) -> Result<Ruling, DropReason> {
    let own = packet.source == row.ipv6 && row.ipv6 != [0; 16];
    let local = packet.source == link_local(row.mac);
    let unspecified = packet.source == [0; 16];
    if packet.protocol != protocol::ICMPV6 {
        return Ok(if own { Ruling::Judge } else { Ruling::DropQuietly });
    }
    match packet.icmp_type {
        NEIGHBOUR_SOLICITATION | NEIGHBOUR_ADVERTISEMENT => {
            if packet.hop_limit != ON_LINK_HOP_LIMIT {
                return Err(DropReason::Spoofed);
            }
            if !(own || local || unspecified) {
                return Err(DropReason::Spoofed);
            }
            let target: Address = load(skb, packet.l4 + 8)?;
            if packet.icmp_type == NEIGHBOUR_ADVERTISEMENT
                && (unspecified || (target != row.ipv6 && target != link_local(row.mac)))
            {
                return Err(DropReason::Spoofed);
            }
            neighbour_option(skb, packet, row)?;
            // To others it is no upkeep of the link, whatever it says.
            Ok(if is_group_or_link(packet) { Ruling::Pass } else { Ruling::Judge })
        }
        // Advertising routes, redirects and renumbering are the network's, not an endpoint's.
        134 | 137 | 138 => Err(DropReason::ForbiddenProtocol),
        ROUTER_SOLICITATION | 130..=132 | 143 => Ok(Ruling::DropQuietly),
        _ if own => Ok(Ruling::Judge),
        _ if local || unspecified => Ok(Ruling::DropQuietly),
        _ => Err(DropReason::Spoofed),
    }
}

/// Neighbour messages carry no option, or one: the endpoint's own MAC address. A nonce (RFC 3971),
/// which duplicate address detection adds, may follow.
#[inline(always)]
fn neighbour_option(
    skb: *mut __sk_buff,
    packet: &Packet,
    row: &EndpointRow,
) -> Result<(), DropReason> {
    let end = packet.length.wrapping_add(ETH_LEN);
    if end < packet.l4 + 32 {
        return Ok(());
    }
    let option: [u8; 8] = load(skb, packet.l4 + 24)?;
    let mac = [option[2], option[3], option[4], option[5], option[6], option[7]];
    match (option[0], option[1]) {
        (1 | 2, 1) if mac == row.mac && end == packet.l4 + 32 => Ok(()),
        (14, 1) if end == packet.l4 + 32 => Ok(()),
        _ => Err(DropReason::Spoofed),
    }
}

/// Whether the node's own neighbour upkeep towards an endpoint.
#[inline(always)]
pub fn icmpv6_to(packet: &Packet) -> bool {
    packet.protocol == protocol::ICMPV6
        && matches!(packet.icmp_type, NEIGHBOUR_SOLICITATION | NEIGHBOUR_ADVERTISEMENT)
        && packet.hop_limit == ON_LINK_HOP_LIMIT
}

/// Destinations that pods have no business with: multicast, broadcast, link-local IPv6.
#[inline(always)]
pub fn is_group_or_link(packet: &Packet) -> bool {
    let to = &packet.destination;
    if packet.ipv6 {
        return to[0] == 0xff || (to[0] == 0xfe && to[1] & 0xc0 == 0x80);
    }
    to[12] >= 224
}
