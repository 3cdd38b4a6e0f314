//! Services, by every way to them: as the pod's own sockets and packet by packet, TCP and UDP,
//! IPv4, IPv6, and IPv4 as an IPv6 socket writes it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, BufRead, BufReader, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use palisade_abi::mark;
use socket2::{Domain, Socket, Type};

use super::{
    harness::{Lab, Level, Outside, Pod, eventually},
    probe::Protocol,
    traffic::{Flow, serve_echo},
};

const LEVELS: [Level; 2] = [Level::Socket, Level::Packet];
/// No answer within this is no answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// An open connection that is silent for so long is broken; a busy machine may be late.
const ENDURANCE: Duration = Duration::from_secs(5);
/// A refusal takes no longer.
const AT_ONCE: Duration = Duration::from_millis(300);
/// So many questions meet both backends of a Service: one is missed once in 32,768 times.
const OFTEN: usize = 16;
/// Where questions come from: below the ports that the kernel gives (`ip_local_port_range`).
const OWN_PORTS: Range<u16> = 20_000..32_000;

const HTTP: (Protocol, u16) = (Protocol::Tcp, 80);
const ALT: (Protocol, u16) = (Protocol::Tcp, 443);
const DGRAM: (Protocol, u16) = (Protocol::Udp, 53);
const PORTS: [(Protocol, u16); 3] = [HTTP, ALT, DGRAM];

/// Two backends of one identity, whose ports have the same names and other numbers.
const MANIFEST: &str = r"
apiVersion: v1
kind: Pod
metadata: {name: web-a, labels: {app: web}}
spec:
  nodeName: node1
  containers:
  - name: pause
    image: registry.k8s.io/pause
    ports: [{name: http, containerPort: 8080}, {name: alt, containerPort: 8081}, {name: dgram, containerPort: 5300, protocol: UDP}]
---
apiVersion: v1
kind: Pod
metadata: {name: web-b, labels: {app: web}}
spec:
  nodeName: node2
  containers:
  - name: pause
    image: registry.k8s.io/pause
    ports: [{name: http, containerPort: 9090}, {name: alt, containerPort: 9091}, {name: dgram, containerPort: 5301, protocol: UDP}]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: http}
  - {name: alt, port: 443, targetPort: alt}
  - {name: dgram, port: 53, targetPort: dgram, protocol: UDP}
---
apiVersion: v1
kind: Service
metadata: {name: empty}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {app: nobody}
  ports: [{name: http, port: 80}, {name: dgram, port: 53, protocol: UDP}]
---
apiVersion: v1
kind: Service
metadata: {name: six}
spec:
  ipFamilies: [IPv6]
  selector: {app: web}
  ports: [{port: 80, targetPort: http}]
---
apiVersion: v1
kind: Service
metadata: {name: written}
spec:
  ipFamilyPolicy: RequireDualStack
  ports: [{name: http, port: 80}, {name: dgram, port: 53, protocol: UDP}]
";

/// From outside only the backends of one node answer; from inside all do.
const LENT: &str = r"
apiVersion: v1
kind: Service
metadata: {name: lent}
spec:
  type: LoadBalancer
  externalTrafficPolicy: Local
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: http}
  - {name: alt, port: 443, targetPort: alt}
  - {name: dgram, port: 53, targetPort: dgram, protocol: UDP}
";

/// Nobody is behind it.
const TAKEN: &str = r"
apiVersion: v1
kind: Service
metadata: {name: taken}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {app: nobody}
  ports: [{name: http, port: 80}, {name: dgram, port: 53, protocol: UDP}]
";

/// What came of a question.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Said {
    /// This backend answered, from the address that was asked.
    Name(String),
    Refused,
    Silence,
    Other(String),
}

impl Said {
    fn name(name: &str) -> Self {
        Self::Name(name.to_owned())
    }
}

/// A question to `to` by a socket of its own.
#[derive(Clone, Copy, Debug)]
struct Question {
    level: Level,
    protocol: Protocol,
    to: SocketAddr,
}

impl Question {
    fn kind(&self) -> (Domain, Type) {
        let kind = if self.protocol == Protocol::Tcp { Type::STREAM } else { Type::DGRAM };
        (Domain::for_address(self.to), kind)
    }

    /// Where it comes from: a port that no other question has. The kernel gives one port to two
    /// sockets whose destinations differ, and both may lead to one backend, where the second one is
    /// refused ([`World::one_port_has_one_use`]).
    fn from(&self) -> SocketAddr {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let turn = NEXT.fetch_add(1, Relaxed) % (OWN_PORTS.end - OWN_PORTS.start);
        let port = OWN_PORTS.start + turn;
        match self.to {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, port).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, port).into(),
        }
    }
}

/// Asks from `pod`, everything at the same time. The answers are in the order of the questions.
fn ask(pod: &Pod, questions: &[Question]) -> Vec<Said> {
    let sockets = LEVELS.map(|level| {
        let kinds = questions.iter().filter(|question| question.level == level);
        pod.sockets(level, kinds.map(Question::kind).collect())
    });
    let mut sockets = sockets.map(Vec::into_iter);
    let threads: Vec<_> = questions
        .iter()
        .map(|question| {
            let (question, level) = (*question, usize::from(question.level == Level::Packet));
            let socket = sockets[level].next().unwrap();
            thread::spawn(move || said(converse(socket, question)))
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

fn said(result: io::Result<String>) -> Said {
    match result {
        Ok(name) => Said::Name(name),
        Err(error) => match error.kind() {
            io::ErrorKind::ConnectionRefused => Said::Refused,
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Said::Silence,
            _ => Said::Other(error.to_string()),
        },
    }
}

fn converse(socket: Socket, question: Question) -> io::Result<String> {
    let Question { protocol, to, .. } = question;
    socket.bind(&question.from().into())?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    let peer = socket.peer_addr()?.as_socket();
    if peer != Some(to) {
        return Err(io::Error::other(format!("getpeername says {peer:?} instead of {to}")));
    }
    let mut answer = String::new();
    if protocol == Protocol::Tcp {
        let mut stream = TcpStream::from(socket);
        stream.write_all(b"who\n")?;
        BufReader::new(stream).read_line(&mut answer)?;
    } else {
        let socket = UdpSocket::from(socket);
        socket.send(b"who\n")?;
        let mut buffer = [0; 64];
        let (length, from) = socket.recv_from(&mut buffer)?;
        if from != to {
            return Err(io::Error::other(format!("recvfrom says {from} instead of {to}")));
        }
        answer = String::from_utf8_lossy(&buffer[..length]).into_owned();
    }
    Ok(answer.trim_end().to_owned())
}

/// Tells its name to whoever asks, until the test ends.
fn serve_name(pod: &Pod, name: &'static str, tcp: [u16; 2], udp: u16) {
    for port in tcp {
        let listener = pod.run(move || TcpListener::bind(("::", port)));
        thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                thread::spawn(move || {
                    let _ = stream.read(&mut [0; 8]);
                    let _ = writeln!(stream, "{name}");
                });
            }
        });
    }
    let socket = pod.run(move || UdpSocket::bind(("::", udp)));
    thread::spawn(move || {
        while let Ok((_, from)) = socket.recv_from(&mut [0; 64]) {
            let _ = socket.send_to(name.as_bytes(), from);
        }
    });
}

/// The addresses of a Service.
fn addresses(lab: &Lab, service: &str) -> Vec<IpAddr> {
    let text = lab.kubectl(&["get", "service", service, "-o", "jsonpath={.spec.clusterIPs[*]}"]);
    text.split_whitespace().map(|address| address.parse().unwrap()).collect()
}

/// The addresses as sockets may write them: an IPv4 address also as an IPv6 one.
fn spellings(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let mapped = addresses.iter().filter_map(|address| match address {
        IpAddr::V4(address) => Some(address.to_ipv6_mapped().into()),
        IpAddr::V6(_) => None,
    });
    addresses.iter().copied().chain(mapped).collect()
}

/// Asks by every way; whatever is not `expected` of the port is told.
fn check(
    pod: &Pod,
    what: &str,
    addresses: &[IpAddr],
    ports: &[(Protocol, u16)],
    times: usize,
    expected: impl Fn((Protocol, u16)) -> BTreeSet<Said>,
) {
    let mut ways = Vec::new();
    for level in LEVELS {
        for address in spellings(addresses) {
            for (protocol, port) in ports {
                let to = SocketAddr::new(address, *port);
                ways.push(Question { level, protocol: *protocol, to });
            }
        }
    }
    let questions: Vec<_> = ways.iter().flat_map(|way| vec![*way; times]).collect();
    let answers = ask(pod, &questions);
    let wrong: Vec<String> = ways
        .iter()
        .zip(answers.chunks(times))
        .filter_map(|(way, answers)| {
            let got: BTreeSet<Said> = answers.iter().cloned().collect();
            let expected = expected((way.protocol, way.to.port()));
            (got != expected).then(|| format!("{way:?}: {got:?} instead of {expected:?}"))
        })
        .collect();
    assert!(wrong.is_empty(), "{what}:\n{}", wrong.join("\n"));
}

fn both() -> BTreeSet<Said> {
    ["web-a", "web-b"].map(Said::name).into()
}

struct World {
    lab: Lab,
    web_a: Pod,
    client: Pod,
    foes: [Pod; 2],
    web: Vec<IpAddr>,
}

impl World {
    fn new() -> Self {
        let lab = Lab::up(2);
        lab.apply(MANIFEST);
        let [client, foe, foe_far] = lab.pods([("client", 1), ("foe", 1), ("foe-far", 2)]);
        let [web_a, web_b] = ["web-a", "web-b"].map(|name| lab.pod("default", name));
        serve_name(&web_a, "web-a", [8080, 8081], 5300);
        serve_name(&web_b, "web-b", [9090, 9091], 5301);
        // A Service that people keep themselves: its one backend is web-a.
        for (index, family) in ["IPv4", "IPv6"].into_iter().enumerate() {
            lab.apply(&format!(
                "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
                 metadata: {{name: written-{index}, labels: {{kubernetes.io/service-name: written}}}}\n\
                 addressType: {family}\n\
                 ports: [{{name: http, port: 8080}}, {{name: dgram, port: 5300, protocol: UDP}}]\n\
                 endpoints: [{{addresses: ['{}']}}]\n",
                web_a.addresses[index]
            ));
        }
        let web = addresses(&lab, "web");
        assert_eq!(web.len(), 2);
        let world = Self { lab, web_a, client, foes: [foe, foe_far], web };
        let [a, b] = [&world.web_a, &web_b].map(|pod| pod.addresses);
        world.await_backends("default/web", 6, &[a[0], a[1], b[0], b[1]]);
        world.await_backends("default/written", 4, &a);
        world.await_backends("default/empty", 4, &[]);
        world
    }

    /// Waits until every agent has so many entries of a Service, with these backends.
    fn await_backends(&self, service: &str, entries: usize, backends: &[IpAddr]) {
        await_backends(&self.lab, service, entries, backends);
    }

    fn policy(&self, name: &str, spec: &str) {
        self.lab.apply_policy("default", name, spec);
    }

    fn forget_policies(&self) {
        self.lab.kubectl(&["delete", "netpol", "--all"]);
        self.lab.await_policies(0);
    }

    fn every_way_reaches_every_backend(&self) {
        for pod in [&self.client, &self.foes[1]] {
            check(pod, "web", &self.web, &PORTS, OFTEN, |_| both());
        }
        let six = addresses(&self.lab, "six");
        assert!(matches!(six[..], [IpAddr::V6(_)]));
        check(&self.client, "six", &six, &[HTTP], OFTEN, |_| both());
        let written = addresses(&self.lab, "written");
        let web_a = |_| BTreeSet::from([Said::name("web-a")]);
        check(&self.client, "written", &written, &[HTTP, DGRAM], 4, web_a);
    }

    /// One socket talks to two Services, and every answer bears the name that was asked.
    fn unconnected_sockets_get_answers_from_whom_they_asked(&self) {
        let written = addresses(&self.lab, "written");
        for level in LEVELS {
            for (web, written) in self.web.iter().zip(&written) {
                let any = SocketAddr::new(web.to_canonical(), 0);
                let kind = (Domain::for_address(any), Type::DGRAM);
                let socket = self.client.sockets(level, vec![kind]).pop().unwrap();
                let socket = UdpSocket::from(socket);
                socket.set_read_timeout(Some(PATIENCE)).unwrap();
                for _ in 0..4 {
                    for to in [*web, *written] {
                        let to = SocketAddr::new(to, DGRAM.1);
                        socket.send_to(b"who", to).unwrap();
                        let (length, from) = socket.recv_from(&mut [0; 64]).unwrap();
                        assert_eq!((length, from), (5, to), "{level:?}");
                    }
                }
            }
        }
    }

    fn no_backends_no_waiting(&self) {
        let empty = addresses(&self.lab, "empty");
        let begun = Instant::now();
        check(&self.client, "empty", &empty, &[HTTP, DGRAM], 2, |_| [Said::Refused].into());
        assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    }

    /// Who hears of backends only through a Service must reach it when he knows of none, or of
    /// those of before. On the node nobody else translates here, so nobody answers either.
    fn a_socket_may_pass_services(&self) {
        let node = self.client.within(&self.lab.node(1));
        let connect = |service: &str, mark| {
            addresses(&self.lab, service)
                .into_iter()
                .map(|address| {
                    let to = SocketAddr::new(address, HTTP.1);
                    let kind = vec![(Domain::for_address(to), Type::STREAM)];
                    let socket = node.sockets(Level::Socket, kind).pop().unwrap();
                    socket.set_mark(mark).unwrap();
                    said(socket.connect_timeout(&to.into(), AT_ONCE).map(|()| String::new()))
                })
                .collect::<BTreeSet<_>>()
        };
        assert_eq!(connect("written", 0), [Said::name("")].into());
        assert_eq!(connect("empty", 0), [Said::Refused].into());
        for service in ["written", "empty"] {
            let said = connect(service, mark::PAST_SERVICES);
            assert!(!said.contains(&Said::name("")) && !said.contains(&Said::Refused), "{said:?}");
        }
    }

    /// A port of the client that leads to a backend already does not lead there by another name
    /// too: the answers could not be told apart. The new connection fails, the old one lives.
    fn one_port_has_one_use(&self) {
        for address in addresses(&self.lab, "written") {
            let to = SocketAddr::new(address, HTTP.1);
            for levels in [LEVELS, [Level::Packet, Level::Socket]] {
                let mut from =
                    SocketAddr::new(self.client.addresses[usize::from(address.is_ipv6())], 0);
                let [first, second] = levels.map(|level| {
                    let kind = vec![(Domain::for_address(to), Type::STREAM)];
                    let socket = self.client.sockets(level, kind).pop().unwrap();
                    socket.set_reuse_address(true).unwrap();
                    socket.bind(&from.into()).unwrap();
                    from = socket.local_addr().unwrap().as_socket().unwrap();
                    socket
                });
                first.connect_timeout(&to.into(), PATIENCE).unwrap();
                let refused = second.connect_timeout(&to.into(), AT_ONCE).unwrap_err();
                assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "{levels:?} {to}");
                let mut first = TcpStream::from(first);
                first.set_read_timeout(Some(PATIENCE)).unwrap();
                first.write_all(b"who\n").unwrap();
                let mut name = String::new();
                BufReader::new(first).read_line(&mut name).unwrap();
                assert_eq!(name, "web-a\n", "{levels:?} {to}");
            }
        }
    }

    /// A pod that is its own backend. No policy keeps a pod from itself.
    fn a_pod_reaches_itself(&self) {
        let to = spellings(&addresses(&self.lab, "written"));
        let questions: Vec<_> = to
            .into_iter()
            .flat_map(|to| {
                [HTTP, DGRAM].map(|(protocol, port)| (protocol, SocketAddr::new(to, port)))
            })
            .map(|(protocol, to)| Question { level: Level::Socket, protocol, to })
            .collect();
        for answer in ask(&self.web_a, &questions) {
            assert_eq!(answer, Said::name("web-a"));
        }
    }

    fn a_load_balancers_address_is_one_of_the_service(&self) {
        self.lab.apply(LENT);
        let own = 2 * PORTS.len();
        let lent = [IpAddr::from([192, 0, 2, 80]), "2001:db8::80".parse().unwrap()];
        self.lend(&lent, "VIP");
        self.await_lent(2 * own);
        for pod in [&self.client, &self.foes[1]] {
            check(pod, "lent", &lent, &PORTS, OFTEN, |_| both());
        }
        self.lend(&lent, "Proxy");
        self.await_lent(own);
        self.lend(&lent, "VIP");
        self.await_lent(2 * own);
        let ranges = |ranges: &str| {
            let patch = format!(r#"{{"spec": {{"loadBalancerSourceRanges": {ranges}}}}}"#);
            self.lab.kubectl(&["patch", "service", "lent", "-p", &patch]);
        };
        ranges(r#"["198.51.100.0/24"]"#);
        self.await_lent(own);
        ranges("null");
        self.await_lent(2 * own);
    }

    /// A load balancer has these addresses for the Service of [`LENT`], and no others.
    fn lend(&self, addresses: &[IpAddr], mode: &str) {
        let ingress = addresses.iter().map(|ip| format!(r#"{{"ip": "{ip}", "ipMode": "{mode}"}}"#));
        let ingress = ingress.collect::<Vec<_>>().join(", ");
        let status = format!(r#"{{"status": {{"loadBalancer": {{"ingress": [{ingress}]}}}}}}"#);
        let patch = ["patch", "service", "lent", "--subresource=status", "-p", &status];
        self.lab.kubectl(&[&patch[..], &["--type=merge"]].concat());
    }

    /// Waits until that Service with both its backends is reached at so many addresses and ports.
    fn await_lent(&self, count: usize) {
        self.lab.await_table("service-entries", |rows| {
            let complete = |row: &&Vec<String>| row[1] == "default/lent" && row[2].contains(',');
            rows.iter().filter(complete).count() == count
        });
    }

    /// Neither where the one comes later, nor where an agent hears of both at once.
    fn what_a_service_has_of_its_own_is_lent_to_no_other(&self) {
        self.lab.apply(TAKEN);
        let taken = addresses(&self.lab, "taken");
        let shared = [HTTP, DGRAM];
        self.lend(&taken, "VIP");
        // A port that the owner has not is free.
        self.await_lent(2 * PORTS.len() + 2);
        let refused = |_| BTreeSet::from([Said::Refused]);
        check(&self.client, "taken", &taken, &shared, 2, refused);
        self.lab.replace_agent(1);
        check(&self.client, "taken, by another agent", &taken, &shared, 2, refused);
        self.lab.kubectl(&["delete", "service", "taken"]);
        self.await_lent(4 * PORTS.len());
        check(&self.client, "no longer taken", &taken, &PORTS, OFTEN, |_| both());
    }

    /// Whom the address belonged to when a connection was opened is at its other end to the last.
    fn a_connection_outlives_that_its_address_is_lent(&self) {
        let outside = Outside::new(&self.lab);
        serve_echo(&outside.pod);
        let addresses = outside.pod.addresses;
        let mut flows = addresses.map(|to| Flow::tcp(&self.client, to).unwrap());
        let mut goes_on = |word| {
            for flow in &mut flows {
                flow.ask(word).unwrap();
            }
        };
        goes_on(1);
        self.lend(&addresses, "VIP");
        self.await_lent(4 * PORTS.len());
        goes_on(2);
        self.policy("all", "{podSelector: {}, policyTypes: [Egress], egress: [{}]}");
        goes_on(3);
        check(&self.client, "lent by now", &addresses, &[HTTP], OFTEN, |_| both());
        goes_on(4);
        self.forget_policies();
        goes_on(5);
        self.lend(&[], "VIP");
        self.await_lent(2 * PORTS.len());
        goes_on(6);
    }

    fn policies_hold_for_services(&self) {
        let silence = || BTreeSet::from([Said::Silence]);
        self.policy(
            "in",
            "{podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: \
             {app: client}}}], ports: [{port: http}, {port: dgram, protocol: UDP}]}]}",
        );
        let except_alt = |port| if port == ALT { silence() } else { both() };
        check(&self.client, "ingress", &self.web, &PORTS, OFTEN, except_alt);
        for foe in &self.foes {
            check(foe, "ingress of foes", &self.web, &PORTS, 4, |_| silence());
        }
        self.a_pod_reaches_itself();
        // The ports of the two backends have the same names and other numbers.
        self.policy(
            "out",
            "{podSelector: {matchLabels: {app: client}}, policyTypes: [Egress], egress: [{to: \
             [{podSelector: {matchLabels: {app: web}}}], ports: [{port: http}, {port: alt}]}]}",
        );
        let only_http = |port| if port == HTTP { both() } else { silence() };
        check(&self.client, "ingress and egress", &self.web, &PORTS, OFTEN, only_http);
        self.lab.kubectl(&["delete", "netpol", "in"]);
        self.lab.await_policies(1);
        let except_dgram = |port| if port == DGRAM { silence() } else { both() };
        check(&self.client, "egress", &self.web, &PORTS, OFTEN, except_dgram);
        for foe in &self.foes {
            check(foe, "egress of another", &self.web, &PORTS, OFTEN, |_| both());
        }
        self.forget_policies();
        check(&self.client, "policies deleted", &self.web, &PORTS, OFTEN, |_| both());
    }

    /// Its address is then nobody's: new questions find no one, by whatever way.
    fn a_deleted_service_is_no_more(&self) {
        self.lab.kubectl(&["delete", "service", "web"]);
        self.await_backends("default/web", 0, &[]);
        let mut questions = Vec::new();
        for level in LEVELS {
            for address in &self.web {
                questions.extend(PORTS.map(|(protocol, port)| {
                    let to = SocketAddr::new(*address, port);
                    Question { level, protocol, to }
                }));
            }
        }
        for (question, answer) in questions.iter().zip(ask(&self.client, &questions)) {
            assert!(!matches!(answer, Said::Name(_)), "{question:?}: {answer:?}");
        }
    }
}

fn await_backends(lab: &Lab, service: &str, entries: usize, backends: &[IpAddr]) {
    lab.await_table("service-entries", |rows| {
        let rows: Vec<_> = rows.iter().filter(|row| row[1] == service).collect();
        let mentioned: BTreeSet<IpAddr> = rows
            .iter()
            .flat_map(|row| row[2].split([',', ' ']))
            .filter_map(|backend| backend.parse::<SocketAddr>().ok())
            .map(|backend| backend.ip())
            .collect();
        rows.len() == entries && mentioned == backends.iter().copied().collect()
    });
}

#[test]
fn services_lead_where_they_should() {
    let world = World::new();
    let mut times = Vec::new();
    let mut step = |name: &str, work: &dyn Fn()| {
        let begun = Instant::now();
        work();
        times.push(format!("{name} {:.1} s", begun.elapsed().as_secs_f32()));
    };
    step("ways", &|| world.every_way_reaches_every_backend());
    step("unconnected", &|| world.unconnected_sockets_get_answers_from_whom_they_asked());
    step("empty", &|| world.no_backends_no_waiting());
    step("past services", &|| world.a_socket_may_pass_services());
    step("collisions", &|| world.one_port_has_one_use());
    step("hairpin", &|| world.a_pod_reaches_itself());
    step("load balancer", &|| world.a_load_balancers_address_is_one_of_the_service());
    step("owners", &|| world.what_a_service_has_of_its_own_is_lent_to_no_other());
    step("lent later", &|| world.a_connection_outlives_that_its_address_is_lent());
    step("policies", &|| world.policies_hold_for_services());
    step("deleted", &|| world.a_deleted_service_is_no_more());
    println!("{}", times.join(", "));
}

const DEPLOYMENT: &str = r"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: web
        image: registry.k8s.io/e2e-test-images/agnhost
        args: [netexec, --http-port=80, --udp-port=81]
        readinessProbe: {httpGet: {path: /healthz, port: 80}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports: [{name: http, port: 80}]
";

/// An HTTP connection that stays open.
struct Connection(BufReader<TcpStream>);

impl Connection {
    fn open(socket: Socket, to: SocketAddr) -> io::Result<Self> {
        socket.connect_timeout(&to.into(), ENDURANCE)?;
        socket.set_read_timeout(Some(ENDURANCE))?;
        Ok(Self(BufReader::new(socket.into())))
    }

    /// The name of the pod at the other end.
    fn hostname(&mut self) -> io::Result<String> {
        self.0.get_mut().write_all(b"GET /hostname HTTP/1.1\r\nHost: web\r\n\r\n")?;
        let mut length = 0;
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let line = line.trim_end().to_ascii_lowercase();
            if let Some(text) = line.strip_prefix("content-length:") {
                length = text.trim().parse().map_err(io::Error::other)?;
            }
            if line.is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        String::from_utf8(body).map_err(io::Error::other)
    }
}

/// Connections that talk until they break or the test is over.
struct Talks {
    over: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<(String, io::Result<usize>)>>,
}

impl Talks {
    fn start(connections: Vec<(String, Connection)>) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let threads = connections
            .into_iter()
            .map(|(name, mut connection)| {
                let over = over.clone();
                thread::spawn(move || {
                    let mut words = 0;
                    while !over.load(Relaxed) {
                        match connection.hostname() {
                            Ok(said) if said == name => words += 1,
                            Ok(said) => return (name, Err(io::Error::other(said))),
                            Err(error) => return (name, Err(error)),
                        }
                        thread::sleep(Duration::from_millis(20));
                    }
                    (name, Ok(words))
                })
            })
            .collect();
        Self { over, threads }
    }

    fn end(self) -> BTreeMap<String, Vec<io::Result<usize>>> {
        self.over.store(true, Relaxed);
        let mut results = BTreeMap::<_, Vec<_>>::new();
        for thread in self.threads {
            let (name, result) = thread.join().unwrap();
            results.entry(name).or_default().push(result);
        }
        results
    }
}

/// Opens so many connections by every way, each level from a pod of its own, so that they do not
/// meet at one port; each connection tells whom it met.
fn connect(clients: &[Pod; 2], service: &[IpAddr], times: usize) -> Vec<(String, Connection)> {
    let mut connections = Vec::new();
    for (level, client) in LEVELS.into_iter().zip(clients) {
        for address in service {
            let to = SocketAddr::new(*address, 80);
            let kinds = vec![(Domain::for_address(to), Type::STREAM); times];
            for socket in client.sockets(level, kinds) {
                let mut connection = Connection::open(socket, to).unwrap();
                connections.push((connection.hostname().unwrap(), connection));
            }
        }
    }
    connections
}

fn names(connections: &[(String, Connection)]) -> BTreeSet<&str> {
    connections.iter().map(|(name, _)| name.as_str()).collect()
}

/// Names and addresses of the pods that stand behind the Service.
fn backends(lab: &Lab) -> (BTreeSet<String>, Vec<IpAddr>) {
    let list = |path: &str| {
        let text = lab.kubectl(&["get", "pods", "-l", "app=web", "-o", path]);
        text.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let names = list("jsonpath={.items[*].metadata.name}").into_iter().collect();
    let addresses = list("jsonpath={.items[*].status.podIPs[*].ip}");
    (names, addresses.iter().map(|address| address.parse().unwrap()).collect())
}

/// Scales, and waits until every node knows the pods that are left, and only those.
fn scale(lab: &Lab, replicas: usize) -> BTreeSet<String> {
    lab.kubectl(&["scale", "deployment", "web", &format!("--replicas={replicas}")]);
    let wanted = format!("--for=jsonpath={{.status.readyReplicas}}={replicas}");
    lab.kubectl(&["wait", "deployment", "web", &wanted, "--timeout=20s"]);
    eventually("only the pods that stay are left", || backends(lab).0.len() == replicas);
    let (names, addresses) = backends(lab);
    await_backends(lab, "default/web", 2, &addresses);
    names
}

#[test]
fn connections_outlive_the_other_backends() {
    let lab = Lab::up(2);
    lab.apply(DEPLOYMENT);
    let clients = lab.pods([("one", 1), ("other", 1)]);
    assert_eq!(scale(&lab, 3).len(), 3);
    let service = addresses(&lab, "web");
    let first = connect(&clients, &service, 12);
    assert_eq!(names(&first).len(), 3, "48 connections meet all three backends");
    let first = Talks::start(first);

    // New connections all the time; while endpoints come, every one of them must succeed.
    let survivors = scale(&lab, 1);
    let second = connect(&clients, &service, 4);
    assert_eq!(names(&second), survivors.iter().map(String::as_str).collect());
    let second = Talks::start(second);

    let steady = AtomicUsize::new(0);
    let over = AtomicBool::new(false);
    let grown = thread::scope(|scope| {
        let opener = scope.spawn(|| {
            while !over.load(Relaxed) {
                steady.fetch_add(connect(&clients, &service, 1).len(), Relaxed);
            }
        });
        let grown = scale(&lab, 3);
        over.store(true, Relaxed);
        opener.join().unwrap();
        grown
    });
    let third = connect(&clients, &service, 12);
    assert_eq!(names(&third), grown.iter().map(String::as_str).collect());

    let (first, second) = (first.end(), second.end());
    let survivor = survivors.first().unwrap();
    for (name, results) in first.iter().chain(&second) {
        let broken = results.iter().filter(|result| result.is_err()).count();
        println!("{name}: {} connections, {broken} broken", results.len());
        if name == survivor {
            assert_eq!(broken, 0, "{results:?}");
        } else {
            assert_eq!(broken, results.len(), "a backend that is gone still answers");
        }
    }
    println!("{} connections were opened while backends came", steady.load(Relaxed));
    assert!(steady.load(Relaxed) > 20);
}
