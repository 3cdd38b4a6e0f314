//! The cluster's DNS as pods meet it: over both addresses of its Service, UDP and TCP.

use std::{
    collections::BTreeSet,
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    time::Duration,
};

use palisade_lab::dns::{
    wire::{Answer, Name, Query, number},
    zone::reverse,
};
use socket2::{Domain, Socket, Type};

use super::{
    harness::{Lab, Level, Pod, eventually},
    probe::Protocol,
};

const SERVERS: [&str; 2] = ["10.96.0.10", "fd96::a"];
const PROTOCOLS: [Protocol; 2] = [Protocol::Udp, Protocol::Tcp];
const PATIENCE: Duration = Duration::from_secs(1);
/// An id that both bytes of must come back.
const ID: u16 = 0x1234;

const MANIFEST: &str = r"
apiVersion: v1
kind: Namespace
metadata: {name: elsewhere}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {app: a}
  ports:
  - {name: http, port: 80, targetPort: 8080}
  - {name: dgram, port: 53, targetPort: 5300, protocol: UDP}
---
apiVersion: v1
kind: Service
metadata: {name: four}
spec:
  ipFamilies: [IPv4]
  selector: {app: a}
  ports: [{port: 80}]
---
apiVersion: v1
kind: Service
metadata: {name: outside}
spec: {type: ExternalName, externalName: web.default.svc.cluster.local}
---
apiVersion: v1
kind: Service
metadata: {name: heads}
spec:
  clusterIP: None
  ipFamilyPolicy: RequireDualStack
  selector: {heads: 'yes'}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: named, labels: {heads: 'yes'}}
spec:
  nodeName: node1
  hostname: one
  subdomain: heads
  containers: [{name: pause, image: registry.k8s.io/pause}]
---
apiVersion: v1
kind: Pod
metadata: {name: nameless, labels: {heads: 'yes'}}
spec:
  nodeName: node2
  containers: [{name: pause, image: registry.k8s.io/pause}]
---
apiVersion: v1
kind: Pod
metadata: {name: shell, namespace: elsewhere}
spec:
  nodeName: node2
  containers: [{name: shell, image: docker.io/library/busybox}]
---
apiVersion: v1
kind: Pod
metadata: {name: shell}
spec:
  nodeName: node2
  containers: [{name: shell, image: docker.io/library/busybox}]
";

/// Sends bytes from `pod` to the server; what comes back.
fn exchange(pod: &Pod, protocol: Protocol, server: IpAddr, message: &[u8]) -> io::Result<Vec<u8>> {
    let to = SocketAddr::new(server, 53);
    let kind = if protocol == Protocol::Tcp { Type::STREAM } else { Type::DGRAM };
    let kinds = vec![(Domain::for_address(to), kind)];
    let socket: Socket = pod.sockets(Level::Socket, kinds).remove(0);
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    let mut answer = vec![0; 4096];
    if protocol == Protocol::Udp {
        let socket = UdpSocket::from(socket);
        socket.send(message)?;
        let length = socket.recv(&mut answer)?;
        answer.truncate(length);
        return Ok(answer);
    }
    let mut stream = TcpStream::from(socket);
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), message].concat())?;
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    answer.truncate(u16::from_be_bytes(length).into());
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

fn query(pod: &Pod, protocol: Protocol, server: &str, name: &str, kind: u16) -> io::Result<Answer> {
    let query = Query::new(ID, Name::parse(name).unwrap(), kind);
    let message = query.message();
    let bytes = exchange(pod, protocol, server.parse().unwrap(), &message)?;
    let question = 12..12 + name.len() + 2 + 4;
    assert_eq!(bytes[question.clone()], message[question], "the question comes back as it was");
    let answer = query.read_answer(&bytes);
    answer.ok_or_else(|| io::Error::other(format!("no answer to this: {bytes:x?}")))
}

/// The data of the answers, by every way to the server.
fn look_up(pod: &Pod, name: &str, kind: u16) -> Result<BTreeSet<String>, u8> {
    let ways = SERVERS.iter().flat_map(|server| PROTOCOLS.map(|protocol| (*server, protocol)));
    let mut results: Vec<_> = ways
        .map(|(server, protocol)| {
            let answer = query(pod, protocol, server, name, kind).unwrap();
            assert!(answer.answers.iter().all(|record| record.ttl > 0), "{answer:?}");
            match answer.code {
                number::NO_ERROR => {
                    Ok(answer.answers.iter().map(|record| record.data.to_string()).collect())
                }
                code => Err(code),
            }
        })
        .collect();
    results.dedup();
    assert_eq!(results.len(), 1, "the ways differ: {results:?}");
    results.remove(0)
}

fn texts<T: ToString>(items: impl IntoIterator<Item = T>) -> Result<BTreeSet<String>, u8> {
    Ok(items.into_iter().map(|item| item.to_string()).collect())
}

struct World {
    lab: Lab,
    client: Pod,
    named: Pod,
    nameless: Pod,
    web: [IpAddr; 2],
}

impl World {
    fn new() -> Self {
        let lab = Lab::up(2);
        lab.apply(MANIFEST);
        let [_, client] = lab.pods([("a", 2), ("client", 1)]);
        let elsewhere = ["-n", "elsewhere", "wait", "--for=condition=Ready", "pod/shell"];
        lab.kubectl(&elsewhere);
        let [named, nameless] = ["named", "nameless"].map(|name| lab.pod("default", name));
        let ready = ["-n", "kube-system", "rollout", "status", "deployment/kube-dns"];
        lab.kubectl(&ready);
        let web = lab.kubectl(&["get", "svc", "web", "-o", "jsonpath={.spec.clusterIPs[*]}"]);
        let web: Vec<IpAddr> = web.split_whitespace().map(|ip| ip.parse().unwrap()).collect();
        let world = Self { lab, client, named, nameless, web: [web[0], web[1]] };
        eventually("DNS knows the pods", || {
            let heads = look_up(&world.client, "heads.default.svc.cluster.local", number::AAAA);
            heads.is_ok_and(|heads| heads.len() == 2)
        });
        world
    }

    fn ask(&self, name: &str, kind: u16) -> Result<BTreeSet<String>, u8> {
        look_up(&self.client, name, kind)
    }

    fn services(&self) {
        let [v4, v6] = self.web;
        let web = "web.default.svc.cluster.local";
        assert_eq!(self.ask(web, number::A), texts([v4]));
        assert_eq!(self.ask(web, number::AAAA), texts([v6]));
        assert_eq!(self.ask("WEB.Default.svc.CLUSTER.local", number::A), texts([v4]));
        for (owner, port) in [("_http._tcp", 80), ("_dgram._udp", 53)] {
            let expected = texts([format!("0 100 {port} {web}.")]);
            assert_eq!(self.ask(&format!("{owner}.{web}"), number::SRV), expected);
        }
        for address in self.web {
            assert_eq!(self.ask(&reverse(address), number::PTR), texts([format!("{web}.")]));
        }
        let alias = self.ask("outside.default.svc.cluster.local", number::A);
        assert_eq!(alias, texts([format!("{web}."), v4.to_string()]));
        let kubernetes = self.ask("kubernetes.default.svc.cluster.local", number::A);
        assert_eq!(kubernetes, texts(["10.96.0.1"]));
    }

    fn headless(&self) {
        let heads = "heads.default.svc.cluster.local";
        let (one, other) = (self.named.addresses, self.nameless.addresses);
        let ports = self.ask(&format!("_http._tcp.{heads}"), number::SRV).unwrap();
        let hosts: BTreeSet<&str> = ports
            .iter()
            .map(|port| port.strip_prefix("0 100 8080 ").unwrap().strip_suffix('.').unwrap())
            .collect();
        // A name of its own for each address of the nameless pod, one for the other.
        assert_eq!(hosts.len(), 3, "{hosts:?}");
        for (index, kind) in [number::A, number::AAAA].into_iter().enumerate() {
            assert_eq!(self.ask(heads, kind), texts([one[index], other[index]]));
            assert_eq!(self.ask(&format!("one.{heads}"), kind), texts([one[index]]));
            let pointer = self.ask(&reverse(one[index]), number::PTR);
            assert_eq!(pointer, texts([format!("one.{heads}.")]));
            let pointer = self.ask(&reverse(other[index]), number::PTR).unwrap();
            let host = pointer.first().unwrap().strip_suffix('.').unwrap();
            assert!(hosts.contains(host), "{host} is not in {hosts:?}");
            assert_eq!(self.ask(host, kind), texts([other[index]]));
        }
    }

    fn what_is_not_there(&self) {
        for name in [
            "nobody.default.svc.cluster.local",
            "web.elsewhere.svc.cluster.local",
            "_other._tcp.web.default.svc.cluster.local",
            "cluster.local.default.svc.cluster.local",
            "9.9.96.10.in-addr.arpa",
        ] {
            assert_eq!(self.ask(name, number::A), Err(number::NAME_ERROR), "{name}");
        }
        // The name is there, the type is not.
        let nothing = texts::<&str>([]);
        assert_eq!(self.ask("four.default.svc.cluster.local", number::AAAA), nothing);
        assert_eq!(self.ask("default.svc.cluster.local", number::A), nothing);
        // Not this cluster's to say.
        assert_eq!(self.ask("example.org", number::A), Err(number::REFUSED));
        let answer =
            query(&self.client, Protocol::Udp, SERVERS[0], "nobody.cluster.local", number::A)
                .unwrap();
        let kinds: Vec<u16> = answer.authority.iter().map(|record| record.data.kind()).collect();
        assert_eq!(kinds, [number::SOA], "who says so, and for how long");
    }

    /// Names as people write them, through the container's own `resolv.conf`.
    fn search_lists(&self) {
        let found = |namespace: &str, name: &str| {
            let arguments = ["-n", namespace, "exec", "shell", "--", "nslookup", name];
            self.lab
                .try_kubectl(&arguments)
                .is_some_and(|out| out.contains(&self.web[0].to_string()))
        };
        for name in ["web", "web.default", "web.default.svc", "web.default.svc.cluster.local"] {
            assert!(found("default", name), "{name} in default");
            assert_eq!(found("elsewhere", name), name != "web", "{name} in elsewhere");
        }
        assert!(!found("default", "web.elsewhere"));
    }

    fn malformed_questions(&self) {
        let good = Query::new(ID, Name::parse("web.default.svc.cluster.local").unwrap(), number::A);
        let good = good.message();
        let with = |index: usize, byte: u8| {
            let mut message = good.clone();
            message[index] = byte;
            message
        };
        let mut messages = vec![
            Vec::new(),
            vec![0x12],
            vec![0xff; 512],
            vec![0; 4000],
            // No question, and more than there are.
            with(5, 0),
            with(5, 2),
            with(4, 0xff),
            // A label that is longer than the message, one of a reserved kind, a pointer to itself.
            with(12, 63),
            with(12, 0x80),
            [&good[..12], &[0xc0, 12, 0, 1, 0, 1]].concat(),
            // Names that never end.
            [&good[..12], &[1, b'a'].repeat(200)].concat(),
            // Another operation, and an answer.
            with(2, 0x29),
            with(2, 0x81),
        ];
        messages.extend((0..good.len()).map(|length| good[..length].to_vec()));
        let server: IpAddr = SERVERS[0].parse().unwrap();
        let socket =
            self.client.sockets(Level::Socket, vec![(Domain::IPV4, Type::DGRAM)]).remove(0);
        let socket = UdpSocket::from(socket);
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.connect((server, 53)).unwrap();
        for message in &messages {
            socket.send(message).unwrap();
        }
        socket.send(&good).unwrap();
        // Datagrams of one flow keep their order: the good answer is the last.
        let mut refused = 0;
        let mut answer = [0; 512];
        loop {
            let length = socket.recv(&mut answer).unwrap();
            assert!(length >= 12 && answer[2] & 0x80 != 0, "{:x?}", &answer[..length]);
            let code = answer[3] & 0x0f;
            if code == number::NO_ERROR {
                break;
            }
            assert!([number::FORMAT_ERROR, number::NOT_IMPLEMENTED].contains(&code), "{code}");
            refused += 1;
        }
        println!(
            "{} malformed questions, {refused} refused, the others not answered",
            messages.len()
        );
        assert!(refused > 20);
        for message in &messages {
            let answer = exchange(&self.client, Protocol::Tcp, server, message);
            let code = answer.map(|answer| answer[3] & 0x0f);
            let refused = matches!(code, Ok(number::FORMAT_ERROR | number::NOT_IMPLEMENTED));
            assert!(refused || code.is_err(), "{message:x?}: {code:?}");
        }
        let restarts = ["-n", "kube-system", "get", "pods", "-o"];
        let path = "jsonpath={.items[*].status.containerStatuses[*].restartCount}";
        assert_eq!(self.lab.kubectl(&[&restarts[..], &[path]].concat()), "0");
        self.services();
    }

    fn policy(&self) {
        let reachable = || {
            SERVERS.map(|server| {
                PROTOCOLS.map(|protocol| {
                    query(
                        &self.client,
                        protocol,
                        server,
                        "web.default.svc.cluster.local",
                        number::A,
                    )
                    .is_ok()
                })
            })
        };
        self.lab.apply_policy(
            "default",
            "udp-only",
            "{podSelector: {matchLabels: {app: client}}, policyTypes: [Egress], egress: [{to: \
             [{namespaceSelector: {}, podSelector: {matchLabels: {k8s-app: kube-dns}}}], ports: \
             [{port: 53, protocol: UDP}]}]}",
        );
        assert_eq!(reachable(), [[true, false]; 2]);
        self.lab.kubectl(&["delete", "netpol", "udp-only"]);
        self.lab.await_policies(0);
        assert_eq!(reachable(), [[true, true]; 2]);
        self.lab.apply_policy(
            "kube-system",
            "not-from-default",
            "{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: \
             {kubernetes.io/metadata.name: elsewhere}}}]}]}",
        );
        assert_eq!(reachable(), [[false, false]; 2]);
        let elsewhere = ["-n", "elsewhere", "exec", "shell", "--", "nslookup", "web.default"];
        assert!(self.lab.try_kubectl(&elsewhere).is_some());
    }
}

#[test]
fn pods_find_services_by_name() {
    let world = World::new();
    world.services();
    world.headless();
    world.what_is_not_there();
    world.search_lists();
    world.malformed_questions();
    world.policy();
}
