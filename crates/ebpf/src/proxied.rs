//! The fast path of proxied flows, between client and proxy and between proxy and server, as long as
//! both have the same ends and nothing is unusual. As [`crate::fast`], with a socket to find.

use aya_ebpf::bindings::__sk_buff;
use palisade_abi::{flow_flags, protocol};

use crate::{
    Hook, clock,
    fast::{Family, Seen, look},
    flow,
    maps::ENDPOINT_ROWS,
    pace,
    packet::{ETH_LEN, FIN, Kind, Packet, RST},
    proxy,
    proxy::Leg,
};

const TC_ACT_OK: i32 = 0;

/// The verdict, or nothing where the slow path has to look.
#[inline(always)]
pub fn proxied<F: Family>(skb: *mut __sk_buff, hook: Hook, ipv6: bool) -> Option<i32> {
    let Seen { key, side, protocol, tcp_flags, length, ports } = look::<F>(skb)?;
    let tcp = protocol == protocol::TCP;
    if proxy::again(skb).is_some() || tcp_flags & (FIN | RST) != 0 {
        return None;
    }
    // SAFETY: live map values and a live context.
    unsafe {
        let client = &mut *F::find(&key, tcp)?;
        if client.flags & (flow_flags::TRANSLATED | flow_flags::PROXIED) != flow_flags::PROXIED {
            return None;
        }
        let opener = flow::from_opener(client, side);
        let sent = hook != Hook::FromPod && proxy::sent(skb);
        let leg = if opener == sent { Leg::Server } else { Leg::Client };
        let (source, destination) = F::ends(&key, side);
        let flow = match leg {
            Leg::Client => client,
            Leg::Server => &mut *F::find(&F::upstream(key), tcp)?,
        };
        let now = clock::now();
        if clock::passed(flow.expires, now)
            || !flow::fresh(flow)
            || flow::from_opener(flow, side) != opener
        {
            return None;
        }
        let (sender, receiver) = if opener {
            (flow.opener_row, flow.other_row)
        } else {
            (flow.other_row, flow.opener_row)
        };
        let local = match hook {
            Hook::FromPod => sender,
            Hook::ToPod => receiver,
            // The mark proves who sends.
            Hook::ToNet => 0,
        };
        if hook != Hook::ToNet && ENDPOINT_ROWS.get(local)?.ifindex != (*skb).ifindex {
            return None;
        }
        let asks = hook == Hook::FromPod && leg == Leg::Client && !tcp;
        if asks && !pace::admit(sender) {
            return None;
        }
        flow::advance(flow, opener, length, tcp, tcp_flags, now);
        if sent {
            return Some(TC_ACT_OK);
        }
        if hook != Hook::FromPod {
            return Some(proxy::send_round(skb, leg));
        }
        let packet = Packet {
            source,
            destination,
            source_port: ports[0],
            destination_port: ports[1],
            length,
            l4: ETH_LEN + F::HEADER as u32,
            protocol,
            tcp_flags,
            icmp_type: 0,
            kind: Kind::Plain,
            ipv6,
            later_fragment: false,
            more_fragments: false,
            hop_limit: 0,
            fragment_id: 0,
        };
        // Where that fails the slow path tells why.
        proxy::give(skb, &packet, leg).ok()
    }
}
