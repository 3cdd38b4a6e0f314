//! Policy by DNS names, in a real cluster: which names a pod may ask for, and which addresses it
//! may reach because of the answers.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    process::Command,
    time::{Duration, Instant},
};

use palisade_lab::{dns::wire::number, nodes::Program};
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    connectivity::palisade,
    harness::{Lab, Outside, Pod, eventually, text, within},
    names::{self, PATIENCE, look_up, serve_names},
    traffic::{Conversations, Flow, serve_echo, serve_echo_at, serve_echo_on},
};

/// `curious` may ask for names of example.com and reach what api.example.com is; `deaf` may reach
/// it too, and may ask for nothing.
const POLICY: &str = "specs: [
    {endpointSelector: {matchLabels: {app: curious}}, egress: [
        {toEndpoints: [{matchLabels: {app: names}}],
         toPorts: [{ports: [{port: '53', protocol: ANY}], rules: {dns: [{matchPattern: '*.example.com'}]}}]},
        {toFQDNs: [{matchName: api.example.com}, {matchName: inside.example.com}],
         toPorts: [{ports: [{port: '80', protocol: TCP}]}]}]},
    {endpointSelector: {matchLabels: {app: deaf}}, egress: [
        {toFQDNs: [{matchName: api.example.com}], toPorts: [{ports: [{port: '80', protocol: TCP}]}]}]}]";

#[test]
fn names_open_what_they_stand_for() {
    let lab = Lab::up(1);
    let outside = Outside::new(&lab);
    for address in outside.pod.addresses {
        serve_echo_at(&outside.pod, SocketAddr::new(address, 80));
    }
    let [names, curious, deaf, inside] =
        lab.pods([("names", 1), ("curious", 1), ("deaf", 1), ("inside", 1)]);
    serve_echo(&inside);
    let [v4, v6] = outside.pod.addresses;
    let [inside4, inside6] = inside.addresses;
    serve_names(
        &names,
        vec![
            ("api.example.com", v4),
            ("api.example.com", v6),
            ("inside.example.com", inside4),
            ("inside.example.com", inside6),
            ("api.example.org", v4),
            ("api.example.org", v6),
        ],
    );
    for to in outside.pod.addresses {
        assert!(Flow::tcp(&curious, to).is_ok(), "before any policy");
    }
    lab.apply_cilium_policy("default", "names", POLICY);
    for tcp in [false, true] {
        for server in names.addresses {
            let ask = |name| look_up(&curious, server, name, tcp);
            assert_eq!(ask("api.example.org"), Some((number::REFUSED, vec![])), "{server}");
            assert_eq!(ask("example.com"), Some((number::REFUSED, vec![])), "{server}");
            assert_eq!(ask("none.example.com"), Some((number::NAME_ERROR, vec![])), "{server}");
            assert_eq!(look_up(&deaf, server, "api.example.com", tcp), None, "{server}");
        }
    }
    for (server, to) in names.addresses.into_iter().zip(outside.pod.addresses) {
        assert!(Flow::tcp(&curious, to).is_err(), "nobody asked for its name yet");
        for tcp in [false, true] {
            let (code, addresses) = look_up(&curious, server, "API.Example.com", tcp).unwrap();
            assert_eq!((code, addresses), (number::NO_ERROR, vec![to.to_string()]));
            let mut flow = Flow::tcp(&curious, to).expect("open as soon as the answer is out");
            flow.ask(1).unwrap();
        }
        assert!(Flow::tcp(&deaf, to).is_err(), "what another pod learned opens nothing");
    }
    for (server, to) in names.addresses.into_iter().zip(inside.addresses) {
        look_up(&curious, server, "inside.example.com", false);
        assert!(Flow::tcp(&curious, to).is_err(), "a name opens nothing inside the cluster");
    }
    survives_deaths(&lab, &curious, &names, &outside);
}

/// What was learned outlives the agent and the proxy, and so does whoever uses it.
fn survives_deaths(lab: &Lab, curious: &Pod, names: &Pod, outside: &Outside) {
    let flows = outside.pod.addresses.map(|to| Flow::tcp(curious, to).unwrap());
    let conversations = Conversations::start(flows.into());
    for program in Program::ALL {
        lab.kill(1, program);
        for to in outside.pod.addresses {
            Flow::tcp(curious, to).expect("learned before, and still open");
        }
        eventually("names can be asked for again", || {
            names.addresses.iter().all(|server| {
                look_up(curious, *server, "api.example.com", false).is_some_and(
                    |(code, addresses)| code == number::NO_ERROR && !addresses.is_empty(),
                )
            })
        });
    }
    let (interrupted, words, _) = conversations.end();
    assert_eq!((interrupted, words > 10), (0, true));
}

/// `curious` may ask for names of example.com, and reach whatever they are.
const ANY_NAME: &str = "spec: {endpointSelector: {matchLabels: {app: curious}}, egress: [
    {toEndpoints: [{matchLabels: {app: names}}],
     toPorts: [{ports: [{port: '53', protocol: ANY}], rules: {dns: [{matchPattern: '*.example.com'}]}}]},
    {toFQDNs: [{matchPattern: '*.example.com'}], toPorts: [{ports: [{port: '80', protocol: TCP}]}]}]}";

/// The first packet of a connection follows its answer at once, and passes: none has to be sent
/// again, which would take a second.
#[test]
fn the_first_packet_after_an_answer_passes() {
    const COUNT: u16 = 1000;
    let lab = Lab::up(1);
    let outside = Outside::new(&lab);
    let [names, curious] = lab.pods([("names", 1), ("curious", 1)]);
    let of = |n: u16| {
        let [high, low] = n.to_be_bytes();
        let v6 = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, n);
        [IpAddr::V4(Ipv4Addr::new(198, 51, high, low)), IpAddr::V6(v6)]
    };
    let ip = |pod: &Pod, line: String| {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let output = pod.run(move || Command::new("ip").args(words).output());
        assert!(output.status.success(), "{line}: {}", text(&output));
    };
    ip(&outside.pod, "link set lo up".into());
    for (network, at) in [("198.51.0.0/16", 0), ("2001:db8:1::/64", 1)] {
        ip(&lab.node(1), format!("route add {network} via {}", outside.pod.addresses[at]));
        ip(&outside.pod, format!("route add local {network} dev lo"));
    }
    serve_echo(&outside.pod);
    names::serve(&names, 60, move |name| {
        let number = name.strip_prefix('n').and_then(|rest| rest.split('.').next()?.parse().ok());
        number.map_or_else(Vec::new, |number| of(number).to_vec())
    });
    lab.apply_cilium_policy("default", "names", ANY_NAME);
    for (family, server) in names.addresses.into_iter().enumerate() {
        let server = SocketAddr::new(server, 53);
        let connecting = curious.spawn(move || {
            let socket = names::socket(server)?;
            let (mut slowest, mut late) = (Duration::ZERO, 0);
            for n in 0..COUNT {
                let to = SocketAddr::new(of(n)[family], 80);
                if n % 100 == 0 {
                    let early = TcpStream::connect_timeout(&to, Duration::from_millis(100));
                    assert!(early.is_err(), "{to} is open before anybody asked for it");
                }
                let query = names::question(server.ip(), &format!("n{n}.example.com"));
                let answer = names::ask(&socket, &query.message())?;
                let answered = Instant::now();
                let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
                let time = answered.elapsed();
                assert!(query.read_answer(&answer).is_some_and(|told| told.answers.len() == 1));
                late += usize::from(time > Duration::from_millis(900));
                slowest = slowest.max(time);
                drop(stream);
            }
            Ok((slowest, late))
        });
        let (slowest, late) = connecting.join().unwrap().unwrap();
        println!("{COUNT} names asked of {server}: the slowest connection took {slowest:?}");
        assert_eq!(late, 0, "first packets were lost; the slowest took {slowest:?}");
    }
}

/// What a name opened closes when its time is over, but not under a connection.
#[test]
fn what_expired_is_closed_for_new_connections_only() {
    let lab = Lab::up(1);
    let outside = Outside::new(&lab);
    serve_echo(&outside.pod);
    let [names, curious] = lab.pods([("names", 1), ("curious", 1)]);
    let all: Vec<IpAddr> = outside.pod.addresses.into_iter().chain(outside.second).collect();
    let known = all.clone();
    // A second; what is less than half a minute counts as that, and some seconds of grace.
    names::serve(&names, 1, move |_| known.clone());
    lab.apply_cilium_policy("default", "names", ANY_NAME);
    let opens = |to: &IpAddr| Flow::tcp(&curious, *to).is_ok();
    assert!(!all.iter().any(opens), "nobody asked for their name yet");
    let begun = Instant::now();
    for server in names.addresses {
        look_up(&curious, server, "api.example.com", false).unwrap();
    }
    assert!(all.iter().all(opens));
    // One of each family is in use.
    let flows = outside.pod.addresses.map(|to| Flow::tcp(&curious, to).unwrap());
    let conversations = Conversations::start(flows.into());
    // Whoever tried whether they are open would use them.
    let is_known = |to: &IpAddr| palisade(&lab, &["get", "fqdns"]).1.contains(&to.to_string());
    assert!(all.iter().all(is_known));
    within(Duration::from_secs(90), "what nobody uses is forgotten", || {
        !outside.second.iter().any(is_known)
    });
    assert!(!outside.second.iter().any(opens));
    let lifetime = begun.elapsed();
    assert!(lifetime > Duration::from_secs(30), "{lifetime:?}");
    let (interrupted, words, _) = conversations.end();
    assert_eq!((interrupted, words > 500), (0, true), "{words} words in {lifetime:?}");
    within(Duration::from_secs(60), "what is used no more is forgotten", || {
        !outside.pod.addresses.iter().any(is_known)
    });
    assert!(!outside.pod.addresses.iter().any(opens));
}

/// A message longer than a packet.
fn padded(message: &[u8]) -> Vec<u8> {
    const PADDING: u16 = 3000;
    // EDNS without options is at its end.
    let (kept, length) = message.split_at(message.len() - 2);
    assert_eq!(length, [0, 0]);
    let option = [12u16.to_be_bytes(), PADDING.to_be_bytes()].concat();
    let length = (PADDING + 4).to_be_bytes();
    [kept, &length, &option, &vec![0; PADDING.into()]].concat()
}

/// The datagram as a packet of IPv6 whose header is extended by options that mean nothing.
fn extended(from: SocketAddr, to: SocketAddr, data: &[u8]) -> Vec<u8> {
    const DESTINATION_OPTIONS: u8 = 60;
    const UDP: u8 = 17;
    let (IpAddr::V6(source), IpAddr::V6(destination)) = (from.ip(), to.ip()) else {
        unreachable!("{from} and {to} are of IPv6")
    };
    let length = u16::try_from(8 + data.len()).unwrap().to_be_bytes();
    let mut udp = [from.port().to_be_bytes(), to.port().to_be_bytes(), length, [0; 2]].concat();
    udp.extend(data);
    let pseudo = [&source.octets()[..], &destination.octets(), &[0, UDP], &length].concat();
    let words = [pseudo, udp.clone()].concat();
    let words = words.chunks(2).map(|word| [word[0], word.get(1).copied().unwrap_or(0)]);
    let sum: u32 = words.map(|word| u32::from(u16::from_be_bytes(word))).sum();
    let folded = (sum >> 16) + (sum & 0xffff);
    udp[6..8].copy_from_slice(&(!((folded >> 16) + folded) as u16).to_be_bytes());
    let length = u16::try_from(8 + udp.len()).unwrap().to_be_bytes();
    let mut packet = vec![0x60, 0, 0, 0, length[0], length[1], DESTINATION_OPTIONS, 64];
    packet.extend(source.octets());
    packet.extend(destination.octets());
    packet.extend([UDP, 0, 1, 4, 0, 0, 0, 0]);
    packet.extend(udp);
    packet
}

/// Names are asked for of the named server at the named port, in whatever packets, and judged.
#[test]
fn there_is_no_way_around_the_judge_of_names() {
    const OTHER_PORTS: [u16; 3] = [443, 853, 5353];
    let lab = Lab::up(1);
    let [names, others, curious] = lab.pods([("names", 1), ("others", 1), ("curious", 1)]);
    let list = || {
        let all = ["api.example.com", "secret.example.org"];
        all.into_iter().flat_map(|name| names.addresses.map(|address| (name, address))).collect()
    };
    let (asked, strangers_asked) = (serve_names(&names, list()), serve_names(&others, list()));
    for port in OTHER_PORTS {
        serve_echo_on(&names, port);
    }
    let all = || names.addresses.into_iter().chain(others.addresses);
    let doors: Vec<SocketAddr> = names
        .addresses
        .into_iter()
        .flat_map(|to| OTHER_PORTS.map(|port| SocketAddr::new(to, port)))
        .collect();
    for to in all() {
        assert!(look_up(&curious, to, "secret.example.org", false).is_some(), "before any policy");
    }
    assert_eq!(open(&curious, &doors), [[true; 2]; 6], "before any policy");
    lab.apply_cilium_policy("default", "names", ANY_NAME);
    asked.lock().unwrap().clear();
    strangers_asked.lock().unwrap().clear();
    assert_eq!(open(&curious, &doors), [[false; 2]; 6]);
    for name in ["api.example.com", "secret.example.org"] {
        for to in others.addresses {
            for tcp in [false, true] {
                assert_eq!(look_up(&curious, to, name, tcp), None, "{name} of {to}");
            }
        }
        for to in names.addresses {
            let message = padded(&names::question(to, name).message());
            // Whether it is answered is not the point.
            curious.run(move || names::socket(SocketAddr::new(to, 53))?.send(&message));
        }
        let (from, to) = (curious.addresses[1], names.addresses[1]);
        let (from, to) = (SocketAddr::new(from, 5300), SocketAddr::new(to, 53));
        let packet = extended(from, to, &names::question(to.ip(), name).message());
        curious.run(move || {
            let raw = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::from(255)))?;
            raw.send_to(&packet, &SocketAddr::new(to.ip(), 0).into())
        });
    }
    // What was sent before has arrived, if it ever does.
    for to in names.addresses {
        assert!(look_up(&curious, to, "api.example.com", false).is_some());
    }
    let asked = asked.lock().unwrap();
    assert!(asked.iter().all(|name| name == "api.example.com"), "{asked:?}");
    assert_eq!(*strangers_asked.lock().unwrap(), [""; 0]);
}

/// Of each address, whether it takes a connection, and whether it answers a datagram.
fn open(from: &Pod, to: &[SocketAddr]) -> Vec<[bool; 2]> {
    let ask = |to: SocketAddr| {
        from.spawn(move || {
            let connected = TcpStream::connect_timeout(&to, PATIENCE).is_ok();
            Ok([connected, names::ask(&names::socket(to)?, b"echo").is_ok()])
        })
    };
    let asking: Vec<_> = to.iter().map(|to| ask(*to)).collect();
    asking.into_iter().map(|asked| asked.join().unwrap().unwrap()).collect()
}
