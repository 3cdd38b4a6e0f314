//! Policy by DNS names, in a real cluster: which names a pod may ask for, and which addresses it
//! may reach because of the answers.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use palisade_lab::{
    dns::wire::{Answer, Data, Incoming, Name, Query, Record, number, read_query},
    nodes::Program,
};

use super::{
    harness::{Lab, Outside, Pod, eventually},
    traffic::{Conversations, Flow, serve_echo, serve_echo_at},
};

const PATIENCE: Duration = Duration::from_secs(2);

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

/// A name server in a pod, over UDP and TCP: a name has the addresses that the list says.
fn serve_names(pod: &Pod, names: Vec<(&'static str, IpAddr)>) {
    let at = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 53));
    let (udp, tcp) = pod.run(move || Ok((UdpSocket::bind(at)?, TcpListener::bind(at)?)));
    let answer = move |query: &Query| {
        let asked = query.name.key();
        let known: Vec<_> = names.iter().filter(|(name, _)| asked == *name).collect();
        if known.is_empty() {
            return Answer::code(number::NAME_ERROR);
        }
        let data = known.into_iter().map(|(_, address)| match address {
            IpAddr::V4(address) => Data::A(*address),
            IpAddr::V6(address) => Data::Aaaa(*address),
        });
        let records = data.filter(|data| data.kind() == query.kind);
        let record = |data| Record { name: query.name.clone(), ttl: 60, data };
        Answer { answers: records.map(record).collect(), ..Answer::default() }
    };
    let of_stream = answer.clone();
    thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((length, from)) = udp.recv_from(&mut buffer) {
            if let Incoming::Query(query) = read_query(&buffer[..length]) {
                udp.send_to(&query.datagram(&answer(&query)), from).unwrap();
            }
        }
    });
    thread::spawn(move || {
        for mut stream in tcp.incoming().map_while(Result::ok) {
            let Ok(packet) = read_message(&mut stream) else { continue };
            if let Incoming::Query(query) = read_query(&packet) {
                write_message(&mut stream, &query.stream(&of_stream(&query))).unwrap();
            }
        }
    });
}

fn read_message(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut message).map(|()| message)
}

fn write_message(stream: &mut TcpStream, message: &[u8]) -> std::io::Result<()> {
    let length = u16::try_from(message.len()).unwrap().to_be_bytes();
    stream.write_all(&[&length[..], message].concat())
}

/// The code of the answer and the addresses in it; nothing where none came.
fn look_up(from: &Pod, server: IpAddr, name: &str, tcp: bool) -> Option<(u8, Vec<String>)> {
    let kind = if server.is_ipv4() { number::A } else { number::AAAA };
    let query = Query::new(0x1234, Name::parse(name).unwrap(), kind);
    let message = query.message();
    let server = SocketAddr::new(server, 53);
    let asked = from.spawn(move || {
        if tcp {
            let mut stream = TcpStream::connect_timeout(&server, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            write_message(&mut stream, &message)?;
            return read_message(&mut stream);
        }
        let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.connect(server)?;
        socket.send(&message)?;
        let mut buffer = vec![0; 1500];
        let length = socket.recv(&mut buffer)?;
        buffer.truncate(length);
        Ok(buffer)
    });
    let answer = query.read_answer(&asked.join().unwrap().ok()?)?;
    let addresses = answer.answers.iter().map(|record| record.data.to_string());
    Some((answer.code, addresses.collect()))
}

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
